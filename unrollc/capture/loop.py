"""The inner loop as its distinct steps.

The first step often differs from later ones (optimizer state is created lazily), and code that
branches on a step counter differs from step to step. Counters are known numbers, so for every
step a captured graph is reused where its layout is the same and the guards hold; otherwise the
step is captured anew. Steps whose graphs agree share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from unrollc.capture.assemble import (
    Concretes,
    assemble,
    assemble_graph,
    concretes_of,
    same_graph,
)
from unrollc.capture.batches import Batches
from unrollc.capture.model import (
    capturing,
    explained,
    inner_gradient,
    module_names,
    run_user_loss,
    with_parameter_hooks,
)
from unrollc.capture.naming import Names
from unrollc.capture.optimizer import Layout, run_user_update
from unrollc.capture.problem import PerStep, Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.source import SourceFinder
from unrollc.errors import CaptureError, InputError, Source
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A hyperparameter whose value Python read, so that its gradient is lost.

    Attributes:
        labels: Labels of the tensor hyperparameters that the value depends on.
        source: The line that read it.
    """

    labels: tuple[str, ...]
    source: Source | None


@dataclass(frozen=True)
class Kind:
    """One captured step and the conditions under which it stands for another.

    Attributes:
        graph: Index into `Loop.steps`.
        before, after: The optimizer's layout.
        batch: Shapes and dtypes of the batch.
        state: Example tensors of the optimizer state after the step.
        concretes: Guards and counters as functions of known scalars.
        cuts: Gradients that the captured Python code lost.
        tuned: Known scalars after the step that tensor hyperparameters had a part in, with the
            labels of these.
    """

    graph: int
    before: Layout
    after: Layout
    batch: tuple[Any, ...]
    state: dict[str, Tensor]
    concretes: Concretes
    cuts: tuple[Cut, ...]
    tuned: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Loop:
    """The captured inner loop.

    Attributes:
        steps: The distinct step graphs.
        sequence: For each of the T inner steps, an index into `steps`.
        kinds: What was captured, in order of first use.
        kind_sequence: For each step, an index into `kinds`.
        layout: The optimizer's layout after the last step.
        lifted: Tensors that the user's code brought in from outside, by label.
    """

    steps: tuple[StepGraph, ...]
    sequence: tuple[int, ...]
    kinds: tuple[Kind, ...]
    kind_sequence: tuple[int, ...]
    layout: Layout
    lifted: dict[str, Tensor]

    def holds(self, concrete: Mapping[str, Any]) -> bool:
        """Whether the guards hold for the current scalars (hyperparameters and counters)."""
        guarded = [kind.concretes for kind in self.kinds if kind.concretes.guards]
        read = {label for concretes in guarded for label in concretes.guarded.inputs}
        known = {label: value for label, value in concrete.items() if not _is_per_step(value)}
        counted = {label for kind in self.kinds for label in kind.concretes.counters}
        if read <= set(known) - counted:
            return all(concretes.accept(known) for concretes in guarded)
        for step, index in enumerate(self.kind_sequence):
            here = _at_step(concrete, step) | known
            if not self.kinds[index].concretes.accept(here):
                return False
            known = {**known, **self.kinds[index].concretes.advance(here)}
        return True


def _is_per_step(value: Any) -> bool:
    return isinstance(value, PerStep)


def _at_step(concrete: Mapping[str, Any], step: int) -> dict[str, Tensor]:
    return {
        label: value.per_step[step].detach().cpu() if isinstance(value, PerStep) else value
        for label, value in concrete.items()
    }


def known_scalars(stock: Stock) -> dict[str, Any]:
    """Scalars whose values capture may look at: hyperparameters and counters."""
    counters = {
        label: tensor.detach().cpu()
        for label, tensor in {**stock.opt_state, **stock.buffers}.items()
        if tensor.dim() == 0 and tensor.device.type != "meta"
    }
    hyper = {
        label: value if isinstance(value, PerStep) else value.detach().cpu()
        for label, value in stock.hyper.items()
    }
    return {**counters, **hyper}


def capture_loop(
    problem: Problem, stock: Stock, train: Batches, extra: tuple[str, ...], names: Names
) -> Loop:
    """Capture every distinct step of the inner loop.

    Args:
        problem: The user's objects.
        stock: Their tensors.
        train: The batches of all T steps.
        extra: Labels of tensors besides θ whose inner-loss gradient is recorded as well.
        names: Identifiers for labels.

    Raises:
        CaptureError: If the code cannot be expressed as a graph; it names the user's line.
        InputError: If a `PerStep` has another length than T.
    """
    _check_per_step(stock, train.steps)
    lifted: list[Tensor] = []
    raw: list[StepGraph] = []
    kinds: list[Kind] = []
    sequence: list[int] = []
    layout, state = stock.layout, dict(stock.opt_state)
    tuned: dict[str, tuple[str, ...]] = {}
    scalars = known_scalars(stock)
    known: dict[str, Tensor] = {k: v for k, v in scalars.items() if not _is_per_step(v)}
    while len(sequence) < train.steps:
        step = len(sequence)
        concrete = {**known, **{k: v for k, v in _at_step(scalars, step).items() if k in stock.hyper}}
        batch = _batch_signature(train, step)
        chosen = _reusable(kinds, layout, batch, concrete)
        if chosen is None:
            recording = _StepRecording(
                problem, stock, layout, state, tuned, extra, names, lifted
            )
            graph, kind = recording.capture(train, step, concrete)
            index = next((i for i, old in enumerate(raw) if same_graph(old, graph)), len(raw))
            if index == len(raw):
                raw.append(graph)
            kinds.append(replace(kind, graph=index, batch=batch))
            chosen = len(kinds) - 1
        kind = kinds[chosen]
        sequence.append(chosen)
        settled = kind.before == kind.after and not kind.concretes.guards
        if settled and train.form != "list":
            sequence.extend([chosen] * (train.steps - len(sequence)))
        layout, state, tuned = kind.after, kind.state, kind.tuned
        known = {**{k: v for k, v in known.items() if k in stock.hyper}, **kind.concretes.advance(concrete)}
    lifted_by_label = {f"closure[{index}]": tensor for index, tensor in enumerate(lifted)}
    steps = _harmonised(raw, stock, lifted_by_label, names)
    return Loop(
        steps=steps,
        sequence=tuple(kinds[index].graph for index in sequence),
        kinds=tuple(kinds),
        kind_sequence=tuple(sequence),
        layout=layout,
        lifted=lifted_by_label,
    )


def _check_per_step(stock: Stock, steps: int) -> None:
    for label, value in stock.hyper.items():
        if isinstance(value, PerStep) and value.per_step.shape[0] != steps:
            raise InputError(
                f"{label} is PerStep with {value.per_step.shape[0]} values, train has T = {steps}",
                remedy=f"pass a tensor of shape [{steps}]",
            )


def _batch_signature(train: Batches, step: int) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in train.at(step))


def _reusable(
    kinds: list[Kind], layout: Layout, batch: tuple[Any, ...], concrete: Mapping[str, Tensor]
) -> int | None:
    for index, kind in enumerate(kinds):
        if kind.before == layout and kind.batch == batch and kind.concretes.accept(concrete):
            return index
    return None


class _StepRecording:
    """One step while it is being recorded."""

    def __init__(
        self,
        problem: Problem,
        stock: Stock,
        layout: Layout,
        state: Mapping[str, Tensor],
        tuned: Mapping[str, tuple[str, ...]],
        extra: tuple[str, ...],
        names: Names,
        lifted: list[Tensor],
    ) -> None:
        self.problem, self.stock, self.layout, self.tuned = problem, stock, layout, tuned
        self.state, self.extra, self.names, self.lifted = state, extra, names, lifted
        self.recorder = Recorder(SourceFinder(module_names(problem)))
        self.values: list[Value] = []

    def capture(
        self, train: Batches, step: int, concrete: Mapping[str, Tensor]
    ) -> tuple[StepGraph, Kind]:
        recorder = self.recorder
        inputs = [
            self._input(role, label, tensor, concrete.get(label))
            for role, label, tensor in self._examples(train, step)
        ]
        labels = [value.label for value in self.values]

        def run_user_step(*tensors: Tensor) -> dict[str, Any]:
            return self._step(dict(zip(labels, tensors, strict=True)), train)

        with capturing(self.problem, recorder), explained("the inner step"):
            results = recorder.run(run_user_step, inputs)
        after: Layout = results["layout"]
        state_after: dict[str, Tensor] = results["state"]
        outputs = self._outputs(results)
        counted = {
            value.label: node
            for value, node in outputs
            if value.role in STATE_ROLES and node in recorder.concrete
        }
        tuned = {label: found for label, node in counted.items() if (found := _tuned_by(node))}
        for label, node in self._placeholders(inputs):
            node.meta["counter"] = label in counted and label not in tuned
        graph = assemble(recorder, self.values, outputs, self.names, self.lifted)
        kind = Kind(
            graph=-1,
            before=self.layout,
            after=after,
            batch=(),
            state=state_after,
            concretes=concretes_of(recorder, self._labels_of_nodes(), counted),
            cuts=tuple(
                Cut(_tuned_by(guard.node), guard.source)
                for guard in recorder.guards
                if not guard.truth
            ),
            tuned=tuned,
        )
        return graph, kind

    def _placeholders(self, inputs: list[Tensor]) -> list[tuple[str, fx.Node]]:
        found = []
        for value, fake in zip(self.values, inputs, strict=True):
            node = self.recorder.node_of(fake)
            assert node is not None
            found.append((value.label, node))
        return found

    def _examples(self, train: Batches, step: int) -> list[tuple[Role, str, Tensor]]:
        stock = self.stock
        hyper = {
            label: value.per_step[0] if isinstance(value, PerStep) else value
            for label, value in stock.hyper.items()
        }
        groups = (
            (Role.THETA, stock.theta),
            (Role.OPT_STATE, self.state),
            (Role.BUFFER, stock.buffers),
            (Role.HYPER, hyper),
            (Role.CONTEXT, stock.context),
            (Role.BATCH, dict(zip(train.labels, train.at(step), strict=True))),
        )
        return [(role, label, t) for role, tensors in groups for label, t in tensors.items()]

    def _input(self, role: Role, label: str, example: Tensor, concrete: Tensor | None) -> Tensor:
        name = self.names(label)
        fake = self.recorder.input(name, example, concrete)
        if role is Role.HYPER or label in self.tuned:
            node = self.recorder.node_of(fake)
            assert node is not None
            node.meta["hyper"] = self.tuned.get(label, (label,))
        self.values.append(Value(role, label, name))
        return fake

    def _step(self, tensors: dict[str, Tensor], train: Batches) -> dict[str, Any]:
        recorder, stock = self.recorder, self.stock
        extra = {label: tensors[label] for label in self.extra}
        theta = {label: tensors[label] for label in stock.theta}
        rest = {label: tensors[label] for label in (*stock.context, *stock.buffers)}
        rest = {label: tensor for label, tensor in rest.items() if label not in extra}

        def batch(wrapped: Mapping[str, Tensor]) -> Any:
            leaves = [wrapped.get(label, tensors[label]) for label in train.labels]
            return pytree.tree_unflatten(leaves, train.spec)

        gradients, extra_gradients, loss, after = inner_gradient(
            self.problem, recorder, theta, extra, rest, batch
        )
        reached = {k: g for k, g in gradients.items() if not self._is_filled(g)}
        if not reached:
            raise CaptureError(
                "the inner loss does not depend on any parameter that the optimizer holds",
                why="every inner gradient is absent, so the inner loop would change nothing",
                remedy="check that the loss uses the model's prediction, and for detach() or "
                "no_grad on the way",
            )
        hooked = with_parameter_hooks(stock.theta, reached)
        recorder.phase = Phase.UPDATE
        frozen = {
            stock.owners[id(parameter)]
            for group in self.problem.opt.param_groups
            for parameter in group["params"]
        } - set(theta)
        held = {label: tensors[label] for label in (*theta, *frozen)}
        known = {**held, **{label: tensors[label] for label in (*self.state, *stock.hyper)}}
        layout, state = run_user_update(
            self.problem.opt, recorder, self.layout, stock.owners, known, hooked
        )
        return {
            "theta": {label: known[label] for label in theta},
            "state": state,
            "buffers": {label: after[label] for label in stock.buffers},
            "loss": loss,
            "gradients": hooked,
            "extra": {k: g for k, g in extra_gradients.items() if not self._is_filled(g)},
            "layout": layout,
        }

    def _is_filled(self, gradient: Tensor) -> bool:
        """Whether `torch.func.grad` filled in zeros for a tensor that the loss does not reach."""
        node = self.recorder.node_of(gradient)
        return node is not None and bool(node.meta.get("filled"))

    def _outputs(self, results: dict[str, Any]) -> list[tuple[Value, fx.Node]]:
        found: list[tuple[Value, fx.Node]] = []

        def add(role: Role, label: str, tensor: Tensor, of: Role | None = None) -> None:
            node = self.recorder.node_of(tensor)
            assert node is not None, f"{label} was not recorded"
            found.append((Value(role, label, self.names(label), of), node))

        for label, tensor in results["theta"].items():
            add(Role.THETA, label, tensor)
        for label, tensor in results["state"].items():
            add(Role.OPT_STATE, label, tensor)
        for label, tensor in results["buffers"].items():
            add(Role.BUFFER, label, tensor)
        add(Role.LOSS, "loss", results["loss"])
        for label, tensor in results["gradients"].items():
            add(Role.GRADIENT, label, tensor, Role.THETA)
        roles = {value.label: value.role for value in self.values}
        for label, tensor in results["extra"].items():
            add(Role.GRADIENT, label, tensor, roles[label])
        return found

    def _labels_of_nodes(self) -> dict[fx.Node, str]:
        named = {value.name: value.label for value in self.values}
        return {n: named[n.name] for n in self.recorder.graph.nodes if n.name in named}


def _tuned_by(node: fx.Node) -> tuple[str, ...]:
    """Labels of the tensor hyperparameters that a known scalar depends on."""
    stack, seen, labels = [node], set(), set()
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            labels.update(current.meta.get("hyper", ()))
            stack.extend(current.all_input_nodes)
    return tuple(sorted(labels))


def _harmonised(
    raw: list[StepGraph], stock: Stock, lifted: Mapping[str, Tensor], names: Names
) -> tuple[StepGraph, ...]:
    """The step graphs with the same context inputs, and constant buffers as context."""
    changing = set()
    for graph in raw:
        by_label = {value.label: node for value, node in graph.inputs_with(Role.BUFFER)}
        for value, node in graph.outputs_with(Role.BUFFER):
            if node is not by_label[value.label]:
                changing.add(value.label)
    return tuple(_with_context(graph, changing, lifted, names) for graph in raw)


def _with_context(
    graph: StepGraph, changing: set[str], lifted: Mapping[str, Tensor], names: Names
) -> StepGraph:
    inputs = tuple(
        replace(value, role=Role.CONTEXT)
        if value.role is Role.BUFFER and value.label not in changing
        else value
        for value in graph.inputs
    )
    outputs = tuple(
        (value, node)
        for value, node in zip(graph.outputs, graph.results, strict=True)
        if value.role is not Role.BUFFER or value.label in changing
    )
    placeholders = list(zip(inputs, graph.placeholders, strict=True))
    present = {value.label for value in inputs}
    missing = [
        (Value(Role.CONTEXT, label, names(label)), tensor)
        for label, tensor in lifted.items()
        if label not in present
    ]
    return assemble_graph(graph, placeholders, missing, outputs)


def capture_val(
    problem: Problem,
    stock: Stock,
    val: Batches,
    loop: Loop,
    names: Names,
) -> tuple[StepGraph, dict[str, Tensor]]:
    """The validation loss as a graph over θ_T, buffers, context and the validation batch.

    Returns:
        The graph, and the tensors of `loop.lifted` with those added that only the validation
        loss brings in.
    """
    recorder = Recorder(SourceFinder(module_names(problem)))
    changing = {value.label for value, _ in loop.steps[0].inputs_with(Role.BUFFER)}
    groups = (
        (Role.THETA, stock.theta),
        (Role.BUFFER, {k: t for k, t in stock.buffers.items() if k in changing}),
        (
            Role.CONTEXT,
            {**{k: t for k, t in stock.buffers.items() if k not in changing}, **stock.context},
        ),
        (Role.BATCH, dict(zip(val.labels, val.leaves, strict=True))),
    )
    values = [Value(role, k, names(k)) for role, tensors in groups for k in tensors]
    examples = [tensor for _, tensors in groups for tensor in tensors.values()]
    inputs = [recorder.input(v.name, t) for v, t in zip(values, examples, strict=True)]

    def run_user_validation(*given: Tensor) -> Tensor:
        tensors = {v.label: t for v, t in zip(values, given, strict=True)}
        theta = {label: tensors.pop(label) for label in stock.theta}

        def evaluate(theta: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
            batch = pytree.tree_unflatten([rest[label] for label in val.labels], val.spec)
            return run_user_loss(problem, problem.val_loss, recorder, {**rest, **theta}, batch)

        # Under torch.func.grad custom functions are captured as in the inner loss; the gradient
        # itself is dead code here.
        _, loss = torch.func.grad_and_value(evaluate)(theta, tensors)
        return loss

    with capturing(problem, recorder), explained("the validation loss"):
        loss = recorder.run(run_user_validation, inputs)
    node = recorder.node_of(loss)
    assert node is not None
    lifted = list(loop.lifted.values())
    graph = assemble(
        recorder, values, [(Value(Role.LOSS, "val_loss", "val_loss"), node)], names, lifted
    )
    return graph, {f"closure[{index}]": tensor for index, tensor in enumerate(lifted)}
