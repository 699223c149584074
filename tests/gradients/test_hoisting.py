"""What no step changes is computed once: the same gradients, and less to do in a step."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.gradients.programs import assert_equals_eager, gradients
from tests.oracles import eager, memory
from tests.oracles.compare import assert_close, relative_error
from tests.oracles.objectives import Objective
from unrollc.optimize.hoist import moved_by
from unrollc.plan.pieces import Pieces
from unrollc.runtime.lowering import Lowered
from unrollc.step import Role

pytestmark = pytest.mark.usefixtures("float64")

T = 6
ROWS, FEATURES, WIDTH, CLASSES = 12, 5, 16, 3


class Anil(nn.Module):
    """A body that the inner loop leaves alone, and a head that it adapts (Raghu et al. 2020)."""

    def __init__(self, extra: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.Tanh(), extra(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
        )
        self.head = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


class Setting:
    """The model, an optimizer over its head, one batch for all steps, and the meta-parameters."""

    def __init__(
        self, *, adam: bool = False, frozen: bool = False, extra: Any = nn.Identity
    ) -> None:
        torch.manual_seed(0)
        self.model = Anil(extra)
        self.model.body.requires_grad_(not frozen)
        self.rate = torch.tensor(0.1, requires_grad=True)
        head = self.model.head.parameters()
        self.opt: torch.optim.Optimizer = (
            torch.optim.Adam(head, lr=self.rate, eps=1e-2)
            if adam
            else torch.optim.SGD(head, lr=self.rate, momentum=0.9)
        )
        x, y = batch(1)
        self.batch = (x.requires_grad_(not frozen), y)
        self.val = batch(2)

    @property
    def meta(self) -> dict[str, Tensor]:
        named = {"rate": self.rate, "x": self.batch[0], **dict(self.model.named_parameters())}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def compiled(self, **options: Any) -> unrollc.Program:
        return unrollc.compile(self.model, self.opt, F.cross_entropy, **options)

    def unroll(self, **options: Any) -> eager.Unrolled:
        train = [self.batch] * T
        return eager.unroll(self.model, self.opt, F.cross_entropy, train, self.val, **options)


def ops(pieces: Pieces) -> list[int]:
    """Matrix products of a step, for each of the distinct steps."""
    product = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return [sum(n.target in product for n in step.graph.nodes) for step in pieces.steps]


def hoisted(lowered: Lowered) -> int:
    prologue = lowered.pieces.prologue
    return 0 if prologue is None else len(prologue.outputs)


# -- exact under everything ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "adam", "backend"),
    [
        (False, False, "aten"),
        (True, False, "aten"),
        (False, True, "aten"),
        (True, True, "aten"),
        (False, True, "inductor"),
    ],
)
def test_features_are_computed_once(frozen: bool, adam: bool, backend: str) -> None:
    setting = Setting(adam=adam, frozen=frozen)
    program = setting.compiled(backend=backend)
    train = unrollc.repeat(setting.batch, T)
    lowered = program.lower(train, setting.val)
    assert hoisted(lowered) == 1
    assert (lowered.pieces.epilogue is None) == frozen
    assert max(ops(lowered.pieces)) == 2 + 3, "two products of the head and three for its gradient"
    assert_equals_eager(program(train, setting.val), setting.unroll(), setting.meta)


@pytest.mark.parametrize(
    ("options", "of_oracle"),
    [
        ({"memory": "20KiB"}, {}),
        ({"gradient": unrollc.FirstOrder()}, {"first_order": True}),
        ({"gradient": unrollc.Truncated(2)}, {"truncated": 2}),
    ],
    ids=["checkpointed", "first order", "truncated"],
)
def test_under_other_schedules(options: dict[str, Any], of_oracle: dict[str, Any]) -> None:
    setting = Setting()
    if "first_order" in of_oracle:
        setting.batch[0].requires_grad_(False)  # it acts through the inner gradient alone
    expected = setting.unroll(**of_oracle)
    program = setting.compiled(backend="aten", **options)
    train = unrollc.repeat(setting.batch, T)
    lowered = program.lower(train, setting.val)
    assert hoisted(lowered) == 1
    if "memory" in options:
        assert lowered.plan.schedule.recomputed > 0
    assert_equals_eager(program(train, setting.val), expected, setting.meta)


def test_spilled_and_taken_up_again(tmp_path: Path) -> None:
    setting = Setting()
    program = setting.compiled(backend="aten", spill=tmp_path)
    train = unrollc.repeat(setting.batch, T)
    assert hoisted(program.lower(train, setting.val)) == 1
    assert_equals_eager(program(train, setting.val), setting.unroll(), setting.meta)


def test_backward_twice() -> None:
    setting = Setting()
    expected = gradients(setting.unroll().loss, setting.meta)
    result = setting.compiled(backend="aten")(unrollc.repeat(setting.batch, T), setting.val)
    for again in (True, False):
        result.loss.backward(retain_graph=again)
        found = {name: tensor.grad for name, tensor in setting.meta.items()}
        assert_close(found, expected, rtol=1e-10)
        for tensor in setting.meta.values():
            tensor.grad = None


def test_without_gradients() -> None:
    setting = Setting()
    program = setting.compiled(backend="aten")
    with torch.no_grad():
        train = unrollc.repeat(setting.batch, T)
        assert hoisted(program.lower(train, setting.val)) == 1
        result = program(train, setting.val)
    assert relative_error(result.loss, setting.unroll().loss) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_tasks(reduction: str) -> None:
    setting = Setting()
    setting.batch[0].requires_grad_(False)
    tasks = [(unrollc.repeat(batch(seed), T), batch(seed + 10)) for seed in range(3)]
    losses = []
    for seed in range(3):
        train = [batch(seed)] * T
        run = eager.unroll(setting.model, setting.opt, F.cross_entropy, train, batch(seed + 10))
        losses.append(run.loss)
    expected = gradients(torch.stack(losses).mean(), setting.meta)
    result = setting.compiled(backend="aten").batched(tasks, reduction=reduction)
    result.loss.mean().backward()
    found = {name: tensor.grad for name, tensor in setting.meta.items()}
    assert_close(found, expected, rtol=1e-10)


def test_the_saved_program_computes_it_too(tmp_path: Path) -> None:
    setting = Setting()
    program = setting.compiled(backend="aten")
    train = unrollc.repeat(setting.batch, T)
    program.lower(train, setting.val).save(tmp_path / "meta.py")
    spec = importlib.util.spec_from_file_location("meta", tmp_path / "meta.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = program.inputs(train, setting.val)
    loss, found = module.loss_and_gradients(inputs)
    expected = setting.unroll()
    assert relative_error(loss, expected.loss) < 1e-12
    labels = {"rate": 'param_groups[0]["lr"]', "x": "train.inputs"}
    wanted = gradients(expected.loss, setting.meta)
    assert found.keys() == {labels.get(name, name) for name in wanted}
    assert_close({name: found[labels.get(name, name)] for name in wanted}, wanted, rtol=1e-10)


@pytest.mark.parametrize("budget", [None, "20KiB"])
def test_the_predicted_peak_is_the_measured_one(budget: str | None) -> None:
    setting = Setting()
    program = setting.compiled(backend="aten", memory=budget)
    train = unrollc.repeat(setting.batch, T)
    lowered = program.lower(train, setting.val)
    assert hoisted(lowered) == 1

    def run() -> None:
        for tensor in setting.meta.values():
            tensor.grad = None
        program(train, setting.val).loss.backward()

    run()
    measured = memory.measure(run).peak
    assert abs(measured - lowered.plan.peak_bytes) <= 0.02 * measured + 256


def test_a_broken_twin_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cotangents that are not pulled back leave the body without its gradient."""
    setting = Setting()
    program = setting.compiled(backend="aten")
    train = unrollc.repeat(setting.batch, T)
    generated = program.lower(train, setting.val).generated
    broken = generated.text.replace("gradients['body.0.weight'].add_(", "(")
    assert broken != generated.text
    object.__setattr__(generated, "text", broken)
    with pytest.raises(AssertionError, match=r"body\.0\.weight"):
        assert_equals_eager(program(train, setting.val), setting.unroll(), setting.meta)


class Handed(torch.autograd.Function):
    """A loss whose declared gradient is the same wherever θ is."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return (theta * gradient).sum()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.clone(), None


class SquashedSGD(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * torch.tanh(p.grad))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, WIDTH) / 4)
        self.theta = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.weight) @ self.weight.t()) @ self.weight


@pytest.mark.parametrize("first_order", [False, True])
def test_a_gradient_that_no_step_changes(first_order: bool) -> None:
    """It is what a first-order gradient takes as a constant, however early it is computed."""
    model, rate = Linear(), torch.tensor(0.1, requires_grad=True)
    (x, _), (y, _) = batch(1), batch(2)

    def evaluated(adapted: nn.Module, given: Tensor) -> Tensor:
        loss: Tensor = (adapted(given) @ adapted.theta).square().mean()
        return loss

    program = unrollc.compile(
        model,
        SquashedSGD([model.theta], {"lr": rate}),
        unrollc.objective(
            lambda adapted, given: Handed.apply(adapted.theta, adapted(given).mean(0))
        ),
        val_loss=unrollc.objective(evaluated),
        gradient=unrollc.FirstOrder() if first_order else "exact",
        backend="aten",
    )
    result = program(unrollc.repeat(x, T), y)
    theta, gradient = model.theta, model(x).mean(0)
    for _ in range(T):
        theta = theta - rate * torch.tanh(gradient.detach() if first_order else gradient)
    expected = (model(y) @ theta).square().mean()
    meta = {"rate": rate, **dict(model.named_parameters())}
    assert_close(gradients(result.loss, meta), gradients(expected, meta), rtol=1e-10)


# -- what is hoisted, and what is not --------------------------------------------------------------


def test_a_list_of_one_batch_is_that_batch_repeated() -> None:
    setting = Setting()
    program = setting.compiled(backend="aten")
    train = [setting.batch] * T
    assert hoisted(program.lower(train, setting.val)) == 1
    assert_equals_eager(program(train, setting.val), setting.unroll(), setting.meta)


def test_a_batch_a_step_is_not_hoisted() -> None:
    setting = Setting()
    program = setting.compiled(backend="aten")
    others = [batch(seed) for seed in range(T)]
    stacked = tuple(torch.stack(column) for column in zip(*others, strict=True))
    for train in (others, stacked):
        assert hoisted(program.lower(train, setting.val)) == 0


def test_noise_stays_in_the_step() -> None:
    """What is before it is hoisted; what a step draws is not the next one's."""
    setting = Setting(extra=lambda: nn.Dropout(0.5), frozen=True)
    program = setting.compiled(backend="aten")
    lowered = program.lower(unrollc.repeat(setting.batch, T), setting.val)
    prologue = lowered.pieces.prologue
    assert prologue is not None
    assert [value.name for value in prologue.outputs] == ["fixed_body_1_tanh"]
    assert not prologue.inputs_with(Role.NOISE)


@pytest.mark.parametrize("frozen", [False, True], ids=["meta-learned", "frozen"])
@pytest.mark.parametrize("options", [{}, {"affine": False, "momentum": 0.3}], ids=str)
def test_the_batch_is_normalised_once_and_counted_every_step(
    frozen: bool, options: dict[str, Any]
) -> None:
    setting = Setting(extra=lambda: nn.BatchNorm1d(WIDTH, **options), frozen=frozen)
    program = setting.compiled(backend="aten")
    train = unrollc.repeat(setting.batch, T)
    lowered = program.lower(train, setting.val)
    assert hoisted(lowered) == 3, "features, mean and variance"
    assert max(ops(lowered.pieces)) == 2 + 3
    assert_equals_eager(program(train, setting.val), setting.unroll(), setting.meta)


def test_running_statistics_carry_no_derivative() -> None:
    """A validation loss that reads them has none through them, as in PyTorch."""
    setting = Setting(extra=lambda: nn.BatchNorm1d(WIDTH))
    train = [setting.batch] * T

    def evaluated(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        body = model.body
        x = torch.tanh(body[0](given[0]))
        x = (x - body[2].running_mean) / (body[2].running_var + 1e-5).sqrt()
        return F.cross_entropy(model.head(torch.tanh(body[3](x))), given[1])

    program = setting.compiled(backend="aten", val_loss=unrollc.objective(evaluated))
    assert hoisted(program.lower(train, setting.val)) == 3
    expected = setting.unroll(val_loss=Objective(evaluated))
    assert_equals_eager(program(train, setting.val), expected, setting.meta)


class Remembering(nn.Module):
    """A model that keeps the features of its last batch in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.last: Tensor
        self.register_buffer("last", torch.zeros(WIDTH, ROWS))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x))
        self.last = features.detach().t()
        logits: Tensor = self.head(features)
        return logits


def test_what_a_step_returns_is_no_memory_of_the_program() -> None:
    model = Remembering()
    opt = torch.optim.SGD(model.head.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy, backend="aten")
    given = batch(1), batch(2)
    results = [program(unrollc.repeat(given[0], T), given[1]) for _ in range(2)]
    first, second = (result.buffers["last"] for result in results)
    with torch.no_grad():
        expected = torch.tanh(model.body(given[0][0])).t()
        first.zero_()
    assert relative_error(second, expected) < 1e-12


class Scaled(nn.Module):
    """A fixed body whose features are scaled by one meta-parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.body = nn.Linear(FEATURES, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.scale * torch.tanh(self.body(x))))
        return logits


def test_few_meta_parameters_are_left_to_forward_mode() -> None:
    """Fixed features go before the loop; what the meta-parameter moves stays in the step."""
    model = Scaled()
    opt = torch.optim.SGD(model.head.parameters(), lr=0.1)
    steps = 40
    program = unrollc.compile(
        model, opt, F.cross_entropy, meta=[model.scale], backend="aten", memory="16KiB"
    )
    train, val = unrollc.repeat(batch(1), steps), batch(2)
    lowered = program.lower(train, val)
    assert lowered.pieces.directions, lowered.plan.forward
    assert hoisted(lowered) == 1 and lowered.pieces.epilogue is None
    expected = eager.unroll(model, opt, F.cross_entropy, [batch(1)] * steps, val)
    assert_equals_eager(program(train, val), expected, {"scale": model.scale})


def test_cheap_values_of_meta_parameters_do_not_cost_mixed_mode() -> None:
    """``x * w`` alone is not worth the gradients that mixed mode needs."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(FEATURES))
            self.net = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x * self.weight)
            return logits

    model = Weighted()
    opt = torch.optim.SGD(model.net.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy, backend="aten")
    train, val = unrollc.repeat(batch(1), T), batch(2)
    lowered = program.lower(train, val)
    wanted = frozenset({(Role.CONTEXT, "weight")})
    assert not moved_by(lowered.pieces.prologue, wanted)
    expected = eager.unroll(model, opt, F.cross_entropy, [batch(1)] * T, val)
    assert_equals_eager(program(train, val), expected, dict(model.named_parameters()))


def test_a_mask_is_made_once_for_all_layers() -> None:
    """Equal values are one, whichever layer computes them."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleList([nn.Linear(FEATURES, FEATURES) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.net:
                x = torch.tanh(layer(x)) * torch.ones(ROWS, FEATURES).tril()
            return x

    model = Masked()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, lambda p, t: p.square().mean(), backend="aten")
    others = [batch(seed) for seed in range(T)]
    lowered = program.lower(others, batch(9))
    assert hoisted(lowered) == 1
    expected = eager.unroll(model, opt, lambda p, t: p.square().mean(), others, batch(9))
    assert_equals_eager(program(others, batch(9)), expected, dict(model.named_parameters()))


def test_two_programs_of_one_text_are_equal() -> None:
    texts = set()
    for _ in range(2):
        setting = copy.deepcopy(Setting())
        program = setting.compiled(backend="aten")
        texts.add(program.lower(unrollc.repeat(setting.batch, T), setting.val).code)
    assert len(texts) == 1
