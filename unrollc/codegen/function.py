"""One graph as one Python function."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import fx

from unrollc.codegen.literals import literal
from unrollc.codegen.names import alias_of, name_values
from unrollc.errors import Source
from unrollc.optimize.in_place import called_op, out_name
from unrollc.plan.liveness import TAKEN_OVER, draws_noise, last_uses, unread
from unrollc.step import CARRIED, Phase, Role, StepGraph, Value, shape_text, tensors_of

_TITLES = {
    Phase.FORWARD: "forward: the model on the batch",
    Phase.LOSS: "loss",
    Phase.GRADIENT: "gradient: G = dloss/dtheta",
    Phase.UPDATE: "update: the optimizer's step",
    Phase.ADJOINT: "adjoint: cotangents pulled back",
    Phase.TANGENT: "tangent: the state's derivatives pushed forward",
}


#: Lists that a function takes over, with the roles of what is in them.
LISTS = (
    ("state", (*CARRIED, Role.RESIDUAL)),
    ("cotangents", (Role.COTANGENT,)),
    ("noise", (Role.NOISE,)),
)


def parameters_of(step: StepGraph) -> list[Value]:
    """What the function takes one by one: of all that no step changes, what it reads."""
    return [
        value
        for value, node in zip(step.inputs, step.placeholders, strict=True)
        if value.role not in (Role.CONSTANT, *TAKEN_OVER) and (node.users or node in step.results)
    ]


def lists_of(step: StepGraph) -> list[str]:
    """The lists that the function takes over, in order, empty ones left out."""
    return [name for name, _, _ in list_members(step)]


def list_members(step: StepGraph) -> list[tuple[str, list[Value], list[fx.Node]]]:
    """Those lists with what is in them."""
    found = []
    for name, roles in LISTS:
        members = step.inputs_with(*roles)
        if members and (name != "noise" or draws_noise(step)):
            values, nodes = zip(*members, strict=True)
            found.append((name, list(values), list(nodes)))
    return found


def returned(step: StepGraph) -> list[Value]:
    """What the function returns: every output that is not a structural zero."""
    pairs = zip(step.outputs, step.results, strict=True)
    return [value for value, node in pairs if node is not None]


def render_function(
    name: str, step: StepGraph, doc: list[str], constants: dict[str, str], reserved: Iterable[str]
) -> str:
    """The function's source.

    Args:
        name: The function's name.
        step: The graph.
        doc: Lines of its docstring.
        constants: Module-level names of the graph's constant inputs.
        reserved: Names that values must not take.
    """
    names = name_values(step, [*reserved, *constants.values()])
    for node in step.placeholders:
        if node.name in constants:
            names[node] = constants[node.name]
    lines = [f"def {name}(", *(f"    {each}," for each in lists_of(step))]
    shapes = {value.name: node for value, node in zip(step.inputs, step.placeholders, strict=True)}
    for value in parameters_of(step):
        lines.append(f"    {value.name},  # {_shapes(shapes[value.name])}  {_label(value)}")
    lines += ["):", f'    """{doc[0]}', *(f"    {line}".rstrip() for line in doc[1:])]
    lines.append('    """')
    lines += _unpacked(step)
    lines += _body(step, names)
    results = [names[node] for node in step.results if node is not None]
    lines.append("    return (")
    pairs = list(zip(returned(step), results, strict=True))
    for value, result in pairs:
        if value.role is not Role.RESIDUAL:
            lines.append(f"        {result},  # {_label(value)}")
    if residuals := [result for value, result in pairs if value.role is Role.RESIDUAL]:
        lines.append("        [  # residuals: what the adjoint of the step reads besides its state")
        lines += [f"            {result}," for result in residuals]
        lines.append("        ],")
    lines.append("    )")
    return "\n".join(lines)


def _unpacked(step: StepGraph) -> list[str]:
    """Take the lists over: from here on the names alone hold the tensors."""
    lines = []
    for name, values, nodes in list_members(step):
        lines.append("    (")
        for value, node in zip(values, nodes, strict=True):
            lines.append(f"        {value.name},  # {_shapes(node)}  {_label(value)}")
        lines.append(f"    ) = {name}")
        lines.append(f"    {name}.clear()")
    if gone := unread(step):
        lines.append(f"    del {', '.join(node.name for node in gone)}")
    return lines


def _label(value: Value) -> str:
    text = value.label.encode("unicode_escape").decode()
    if value.role in (Role.COTANGENT, Role.TANGENT):
        return f"{value.role.value} of {text}"
    return text


def _body(step: StepGraph, names: dict[fx.Node, str]) -> list[str]:
    ends = last_uses(step)
    lines: list[str] = []
    phase = None
    for node in step.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if node.meta["phase"] is not phase:
            phase = node.meta["phase"]
            lines.append(f"    # -- {_TITLES[phase]}")
        lines.append(_statement(node, names, ends.get(node, [])))
    return lines


def _statement(node: fx.Node, names: dict[fx.Node, str], dead: list[fx.Node]) -> str:
    target = called_op(node)
    args = [literal(arg, names) for arg in node.args]
    args += [f"{key}={literal(value, names)}" for key, value in node.kwargs.items()]
    if "into" in node.meta:
        args.append(f"{out_name(target)}={args[node.meta['into']]}")
    call = f"{alias_of(target)}({', '.join(args)})"
    left, dropped = _left_side(node, names)
    gone = [names[n] for n in dead if n is not node or isinstance(left, str)]
    gone = [n for n in gone if n not in dropped] + dropped
    targets = left if isinstance(left, str) else ", ".join(left)
    text = f"    {targets} = {call}"
    if gone:
        text += f"; del {', '.join(dict.fromkeys(gone))}"
    source: Source | None = node.meta.get("source")
    where = f"  {source.short}" if source is not None else ""
    return f"{text}  # {_shapes(node)}{where}".rstrip()


def _left_side(node: fx.Node, names: dict[fx.Node, str]) -> tuple[str | list[str], list[str]]:
    """Assignment targets, and those of them that nobody reads."""
    value = node.meta["val"]
    if not isinstance(value, tuple | list):
        return names[node], []
    parts = {u.args[1]: names[u] for u in node.users if u.target is operator.getitem}
    targets = [parts.get(index, "_") for index in range(len(value))]
    if len(targets) == 1:
        targets = [f"({targets[0]},)"]
    return targets, (["_"] if "_" in targets else [])


def _shapes(node: fx.Node) -> str:
    return ", ".join(shape_text(tensor) for tensor in tensors_of(node))
