"""Derivatives of expressions with kinks and jumps, through a list of definitions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class Defined(Protocol):
    """A named value."""

    @property
    def symbol(self) -> Any: ...

    @property
    def value(self) -> Any: ...


def chain_rule(definitions: Iterable[Defined], by: Any) -> dict[Any, Any]:
    """Total derivatives of defined symbols with respect to an input, where they are not zero."""
    slopes: dict[Any, Any] = {by: 1}
    for definition in definitions:
        total = 0
        for symbol in sorted(definition.value.free_symbols & slopes.keys(), key=str):
            total += partial(definition.value, symbol) * slopes[symbol]
        if total != 0:
            slopes[definition.symbol] = tidy(total)
    return slopes


def partial(value: Any, by: Any) -> Any:
    """The derivative where it exists: that of the piece for max, min and cases, 0 for sign."""
    import sympy

    if by not in value.free_symbols:
        return sympy.Integer(0)
    if isinstance(value, sympy.Piecewise):
        return _cases([(partial(part, by), condition) for part, condition in value.args])
    if isinstance(value, sympy.Max | sympy.Min):
        return _of_extremum(value, by)
    rough = _outermost(value, (sympy.Piecewise, sympy.Max, sympy.Min, sympy.sign))
    stand_ins = {part: sympy.Dummy(real=True) for part in rough}
    back = {stand_in: part for part, stand_in in stand_ins.items()}
    smooth = value.xreplace(stand_ins)
    total = smooth.diff(by)
    for part, stand_in in stand_ins.items():
        if not isinstance(part, sympy.sign):
            total += smooth.diff(stand_in) * partial(part, by)
    return total.xreplace(back)


def _outermost(value: Any, kinds: tuple[type, ...]) -> list[Any]:
    if isinstance(value, kinds):
        return [value]
    return list(dict.fromkeys(part for a in value.args for part in _outermost(a, kinds)))


def _of_extremum(extremum: Any, by: Any) -> Any:
    """The derivative of the argument that wins; of the first one at a tie."""
    import sympy

    first, *others = sorted(extremum.args, key=sympy.default_sort_key)
    rest = type(extremum)(*others)
    wins = first >= rest if isinstance(extremum, sympy.Max) else first <= rest
    return _cases([(partial(first, by), wins), (partial(rest, by), sympy.true)])


def _cases(cases: list[tuple[Any, Any]]) -> Any:
    import sympy

    values = {value for value, _ in cases}
    return values.pop() if len(values) == 1 else sympy.Piecewise(*cases)


def tidy(value: Any) -> Any:
    """An equal expression that is no longer: common factors taken out."""
    import sympy

    if value.has(sympy.Piecewise):
        return value
    candidates = [value, sympy.factor_terms(value)]
    return min(candidates, key=lambda e: e.count_ops())
