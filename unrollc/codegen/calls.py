"""Calls of the generated functions: which step runs for a number, and what it is given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from unrollc.codegen.forward import products
from unrollc.codegen.function import lists_of, parameters_of, returned
from unrollc.codegen.literals import literal
from unrollc.plan.pieces import EPILOGUE, PROLOGUE, Pieces
from unrollc.step import STARTS, STATE_ROLES, Role, StepGraph, Value

#: Up to so many runs of equal steps are told apart by comparing j, more by a table.
_MOST_RUNS = 8

#: Calls up to this length stand on one line.
_LONGEST = 88


def render_start(pieces: Pieces) -> str:
    """``inputs -> state 0``"""
    lines = [
        "def start(inputs):",
        '    """State 0: θ_0, optimizer state and buffers, the caller\'s own tensors."""',
        "    return [",
        *(f"        inputs[{literal(value.label, {})}]," for value in first_state(pieces)),
        "    ]",
    ]
    return "\n".join(lines)


def first_state(pieces: Pieces) -> list[Value]:
    first = pieces.steps[pieces.sequence[0]]
    return [value for value, _ in first.inputs_with(*STATE_ROLES)]


def render_advance(pieces: Pieces) -> tuple[str, list[str]]:
    """The function that runs inner step j, and the tables that it needs."""
    records = pieces.schedule.records
    lines = [
        "def advance(inputs, seed, j, state):",
        '    """Inner step j. It takes `state` over; returns the next state and the inner loss'
        + (", and what the\n    adjoint of the step reads besides `state`." if records else ".")
        + '"""',
    ]

    def arm(index: int) -> list[str]:
        graph = pieces.steps[index]
        noise, args = _arguments(pieces, f"step_{index}", graph, "j", index)
        kept = bool(graph.outputs_with(Role.RESIDUAL))
        targets = "*state, loss, residuals" if kept else "*state, loss"
        none = ["residuals = []"] if records and not kept else []
        return [*noise, *none, *_statement(f"{targets} = step_{index}", args)]

    body, tables = _dispatch(pieces.sequence, "STEP_OF", arm)
    what = "state, loss, residuals" if records else "state, loss"
    lines += [f"    {line}" for line in [*body, f"return {what}"]]
    return "\n".join(lines), tables


def render_pull_back(pieces: Pieces) -> tuple[str, list[str]]:
    """The function that reverses inner step j, and the tables that it needs."""
    lines = [
        "def pull_back(inputs, seed, j, state, cotangents, totals):",
        '    """The adjoint of step j: B_(j+1) -> B_j. It takes `state` and `cotangents` over.',
        "",
        "    What the meta-parameters get in this step is added to `totals`.",
        '    """',
    ]

    def arm(index: int) -> list[str]:
        graph = pieces.adjoints[index].graph
        step = pieces.sequence[pieces.adjoint_sequence.index(index)]
        return _collected(pieces, f"adjoint_{index}", graph, "j", step)

    known = [index for index in pieces.adjoint_sequence if index is not None]
    order = [known[0] if index is None else index for index in pieces.adjoint_sequence]
    body, tables = _dispatch(order, "ADJOINT_OF", arm)
    lines += [f"    {line}" for line in [*body, "return cotangents"]]
    return "\n".join(lines), tables


def render_finish(pieces: Pieces) -> str:
    """``state T -> validation loss, B_T, direct parts of the meta-gradients``"""
    lines = [
        "@torch.no_grad()",
        "def finish(inputs, seed, state):",
        '    """The validation loss, the cotangents B_T, and the meta-gradients\' direct parts."""',
    ]
    graph = pieces.val_gradient or pieces.val
    totals = [
        f"    {literal(label, {})}: {_empty_total(pieces, label)}," for label in _totals(pieces)
    ]
    body = ["totals = {", *totals, "}"] if totals else ["totals = {}"]
    body += _collected(pieces, "validate", graph, "STEPS", None)
    if pieces.directions:
        body += [*products(pieces), "cotangents.clear()"]
    lines += [f"    {line}" for line in [*body, "return loss, cotangents, totals"]]
    return "\n".join(lines)


def render_prepare(pieces: Pieces) -> str:
    """``inputs -> inputs and what no step changes``"""
    graph = pieces.prologue
    assert graph is not None
    _, args = _arguments(pieces, PROLOGUE, graph, "0", None)
    names = [value.name for value in graph.outputs]
    targets = f"({names[0]},)" if len(names) == 1 else ", ".join(names)
    lines = [
        "@torch.no_grad()",
        "def prepare(inputs):",
        '    """The inputs and what no inner step changes, which is computed here, once."""',
        *(f"    {line}" for line in _statement(f"{targets} = {PROLOGUE}", args)),
        "    return {",
        "        **inputs,",
        *(f"        {literal(v.label, {})}: {v.name}," for v in graph.outputs),
        "    }",
    ]
    return "\n".join(lines)


def render_conclude(pieces: Pieces) -> str:
    """``gradients of what no step changes -> gradients of what it is computed from``"""
    graph = pieces.epilogue
    assert graph is not None
    taken = [f"gradients.pop({literal(v.label, {})})" for v, _ in graph.inputs_with(Role.COTANGENT)]
    body = [*_statement("cotangents = list", [f"({', '.join(taken)},)"])]
    body += _collected(pieces, EPILOGUE, graph, "0", None, into="gradients")
    lines = [
        "@torch.no_grad()",
        "def conclude(inputs, gradients):",
        '    """Pull the gradients of what `prepare` has computed back to the meta-parameters."""',
        *(f"    {line}" for line in [*body, "return gradients"]),
    ]
    return "\n".join(lines)


def render_gradients(pieces: Pieces) -> str:
    """``B_stop, totals -> meta-gradients``"""
    lines = [
        "def gradients(cotangents, totals):",
        '    """The meta-gradients by label, once every step is reversed."""',
    ]
    if pieces.schedule.stop == 0:
        index = pieces.adjoint_sequence[0]
        assert index is not None
        state = [
            value
            for value in returned(pieces.adjoints[index].graph)
            if value.role is Role.COTANGENT and value.of in STATE_ROLES
        ]
        added = set(_totals(pieces))
        for position, value in enumerate(state):
            if value.of in STARTS and value.label in pieces.wanted:
                label = literal(value.label, {})
                term = f"cotangents[{position}]"
                both = f"totals[{label}] + {term}" if value.label in added else term
                lines.append(f"    totals[{label}] = {both}")
    return "\n".join([*lines, "    return totals"])


def labels_of(pieces: Pieces) -> tuple[str, ...]:
    """Keys of the ``inputs`` dictionary that the module reads."""
    read = [v for _, graph in pieces.named_graphs for v in parameters_of(graph)]
    fixed = {value.label for value in read if value.role is Role.INVARIANT}
    start = [value.label for value in first_state(pieces)]
    labels = dict.fromkeys([*start, *(value.label for value in read), *_totals(pieces)])
    return tuple(label for label in labels if label not in fixed)


# -- parts ------------------------------------------------------------------------------------


def _dispatch(
    order: Sequence[int], table: str, arm: Callable[[int], list[str]]
) -> tuple[list[str], list[str]]:
    """Statements that run the arm of step j, and the tables that they read."""
    runs = [(index, len(list(run))) for index, run in itertools.groupby(order)]
    if len(runs) == 1:
        return arm(runs[0][0]), []
    conditions: list[tuple[str, int]] = []
    tables = []
    if len(runs) <= _MOST_RUNS:
        end = 0
        for index, length in runs:
            end += length
            conditions.append((f"j < {end}", index))
    else:
        tables = [f"{table} = {tuple(order)}"]
        conditions = [(f"{table}[j] == {index}", index) for index in dict.fromkeys(order)]
    lines = []
    for number, (condition, index) in enumerate(conditions):
        word = "if" if number == 0 else "elif"
        last = number == len(conditions) - 1
        lines.append("else:" if last else f"{word} {condition}:")
        lines += [f"    {line}" for line in arm(index)]
    return lines, tables


def _statement(call: str, args: Sequence[str], end: str = "") -> list[str]:
    """A call on one line where it is short, else with an argument a line."""
    line = f"{call}({', '.join(args)}){end}"
    if len(line) <= _LONGEST:
        return [line]
    return [f"{call}(", *(f"    {arg}," for arg in args), f"){end}"]


def _arguments(
    pieces: Pieces, name: str, graph: StepGraph, number: str, step: int | None
) -> tuple[list[str], list[str]]:
    """What a function is given, and the noise that is drawn before.

    Args:
        pieces, name, graph: The program, the function and what it computes.
        number: Source text of the step's number.
        step: Index of the step whose noise it reads; None for the validation loss.
    """
    args = []
    noise = []
    for each in lists_of(graph):
        if each == "noise":
            owner = "validate" if step is None else f"step_{step}"
            drawn = pieces.val if step is None else pieces.steps[step]
            mine = [value.label for value, _ in graph.inputs_with(Role.NOISE)]
            every = [value.label for value, _ in drawn.inputs_with(Role.NOISE)]
            noise = [f"noise = noise_{owner}(seed, {number})"]
            if mine != every:
                picked = ", ".join(f"noise[{every.index(label)}]" for label in mine)
                noise.append(f"noise = [{picked}]")
        args.append(_validated(pieces) if (name, each) == ("validate", "state") else each)
    for value in parameters_of(graph):
        index = f"[{number}]" if value.label in pieces.per_step else ""
        args.append(f"inputs[{literal(value.label, {})}]{index}")
    return noise, args


def _validated(pieces: Pieces) -> str:
    """A list of what the validation loss takes of the state, which stays the caller's."""
    read = pieces.validated_roles
    roles = [value.role for value in pieces.carried]
    slices, position = [], 0
    for taken, run in itertools.groupby(roles, key=read.__contains__):
        end = position + len(list(run))
        first, last_one = str(position or ""), str(end if end < len(roles) else "")
        if taken:
            slices.append(f"*state[{first}:{last_one}]" if first or last_one else "*state")
        position = end
    return f"[{', '.join(slices)}]"


def _collected(
    pieces: Pieces,
    name: str,
    graph: StepGraph,
    number: str,
    step: int | None,
    into: str = "totals",
) -> list[str]:
    """Call a function that returns cotangents, and add up its contributions."""
    noise, args = _arguments(pieces, name, graph, number, step)
    targets = ["loss"] if name == "validate" else []
    lines: list[str] = []
    terms: list[str] = []
    cotangents = False
    for value in returned(graph):
        if value.role is not Role.COTANGENT:
            continue
        if value.of in STATE_ROLES:
            cotangents = True
            continue
        terms.append(value.name)
        total = f"{into}[{literal(value.label, {})}]"
        if value.label in pieces.per_step:
            lines.append(f"{total}[{number}] = {value.name}")
        else:
            lines.append(f"{total}.add_({value.name})")
    targets += [*(["*cotangents"] if cotangents else []), *terms]
    left = ", ".join(targets)
    call, end = f"{left} = {name}", ""
    if targets == ["*cotangents"]:
        call, end = f"cotangents = list({name}", ")"
    elif len(targets) == 1:
        call = f"({left},) = {name}"
    elif not targets:
        call = name
    head = [] if cotangents or name != "validate" else ["cotangents = []"]
    return [*head, *noise, *_statement(call, args, end), *lines]


def _totals(pieces: Pieces) -> list[str]:
    """Labels of the meta-parameters that some step or the validation loss contributes to."""
    return sorted({*pieces.totalled, *(pieces.per_step & set(pieces.wanted))})


def _empty_total(pieces: Pieces, label: str) -> str:
    if label in pieces.per_step and label not in pieces.stacked:
        return "[None] * STEPS"
    return f"torch.zeros_like(inputs[{literal(label, {})}])"
