"""Tasks side by side: ``the loop of one task --> the loop of n tasks with equal shapes``.

Every value that differs between tasks gets a leading axis of n: the batches, and what the state
becomes with them. Hyperparameters, context and step counters stay as they are. Ops are rewritten
one by one by the batching rules of `torch.func.vmap`, so that an op of the new graph stands where
the old one stood, with its phase and line, and the axis is in front everywhere.

Losses have shape ``[n]``. The gradients that a step records are those of their sum, which moves
each task's weights as its own loss does; so a derivative of the new loop is the sum over tasks.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from unrollc.capture.assemble import assemble
from unrollc.capture.loop import Loop
from unrollc.capture.naming import Names
from unrollc.capture.nests import is_continuous
from unrollc.capture.source import SourceFinder
from unrollc.differentiate.guarded import guards_of
from unrollc.differentiate.pure import PureRecorder
from unrollc.differentiate.replay import Replay, calls
from unrollc.optimize.batching_rules import RULES, Operands, repeated
from unrollc.optimize.congruence import Key, key_of
from unrollc.requirements.edges import carried
from unrollc.step import ATTACH, STATE_ROLES, Phase, Role, StepGraph, Value


class NotVectorizableError(Exception):
    """Why tasks run one by one."""


@dataclass(frozen=True)
class TaskLoop:
    """The loop of many tasks at once.

    Attributes:
        loop: The inner steps over state with a leading axis of tasks; inner losses have shape
            ``[count]``.
        val: The validation losses, shape ``[count]``.
        count: The number of tasks.
        state: What of the state has that axis; the rest is the same for all tasks.
    """

    loop: Loop
    val: StepGraph
    count: int
    state: frozenset[Key]

    @functools.cached_property
    def own(self) -> frozenset[str]:
        """Labels of the inputs that have that axis."""
        graphs = (*self.loop.steps, self.val)
        values = [value for graph in graphs for value in graph.inputs]
        return frozenset(value.label for value in values if _is_own(value, self.state))


def vectorized(loop: Loop, val: StepGraph, count: int) -> TaskLoop:
    """``loop of one task --> loop of `count` tasks``.

    Args:
        loop: The captured steps.
        val: The captured validation loss.
        count: The number of tasks, whose data have equal shapes.

    Raises:
        NotVectorizableError: If an op has no batching rule, or draws random numbers.
    """
    state = _own_state(loop.steps)
    steps = tuple(_of_tasks(step, state, count) for step in loop.steps)
    return TaskLoop(replace(loop, steps=steps), _of_tasks(val, state, count), count, state)


def _own_state(steps: Sequence[StepGraph]) -> frozenset[Key]:
    """The state that differs between tasks after some step."""
    state: frozenset[Key] = frozenset()
    while True:
        found = state
        for step in steps:
            own = _own_nodes(step, state)
            after = {
                key_of(value) for value, node in step.outputs_with(*STATE_ROLES) if node in own
            }
            found |= after
        if found == state:
            return state
        state = found


def _is_own(value: Value, state: frozenset[Key]) -> bool:
    return value.role is Role.BATCH or key_of(value) in state


def _own_nodes(step: StepGraph, state: frozenset[Key]) -> set[fx.Node]:
    """The nodes whose value differs between tasks, and all gradients of what each has."""
    pairs = zip(step.inputs, step.placeholders, strict=True)
    own = {node for value, node in pairs if _is_own(value, state)}
    gradients = _gradients(step, state)
    for node in step.graph.nodes:
        if node.op == "call_function" and (
            node in gradients or not own.isdisjoint(node.all_input_nodes)
        ):
            own.add(node)
    return own


def _of_tasks(step: StepGraph, state: frozenset[Key], count: int) -> StepGraph:
    """One graph for `count` tasks."""
    if step.inputs_with(Role.NOISE):
        raise NotVectorizableError("random numbers are drawn, and each task draws its own")
    recorder = PureRecorder(SourceFinder({}))
    inputs = [
        _input(recorder, value, node, count if _is_own(value, state) else None)
        for value, node in zip(step.inputs, step.placeholders, strict=True)
    ]
    own = _own_nodes(step, state)
    if not _gradients(step, state) <= own:
        raise NotVectorizableError("an inner gradient is one of the program's inputs")

    def run(*tensors: Tensor) -> list[Tensor | None]:
        replay = _SideBySide(recorder, own, count)
        replay.bind(step.placeholders, tensors)
        with torch.no_grad():
            replay.run(calls(step, *Phase))
            recorder.phase = Phase.GRADIENT  # of sums that are returned, which no update reads
            pairs = zip(step.outputs, step.results, strict=True)
            return [replay.result(node, _is_shared(value, state)) for value, node in pairs]

    try:
        with _rules_alone():
            results = recorder.run(run, inputs)
    except (RuntimeError, NotImplementedError) as error:
        op = "" if recorder.origin is None else f"{recorder.origin.target}: "
        reason = str(error).splitlines()[0]
        raise NotVectorizableError(f"no batching rule applies to {op}{reason}") from error
    nodes = [None if tensor is None else recorder.node_of(tensor) for tensor in results]
    outputs = list(zip(step.outputs, nodes, strict=True))
    made = assemble(recorder, step.inputs, outputs, Names(), [], step.constants)
    if len(guards_of(made)) < len(guards_of(step)):
        raise NotVectorizableError("a selection would no longer guard what it drops")
    if wrong := _readers_of_saved(made) - _readers_of_saved(step):
        names = ", ".join(sorted(map(str, wrong)))
        raise NotVectorizableError(f"side by side, {names} would read what has no derivative")
    return made


def _readers_of_saved(step: StepGraph) -> set[Any]:
    """The ops that read results which an op saves for its own derivative, as a mean.

    Autograd hands no cotangent back through them, since the op's formula accounts for them. A
    batching rule that reads them in other ops loses a part of the second derivative.
    """
    reached = {node: None for node in step.graph.nodes if _is_saved(node)}
    readers = set()
    for node in step.graph.nodes:
        if node.op != "call_function" or reached.keys().isdisjoint(node.all_input_nodes):
            continue
        if node.target in _VIEWS:
            reached[node] = None
        else:
            readers.add(node.target)
    return readers


def _is_saved(node: fx.Node) -> bool:
    """Whether a node is a result of an op to which no derivative leads."""
    if node.target is not operator.getitem or not is_continuous(node.meta["val"]):
        return False
    source, index = node.args
    assert isinstance(source, fx.Node)
    return all(result != index for _, result in carried(source, set()))


aten = torch.ops.aten

#: Ops that only arrange values.
_VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default),
    *(aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.clone.default, aten.alias.default, aten._reshape_alias.default),
)


def _input(recorder: PureRecorder, value: Value, node: fx.Node, count: int | None) -> Tensor:
    """An input like `node`, with an axis of `count` in front unless that is None."""
    example = node.meta["val"]
    if count is not None:
        with recorder.fake_mode:
            shape = (count, *example.shape)
            example = torch.empty(shape, dtype=example.dtype, device=example.device)
    tensor = recorder.input(value.name, example)
    made = recorder.node_of(tensor)
    assert made is not None
    made.meta["counter"] = bool(node.meta.get("counter"))
    return tensor


def _gradients(step: StepGraph, state: frozenset[Key]) -> set[fx.Node]:
    """The gradients of each task's weights; the update reads them, and mixed mode cuts there."""
    return {
        node
        for value, node in step.outputs_with(Role.GRADIENT)
        if node is not None and not _is_shared(value, state)
    }


@contextlib.contextmanager
def _rules_alone() -> Iterator[None]:
    """Refuse an op without a batching rule; PyTorch would run it task by task."""
    functorch: Any = torch._C._functorch
    enabled = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(enabled)


def _is_shared(value: Value, state: frozenset[Key]) -> bool:
    """Whether an output is one for all tasks: state that is, and the gradient of what is."""
    if value.role is Role.GRADIENT:
        assert value.of is not None
        return value.of is not Role.BATCH and (value.of, value.label) not in state
    return value.role in STATE_ROLES and key_of(value) not in state


class _SideBySide(Replay):
    """Executes a graph of one task on the tensors of many.

    Args:
        recorder: What is recorded into.
        own: Nodes whose value has a leading axis of tasks.
        count: The number of tasks.
    """

    def __init__(self, recorder: PureRecorder, own: set[fx.Node], count: int) -> None:
        super().__init__(recorder)
        self.own, self.count = own, count

    def call(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        target: Any = node.target
        if node not in self.own:
            return target(*args, **kwargs)
        if self.own.isdisjoint(node.all_input_nodes):
            return repeated(target(*args, **kwargs), self.count)
        if target is operator.getitem:
            return target(*args)
        if target is ATTACH:
            return target(*(self._own_value(each) for each in node.all_input_nodes))
        if target is aten.embedding.default and node.args[0] in self.own and _padded(*args):
            raise NotVectorizableError("vmap's rule for embedding pads the first task's row alone")
        last = next(reversed(self.recorder.graph.nodes))
        rule = RULES.get(target)
        result = rule(self._operands(node, args), target, kwargs) if rule else None
        if result is None:
            result = self._vmapped(node)
        marks = {key: node.meta[key] for key in _MARKS if node.meta.get(key)}
        if marks:
            same = [made for made in self._since(last) if made.target is target]
            if not same:
                raise NotVectorizableError(
                    f"{target} would become other ops, of which less is known"
                )
            for made in same:
                made.meta.update(marks)
        return result

    def _since(self, last: fx.Node) -> Iterator[fx.Node]:
        """What was recorded after `last`."""
        for made in reversed(self.recorder.graph.nodes):
            if made is last:
                return
            yield made

    def _operands(self, node: fx.Node, args: Sequence[Any]) -> Operands:
        nodes = [arg if isinstance(arg, fx.Node) else None for arg in node.args]
        shapes = [None if each is None else _shape(each.meta["val"]) for each in nodes]
        value = node.meta["val"]
        return Operands(
            node,
            args,
            [each in self.own for each in nodes],
            [None if shape is None else len(shape) for shape in shapes],
            [_shape(each) for each in (value if isinstance(value, tuple | list) else [value])],
            self.count,
        )

    def _vmapped(self, node: fx.Node) -> Any:
        """One op on all tasks, the axis in front of its results."""
        target: Any = node.target
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=_is_node)
        given = [leaf for leaf in leaves if _is_node(leaf)]
        holes: list[bool] = []  # some derivatives have several results, of which a few are None

        def one(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            filled = [next(rest) if _is_node(leaf) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            found = target(*args, **kwargs)
            results = [found] if isinstance(found, Tensor) else list(found)
            holes[:] = [each is None for each in results]
            return [each for each in results if each is not None]

        axes = tuple(0 if each in self.own else None for each in given)
        found = iter(torch.func.vmap(one, in_dims=axes)(*(self.values[each] for each in given)))
        results = [None if hole else next(found) for hole in holes]
        return results if isinstance(node.meta["val"], list | tuple) else results[0]

    def result(self, node: fx.Node | None, shared: bool) -> Tensor | None:
        """What the graph returns for a node of the old one."""
        if node is None:
            return None
        if shared:
            value: Tensor = self.values[node]
            return value.sum(0) if node in self.own else value
        return self._own_value(node)

    def _own_value(self, node: fx.Node) -> Tensor:
        value: Tensor = self.values[node]
        return value if node in self.own else repeated(value, self.count)


def _padded(weight: Tensor, indices: Tensor, padding: int = -1, *rest: Any) -> bool:
    """Whether an embedding has a row to which no gradient flows.

    vmap's rule puts the rows of all tasks below one another and keeps the number of that row.
    """
    return padding >= 0


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


#: What was proved of a root is true of the roots of many tasks.
_MARKS = ("removable", "nonsingular")
