"""What the recorder refuses, and what it says."""

from __future__ import annotations

from typing import Any

from unrollc.errors import CaptureError, Source


class ReadsDataError(CaptureError):
    """Python, or the shape of a value, depends on what is in a tensor."""


def value_of_data(where: Source | None) -> ReadsDataError:
    """A number is read out of a tensor whose value is not known."""
    return ReadsDataError(
        "Python control flow or arithmetic depends on the data",
        where=where,
        why="the value of a tensor is read (if, float(), .item(), indexing), so one graph "
        "cannot stand for all inputs",
        remedy="use torch.where or tensor arithmetic instead of reading the value",
    )


def shape_of_data(func: Any, where: Source | None) -> ReadsDataError:
    """An op's result has a shape that is not known."""
    return ReadsDataError(
        "the shape of a result depends on the data",
        where=where,
        why=f"{func} returns as many entries as meet a condition (a mask as an index, nonzero, "
        "unique), so one graph cannot stand for all inputs",
        remedy="keep all elements (torch.where, a product with the mask), or pick the entries "
        "before the call and pass them in the batch (layers that pick often have a switch, such "
        "as add_self_loops=False)",
    )


def of_another_step(where: Source | None) -> CaptureError:
    """A traced tensor comes from somewhere else."""
    return CaptureError(
        "the code uses a tensor that was computed in another step or another capture",
        where=where,
        why="only parameters, optimizer state and buffers are carried from one inner step to the "
        "next",
        remedy="keep it in a buffer (register_buffer), or compute it anew in each step",
    )


def behind_the_back(label: str, where: Source | None) -> CaptureError:
    """A fast weight is read by a reference of the user's."""
    return CaptureError(
        f"the code reads {label} behind the model's back",
        where=where,
        why="it changes from step to step; a reference from outside (an attribute of "
        "the optimizer, a view, a detached alias) would see its initial value at every step",
        remedy="reach it through the model or through optimizer.param_groups, or clone() it where "
        "the initial value is meant",
    )


def unknown_noise(func: Any, where: Source | None) -> CaptureError:
    """A random op has no row in `noise`."""
    return CaptureError(
        f"the random op {func} cannot be captured",
        where=where,
        why="its distribution depends on data in a way that is not known to unrollc",
        remedy="draw the noise with torch.rand/randn/bernoulli and transform it",
    )
