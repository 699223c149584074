"""The workloads in JAX: ``jit(value_and_grad)`` of a ``lax.scan`` over the inner steps.

With ``checkpoint``, a step's body is a `jax.checkpoint`, so that only the carried states are kept:
the form that JAX's documentation recommends for long scans, with ``prevent_cse=False`` as it says
for bodies of a scan. Tasks run one after the other in ``lax.map``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax
from jax_networks import cross_entropy, function_of, lstm_cell, to_jax, to_torch
from networks import LearnedOptimizer
from prepared import Prepared
from torch import Tensor
from workloads import Problem

Tree = dict[str, Array]
Rule = Callable[[Tree, Tree, Tree, Any], tuple[Tree, Any]]


def jax_loop(problem: Problem, *, checkpoint: bool) -> Prepared:
    """Compile, ahead of any call, the summed validation loss of all tasks and its gradient."""
    given = _Given.of(problem)
    function = jax.jit(jax.value_and_grad(_meta_loss(problem, checkpoint), has_aux=True))
    executable = function.lower(given.leaves, given.constants).compile()
    found: Tree = {}

    def call() -> list[float]:
        found.clear()  # as a user frees the last gradient before the next call
        (_, losses), gradients = executable(given.leaves, given.constants)
        found.update(jax.block_until_ready(gradients))
        return [float(loss) for loss in losses]

    def gradients() -> dict[str, Tensor]:
        return {
            label: to_torch(array, weight=label in given.weights) for label, array in found.items()
        }

    return Prepared(call, gradients)


@dataclass(frozen=True)
class _Given:
    """The problem's tensors as arrays: what gets a gradient, and what does not.

    Attributes:
        leaves: By the problem's labels.
        constants: Weights that are no leaves, the data, and what depends on the step.
        weights: Names of leaves that are the model's weights.
    """

    leaves: Tree
    constants: dict[str, Any]
    weights: frozenset[str]

    @classmethod
    def of(cls, problem: Problem) -> _Given:
        named = dict(problem.model.named_parameters())
        owned = {label for label, leaf in problem.leaves.items() if named.get(label) is leaf}
        leaves = {
            label: to_jax(leaf, weight=label in owned) for label, leaf in problem.leaves.items()
        }
        rest = {name: to_jax(p, weight=True) for name, p in named.items() if name not in owned}
        tasks = [
            tuple(to_jax(tensor) for batch in task for tensor in batch) for task in problem.tasks
        ]
        stacked = tuple(jnp.stack(parts) for parts in zip(*tasks, strict=True))
        constants = {"weights": rest, "tasks": stacked, "steps": _of_steps(problem)}
        return cls(leaves, constants, frozenset(owned))


def _of_steps(problem: Problem) -> Tree:
    """What Adam divides by at each step [T]; nothing for the others."""
    if not isinstance(problem.opt, torch.optim.Adam):
        return {}
    beta1, beta2 = problem.opt.param_groups[0]["betas"]
    counts = torch.arange(1, problem.steps + 1, dtype=torch.float64)
    scales = {"first": 1 - beta1**counts, "second": (1 - beta2**counts).sqrt()}
    dtype = torch.get_default_dtype()
    return {name: to_jax(scale.to(dtype)) for name, scale in scales.items()}


def _meta_loss(problem: Problem, checkpoint: bool) -> Callable[[Tree, Any], tuple[Array, Array]]:
    """``leaves, constants -> sum of the tasks' losses, losses``."""
    network = function_of(problem.model)
    names = [name for name, _ in problem.model.named_parameters()]
    blank, rule = _rule_of(problem, names)

    def loss_of(weights: Tree, batch: tuple[Array, Array]) -> Array:
        return cross_entropy(network(weights, batch[0]), batch[1])

    def task_loss(leaves: Tree, constants: Any, task: tuple[Array, ...]) -> Array:
        train, val = task[:2], task[2:]
        if "images" in leaves:
            train = leaves["images"], train[1]
        weights = {
            name: leaves[name] if name in leaves else constants["weights"][name] for name in names
        }

        def body(carry: Any, now: Any) -> tuple[Any, None]:
            weights, state = carry
            gradient = jax.grad(loss_of)(weights, train if problem.repeated else now["batch"])
            return rule(leaves | now, weights, gradient, state), None

        each = dict(constants["steps"])
        if not problem.repeated:
            each["batch"] = train
        if problem.rates is not None:
            each["rate"] = leaves["learning rates"]
        step = jax.checkpoint(body, prevent_cse=False) if checkpoint else body
        (weights, _), _ = lax.scan(step, (weights, blank(weights)), each, length=problem.steps)
        return loss_of(weights, val)

    def total(leaves: Tree, constants: Any) -> tuple[Array, Array]:
        tasks = constants["tasks"]
        if len(problem.tasks) == 1:
            losses = task_loss(leaves, constants, tuple(part[0] for part in tasks))[None]
        else:
            losses = lax.map(lambda task: task_loss(leaves, constants, task), tasks)
        return losses.sum(), losses

    return total


def _rule_of(problem: Problem, names: list[str]) -> tuple[Callable[[Tree], Any], Rule]:
    """The state before the first step and the update: ``leaves | step, weights, gradient, state``.

    The arithmetic is that of `implementations._RULES`.
    """
    opt = problem.opt
    if isinstance(opt, LearnedOptimizer):
        return _learned(opt, names)
    groups = opt.param_groups
    fixed = {name: groups[i % len(groups)]["lr"] for i, name in enumerate(names)}

    def rate(now: Tree, name: str) -> Any:
        return now["rate"] if "rate" in now else now.get(f"lr of {name}", fixed[name])

    if isinstance(opt, torch.optim.Adam):
        return _adam(groups[0], rate)
    return _sgd(groups[0]["momentum"], rate)


def _sgd(momentum: float, rate: Callable[[Tree, str], Any]) -> tuple[Callable[[Tree], Any], Rule]:
    def blank(weights: Tree) -> Tree:
        return {name: jnp.zeros_like(w) for name, w in weights.items()} if momentum else {}

    def update(now: Tree, weights: Tree, gradient: Tree, state: Tree) -> tuple[Tree, Tree]:
        if momentum:
            state = gradient = {n: momentum * state[n] + g for n, g in gradient.items()}
        return {n: w - rate(now, n) * gradient[n] for n, w in weights.items()}, state

    return blank, update


def _adam(
    group: dict[str, Any], rate: Callable[[Tree, str], Any]
) -> tuple[Callable[[Tree], Any], Rule]:
    (beta1, beta2), eps = group["betas"], group["eps"]

    def blank(weights: Tree) -> tuple[Tree, Tree]:
        zeros = {name: jnp.zeros_like(w) for name, w in weights.items()}
        return zeros, zeros

    def update(now: Tree, weights: Tree, gradient: Tree, state: Any) -> tuple[Tree, Any]:
        means, squares = state
        means = {n: beta1 * means[n] + (1 - beta1) * g for n, g in gradient.items()}
        squares = {n: beta2 * squares[n] + (1 - beta2) * g * g for n, g in gradient.items()}
        new = {}
        for name, w in weights.items():
            square = squares[name]
            root = jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
            step = means[name] / (root / now["second"] + eps)
            new[name] = w - rate(now, name) / now["first"] * step
        return new, (means, squares)

    return blank, update


def _learned(opt: LearnedOptimizer, names: list[str]) -> tuple[Callable[[Tree], Any], Rule]:
    hidden = opt.net.out.in_features

    def blank(weights: Tree) -> tuple[Array, ...]:
        count = sum(w.size for w in weights.values())
        return tuple(jnp.zeros((count, hidden), weights[names[0]].dtype) for _ in range(4))

    def update(net: Tree, weights: Tree, gradient: Tree, memory: Any) -> tuple[Tree, Any]:
        flat = jnp.concatenate([gradient[name].ravel() for name in names])
        first = lstm_cell(net, "first.", 10 * flat[:, None], memory[:2])
        second = lstm_cell(net, "second.", first[0], memory[2:])
        updates = 0.1 * (second[0] @ net["out.weight"].T + net["out.bias"])[:, 0]
        new, start = {}, 0
        for name in names:
            size = weights[name].size
            new[name] = weights[name] + updates[start : start + size].reshape(weights[name].shape)
            start += size
        return new, (*first, *second)

    return blank, update
