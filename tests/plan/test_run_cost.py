"""The cost of a run as a polynomial in T, against the sum over its steps."""

import pytest
import torch
from torch.nn import functional as F

import unrollc
from tests.oracles.models import MLP
from unrollc.plan.cost import NOTHING, Cost, cost_of
from unrollc.plan.pieces import Pieces
from unrollc.plan.run_cost import R, run_cost


def pieces_of(steps: int, **options: object) -> Pieces:
    """SGD with momentum, whose first step differs from the later ones."""
    model = MLP()
    rate = torch.tensor(0.1, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, dampening=0.2)
    batch = (torch.randn(5, 4), torch.arange(5) % 3)
    program = unrollc.compile(model, opt, F.cross_entropy, **options)  # type: ignore[arg-type]
    lowered = program.lower(unrollc.repeat(batch, steps), batch)
    pieces: Pieces = lowered.pieces
    return pieces


def counted(pieces: Pieces) -> Cost:
    graphs = [pieces.steps[i] for i in pieces.sequence]
    graphs += [pieces.adjoints[i].graph for i in pieces.adjoint_sequence if i is not None]
    graphs.append(pieces.val_gradient or pieces.val)
    return sum((cost_of(graph) for graph in graphs), NOTHING)


@pytest.mark.parametrize(
    "options", [{}, {"gradient": unrollc.Truncated(2)}], ids=["whole", "truncated"]
)
def test_one_lowering_knows_the_cost_of_other_horizons(options: dict[str, object]) -> None:
    found = run_cost(pieces_of(5, **options), 0)
    for steps in (5, 8):
        assert found.at(steps, 0) == counted(pieces_of(steps, **options))


def test_a_repeated_step_costs_a_steady_step() -> None:
    pieces = pieces_of(5)
    steady = cost_of(pieces.steps[pieces.sequence[-1]])
    found = run_cost(pieces, 3)
    assert found.at(5, 3) == counted(pieces) + steady + steady + steady
    assert found.operations.coeff(R) == steady.operations


def test_the_text_is_a_polynomial() -> None:
    lines = str(run_cost(pieces_of(5), 1234)).splitlines()
    assert [line.split()[0] for line in lines] == ["operations", "bytes", "calls", "R"]
    assert all("T · " in line and "R · " in line for line in lines[:3])
    assert lines[3] == "R = 1,234 repeated steps"
