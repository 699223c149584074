"""Names for the values of a graph, made from the model's own names."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import fx

from unrollc.capture.naming import op_name, origin_of
from unrollc.step import Phase, Role, StepGraph

#: Outputs are called after what they are.
_PREFIX = {
    Role.THETA: "new_",
    Role.OPT_STATE: "new_",
    Role.BUFFER: "new_",
    Role.AVERAGE: "new_",
    Role.GRADIENT: "grad_",
}

#: Values inside a function are called after the pass that they belong to.
_PHASES = {Phase.ADJOINT: "adj_", Phase.GRADIENT: "grad_", Phase.TANGENT: "tan_"}


def name_values(step: StepGraph, reserved: Iterable[str]) -> dict[fx.Node, str]:
    """One identifier a node, unique in its function.

    Inputs have their own names, results are called after what they are (``new_fc_weight``,
    ``adj_fc_weight``), other values after the module and the op that made them; values of the
    backward pass start with ``adj_``, tangents with ``tan_``.
    """
    names = {node: node.name for node in step.placeholders}
    taken = set(names.values()) | set(reserved)

    def claim(base: str) -> str:
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        return name

    for value, node in zip(step.outputs, step.results, strict=True):
        if node is not None and node not in names and value.role is not Role.RESIDUAL:
            names[node] = claim(_PREFIX.get(value.role, "") + value.name)
    for node in step.graph.nodes:
        if node.op != "call_function" or node in names:
            continue
        if isinstance(node.meta["val"], tuple | list):
            names[node] = "_"  # its results have names, the tuple itself never appears
        else:
            names[node] = claim(node.meta.get("called") or _described(node))
    return names


def _described(node: fx.Node) -> str:
    origin: Any = node.args[0] if node.target is operator.getitem else node
    return _PHASES.get(origin.meta["phase"], "") + origin_of(node)


def alias_of(target: Any) -> str:
    """How generated code calls an op: ``mul``, or ``mul_Scalar`` for another overload.

    ``clamp`` has both a default overload and one of tensors; the latter is ``clamp_Tensor``.
    """
    overload = target._overloadname
    both = overload == "Tensor" and "default" in target._overloadpacket.overloads()
    suffix = "" if overload in ("default", "Tensor") and not both else f"_{overload}"
    return f"op_{op_name(target)}{suffix}"
