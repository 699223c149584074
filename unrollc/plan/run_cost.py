"""The cost of a whole run, as polynomials in the number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy

from unrollc.plan.cost import NOTHING, Cost, cost_of, human_bytes
from unrollc.plan.pieces import Pieces
from unrollc.step import StepGraph

#: The number of inner steps, and how many of them the backward pass runs again.
T, R = sympy.symbols("T R", integer=True, nonnegative=True)


@dataclass(frozen=True)
class RunCost:
    """Work of a run.

    Steps whose graph differs from the steady one, such as the first, count as often as they do in
    the program at hand: they are in the constant terms. A run repeats steady steps.

    Attributes:
        operations, bytes_moved, calls: As in `Cost`, linear in `T` and `R`.
        repeated: R of the program at hand.
    """

    operations: sympy.Expr
    bytes_moved: sympy.Expr
    calls: sympy.Expr
    repeated: int

    def at(self, steps: int, repeated: int) -> Cost:
        """The cost of so many steps, of which so many run again."""
        parts = (self.operations, self.bytes_moved, self.calls)
        return Cost(*(int(part.subs({T: steps, R: repeated})) for part in parts))

    def __str__(self) -> str:
        rows = (
            ("operations", _text(self.operations, lambda n: f"{n:,}")),
            ("bytes moved", _text(self.bytes_moved, human_bytes)),
            ("calls", _text(self.calls, lambda n: f"{n:,}")),
        )
        lines = [f"{name:<12} {text}" for name, text in rows]
        return "\n".join([*lines, f"R = {self.repeated:,} repeated steps"])


def run_cost(pieces: Pieces, repeated: int) -> RunCost:
    """The cost of a program as a function of T.

    Args:
        pieces: The program.
        repeated: How many steps its schedule runs again.
    """
    steps, steady = _linear(pieces.steps, pieces.sequence)
    reversed_steps = [index for index in pieces.adjoint_sequence if index is not None]
    adjoints, steady_adjoint = _linear([each.graph for each in pieces.adjoints], reversed_steps)
    truncated = len(reversed_steps) < len(pieces.sequence)
    val = cost_of(pieces.val_gradient or pieces.val)
    # Truncated backpropagation reverses the same number of steps whatever T is.
    more = sympy.Integer(0) if truncated else T - len(reversed_steps)

    def linear(name: str) -> sympy.Expr:
        forward = getattr(steady, name) * (T - len(pieces.sequence) + R) + getattr(steps, name)
        backward = getattr(steady_adjoint, name) * more + getattr(adjoints, name)
        return sympy.expand(forward + backward + getattr(val, name))

    return RunCost(linear("operations"), linear("bytes_moved"), linear("calls"), repeated)


def _linear(graphs: Sequence[StepGraph], sequence: Iterable[int]) -> tuple[Cost, Cost]:
    """The cost of a sequence of graphs, and of the graph that comes most often in it."""
    counts = Counter(sequence)
    costs = [cost_of(graph) for graph in graphs]
    total = sum((costs[i] for i, count in counts.items() for _ in range(count)), NOTHING)
    return total, costs[counts.most_common(1)[0][0]] if counts else NOTHING


def _text(part: sympy.Expr, number: Callable[[int], str]) -> str:
    """``T · 1,234 + R · 5 + 67``; a negative constant is a first step that does less."""
    polynomial = sympy.Poly(part, T, R)
    terms = []
    for powers, coefficient in polynomial.terms():
        factors = [str(s) for s, power in zip((T, R), powers, strict=True) if power]
        size = number(abs(int(coefficient)))
        terms.append(("−" if coefficient < 0 else "+", " · ".join([*factors, size])))
    first, *rest = terms
    start = first[1] if first[0] == "+" else f"−{first[1]}"
    return " ".join([start, *(f"{sign} {term}" for sign, term in rest)])
