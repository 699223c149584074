"""Images in channels_last: equal values, another layout, in the step and in its adjoint."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrollc
from tests.oracles.compare import relative_error
from tests.plan.graphs import Sketch, targets
from unrollc.optimize import memory_format, packing
from unrollc.optimize.memory_format import channels_last, follows_images
from unrollc.runtime import adjoints, lowering
from unrollc.step import Phase, Role, StepGraph, iterate_calls

aten = torch.ops.aten


def convolved(dtype: torch.dtype, *, groups: int = 1, role: Role = Role.BATCH) -> StepGraph:
    sketch = Sketch()
    x = sketch.input("x", 2, 4, 5, 5, role=role, dtype=dtype)
    weight = sketch.input("weight", 4, 4 // groups, 3, 3, role=Role.THETA, dtype=dtype)
    plain = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups)
    image = sketch.call(aten.convolution.default, x, weight, *plain)
    flat = sketch.call(aten.view.default, sketch.call(aten.relu.default, image), [2, 100])
    return sketch.returning(flat)


def test_images_are_converted_once_and_views_become_reshapes() -> None:
    before = convolved(torch.float32)
    after = channels_last(before)
    assert targets(after) == [
        aten.clone.default,
        aten.convolution.default,
        aten.relu.default,
        aten.reshape.default,
    ]
    relu = next(node for node in after.graph.nodes if node.target is aten.relu.default)
    assert relu.meta["val"].is_contiguous(memory_format=torch.channels_last)
    given = [torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3)]
    assert relative_error(after.module(*given)[0], before.module(*given)[0]) < 1e-6


@pytest.mark.parametrize(
    "graph",
    [
        convolved(torch.float64),
        convolved(torch.float32, groups=2),
        convolved(torch.float32, role=Role.CONTEXT),
    ],
    ids=["float64", "in groups", "no batch"],
)
def test_these_convolutions_stay(graph: StepGraph) -> None:
    assert channels_last(graph) is graph


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Tanh(),
            nn.AvgPool2d(2),
        )
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


def run() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Pooled()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, nn.functional.mse_loss)
    x, y = torch.randn(3, 6, 1, 8, 8), torch.randn(3, 6, 2)
    train, val = (x[1:], y[1:]), (x[0], y[0])
    result = program(train, val)
    result.loss.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    found |= {"loss": result.loss, **result.params, **result.buffers}
    return program.lower(train, val), found


def test_a_network_gives_the_same_in_either_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered, found = run()
    graphs = dict(lowered.pieces.named_graphs)
    for name in ("step_0", "adjoint_0", "validate"):
        assert follows_images(graphs[name].graph), name
    # Of what the adjoint goes on with, nothing falls back to the other layout.
    images = [
        node.meta["val"]
        for node in iterate_calls(graphs["step_0"])
        if node.meta["phase"] is Phase.FORWARD
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].shape[:2] == (6, 4)
    ]
    assert len(images) > 4
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)

    def plain(loop: Any, val: Any, val_gradient: Any) -> packing.PackedLoop:
        return packing.rewritten(loop, val, val_gradient, ())

    monkeypatch.setattr(adjoints, "rewritten", plain)
    monkeypatch.setattr(lowering, "rewritten", plain)
    other, expected = run()
    assert not any(follows_images(graph.graph) for _, graph in other.pieces.named_graphs)
    for key, tensor in expected.items():
        if key != "gradient of layers.0.bias":  # batch normalisation takes it out: it is rounding
            assert relative_error(found[key], tensor) < 2e-4, key


class Shuffled(nn.Module):
    """A convolution, and something that depends on how its result lies in memory."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.LazyLinear(2)
        self.after = copy.deepcopy(after)
        self.head(after(self.first(torch.zeros(5, 3, 4, 4))).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.first(x)).flatten(1))


DEPENDENT: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided": lambda x: torch.as_strided(x, (x.shape[0], 4, 16), (64, 16, 1)),
    "group norm": nn.GroupNorm(2, 4),
    "glu": nn.GLU(1),
}


def differences(after: Callable[[Tensor], Tensor], **options: Any) -> dict[str, float]:
    """Of the gradient in float32 to that in float64, where nothing is converted."""
    found: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = Shuffled(after).to(dtype)
        opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
        program = unrollc.compile(model, opt, nn.functional.cross_entropy, **options)
        x, y = torch.randn(4, 5, 3, 4, 4).to(dtype), torch.randint(2, (4, 5))
        result = program((x[1:], y[1:]), (x[0], y[0]))
        result.loss.backward()
        found.append({name: p.grad.double() for name, p in model.named_parameters()})
        found[-1]["loss"] = result.loss.double()
    return {name: relative_error(found[0][name], found[1][name]) for name in found[1]}


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_depends_on_strides_gets_those_that_it_expects(name: str) -> None:
    assert max(differences(DEPENDENT[name]).values()) < 1e-4


def test_a_layout_that_an_op_cannot_read_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    every = memory_format.ANY_LAYOUT | {aten.as_strided.default}
    monkeypatch.setattr(memory_format, "ANY_LAYOUT", every)
    assert max(differences(DEPENDENT["as_strided"]).values()) > 0.1


@pytest.mark.parametrize("memory", ["1MiB", "100KiB"])
def test_a_convolution_fits_into_a_budget(memory: str) -> None:
    """Under a budget mixed mode is planned as well, where the batch has no tangent."""
    assert max(differences(nn.ReLU(), memory=memory).values()) < 1e-4
