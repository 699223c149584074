"""A program under Inductor: the same numbers, each function compiled once, whatever T is."""

import json
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import unrollc
from unrollc.backends import inductor
from unrollc.backends.cache import open_cache, set_cache_directory
from unrollc.backends.inductor import Compilation
from unrollc.plan import threads as plan_threads

STEPS = 3


def problem(steps: int = STEPS, rate: float = 0.1) -> tuple[Any, ...]:
    """Buffers, noise, a rate a step, and a fixed one, in float64.

    The fixed rate is the scale of a sum with a matrix product, which Inductor may forget.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5))
    model.append(nn.Linear(4, 2, bias=False))
    model.double()
    rates = torch.linspace(rate, 2 * rate, steps, dtype=torch.float64, requires_grad=True)
    first, *_, last = model
    groups = [{"params": [*first.parameters(), *model[1].parameters()]}]
    groups.append({"params": last.parameters(), "lr": unrollc.PerStep(rates)})
    opt = torch.optim.SGD(groups, lr=rate)
    train = torch.randn(steps, 5, 3).double(), torch.randint(2, (steps, 5))
    val = torch.randn(5, 3).double(), torch.randint(2, (5,))
    return model, opt, rates, train, val


def run(backend: str, steps: int = STEPS, **changed: Any) -> tuple[Any, ...]:
    """The result of a call, the meta-gradients by name, and the program."""
    model, opt, rates, train, val = problem(steps)
    train, val = changed.get("train", train), changed.get("val", val)
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), backend=backend)
    torch.manual_seed(1)
    result = program(train, val)
    result.loss.backward()
    named = {**dict(model.named_parameters()), "rates": rates}
    return result, {name: tensor.grad for name, tensor in named.items()}, program


def assert_equal(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    (result, gradients, _), (expected, wanted, _) = ours, theirs
    near = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(result.loss, expected.loss, **near)
    torch.testing.assert_close(result.inner_losses, expected.inner_losses, **near)
    torch.testing.assert_close(dict(result.params), dict(expected.params), **near)
    torch.testing.assert_close(dict(result.buffers), dict(expected.buffers), **near)
    torch.testing.assert_close(gradients, wanted, **near)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that the tests of this module share: what one has compiled another finds."""
    folder = tmp_path_factory.mktemp("kernels")
    folder.chmod(0o700)
    set_cache_directory(folder)
    yield folder
    set_cache_directory(None)


class Counted:
    """Worker processes, with the kernels that they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels: list[str] = []
        start = inductor._worker

        def counting(folder: Path) -> Any:
            self.kernels += json.loads((folder / "job.json").read_text())["kernels"]
            return start(folder)

        monkeypatch.setattr(inductor, "_worker", counting)


@pytest.fixture(scope="module")
def first_run(kernels: Path) -> tuple[Any, list[str]]:
    """A run that finds an empty cache and leaves a full one, and the kernels that it compiled."""
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        ours = run("inductor")
        ours[2].finish_compiling()
    return ours, counted.kernels


def test_gradients_are_those_of_the_ops(first_run: tuple[Any, list[str]]) -> None:
    ours, compiled = first_run
    assert_equal(ours, run("aten"))
    functions = [name for name, _ in ours[2].lower(*problem()[3:]).pieces.named_graphs]
    assert 0 < len(compiled) == len(set(compiled)) <= len(functions)


def test_the_number_of_kernels_does_not_depend_on_the_number_of_steps(
    first_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    assert_equal(run("inductor", 17), run("aten", 17))
    assert counted.kernels == []


def test_data_in_another_layout_is_brought_into_the_compiled_one(first_run: Any) -> None:
    """The program's key has no strides: code that is compiled for one order reads another's."""
    model, opt, _, train, val = problem()
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), backend="inductor")
    torch.manual_seed(1)
    expected = program(train, val).loss
    turned = train[0].permute(2, 1, 0).contiguous().permute(2, 1, 0), train[1]
    flipped = val[0].t().contiguous().t(), val[1]
    assert turned[0].stride() != train[0].stride()
    for data in ((turned, val), (train, flipped), ((train[0][:, :, :], train[1]), val)):
        torch.manual_seed(1)
        torch.testing.assert_close(program(*data).loss, expected, rtol=1e-12, atol=0)
    assert len(program._cache) == 1


def test_results_belong_to_the_user(first_run: Any) -> None:
    """Writing to them changes neither a later run nor the backward pass without saying so."""
    model, opt, _, train, val = problem()
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), backend="inductor")
    torch.manual_seed(1)
    expected = program(train, val)
    torch.manual_seed(1)
    first = program(train, val)
    with torch.no_grad():
        for tensor in (*first.params.values(), *first.buffers.values()):
            tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    torch.manual_seed(1)
    again = program(train, val)
    assert torch.equal(again.loss, expected.loss)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    first.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_tiered_starts_with_the_ops_and_goes_on_with_kernels(
    first_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = False
    monkeypatch.setattr(Compilation, "ready", lambda self: ready)
    model, opt, rates, train, val = problem()
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), backend="tiered")
    torch.manual_seed(1)
    pending = program(train, val)  # its backward pass comes after the change
    (executor,) = program._cache[next(iter(program._cache))]
    assert executor.module() is executor._generated
    ready = True
    torch.manual_seed(1)
    second = program(train, val)
    assert executor.module() is executor._compiled
    torch.testing.assert_close(second.loss, pending.loss, rtol=1e-12, atol=0)
    second.loss.backward()
    compiled = rates.grad.clone()
    rates.grad = None
    pending.loss.backward()
    torch.testing.assert_close(rates.grad, compiled, rtol=1e-10, atol=1e-14)


def test_tiered_goes_on_with_the_ops_where_compilation_fails(
    first_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Compilation, **_: Any) -> dict[str, Any]:
        raise unrollc.BackendError("Inductor cannot compile step_0")

    monkeypatch.setattr(Compilation, "functions", failing)
    expected = run("aten")
    with pytest.warns(RuntimeWarning, match=r"aten backend goes on.*cannot compile step_0"):
        found = run("tiered")
    assert_equal(found, expected)
    with pytest.raises(unrollc.BackendError, match="cannot compile step_0"):
        run("inductor")


def test_a_damaged_kernel_is_compiled_again_and_never_loaded(
    first_run: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading what is left of a library would end the process."""
    cache = open_cache()
    found = [path for path in kernels.iterdir() if (path / "native.so").exists()]
    victim = min(found, key=lambda path: (path / "native.so").stat().st_size)
    content = (victim / "native.so").read_bytes()
    (victim / "native.so").unlink()  # this process has mapped the file itself
    (victim / "native.so").write_bytes(content[:5000])
    counted = Counted(monkeypatch)
    ours = run("inductor")
    ours[2].finish_compiling()
    assert_equal(ours, run("aten"))
    assert counted.kernels == [victim.name]
    assert cache.find(victim.name) is not None


def test_what_a_new_process_takes_from_the_cache(first_run: Any, kernels: Path) -> None:
    """Kernels are loaded in milliseconds; Inductor is not even imported."""
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_inductor as t
        t.set_cache_directory({str(kernels)!r})
        t.torch.set_num_threads(1)
        model, opt, rates, train, val = t.problem()
        program = t.unrollc.compile(model, opt, t.nn.CrossEntropyLoss(), backend="inductor")
        lowered = program.lower(train, val)
        start = time.perf_counter()
        compilation = t.Compilation(lowered.pieces)
        compilation.functions()
        print(len(compilation._workers), "torch._inductor.compile_fx" in sys.modules)
        print(time.perf_counter() - start)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, seconds = done.stdout.splitlines()
    print(f"kernels loaded in {float(seconds):.3f} s, {time.perf_counter() - start:.1f} s in all")
    assert first == "0 False"


def test_an_op_of_another_library_is_named() -> None:
    library = torch.library.Library("unrollc_test_backend", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
    model = nn.Linear(2, 1)

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = torch.ops.unrollc_test_backend.double(target)
        return ((prediction - target) ** 2 * weight).mean()

    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, loss, backend="inductor")
    batch = torch.ones(3, 2), torch.ones(3, 1)
    with pytest.raises(unrollc.BackendError, match=r"unrollc_test_backend\.double") as error:
        program(unrollc.repeat(batch, 2), batch)
    assert 'backend="aten"' in str(error.value)
    assert "weight = torch.ops" in str(error.value)


def test_without_a_compiler_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(unrollc.BackendError, match="no-such-compiler cannot be found"):
        run("inductor")


def test_nothing_is_left_of_compilation(first_run: Any, kernels: Path) -> None:
    left = {path.name for path in kernels.iterdir()}
    assert not [name for name in left if name.startswith("draft-")]
    assert all(name == "secret" or len(name) == 64 for name in left)


@pytest.mark.parametrize(("seconds", "threads"), [(1e-4, 1), (1.0, 3)])
def test_small_functions_are_compiled_for_one_thread(
    monkeypatch: pytest.MonkeyPatch, seconds: float, threads: int
) -> None:
    lowered = unrollc.compile(*problem()[:2], nn.CrossEntropyLoss()).lower(*problem()[3:])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cost = SimpleNamespace(seconds=seconds)
    monkeypatch.setattr(plan_threads, "cost_of", lambda graph: cost)
    assert inductor.threads_for(lowered.pieces, "step_0") == threads


def test_kernels_are_dealt_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_processors", lambda: 2)
    assert inductor.dealt({"a": 5, "b": 4, "c": 3}, ()) == [["a"], ["b", "c"]]
    assert inductor.dealt({"a": 5}, ()) == [["a"]]
    assert inductor.dealt({"a": 5, "b": 4, "c": 3}, "bc") == [["b"], ["c", "a"]]


def test_a_run_waits_for_what_takes_most_of_its_time() -> None:
    assert inductor.most_of({"step": 5.0, "adjoint": 10.0, "validate": 1.0}) == {"adjoint", "step"}
    assert inductor.most_of({"step": 5.0}) == {"step"}
    model, opt, _, train, val = problem(50)
    lowered = unrollc.compile(model, opt, nn.CrossEntropyLoss()).lower(train, val)
    seconds = inductor.seconds_of(lowered.pieces)
    assert seconds.keys() == dict(lowered.pieces.named_graphs).keys()
    assert inductor.most_of(seconds).isdisjoint({"step_0", "validate"})


def test_what_is_not_compiled_yet_runs_as_ops_among_kernels(
    first_run: Any, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values go from ops to kernels and back, in one layout."""
    slow = {"adjoint_0", "validate"}
    settled = Compilation._is_settled
    monkeypatch.setattr(Compilation, "_is_settled", lambda c, n: n not in slow and settled(c, n))
    monkeypatch.setattr(inductor, "most_of", lambda seconds: frozenset({"step_0"}))
    model, opt, rates, train, val = problem()
    program = unrollc.compile(model, opt, nn.CrossEntropyLoss(), backend="inductor")
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        rates.grad = None
        program(train, val).loss.backward()
        found.append(rates.grad)
        (executor,) = next(iter(program._cache.values()))
        found.append(executor.identity(executor.module()))
        slow.clear()
        program.finish_compiling()
    first, before, second, after = found
    assert before != after and "validate" in after
    expected = run("aten")[1]["rates"]
    torch.testing.assert_close([first, second], [expected] * 2, rtol=1e-10, atol=1e-14)


def test_what_cannot_be_compiled_later_stays_as_it_is(
    first_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Compilation._function

    def failing(self: Compilation, name: str, kernel: Any) -> Any:
        if name == "validate":
            raise unrollc.BackendError("Inductor cannot compile validate")
        return made(self, name, kernel)

    monkeypatch.setattr(Compilation, "_function", failing)
    monkeypatch.setattr(inductor, "most_of", lambda seconds: frozenset({"step_0"}))
    with pytest.warns(RuntimeWarning, match="validate stays as it is"):
        found = run("inductor")
    assert_equal(found, run("aten"))
