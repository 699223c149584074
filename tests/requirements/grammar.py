"""A grammar of small meta-learning programs: smooth, kinked, cutting and integer ops.

A program is Python source: a model, an inner loss with one to three learned parameters, an
optimizer, a validation loss. `programs` draws one, `differences.Instance` makes it into objects
at a random point. Sources call three helpers:

* ``stop(x)`` is ``x.detach()``, ``untracked(f)`` is ``f()`` under ``no_grad``, ``read(x)`` is
  ``x.item()``. What they return does not move with a meta-parameter, so finite differences must
  hold it still (`differences.Memory`).

What the grammar leaves out, because no rule of the analysis sees it; such a meta-gradient is
claimed, and turns out to be zero:

* Terms that cancel by algebra across several ops: ``(a + b) - a``, ``exp(a) * exp(-a)``,
  ``sin² + cos²``, ``softmax(v).sum()``. Sums therefore have coefficients that do not cancel, and
  reductions have unequal weights.
* Elements of a tensor that do not meet: a loss of ``w[0]`` and a validation of ``w[1]``, a ``cat``
  from which another part is sliced. Dependence is decided by tensor, not by element; selections
  therefore act on a mixture of all elements.
* A shift that is divided out again, ``softmax(v + φ)``: softmax and layer norm act on unequal
  multiples of their operand.
* Scales that several elements or parameters make up, and that are normalised away
  (``φ.sum() * L / ‖φ.sum() * L‖``); programs that normalise have one scalar parameter.
* Closure tensors that happen to be zero, as factors: their values may change between calls.
* ``betas`` of Adam after one step, which its bias correction cancels; it has two steps or more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.requirements.rows import (
    ADDITIVE,
    CUTTING,
    CUTTING_VECTOR,
    ENTRIES,
    JOINS,
    KINKED,
    KINKED_REDUCTIONS,
    KINKED_VECTOR,
    READS,
    SCALES,
    SMOOTH_EACH,
    SMOOTH_REDUCTIONS,
    SMOOTH_VECTOR,
    UPDATE_CUTTING,
    UPDATE_KINKED,
    UPDATE_NORMALISING,
    UPDATE_SMOOTH,
    Row,
    rows,
)

# --- writing a program --------------------------------------------------------------------------


class _Body:
    """Lines of a function under construction."""

    def __init__(self, draw: Callable[..., Any], prefix: str) -> None:
        self.draw, self.prefix = draw, prefix
        self.lines: list[str] = []
        self.shapes: dict[str, str] = {}
        self.unused: list[str] = []
        self.traits: set[str] = set()
        self._known: dict[str, str] = {}

    def leaf(self, name: str, shape: str, *, use: bool = False) -> None:
        self.shapes[name] = shape
        if use:
            self.unused.append(name)

    def apply(self, choices: list[Row], **fixed: str) -> str:
        """Draw a row and its operands; the name of its result."""
        row = self.draw(st.sampled_from(choices))
        holes = {hole: fixed.get(hole) or self._operand(hole) for hole in _holes(row.text)}
        return self.assign(row, holes)

    def assign(self, row: Row, holes: dict[str, str]) -> str:
        text = row.text.format(**holes)
        self.traits |= row.traits
        if text in self._known:
            return self._known[text]
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        operands = [value for value in holes.values() if value in self.shapes]
        vector = any(self.shapes[value] == "v" for value in operands) or "MASK" in text
        self.shapes[name] = row.result or ("v" if vector else "s")
        self.unused = [value for value in self.unused if value not in operands] + [name]
        self._known[text] = name
        return name

    def _operand(self, hole: str) -> str:
        choices = [*self.unused, *(n for n in self.shapes if n not in self.unused)]
        name: str = self.draw(st.sampled_from(choices))
        if hole in ("v", "u"):
            return self.vector(name)
        return self.scalar(name) if hole == "s" else name

    def vector(self, name: str) -> str:
        if self.shapes[name] == "v":
            return name
        return self.assign(Row("{s} * D", "v"), {"s": name})

    def scalar(self, name: str) -> str:
        return (
            name
            if self.shapes[name] == "s"
            else self.apply(SMOOTH_REDUCTIONS * 3 + KINKED_REDUCTIONS, v=name)
        )


@functools.cache
def _holes(text: str) -> tuple[str, ...]:
    return tuple(hole for hole in "abvustp" if f"{{{hole}}}" in text)


def _one_in(draw: Callable[..., Any], n: int) -> bool:
    """True once in n times; shrinks to False."""
    return bool(draw(st.integers(0, n - 1)) == n - 1)


_MIDDLE = [
    *(SMOOTH_EACH * 3),
    *(SMOOTH_VECTOR * 3),
    *KINKED,
    *KINKED_VECTOR,
    *CUTTING[:6],
    *CUTTING_VECTOR,
]

TORCH_OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.2, "momentum": 0.7, "weight_decay": 0.1, "dampening": 0.3},
    "Adam": {"lr": 0.15, "eps": 0.05, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.1, "eps": 0.05, "alpha": 0.7, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.2, "eps": 0.05, "weight_decay": 0.1},
}


@dataclass(frozen=True)
class Phi:
    """A learned parameter.

    Attributes:
        name: In the source.
        shape: "v" or "s".
        entry: The class of the op by which it enters.
        zero: Whether it is exactly zero.
        owner: "closure", "loss" (a module's parameter) or "model".
    """

    name: str
    shape: str
    entry: str
    zero: bool
    owner: str


@dataclass(frozen=True)
class Program:
    """A program of the grammar; ``repr`` is its source.

    Attributes:
        source: Defines ``Model``, ``loss``, ``val_loss`` and ``make_optimizer``.
        phis: The learned parameters.
        hyper: Values of the hyperparameters that are tensors, by name; exact where zero.
        numbers: Those that are plain numbers.
        steps: T.
        form: "plain" (``loss(prediction, target)``), "objective" or "module".
        inputs: Whether the training inputs are a meta-parameter.
        whole: Whether the loss reads an integer tensor, which is listed as a meta-parameter.
        traits: What its rows may do (`Row.traits`).
        point: The seed of its values.
    """

    source: str
    phis: tuple[Phi, ...]
    hyper: dict[str, float]
    numbers: dict[str, float]
    steps: int
    form: str
    inputs: bool
    whole: bool
    traits: frozenset[str]
    point: int

    def __repr__(self) -> str:
        head = [
            f"# T = {self.steps}, point {self.point}, loss is {self.form}",
            f"# tensors: {self.hyper}, numbers: {self.numbers}"
            + (", training inputs" if self.inputs else ""),
            *(f"# {phi}" for phi in self.phis),
        ]
        return "\n" + "\n".join(head) + "\n" + self.source

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @functools.cached_property
    def code(self) -> Any:
        return compile(self.source, "<program>", "exec")


@st.composite
def programs(draw: Callable[..., Any]) -> Program:
    """Programs of the grammar."""
    normalising = _one_in(draw, 8)
    phis = _phis(draw, normalising)
    model, model_traits = _model(draw, [phi for phi in phis if phi.owner == "model"])
    form = draw(st.sampled_from(["plain", "objective", "module"]))
    if any(phi.owner == "loss" for phi in phis):
        form = "module"
    whole = _one_in(draw, 40)
    loss, loss_traits = _loss(draw, form, phis, normalising, whole)
    val, val_traits = _validation(draw, phis)
    steps = draw(st.sampled_from([1, 2, 1, 2, 1, 2, 3]))
    optimizer, hyper, numbers, traits = _optimizer(draw, steps, normalising)
    return Program(
        source="\n\n".join((model, loss, val, optimizer)),
        phis=tuple(phis),
        hyper=hyper,
        numbers=numbers,
        steps=steps,
        form=form,
        inputs=_one_in(draw, 8),
        whole=whole,
        traits=frozenset(model_traits | loss_traits | val_traits | traits),
        point=draw(st.integers(0, 9999)),
    )


def _phis(draw: Callable[..., Any], normalising: bool) -> list[Phi]:
    if normalising:
        entry = draw(st.sampled_from(["smooth", "smooth", "smooth", "kinked", "cut"]))
        return [Phi("phi0", "s", entry, False, draw(st.sampled_from(["closure", "loss"])))]
    found = []
    for index in range(draw(st.sampled_from([1, 1, 2, 2, 3]))):
        entry = draw(st.sampled_from(["smooth", "kinked", "cut"] * 8 + ["singular"]))
        owner = draw(st.sampled_from(["closure", "closure", "loss", "model"]))
        zero = entry == "singular" or _one_in(draw, 25)
        found.append(Phi(f"phi{index}", draw(st.sampled_from("ssv")), entry, zero, owner))
    return found


def _model(draw: Callable[..., Any], phis: list[Phi]) -> tuple[str, set[str]]:
    body = _Body(draw, "h")
    body.leaf("w", "v")
    body.leaf("b", "v")
    body.leaf("x", "v")
    body.assign(Row("(w * x + b * 0.6)", "v"), {"a": "w", "b": "b", "v": "x"})
    _enter(body, phis)
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        body.apply(_MIDDLE)
    while len(body.unused) > 1:
        first, second = body.unused[:2]
        body.apply(rows("({a} + {b} * 0.7)\n{a} * {b}"), a=first, b=second)
    result = body.vector(body.unused[0])
    fields = [
        "self.w = nn.Parameter(START['w'].clone())",
        "self.b = nn.Parameter(START['b'].clone())",
        *(f"self.{phi.name} = nn.Parameter(START['{phi.name}'].clone())" for phi in phis),
    ]
    lines = [
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in fields),
        "    def forward(self, x):",
        "        w, b = self.w, self.b",
        *(f"        {phi.name} = self.{phi.name}" for phi in phis),
        *(f"        {line}" for line in body.lines),
        f"        return {result}",
    ]
    return "\n".join(lines), body.traits


def _enter(body: _Body, phis: list[Phi], *, alone: bool = False) -> None:
    """The first use of each learned parameter; `alone` without another operand."""
    for phi in phis:
        body.leaf(phi.name, phi.shape)
    for phi in phis:
        choices = ENTRIES[phi.entry]
        if alone:
            choices = [row for row in choices if _holes(row.text) == ("a",)]
        row = body.draw(st.sampled_from(choices))
        others = [name for name in body.shapes if name != phi.name]
        holes = {"a": phi.name}
        if "b" in _holes(row.text):
            holes["b"] = body.draw(st.sampled_from(others)) if others else "D"
        body.assign(row, holes)
        if not alone and _one_in(body.draw, 12):
            body.unused.append(phi.name)  # it enters elsewhere, too
        elif "{" in row.text:
            body.shapes.pop(phi.name)
    if phis and not alone and _one_in(body.draw, 12):
        # Only closures: reading what is an input of the captured step is refused by capture.
        scalars = [phi.name for phi in phis if phi.shape == "s" and phi.owner == "closure"]
        if scalars:
            name = body.draw(st.sampled_from(scalars))
            body.shapes[name] = "s"
            body.apply(READS, s=name, **({} if len(body.shapes) > 1 else {"a": "D"}))
            body.shapes.pop(name)


def _loss(
    draw: Callable[..., Any], form: str, phis: list[Phi], normalising: bool, whole: bool
) -> tuple[str, set[str]]:
    body = _Body(draw, "l")
    body.leaf("p", "v", use=True)
    body.leaf("y", "v")
    if form == "objective":
        body.leaf("w", "v")
    own = [phi for phi in phis if phi.owner == "loss" or phi.owner == "closure"]
    _enter(body, own, alone=normalising)
    base = "(p - y).square().mean()"
    if normalising:
        total = body.assign(Row(base, "s"), {"a": "p"})
        for name in [name for name in body.unused if name not in (total, "p")]:
            total = body.apply(SCALES, s=body.scalar(name), t=total)
        result = total
    else:
        for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
            body.apply(_MIDDLE)
        terms = []
        for name in list(body.unused):
            term = body.scalar(name)
            if _one_in(draw, 8):
                terms.append(body.apply(ADDITIVE, s=term))
            else:
                terms.append(body.apply(JOINS, s=term, t=base, p="p"))
        result = " + ".join([base, *dict.fromkeys(terms)])
    doubled = ["p = p * COUNT"] if whole else []
    closing = [*doubled, *body.lines, f"return {result}"]
    if form == "module":
        fields = [phi.name for phi in own if phi.owner == "loss"]
        lines = [
            "class Loss(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        self.{name} = nn.Parameter(START['{name}'].clone())" for name in fields),
            "    def forward(self, p, y):",
            *(f"        {name} = self.{name}" for name in fields),
            *(f"        {line}" for line in closing),
        ]
    elif form == "objective":
        lines = [
            "def loss(model, batch):",
            "    x, y = batch",
            "    p, w = model(x), model.w",
            *(f"    {line}" for line in closing),
        ]
    else:
        lines = ["def loss(p, y):", *(f"    {line}" for line in closing)]
    return "\n".join(lines), body.traits


def _validation(draw: Callable[..., Any], phis: list[Phi]) -> tuple[str, set[str]]:
    body = _Body(draw, "e")
    body.leaf("p", "v", use=True)
    body.leaf("y", "v")
    kind = draw(st.sampled_from(["smooth"] * 12 + ["metric"]))
    if kind == "metric":
        metrics = rows(
            """
            (p.argmax() == y.argmax()).double()
            (p > y).double().mean()
            torch.round(p * 2).sum()
            (p.detach() * y).sum()
            """
        )
        text = draw(st.sampled_from(metrics)).text.replace("p.detach()", "stop(p)")
        return f"def val_loss(p, y):\n    return {text}", {"flat", "metric"}
    closures = [phi for phi in phis if phi.owner == "closure"]
    if closures and _one_in(draw, 5):
        _enter(body, [draw(st.sampled_from(closures))])
    for _ in range(draw(st.integers(0, 1))):
        body.apply([*SMOOTH_EACH, *SMOOTH_VECTOR, *KINKED[:4]])
    terms = [body.scalar(name) for name in list(body.unused)]
    body.lines.append(f"return (p - 0.7 * y).square().mean() + {' + '.join(terms)}")
    lines = ["def val_loss(p, y):", *(f"    {line}" for line in body.lines)]
    return "\n".join(lines), body.traits


def _optimizer(
    draw: Callable[..., Any], steps: int, normalising: bool
) -> tuple[str, dict[str, float], dict[str, float], set[str]]:
    if normalising or _one_in(draw, 3):
        return _handmade(draw, normalising)
    name = draw(st.sampled_from(["SGD", "SGD", "SGD", "Adam", "RMSprop", "Adagrad"]))
    defaults = TORCH_OPTIMIZERS[name]
    hyper, numbers = {}, {}
    for key, value in defaults.items():
        how = draw(st.sampled_from(["default", "default", "number", "tensor"]))
        if key in ("lr", "eps") and how == "default":
            how = "number"
        if how == "tensor" and key != "eps":
            zero = key in ("momentum", "weight_decay") and _one_in(draw, 6)
            hyper[key] = 0.0 if zero else value
        elif how != "default":
            numbers[key] = value
    if "dampening" in hyper and "momentum" not in {**hyper, **numbers}:
        hyper.pop("dampening")
    if name == "Adam" and steps > 1 and _one_in(draw, 3):
        hyper |= {"beta1": 0.7, "beta2": 0.75}
    betas = "('beta1' in hyper) and hyper.update(betas=(hyper.pop('beta1'), hyper.pop('beta2')))"
    text = [
        "def make_optimizer(params, hyper):",
        f"    {betas}",
        f"    return torch.optim.{name}(params, **hyper, foreach=False)",
    ]
    return "\n".join(text), hyper, numbers, {"torch"}


def _handmade(
    draw: Callable[..., Any], normalising: bool
) -> tuple[str, dict[str, float], dict[str, float], set[str]]:
    body = _Body(draw, "u")
    body.leaf("theta", "v")
    body.leaf("g", "v", use=True)
    tensors = {"lr": 0.2, "c": 0.4}
    if normalising:
        body.apply(UPDATE_NORMALISING)
        body.unused = body.unused[-1:]
    else:
        body.leaf("m", "v")
        body.leaf("c", "s")
        kinds = [*(UPDATE_SMOOTH * 3), *UPDATE_KINKED, *UPDATE_CUTTING]
        for _ in range(draw(st.sampled_from([1, 1, 2, 2, 3]))):
            body.apply(kinds)
    factors = (1, 0.7, 0.6, 0.4, 0.3)[: len(body.unused)]
    terms = [f"{k} * {name}" for k, name in zip(factors, body.unused, strict=True)]
    rate = "lr"
    if _one_in(draw, 8):
        rate, extra = draw(
            st.sampled_from(
                [
                    ("float(lr)", "read"),
                    ("math.sqrt(lr)", "read"),
                    ("lr.item()", "read"),
                    ("lr.detach()", ""),
                    ("torch.round(lr * 10)", "flat"),
                    ("lr.sqrt()", ""),
                    ("torch.clamp(lr, 0.5, 1.0)", "flat"),
                ]
            )
        )
        body.traits |= {extra}
    hyper = {key: value for key, value in tensors.items() if draw(st.booleans())}
    if rate != "lr":
        hyper["lr"] = tensors["lr"]
    numbers = {key: value for key, value in tensors.items() if key not in hyper}
    stateful = "m" in "".join(body.lines).replace("theta", "") and "m" in body.shapes
    lines = [
        "class Handmade(torch.optim.Optimizer):",
        "    def __init__(self, params, hyper):",
        "        super().__init__(params, hyper)",
        "    @torch.no_grad()",
        "    def step(self, closure=None):",
        "        for group in self.param_groups:",
        "            lr, c = torch.as_tensor(group['lr']), torch.as_tensor(group['c'])",
        "            for theta in group['params']:",
        "                if theta.grad is None:",
        "                    continue",
        "                g = theta.grad",
        "                state = self.state[theta]",
        "                m = state.get('m', torch.zeros_like(theta))",
        *(f"                {line}" for line in body.lines),
        f"                update = {' + '.join(terms)}",
        *(["                state['m'] = 0.8 * m + update"] if stateful else []),
        f"                theta.sub_({rate} * update)",
        "make_optimizer = Handmade",
    ]
    return "\n".join(lines), hyper, numbers, body.traits
