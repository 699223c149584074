"""Who computes the workloads: one row an implementation, of which a peer may have several.

Where a peer has several, each is one that its documentation recommends for some cases, and the
fastest on a workload counts for the peer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from implementations import Call, compiled, data_of, unrolled
from plain import plain_training
from prepared import Prepared
from torch import Tensor
from workloads import Problem

Make = Callable[[Problem, str | None], Prepared]

OURS, FLOOR = "unrollc", "plain training"

#: Workloads whose networks are convolutional, where memory formats differ. They are tried with
#: torch.func and in plain training; higher and torchopt run the same ops as torch.func.
_IMAGES = frozenset({"maml-conv4", "densenet-lr", "distill"})
_ADAM = frozenset({"mlp-small", "mlp", "mlp-long-1000", "mlp-long", "gpt-adam"})


@dataclass(frozen=True)
class Implementation:
    """One way to compute a workload.

    Attributes:
        name: What it is called in tables.
        peer: Whose it is; its rows compete.
        make: ``problem, budget -> Prepared``.
        only: The workloads on which it differs from the peer's other rows; None for all.
        package: What must be installed for it, beside torch.
        separate: Whether it is left out unless asked for by name, since it takes too long.
        checked: Most inner steps of its comparison in float64, where compiling grows with them.
    """

    name: str
    peer: str
    make: Make
    only: frozenset[str] | None = None
    package: str | None = None
    separate: bool = False
    checked: int | None = None

    def suits(self, workload: str) -> bool:
        """Whether it is a row of its own on a workload."""
        return self.only is None or workload in self.only


def _program(backend: str) -> Make:
    """Ours on a backend."""

    def make(problem: Problem, budget: str | None) -> Prepared:
        program, call = compiled(problem, budget, backend)
        train, val = problem.tasks[0]
        plan = program.lower(data_of(problem, train), val).plan
        facts = {
            "predicted": plan.peak_bytes,
            "operations": plan.cost.operations * len(problem.tasks),
            "repeated": plan.schedule.recomputed,
        }
        settle = None if backend == "aten" else program.finish_compiling
        return Prepared(call, lambda: _gradients(problem), facts, settle)

    return make


def _eager(loop: Callable[[Problem], Call], channels_last: bool = False) -> Make:
    """A loop of torch that leaves gradients in ``.grad``."""

    def make(problem: Problem, budget: str | None) -> Prepared:
        if channels_last:
            problem = with_channels_last(problem)
        return Prepared(loop(problem), lambda: _gradients(problem))

    return make


def _gradients(problem: Problem) -> dict[str, Tensor]:
    return {label: leaf.grad for label, leaf in problem.leaves.items() if leaf.grad is not None}


def with_channels_last(problem: Problem) -> Problem:
    """The same tensors with channels innermost in memory; leaves stay the same objects."""
    problem.model.to(memory_format=torch.channels_last)
    for leaf in problem.leaves.values():
        if leaf.ndim == 4:
            leaf.data = _channels_last(leaf.data)
    tasks = []
    for train, val in problem.tasks:
        inputs = train[0] if train[0].is_leaf and train[0].requires_grad else None
        moved = _channels_last(train[0]) if inputs is None else inputs
        tasks.append(((moved, train[1]), (_channels_last(val[0]), val[1])))
    return dataclasses.replace(problem, tasks=tuple(tasks))


def _channels_last(x: Tensor) -> Tensor:
    """[..., c, h, w] with the memory of [..., h, w, c]."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def _jax(checkpoint: bool) -> Make:
    def make(problem: Problem, budget: str | None) -> Prepared:
        from jax_loop import jax_loop

        return jax_loop(problem, checkpoint=checkpoint)

    return make


def _higher(problem: Problem) -> Call:
    from higher_loop import higher_loop

    return higher_loop(problem)


def _torchopt(accelerated: bool) -> Make:
    def loop(problem: Problem) -> Call:
        from torchopt_loop import torchopt_loop

        return torchopt_loop(problem, accelerated=accelerated)

    return _eager(loop)


def _compiled_unrolled(problem: Problem, budget: str | None) -> Prepared:
    from compiled_loop import compiled_loop

    return compiled_loop(problem)


#: Ours, one row a backend.
BACKENDS = ("aten", "inductor")

IMPLEMENTATIONS = (
    *(Implementation(f"{OURS} {backend}", OURS, _program(backend)) for backend in BACKENDS),
    Implementation("torch.func", "torch.func", _eager(unrolled)),
    Implementation("torch.func nhwc", "torch.func", _eager(unrolled, True), _IMAGES),
    Implementation("higher", "higher", _eager(_higher), package="higher"),
    Implementation("torchopt", "torchopt", _torchopt(False), package="torchopt"),
    Implementation("torchopt fused", "torchopt", _torchopt(True), _ADAM, "torchopt"),
    Implementation("jax", "JAX", _jax(False), package="jax"),
    Implementation("jax checkpoint", "JAX", _jax(True), package="jax"),
    Implementation("torch.compile", "torch.compile", _compiled_unrolled, separate=True, checked=2),
    Implementation(FLOOR, FLOOR, _eager(plain_training)),
    Implementation(f"{FLOOR} nhwc", FLOOR, _eager(plain_training, True), _IMAGES),
)

#: The peers that keep a graph of all steps: 10,000 of them would take minutes and most memories.
_GRAPHS = frozenset({"torch.func", "higher", "torchopt"})


def omitted(workload: str, name: str) -> str | None:
    """Why a workload is not run by an implementation that could; None where it is run."""
    if workload == "mlp-long" and BY_NAME[name].peer in _GRAPHS:
        return "left out: its graph grows with T, see mlp-long-1000"
    return None


BY_NAME = {each.name: each for each in IMPLEMENTATIONS}


def rows_of(workload: str, names: Sequence[str] | None = None) -> tuple[Implementation, ...]:
    """The implementations of a workload: those named, or all but those of a pass of their own."""
    suitable = [each for each in IMPLEMENTATIONS if each.suits(workload)]
    if names is not None:
        return tuple(each for each in suitable if each.name in names)
    return tuple(each for each in suitable if not each.separate)
