"""Children that are killed: at random moments, or before a chosen call of the operating system.

The children are forked from one process that has imported everything, so that a restart takes
milliseconds. That process must have no threads; it is a script that a test runs.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

#: Events of `sys.addaudithook` after which the disk may look different.
_CHANGES = frozenset(
    {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "fcntl.flock"}
)


def _fork(task: Callable[[], None]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _was_killed(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def run_through(task: Callable[[], None]) -> float:
    """Run a task to its end; returns the seconds that it took."""
    begin = time.perf_counter()
    assert not _was_killed(_fork(task))
    return time.perf_counter() - begin


@contextlib.contextmanager
def beside(task: Callable[[], None]) -> Iterator[None]:
    """Run a task while the block runs; it must succeed."""
    child = _fork(task)
    yield
    assert not _was_killed(child)


def kill_until_done(task: Callable[[], None], longest: float, draw: random.Random) -> int:
    """Start a task again and again until it gets through; returns how often it was killed.

    Args:
        task: What to run.
        longest: Each child is killed after a random time up to so many seconds, a tenth more for
            each child, so that a machine that has become slower gets through too.
        draw: Where the times come from.
    """
    kills = 0
    while True:
        child = _fork(task)
        time.sleep(draw.uniform(0, longest))
        os.kill(child, signal.SIGKILL)  # a zombie takes it too: nobody has waited for it
        if not _was_killed(child):
            return kills
        kills += 1
        longest *= 1.1


def kill_before_change(task: Callable[[], None], number: int) -> bool:
    """Kill a task just before its `number`-th change of files; whether it came so far."""

    def counted() -> None:
        left = number

        def hook(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if event in _CHANGES:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        task()

    return _was_killed(_fork(counted))
