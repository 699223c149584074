"""Removable singularities of an update.

A root s = Dᵖ with 0 < p < 1 has an infinite slope where D is zero. Adam at a coordinate whose
gradient and moments are exactly zero multiplies it by the cotangent 0. The rule that such a
product counts as 0 is right where the update, as a function F(x, s) of everything else and of s,
is

    F(x, s) = F(x, 0) + N(x) R(x, s)    with R continuous, R(x, 0) = 0, N Lipschitz,

and the cotangent F_s(x, 0) vanishes exactly where N does: there the second term is a vanishing
factor times one that goes to zero, o(‖x - x₀‖), so the derivative is that of F(x, 0), which is
what the rule leaves. With N = F_s(x, 0) this asks that R = (F(x, s) - F(x, 0)) / F_s(x, 0) has no
pole at N = 0. F = s² = D fails, whose F_s(x, 0) is zero everywhere and whose derivative is not.

The proof reads everything that s does not enter as a symbol, so it costs a few operations on
small rational functions. It takes the root as the only one that is singular at the point in
question, and leaves aside points where cotangents of several results cancel by coincidence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from unrollc.requirements.calculus.domain import SAME, Domain, domain_of
from unrollc.requirements.calculus.expression import NotElementwiseError, expression, number
from unrollc.requirements.calculus.slices import (
    Leaf,
    Update,
    UpdateSlice,
    is_counter,
    op_name,
    settled_nodes,
    update_of,
)
from unrollc.step import STATE_ROLES, Phase, Role, StepGraph, Value

#: Reasons that begin like this need no rule: the argument is positive wherever the update is
#: defined.
NEVER = "never singular"

#: More choices than this between the arguments of max, min and clamp are not followed.
_MOST_CHOICES = 32


@dataclass(frozen=True)
class RootVerdict:
    """What is known about a root of the update.

    Attributes:
        reason: Why the singularity is removable, or why it is not known to be.
        removable: Whether it is.
    """

    reason: str
    removable: bool

    @property
    def never(self) -> bool:
        """Whether the root is smooth wherever the update is defined."""
        return self.reason.startswith(NEVER)


def removable(step: StepGraph) -> dict[fx.Node, str]:
    """Roots of the update for which "cotangent 0 times infinite slope is 0" gives the limit.

    Args:
        step: A captured inner step.

    Returns:
        For each such node, why; it begins with `NEVER` where the rule has nothing to do. A root
        that is missing here has an infinite or undefined derivative where its argument is zero,
        or the proof does not reach it.
    """
    return {node: v.reason for node, v in root_verdicts(step).items() if v.removable}


def root_verdicts(step: StepGraph) -> dict[fx.Node, RootVerdict]:
    """A verdict for every root of the update that a derivative passes through."""
    update = update_of(step)
    roots = _roots(step, update)
    if not roots:
        return {}
    results = [(v, n) for v, n in step.outputs_with(*STATE_ROLES) if n is not None]
    parts: dict[frozenset[fx.Node], tuple[UpdateSlice, Any]] = {}
    proofs: dict[Any, RootVerdict] = {}
    found = {}
    for root in roots:
        reached = _reached(root)
        ends = [(v, n) for v, n in results if n in reached]
        key = frozenset(node for _, node in ends)
        if key not in parts:
            part = _with_invariants(update, ends, results)
            parts[key] = part, part.signature
        part, signature = parts[key]
        place = (signature, part.numbers[root]) if ends else root
        if place not in proofs:
            proofs[place] = _prove(part, root, reached, [n for _, n in ends])
        found[root] = proofs[place]
    return found


def _roots(step: StepGraph, update: Update) -> list[fx.Node]:
    """Powers below one of what a derivative passes through.

    A power with a tensor as its exponent counts if its base is more than a hyperparameter: β ** t
    is none.
    """
    fixed = {node for node, leaf in update.leaves.items() if _is_fixed(node, leaf)}
    moving = set(update.leaves) - fixed
    varying = moving | {node for node in fixed if update.leaves[node].role is Role.HYPER}
    found = []
    for node in step.graph.nodes:
        if node.op != "call_function" or node.meta["phase"] is not Phase.UPDATE:
            continue
        value = node.meta["val"]
        if isinstance(value, Tensor) and not value.is_floating_point():
            continue
        moving.update([node] if any(n in moving for n in node.all_input_nodes) else [])
        varying.update([node] if any(n in varying for n in node.all_input_nodes) else [])
        exponent = exponent_of(node)
        if exponent is not None and node.args[0] in (moving if exponent != exponent else varying):
            found.append(node)
    return found


def exponent_of(node: fx.Node) -> float | None:
    """The exponent below one of a root, NaN where it is a tensor; None for any other op."""
    name = op_name(node)
    if name in ("sqrt", "rsqrt"):
        return 0.5 if name == "sqrt" else -0.5
    if name != "pow" or not isinstance(node.args[0], fx.Node):
        return None
    exponent = node.args[1]
    if isinstance(exponent, fx.Node):
        return float("nan")
    assert isinstance(exponent, int | float)
    return float(exponent) if exponent < 1 and exponent != int(exponent) else None


def _is_fixed(node: fx.Node, leaf: Leaf) -> bool:
    return leaf.role in (Role.HYPER, Role.CONSTANT) or is_counter(node)


def _reached(root: fx.Node) -> set[fx.Node]:
    reached = {root}
    stack = [root]
    while stack:
        for user in stack.pop().users:
            if user not in reached:
                reached.add(user)
                stack.append(user)
    return reached


def _with_invariants(
    update: Update,
    ends: Iterable[tuple[Value, fx.Node]],
    results: Iterable[tuple[Value, fx.Node]],
) -> UpdateSlice:
    """What computes `ends`, and the new values of all state that it reads."""
    chosen = list(ends)
    while True:
        part = update.slice(chosen)
        read = {leaf.label for leaf in part.leaves.values() if leaf.role is Role.OPT_STATE}
        have = {(v.role, v.label) for v, _ in chosen}
        more = [
            (v, n)
            for v, n in results
            if v.role is Role.OPT_STATE and v.label in read and (v.role, v.label) not in have
        ]
        if not more:
            return part
        chosen += more


def _prove(
    part: UpdateSlice, root: fx.Node, reached: set[fx.Node], ends: list[fx.Node]
) -> RootVerdict:
    """The criterion of this module, for every result that the root reaches."""
    name = op_name(root)
    if not ends:
        return RootVerdict(f"{NEVER}: no result depends on it", True)
    domain = domain_of(part)
    argument = domain.of(root.args[0])
    if argument.positive:
        least = f"at least {argument.low:g}" if argument.low > 0 else "positive"
        return RootVerdict(f"{NEVER}: its argument is {least}", True)
    exponent = exponent_of(root)
    assert exponent is not None
    if not exponent > 0:
        why = "is infinite" if exponent < 0 else "has an exponent that is a tensor"
        return RootVerdict(f"{name} {why} where its argument is zero", False)
    return _Proof(part, domain, root, reached).verdict(ends)


class _Proof:
    """The results as functions of one root, everything else being a symbol."""

    def __init__(
        self, part: UpdateSlice, domain: Domain, root: fx.Node, reached: set[fx.Node]
    ) -> None:
        import sympy

        self._sympy = sympy
        self._part, self._domain, self._root = part, domain, root
        self._downstream = [n for n in part.nodes if n in reached and n is not root]
        self._s = sympy.Symbol("s", nonnegative=True)
        self._symbols: dict[fx.Node, Any] = {}
        self._regular: dict[fx.Node, bool] = {}
        self._fixed = settled_nodes(part)

    def verdict(self, ends: list[fx.Node]) -> RootVerdict:
        reason = ""
        try:
            for known in self._branches():
                for end in ends:
                    reason = self._obstacle(known[end]) or ""
                    if reason:
                        return RootVerdict(reason, False)
        except NotElementwiseError as error:
            return RootVerdict(f"the root goes through an op where {error.reason}", False)
        return RootVerdict(
            "the results change with the root only by a factor that vanishes where its "
            "cotangent does",
            True,
        )

    def _branches(self) -> Iterator[Mapping[fx.Node, Any]]:
        """The downstream values, for every choice between arguments of max, min and clamp."""
        kinks = [node for node in self._downstream if op_name(node) in _CHOICES]
        options = [_choices(node) for node in kinks]
        total = 1
        for option in options:
            total *= len(option)
        if total > _MOST_CHOICES:
            raise NotElementwiseError(kinks[0], "there are too many cases to tell apart")
        for choice in itertools.product(*options):
            chosen = dict(zip(kinks, choice, strict=True))
            known: dict[fx.Node, Any] = {self._root: self._s}
            for node in self._downstream:
                if node in chosen:
                    known[node] = self._read(chosen[node], known)
                    continue
                if op_name(node) in SAME - _ALIGNED and node.meta["val"].numel() > 1:
                    raise NotElementwiseError(node, f"{op_name(node)} moves elements")
                sources = {n: self._read(n, known) for n in node.all_input_nodes}
                known[node] = expression(node, sources)
            yield known

    def _read(self, value: Any, known: Mapping[fx.Node, Any]) -> Any:
        if not isinstance(value, fx.Node):
            return number(value)
        if value in known:
            return known[value]
        if value not in self._symbols:
            span = self._domain.of(value)
            facts = {"positive": True} if span.positive else {"negative": True}
            if not span.nonzero:
                facts = {"nonnegative": True} if span.nonnegative else {"real": True}
            self._symbols[value] = self._sympy.Symbol(f"x{len(self._symbols)}", **facts)
        return self._symbols[value]

    def _obstacle(self, F: Any) -> str | None:
        """Why the criterion does not hold for one result, or None."""
        sympy, s = self._sympy, self._s
        if not F.has(s):
            return None
        if F.has(sympy.Piecewise, sympy.sign):
            return "a result jumps with the root"
        at_zero = F.subs(s, 0)
        slope = F.diff(s).subs(s, 0)
        if any(e.has(sympy.zoo, sympy.nan, sympy.oo) for e in (at_zero, slope)):
            return "the update itself is not finite where the root is zero"
        change = F - at_zero
        slope = sympy.cancel(slope)
        if slope == 0:
            same = sympy.cancel(change) == 0
            return None if same else "its square enters: the slope in it is 0, the derivative not"
        if slope.is_nonzero:
            return "a result changes with the root at a rate that never vanishes"
        ratio = sympy.cancel(change / slope)
        if any(not self._is_regular(n) for n in self._leaves(slope) | self._leaves(ratio)):
            return "the factor of the root is not smooth there itself"
        _, denominator = sympy.fraction(ratio)
        if not denominator.subs(s, 0).is_nonzero:
            return "the change with the root does not vanish with the slope in it"
        return None

    def _leaves(self, value: Any) -> set[fx.Node]:
        symbols = value.free_symbols
        return {node for node, symbol in self._symbols.items() if symbol in symbols}

    def _is_regular(self, node: fx.Node) -> bool:
        """Whether a value is Lipschitz in all inputs where the root is zero."""
        if node not in self._regular:
            self._regular[node] = node in self._fixed or self._is_lipschitz(node)
        return self._regular[node]

    def _is_lipschitz(self, node: fx.Node) -> bool:
        if node in self._part.leaves:
            return True
        if not all(self._is_regular(source) for source in node.all_input_nodes):
            return False
        name = op_name(node)
        test = _LIPSCHITZ_WHERE.get(name)
        if test is not None:
            return test(*(self._domain.of(argument) for argument in node.args))
        return name in _LIPSCHITZ or name in SAME


#: Views that keep the root beside the elements that it was beside.
_ALIGNED = frozenset(
    {"clone", "copy", "_to_copy", "alias", "detach", "lift_fresh_copy", "contiguous", "positive"}
)

#: Continuous ops that hand on one of their arguments, by the positions of these.
_CHOICES: dict[str, tuple[int, ...]] = {
    "maximum": (0, 1),
    "minimum": (0, 1),
    "clamp": (0, 1, 2),
    "clamp_min": (0, 1),
    "clamp_max": (0, 1),
}


def _choices(node: fx.Node) -> list[Any]:
    places = _CHOICES[op_name(node)]
    found = [node.args[i] for i in places if i < len(node.args)]
    found += [node.kwargs[key] for key in ("min", "max") if key in node.kwargs]
    return [value for value in found if value is not None]


#: Ops that are Lipschitz on bounded sets.
_LIPSCHITZ = frozenset(
    {
        "add", "sub", "rsub", "mul", "neg", "square", "abs", "maximum", "minimum", "clamp",
        "clamp_min", "clamp_max", "relu", "lerp", "addcmul", "exp", "expm1", "tanh", "sigmoid",
        "sin", "cos", "atan", "sum", "mean", "mm", "bmm", "mv", "dot", "addmm", "zeros_like",
        "ones_like", "full_like", "zeros", "ones", "full", "fill", "scalar_tensor", "cat", "stack",
        "linalg_vector_norm", "amax", "amin",
    }
)  # fmt: skip

#: Ops that are Lipschitz for some arguments, by a test on the ranges of these.
_LIPSCHITZ_WHERE: dict[str, Callable[..., bool]] = {
    "div": lambda x, y: y.nonzero,
    "addcdiv": lambda x, y, z: z.nonzero,
    "reciprocal": lambda x: x.nonzero,
    "sqrt": lambda x: x.positive,
    "rsqrt": lambda x: x.positive,
    "log": lambda x: x.positive,
    "log1p": lambda x: x.nonnegative,
    "pow": lambda x, p: x.positive or (p.low == p.high and p.low >= 1 and p.low == int(p.low)),
}
