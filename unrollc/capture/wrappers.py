"""What PyTorch lets users wrap around a computation, and what it means in a captured step.

Checkpointing changes when values are computed and not which, so at capture the function is simply
run; what is kept and what recomputed is the schedule's business. The other rows cannot be
expressed in a step graph and say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.jit._fuser import optimized_execution
from torch.jit._state import _python_cu
from torch.utils import checkpoint

from unrollc.capture.source import SourceFinder
from unrollc.errors import CaptureError


@contextlib.contextmanager
def wrappers_undone(sources: SourceFinder) -> Iterator[None]:
    """While this is open, each row of the table below stands for what it wraps.

    Args:
        sources: Finds the user's line for errors.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(optimized_execution(False))
        _forget_optimized_scripts()
        for owner, name, replacement in _ROWS:
            stack.enter_context(_replaced(owner, name, replacement, sources))
        yield


def _forget_optimized_scripts() -> None:
    """Scripted functions are executed op by op: what has been optimized detaches its operands."""
    scripts: Any = _python_cu
    for function in scripts.get_functions():
        function._debug_flush_compilation_cache()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, replacement: Any, sources: SourceFinder) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement(original, sources))
    try:
        yield
    finally:
        setattr(owner, name, original)


def run_checkpointed(sources: SourceFinder, run: Callable[..., Any], *args: Any) -> Any:
    """``checkpoint(run, *args, use_reentrant=True)`` without the recomputation."""
    if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        raise CaptureError(
            "checkpoint(..., use_reentrant=True) is given no tensor that requires grad",
            where=sources.here(),
            why="PyTorch then trains none of the parameters inside",
            remedy="pass use_reentrant=False",
        )
    return run(*args)


def _checkpoint(original: Any, sources: SourceFinder) -> Any:
    def generator(
        fn: Any,
        preserve_rng_state: bool = True,
        context_fn: Any = checkpoint.noop_context_fn,
        determinism_check: str = "default",
        debug: bool = False,
        early_stop: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[None]:
        forward, _ = context_fn()
        with forward:
            yield

    return generator


def _saved_tensors_hooks(original: Any, sources: SourceFinder) -> Any:
    def enter(self: Any) -> None:
        if not isinstance(self, save_on_cpu):
            raise CaptureError(
                f"the model opens {type(self).__name__}",
                where=sources.here(),
                why="what its hooks do to saved tensors changes gradients, and step graphs save "
                "no tensors",
                remedy="leave it out; the memory plan decides what is kept",
            )

    return enter


def _backward(original: Any, sources: SourceFinder) -> Any:
    def backward(*args: Any, **kwargs: Any) -> None:
        raise CaptureError(
            "backward() is called while the model or the loss runs",
            where=sources.here(),
            why="it adds to .grad, which the optimizer's step would see in ordinary training",
            remedy="use torch.autograd.grad(..., create_graph=True)",
        )

    return backward


def _scale(original: Any, sources: SourceFinder) -> Any:
    def scale(self: Any, outputs: Any) -> Any:
        if self.is_enabled():
            raise CaptureError(
                "GradScaler.scale is called in a loss",
                where=sources.here(),
                why="its unscale_ and step belong to a training loop of your own; the captured "
                "optimizer would see the scaled gradient",
                remedy="return the loss itself (bfloat16 needs no scaling)",
            )
        return original(self, outputs)

    return scale


def _nothing(original: Any, sources: SourceFinder) -> Any:
    return lambda self, *details: None


#: Whose attribute is replaced during capture, which, and by what.
_ROWS: tuple[tuple[Any, str, Callable[[Any, SourceFinder], Any]], ...] = (
    (checkpoint, "_checkpoint_without_reentrant_generator", _checkpoint),
    (saved_tensors_hooks, "__enter__", _saved_tensors_hooks),
    (saved_tensors_hooks, "__exit__", _nothing),
    (torch.autograd, "backward", _backward),
    (torch.amp.grad_scaler.GradScaler, "scale", _scale),
)
