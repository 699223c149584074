"""What the user gave to ``compile``, and a stock-taking of the tensors that it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from unrollc.capture.layout import Layout, Manner, hyper_label, read_layout
from unrollc.capture.networks import networks_of
from unrollc.capture.sharing import sharing
from unrollc.errors import InputError


@dataclass(frozen=True, eq=False)
class PerStep:
    """A hyperparameter with one value an inner step.

    Put it into a param group: ``opt.param_groups[0]["lr"] = unrollc.PerStep(lrs)``.

    Attributes:
        per_step: Floating tensor ``[T]``; a meta-parameter where it requires grad.
    """

    per_step: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.per_step, Tensor) or not self.per_step.is_floating_point():
            raise InputError(
                "PerStep takes a floating tensor with a leading dimension T",
                why=f"got {type(self.per_step).__name__}",
                remedy="unrollc.PerStep(torch.full((T,), 0.1, requires_grad=True))",
            )
        if self.per_step.dim() != 1:
            raise InputError(
                f"PerStep takes one number a step, got shape {list(self.per_step.shape)}",
                remedy="pass a tensor of shape [T]",
            )


@dataclass(frozen=True)
class Objective:
    """A loss that runs the model itself; made by `objective`."""

    fn: Callable[[nn.Module, Any], Tensor]


def objective(fn: Callable[[nn.Module, Any], Tensor]) -> Objective:
    """A loss of the form ``fn(model, batch) -> scalar``, usable as ``loss`` or ``val_loss``.

    Args:
        fn: Called with the user's model (its parameters are the fast weights) and one batch.
    """
    if not callable(fn):
        raise InputError(f"objective takes a function, got {type(fn).__name__}")
    return Objective(fn)


Loss = Callable[..., Tensor] | nn.Module | Objective

#: Called with the parameters whose ``.grad`` is set, between backward pass and optimizer step.
Transform = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Problem:
    """The arguments of ``compile`` that capture needs."""

    model: nn.Module
    opt: torch.optim.Optimizer
    loss: Loss
    val_loss: Loss
    grad_transform: Transform | None = None
    scheduler: LRScheduler | None = None
    average: AveragedModel | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules whose tensors are captured, by the prefix of their labels."""
        return self._given | self.networks

    @property
    def _given(self) -> dict[str, nn.Module]:
        found = {"": self.model}
        if isinstance(self.loss, nn.Module):
            found[self._prefix("loss")] = self.loss
        if isinstance(self.val_loss, nn.Module) and self.val_loss is not self.loss:
            found[self._prefix("val_loss")] = self.val_loss
        if isinstance(self.grad_transform, nn.Module):
            found[self._prefix("grad_transform")] = self.grad_transform
        return found

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The modules of a learned optimizer, none of which the problem holds otherwise."""
        roots = [*self._given.values(), self.average]
        known = {id(module) for root in roots if root is not None for module in root.modules()}
        found: dict[str, nn.Module] = {}
        for label, module in networks_of(self.opt, self._prefix("opt")[:-1]).items():
            if id(module) not in known:
                found[label] = module
                known.update(id(child) for child in module.modules())
        return found

    @property
    def average_prefix(self) -> str:
        """What labels of averaged tensors start with."""
        return self._prefix("average")

    def _prefix(self, name: str) -> str:
        """``loss.``, with underscores behind the name where the model has such a child."""
        children = {child for child, _ in self.model.named_children()}
        while name in children:
            name += "_"
        return f"{name}."


@dataclass(frozen=True)
class Stock:
    """Every tensor that a problem holds at the moment, by label.

    Attributes:
        theta: Parameters that the optimizer updates: θ_0.
        context: Other parameters of the model, those that the optimizer holds frozen included,
            and the parameters of losses and of the optimizer's networks.
        buffers: Buffers of all these.
        hyper: Tensor hyperparameters; a `PerStep` stays one.
        opt_state: Tensors in the optimizer's state.
        layout: The optimizer's state and groups without their tensors.
        owners: Labels of parameters by id.
        average: Tensors of the averaged model.
        behind: Tensors of the user's that a scheduled hyperparameter is computed from.
        manner: How the optimizer was read.
    """

    theta: dict[str, Tensor]
    context: dict[str, Tensor]
    buffers: dict[str, Tensor]
    hyper: dict[str, Tensor | PerStep]
    opt_state: dict[str, Tensor]
    layout: Layout
    owners: dict[int, str]
    average: dict[str, Tensor] = field(default_factory=dict)
    behind: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    manner: Manner = field(default_factory=Manner)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Tensors that may be meta-parameters, by label."""
        hyper = {
            label: value.per_step if isinstance(value, PerStep) else value
            for label, value in self.hyper.items()
        }
        return {**self.theta, **self.context, **hyper}

    @property
    def home(self) -> torch.device:
        """The device of the fast weights, where the loop runs."""
        return next(iter(self.theta.values())).device


def take_stock(problem: Problem) -> Stock:
    """Read the tensors out of the user's objects.

    Raises:
        InputError: If the optimizer holds a parameter that the model does not own.
    """
    owners: dict[int, str] = {}
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for prefix, module in problem.modules.items():
        for name, parameter in module.named_parameters():
            _check_initialised(prefix + name, parameter)
            if id(parameter) not in owners:
                owners[id(parameter)] = prefix + name
                parameters[prefix + name] = parameter
        for name, buffer in module.named_buffers():
            if id(buffer) not in owners:
                owners[id(buffer)] = prefix + name
                buffers[prefix + name] = buffer
    theta = _held_parameters(problem.opt, owners)
    context = {label: p for label, p in parameters.items() if label not in theta}
    average: dict[str, Tensor] = {}
    if problem.average is not None:
        held = (*problem.average.named_parameters(), *problem.average.named_buffers())
        average = {problem.average_prefix + name: tensor for name, tensor in held}
    hyper = read_hyper(problem.opt)
    layout, opt_state = read_layout(problem.opt, owners, Manner())
    if pair := sharing({**theta, **opt_state}):
        raise _shared(*pair)
    return Stock(theta, context, buffers, hyper, opt_state, layout, owners, average)


def _shared(first: str, second: str) -> InputError:
    return InputError(
        f"{first} and {second} lie in one memory",
        why="a step that writes to one of them writes to both, and the inner loop carries each as "
        "a tensor of its own",
        remedy="keep a copy in the optimizer: tensor.clone()",
    )


def read_again(problem: Problem, stock: Stock, manner: Manner) -> Stock:
    """`stock` with the optimizer's layout and state tensors as this manner takes them."""
    if manner == stock.manner:
        return stock
    layout, opt_state = read_layout(problem.opt, stock.owners, manner)
    return replace(stock, layout=layout, opt_state=opt_state, manner=manner)


def _check_initialised(label: str, parameter: Tensor) -> None:
    if nn.parameter.is_lazy(parameter):
        raise InputError(
            f"{label} is not initialised",
            why="a lazy module learns its shapes from the first batch that it sees",
            remedy="call the model on one batch, and then build the optimizer",
        )


def _held_parameters(opt: torch.optim.Optimizer, owners: Mapping[int, str]) -> dict[str, Tensor]:
    theta: dict[str, Tensor] = {}
    for index, group in enumerate(opt.param_groups):
        for position, parameter in enumerate(group["params"]):
            label = owners.get(id(parameter))
            if label is None:
                raise InputError(
                    f'param_groups[{index}]["params"][{position}] (shape '
                    f"{list(parameter.shape)}) is not a parameter of the model",
                    why="the optimizer holds a tensor that the model does not own, so no inner "
                    "gradient is known for it",
                    remedy="build the optimizer from this model's parameters "
                    "(a deep copy of the model has parameters of its own)",
                )
            if parameter.requires_grad:
                theta[label] = parameter
    if not theta:
        raise InputError(
            "the optimizer holds no parameter that requires grad",
            remedy="pass parameters with requires_grad=True to the optimizer",
        )
    return theta


def read_hyper(opt: torch.optim.Optimizer) -> dict[str, Tensor | PerStep]:
    """The tensor hyperparameters of an optimizer, by label."""
    found: dict[str, Tensor | PerStep] = {}
    for index, group in enumerate(opt.param_groups):
        for key, value in group.items():
            if key == "params" or value is None or isinstance(value, int | float | str):
                continue
            for path, leaf in _leaves(key, value):
                if isinstance(leaf, Tensor | PerStep):
                    label = hyper_label(index, path)
                    if isinstance(leaf, Tensor) and leaf.numel() != 1:
                        raise InputError(
                            f"{label} has shape {list(leaf.shape)}",
                            why="a hyperparameter is one number for its param group",
                            remedy="use one param group a parameter, or unrollc.PerStep for one "
                            "value a step",
                        )
                    found[label] = leaf
    return found


def _leaves(key: str, value: Any) -> list[tuple[Any, Any]]:
    """The leaves of a param group's entry with their paths, which begin with its key."""
    if isinstance(value, Tensor | PerStep):
        return [((pytree.MappingKey(key),), value)]
    if isinstance(value, tuple) and all(isinstance(each, float) for each in value):
        return []  # betas, most often
    paths, _ = pytree.tree_flatten_with_path(
        {key: value}, is_leaf=lambda leaf: isinstance(leaf, Tensor | PerStep)
    )
    return paths
