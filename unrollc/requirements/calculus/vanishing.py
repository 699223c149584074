"""Where the argument of a root is zero, in coordinates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from torch import fx

from unrollc.requirements.calculus.differentials import Defined
from unrollc.requirements.calculus.domain import SAME, Domain
from unrollc.requirements.calculus.slices import op_name


def vanishing(value: Any, domain: Domain) -> list[fx.Node]:
    """Nodes that are zero exactly where `value` is, as close to the inputs as can be.

    A sum of nonnegative terms is zero where all of them are, a product where a factor is.
    """
    found: list[fx.Node] = []
    stack = [value]
    while stack:
        node = stack.pop()
        parts = None if domain.is_leaf(node) else _parts(node, domain)
        if parts is None:
            found.extend([node] if node not in found else [])
        else:
            stack.extend(reversed(parts))
    return found


def _parts(node: fx.Node, domain: Domain) -> list[Any] | None:
    """Values that are all zero exactly where `node` is, or None."""
    name = op_name(node)
    if name in SAME or name in ("sqrt", "abs", "square", "neg"):
        return [node.args[0]]
    if name == "pow" and domain.of(node.args[1]).positive:
        return [node.args[0]]
    if name in ("mul", "div"):
        parts = list(node.args) if name == "mul" else [node.args[0]]
        return _one(parts, domain)
    terms: list[Any] = list(node.args)
    if name == "addcmul":
        start, first, second = terms
        product = _one([first, second], domain)
        added = domain.of(node).nonnegative and domain.of(node.kwargs.get("value", 1)).positive
        if not added or product is None or not domain.of(start).nonnegative:
            return None
        return [*_nodes([start]), *product]
    if name == "lerp":
        terms = terms[:2]
    if name not in ("add", "maximum", "lerp") or node.kwargs.get("alpha", 1) != 1:
        return None
    if not all(domain.of(term).nonnegative for term in terms):
        return None
    return _nodes(terms)


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    return [value for value in values if isinstance(value, fx.Node)]


def _one(factors: Sequence[Any], domain: Domain) -> list[Any] | None:
    """The factor that can be zero, where it is only one."""
    free = {factor for factor in _nodes(factors) if not domain.of(factor).nonzero}
    if len(free) == 1:
        return list(free)
    # Two different factors: one may be the other times something that is never zero.
    reduced = [part for factor in free if (part := _origin(factor, domain)) is not None]
    return [reduced[0]] if len(reduced) == len(free) and len(set(reduced)) == 1 else None


def _origin(value: fx.Node, domain: Domain) -> fx.Node | None:
    while not domain.is_leaf(value):
        parts = _parts(value, domain) if op_name(value) in ("mul", "div", "neg") else None
        if parts is None or len(parts) != 1:
            return value
        value = parts[0]
    return value


def solve_at_root(
    equations: Iterable[Any],
    factors: Iterable[Any],
    definitions: Sequence[Defined],
    moving: AbstractSet[Any],
) -> tuple[tuple[Any, ...], dict[Any, Any]]:
    """The points of a removable root in coordinates.

    Args:
        equations: Expressions that are zero where the root's argument is.
        factors: Slopes of the results in the root, which are zero as well.
        definitions: The named values among them.
        moving: The inputs that vary: θ, G and state.

    Returns:
        Expressions that are zero there, and values of inputs that make them so.
    """
    kept: list[Any] = []
    at: dict[Any, Any] = {}
    for value in (*equations, *factors):
        for definition in reversed(definitions):
            value = value.subs(definition.symbol, definition.value)
        essential = _essential(value.subs(at), moving)
        if essential == 0 or essential in kept:
            continue
        kept.append(essential)
        symbol = next((x for x in _unknowns(essential, moving) if _solvable(essential, x)), None)
        if symbol is not None:
            rest = essential.subs(symbol, 0)
            solution = -rest / essential.coeff(symbol, 1) if rest != 0 else rest
            at = {key: v.subs(symbol, solution) for key, v in at.items()} | {symbol: solution}
    return tuple(kept), at


def _essential(value: Any, moving: AbstractSet[Any]) -> Any:
    """The factors of an expression that can be zero."""
    import sympy

    numerator, _ = sympy.fraction(sympy.factor_terms(sympy.together(value)))
    result = sympy.Integer(1)
    for factor in sympy.Mul.make_args(sympy.factor_terms(numerator)):
        base = factor.base if factor.is_Pow and factor.exp.is_positive else factor
        if base.free_symbols and not base.is_nonzero and _unknowns(base, moving):
            result *= base
        elif base == 0:
            return sympy.Integer(0)
    return result if result.free_symbols else sympy.Integer(0)


def _unknowns(value: Any, moving: AbstractSet[Any]) -> list[Any]:
    found = value.free_symbols & moving
    return sorted(found, key=lambda symbol: (symbol.name != "G", symbol.name))


def _solvable(value: Any, symbol: Any) -> bool:
    slope = value.diff(symbol)
    return symbol not in slope.free_symbols and bool(slope.is_nonzero or slope == 1)
