"""What is particular to a program in forward mode: the products B_T · θ̇_T."""

from __future__ import annotations

from collections.abc import Sequence

from unrollc.codegen.function import returned
from unrollc.codegen.literals import literal
from unrollc.plan.pieces import Pieces
from unrollc.step import STATE_ROLES, Role

#: Multiplies cotangents with tangents.
INNER = '''\
def inner(cotangents, tangents):
    """The product of a cotangent and a tangent of the state."""
    pairs = zip(cotangents, tangents, strict=True)
    return sum(torch.dot(b.flatten(), moved.flatten()) for b, moved in pairs)'''

#: The backward pass of a program that has none.
BACKWARD = '''\
def backward(inputs, seed, kept, cotangents, totals):
    """The meta-gradients by label; `adapt` has computed them along the way."""
    return totals'''


def products(pieces: Pieces) -> list[str]:
    """Statements that add B_T · θ̇_T to the meta-gradients, direction by direction."""
    assert pieces.val_gradient is not None
    cotangents: list[tuple[Role | None, str]] = [
        (value.of, value.label)
        for value in returned(pieces.val_gradient)
        if value.role is Role.COTANGENT and value.of in STATE_ROLES
    ]
    lines = []
    for number, direction in enumerate(pieces.directions):
        pairs = [
            (cotangents.index((value.of, value.label)), position)
            for position, value in enumerate(pieces.carried)
            if value.role is Role.TANGENT and value.direction == number
        ]
        if not pairs:
            continue
        left, right = zip(*pairs, strict=True)
        place = f"[{', '.join(map(str, direction.index))}]" if direction.index else ""
        total = f"totals[{literal(direction.key[1], {})}]{place}"
        lines.append(
            f"{total}.add_(inner({_picked('cotangents', left)}, {_picked('state', right)}))"
        )
    return lines


def without_tangents(pieces: Pieces) -> list[str]:
    """Statements that leave of the last state what is the user's."""
    own = sum(value.role is not Role.TANGENT for value in pieces.carried)
    return [f"del state[{own}:]  # the tangents"] if own < len(pieces.carried) else []


def _picked(name: str, positions: Sequence[int]) -> str:
    """A list of items of the list `name`: a slice where they stand side by side."""
    first, last = positions[0], positions[-1]
    if list(positions) == list(range(first, last + 1)):
        return f"{name}[{first}:{last + 1}]"
    return f"[{', '.join(f'{name}[{position}]' for position in positions)}]"
