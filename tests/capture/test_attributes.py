"""What a forward keeps in Python attributes counts from step to step, as in ordinary training."""

from __future__ import annotations

import itertools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrollc
from tests.modules.around import assert_exact, classes, held, momentum, twin

pytestmark = pytest.mark.usefixtures("float64")


class Linear(nn.Module):
    """A linear layer, and places for attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls = 0
        self.last: Tensor | None = None
        self.scale: float | None = None
        self.log: dict[str, list[Any]] = {"shapes": []}


class Alternating(Linear):
    """Every other call is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (2.0 if self.calls % 2 else 0.5)


class Decided(Linear):
    """The first call decides about all later ones."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if self.scale is None:
            self.scale = 0.25
            return out
        return out * self.scale


class Remembering(Linear):
    """The output is kept for whoever wants to look at it."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last * (1.0 if self.scale is None else self.scale)


class Logging(Linear):
    """Appends to a list within a dictionary."""

    def forward(self, x: Tensor) -> Tensor:
        self.log["shapes"].append(tuple(x.shape))
        return self.layer(x) / len(self.log["shapes"])


class Settings:
    """A plain object that a model keeps."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.itself = self  # a cycle


class Configured(Linear):
    """Counts in an object within a list."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = [Settings()]

    def forward(self, x: Tensor) -> Tensor:
        self.settings[0].factor += 0.5
        return self.layer(x) * self.settings[0].factor


class Window(Linear):
    """Keeps its last two factors in a deque."""

    def __init__(self) -> None:
        super().__init__()
        self.recent = deque([0.5], maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.recent.append(self.recent[-1] + 0.25)
        return self.layer(x) * sum(self.recent)


class Ring(Linear):
    """Writes to one entry of a list that is long."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = [1.0] * 100

    def forward(self, x: Tensor) -> Tensor:
        self.entries[7] += 0.5
        return self.layer(x) * self.entries[7]


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (Configured, lambda model: [settings.factor for settings in model.settings]),
        (Window, lambda model: list(model.recent)),
        (Ring, lambda model: list(model.entries)),
    ],
)
def test_objects_and_containers_in_attributes_are_carried_and_put_back(
    kind: Callable[[], Linear], read: Callable[[Any], Any]
) -> None:
    model = kind()
    before = read(model)
    assert_exact(model, classes(steps=3), plain=twin(model, kind))
    assert read(model) == before == read(kind())


class Recording(Linear):
    """Counts in an object of its own, and turns a ring of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.record = types.SimpleNamespace(calls=0)
        self.ring = deque([1.0, 0.5, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        self.record.calls += 1
        self.ring.rotate(1)
        return self.layer(x) * (self.ring[0] / self.record.calls)


def test_attributes_of_objects_and_deques_are_carried() -> None:
    model = Recording()
    assert_exact(model, classes(steps=3), plain=twin(model, Recording))
    assert model.record.calls == 0 and list(model.ring) == [1.0, 0.5, 2.0]


def test_a_loss_that_counts_is_refused() -> None:
    model, calls = Linear(), [0]

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        return nn.functional.cross_entropy(prediction, target) / calls[0]

    model.forward = model.layer.forward  # type: ignore[method-assign]
    opt, _ = held(model, momentum)
    *train, val = classes(3)
    with pytest.raises(unrollc.CaptureError, match="the loss changes Python values"):
        unrollc.compile(model, opt, loss).lower(train, val)
    program = unrollc.compile(model, opt, nn.functional.cross_entropy, val_loss=loss)
    with pytest.raises(unrollc.CaptureError, match="the loss changes Python values"):
        program.lower(train, val)


class Viewed(Linear):
    """Reads a buffer that it changes through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2))
        self.view = self.count[:1]

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x) / (1 + self.view)


def test_a_view_of_a_buffer_that_changes_is_refused() -> None:
    model = Viewed()
    opt, _ = held(model, momentum)
    *train, val = classes(3)
    with pytest.raises(unrollc.CaptureError, match="reads count behind the model's back"):
        unrollc.compile(model, opt, nn.functional.cross_entropy).lower(train, val)


@pytest.mark.parametrize("kind", [Alternating, Decided, Remembering, Logging])
def test_attributes_are_carried_and_put_back(kind: type[Linear]) -> None:
    """Eager PyTorch goes on with what the step before left; so does the program."""
    model = kind()
    assert_exact(model, classes(steps=3), plain=twin(model, kind))
    assert model.calls == 0
    assert model.last is None and model.scale is None
    assert model.log == {"shapes": []}


def lowered(model: nn.Module, steps: int) -> Any:
    opt, _ = held(model, momentum)
    *train, val = classes(steps)
    return unrollc.compile(model, opt, nn.functional.cross_entropy).lower(train, val)


def test_a_step_stands_for_another_only_under_the_same_attributes() -> None:
    """A counter takes a capture for every step; an output that is only kept settles.

    In both the first step is of its own kind, since momentum starts there.
    """
    counting = lowered(Alternating(), 4).loop
    assert len(counting.kinds) == 4
    assert counting.sequence == (0, 1, 2, 1)
    assert lowered(Remembering(), 4).loop.kind_sequence == (0, 1, 1, 1)


def test_outputs_that_a_hook_collects_are_no_reason_for_another_capture() -> None:
    model, seen = Remembering(), {}
    model.layer.register_forward_hook(lambda module, given, out: seen.update(out=out))
    assert lowered(model, 4).loop.kind_sequence == (0, 1, 1, 1)


COUNT = [0]


def counting(prediction: Tensor, target: Tensor) -> Tensor:
    COUNT[0] += 1
    return nn.functional.cross_entropy(prediction, target) * COUNT[0]


@pytest.mark.parametrize("where", ["loss", "objective"])
def test_a_loss_that_changes_python_values_is_refused(where: str) -> None:
    """It runs once, when a step is captured; a module may count in its attributes."""
    model = Remembering()
    opt, _ = held(model, momentum)
    *train, val = classes(2)
    plain = nn.functional.cross_entropy
    loss: Any = {
        "loss": counting,
        "objective": unrollc.objective(lambda model, batch: counting(model(batch[0]), batch[1])),
    }[where]
    program = unrollc.compile(model, opt, loss, val_loss=plain)
    with pytest.raises(unrollc.CaptureError, match="changes Python values that it refers to"):
        program.lower(train, val)


def test_a_loss_may_run_a_model_that_counts() -> None:
    model = Alternating()
    opt, _ = held(model, momentum)
    *train, val = classes(2)

    def fn(given: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert given is model  # reached by name, too
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    found = unrollc.compile(model, opt, unrollc.objective(fn)).lower(train, val).loop
    assert len(found.kinds) == 2


class Recurrent(Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out = out if self.last is None else out + self.last
        self.last = out.detach()
        return out


class Registering(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if "mean" not in dict(self.named_buffers()):
            self.register_buffer("mean", x.mean(0).detach())
        return self.layer(x - self.mean)


class Growing(Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.extra = nn.Linear(4, 3)
        return self.layer(x)


KEPT: list[Tensor] = []


class Elsewhere(Linear):
    """A tensor in a place that belongs to no module."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        KEPT.append(out.detach())
        return out + KEPT[0]


class Cycling(Linear):
    """Takes its factors from an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = itertools.cycle([1.0, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * next(self.factors)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Cycling, r"the attribute factors is an iterator \(cycle\)"),
        (Recurrent, "the attribute last carries a tensor from one inner step to the next"),
        (Registering, "the model registers or removes the buffer 'mean' while it runs"),
        (Growing, "the model registers or removes the submodule 'extra' while it runs"),
        (Elsewhere, "a tensor that was computed in another step"),
    ],
)
def test_what_is_not_carried_is_refused(kind: Callable[[], Linear], message: str) -> None:
    KEPT.clear()
    with pytest.raises(unrollc.CaptureError, match=message):
        lowered(kind(), 3)


def test_the_refusal_names_the_line() -> None:
    with pytest.raises(unrollc.CaptureError) as caught:
        lowered(Recurrent(), 3)
    assert caught.value.where.text == "out = out if self.last is None else out + self.last"
    assert "register_buffer" in str(caught.value)


def test_attributes_are_put_back_after_an_error() -> None:
    model = Recurrent()
    with pytest.raises(unrollc.CaptureError):
        lowered(model, 3)
    assert model.last is None


class Ring(nn.Module):
    """A memory with a place that moves on, both buffers; the place is read as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("memory", torch.zeros(3, 4))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(x))
        place = int(self.place)
        with torch.no_grad():
            self.memory[place] = hidden.mean(0)
            self.place[0] = (place + 1) % 3
        return self.head(hidden + self.memory.sum(0))


def test_a_place_in_a_ring_of_memories_is_a_known_number() -> None:
    assert_exact(Ring(), classes(steps=4))


def test_a_program_is_used_again_only_where_the_numbers_it_read_are_the_same() -> None:
    """Validation reads the place that the last step left, so it guards the program as well."""
    model = Ring()
    opt, _ = held(model, momentum)
    *train, val = classes()
    program = unrollc.compile(model, opt, nn.functional.cross_entropy)
    first = program.lower(train, val)
    assert program.lower(train, val) is first
    model.place.fill_(1)
    assert program.lower(train, val) is not first
    assert_exact(model, classes())


class Aliased(Linear):
    """Reads its weight by another tensor that shares the memory."""

    def __init__(self, alias: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.alias = alias(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.alias.T


@pytest.mark.parametrize(
    "alias", [lambda weight: weight.data, lambda weight: weight.detach()[:, :], lambda w: w[:1]]
)
def test_a_fast_weight_behind_another_tensor_is_refused(alias: Callable[[Tensor], Tensor]) -> None:
    """In ordinary training it follows the weight; captured, it would keep its initial value."""
    with pytest.raises(unrollc.CaptureError, match=r"reads layer\.weight behind the model's back"):
        lowered(Aliased(alias), 2)


def test_a_copy_of_the_initial_weight_is_a_constant() -> None:
    model = Aliased(lambda weight: weight.detach().clone())
    assert_exact(model, classes(steps=2))
