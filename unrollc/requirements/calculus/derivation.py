"""What is derived from an update: its expressions, derivatives and points that are not smooth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from unrollc.errors import Source
from unrollc.requirements.calculus.notation import Name
from unrollc.requirements.calculus.typeset import as_latex, as_text


@dataclass(frozen=True)
class Definition:
    """A named value: a result, or something that several results share.

    Attributes:
        symbol: Its name.
        value: What it is, in inputs and in names defined before it.
        node: The op that computes it.
    """

    symbol: Any
    value: Any
    node: fx.Node


@dataclass(frozen=True)
class Point:
    """A set of points at which the update is not smooth.

    Attributes:
        kind: "kink", "jump", "root" or "pole", as in `points.Rough`.
        op: The op.
        equations: Expressions that are zero there; none where the update is decided at op level.
        source: The optimizer's line.
        reason: Of a root, why its singularity is removable or not.
        removable: Of a root, whether it is.
        results: Keys of the results that are not smooth there.
        inputs: Keys of the inputs that reach the results through it.
        limits: Of a removable root, the derivatives there, by keys of result and input.
    """

    kind: str
    op: str
    equations: tuple[Any, ...]
    source: Source | None
    reason: str
    removable: bool
    results: frozenset[str]
    inputs: frozenset[str]
    limits: Mapping[tuple[str, str], Any]


@dataclass(frozen=True)
class OpLevel:
    """Why an update has no elementwise expression.

    Attributes:
        op: The op that stands in the way.
        source: The optimizer's line.
        reason: What it does.
    """

    op: str
    source: Source | None
    reason: str

    def __str__(self) -> str:
        where = f" at {self.source.short}" if self.source else ""
        return f"{self.reason}{where}: decided at op level"


@dataclass(frozen=True)
class Derivation:
    """One update with its derivatives; ``str()`` is text, `.latex` an align body.

    Attributes:
        parameters: Labels of the parameters that are updated like this.
        inputs: Symbols of what the update reads, by key: ``theta``, ``grad``, ``exp_avg``, ``lr``,
            ``betas[1]``.
        definitions: The named values, in order; results among them.
        results: Symbols of the new values, by key.
        derivatives: By keys of result and input, in inputs and names; zero where absent.
        points: Where the update is not smooth.
        names: Letters of all symbols.
        obstacle: Why there is no expression; then everything else but `parameters` is empty.
    """

    parameters: tuple[str, ...]
    inputs: Mapping[str, Any]
    definitions: tuple[Definition, ...]
    results: Mapping[str, Any]
    derivatives: Mapping[tuple[str, str], Any]
    points: tuple[Point, ...]
    names: Mapping[Any, Name]
    obstacle: OpLevel | None = None

    def expand(self, value: Any) -> Any:
        """An expression in the inputs alone."""
        for definition in reversed(self.definitions):
            value = value.subs(definition.symbol, definition.value)
        return value

    def update(self, result: str) -> Any:
        """A new value in the inputs alone, by key: ``theta``, ``exp_avg``."""
        return self.expand(self.results[result])

    def derivative(self, result: str, by: str) -> Any:
        """∂result/∂by in the inputs alone; zero where the result does not depend on it."""
        import sympy

        return self.expand(self.derivatives.get((result, by), sympy.Integer(0)))

    def points_of(self, result: str, by: str) -> tuple[Point, ...]:
        """Where ∂result/∂by is not defined as it stands: it is, everywhere else."""
        return tuple(p for p in self.points if result in p.results and by in p.inputs)

    def __str__(self) -> str:
        return as_text(self)

    @property
    def text(self) -> str:
        """The same as ``str()``."""
        return str(self)

    @property
    def latex(self) -> str:
        """The update and its derivatives as the body of an ``align*`` environment."""
        return as_latex(self)
