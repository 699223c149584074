"""``torch._foreach_*`` ops as loops are what the ops themselves compute."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unrollc.capture.foreach import ForeachAsLoops

pytestmark = pytest.mark.usefixtures("float64")

SCALARS = [0.5, 1.5]


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, 3, generator=generator) + 0.5, torch.rand(4, generator=generator) + 0.5]


CASES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *((name, (tensors(1),), {}) for name in ("sqrt", "exp", "neg", "abs", "reciprocal", "sign")),
    *((name, (tensors(1), tensors(2)), {}) for name in ("add", "sub", "mul", "div", "maximum")),
    *((name, (tensors(1), 0.7), {}) for name in ("add", "mul", "div", "pow", "minimum")),
    *((name, (tensors(1), SCALARS), {}) for name in ("mul", "clamp_min", "clamp_max", "pow")),
    ("add", (tensors(1), tensors(2)), {"alpha": 0.3}),
    ("mul", (tensors(1), torch.tensor(0.7)), {}),
    ("lerp", (tensors(1), tensors(2), 0.3), {}),
    ("lerp", (tensors(1), tensors(2), tensors(3)), {}),
    ("addcmul", (tensors(1), tensors(2), tensors(3)), {"value": 0.3}),
    ("addcmul", (tensors(1), tensors(2), tensors(3), SCALARS), {}),
    ("addcdiv", (tensors(1), tensors(2), tensors(3), torch.tensor(SCALARS)), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
@pytest.mark.parametrize("in_place", [False, True])
def test_loop(name: str, args: Any, kwargs: Any, in_place: bool) -> None:
    op = getattr(torch, f"_foreach_{name}_" if in_place else f"_foreach_{name}")
    results = []
    for mode in (False, True):
        own = ([tensor.clone() for tensor in args[0]], *args[1:])
        if mode:
            with ForeachAsLoops():
                returned = op(*own, **kwargs)
        else:
            returned = op(*own, **kwargs)
        results.append(own[0] if in_place else list(returned))
    for plain, looped in zip(*results, strict=True):
        assert torch.allclose(plain, looped, rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "args"), [("norm", (2,)), ("norm", (1,)), ("max", ()), ("zero_", ())]
)
def test_others(name: str, args: Any) -> None:
    op = getattr(torch, f"_foreach_{name}")
    plain, looped = tensors(1), tensors(1)
    expected = op(plain, *args)
    with ForeachAsLoops():
        found = op(looped, *args)
    if name.endswith("_"):
        expected, found = plain, looped
    assert all(map(torch.equal, expected, found))


def test_copy() -> None:
    target = tensors(1)
    with ForeachAsLoops():
        torch._foreach_copy_(target, tensors(2))
    assert all(map(torch.equal, target, tensors(2)))
