"""Meta-parameters that only scale, and are normalised away.

A quantity f has degree d in a scalar φ if φ · ∂f/∂φ = d · f (Euler's relation), as φ·L has degree
1 and φ·L / ‖φ·L‖ degree 0. Degrees pass through ops by a small algebra. If the validation loss
has degree 0, its derivative with respect to φ ≠ 0 is zero, although paths lead there.

The same holds where all paths lead through a scalar function of φ alone, as in exp(φ)·L: then
degrees in that function count (`_funnels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, fx

from unrollc.requirements.dependence import Dependence, Key, op_name
from unrollc.requirements.edges import is_projection
from unrollc.requirements.reach import Graphs
from unrollc.step import STATE_ROLES, Role

#: A degree; None where Euler's relation is not known to hold.
Degree = Fraction | None

_ZERO = Fraction(0)

#: f(cx) = c f(x) for c > 0 in the first operand.
_HOMOGENEOUS = """
neg t view reshape _unsafe_view expand permute transpose sum mean cumsum slice select index
index_select gather unsqueeze squeeze alias detach clone _to_copy copy diagonal flip roll repeat
split split_with_sizes unbind relu leaky_relu abs amax amin max min norm linalg_vector_norm
avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d std
"""
_LINEAR = frozenset(_HOMOGENEOUS.split())
_PRODUCTS = frozenset(["mul", "mm", "bmm", "mv", "dot", "ger", "outer", "matmul"])
_ALIKE = frozenset(["add", "sub", "maximum", "minimum"])
_POWERS = {
    "reciprocal": Fraction(-1),
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "square": Fraction(2),
    "var": Fraction(2),
}


def normalised_away(key: Key, graphs: Graphs) -> fx.Node | None:
    """The op that normalises a scalar meta-parameter away, or None if it is not.

    Args:
        key: The meta-parameter, a tensor of one element that is not zero.
        graphs: The captured program.
    """
    funnels = [found for graph in graphs.all if (found := _funnels(graph, key))]
    for formula in funnels[0] if funnels else ():
        if all(formula in each for each in funnels):
            scales = frozenset(each[formula] for each in funnels)
            if (op := _normalised_away(scales, graphs)) is not None:
                return op
    return None


def _funnels(graph: Dependence, key: Key) -> dict[str, fx.Node]:
    """Scalar functions of the meta-parameter alone through which all its paths lead, by formula.

    The meta-parameter is the first; empty where it has no path. The same formula is the same
    value in every graph.
    """
    ends = graph.results(*STATE_ROLES) or graph.results(Role.LOSS)
    needed = graph.into_result
    node, formula = graph.inputs.get(key), "φ"
    found: dict[str, fx.Node] = {}
    while node is not None and node in needed:
        found[formula] = node
        readers = [reader for reader in graph.smooth.successors(node) if reader in needed]
        if len(readers) != 1 or node in ends:
            return found
        (reader,) = readers
        if reader.all_input_nodes != [node] or not _is_scalar(reader):
            return found
        args = ", ".join(formula if arg is node else repr(arg) for arg in reader.args)
        node, formula = reader, f"{reader.target}({args}, {reader.kwargs})"
    return found


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.numel() == 1


def _normalised_away(scales: frozenset[fx.Node], graphs: Graphs) -> fx.Node | None:
    """The op that divides out a scale, which stands for one node in each graph that has it."""
    state: dict[Key, Degree] = {}
    blamed: list[fx.Node | None] = []
    known: dict[Any, tuple[dict[Key, Degree], fx.Node | None]] = {}
    for index in graphs.sequence:
        memo = (index, frozenset(state.items()))
        if memo not in known:
            known[memo] = _after(graphs.steps[index], scales, state)
        state, normaliser = known[memo]
        blamed.append(normaliser)
        if any(degree is None and each in graphs.live for each, degree in state.items()):
            return None
    degrees = _degrees(graphs.val, scales, state)
    (loss,) = graphs.val.results(Role.LOSS)
    if degrees.get(loss, _ZERO) != _ZERO:
        return None
    blamed.append(_normaliser(graphs.val, degrees))
    return next((node for node in blamed if node is not None), None)


def _after(
    graph: Dependence, scales: frozenset[fx.Node], state: Mapping[Key, Degree]
) -> tuple[dict[Key, Degree], fx.Node | None]:
    """The state's degrees after a step, and the op that normalised, if one did."""
    degrees = _degrees(graph, scales, state)
    after = {
        (value.role, value.label): degrees[node]
        for value, node in graph.step.outputs_with(*STATE_ROLES)
        if node is not None and degrees.get(node, _ZERO) != _ZERO
    }
    return after, _normaliser(graph, degrees)


def _degrees(
    graph: Dependence, scales: frozenset[fx.Node], state: Mapping[Key, Degree]
) -> dict[fx.Node, Degree]:
    """The degrees in the scale; a node that is missing has degree zero."""
    degrees: dict[fx.Node, Degree] = {}
    moving = 0
    for each, node in graph.inputs.items():
        degree = Fraction(1) if node in scales else state.get(each, _ZERO)
        if degree != _ZERO:
            degrees[node] = degree
            moving |= graph.influence[node]
    for node in graph.step.graph.nodes:
        if node in scales:
            degrees[node] = Fraction(1)
            moving |= graph.influence[node]
            continue
        if node.op != "call_function" or not graph.influence[node] & moving:
            continue
        if is_projection(node):
            degrees[node] = degrees.get(node.args[0], _ZERO)
            continue
        operands = {
            operand: _ZERO if _constant(graph, operand, node) else degrees.get(operand, _ZERO)
            for operand in node.all_input_nodes
        }
        if any(degree != _ZERO for degree in operands.values()):
            degrees[node] = _degree(node, operands, graph.zeros)
        else:
            degrees[node] = _ZERO
    return degrees


def _constant(graph: Dependence, operand: fx.Node, node: fx.Node) -> bool:
    """Whether the op is locally constant in an operand: no result has a derivative in it."""
    results = [node] if graph.edges.has_edge(operand, node) else list(node.users)
    cuts = [
        graph.edges.edges[operand, r]["cut"] for r in results if graph.edges.has_edge(operand, r)
    ]
    return bool(cuts) and all(cut is not None for cut in cuts)


def _degree(node: fx.Node, operands: Mapping[fx.Node, Degree], zeros: set[fx.Node]) -> Degree:
    name, args = op_name(node), node.args

    def of(operand: Any) -> Degree:
        return operands[operand] if isinstance(operand, fx.Node) else _ZERO

    if name in _LINEAR or name.endswith(("_backward", "_backward_data")):
        others = [degree for operand, degree in operands.items() if operand is not args[0]]
        return of(args[0]) if all(degree == _ZERO for degree in others) else None
    if name in _PRODUCTS:
        return _plus(of(args[0]), of(args[1]))
    if name == "div":
        return _plus(of(args[0]), _times(of(args[1]), Fraction(-1)))
    if name in _POWERS:
        return _times(of(args[0]), _POWERS[name])
    if name == "pow":
        plain = isinstance(args[1], int | float)
        return _times(of(args[0]), Fraction(args[1])) if plain else None  # type: ignore[arg-type]
    if name in _ALIKE:
        return _common(args[:2], of, zeros)
    if name in ("cat", "stack"):
        return _common(args[0], of, zeros)  # type: ignore[arg-type]
    if name == "where":
        return _common(args[1:3], of, zeros)
    if name == "masked_fill":
        return _common((args[0], args[2]), of, zeros)
    if name == "lerp" and of(args[2]) == _ZERO:
        return _common(args[:2], of, zeros)
    if name == "addmm":
        product = _plus(of(args[1]), of(args[2]))
        return product if args[0] in zeros or of(args[0]) == product else None
    return None


def _plus(first: Degree, second: Degree) -> Degree:
    return None if first is None or second is None else first + second


def _times(degree: Degree, factor: Fraction) -> Degree:
    return None if degree is None else degree * factor


def _common(operands: Sequence[Any], of: Any, zeros: set[fx.Node]) -> Degree:
    """The degree that all operands have; zero has every degree."""
    degrees = {of(x) for x in operands if x not in zeros and x != 0}
    return degrees.pop() if len(degrees) == 1 else None


def _normaliser(graph: Dependence, degrees: Mapping[fx.Node, Degree]) -> fx.Node | None:
    """The first op of degree zero that smoothly depends on an operand of another degree."""
    for node, degree in degrees.items():
        if degree == _ZERO and not is_projection(node):
            for operand in node.all_input_nodes:
                moving = degrees.get(operand, _ZERO) != _ZERO
                if moving and not _constant(graph, operand, node):
                    return node
    return None
