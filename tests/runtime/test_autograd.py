"""``result.loss`` is an ordinary autograd node: what comes before it, after it and beside it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import compiled, gradients
from tests.oracles import cases, eager
from tests.oracles.cases import Case
from tests.oracles.compare import assert_close
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

T = 3


@pytest.fixture
def case() -> Case:
    return cases.build("mlp", "sgd-momentum", T)


def scaled(values: dict[str, Tensor | None], factor: float) -> dict[str, Tensor | None]:
    return {name: None if value is None else factor * value for name, value in values.items()}


def collected(case: Case) -> dict[str, Tensor | None]:
    return {name: tensor.grad for name, tensor in case.meta.items()}


def test_what_comes_after_the_loss(case: Case) -> None:
    def outer(loss: Tensor) -> Tensor:
        return (3 * loss).exp() + case.model.hidden.weight.square().sum()

    wanted = gradients(outer(case.unroll().loss), case.meta)
    outer(compiled(case)(case.train, case.val).loss).backward()
    assert_close(collected(case), wanted)


def test_what_comes_before_the_inputs(case: Case) -> None:
    """Inputs, a rate and targets may come out of another network."""
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    log_rate = torch.tensor(-2.0, requires_grad=True)
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    raw, target = cases.batches((5, 4), T, seed=1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    meta = {**dict(encoder.named_parameters()), "log_rate": log_rate, "bias": model.hidden.bias}
    opt.param_groups[0]["lr"] = log_rate.exp()
    train, val = (encoder(raw), target), (encoder(raw[0]), target[0])
    wanted = gradients(eager.unroll(model, opt, F.cross_entropy, unstack(train), val).loss, meta)
    program(train, val).loss.backward()
    assert_close({name: tensor.grad for name, tensor in meta.items()}, wanted)


def test_the_sum_of_two_programs(case: Case) -> None:
    """They share the model, hence θ_0, but nothing else."""
    other = torch.optim.Adam(case.model.parameters(), lr=0.05, eps=1e-2)
    batches = unstack(case.train)
    second = eager.unroll(case.model, other, F.cross_entropy, batches, case.val)
    wanted = gradients(case.unroll().loss + 2 * second.loss, case.meta)
    first = compiled(case)(case.train, case.val)
    second = unrollc.compile(case.model, other, F.cross_entropy)(case.train, case.val)
    (first.loss + 2 * second.loss).backward()
    assert_close(collected(case), wanted)


def test_the_mean_over_tasks_of_one_program() -> None:
    """MAML's outer loss: one program, several tasks, one backward."""
    model = MLP()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    tasks = [cases.batches((5, 4), T + 1, seed=seed) for seed in range(3)]
    theta = dict(model.named_parameters())
    wanted, found = torch.zeros(()), torch.zeros(())
    for inputs, target in tasks:
        train, val = (inputs[:T], target[:T]), (inputs[T], target[T])
        wanted = wanted + eager.unroll(model, opt, F.cross_entropy, unstack(train), val).loss
        found = found + program(train, val).loss
    wanted = gradients(wanted / 3, theta)
    (found / 3).backward()
    assert_close({name: tensor.grad for name, tensor in theta.items()}, wanted)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_calls_before_either_backward(case: Case, order: tuple[int, int]) -> None:
    """A call keeps what its own backward needs; the other call must not write over it."""
    program = compiled(case)
    trains = [case.train, (case.train[0].detach().flip(1).requires_grad_(), case.train[1])]
    results = [program(train, case.val) for train in trains]
    theta = {"weight": case.model.hidden.weight, "lr": case.meta["lr"]}
    for which in order:
        alone = cases.build("mlp", "sgd-momentum", T)
        alone = Case(**{**vars(alone), "train": trains[which]})
        wanted = gradients(
            alone.unroll().loss, {"weight": alone.model.hidden.weight, "lr": alone.meta["lr"]}
        )
        found = torch.autograd.grad(results[which].loss, list(theta.values()))
        assert_close(dict(zip(theta, found, strict=True)), wanted)


def test_results_of_a_call_outlive_the_next_call(case: Case) -> None:
    program = compiled(case)
    first = program(case.train, case.val)
    kept = {name: value.clone() for name, value in first.params.items()}
    loss = first.loss.detach().clone()
    inner_losses = first.inner_losses.clone()
    other = (case.train[0].detach() + 1).requires_grad_(), case.train[1]
    program(other, case.val).loss.backward()
    assert_close(first.params, kept, rtol=0)
    assert torch.equal(first.loss, loss)
    assert torch.equal(first.inner_losses, inner_losses)


def test_retain_graph_twice_doubles_the_gradients(case: Case) -> None:
    wanted = gradients(case.unroll().loss, case.meta)
    result = compiled(case)(case.train, case.val)
    result.loss.backward(retain_graph=True)
    assert_close(collected(case), wanted)
    result.loss.backward()
    assert_close(collected(case), scaled(wanted, 2))


def test_a_second_backward_raises_what_pytorch_raises(case: Case) -> None:
    result = compiled(case)(case.train, case.val)
    result.loss.backward()
    before = {name: grad.clone() for name, grad in collected(case).items()}
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        result.loss.backward()
    assert_close(collected(case), before, rtol=0)


@pytest.mark.parametrize("names", [["lr"], ["loss.weight", "theta_0.hidden.bias"]])
def test_grad_of_a_subset(case: Case, names: list[str]) -> None:
    wanted = gradients(case.unroll().loss, case.meta)
    result = compiled(case)(case.train, case.val)
    found = torch.autograd.grad(result.loss, [case.meta[name] for name in names])
    found = dict(zip(names, found, strict=True))
    assert_close(found, {name: wanted[name] for name in names})
    assert all(tensor.grad is None for tensor in case.meta.values())


def test_an_unrelated_tensor_is_unused(case: Case) -> None:
    other = torch.ones((), requires_grad=True)
    result = compiled(case)(case.train, case.val)
    with pytest.raises(RuntimeError, match="allow_unused"):
        torch.autograd.grad(result.loss, [other])


def test_gradients_accumulate_over_calls(case: Case) -> None:
    wanted = gradients(case.unroll().loss, case.meta)
    program = compiled(case)
    for _ in range(3):
        program(case.train, case.val).loss.backward()
    assert_close(collected(case), scaled(wanted, 3))


def test_gradients_do_not_share_memory(case: Case) -> None:
    """A user may clip or zero one .grad in place."""
    program = compiled(case)
    program(case.train, case.val).loss.backward()
    storages = {tensor.grad.untyped_storage().data_ptr() for tensor in case.meta.values()}
    pointers = {tensor.untyped_storage().data_ptr() for tensor in case.meta.values()}
    assert len(storages) == len(case.meta)
    assert not storages & pointers
    for tensor in case.meta.values():
        tensor.grad.zero_()
    wanted = gradients(case.unroll().loss, case.meta)
    program(case.train, case.val).loss.backward()
    assert_close(collected(case), wanted)


@pytest.mark.parametrize("name", ["theta_0.hidden.weight", "lr", "train inputs", "loss.weight"])
def test_changes_between_call_and_backward(case: Case, name: str) -> None:
    """The right gradient of the call, or an error; never that of a mixture."""
    wanted = gradients(case.unroll().loss, case.meta)
    result = compiled(case)(case.train, case.val)
    with torch.no_grad():
        case.meta[name].mul_(1.5)
    try:
        result.loss.backward()
    except (RuntimeError, unrollc.UnrollcError) as error:
        assert "modified" in str(error)
    else:
        assert_close(collected(case), wanted)


def test_an_outer_optimizer_step_between_calls(case: Case) -> None:
    """Meta-training: each call sees the weights as the outer optimizer left them."""
    program = compiled(case)
    outer = torch.optim.SGD(list(case.meta.values()), lr=0.1)
    for _ in range(3):
        wanted = gradients(case.unroll().loss, case.meta)
        outer.zero_grad()
        program(case.train, case.val).loss.backward()
        assert_close(collected(case), wanted)
        outer.step()


def test_differentiating_the_meta_gradient_is_refused(case: Case) -> None:
    """A second derivative through a program would be silently wrong: it must not be zero."""
    result = compiled(case)(case.train, case.val)
    lr = case.meta["lr"]
    with pytest.raises((RuntimeError, unrollc.UnrollcError)):
        (gradient,) = torch.autograd.grad(result.loss, [lr], create_graph=True)
        torch.autograd.grad(gradient.square(), [lr])


def test_a_hook_on_the_loss_and_on_a_meta_parameter(case: Case) -> None:
    wanted = gradients(case.unroll().loss, case.meta)
    seen: list[Tensor] = []
    result = compiled(case)(case.train, case.val)
    result.loss.register_hook(lambda grad: 2 * grad)
    handle = case.meta["lr"].register_hook(seen.append)
    result.loss.backward()
    handle.remove()
    assert_close(collected(case), scaled(wanted, 2))
    assert len(seen) == 1


def test_enable_grad_within_no_grad(case: Case) -> None:
    program = compiled(case)
    with torch.no_grad(), torch.enable_grad():
        assert program(case.train, case.val).loss.requires_grad
    with torch.inference_mode():
        assert not program(case.train, case.val).loss.requires_grad
