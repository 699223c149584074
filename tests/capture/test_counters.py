"""What an optimizer keeps outside its state: counters, attributes, objects, wrapped optimizers."""

import functools
import itertools
import math
import types
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import unrollc
from tests.oracles import cases, finite, ordinary
from tests.oracles.compare import assert_close
from tests.oracles.models import MLP
from tests.oracles.objectives import unstack

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (5, 4)
T = 4


class Plain(torch.optim.Optimizer):
    """SGD whose rate is scaled by a factor that subclasses compute."""

    def __init__(self, params: Any, lr: Any = 0.1, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, **defaults})

    def factor(self, group: dict[str, Any]) -> Any:
        return 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            factor = self.factor(group)
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"] * factor)


class InGroup(Plain):
    """The counter is a number in the param group, made by the first step."""

    def factor(self, group: dict[str, Any]) -> Any:
        group["step"] = group.get("step", 0) + 1
        return math.sqrt(1.0 - 0.9 ** group["step"]) / (1.0 - math.pow(0.5, group["step"]))


class OnSelf(Plain):
    """The counter is an attribute."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.count = 0

    def factor(self, group: dict[str, Any]) -> Any:
        self.count += 1
        return 1.0 / self.count


class Cosine:
    """A schedule that counts by itself."""

    def __init__(self, period: int) -> None:
        self.period, self.now = period, 0

    def __call__(self) -> float:
        self.now += 1
        return 0.5 + 0.5 * math.cos(math.pi * self.now / self.period)


class Ticks:
    """A counter in a slot."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0


class InSlot(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.ticks = Ticks()

    def factor(self, group: dict[str, Any]) -> Any:
        self.ticks.now += 1
        return 1.0 / self.ticks.now


class InObject(Plain):
    """The counter belongs to an object, reached in two ways."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.schedule = Cosine(10)
        self.schedules = [self.schedule]

    def factor(self, group: dict[str, Any]) -> Any:
        return self.schedule() + self.schedules[0].now


class Aliased(Plain):
    """Two names for one number: ``+=`` changes one of them."""

    def factor(self, group: dict[str, Any]) -> Any:
        before = group.setdefault("step", 0)
        group["step"] += 1
        rate = group["lr"]
        rate *= 2.0
        return 1.0 / (1 + before) + rate


class InSet(Plain):
    """The step is looked up in a set and branched on."""

    milestones: ClassVar[set[int]] = {2, 3}

    def factor(self, group: dict[str, Any]) -> Any:
        step = group["step"] = group.get("step", 0) + 1
        return 0.5 if step in self.milestones else (2.0 if step % 4 == 0 else 1.0)


class Queue(Plain):
    """The last two gradients, in a deque on the optimizer, by parameter and by its id."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.held = list(self.param_groups[0]["params"])
        self.queues = {id(param): deque(maxlen=2) for param in self.held}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.held:
            queue = self.queues[id(param)]
            queue.append(param.grad.clone())
            param.sub_(0.1 * sum(queue))


class Buffer(Plain):
    """Tensors on the optimizer: one written to, one rebound, one that stays."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.mask = torch.tensor([1.0, 0.5])
        self.sizes = {"mean": [torch.zeros(2)]}
        self.last = torch.zeros(2)

    def factor(self, group: dict[str, Any]) -> Any:
        mean = self.sizes["mean"][0]
        size = torch.stack([param.grad.norm() for param in group["params"][:2]])
        mean.lerp_(size * self.mask, 0.5)
        self.last = self.last + mean
        return 1.0 / (1.0 + mean.sum() + self.last.sum())


class Wrapper(Plain):
    """Steps another optimizer and pulls the weights back to where they were."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params)
        self.inner = torch.optim.SGD(params, lr=0.3, momentum=0.9, foreach=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = self.inner.param_groups[0]["params"]
        before = [param.clone() for param in params]
        self.inner.step()
        for param, old in zip(params, before, strict=True):
            param.lerp_(old, 0.5)


class ReadOut(Plain):
    """Numbers of the data: a norm by ``.item()``, a clip by ``min``, a root by `math`."""

    def factor(self, group: dict[str, Any]) -> Any:
        size = sum(param.grad.square().sum() for param in group["params"]).item()
        group["largest"] = max(group.get("largest", 0.0), math.sqrt(size))
        return min(1.0, 0.3 / group["largest"]) * math.log(2.0 + size)


KINDS = [InGroup, OnSelf, InSlot, InObject, Aliased, InSet, Queue, Buffer, Wrapper, ReadOut]


def problem(
    kind: Callable[..., torch.optim.Optimizer], steps: int = T
) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    model = MLP()
    train = cases.batches(SHAPE, steps + 1, seed=1)
    batches = unstack(train)
    return model, kind(model.parameters()), batches[:steps], batches[steps]


def train_eagerly(model: Any, opt: torch.optim.Optimizer, batches: Any) -> None:
    for inputs, target in batches:
        opt.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        opt.step()


@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_the_way_back(kind: type[Plain]) -> None:
    """θ_T is that of eager steps, the meta-gradient that of differences, and after `apply` the
    optimizer goes on where eager training would."""
    model, opt, batches, val = problem(kind)
    program = unrollc.compile(model, opt, F.cross_entropy)
    result = program(batches, val)
    eager_model, eager_opt, *_ = problem(kind)
    train_eagerly(eager_model, eager_opt, batches)
    assert_close(result.params, dict(eager_model.named_parameters()))

    weight = model.hidden.weight
    (ours,) = torch.autograd.grad(result.loss, [weight])

    def loss() -> Tensor:
        other, optimizer, *_ = problem(kind)
        other.load_state_dict(model.state_dict())
        train_eagerly(other, optimizer, batches)
        with torch.no_grad():
            return F.cross_entropy(other(val[0]), val[1])

    finite.assert_gradient(loss, weight, ours, directions=1, step=1e-3)

    result.apply()
    train_eagerly(model, opt, [val])
    train_eagerly(eager_model, eager_opt, [val])
    assert_close(dict(model.named_parameters()), dict(eager_model.named_parameters()))


@pytest.mark.parametrize("kind", [InGroup, OnSelf, InObject, Queue, Buffer, ReadOut])
def test_steps_are_shared(kind: type[Plain]) -> None:
    """Numbers that change from step to step do not make each step a program of its own."""
    model, opt, batches, val = problem(kind, steps=12)
    with torch.no_grad():
        lowered = unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)
    assert len(lowered.loop.kinds) <= 3
    before = {key: value for key, value in vars(opt).items() if isinstance(value, int)}
    assert before == {k: v for k, v in vars(problem(kind)[1]).items() if isinstance(v, int)}
    assert "step" not in opt.param_groups[0]


@pytest.mark.parametrize("kind", [InGroup, OnSelf])
def test_counters_that_went_on_do_not_lower_again(kind: type[Plain]) -> None:
    """They are inputs; only where a counter appears for the first time there is another program."""
    model = MLP()
    opt = kind(model.parameters())
    batch = unstack(cases.batches(SHAPE, 1, seed=1))[0]
    program = unrollc.compile(model, opt, F.cross_entropy)
    found = []
    for _ in range(3):
        found.append(program.lower([batch] * T, batch))
        result = program([batch] * T, batch)
        trained = ordinary.train(model, opt, F.cross_entropy, [batch] * T)
        assert_close(result.params, trained.params, rtol=1e-12)
        result.apply()
    assert found[2] is found[1]


def test_a_rate_that_is_a_tensor_is_not_written_to() -> None:
    """``rate = group["lr"]; rate *= 2`` leaves a number as it is, and a tensor in its place too."""
    model, _, batches, val = problem(Aliased)
    lr = torch.tensor(0.1, requires_grad=True)
    opt = Aliased(model.parameters(), lr=lr)
    (ours,) = torch.autograd.grad(
        unrollc.compile(model, opt, F.cross_entropy, meta=[lr])(batches, val).loss, [lr]
    )

    def loss() -> Tensor:
        other, _, *_ = problem(Aliased)
        train_eagerly(other, Aliased(other.parameters(), lr=lr.item()), batches)
        with torch.no_grad():
            return F.cross_entropy(other(val[0]), val[1])

    finite.assert_gradient(loss, lr, ours, step=1e-2)


class Writing(Plain):
    def factor(self, group: dict[str, Any]) -> Any:
        group["lr"].mul_(0.5)
        return 1.0


def test_writing_to_a_rate_is_refused() -> None:
    model, _, batches, val = problem(Plain)
    opt = Writing(model.parameters(), lr=torch.tensor(0.1))
    with pytest.raises(unrollc.CaptureError, match="writes to the tensor"):
        unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)


def test_an_iterator_is_refused() -> None:
    model, opt, batches, val = problem(Plain)
    opt.steps = itertools.count(1)
    with pytest.raises(unrollc.CaptureError, match=r"optimizer\.steps is an iterator"):
        unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)


class InText(Plain):
    """Two momenta, named by the step's parity, take turns."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.count = 0

    def key(self) -> Any:
        return f"buffer {self.count % 2}"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state, key = self.state[param], self.key()
                state[key] = 0.9 * state.get(key, torch.zeros_like(param)) + param.grad
                param.sub_(group["lr"] * state[key])
        self.count += 1


class InStr(InText):
    def key(self) -> Any:
        return "buffer " + str(self.count % 2)


class AsKey(InText):
    def key(self) -> Any:
        return self.count % 2


@pytest.mark.parametrize("kind", [InText, InStr])
def test_a_counter_in_the_name_of_an_entry(kind: type[InText]) -> None:
    model, opt, batches, val = problem(kind)
    with torch.no_grad():
        result = unrollc.compile(model, opt, F.cross_entropy)(batches, val)
    expected = ordinary.train(model, opt, F.cross_entropy, batches)
    assert_close(result.params, expected.params, rtol=1e-12)
    assert [set(state) for state in result.opt_state.values()] == [
        {"buffer 0", "buffer 1"} for _ in expected.params
    ]


def test_a_counter_that_becomes_a_key_is_refused() -> None:
    model, opt, batches, val = problem(AsKey)
    with pytest.raises(unrollc.CaptureError, match="has a key that was computed from a number"):
        unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)


class AsksForType(OnSelf):
    def factor(self, group: dict[str, Any]) -> Any:
        self.count += 1
        return 1.0 / self.count if isinstance(self.count, int) else 0.1


def test_code_that_asks_for_the_type_of_a_counter_is_refused() -> None:
    model, opt, batches, val = problem(AsksForType)
    with pytest.raises(unrollc.CaptureError, match=r"is a tensor: optimizer\.count"):
        unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)


COUNT = [0]


def _closure() -> Callable[[], int]:
    count = 0

    def next_count() -> int:
        nonlocal count
        count += 1
        return count

    return next_count


class Elsewhere(Plain):
    """Counts in a place that no step hands to the next."""

    calls = 0

    def __init__(self, params: Any, place: str) -> None:
        super().__init__(params)
        self.place, self.counter = place, Counter()
        self.namespace = types.SimpleNamespace(count=0)
        self.closure = _closure()

    def factor(self, group: dict[str, Any]) -> Any:
        if self.place == "a subclass of dict":
            self.counter["step"] += 1
            return 1.0 / self.counter["step"]
        if self.place == "a namespace":
            self.namespace.count += 1
            return 1.0 / self.namespace.count
        if self.place == "a closure":
            return 1.0 / self.closure()
        if self.place == "the class":
            type(self).calls += 1
            return 1.0 / type(self).calls
        COUNT[0] += 1
        return 1.0 / COUNT[0]


@pytest.mark.parametrize(
    "place", ["a subclass of dict", "a namespace", "a closure", "the class", "a global"]
)
def test_a_counter_that_no_step_hands_on_is_refused(place: str) -> None:
    model, opt, batches, val = problem(functools.partial(Elsewhere, place=place))
    with pytest.raises(unrollc.CaptureError, match="the step changes Python values"):
        unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)


class Branching(Plain):
    def factor(self, group: dict[str, Any]) -> Any:
        size = group["params"][0].grad.norm()
        return 1.0 / size if size > 1.0 else 1.0


class Masked(Plain):
    def factor(self, group: dict[str, Any]) -> Any:
        grad = group["params"][0].grad
        return grad[grad > 0].sum()


class Hessian(Plain):
    def factor(self, group: dict[str, Any]) -> Any:
        params = group["params"]
        grads = [param.grad for param in params]
        return sum(h.sum() for h in torch.autograd.grad(grads, params, grads))


@pytest.mark.parametrize(
    ("kind", "message", "line"),
    [
        (Branching, "depends on the data", "size > 1.0"),
        (Masked, "the shape of a result depends on the data", "grad[grad > 0]"),
        (Hessian, "differentiates the gradients", "torch.autograd.grad"),
    ],
)
def test_what_cannot_be_captured_names_its_line(kind: type[Plain], message: str, line: str) -> None:
    model, opt, batches, val = problem(kind)
    with pytest.raises(unrollc.CaptureError, match=message) as caught:
        unrollc.compile(model, opt, F.cross_entropy).lower(batches, val)
    assert line in str(caught.value)
