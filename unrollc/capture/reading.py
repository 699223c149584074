"""Numbers that Python reads from traced tensors: their values, and the guards that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from unrollc.capture import refusals
from unrollc.capture.nests import map_tensors, tensors_in
from unrollc.errors import Source

if TYPE_CHECKING:
    from unrollc.capture.record import Recorder

aten = torch.ops.aten

#: Concrete values are followed through ops on tensors of at most this many elements.
CONCRETE_NUMEL = 16

#: Comparisons with zero whose answer is another one for a small positive number.
_ZERO_TESTS = (aten.ne.Scalar, aten.eq.Scalar, aten.gt.Scalar, aten.le.Scalar)

#: Comparisons whose answer may be another one on either side of equal operands.
_COMPARISONS = ("eq", "ne", "gt", "le", "lt", "ge")


@dataclass(frozen=True)
class Guard:
    """A concrete number that the captured Python code took from a tensor.

    The graph is valid only for inputs under which `node` has `value` again.

    Attributes:
        node, value: What was read.
        source: The line that reads it.
        truth: Whether it is the outcome of a test.
        boundary: Whether the test compares equal operands, so that another branch begins here.
    """

    node: fx.Node
    value: float | int | bool | list[int]
    source: Source | None
    truth: bool
    boundary: bool = False


def follow(recorder: Recorder, node: fx.Node, func: Any, args: Any, kwargs: Any) -> None:
    """Compute `node` on concrete values as well, where all its inputs have one."""
    tensors = tensors_in((args, kwargs))
    if not all(recorder._nodes[id(tensor)] in recorder.concrete for tensor in tensors):
        return
    results = tensors_in(node.meta["val"])
    if any(x.numel() > CONCRETE_NUMEL for x in results):
        return
    if not tensors and any(x.dim() for x in results):
        return
    real_args, real_kwargs = map_tensors(
        lambda tensor: recorder.concrete[recorder._nodes[id(tensor)]], (args, kwargs)
    )
    real_kwargs = {**real_kwargs, **({"device": "cpu"} if "device" in real_kwargs else {})}
    with torch._C._DisableTorchDispatch():
        recorder.concrete[node] = func(*real_args, **real_kwargs)


def read_number(recorder: Recorder, tensor: Tensor) -> float | int | bool:
    """The value that Python asks for; it becomes a guard.

    Raises:
        CaptureError: If it depends on data.
    """
    node = recorder._nodes.get(id(tensor))
    if node is None:  # a real tensor of the user's: its value is part of the captured code
        node = recorder._nodes[id(recorder._known(tensor))]
        recorder.concrete[node] = tensor.detach().cpu()
    source = recorder._line()
    if (label := _zero_tested(recorder, node)) is not None:
        recorder.zero_tests.append((label, source))
        if label in recorder.nonzero:
            return _as_if_positive(recorder, node, source)
    if node not in recorder.concrete:
        raise refusals.value_of_data(source)
    value = recorder.concrete[node].item()
    boundary = label is None and _at_boundary(recorder, node)
    truth = isinstance(value, bool)
    recorder.guards.append(Guard(node, value, source, truth, boundary))
    return value


def _zero_tested(recorder: Recorder, node: fx.Node) -> str | None:
    """The hyperparameter that ``x != 0``, ``x > 0`` and the like ask about, if it is exactly 0.

    The answer changes where it becomes positive; ``x < 0`` and ``x >= 0`` keep theirs.
    """
    if node.target not in _ZERO_TESTS or node.args[1] != 0:
        return None
    tested: Any = node.args[0]
    labels = tested.meta.get("hyper", ())
    if tested.op != "placeholder" or len(labels) != 1 or tested not in recorder.concrete:
        return None
    return str(labels[0]) if not recorder.concrete[tested].any() else None


def _as_if_positive(recorder: Recorder, test: fx.Node, source: Source | None) -> bool:
    """The answer of a test ``x != 0`` or ``x > 0`` for a positive x.

    It stays so as long as x is not negative, which is guarded where the answer would change.
    """
    if test.target in (aten.gt.Scalar, aten.le.Scalar):
        tested: Any = test.args[0]
        negative = recorder.graph.call_function(aten.lt.Scalar, (tested, 0))
        recorder.concrete[negative] = recorder.concrete[tested] < 0
        recorder.guards.append(Guard(negative, False, source, truth=True))
    answer = test.target in (aten.ne.Scalar, aten.gt.Scalar)
    recorder.assumed.append(Guard(test, answer, source, truth=True))
    return answer


def _at_boundary(recorder: Recorder, test: fx.Node) -> bool:
    """Whether a test compares two equal numbers.

    ``x < 0`` and ``x >= 0`` at zero do not count: they ask whether x is in bounds.
    """
    name = getattr(test.target, "__name__", "").partition(".")[0]
    if name not in _COMPARISONS:
        return False
    first, second = (
        recorder.concrete[x] if isinstance(x, fx.Node) else torch.as_tensor(x) for x in test.args
    )
    bounds = name in ("lt", "ge") and not bool(second.any())
    return not bounds and bool((first == second).all())
