"""A loop on its way through the passes: its steps, and how their state travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from unrollc.capture.loop import Loop
from unrollc.optimize.congruence import Key, key_of
from unrollc.optimize.packed_step import Group
from unrollc.step import StepGraph, Value


@dataclass(frozen=True)
class Packing:
    """How the state of a program travels.

    Attributes:
        groups: What is packed.
        same: State that is equal at every step, with what stands for it.
    """

    groups: tuple[Group, ...] = ()
    same: Mapping[Key, Key] = field(default_factory=dict)

    def unpacked(self, values: Sequence[Value], state: Sequence[Tensor]) -> dict[Key, Tensor]:
        """The state as the user knows it, as views of what travels.

        Args:
            values: What travels.
            state: Its tensors.
        """
        packs = {pack.value: pack for group in self.groups for pack in group.packs}
        found: dict[Key, Tensor] = {}
        for value, tensor in zip(values, state, strict=True):
            if value not in packs:
                found[key_of(value)] = tensor
                continue
            pack = packs[value]
            parts = tensor.split(pack.sizes)
            for key, part, shape in zip(pack.members, parts, pack.shapes, strict=True):
                found[key] = part.view(shape)
        return found | {key: found[stands].clone() for key, stands in self.same.items()}

    def __str__(self) -> str:
        lines = [
            f"{len(group.shapes)} tensors of {sum(group.packs[0].sizes):,} elements in all, and "
            f"what the optimizer keeps for each, travel as {len(group.packs)} vectors"
            for group in self.groups
        ]
        if equal := sum(key != stands for key, stands in self.same.items()):
            lines.append(f"{equal} numbers of the optimizer's state are equal to others")
        return "\n".join(lines)


@dataclass(frozen=True)
class PackedLoop:
    """A loop whose state travels packed.

    Attributes:
        steps, sequence: As in `Loop`.
        origins: For each step the index of the captured step that it computes.
        val: The validation loss.
        val_gradient: The validation loss with B_T.
        packing: How the state travels.
        prologue: What no step changes, computed once before the first; None if that is nothing.
    """

    steps: tuple[StepGraph, ...]
    sequence: tuple[int, ...]
    origins: tuple[int, ...]
    val: StepGraph
    val_gradient: StepGraph | None
    packing: Packing
    prologue: StepGraph | None = None


def as_captured(loop: Loop, val: StepGraph, val_gradient: StepGraph | None) -> PackedLoop:
    """``loop --> the same loop``, nothing packed."""
    origins = tuple(range(len(loop.steps)))
    return PackedLoop(loop.steps, loop.sequence, origins, val, val_gradient, Packing())
