"""What counts as an average of a model, and that its state and settings are never stale."""

import importlib.util
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import unrollc
from tests.gradients.surroundings import task, unroll
from tests.oracles.compare import relative_error

pytestmark = pytest.mark.usefixtures("float64")


def test_what_is_no_average_of_the_model_is_refused() -> None:
    model, _, _ = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    sharing = AveragedModel(model)
    sharing.module = model
    for average, words in (
        (model, "not a torch.optim.swa_utils.AveragedModel"),
        (AveragedModel(nn.Linear(3, 2)), "not an average of this model"),
        (sharing, "shares tensors with the model"),
    ):
        with pytest.raises(unrollc.InputError, match=words):
            unrollc.compile(model, opt, F.cross_entropy, average=average)


def test_where_an_average_starts_is_no_meta_parameter() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    average = AveragedModel(model)
    for listed in (average.module[0].weight, "average.module.0.weight"):
        program = unrollc.compile(model, opt, F.cross_entropy, average=average, meta=[listed])
        with pytest.raises(unrollc.InputError, match="belongs to the average"):
            program(train, val)


def test_python_state_of_the_averaging_function_is_refused() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    seen: list[int] = []

    def counting(average: Tensor, weight: Tensor, count: Any) -> Tensor:
        seen.append(1)
        return average

    average = AveragedModel(model, avg_fn=counting)
    average.n_averaged += 1
    program = unrollc.compile(model, opt, F.cross_entropy, average=average)
    with pytest.raises(unrollc.CaptureError, match="averaging function changes Python values"):
        program(train, val)


def test_weights_count_and_settings_of_now_are_used() -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.6))
    program = unrollc.compile(model, opt, F.cross_entropy, average=average)

    def holds(decay: float, count: int) -> None:
        average.n_averaged.fill_(count)
        start = [parameter.detach().clone() for parameter in average.parameters()]
        expected = unroll(
            model,
            train,
            val,
            rates=[0.5] * 3,
            average=lambda a, w, n: decay * a + (1 - decay) * w,
            averaged=(start, count),
        )
        with torch.no_grad():
            assert relative_error(program(train, val).loss, expected.loss) < 1e-12

    holds(0.6, 0)
    holds(0.6, 1)
    with torch.no_grad():
        lowered = program.lower(train, val)
        for parameter in average.parameters():
            parameter.mul_(0.5)
        average.n_averaged.fill_(5)
        assert program.lower(train, val) is lowered
    holds(0.6, 5)
    average.avg_fn = get_ema_avg_fn(0.2)
    holds(0.2, 5)


def test_a_saved_program_averages_too(tmp_path: pathlib.Path) -> None:
    model, train, val = task()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.6))
    program = unrollc.compile(model, opt, F.cross_entropy, average=average)
    result = program(train, val)
    program.lower(train, val).save(tmp_path / "meta.py")
    spec = importlib.util.spec_from_file_location("meta", tmp_path / "meta.py")
    assert spec is not None and spec.loader is not None
    saved = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(saved)
    inputs = program.inputs(train, val)
    assert {"average.n_averaged", "average.module.0.weight"} < set(inputs)
    loss, gradients = saved.loss_and_gradients(inputs)
    assert torch.equal(loss, result.loss.detach())
    (expected,) = torch.autograd.grad(result.loss, model[0].weight)
    assert torch.equal(gradients["0.weight"], expected)
