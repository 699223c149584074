"""Every optimizer of `torch.optim` in every configuration that PyTorch tests, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unrollc
from tests.optimizers.configurations import (
    COLUMNS,
    Configuration,
    Setting,
    check_adaptation,
    check_differences,
    configurations,
    evaluate,
    exact_casts,
    tensor_hyperparameters,
)
from tests.oracles import ordinary
from tests.oracles.compare import assert_close, relative_error

pytestmark = pytest.mark.usefixtures("float64")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"


def rows() -> dict[str, tuple[str, ...]]:
    """The rows of the page by ``optimizer, configuration``."""
    found, title = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line[3:]
        cells = tuple(cell.strip() for cell in line.strip("|").split(" | "))
        if line.startswith("| ") and cells[0] not in ("---", COLUMNS[0]):
            found[f"{title}, {cells[0]}"] = cells
    return found


ROWS = rows()
CONFIGURATIONS = {configuration.name: configuration for configuration in configurations()}


def test_the_page_has_a_row_for_each_configuration() -> None:
    assert list(ROWS) == list(CONFIGURATIONS)
    captured = {name.partition(",")[0] for name, row in ROWS.items() if row[1].isdigit()}
    refused = {name.partition(",")[0] for name, row in ROWS.items() if not row[1].isdigit()}
    assert refused == {"LBFGS", "SparseAdam"}
    named = {key for key in torch.optim.__all__ if isinstance(getattr(torch.optim, key), type)}
    assert captured | refused == named - {"Optimizer"}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_is_what_the_page_says(name: str) -> None:
    assert evaluate(CONFIGURATIONS[name]).cells() == ROWS[name]


#: The configuration of each optimizer in which most hyperparameters take part.
RICHEST: dict[str, Configuration] = {}
for each in CONFIGURATIONS.values():
    best = RICHEST.get(each.kind.__name__)
    taking_part = len(ROWS[each.name][2].split(", ")) if each.name in ROWS else 0
    if taking_part > 1 and (best is None or taking_part >= len(ROWS[best.name][2].split(", "))):
        RICHEST[each.kind.__name__] = each


@pytest.mark.parametrize("name", RICHEST)
def test_every_hyperparameter_may_have_a_value_a_step(name: str) -> None:
    """One value a step, all equal: their gradients add up to that of the one value."""
    with exact_casts(RICHEST[name]):
        single, several = Setting(RICHEST[name]), Setting(RICHEST[name])
        labels = ROWS[RICHEST[name].name][2].split(", ")[1:]
        one = tensor_hyperparameters(single.opt.param_groups[0])
        one = {label: one[label] for label in labels}
        result = single.program(list(one.values()))(single.train, single.val)
        expected = dict(zip(one, torch.autograd.grad(result.loss, list(one.values())), strict=True))
        group = several.opt.param_groups[0]
        found: dict[str, Tensor] = {}

        def per_step(label: str, value: Any) -> Any:
            if label not in one:
                return value
            size = (RICHEST[name].steps,)
            found[label] = torch.full(size, one[label].item(), requires_grad=True)
            return unrollc.PerStep(found[label])

        for key, value in list(group.items()):
            if isinstance(value, tuple):
                group[key] = tuple(per_step(f"{key}[{i}]", item) for i, item in enumerate(value))
            else:
                group[key] = per_step(key, value)
        result = several.program(list(found.values()))(several.train, several.val)
        gradients = torch.autograd.grad(result.loss, list(found.values()))
        sums = {label: g.sum() for label, g in zip(found, gradients, strict=True)}
        assert_close(sums, expected, rtol=1e-9)
        values = {(0, label): tensor.detach().clone() for label, tensor in found.items()}
        label = max(found, key=lambda k: gradients[list(found).index(k)].abs().max().item())
        assert relative_error(result.loss, several.trained(per_step=values).loss) < 1e-10
        gradient = gradients[list(found).index(label)]
        check_differences(several, label, values[0, label], gradient, per_step=values)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_what_cannot_be_captured_says_why(name: str) -> None:
    configuration = next(c for c in CONFIGURATIONS.values() if c.kind.__name__ == name)
    setting = Setting(configuration)
    with pytest.raises(unrollc.CaptureError) as error:
        setting.program().lower(setting.train, setting.val)
    text = str(error.value)
    assert "Fix: " in text
    assert {"LBFGS": "needs a closure", "SparseAdam": "dense gradients"}[name] in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted({c.kind.__name__ for c in CONFIGURATIONS.values()}))
def test_steps_on_cuda(name: str) -> None:
    """There some configurations are added: capturable, and tensors for more hyperparameters."""
    for configuration in configurations("cuda"):
        if configuration.kind.__name__ == name and name not in ("LBFGS", "SparseAdam"):
            check_adaptation(Setting(configuration, "cuda"))


def test_another_optimizer_and_a_gradient_that_is_off_are_caught() -> None:
    class Nesterov(Setting):
        def trained(self, **options: Any) -> ordinary.Trained:
            self.opt.param_groups[0]["nesterov"] = True
            return super().trained(**options)

    momentum = CONFIGURATIONS["SGD, momentum"]
    with pytest.raises(AssertionError, match="relative error"):
        check_adaptation(Nesterov(momentum))
    setting = Setting(momentum)
    lr = tensor_hyperparameters(setting.opt.param_groups[0])["lr"]
    (gradient,) = torch.autograd.grad(setting.program([lr])(setting.train, setting.val).loss, [lr])
    check_differences(setting, "lr", lr, gradient)
    with pytest.raises(AssertionError, match="differences"):
        check_differences(setting, "lr", lr, gradient * (1 + 1e-4))
