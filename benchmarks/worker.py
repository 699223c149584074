"""One implementation of one workload in a process of its own, which does what it is told.

Requests and replies are JSON, one a line. The first request says what to prepare; then follow
``call``, ``memory``, ``settle``, ``profile`` and ``save``, in any order. Whatever libraries print
goes to the standard error. Thread pools, allocators and caches of an implementation live here and
touch no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def prepare(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``Prepared`` and the reply: seconds that compiling took, and what is known before a run."""
    if request["dtype"] == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
    import torch
    from registry import BY_NAME
    from workloads import build

    dtype = getattr(torch, request["dtype"])
    torch.set_default_dtype(dtype)
    implementation = BY_NAME[request["implementation"]]
    problem = build(request["workload"], request["steps"] or None, dtype)
    if implementation.package is not None:  # importing is no part of compiling
        __import__(implementation.package)
    start = time.perf_counter()
    prepared = implementation.make(problem, request["budget"])
    seconds = time.perf_counter() - start

    def clean() -> None:
        for leaf in problem.leaves.values():
            leaf.grad = None

    settles = prepared.settle is not None
    facts = {"threads": torch.get_num_threads(), "settles": settles, **prepared.facts}
    reply = {"seconds": seconds, **facts}
    return (prepared, clean), reply


def answer(state: tuple[Any, Callable[[], None]], request: dict[str, Any]) -> dict[str, Any]:
    """Do one thing with what is prepared."""
    prepared, clean = state
    if request["do"] == "call":
        return {"seconds": [_timed(prepared.call, clean) for _ in range(request["times"])]}
    if request["do"] == "memory":
        from resident import load_kernels, resident_peak

        load_kernels()
        clean()
        resident, seconds = resident_peak(prepared.call)
        return {"resident": resident, "seconds": seconds}
    if request["do"] == "settle":
        if prepared.settle is not None:
            prepared.call()
            prepared.settle()
        return {}
    if request["do"] == "profile":
        from breakdown import breakdown

        clean()
        return {"profile": breakdown(prepared.call)}
    assert request["do"] == "save", request
    import torch

    clean()
    losses = prepared.call()
    torch.save(prepared.gradients(), request["path"])
    return {"losses": losses}


def _timed(call: Callable[[], Any], clean: Callable[[], None]) -> float:
    clean()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


#: Characters of an error that are reported.
_MOST_SAID = 400


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    state: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                state, reply = prepare(request)
            else:
                reply = answer(state, request)
        except Exception as error:  # whatever it is, the table says it
            text = " ".join(str(error).split())[:_MOST_SAID]
            reply = {"failed": f"{type(error).__name__}: {text}"}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
