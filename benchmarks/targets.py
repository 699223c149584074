"""What the project aims at, as data, and how far the results are from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from registry import OURS
from results import Entry, Results, best, best_peer, label, median
from workloads import WORKLOADS

ANY = "the best peer"


@dataclass(frozen=True)
class Target:
    """A bound on one number of one workload.

    Attributes:
        workload: Its name.
        quantity: "run time", "memory", "cold compile", "warm compile".
        bound: What the quantity must not exceed: a ratio to `peer`'s, or seconds or MiB.
        peer: What it is divided by; None for a bound in seconds or MiB.
        budget: Which of our plans it is about.
        other: Another workload of ours that it is divided by, in the place of a peer.
    """

    workload: str
    quantity: str
    bound: float
    peer: str | None = None
    budget: str | None = None
    other: str | None = None

    def __str__(self) -> str:
        against = self.peer if self.other is None else f"that of {self.other}"
        unit = "MiB" if self.quantity == "memory" else "s"
        amount = f"{self.bound:g} {unit}" if against is None else f"{self.bound:g} × {against}"
        return f"{self.quantity} ≤ {amount}"


#: `mlp-long` compiles as `mlp-small` does, up to what two timings of one thing differ by.
_SAME = 1.5


def _compiles(workload: str, cold: float, budget: str | None = None) -> list[Target]:
    found = [Target(workload, "cold compile", cold, budget=budget)]
    if workload.startswith("mlp"):
        found.append(Target(workload, "warm compile", 1, budget=budget))
    return found


def _rest(workload: str) -> list[Target]:
    """Every plan is to be ahead of all peers; memory is that of the leanest."""
    plans = WORKLOADS[workload].budgets
    times = [Target(workload, "run time", 1, ANY, plan) for plan in plans]
    return [*times, Target(workload, "memory", 0.3, "higher", plans[-1])]


def _gpt(workload: str) -> list[Target]:
    lean = WORKLOADS[workload].budgets[-1]
    return [
        Target(workload, "run time", 0.7, "torch.func"),
        Target(workload, "memory", 0.7, "torch.func"),
        *_compiles(workload, 30),
        Target(workload, "run time", 1, "torch.func", lean),
        Target(workload, "memory", 0.2, "torch.func", lean),
        *_compiles(workload, 30, lean),
    ]


#: A budget counts tensors; resident memory, which the target is about, has some MiB besides.
_LONG = "54MiB"

TARGETS = (
    Target("mlp-small", "run time", 0.5, "JAX"),
    Target("mlp-small", "run time", 0.1, "higher"),
    *_compiles("mlp-small", 10),
    Target("mlp", "run time", 0.5, "JAX"),
    Target("mlp", "run time", 0.3, "higher"),
    *_compiles("mlp", 10),
    Target("mlp-long-1000", "run time", 0.5, "JAX", _LONG),
    Target("mlp-long-1000", "memory", 64, budget=_LONG),
    *_compiles("mlp-long-1000", 10, _LONG),
    Target("mlp-long", "memory", 64, budget=_LONG),
    *_compiles("mlp-long", 10, _LONG),
    Target("mlp-long", "cold compile", _SAME, budget=_LONG, other="mlp-small"),
    Target("maml-conv4", "run time", 0.5, "higher"),
    Target("maml-conv4", "memory", 0.5, "higher"),
    *_compiles("maml-conv4", 20),
    *_gpt("gpt-sgd"),
    *_gpt("gpt-adam"),
    *_rest("learned-opt"),
    *_rest("densenet-lr"),
    *_rest("distill"),
)

_KEYS = {"memory": "resident", "cold compile": "cold", "warm compile": "warm"}


@dataclass(frozen=True)
class Finding:
    """What was measured for a target.

    Attributes:
        target: What it is about.
        measured: The number that the bound is for; None if something is missing.
        by: Our row, and the one that it is compared with.
        missing: Why there is no number.
        apart: Whether the two numbers come from different runs.
    """

    target: Target
    measured: float | None
    by: str = ""
    missing: str = ""
    apart: bool = False

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.measured is None else self.measured <= self.target.bound


def judged(results: Results, target: Target) -> Finding:
    """Our fastest row of the plan in question against the peer's fastest."""
    own = best(results, target.workload, OURS, target.budget)
    if own is None:
        return Finding(target, None, missing=f"{OURS} was not measured")
    if target.peer is None and target.other is None:
        return Finding(target, _absolute(target.quantity, own), label(own))
    other = _other(results, target)
    if other is None:
        against = target.other or target.peer
        return Finding(target, None, label(own), f"{against} has no measurement here")
    measured = _number(target.quantity, own) / max(_number(target.quantity, other), 1e-9)
    names = f"{label(own)} / {label(other)}"
    return Finding(target, measured, names, apart=own["run"] != other["run"])


def _other(results: Results, target: Target) -> Entry | None:
    if target.other is not None:
        return best(results, target.other, OURS)
    if target.peer == ANY:
        return best_peer(results, target.workload)
    assert target.peer is not None
    return best(results, target.workload, target.peer)


def _number(quantity: str, entry: dict[str, Any]) -> float:
    return median(entry) if quantity == "run time" else float(entry[_KEYS[quantity]])


def _absolute(quantity: str, entry: dict[str, Any]) -> float:
    """In seconds, or MiB for memory."""
    number = _number(quantity, entry)
    return number / 2**20 if quantity == "memory" else number
