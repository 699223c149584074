"""Machine code in the place of the functions of a generated program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from unrollc.backends.kernel import Kernel, Layouts, Spec
from unrollc.plan.pieces import Pieces

Function = Callable[..., Sequence[Any]]


def bound(kernel: Kernel, run: Callable[[Sequence[Tensor]], list[Tensor]] | None) -> Function:
    """The function of the generated program that a kernel was made of.

    Args:
        kernel: Which tensors go where.
        run: Its machine code; None where the function computes nothing.
    """
    take = _picked(kernel.takes, kernel.arguments)
    count = len(kernel.outputs)
    give = None
    if kernel.gives != tuple(range(count)):
        give = _picked(kernel.gives, count + kernel.arguments)
    astray: list[tuple[int, Spec]] | None = None

    def function(*arguments: Any) -> Sequence[Any]:
        nonlocal astray
        flat: list[Tensor] = []
        for each in arguments[: kernel.lists]:
            flat += each
            each.clear()
        flat += arguments[kernel.lists :]
        flat += kernel.constants
        results = [] if run is None else run(flat if take is None else take(flat))
        if astray is None:  # what a kernel returns lies in memory in the same way at every call
            astray = _astray(kernel.outputs, results)
        for place, spec in astray:
            results[place] = spec.laid_out(results[place])
        if give is not None:
            results += flat
            results = give(results)
        return _returned(kernel, results)

    return function


def arranged(kernel: Kernel, function: Function) -> Function:
    """A function of the generated program whose results lie in memory as kernels take them.

    Args:
        kernel: The function's own, which says how.
        function: The function, which calls PyTorch's ops.
    """
    count = len(kernel.outputs)
    specs = [kernel.outputs[place] if place < count else None for place in kernel.gives]
    astray: list[tuple[int, Spec]] | None = None

    def wrapped(*arguments: Any) -> Sequence[Any]:
        nonlocal astray
        results = list(function(*arguments))
        residuals = results.pop() if kernel.residuals else []
        results += residuals
        if astray is None:  # ops give equal inputs the same layouts at every call
            astray = _astray(specs, results)
        for place, spec in astray:
            results[place] = spec.laid_out(results[place])
        return _returned(kernel, results)

    return wrapped


def _astray(specs: Sequence[Spec | None], results: Sequence[Tensor]) -> list[tuple[int, Spec]]:
    """The places of results that do not lie in memory as they should."""
    pairs = enumerate(zip(specs, results, strict=True))
    return [(place, spec) for place, (spec, t) in pairs if spec is not None and not spec.fits(t)]


def _returned(kernel: Kernel, results: list[Tensor]) -> Sequence[Any]:
    """What a function returns: residuals stand in a list of their own."""
    if not kernel.residuals:
        return results
    residuals = results[-kernel.residuals :]
    del results[-kernel.residuals :]
    return [*results, residuals]


def _picked(places: tuple[int, ...], count: int) -> Callable[[list[Tensor]], list[Tensor]] | None:
    """Picks items of a list; None if that is all of them, in order."""
    if places == tuple(range(count)):
        return None
    if len(places) < 2:
        return lambda items: [items[place] for place in places]
    pick = itemgetter(*places)
    return lambda items: list(pick(items))


class Conformed(dict[str, Any]):
    """Inputs of a program that lie in memory as its kernels take them."""


def conforming(pieces: Pieces) -> Callable[[Mapping[str, Any]], Conformed]:
    """What brings the inputs of a program into the layouts that it was compiled for.

    A tensor that is in another layout than at the time of compilation is copied.
    """
    strides = Layouts(pieces).inputs()

    def laid_out(label: str, tensor: Tensor, rows: bool) -> Tensor:
        shape = tuple(tensor.shape[1:] if rows else tensor.shape)
        wanted = strides.get((label, shape))
        plain = not (tensor.is_conj() or tensor.is_neg())
        if wanted is None or not tensor.numel():
            return tensor
        if rows:
            extent = 1 + sum((n - 1) * s for n, s in zip(shape, wanted, strict=True))
            # Rows may be further apart than they are long.
            own = tensor.stride()[0] if tensor.stride()[0] >= extent else extent
            shape, wanted = (tensor.shape[0], *shape), (own, *wanted)
        spec = Spec(shape, wanted, str(tensor.dtype), str(tensor.device))
        return tensor if plain and spec.fits(tensor) else spec.laid_out(tensor.detach())

    def conform(inputs: Mapping[str, Any]) -> Conformed:
        if isinstance(inputs, Conformed):
            return inputs
        found = Conformed()
        for label, value in inputs.items():
            if isinstance(value, list):
                found[label] = [laid_out(label, each, False) for each in value]
            else:
                found[label] = laid_out(label, value, label in pieces.stacked)
        return found

    return conform
