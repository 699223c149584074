"""Forward mode as another program of the same loop."""

from __future__ import annotations

from dataclasses import replace

from unrollc.plan.pieces import Pieces
from unrollc.plan.schedule import forward_mode


def in_forward_mode(pieces: Pieces) -> Pieces:
    """The program whose steps carry tangents; nothing is left for a backward pass."""
    mode = pieces.forward
    assert mode is not None, pieces.no_forward
    steps = len(mode.sequence)
    return replace(
        pieces,
        steps=mode.steps,
        sequence=mode.sequence,
        adjoints=(),
        adjoint_sequence=(None,) * steps,
        schedule=forward_mode(steps, len(mode.directions)),
        epilogue=None,
        forward=None,
        directions=mode.directions,
    )
