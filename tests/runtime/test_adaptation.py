"""What a program computes forward is ordinary training, however its batches are given."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import compiled
from tests.oracles import cases, memory, ordinary
from tests.oracles.compare import assert_close, flattened, relative_error
from tests.oracles.models import MLP, ConvNet
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 4


def named_state(model: torch.nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {param: name for name, param in model.named_parameters()}
    return flattened({names[param]: state for param, state in opt.state.items()})


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *(("mlp", optimizer) for optimizer in cases.OPTIMIZERS),
        ("conv", "adamw"),
        ("transformer", "adam"),
        ("lstm", "sgd-nesterov"),
    ],
)
def test_theta_buffers_and_state_equal_ordinary_training(model: str, optimizer: str) -> None:
    case = cases.build(model, optimizer, T)
    trained = case.train_ordinarily()
    result = compiled(case)(case.train, case.val)
    assert trained.loss is not None
    assert relative_error(result.loss, trained.loss) < 1e-12
    assert result.inner_losses.shape == (T,)
    assert relative_error(result.inner_losses, trained.inner_losses) < 1e-12
    assert_close(result.params, trained.params, rtol=1e-12)
    assert_close(result.buffers, trained.buffers, rtol=1e-12)
    assert_close(flattened(result.opt_state), flattened(trained.opt_state), rtol=1e-12)
    result.apply()
    assert_close(dict(case.model.state_dict()), dict(trained.model.state_dict()), rtol=1e-12)
    found, wanted = named_state(case.model, case.opt), named_state(trained.model, trained.opt)
    assert_close(found, wanted, rtol=1e-12)


def test_applied_state_goes_on_as_ordinary_training_does() -> None:
    """T steps by a program and T by the real optimizer are 2 T by the real optimizer."""
    model = ConvNet()
    opt = torch.optim.Adam(model.parameters(), lr=0.02, amsgrad=True)
    train = cases.batches((6, 1, 4, 4), 2 * T, seed=1)
    batches = unstack(train)
    wanted = ordinary.train(model, opt, F.cross_entropy, batches)
    params = dict(model.named_parameters())
    half = (train[0][:T], train[1][:T])
    unrollc.compile(model, opt, F.cross_entropy)(half, batches[0]).apply()
    assert all(param is params[name] for name, param in model.named_parameters())
    assert all(param.is_leaf and param.requires_grad for param in params.values())
    found = ordinary.train(model, opt, F.cross_entropy, batches[T:])
    assert_close(found.params | found.buffers, wanted.params | wanted.buffers, rtol=1e-12)
    assert_close(flattened(found.opt_state), flattened(wanted.opt_state), rtol=1e-12)


def test_a_program_goes_on_where_its_applied_result_ends() -> None:
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.2)
    train = cases.batches((5, 4), 2 * T, seed=1)
    batches = unstack(train)
    wanted = ordinary.train(model, opt, F.cross_entropy, batches)
    program = unrollc.compile(model, opt, F.cross_entropy)
    for half in (slice(0, T), slice(T, 2 * T)):
        program((train[0][half], train[1][half]), batches[0]).apply()
    assert_close(dict(model.named_parameters()), wanted.params, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_batch_counts_advance_once_a_step(steps: int) -> None:
    model = ConvNet()
    model(torch.randn(6, 1, 4, 4))
    model(torch.randn(6, 1, 4, 4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = cases.batches((6, 1, 4, 4), steps, seed=1)
    val = unstack(train)[0]
    program = unrollc.compile(model, opt, F.cross_entropy)
    for _ in range(2):  # a second call starts again from the model
        result = program(train, val)
        result.loss.backward()
        for norm in ("norm1", "norm2"):
            count = result.buffers[f"{norm}.num_batches_tracked"]
            assert count.dtype == torch.long
            assert int(count) == 2 + steps
    assert int(model.norm1.num_batches_tracked) == 2
    result.apply()
    assert int(model.norm1.num_batches_tracked) == 2 + steps
    assert not model.norm1.running_mean.requires_grad


class Forms:
    def __init__(self) -> None:
        self.model = MLP()
        self.opt = torch.optim.Adam(self.model.parameters(), lr=0.05, eps=1e-2)
        self.stacked = cases.batches((5, 4), T, seed=1)
        self.val = unstack(cases.batches((5, 4), 1, seed=2))[0]
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy)

    def run(self, train: object) -> dict[str, Tensor]:
        result = self.program(train, self.val)
        params = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(result.loss, list(params.values()))
        found = {f"gradient of {n}": g for n, g in zip(params, gradients, strict=True)}
        return {"loss": result.loss.detach(), **result.params, **found}


def test_a_list_and_a_stacked_tuple_are_the_same() -> None:
    forms = Forms()
    stacked = forms.run(forms.stacked)
    assert_close(forms.run(unstack(forms.stacked)), stacked, rtol=1e-13)
    assert_close(forms.run([list(batch) for batch in unstack(forms.stacked)]), stacked, rtol=1e-13)


def test_a_repeated_batch_is_a_list_of_the_same() -> None:
    forms = Forms()
    batch = unstack(forms.stacked)[0]
    repeated = forms.run(unrollc.repeat(batch, T))
    assert_close(forms.run([batch] * T), repeated, rtol=1e-13)
    again = (batch[0].expand(T, *batch[0].shape), batch[1].expand(T, *batch[1].shape))
    assert_close(forms.run(again), repeated, rtol=1e-13)
    assert_close(forms.run(unrollc.repeat(list(batch), T)), repeated, rtol=1e-13)


def test_batches_that_are_not_contiguous() -> None:
    forms = Forms()
    inputs, target = forms.stacked
    strange = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strange.is_contiguous()
    assert_close(forms.run((strange, target)), forms.run(forms.stacked), rtol=1e-13)


def test_no_grad_adapts_and_evaluates_only() -> None:
    case = cases.build("conv", "adam", T)
    program = compiled(case)
    recorded = program(case.train, case.val)
    with torch.no_grad():
        result = program(case.train, case.val)
    assert recorded.loss.requires_grad
    assert not result.loss.requires_grad
    assert result.loss.grad_fn is None
    assert torch.equal(result.loss, recorded.loss)
    assert_close(result.params, recorded.params, rtol=0)
    assert_close(result.buffers, recorded.buffers, rtol=0)


def test_no_grad_keeps_nothing() -> None:
    """The peak under no_grad does not grow with T; with gradients every state is kept."""
    model = MLP(hidden=64)
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    program = unrollc.compile(model, opt, F.cross_entropy)

    def used(steps: int, grad: bool) -> memory.Usage:
        train = cases.batches((5, 4), steps, seed=1)
        program.lower(train, unstack(train)[0])
        with torch.set_grad_enabled(grad):
            return memory.measure(lambda: program(train, unstack(train)[0]))

    state = sum(3 * param.numel() * 8 for param in model.parameters())  # θ and Adam's moments
    few, many = used(4, grad=False), used(24, grad=False)
    assert many.peak - few.peak < state
    assert many.kept - few.kept < state
    few, many = used(4, grad=True), used(24, grad=True)
    assert many.peak - few.peak > 18 * state
