"""Hooks around the optimizer's step run on traced tensors, and are part of a program's key."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_pre_hook

import unrollc
from tests.gradients.surroundings import Weights, assert_agrees, task, unroll
from tests.oracles.compare import relative_error

pytestmark = pytest.mark.usefixtures("float64")

Register = Callable[[torch.optim.Optimizer, nn.Module], Any]


@pytest.fixture
def registered() -> Iterator[list[Any]]:
    """Handles of hooks that are removed after the test."""
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


def clip_handed(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    clip_grad_norm_(opt.param_groups[0]["params"], 0.2)


def clipped(theta: Weights, gradients: Weights) -> Weights:
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return [g * (0.2 / (norm + 1e-6)).clamp(max=1.0) for g in gradients]


def clip_the_models(model: nn.Module) -> Callable[..., None]:
    def hook(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        clip_grad_norm_(model.parameters(), 0.2)

    return hook


def project_held(model: nn.Module) -> Callable[..., None]:
    held = list(model.parameters())  # references from before the capture

    def hook(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in held:
                parameter.clamp_(-0.5, 0.5)

    return hook


def halve_rate(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    opt.param_groups[0]["lr"] *= 0.5


#: What is registered, and the same by hand.
HOOKS: dict[str, tuple[Register, dict[str, Any]]] = {
    "before": (
        lambda opt, model: opt.register_step_pre_hook(clip_handed),
        {"transform": clipped},
    ),
    "before, of all optimizers, over the model": (
        lambda opt, model: register_optimizer_step_pre_hook(clip_the_models(model)),
        {"transform": clipped},
    ),
    "after": (
        lambda opt, model: opt.register_step_post_hook(project_held(model)),
        {"after": lambda theta: [w.clamp(-0.5, 0.5) for w in theta]},
    ),
    "a schedule": (
        lambda opt, model: opt.register_step_post_hook(halve_rate),
        {"rates": [0.3, 0.15, 0.075]},
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_meta_gradient_is_exact(name: str, registered: list[Any]) -> None:
    register, by_hand = HOOKS[name]
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    registered.append(register(opt, model))
    program = unrollc.compile(model, opt, F.cross_entropy)
    expected = unroll(model, train, val, **{"rates": [0.3] * 3, **by_hand})
    assert_agrees(program(train, val), expected, dict(model.named_parameters()))
    assert opt.param_groups[0]["lr"] == 0.3


def test_adding_changing_and_removing_one_is_never_stale(registered: list[Any]) -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    program = unrollc.compile(model, opt, F.cross_entropy)
    settings = {"factor": 0.5}

    def shrink(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in opt.param_groups[0]["params"]:
            parameter.mul_(settings["factor"])

    def holds(factor: float) -> None:
        after = {"after": lambda theta: [w * factor for w in theta]}
        expected = unroll(model, train, val, rates=[0.3] * 3, **after)
        with torch.no_grad():
            found = program(train, val).loss
        assert relative_error(found, expected.loss) < 1e-12

    holds(1.0)
    registered.append(opt.register_step_post_hook(shrink))
    holds(0.5)
    settings["factor"] = 0.25
    holds(0.25)
    registered.pop().remove()
    holds(1.0)


def refused(register: Register, words: str, registered: list[Any], **options: Any) -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), **{"lr": 0.3, **options})
    registered.append(register(opt, model))
    program = unrollc.compile(model, opt, F.cross_entropy)
    with pytest.raises(unrollc.CaptureError, match=words):
        program(train, val)
    assert float(opt.param_groups[0]["lr"]) == 0.3


def test_what_one_step_would_hide_is_refused(registered: list[Any]) -> None:
    seen: list[int] = []

    def behind(opt: torch.optim.Optimizer, model: nn.Module) -> Any:
        """A hook that uses the optimizer's name, not its argument."""
        return opt.register_step_post_hook(lambda *given: halve_rate(opt, (), {}))

    def stale(opt: torch.optim.Optimizer, model: nn.Module) -> Any:
        """A hook that reads state of the user's own optimizer."""
        buffers = [torch.ones_like(parameter) for parameter in model.parameters()]
        for parameter, buffer in zip(model.parameters(), buffers, strict=True):
            opt.state[parameter]["momentum_buffer"] = buffer

        def hook(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            opt.param_groups[0]["params"][0].add_(buffers[0])

        return opt.register_step_pre_hook(hook)

    refused(
        lambda opt, model: opt.register_step_pre_hook(lambda *given: seen.append(1)),
        "changes Python values",
        registered,
    )
    refused(behind, "changes the param groups of the user's optimizer", registered)
    refused(stale, "behind the model's back", registered, momentum=0.9)

    def shrink(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        opt.param_groups[0]["lr"].mul_(0.5)

    refused(
        lambda opt, model: opt.register_step_post_hook(shrink),
        "writes to the tensor param_groups",
        registered,
        lr=torch.tensor(0.3),
    )


def test_gradients_of_earlier_training_are_refused() -> None:
    model, train, val = task()
    mine = list(model.parameters())

    class Holding(torch.optim.Optimizer):
        """An optimizer with a list of its parameters outside."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(mine[0].grad.mean())

    model[0].weight.grad = torch.ones_like(model[0].weight)
    program = unrollc.compile(model, Holding(model.parameters()), F.cross_entropy)
    with pytest.raises(unrollc.CaptureError, match=r"reads the gradient of 0\.weight"):
        program(train, val)
