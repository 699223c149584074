"""Soundness by search: verdicts on random programs against finite differences.

"zero" must be zero, "exists" must be what finite differences give, and a derivative without kinks
that is said to exist must be there. The programs come from `grammar`. The ordinary run searches
the same 2,000 each time; ``--programs N`` searches N others.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.internal.conjecture import providers
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.requirements import grammar
from tests.requirements.differences import MEMORY, Differences, Instance, directions
from tests.requirements.grammar import Program, programs
from tests.requirements.rows import CUTTING, ENTRIES, SMOOTH_EACH, SMOOTH_VECTOR
from unrollc.requirements import dependence, edges, judge, zeros
from unrollc.requirements.verdict import Requirements, Verdict
from unrollc.runtime import lowering
from unrollc.runtime.given import read_given

pytestmark = pytest.mark.usefixtures("float64")

SHARDS = 10
ORDINARY = 2000

#: One program in this many is differentiated, lowered and run; of all others the verdicts by
#: dependence are judged, which is four times as fast and claims no less.
RUN = 20

#: Reasons of verdicts by class, first match; a reason of no class is an error.
CLASSES = (
    ("by the integer", "integers and truth values have no derivative"),
    ("by Python", "turned into a Python number"),
    ("by a branch at zero", "the branch that is skipped"),
    ("by an infinite slope", "has no finite derivative at the present value"),
    ("by a kink", "has a kink at the present value"),
    ("by a flat piece", "is flat at the present value"),
    ("by a stop", "stops the gradient"),
    ("by shape", "only the shape is used"),
    ("by zero", "it is multiplied by zero"),
    ("by zero", "the value is always zero"),
    ("by zero", "divided by itself"),
    ("by integers", "integers or truth values"),
    ("by a rounded quotient", "rounded quotient"),
    ("by a derivative of zero", "zero everywhere it exists"),
    ("by scale", "the scale is divided out again"),
    ("by differentiation", "vanishes when the step is differentiated"),
    ("by adding", "it adds to the inner loss a term"),
    ("by not being used", "neither the inner steps nor the validation loss depend on it"),
    ("by not being used", "no step computes with it"),
    ("by not being used", "the update does not use it"),
    ("by not being used", "does not use the adapted weights"),
    ("by the state it reaches", "on which Lval does not depend"),
)

#: What every shard of the ordinary run must meet, so that the search cannot quietly shrink.
REACHED = (
    "exists",
    "exists with kinks",
    "zero by a flat piece",
    "zero by a stop",
    "zero by zero",
    "zero by integers",
    "zero by a derivative of zero",
    "zero by not being used",
    "run",
)


class UnsoundError(AssertionError):
    """A verdict that finite differences contradict."""


def classified(verdict: Verdict) -> str:
    if verdict.status == "exists":
        return "exists with kinks" if verdict.kinks else "exists"
    for name, words in CLASSES:
        if words in verdict.reason:
            return f"{verdict.status} {name}"
    raise UnsoundError(f"no class for {verdict.status}: {verdict.reason}")


class Case:
    """A program at its first point, and what is said of it.

    Attributes:
        program, instance: What is judged.
        tally: Counts of what was met.
    """

    def __init__(self, program: Program, tally: Counter[str]) -> None:
        self.program, self.tally = program, tally
        self.instance = Instance(program)

    def compile(self, names: list[str] | None = None) -> unrollc.Program:
        """The compiled program, for the named meta-parameters or for all."""
        it = self.instance
        meta: list[Any] | None = [it.metas[n] for n in names] if names is not None else None
        if self.program.whole and names is None:
            meta = [*it.metas.values(), it.whole]
        loss = unrollc.objective(it.loss) if self.program.form == "objective" else it.loss
        objective = self.program.form == "objective"
        val = _on_batch(it.val_loss) if objective else it.val_loss
        return unrollc.compile(it.model, it.optimizer(), loss, val_loss=val, meta=meta)

    def by_dependence(self) -> Requirements:
        """The verdicts without differentiating the captured graphs."""
        program = self.compile()
        given = read_given(program._problem, self.instance.train, self.instance.val)
        captured = lowering.capture(
            given.problem, program._options, given.stock, given.train, given.val
        )
        return captured.requirements

    def judge(self, *, runs: bool) -> None:
        """Raise `UnsoundError` if a verdict is wrong.

        Args:
            runs: Whether the program is differentiated, lowered and run as well.
        """
        self.tally["programs"] += 1
        found = self.compile().check(*self._data()) if runs else self.by_dependence()
        verdicts = {name: _look_up(found, tensor) for name, tensor in self.instance.metas.items()}
        for name, verdict in verdicts.items():
            kind = classified(verdict) if verdict is not None else "not met"
            self.tally[kind] += 1
            if name.startswith("phi"):
                self.tally[f"learned: {kind}"] += 1
        if self.instance.whole is not None:
            whole = _look_up(found, self.instance.whole)
            assert whole is not None and whole.status == "undefined"
            self.tally[classified(whole)] += 1
        self._undefined(verdicts)
        self._zeros(verdicts)
        self._existing(verdicts)
        if runs:
            self._run(found, verdicts)

    def _data(self) -> tuple[Any, Any]:
        return self.instance.train, self.instance.val

    def _undefined(self, verdicts: dict[str, Verdict | None]) -> None:
        """A verdict of "undefined" has its cause in the source."""
        program = self.program
        zeros = {phi.name for phi in program.phis if phi.zero}
        zeros |= {name for name, value in program.hyper.items() if value == 0}
        for name, verdict in verdicts.items():
            if verdict is None or verdict.status != "undefined":
                continue
            caused = {
                "undefined by Python": "read" in program.traits,
                "undefined by an infinite slope": name in zeros,
                "undefined by a kink": name in zeros,
                "undefined by a branch at zero": name in zeros,
            }
            if not caused.get(classified(verdict)):
                raise UnsoundError(f"{name} is said to be undefined: {verdict.reason}")

    def _zeros(self, verdicts: dict[str, Verdict | None]) -> None:
        """A verdict of "zero" is zero, here and at another point."""
        names = [n for n, v in verdicts.items() if v is None or v.status == "zero"]
        always = [name for name in names if not _of_the_present(verdicts[name])]
        for point, learned, judged in ((0, 0, names), (1, 0, names), (2, 1, always)):
            if not judged:
                return
            differences = Differences(Instance(self.program, learned, point))
            wrong = self._moved_by(differences, judged)
            if wrong and (wrong := [n for n in judged if self._moved_by(differences, [n])]):
                verdict = verdicts[wrong[0]]
                said = verdict.reason if verdict is not None else "not met"
                slope = differences.slope(directions(differences.instance, wrong[:1], 1))
                raise UnsoundError(f"{wrong[0]} is said to be zero ({said}), its slope is {slope}")

    def _moved_by(self, differences: Differences, names: list[str]) -> bool:
        self.tally["slopes"] += 1
        if not differences.finite:
            self.tally["diverged"] += 1
            return False
        along = directions(differences.instance, names, self.program.point)
        if not differences.moves(along):
            return False
        slope = differences.slope(along)
        self.tally["skipped"] += not slope.usable
        return slope.usable and not slope.vanishes

    def _existing(self, verdicts: dict[str, Verdict | None]) -> None:
        """A derivative that exists without kinks is there at one of several points."""
        if any(phi.zero for phi in self.program.phis):
            return  # zero may be a critical point, as of sqrt(1 + φ²), or a factor of all else
        still = ("w", "b")
        names = [
            name
            for name, verdict in verdicts.items()
            if verdict is not None and verdict.status == "exists" and name not in still
        ]
        compared = 0
        for point in range(4):
            if not names:
                return
            differences = Differences(Instance(self.program, 0, point))
            if differences.finite:
                compared += 1
                names = [
                    name
                    for name in names
                    if not differences.moves(directions(differences.instance, [name], 2))
                ]
        for name in names:
            verdict = verdicts[name]
            assert verdict is not None
            if compared < 2:
                self.tally["too few points"] += 1
                continue
            if "flat" in self.program.traits:
                self.tally["flat everywhere"] += 1
                continue
            MEMORY.forget()  # what the differences held still is none of the program's
            full = _look_up(self.compile().check(*self._data()), self.instance.metas[name])
            if full is not None and full.status == "exists":
                raise UnsoundError(f"{name} is said to exist ({verdict.reason}); it is zero")
            self.tally["zero by differentiation"] += 1

    def _run(self, found: Requirements, verdicts: dict[str, Verdict | None]) -> None:
        """Lowering agrees with the check, and the gradient with finite differences."""
        metas = self.instance.metas
        if not found.ok:
            try:
                self.compile().lower(*self._data())
            except unrollc.RequirementError:
                self.tally["refused"] += 1
            else:
                raise UnsoundError(f"lowering refuses nothing, though: {found.failed[0].reason}")
        names = [n for n, v in verdicts.items() if v is not None and v.status == "exists"]
        if not names or found.idle:
            return
        try:
            result = self.compile(None if found.ok else names)(*self._data())
        except unrollc.RequirementError as error:
            raise UnsoundError("the check is content, lowering is not") from error
        gradients = torch.autograd.grad(result.loss, [metas[name] for name in names])
        differences = Differences(self.instance)
        if not differences.finite:
            return
        if abs(result.loss.item() - differences.base) > 1e-9 * max(1, abs(differences.base)):
            raise UnsoundError(
                f"the program's loss is {result.loss}, training gives {differences.base}"
            )
        self.tally["run"] += 1
        for name, gradient in zip(names, gradients, strict=True):
            self._compare(differences, name, gradient)

    def _compare(self, differences: Differences, name: str, gradient: Tensor) -> None:
        along = directions(self.instance, [name], 3)
        slope = differences.slope(along)
        self.tally["slopes"] += 1
        if not slope.usable:
            self.tally["skipped"] += 1
            return
        claimed = float((gradient * along[name]).sum())
        norm = float(gradient.norm() * along[name].norm())
        tolerance = 1e-6 * max(norm, abs(slope.value)) + slope.error + 1e-7
        if not abs(claimed - slope.value) <= tolerance:
            raise UnsoundError(
                f"the gradient of {name} gives {claimed}, finite differences {slope}"
            )


def _on_batch(val_loss: Any) -> unrollc.Objective:
    return unrollc.objective(lambda model, batch: val_loss(model(batch[0]), batch[1]))


def _of_the_present(verdict: Verdict | None) -> bool:
    """Whether a verdict may hold at the present values of the learned parameters only."""
    if verdict is None:
        return False
    # Where I fails, and where a scale is divided out, direct ways into Lval are not spoken of;
    # they may be flat at the present value.
    silent = verdict.I.holds is False or "divided out" in verdict.reason
    return silent or "at the present value" in verdict.reason


def _look_up(found: Requirements, tensor: Tensor) -> Verdict | None:
    try:
        return found[tensor]
    except KeyError:  # no graph reads it
        return None


def search(
    start: int, count: int, *, shrink: bool = True, traits: frozenset[str] = frozenset()
) -> Counter[str]:
    """Judge `count` programs; what was met. With `traits`, those of just these rows alone.

    Raises:
        UnsoundError: With the smallest program that hypothesis finds.
    """
    tally: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def judge(program: Program) -> None:
        MEMORY.forget()
        if traits and program.traits - {"torch"} != traits:
            return
        Case(program, tally).judge(runs=zlib.crc32(repr(program).encode()) % RUN == 0)

    # Otherwise what is drawn depends on numbers in the modules that happen to be imported.
    with mock.patch.object(providers, "_get_local_constants", providers.Constants):
        judge()
    return tally


@pytest.mark.parametrize("shard", range(SHARDS))
def test_verdicts_are_sound(shard: int, pytestconfig: pytest.Config) -> None:
    wanted = pytestconfig.getoption("programs")
    start = random.SystemRandom().randrange(10**9) if wanted else shard
    print(f"seed {start}")
    tally = search(start, (wanted or ORDINARY) // SHARDS)
    print(tally)
    if not wanted:
        missing = [kind for kind in REACHED if not tally[kind]]
        assert not missing, f"the search met no program with: {missing}"
    # Kinks nearby; and training that diverges, or starts at log(0): nothing can be compared there.
    assert tally["skipped"] <= 0.1 * tally["slopes"], tally
    assert tally["diverged"] <= 0.25 * tally["slopes"], tally


# --- broken twins: a rule that is wrong is found ------------------------------------------------


def _all_edges(node: Any, zeros: Any) -> frozenset[tuple[int, int]]:
    return frozenset((i, j) for i in range(len(node.all_input_nodes)) for j in range(4))


def _smooth_edges_cut(node: Any, zeros: Any) -> frozenset[tuple[int, int]]:
    tanh = node.target is torch.ops.aten.tanh.default
    return frozenset() if tanh else edges.carried(node, zeros)


def _through_stops(node: Any, zeros: Any) -> frozenset[tuple[int, int]]:
    stop = node.target is torch.ops.aten.detach.default
    return frozenset([(0, 0)]) if stop else edges.carried(node, zeros)


def _sums_vanish(name: str, args: Any, kwargs: Any, zero: Any) -> bool:
    return (name == "add" and any(map(zero, args))) or _IS_ZERO(name, args, kwargs, zero)


_IS_ZERO = zeros.is_zero


def _first_op(key: Any, graphs: Any) -> Any:
    return next(node for node in graphs.val.step.graph.nodes if node.op == "call_function")


#: Where a rule stands, and a wrong one in its place.
TWINS: dict[str, tuple[Any, str, Any]] = {
    "every op carries a derivative": (dependence, "carried", _all_edges),
    "tanh carries none": (dependence, "carried", _smooth_edges_cut),
    "detach carries one": (dependence, "carried", _through_stops),
    "nothing is zero": (zeros, "is_zero", lambda *operands: False),
    "a sum with a zero is zero": (zeros, "is_zero", _sums_vanish),
    "every scale is divided out": (judge, "normalised_away", _first_op),
    "no scale is divided out": (judge, "normalised_away", lambda *operands: None),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_rule_is_found(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, wrong = TWINS[twin]
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setattr(edges, "_KNOWN", {})
    stops = frozenset({"stop"}) if twin.startswith("detach") else frozenset()
    if stops:
        cut_by_stops_alone(monkeypatch)
    with pytest.raises(UnsoundError):
        for shard in range(SHARDS):
            search(shard, ORDINARY // SHARDS, shrink=False, traits=stops)


def cut_by_stops_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the programs of the grammar that cut by a stop-gradient and nothing else.

    Of all its programs they are few, and a path that a stop alone cuts is rarer still.
    """
    stops = [row for row in CUTTING if row.traits == {"stop"}]
    smooth = [*SMOOTH_EACH, *SMOOTH_VECTOR]
    monkeypatch.setattr(grammar, "_MIDDLE", smooth + stops)
    entries = {entry: stops if entry == "cut" else ENTRIES["smooth"] for entry in ENTRIES}
    monkeypatch.setattr(grammar, "ENTRIES", entries)


# --- what the search has found ------------------------------------------------------------------


def verdict_of(
    phi: Tensor, factor: Any, update: Any = torch.optim.SGD, *, scale: Any = None, model: Any = None
) -> Verdict:
    """The verdict on `phi` in an inner loss of ``prediction * factor(phi)``.

    With a `scale`, the loss is multiplied by ``scale(phi)``, and the prediction by nothing.
    """
    model = nn.Linear(3, 3) if model is None else model
    opt = update(model.parameters(), lr=0.1)
    train = (torch.randn(2, 4, 3), torch.randn(2, 4, 3))
    val = (torch.randn(4, 3), torch.randn(4, 3))

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        if scale is not None:
            return (prediction - target).square().mean() * scale(phi)
        return (prediction * factor(phi) - target).square().mean()

    return unrollc.check(model, opt, loss, train, val, val_loss=F.mse_loss)[phi]


def vector() -> Tensor:
    return torch.tensor([0.7, 0.3, -0.5], requires_grad=True)


def test_a_difference_with_alpha_is_not_zero() -> None:
    assert verdict_of(vector(), lambda x: torch.sub(x, x, alpha=2)).status == "exists"
    assert verdict_of(vector(), lambda x: torch.sub(x, x)).status == "zero"


def test_slopes_of_elements_that_cancel_are_not_flat() -> None:
    """∂ remainder(x, φ) / ∂φ is −floor(x / φ): here −1, 1 and 0."""
    x = torch.tensor([1.5, -0.5, 0.5])
    period = torch.tensor(1.0, requires_grad=True)
    assert verdict_of(period, lambda phi: torch.remainder(x, phi)).status == "exists"
    assert verdict_of(period, lambda phi: torch.remainder(x[2:], phi)).status == "zero"


def test_a_value_divided_by_itself_is_constant() -> None:
    verdict = verdict_of(vector(), lambda x: x / x)
    assert verdict.status == "zero" and "divided by itself" in verdict.reason
    assert verdict_of(vector(), lambda x: x / x.detach()).status == "exists"


class Normalised(torch.optim.SGD):
    """Steps of unit length."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad / param.grad.norm())


def test_a_function_of_a_scale_is_divided_out_as_well() -> None:
    scale = torch.tensor(0.7, requires_grad=True)
    for factor in (lambda x: x, torch.exp, lambda x: F.softplus(x).square() + 0.1):
        verdict = verdict_of(scale, lambda x: x, Normalised, scale=factor)
        assert verdict.status == "zero" and "divided out" in verdict.reason
        assert verdict_of(scale, factor, Normalised).status == "exists"
        assert verdict_of(scale, lambda x: x, scale=factor).status == "exists"


def test_a_scale_passes_ops_of_several_results() -> None:
    """The backward of layer norm is one: what it hands on still scales."""
    scale = torch.tensor(0.7, requires_grad=True)
    weight, bias = torch.tensor([1.1, 0.6, 0.8]), torch.tensor([0.9, -0.7, 1.3])

    class Norm(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(super().forward(x), (3,), weight, bias)

    for update, status in ((Normalised, "zero"), (torch.optim.SGD, "exists")):
        verdict = verdict_of(scale, None, update, scale=torch.exp, model=Norm(3, 3))
        assert verdict.status == status


def test_a_cut_for_two_reasons_names_both() -> None:
    """The condition has no derivative at all, the branch none at the present value."""
    other = torch.tensor(2.0)
    phi = torch.tensor(1.0, requires_grad=True)
    verdict = verdict_of(phi, lambda x: torch.where(other > x, other, x))
    assert verdict.status == "zero"
    assert "integers or truth values" in verdict.reason
    assert "at the present value" in verdict.reason


def test_constant_weights_of_a_normalisation_have_no_tangent() -> None:
    """PyTorch's forward formula makes a zero for them, which no graph knew."""
    weight, bias = torch.tensor([1.1, 0.6, 0.8]), torch.tensor([0.9, -0.7, 1.3])
    rate = torch.tensor(0.2, requires_grad=True)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.tensor([0.5, 0.2, -0.1]))

        def forward(self, x: Tensor) -> Tensor:
            return x * F.layer_norm(self.b * x, (3,), weight, bias)

    model = Scaled()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["lr"] = rate
    batch = (torch.tensor([0.3, -0.4, 1.2]), torch.tensor([0.1, 0.2, 0.3]))
    train = tuple(part.expand(2, 3) for part in batch)
    result = unrollc.compile(model, opt, F.mse_loss)(train, batch)
    names = dict(model.named_parameters())
    params = dict(names)
    for _ in range(2):
        loss = F.mse_loss(torch.func.functional_call(model, params, batch[0]), batch[1])
        (slope,) = torch.autograd.grad(loss, [params["b"]], create_graph=True)
        params = {"b": params["b"] - rate * slope}
    expected = F.mse_loss(torch.func.functional_call(model, params, batch[0]), batch[1])
    metas = [rate, names["b"]]
    for found, wanted in zip(
        torch.autograd.grad(result.loss, metas), torch.autograd.grad(expected, metas), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
