"""The elementwise update of a captured optimizer as expressions, and its derivatives.

An update θ', state' = opt(θ, G, state, φ) is written as a short list of definitions: the new
state, denominators and shared factors are named and reused. Derivatives follow the chain rule
through these names, so they stay as short as the update itself; `Derivation.expand` writes a
result in the inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from unrollc.errors import Source
from unrollc.requirements.calculus.derivation import Definition, Derivation, OpLevel, Point
from unrollc.requirements.calculus.differentials import chain_rule
from unrollc.requirements.calculus.domain import Domain, domain_of
from unrollc.requirements.calculus.expression import NotElementwiseError, expression, number
from unrollc.requirements.calculus.notation import Name, name_of, plain, short_key
from unrollc.requirements.calculus.points import Rough, rough_points
from unrollc.requirements.calculus.singular import RootVerdict, root_verdicts
from unrollc.requirements.calculus.slices import (
    Leaf,
    UpdateSlice,
    is_counter,
    leaf_of,
    op_name,
    settled_nodes,
    update_of,
    value_inputs,
)
from unrollc.requirements.calculus.vanishing import solve_at_root, vanishing
from unrollc.step import Role, StepGraph, Value

__all__ = ["Derivation", "derive"]


def derive(step: StepGraph) -> tuple[Derivation, ...]:
    """The distinct updates of a step with their derivatives.

    Args:
        step: A captured inner step.

    Returns:
        One `Derivation` for each distinct update; parameters with the same one share it. An
        update that mixes elements has an `OpLevel` obstacle instead of expressions.
    """
    verdicts = root_verdicts(step)
    groups: dict[Any, tuple[UpdateSlice, list[str]]] = {}
    for owner, part in update_of(step).per_parameter():
        groups.setdefault(part.signature, (part, []))[1].append(owner)
    return tuple(_derivation(part, tuple(owners), verdicts) for part, owners in groups.values())


def _derivation(
    part: UpdateSlice, owners: tuple[str, ...], verdicts: Mapping[fx.Node, RootVerdict]
) -> Derivation:
    domain = domain_of(part)
    rough = rough_points(part, domain, verdicts)
    try:
        return _Calculus(part, owners, domain).derivation(rough)
    except NotElementwiseError as error:
        source: Source | None = error.node.meta.get("source")
        obstacle = OpLevel(op_name(error.node) or str(error.node.target), source, error.reason)
        points = tuple(
            Point(r.kind, op_name(r.node), (), r.source, r.reason, r.removable, *_UNKNOWN)
            for r in rough
        )
        return Derivation(owners, {}, (), {}, {}, points, {}, obstacle)


class _Calculus:
    """One elementwise update while it is being differentiated."""

    def __init__(self, part: UpdateSlice, owners: tuple[str, ...], domain: Domain) -> None:
        self._part, self._owners, self._domain = part, owners, domain
        self._names: dict[Any, Name] = {}
        self._results: dict[Value, Any] = {}
        self._inputs: dict[str, Any] = {}
        ordered = sorted(part.leaves.items(), key=lambda item: _ORDER.get(item[1].role, 4))
        self._leaves = {node: self._leaf(node, leaf) for node, leaf in ordered}
        self._settled = settled_nodes(part)
        self._inside = set(part.nodes)
        self._symbols = self._name_nodes()

    # -- names --------------------------------------------------------------------------------

    def _symbol(self, name: Name, node: fx.Node) -> Any:
        import sympy

        taken = {symbol.name for symbol in self._names}
        number, base = 1, name
        while name.text in taken:
            number += 1
            name = base.numbered(number)
        span = self._domain[node]
        facts: dict[str, bool] = {"real": True}
        if span.positive or span.nonnegative or span.negative:
            key = "positive" if span.positive else "negative" if span.negative else "nonnegative"
            facts = {key: True}
        symbol = sympy.Symbol(name.text, **facts)
        self._names[symbol] = name
        return symbol

    def _leaf(self, node: fx.Node, leaf: Leaf) -> Any:
        constant = self._part.constants.get(node.name)
        if constant is not None:
            if constant.numel() != 1:
                raise NotElementwiseError(node, "a constant with several elements takes part")
            return number(constant.item())
        if leaf.owner not in ("", self._owners[0]):
            user = next(n for n in self._part.nodes if node in n.all_input_nodes)
            reason = f"{op_name(user)} reads {leaf.label}, which is another parameter's"
            raise NotElementwiseError(user, reason)
        symbol = self._symbol(name_of(leaf), node)
        self._inputs[short_key(leaf)] = symbol
        return symbol

    def _name_nodes(self) -> dict[fx.Node, Any]:
        """Symbols for the nodes that get a name."""
        names: dict[fx.Node, Name] = {}
        for value, node in self._part.results:
            if node in self._part.nodes and node not in names:
                names[node] = name_of(leaf_of(value)).after_step()
        letters = {node: letter for node in self._part.nodes if (letter := self._letter(node))}
        count: dict[str, int] = {}
        for node, letter in letters.items():
            if node not in names:
                count[letter] = count.get(letter, 0) + 1
                several = list(letters.values()).count(letter) > 1
                names[node] = plain(letter).numbered(count[letter] if several else 0)
        symbols = {node: self._symbol(name, node) for node, name in names.items()}
        for value, node in self._part.results:
            first = node in symbols and symbols[node] not in self._results.values()
            name = name_of(leaf_of(value)).after_step()
            self._results[value] = symbols[node] if first else self._symbol(name, node)
        return symbols

    def _letter(self, node: fx.Node) -> str:
        """The letter for an intermediate value that deserves a name, or ""."""
        name = op_name(node)
        if name in ("neg", "clone", "copy", "_to_copy", "expand") or not value_inputs(node):
            return ""
        shared = sum(user in self._inside for user in node.users) > 1
        if node in self._settled:
            correction = name == "rsub" and _depth(node) > 1 and self._domain[node].positive
            outer = any(user in self._inside - self._settled for user in node.users)
            factor = name == "pow" and outer and _depth(node) > 2 and self._is_new(node.args[0])
            return "c" if correction or factor or (shared and _depth(node) > 2) else ""
        if name in ("where", "masked_fill", "index_put"):
            return "w"
        return "h" if _divides(node) else "g" if shared else ""

    def _is_new(self, node: Any) -> bool:
        return node in self._inside and not self._letter(node)

    # -- expressions ----------------------------------------------------------------------------

    def _translate(
        self, known: dict[fx.Node, Any], replaced: Mapping[fx.Node, Any] | None = None
    ) -> tuple[Definition, ...]:
        """Definitions of all named nodes; `known` receives every node's expression.

        Args:
            known: Expressions of the leaves.
            replaced: Expressions that stand in for those of some nodes.
        """
        replaced = replaced or {}
        definitions = []
        for node in self._part.nodes:
            value = replaced[node] if node in replaced else expression(node, known)
            symbol = self._symbols.get(node)
            if symbol is not None and value != symbol:
                definitions.append(Definition(symbol, value, node))
            known[node] = value if symbol is None else symbol
        for value, node in self._part.results:
            if self._results[value] != known[node]:
                definitions.append(Definition(self._results[value], known[node], node))
        return tuple(definitions)

    def derivation(self, rough: Iterable[Rough]) -> Derivation:
        known = dict(self._leaves)
        definitions = self._translate(known)
        results = {short_key(leaf_of(v)): self._results[v] for v, _ in self._part.results}
        derivatives = self._differentiate(definitions, results)
        found = [self._point(r, known, results, derivatives) for r in rough]
        points = tuple(p for p in found if any(e.free_symbols for e in p.equations))
        return Derivation(
            self._owners,
            self._inputs,
            definitions,
            results,
            derivatives,
            points,
            self._names,
        )

    def _differentiate(
        self, definitions: tuple[Definition, ...], results: Mapping[str, Any]
    ) -> dict[tuple[str, str], Any]:
        found = {}
        counters = {self._leaves[node] for node in self._part.leaves if is_counter(node)}
        slopes = {
            by: chain_rule(definitions, symbol)
            for by, symbol in self._inputs.items()
            if symbol not in counters
        }
        for key, result in results.items():
            for by in slopes:
                slope = slopes[by].get(result, 0)
                if slope != 0:
                    found[key, by] = slope
        return found

    # -- where it is not smooth -----------------------------------------------------------------

    def _point(
        self,
        rough: Rough,
        known: Mapping[fx.Node, Any],
        results: Mapping[str, Any],
        derivatives: Iterable[tuple[str, str]],
    ) -> Point:
        downstream = _downstream(self._part, rough.node)
        reached = frozenset(
            short_key(leaf_of(value)) for value, node in self._part.results if node in downstream
        )

        def read(argument: Any) -> Any:
            return known[argument] if isinstance(argument, fx.Node) else number(argument)

        equations: tuple[Any, ...] = (read(rough.first) - read(rough.second),)
        limits: dict[tuple[str, str], Any] = {}
        if rough.kind == "root":
            zeros = vanishing(rough.node.args[0], self._domain)
            equations = tuple(known[node] for node in zeros)
            if rough.removable:
                equations, limits = self._limits(
                    rough.node, equations, results, reached, derivatives
                )
        return Point(
            rough.kind,
            op_name(rough.node),
            equations,
            rough.source,
            rough.reason,
            rough.removable,
            reached,
            self._above(rough.node),
            limits,
        )

    def _above(self, node: fx.Node) -> frozenset[str]:
        """Keys of the inputs that reach a node."""
        read = {self._leaves.get(n) for n in _upstream(self._part, node)}
        return frozenset(key for key, symbol in self._inputs.items() if symbol in read)

    def _limits(
        self,
        root: fx.Node,
        equations: tuple[Any, ...],
        results: Mapping[str, Any],
        reached: frozenset[str],
        derivatives: Iterable[tuple[str, str]],
    ) -> tuple[tuple[Any, ...], dict[tuple[str, str], Any]]:
        """The derivatives at a removable root: those of the update with the root held at zero."""
        import sympy

        s = sympy.Symbol("s", nonnegative=True)
        moved = self._translate(dict(self._leaves), {root: s})
        slopes = chain_rule(moved, s)
        factors = [slopes[results[key]].subs(s, 0) for key in results if results[key] in slopes]
        moving = {self._leaves[n] for n in self._leaves if n not in self._settled}
        equations, at = solve_at_root(equations, factors, moved, moving)
        held = self._translate(dict(self._leaves), {root: number(0)})
        for definition in held:
            if definition.node not in self._settled:
                value = definition.value.subs(at)
                at |= {definition.symbol: value} if value.is_Atom else {}
        through = self._above(root)
        slopes_at_zero = self._differentiate(held, results)
        return equations, {
            (result, by): slopes_at_zero.get((result, by), number(0)).subs(at)
            for result, by in derivatives
            if result in reached and by in through
        }


#: Results, inputs and limits of a point of an update that has no expression.
_UNKNOWN: tuple[Any, ...] = (frozenset(), frozenset(), {})

#: Inputs in the order in which they are written.
_ORDER = {Role.THETA: 0, Role.GRADIENT: 1, Role.OPT_STATE: 2, Role.HYPER: 3}


def _depth(node: fx.Node) -> int:
    """How many ops lie on the longest way to the inputs, up to three."""
    level, depth = [node], 0
    while level and depth < 3:
        level = [s for n in level for s in n.all_input_nodes if s.op == "call_function"]
        depth += 1
    return depth


def _divides(node: fx.Node) -> bool:
    """Whether a value is a denominator."""
    places = {"div": 1, "addcdiv": 2, "reciprocal": 0}
    return any(
        user.args[places[op_name(user)]] is node for user in node.users if op_name(user) in places
    )


def _downstream(part: UpdateSlice, node: fx.Node) -> set[fx.Node]:
    reached = {node}
    for other in part.nodes:
        if any(source in reached for source in value_inputs(other)):
            reached.add(other)
    return reached


def _upstream(part: UpdateSlice, node: fx.Node) -> set[fx.Node]:
    above = {node}
    for other in reversed(part.nodes):
        if other in above:
            above.update(value_inputs(other))
    return above
