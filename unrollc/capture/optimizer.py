"""The optimizer's own ``step``, run on traced tensors.

The user's optimizer is copied, its parameters, gradients, state and tensor hyperparameters are
replaced by traced ones, and ``step()`` is called. What the step does in place, functionalization
makes pure.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor

from unrollc.capture.fingerprint import class_values
from unrollc.capture.foreach import ForeachAsLoops
from unrollc.capture.gradients import steady
from unrollc.capture.layout import Layout, Manner, build_twin, read_layout
from unrollc.capture.model import explained
from unrollc.capture.networks import variables_of
from unrollc.capture.numbers import numbers_stay_tensors
from unrollc.capture.record import Recorder
from unrollc.capture.scalars import ScalarSlots
from unrollc.capture.sharing import sharing
from unrollc.capture.trees import opaque_in
from unrollc.errors import CaptureError


def run_user_update(
    opt: torch.optim.Optimizer,
    recorder: Recorder,
    layout: Layout,
    owners: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    hyper: Iterable[str],
    manner: Manner,
) -> tuple[Layout, dict[str, Tensor]]:
    """One step of a copy of `opt` on traced tensors.

    Args:
        opt: The user's optimizer, left untouched.
        recorder: Where the update is recorded.
        layout: State, groups and attributes before the step.
        owners: Labels of the user's parameters by id.
        tensors: Traced parameters, state and hyperparameters by label; the parameters are
            changed in place.
        gradients: Traced gradients by label of the parameter; a parameter without one is
            skipped, as optimizers do.
        hyper: Labels of the hyperparameters.
        manner: What is read as what.

    Returns:
        Layout and state tensors after the step.
    """
    _check_step(opt)
    twin = build_twin(opt, layout, owners, tensors)
    traced_owners: dict[int, str] = {}
    for parameter in (p for group in opt.param_groups for p in group["params"]):
        label = owners[id(parameter)]
        traced_owners[id(tensors[label])] = label
        tensors[label].requires_grad_(parameter.requires_grad)  # some optimizers ask for it
        tensors[label].grad = gradients.get(label)
    numbers = [tensors[label] for label in layout.traced]
    own = {label: tensors[label] for label in hyper}
    with (
        ScalarSlots(recorder),
        numbers_stay_tensors(recorder, numbers, list(own.values())) as is_number,
        ForeachAsLoops(),
        torch.no_grad(),
    ):
        nodes = {label: recorder.node_of(tensor) for label, tensor in own.items()}
        try:
            beside = functools.partial(_beside, opt, layout)
            with explained("the inner step"), steady(beside, "the step", _PLACE):
                type(opt).step(twin)
        except CaptureError as error:
            error.in_update = True
            raise
        for label, tensor in own.items():
            if recorder.node_of(tensor) is not nodes[label]:
                raise CaptureError(
                    f"the optimizer writes to the tensor {label}",
                    why="a hyperparameter is the same at every inner step",
                    remedy="keep what changes in optimizer.state, or give unrollc.PerStep",
                )
    layout, state = read_layout(twin, traced_owners, manner, own, is_number)
    left = {**{label: tensors[label] for label in traced_owners.values()}, **state}
    if pair := sharing({k: t for k, t in left.items() if isinstance(t, FunctionalTensor)}):
        raise CaptureError(
            f"the step leaves {pair[0]} and {pair[1]} in one memory",
            why="a later step that writes to one of them would write to both, and the inner loop "
            "carries each as a tensor of its own",
            remedy="keep a copy: tensor.clone()",
        )
    return layout, state


#: Where an optimizer's values are carried from step to step.
_PLACE = (
    "optimizer.state, a param group or an attribute: as a tensor, a number, a list, a dictionary "
    "or an object with attributes"
)


def _beside(opt: torch.optim.Optimizer, layout: Layout) -> list[Any]:
    """What a step may read that the layout does not take apart."""
    read = [*variables_of(type(opt)).values(), *opaque_in(layout.state)]
    read += [*opaque_in(layout.groups), *opaque_in(layout.attributes)]
    return [*class_values(type(opt)), *(v for v in read if not isinstance(v, Tensor | nn.Module))]


def _check_step(opt: torch.optim.Optimizer) -> None:
    own_step = opt.__dict__.get("step")
    if own_step is not None and not getattr(own_step, "_wrapped_by_lr_sched", False):
        raise CaptureError(
            "the optimizer's step was replaced on the instance",
            why="capture runs the step of the optimizer's class on a copy",
            remedy="override step in a subclass of the optimizer",
        )
    closure = inspect.signature(type(opt).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise CaptureError(
            f"{type(opt).__name__}.step needs a closure",
            why="it evaluates the loss several times within one step",
            remedy="use an optimizer whose step takes one gradient",
        )
