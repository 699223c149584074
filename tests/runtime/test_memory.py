"""The plan's peak is what a run holds."""

import pytest
import torch
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, memory
from tests.oracles.compare import assert_close
from tests.oracles.models import MLP, ConvNet
from tests.oracles.objectives import unstack
from unrollc.plan import scratch
from unrollc.runtime import adjoints

SETTINGS = {
    "mlp, adam": (lambda: MLP(hidden=64), torch.optim.Adam, (16, 4)),
    "conv, sgd": (lambda: ConvNet(channels=8), torch.optim.SGD, (16, 1, 4, 4)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [2, 12])
def test_the_predicted_peak_is_the_measured_one(
    setting: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "ROWS", {})  # the meter sees tensors, not what an op takes inside
    build, optimizer, shape = SETTINGS[setting]
    model = build()
    opt = optimizer(model.parameters(), lr=0.01)
    inputs, target = cases.batches(shape, steps, seed=1)
    train = (inputs.float(), target)
    val = unstack(train)[0]
    program = unrollc.compile(model, opt, F.cross_entropy)
    lowered = program.lower(train, val)
    program(train, val).loss.backward()  # .grad exists from here on
    for param in model.parameters():
        param.grad = None

    def run() -> None:
        result = program(train, val)  # θ_T and the rest stay while the user holds the result
        result.loss.backward()

    measured = memory.measure(run).peak
    # Scalars (losses, counters) are a few bytes each; autograd's own are not the plan's.
    assert abs(measured - lowered.plan.peak_bytes) <= 0.02 * measured + 256


def test_nothing_is_held_after_backward() -> None:
    """Of a call whose result is dropped, only the gradients remain."""
    model = MLP(hidden=64)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, target = cases.batches((16, 4), 8, seed=1)
    train = (inputs.float(), target)
    program = unrollc.compile(model, opt, F.cross_entropy)
    program.lower(train, unstack(train)[0])

    def run() -> None:
        program(train, unstack(train)[0]).loss.backward()

    run()
    gradients = sum(param.numel() * 4 for param in model.parameters())
    for param in model.parameters():
        param.grad = None
    assert memory.measure(run).kept <= gradients + 64


def test_what_surrounds_the_update_is_planned() -> None:
    """An average of the weights is state that every step keeps; rates are inputs."""
    model = MLP(hidden=64)
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    inputs, target = cases.batches((16, 4), 4, seed=1)
    train = (inputs.float(), target)
    val = unstack(train)[0]
    program = unrollc.compile(
        model,
        opt,
        F.cross_entropy,
        grad_transform=lambda p: torch.nn.utils.clip_grad_norm_(p, 1.0),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(opt, 0.9),
        average=torch.optim.swa_utils.AveragedModel(model),
    )
    lowered = program.lower(train, val)
    program(train, val).loss.backward()
    for param in model.parameters():
        param.grad = None

    def run() -> None:
        result = program(train, val)
        result.loss.backward()

    measured = memory.measure(run).peak
    assert abs(measured - lowered.plan.peak_bytes) <= 0.02 * measured + 256


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("favoured", ["mixed", "reverse"])
def test_a_transformer_under_the_smallest_budget(
    favoured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ops write over what dies, in either mode; a tangent of nothing is no tensor to write on."""
    monkeypatch.setattr(adjoints, "_CLEARLY_CHEAPER", {"mixed": 10.0, "reverse": 0.0}[favoured])
    model = cases.MODELS["transformer"][0]()
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    train = cases.batches((16, *cases.MODELS["transformer"][1][1:]), 5, seed=1)
    val = unstack(train)[0]
    gradients = []
    for budget in (None, 1):
        if budget is not None:
            with pytest.raises(unrollc.BudgetError) as caught:
                unrollc.compile(model, opt, F.cross_entropy, memory=budget).lower(train, val)
            budget = caught.value.smallest
        program = unrollc.compile(model, opt, F.cross_entropy, memory=budget)
        result = program(train, val)
        wanted = [opt.param_groups[0]["lr"], *model.parameters()]
        found = torch.autograd.grad(result.loss, wanted)
        gradients.append({f"leaf {n}": gradient for n, gradient in enumerate(found)})
    assert program.lower(train, val).plan.schedule.recomputed > 0
    assert_close(*gradients, rtol=1e-9)
