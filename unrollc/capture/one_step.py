"""One inner step while it is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from unrollc.capture.assemble import (
    assemble,
    closure_label,
    concretes_of,
    labels_of_nodes,
)
from unrollc.capture.attributes import Carried
from unrollc.capture.averaging import run_user_average
from unrollc.capture.batches import Batches
from unrollc.capture.fingerprint import step_hooks_of
from unrollc.capture.gradients import run_user_transform, steady_loss
from unrollc.capture.home import at_home
from unrollc.capture.kind import Kind, Shared, Start, branches_of, cuts_of, tuned_by
from unrollc.capture.layout import Layout
from unrollc.capture.model import (
    capturing,
    explained,
    in_place_of_users,
    inner_gradient,
    module_names,
    with_parameter_hooks,
)
from unrollc.capture.networks import running
from unrollc.capture.optimizer import run_user_update
from unrollc.capture.problem import PerStep, Problem, Stock
from unrollc.capture.record import Recorder
from unrollc.capture.source import SourceFinder
from unrollc.capture.step_hooks import step_hooks
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, Value


class StepRecording:
    """One step while it is being recorded."""

    def __init__(self, problem: Problem, stock: Stock, start: Start, shared: Shared) -> None:
        self.problem, self.stock, self.shared = problem, stock, shared
        self.layout, self.state, self.tuned = start.layout, start.state, start.tuned
        self.attributes = start.attributes
        self.names = shared.names
        self.recorder = Recorder(SourceFinder(module_names(problem)))
        self.recorder.watch({**stock.theta, **stock.opt_state, **stock.average})
        self.recorder.home = stock.home
        self.values: list[Value] = []

    def capture(
        self,
        train: Batches,
        step: int,
        concrete: Mapping[str, Tensor],
        nonzero: frozenset[str],
    ) -> tuple[StepGraph, Kind]:
        """Record the step.

        Args:
            train: The batches.
            step: Number of the step.
            concrete: Known scalars at this step.
            nonzero: Hyperparameters that a test ``x != 0`` finds different from zero, though
                they are zero (see `zero_branch`).
        """
        recorder = self.recorder
        recorder.nonzero = nonzero
        inputs = [
            self._input(role, label, tensor, concrete.get(label))
            for role, label, tensor in self._examples(train, step)
        ]
        batch = dict(zip(train.labels, train.at(step), strict=True))
        nodes = self._placeholders(inputs)
        recorder.readable = {n: batch[label].detach() for label, n in nodes if label in batch}
        results, carried = self._run(inputs, train)
        after: Layout = results["layout"]
        state_after: dict[str, Tensor] = results["state"]
        outputs = self._outputs(results)
        counted = {
            value.label: node
            for value, node in outputs
            if value.role in STATE_ROLES and node in recorder.concrete
        }
        tuned = {label: found for label, node in counted.items() if (found := tuned_by(node))}
        for label, node in nodes:
            node.meta["counter"] = label in counted and label not in tuned
        lifted = self.shared.lifted
        graph = assemble(recorder, self.values, outputs, self.names, lifted)
        self._name_lifted()
        for value, gradient in graph.outputs_with(Role.GRADIENT):
            if gradient is not None:
                gradient.meta["called"] = f"grad_{value.name}"
        kind = Kind(
            graph=-1,
            before=self.layout,
            after=after,
            batch=(),
            state=state_after,
            concretes=concretes_of(
                recorder, labels_of_nodes(recorder, self.values, lifted), counted
            ),
            cuts=cuts_of(recorder),
            tuned=tuned,
            zero_tests=tuple(recorder.zero_tests),
            branches=branches_of(recorder),
            attributes=carried,
        )
        return graph, kind

    def _run(self, inputs: list[Tensor], train: Batches) -> tuple[dict[str, Any], Carried]:
        """What the step returns on traced inputs, and the attributes around it."""
        labels = [value.label for value in self.values]

        def run_user_step(*tensors: Tensor) -> dict[str, Any]:
            return self._step(dict(zip(labels, tensors, strict=True)), train)

        with (
            capturing(self.problem, self.recorder, self.attributes) as carried,
            explained("the inner step"),
        ):
            return self.recorder.run(run_user_step, inputs), carried

    def _name_lifted(self) -> None:
        """Let `tuned_by` find the closure tensors that a known scalar depends on."""
        lifted = self.shared.lifted
        for tensor, node in self.recorder.lifted:
            index = next(i for i, known in enumerate(lifted) if known is tensor)
            node.meta["hyper"] = (closure_label(index),)

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
            label: at_home(value.per_step, stock.home)[0]
            if isinstance(value, PerStep)
            else at_home(value, stock.home)
            for label, value in stock.hyper.items()
        }
        context = {label: at_home(tensor, stock.home) for label, tensor in stock.context.items()}
        batch = [at_home(leaf, stock.home) for leaf in train.at(step)]
        groups = (
            (Role.THETA, stock.theta),
            (Role.OPT_STATE, self.state),
            (Role.BUFFER, stock.buffers),
            (Role.AVERAGE, stock.average),
            (Role.HYPER, hyper),
            (Role.CONTEXT, context),
            (Role.BATCH, dict(zip(train.labels, batch, strict=True))),
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
        extra = {label: tensors[label] for label in self.shared.extra}
        theta = {label: tensors[label] for label in stock.theta}
        others = (*stock.context, *stock.buffers, *stock.average, *train.labels)
        rest = {label: tensors[label] for label in others}
        rest = {label: tensor for label, tensor in rest.items() if label not in extra}

        def batch(wrapped: Mapping[str, Tensor]) -> Any:
            return pytree.tree_unflatten([wrapped[label] for label in train.labels], train.spec)

        with steady_loss(self.problem, self.problem.loss):
            gradients, extra_gradients, loss, after = inner_gradient(
                self.problem, stock, recorder, theta, extra, rest, batch
            )
        reached = {k: g for k, g in gradients.items() if not self._is_filled(g)}
        # Each gradient gets a node of its own: a step may change p.grad in place, and several
        # gradients may be views of one tensor.
        hooked = {k: g.clone() for k, g in with_parameter_hooks(stock.theta, reached).items()}
        gradient_nodes = {label: recorder.node_of(g) for label, g in hooked.items()}
        recorder.phase = Phase.UPDATE
        after = {**theta, **extra, **after}
        if self.problem.grad_transform is not None:
            hooked = run_user_transform(self.problem, stock, recorder, after, hooked)
        layout, state, theta = self._update(tensors, after, hooked)
        average = {label: after.pop(label) for label in stock.average}
        if average:
            average = run_user_average(self.problem, stock, recorder, after, average)
        return {
            "average": average,
            "theta": theta,
            "state": state,
            "buffers": {label: after[label] for label in stock.buffers},
            "loss": loss,
            "gradients": gradient_nodes,
            "extra": {k: g for k, g in extra_gradients.items() if not self._is_filled(g)},
            "layout": layout,
        }

    def _update(
        self, tensors: dict[str, Tensor], after: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> tuple[Layout, dict[str, Tensor], dict[str, Tensor]]:
        """The optimizer's step with its hooks and networks: layout, state and θ after it.

        Args:
            tensors: All inputs of the step.
            after: Parameters and buffers after the forward pass; buffers that the step changes
                are updated in it.
            gradients: What the optimizer finds in ``.grad``.
        """
        recorder, stock = self.recorder, self.stock
        frozen = {
            stock.owners[id(parameter)]
            for group in self.problem.opt.param_groups
            for parameter in group["params"]
        } - set(stock.theta)
        held = {label: tensors[label] for label in (*stock.theta, *frozen)}
        known = {**held, **{label: tensors[label] for label in (*self.state, *stock.hyper)}}
        hyper = {label: tensors[label] for label in stock.hyper}
        # Hooks swap by themselves, the fast weights included.
        swapped = set() if step_hooks_of(self.problem.opt) else {*stock.context, *stock.buffers}
        own = {label: after[label] for label in swapped}
        with (
            running(self.problem.networks, recorder, after),
            in_place_of_users(self.problem, stock, recorder, own),
            step_hooks(self.problem, stock, recorder, after, hyper),
        ):
            layout, state = run_user_update(
                self.problem.opt,
                recorder,
                self.layout,
                stock.owners,
                known,
                gradients,
                stock.hyper,
                self.shared.manner,
            )
        after.update(own)
        return layout, state, {label: known[label] for label in stock.theta}

    def _is_filled(self, gradient: Tensor) -> bool:
        """Whether `torch.func.grad` filled in zeros for a tensor that the loss does not reach."""
        node = self.recorder.node_of(gradient)
        return node is not None and bool(node.meta.get("filled"))

    def _outputs(self, results: dict[str, Any]) -> list[tuple[Value, fx.Node]]:
        found: list[tuple[Value, fx.Node]] = []

        def add(role: Role, label: str, tensor: Tensor, of: Role | None = None) -> None:
            node = self.recorder.node_of(tensor)
            assert node is not None, f"{label} was not recorded"
            counter = node in self.recorder.concrete and not tuned_by(node)
            if role in STATE_ROLES and not counter:  # a buffer may be updated under no_grad
                node = self.recorder.after_stop(node)
            found.append((Value(role, label, self.names(label), of), node))

        for label, tensor in results["theta"].items():
            add(Role.THETA, label, tensor)
        for label, tensor in results["state"].items():
            add(Role.OPT_STATE, label, tensor)
        for label, tensor in results["buffers"].items():
            add(Role.BUFFER, label, tensor)
        for label, tensor in results["average"].items():
            add(Role.AVERAGE, label, tensor)
        add(Role.LOSS, "loss", results["loss"])
        for label, node in results["gradients"].items():
            found.append((Value(Role.GRADIENT, label, self.names(label), Role.THETA), node))
        roles = {value.label: value.role for value in self.values}
        for label, tensor in results["extra"].items():
            add(Role.GRADIENT, label, tensor, roles[label])
        return found
