"""The unrolled schedule as statements; runs of equal actions become loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unrollc.plan.schedule import Action, Advance, Drop, Keep, Restore, Reverse, Validate

#: Statements of one action, given the source text of its step number.
Template = Callable[[Action, str], list[str]]


def step_of(action: Action) -> int:
    """The step or state number of an action."""
    match action:
        case Keep(number) | Advance(number) | Restore(number) | Reverse(number) | Drop(number):
            return number
        case Validate(steps):
            return steps
    raise AssertionError(f"no step number in {action}")


def render_schedule(actions: Sequence[Action], template: Template) -> list[str]:
    """Statements that execute `actions` in order.

    Neighbouring actions on the same step form a group; groups on consecutive steps whose
    statements agree but for the number form a loop.
    """
    groups: list[list[Action]] = []
    for action in actions:
        if groups and step_of(groups[-1][0]) == step_of(action):
            groups[-1].append(action)
        else:
            groups.append([action])
    lines: list[str] = []
    start = 0
    while start < len(groups):
        end = _run_end(groups, start, template)
        first, last = step_of(groups[start][0]), step_of(groups[end - 1][0])
        if end - start == 1:
            lines += _statements(groups[start], str(first), template)
        else:
            lines.append(f"for j in {_range(first, last)}:")
            lines += [f"    {line}" for line in _statements(groups[start], "j", template)]
        start = end
    return lines


def _run_end(groups: list[list[Action]], start: int, template: Template) -> int:
    pattern = _statements(groups[start], "j", template)
    first = step_of(groups[start][0])
    end = start + 1
    stride = 0
    while end < len(groups):
        number = step_of(groups[end][0])
        stride = stride or number - first
        consecutive = stride in (1, -1) and number == first + stride * (end - start)
        if not consecutive or _statements(groups[end], "j", template) != pattern:
            break
        end += 1
    return end


def _statements(group: list[Action], number: str, template: Template) -> list[str]:
    return [line for action in group for line in template(action, number)]


def _range(first: int, last: int) -> str:
    if first <= last:
        return f"range({first}, {last + 1})"
    return f"reversed(range({last}, {first + 1}))"
