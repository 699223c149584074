"""What a row of the table of modules is: a module of `torch.nn` in one setting, and its data.

A module alone may have no parameter, and what it is given would then have no gradient. So it is
part of a `Probe`, which multiplies each floating input, entry by entry, by a parameter of its own:
the meta-gradient with respect to these initial values passes through the module in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

#: Why eager double backward is no oracle for some modules.
NO_SECOND = "eager PyTorch has no second derivative"

#: T, the number of inner steps.
STEPS = 3


@dataclass(frozen=True)
class Input:
    """One tensor of a batch.

    Attributes:
        draw: Makes it.
        moved: Whether the probe multiplies it by a parameter.
    """

    draw: Callable[[Generator], Tensor]
    moved: bool = True


def normal(*shape: int, moved: bool = True) -> Input:
    """A standard normal tensor."""
    return Input(lambda g: torch.randn(shape, generator=g), moved)


def positive(*shape: int, moved: bool = True) -> Input:
    """A tensor uniform between 0.5 and 1.5."""
    return Input(lambda g: torch.rand(shape, generator=g) + 0.5, moved)


def integers(high: int, *shape: int) -> Input:
    """Integers below `high`."""
    return Input(lambda g: torch.randint(high, shape, generator=g), moved=False)


def signs(*shape: int) -> Input:
    """Numbers 1 and -1."""
    return Input(lambda g: torch.randint(2, shape, generator=g) * 2.0 - 1, moved=False)


def fixed(tensor: Tensor) -> Input:
    """The same tensor in every batch."""
    return Input(lambda g: tensor.clone(), moved=False)


class Probe(nn.Module):
    """A module behind parameters that scale what it is given.

    Attributes:
        module: The module.
        scale: One parameter for each moved input.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Input], batch: Sequence[Tensor]) -> None:
        super().__init__()
        self.module = module
        moved = [tensor for each, tensor in zip(inputs, batch, strict=True) if each.moved]
        self.scale = nn.ParameterList(
            nn.Parameter(0.75 + 0.5 * torch.rand(tensor.shape)) for tensor in moved
        )
        self._moved = [each.moved for each in inputs]

    def forward(self, *inputs: Tensor) -> Any:
        scales = iter(self.scale)
        scaled = (x * next(scales) if m else x for x, m in zip(inputs, self._moved, strict=True))
        return self.module(*scaled)


class Together(nn.Module):
    """Several inputs handed on as they are: what a loss of several predictions is given."""

    def forward(self, *inputs: Tensor) -> Any:
        return inputs if len(inputs) > 1 else inputs[0]


class Calling(nn.Module):
    """A module that is called in a way of its own, or a function of `torch.nn.functional`.

    Attributes:
        module: The module, where there is one.
    """

    def __init__(self, call: Callable[..., Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self._call(*inputs) if self.module is None else self._call(self.module, *inputs)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: The class's name in `torch.nn`, or a function's in `torch.nn.functional`.
        setting: Which of its arguments, modes or calls the row is about.
        build: Makes the module (a new one at each call).
        inputs: What the module is given.
        target: What a loss is given besides the prediction; None for a module that is no loss.
        criterion: Makes the loss; without one it is the mean squared error to random targets.
        evaluating: Whether the module is in evaluation mode.
        noisy: Whether it draws random numbers.
        finite: Why the oracle is finite differences of ordinary training and not eager double
            backward; "" where it is eager.
        instead: Makes another module of the same parameters and the same ordinary training, which
            eager double backward takes instead.
        refused: Why the module cannot be used; the error must contain `error`.
        error: Words of the error message.
    """

    name: str
    setting: str
    build: Callable[[], nn.Module]
    inputs: tuple[Input, ...] = (normal(2, 3),)
    target: tuple[Input, ...] | None = None
    criterion: Callable[[], Any] | None = None
    evaluating: bool = False
    noisy: bool = False
    finite: str = ""
    instead: Callable[[], nn.Module] | None = None
    refused: str = ""
    error: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}({self.setting})" if self.setting else self.name


def layer(
    name: str, setting: str, build: Callable[[], nn.Module], *inputs: Any, **rest: Any
) -> Case:
    """A module that is no loss; a tuple among `inputs` is the shape of a normal one."""
    made = tuple(each if isinstance(each, Input) else normal(*each) for each in inputs)
    return Case(name, setting, build, made or (normal(2, 3),), **rest)


def loss(
    name: str,
    setting: str,
    criterion: Callable[[], Any],
    inputs: Sequence[Input],
    target: Sequence[Input] = (),
    *,
    prepare: Callable[[], nn.Module] = Together,
    **rest: Any,
) -> Case:
    """A loss of some predictions and targets.

    Args:
        name, setting: As in `Case`.
        criterion: Makes the loss module.
        inputs: What becomes the predictions.
        target: What it is given after them.
        prepare: A module that makes predictions of the inputs, e.g. a softmax.
    """
    return Case(
        name,
        setting,
        prepare,
        tuple(inputs),
        target=tuple(target),
        criterion=criterion,
        **rest,
    )


@dataclass(frozen=True)
class Setup:
    """A case made concrete.

    Attributes:
        model, opt, loss: As `unrollc.compile` takes them.
        train: A list of T batches.
        val: The validation batch.
        meta: The meta-parameters: every parameter and the learning rate.
    """

    model: nn.Module
    opt: torch.optim.Optimizer
    loss: Callable[[Any, Any], Tensor]
    train: list[Any]
    val: Any
    meta: dict[str, Tensor]


def outputs(prediction: Any) -> Tensor:
    """The floating tensors of a module's result as one vector; a single one as it is."""
    if isinstance(prediction, Tensor):
        return prediction
    leaves = [x for x in pytree.tree_leaves(prediction) if isinstance(x, Tensor)]
    return torch.cat([x.reshape(-1) for x in leaves if x.is_floating_point()])


def squared_error(prediction: Any, target: Tensor) -> Tensor:
    """The loss of a module that is none itself."""
    return F.mse_loss(outputs(prediction), target)


class Criterion:
    """A loss module of one or several predictions and targets, reduced to one number."""

    def __init__(self, criterion: nn.Module) -> None:
        self.criterion = criterion

    def __call__(self, prediction: Any, target: Any) -> Tensor:
        predictions = prediction if isinstance(prediction, tuple) else (prediction,)
        targets = target if isinstance(target, tuple) else (target,)
        return self.criterion(*predictions, *targets).mean()


def setup(case: Case) -> Setup:
    """The problem of a case, the same at every call."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    batches = [[each.draw(generator) for each in case.inputs] for _ in range(STEPS + 1)]
    model = Probe(case.build(), case.inputs, batches[0])
    model.train(not case.evaluating)
    if case.criterion is None:
        like = _output(model, batches[0])
        targets: list[Any] = [
            torch.randn(like.shape, generator=generator) for _ in range(STEPS + 1)
        ]
        loss: Any = squared_error
    else:
        assert case.target is not None
        drawn = [tuple(t.draw(generator) for t in case.target) for _ in range(STEPS + 1)]
        targets = [each[0] if len(each) == 1 else each for each in drawn]
        loss = case.criterion()
        unreduced = loss.reduction == "none"
        if unreduced or len(case.target) != 1 or len(case.inputs) != 1:
            loss = Criterion(loss)
    pairs = [(tuple(batch), target) for batch, target in zip(batches, targets, strict=True)]
    rate = torch.tensor(0.1, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=rate)
    meta = {**dict(model.named_parameters()), "lr": rate}
    return Setup(model, opt, loss, pairs[:-1], pairs[-1], meta)


def _output(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """What the model returns, on a copy: a forward may move buffers."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return outputs(copy.deepcopy(model)(*batch))
