"""Does machine code compute what the ops do that it was made of?

Run in the worker process; it imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class DisagreementError(Exception):
    """Compiled code computes something else than PyTorch's ops."""


def verify(module: Any, run: Callable[[Sequence[Any]], list[Any]], examples: list[Any]) -> None:
    """Hold the machine code against PyTorch's ops on random numbers.

    How far rounding may take the two apart is seen from how far the ops' own results move when
    their inputs, or the result of every op on the way, move by some units in the last place, and
    from how far they are from what the ops return in float64. Moved inputs alone would not show
    it: what cancels out on paper cancels out for them too. Nor would moved results: by chance,
    those of a single number may move next to nothing, and a long sum is off by more than a few
    units.

    Raises:
        DisagreementError: If they are further apart.
    """
    for signed in (False, True):
        inputs = _random(examples, signed, nudge=0.0)
        expected = module(*inputs)
        nudged = module(*_random(examples, signed, nudge=_MOVED))
        near = zip(nudged, _inexactly(module, inputs), strict=True)
        exact = _exactly(module, inputs)
        results = run(inputs)
        for place, compared in enumerate(zip(results, expected, near, exact, strict=True)):
            if not agree(*compared):
                raise DisagreementError(
                    f"result {place} differs from that of PyTorch's ops on the same random numbers"
                )
        if not _shared(inputs, results) <= _shared(inputs, expected):
            raise DisagreementError("two results, or a result and an input, share memory")


def _shared(inputs: Sequence[Any], results: Sequence[Any]) -> set[tuple[int, int]]:
    """Pairs of tensors on one storage, by their places among inputs and results."""
    storages = [each.untyped_storage()._cdata for each in (*inputs, *results)]
    return {
        (first, second)
        for second in range(len(inputs), len(storages))
        for first in range(second)
        if storages[first] == storages[second]
    }


def agree(ours: Any, theirs: Any, near: Sequence[Any], exact: Any) -> bool:
    """Whether two results are equal but for rounding.

    Args:
        ours, theirs: The results.
        near: What `theirs` might be with other rounding.
        exact: What `theirs` would be with next to none, in another dtype.
    """
    import torch

    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    if not theirs.dtype.is_floating_point:
        steady = all(torch.equal(theirs, each.to(theirs.dtype)) for each in (*near, exact))
        return bool(torch.equal(ours, theirs)) or not steady
    precision = torch.finfo(theirs.dtype).eps
    every = (ours, theirs, exact, *near)
    ours, theirs, exact, *near = (each.double().flatten() for each in every)
    sound = torch.stack([torch.isfinite(each) for each in (theirs, exact, *near)]).all(0)
    scale = torch.where(sound, theirs, 0).norm()
    reach = 50 * max(torch.where(sound, theirs - each, 0).norm() for each in near)
    reach = max(reach, 10 * torch.where(sound, theirs - exact, 0).norm())
    error = torch.where(sound, ours - theirs, 0).norm()
    # Without a finite bound the comparison fails, as it does where `ours` alone is not finite.
    return bool(error <= 1e3 * precision * scale + reach + precision)


#: Units in the last place by which numbers are moved.
_MOVED = 4.0


def _inexactly(module: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """What the ops return if each result on the way is off by up to `_MOVED` units.

    Source: D. S. Parker, Monte Carlo Arithmetic, UCLA CSD-970002, 1997.
    """
    import torch
    from torch import fx

    generator = torch.Generator().manual_seed(1)

    def moved(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(moved(each) for each in value)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return value
        off = torch.rand(value.shape, generator=generator, dtype=torch.float64) * 2 - 1
        off = 1 + _MOVED * torch.finfo(value.dtype).eps * off
        return (value.double() * off.to(value.device)).to(value.dtype)

    class Inexact(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            return result if node.op == "output" else moved(result)

    return Inexact(module).run(*inputs)  # type: ignore[no-any-return]


def _exactly(module: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    """What the ops return in float64: the same numbers but for the rounding of a shorter dtype."""
    import torch
    from torch import fx

    def longer(value: Any) -> Any:
        short = isinstance(value, torch.dtype) and value.is_floating_point
        return torch.float64 if short else value

    class Exact(fx.Interpreter):
        def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[Any, Any]:
            args, kwargs = super().fetch_args_kwargs_from_env(node)
            return fx.node.map_aggregate((args, kwargs), longer)

    if any(node.target is torch.ops.aten.view.dtype for node in module.graph.nodes):
        return module(*inputs)  # type: ignore[no-any-return] # bits of another dtype mean others
    given = [each.double() if each.dtype.is_floating_point else each for each in inputs]
    return Exact(module).run(*given)  # type: ignore[no-any-return]


def _random(examples: list[Any], signed: bool, nudge: float) -> list[Any]:
    """Inputs of a size at which layers neither saturate nor vanish; integers are valid indices.

    Args:
        examples: Fake tensors.
        signed: Whether there are negative numbers among them.
        nudge: By how many units in the last place they are moved.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = []
    for example in examples:
        real = torch.empty_strided(
            example.shape, example.stride(), dtype=example.dtype, device=example.device
        )
        if example.dtype.is_floating_point:
            numbers = torch.rand(example.shape, generator=generator, dtype=torch.float64) + 0.25
            if signed and example.dim():
                numbers -= 0.75
            numbers /= max(example.shape[-1:] or (1,)) ** 0.5
            ulps = torch.rand(example.shape, generator=generator, dtype=torch.float64) - 0.5
            numbers *= 1 + nudge * torch.finfo(example.dtype).eps * ulps
            real.copy_(numbers)
        elif example.dtype is torch.bool:
            real.copy_(torch.rand(example.shape, generator=generator) < 0.5)
        else:
            real.zero_()
        inputs.append(real)
    return inputs
