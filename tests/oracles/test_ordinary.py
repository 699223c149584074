"""Ordinary training against a loop written out in the test."""

import torch
from torch.nn import functional as F

from tests.oracles import cases, ordinary
from tests.oracles.compare import assert_close, flattened
from tests.oracles.models import ConvNet
from tests.oracles.objectives import Objective, unstack


def test_matches_a_plain_loop_and_leaves_its_arguments_alone() -> None:
    torch.manual_seed(1)
    model = ConvNet().double()
    torch.manual_seed(1)
    twin = ConvNet().double()
    opt = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01, requires_grad=True))
    twin_opt = torch.optim.Adam(twin.parameters(), lr=0.01)
    batches = unstack(cases.batches((6, 1, 4, 4), 3, seed=1))
    start = {name: value.clone() for name, value in model.state_dict().items()}

    trained = ordinary.train(model, opt, F.cross_entropy, batches)
    for inputs, target in batches:
        twin_opt.zero_grad()
        F.cross_entropy(twin(inputs), target).backward()
        twin_opt.step()

    assert_close(trained.params | trained.buffers, dict(twin.state_dict()), rtol=1e-7)
    # 1e-7 because the float32 tensor lr is not 0.01; with the same number the bits agree:
    opt.param_groups[0]["lr"] = 0.01
    trained = ordinary.train(model, opt, F.cross_entropy, batches)
    assert_close(trained.params | trained.buffers, dict(twin.state_dict()), rtol=0)
    names = {param: name for name, param in twin.named_parameters()}
    expected = {names[param]: state for param, state in twin_opt.state.items()}
    assert_close(flattened(trained.opt_state), flattened(expected), rtol=0)
    assert int(trained.buffers["norm1.num_batches_tracked"]) == 3

    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert not opt.state
    assert all(param.grad is None for param in model.parameters())


def test_evaluation_does_not_move_the_buffers() -> None:
    model = ConvNet()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, target = cases.batches((6, 1, 4, 4), 2, seed=1)
    batches = unstack((inputs.float(), target))
    trained = ordinary.train(model, opt, F.cross_entropy, batches, batches[0])
    assert int(trained.buffers["norm1.num_batches_tracked"]) == 2
    assert int(trained.model.norm1.num_batches_tracked) == 2


def test_a_non_leaf_rate_and_an_objective() -> None:
    case = cases.build("mlp", "sgd", steps=2)
    case.opt.param_groups[0]["lr"] = case.meta["lr"] * 2
    objective = Objective(lambda model, batch: case.loss(model(batch[0]), batch[1]))
    found = ordinary.train(
        case.model, case.opt, objective, unstack(case.train), per_step=case.per_step
    )
    expected = case.train_ordinarily()
    assert_close(found.params, expected.params, rtol=0)
