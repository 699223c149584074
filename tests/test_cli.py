"""The command line: exit status, the table, plain data, derivations."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unrollc.cli import app

FACTORIES = """
import torch
from torch import nn
from torch.nn import functional as F


def problem(loss):
    model = nn.Linear(3, 2)
    opt = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, requires_grad=True))
    batch = (torch.randn(4, 3), torch.randn(4, 2))
    return model, opt, loss, [batch] * 2, batch


def sound():
    return problem(F.mse_loss)


def severed():
    return problem(lambda prediction, target: (prediction.round() - target).square().mean())


def stopped():
    def loss(prediction, target):
        return F.mse_loss(prediction, target) if prediction.sum() > 0 else prediction.sum()

    return problem(loss)


def four():
    return problem(F.mse_loss)[:4]


def raising():
    raise ValueError("no data")


def odd():
    return [*problem(F.mse_loss), 1]


def with_options():
    def hits(prediction, target):
        return (prediction > target).double().mean()

    return [*problem(F.mse_loss), {"val_loss": hits}]
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "factories_of_cli.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    runner = CliRunner()

    def invoke(name: str, *options: str):
        return runner.invoke(app, ["check", f"factories_of_cli:{name}", *options])

    yield invoke
    sys.modules.pop("factories_of_cli", None)


def test_exit_status_says_whether_the_gradients_exist(run) -> None:
    good = run("sound")
    assert good.exit_code == 0
    assert "exists" in good.stdout and "By requirement" in good.stdout
    bad = run("severed")
    assert bad.exit_code == 1
    assert "the derivative of round is zero" in " ".join(bad.stdout.split())


def test_a_sixth_value_holds_further_arguments(run) -> None:
    result = run("with_options", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdicts"]["weight"]["I"]["verdict"] == "fails"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stopped", "control flow or arithmetic depends on the data"),
        ("four", "returned no tuple of five or six"),
        ("absent", "cannot be loaded"),
        ("raising", "ValueError: no data"),
        ("odd", "is no dictionary"),
    ],
)
def test_what_cannot_be_checked_is_neither(run, name: str, words: str) -> None:
    result = run(name)
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output


def test_plain_data(run) -> None:
    data = json.loads(run("severed", "--json").stdout)
    assert data["ok"] is False
    assert data["verdicts"]["weight"]["I"]["verdict"] == "fails"
    assert "derivations" not in data


def test_derivations(run) -> None:
    text = run("sound", "--derivations").stdout
    assert "∂θ′/∂G" in text or "∂θ'/∂G" in text
    assert r"\frac{\partial" in run("sound", "--latex").stdout
    assert len(json.loads(run("sound", "--json", "--derivations").stdout)["derivations"]) == 1
