"""One program against eager PyTorch, for what surrounds modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import gradients
from tests.oracles import eager
from tests.oracles.compare import assert_close
from tests.oracles.models import CLASSES
from tests.oracles.objectives import Objective

Meta = dict[str, Tensor]
Build = Callable[[Sequence[Tensor], Tensor], torch.optim.Optimizer]


def momentum(params: Sequence[Tensor], lr: Tensor) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.8)


def adam(params: Sequence[Tensor], lr: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, eps=1e-2)


def classes(steps: int = 2, size: int = 5, features: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches of random inputs and classes; the last one is for validation."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, features, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(steps + 1)
    ]


def mlp(first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Sequential:
    """Four features to three classes."""
    return nn.Sequential(
        nn.Linear(4, 4) if first is None else first,
        nn.Tanh() if second is None else second,
        nn.Linear(4, 3),
    )


def held(model: nn.Module, build: Build) -> tuple[torch.optim.Optimizer, Meta]:
    """An optimizer over a model, and the meta-parameters: a learning rate and θ_0."""
    lr = torch.tensor(0.1, requires_grad=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return build(list(named.values()), lr), {"lr": lr} | named


def assert_exact(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Any = F.cross_entropy,
    *,
    plain: nn.Module | None = None,
    plain_loss: Any = None,
    build: Build = momentum,
    rules: Mapping[Any, eager.Rule] = eager.RULES,
    rtol: float = 1e-10,
) -> Any:
    """Hold loss, θ_T, buffers and meta-gradients against eager PyTorch; returns the result.

    Args:
        model: What is compiled.
        batches: One for each inner step and one for validation.
        loss: For both; an `Objective` is one for the program as well.
        plain, plain_loss: What eager PyTorch runs, where it cannot run `model` or `loss`: the same
            written plainly. Parameters have the same names.
        build: Makes the optimizer.
        rules: The optimizer's update in eager PyTorch.
    """
    opt, meta = held(model, build)
    other, other_meta = (opt, meta) if plain is None else held(plain, build)
    *train, val = batches
    expected = eager.unroll(
        model if plain is None else plain,
        other,
        loss if plain_loss is None else plain_loss,
        train,
        val,
        rules=rules,
    )
    wanted = gradients(expected.loss, other_meta)
    ours = unrollc.objective(loss.fn) if isinstance(loss, Objective) else loss
    result = unrollc.compile(model, opt, ours)(train, val)
    assert_close({"loss": result.loss}, {"loss": expected.loss}, rtol=1e-12)
    assert_close(as_real(result.params), as_real(expected.params), rtol=1e-12)
    assert_close(as_real(result.buffers), as_real(expected.buffers), rtol=1e-12)
    result.loss.backward()
    found = {name: tensor.grad for name, tensor in meta.items()}
    assert all(gradient is not None for gradient in wanted.values())
    assert_close(*without_noise(as_real(found), as_real(wanted)), rtol=rtol)
    return result


def without_noise(
    found: dict[str, Tensor], expected: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients that are zero on paper, and rounding in both, left out.

    The bias of a key shifts all scores of a query alike, which softmax takes out. What is left is
    1e-25 here, rounding of rounding; nothing else is near the bound.
    """
    bound = 1e-18 * max(float(gradient.norm()) for gradient in expected.values())
    noise = [n for n in expected if max(found[n].norm(), expected[n].norm()) <= bound]
    return tuple(  # type: ignore[return-value]
        {name: t for name, t in each.items() if name not in noise} for each in (found, expected)
    )


def as_real(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Complex tensors as pairs of real numbers."""
    return {
        name: torch.view_as_real(t) if isinstance(t, Tensor) and t.is_complex() else t
        for name, t in tensors.items()
    }


def twin(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """Another module with the parameters and buffers of `model`."""
    other = build()
    other.load_state_dict(model.state_dict())
    return other
