"""Derivations as text and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from unrollc.requirements.calculus.notation import Name

if TYPE_CHECKING:
    from unrollc.requirements.calculus.derivation import Derivation, Point


def as_text(derivation: Derivation) -> str:
    """The update, its derivatives and its rough points, one a line."""
    from unrollc.requirements.calculus.printers import text

    lines = [f"update of {_few(derivation.parameters)}"]
    if derivation.obstacle is not None:
        lines.append(f"  {derivation.obstacle}")
        for point in derivation.points:
            lines.append(f"  {describe(derivation, point)}")
        return "\n".join(lines)
    names = derivation.names
    for definition in derivation.definitions:
        lines.append(f"  {names[definition.symbol].text} = {text(definition.value)}")
    for result, by, value in shown(derivation):
        lines.append(f"  ∂{result.text}/∂{by.text} = {text(value)}")
    for point in derivation.points:
        lines.append(f"  {describe(derivation, point)}")
        for result, by, value in shown_limits(derivation, point):
            lines.append(f"    ∂{result.text}/∂{by.text} → {text(value)}")
    return "\n".join(lines)


def as_latex(derivation: Derivation) -> str:
    """The same as the body of an ``align*`` environment."""
    if derivation.obstacle is not None:
        escaped = str(derivation.obstacle).replace("_", r"\_")
        return rf"& \text{{{escaped}}}"
    from unrollc.requirements.calculus.printers import latex

    names = derivation.names
    lines = [
        f"{names[definition.symbol].latex} &= {latex(definition.value, names)}"
        for definition in derivation.definitions
    ]
    lines += [
        rf"\frac{{\partial {result.latex}}}{{\partial {by.latex}}} &= {latex(value, names)}"
        for result, by, value in shown(derivation)
    ]
    return " \\\\\n".join(lines)


def shown(derivation: Derivation) -> Iterator[tuple[Name, Name, Any]]:
    """The derivatives that are not zero, θ' first, with the letters of result and input."""
    for (result, by), value in derivation.derivatives.items():
        yield (*_letters(derivation, result, by), value)


def shown_limits(derivation: Derivation, point: Point) -> Iterator[tuple[Name, Name, Any]]:
    """Likewise for the derivatives at a removable root."""
    for (result, by), value in point.limits.items():
        yield (*_letters(derivation, result, by), value)


def _letters(derivation: Derivation, result: str, by: str) -> tuple[Name, Name]:
    names = derivation.names
    return names[derivation.results[result]], names[derivation.inputs[by]]


def describe(derivation: Derivation, point: Point) -> str:
    """``kink where G = 0   adamax.py:282``"""
    from unrollc.requirements.calculus.printers import text

    where = " and ".join(f"{text(equation)} = 0" for equation in point.equations)
    place = f"where {where}" if where else f"of {point.op}"
    line = f"   {point.source.short}" if point.source else ""
    if point.kind == "root":
        kind = "removable singularity" if point.removable else "singularity"
        reason = "" if point.removable else f"; {point.reason}"
        return f"{kind} {place}{reason}{line}"
    return f"{point.kind} {place}{line}"


def _few(labels: tuple[str, ...]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
