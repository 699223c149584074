"""Runs from tapes: bit for bit those of the same machine code called function by function."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unrollc
from unrollc.backends.cache import set_cache_directory
from unrollc.backends.kernel import kernels_of
from unrollc.backends.tape import UntapedError
from unrollc.runtime import taped
from unrollc.runtime.load import load
from unrollc.runtime.taped import Player, Tapes, recorded

STEPS = 12

#: Of the memory that keeps everything: too little for every state.
PART = 0.6


@pytest.fixture(scope="module", autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module: the programs of its tests have their kernels in common."""
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    set_cache_directory(folder)
    yield
    set_cache_directory(None)


class Setting:
    """A program with a rate a step, and its data; the same numbers each time that it is built."""

    def __init__(self, steps: int = STEPS, listed: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).double()
        self.rates = torch.linspace(0.1, 0.2, steps, dtype=torch.float64, requires_grad=True)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.opt.param_groups[0]["lr"] = unrollc.PerStep(self.rates)
        self.train: Any = torch.randn(steps, 8, 16).double(), torch.randint(4, (steps, 8))
        self.val = torch.randn(8, 16).double(), torch.randint(4, (8,))
        if listed:
            self.train = list(zip(*self.train, strict=True))
        self.meta = [*self.model.parameters(), self.rates]
        self.program = unrollc.compile(
            self.model, self.opt, nn.CrossEntropyLoss(), backend="inductor", **options
        )
        self.ready()

    def ready(self) -> None:
        """Only where all functions are machine code are there tapes."""
        self.program.lower(self.train, self.val)
        ((executor,),) = self.program._cache.values()
        executor.module()
        self.program.finish_compiling()

    def call(self, train: Any = None, val: Any = None) -> unrollc.Result:
        torch.manual_seed(1)
        return self.program(
            self.train if train is None else train, self.val if val is None else val
        )

    def gradients(self, result: unrollc.Result, **options: Any) -> list[Tensor]:
        return list(torch.autograd.grad(result.loss, self.meta, **options))

    def numbers(self, *arguments: Any) -> list[Any]:
        """All that a call and its backward pass give."""
        result = self.call(*arguments)
        return [*shown(result), *self.gradients(result)]

    def tapes(self) -> Tapes | None:
        """None where it was called function by function."""
        player = self.player()
        assert player._tried
        return player._tapes

    def player(self) -> Player:
        ((executor,),) = self.program._cache.values()
        found = inspect.unwrap(executor.module().adapt).__self__
        assert isinstance(found, Player)
        return found


def shown(result: unrollc.Result) -> list[Tensor]:
    """What a result shows, as it is now."""
    tensors = [result.loss, result.inner_losses, *result.params.values()]
    return [tensor.detach().clone() for tensor in tensors]


Use = Callable[[Setting], list[Tensor]]


def both(use: Use, **options: Any) -> tuple[list[Tensor], list[Tensor], Tapes]:
    """What comes of a use with tapes, what comes of it without, and the tapes."""
    taped = Setting(**options)
    found = use(taped)
    tapes = taped.tapes()
    assert tapes is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Player, "_recorded", lambda self, inputs: None)
        plain = Setting(**options)
        expected = use(plain)
        assert plain.tapes() is None
    return found, expected, tapes


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its) and torch.isfinite(mine).all()


def at_rest(setting: Setting) -> Tensor:
    """The arena that the next run takes."""
    (spare,) = setting.player()._spares
    return spare


# -- schedules --------------------------------------------------------------------------------


def test_keeping_every_state() -> None:
    found, expected, _ = both(Setting.numbers)
    assert_same(found, expected)
    assert all(gradient.any() for gradient in found[-5:])


def budget(part: float) -> int:
    setting = Setting()
    return int(part * setting.program.lower(setting.train, setting.val).plan.peak_bytes)


def test_a_budget_that_repeats_steps() -> None:
    memory = budget(PART)
    setting = Setting(memory=memory)
    assert setting.program.lower(setting.train, setting.val).plan.schedule.recomputed > 0
    found, expected, tapes = both(Setting.numbers, memory=memory)
    assert_same(found, expected)
    assert tapes.recorder.arena.nbytes <= memory
    with_all, _, _ = both(Setting.numbers)
    torch.testing.assert_close(found, with_all, rtol=1e-10, atol=1e-12)


def with_a_large_arena(*arguments: Any) -> Tapes:
    tapes = recorded(*arguments)
    tapes.recorder.arena.nbytes = 2**40
    return tapes


def test_a_budget_without_room_for_tapes_is_kept() -> None:
    setting = Setting(memory=budget(PART))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taped, "recorded", with_a_large_arena)
        setting.numbers()
        assert setting.tapes() is None


def test_the_arena_is_as_large_as_the_plan_says() -> None:
    setting = Setting()
    setting.numbers()
    tapes = setting.tapes()
    assert tapes is not None
    peak = setting.program.lower(setting.train, setting.val).plan.peak_bytes
    assert tapes.recorder.arena.nbytes <= 1.05 * peak


# -- calls ------------------------------------------------------------------------------------


def test_a_list_of_batches() -> None:
    found, expected, _ = both(Setting.numbers, listed=True)
    assert_same(found, expected)
    assert_same(found, Setting().numbers())


def other(setting: Setting) -> tuple[Any, Any]:
    """Data of the same shapes."""
    (inputs, target), (x, y) = setting.train, setting.val
    return (inputs.flip(0) * 0.5, target.roll(1, 1)), (x + 0.25, y.flip(0))


def backward_twice(setting: Setting) -> list[Tensor]:
    result = setting.call()
    first = setting.gradients(result, retain_graph=True)
    between = setting.numbers(*other(setting))
    return [*first, *between, *setting.gradients(result)]


@pytest.mark.parametrize("options", [{}, {"memory": PART}])
def test_two_backward_passes(options: Mapping[str, float]) -> None:
    options = {name: budget(part) for name, part in options.items()}
    found, expected, _ = both(backward_twice, **options)
    assert_same(found, expected)
    assert_same(found[:5], found[-5:])


def calls_before_backward(setting: Setting) -> list[Tensor]:
    found = setting.numbers()  # from now on there is an arena at rest
    first, second = setting.call(), setting.call(*other(setting))
    found += setting.gradients(second)
    third = setting.call()
    found += [*setting.gradients(first), *setting.gradients(third)]
    return [*found, *shown(first), *shown(second), *shown(third)]


def test_several_calls_before_the_first_backward_pass() -> None:
    found, expected, _ = both(calls_before_backward)
    assert_same(found, expected)


def test_the_arena_is_used_again() -> None:
    setting = Setting()
    setting.numbers()
    before = at_rest(setting)
    before.fill_(0xFF)  # nothing of the run before is read
    found = setting.numbers()
    assert at_rest(setting) is before
    assert_same(found, Setting().numbers())


def test_inputs_are_read_where_they_are() -> None:
    """What a tape reads is where the inputs are at the call, not where they were."""
    setting = Setting()
    expected = setting.numbers()
    (inputs, target), val = setting.train, setting.val
    room = torch.full((STEPS, 3, 8, 16), torch.nan, dtype=torch.float64)
    apart = room[:, 1].copy_(inputs)  # rows that are further apart than they are long
    train, val = (apart, target.clone()), (val[0].clone(), val[1].clone())
    with torch.no_grad():
        for each in setting.model.parameters():
            before = each.detach().clone()
            each.fill_(torch.nan)
            each.data = before
        for each in (inputs, setting.val[0]):
            each.fill_(torch.nan)
        for each in (target, setting.val[1]):
            each.fill_(0)
    assert_same(setting.numbers(train, val), expected)


def other_rates(setting: Setting) -> list[Tensor]:
    found = setting.numbers()
    with torch.no_grad():
        setting.rates.mul_(torch.linspace(0.5, 2, STEPS))
        setting.model[0].weight.mul_(0.9)
    return [*found, *setting.numbers()]


def test_values_that_have_changed_between_two_calls() -> None:
    found, expected, _ = both(other_rates)
    assert_same(found, expected)
    assert not torch.equal(found[0], found[len(found) // 2])


def test_results_belong_to_the_user() -> None:
    """The backward pass does not read them, and later calls do not write to them."""
    setting = Setting()
    expected = setting.numbers()
    result = setting.call()
    before = shown(result)
    setting.numbers(*other(setting))
    assert_same(shown(result), before)
    with torch.no_grad():
        for each in (*result.params.values(), result.inner_losses):
            each.fill_(torch.nan)
    assert_same(setting.gradients(result), expected[-5:])
    assert_same(setting.numbers(), expected)


@pytest.mark.parametrize("where", ["train", "val"])
def test_an_index_out_of_range_is_told_and_the_next_call_works(where: str) -> None:
    setting = Setting()
    expected = setting.numbers()
    pending = setting.call()
    (inputs, target), (x, y) = setting.train, setting.val
    train, val = (inputs, target.clone()), (x, y.clone())
    (train if where == "train" else val)[1].view(-1)[-1] = 4
    with pytest.raises((RuntimeError, IndexError), match=r"out of bounds|out of range"):
        setting.call(train, val)
    assert_same(setting.numbers(), expected)
    assert_same(setting.gradients(pending), expected[-5:])


def test_without_gradients() -> None:
    def losses(setting: Setting) -> list[Tensor]:
        return [*shown(setting.call()), *shown(setting.call(*other(setting)))]

    with torch.no_grad():
        found, expected, tapes = both(losses)
    assert tapes.backward is None and tapes.recorder.arena.nbytes < 0.5 * budget(1)
    assert_same(found, expected)


# -- what is on no tape -----------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [True, False])
def test_noise_is_on_no_tape(noisy: bool) -> None:
    """PyTorch draws it between two calls of machine code; such a program runs as it is."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5 if noisy else 0.0), nn.Linear(8, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    train = torch.randn(3, 5, 4), torch.randint(2, (3, 5))
    val = train[0][0], train[1][0]
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), backend="aten")
    lowered, inputs = program.lower(train, val), program.inputs(train, val)
    kernels = kernels_of(lowered.pieces)
    codes: Any = {name: SimpleNamespace(address=0, scratch=0) for name in kernels}
    loaded = functools.partial(load, lowered.generated)
    if not noisy:
        assert recorded(loaded, kernels, codes, inputs).backward is not None
        return
    with pytest.raises(UntapedError, match="Tensor has no place on a tape"):
        recorded(loaded, kernels, codes, inputs)
    module = loaded()
    functions = {name: getattr(module, name) for name in kernels}
    passes = Player(loaded, kernels, functions, codes, None).passes()
    found, expected = passes["adapt"](inputs, 7), module.adapt(inputs, 7)
    assert_same([found[0], *found[1], found[2]], [expected[0], *expected[1], expected[2]])
    mine = passes["backward"](inputs, 7, *found[3:])
    its = module.backward(inputs, 7, *expected[3:])
    assert_same(list(mine.values()), list(its.values()))
