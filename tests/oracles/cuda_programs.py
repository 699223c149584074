"""Programs for another device, and what is found about them in a process that believes in one.

As a script, it prints what `examined` finds about each program as JSON, and what `twins` finds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unrollc
from tests.oracles.device_traffic import faults_of_code, faults_of_graph
from unrollc.runtime.program import Program

T = 4

#: Brings a tensor to the device.
Place = Callable[[Tensor], Tensor]


@dataclass
class Setting:
    """One program with its data.

    Attributes:
        program: What `unrollc.compile` returned.
        train, val: Its data, on the device.
        meta: Leaves whose gradients are compared.
        away: How many of them are on the CPU.
    """

    program: Program
    train: Any
    val: Any
    meta: list[Tensor]
    away: int = field(init=False)

    def __post_init__(self) -> None:
        device = self.meta[0].device
        self.away = sum(tensor.device != device for tensor in self.meta)


def placed(model: nn.Module, place: Place) -> nn.Module:
    """`model` in float64 with its tensors on the device."""
    for module in model.double().modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(place(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = place(buffer)
    return model


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def _points(place: Place, *shape: int, classes: int = 3) -> tuple[Any, Any]:
    def batch(*lead: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(*lead, 5, *shape, dtype=torch.float64)
        return place(inputs), place(torch.randint(classes, (*lead, 5)))

    return batch(T), batch()


def _mlp(place: Place) -> nn.Module:
    return placed(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), place)


def sgd_rates(place: Place, *, host: bool) -> Setting:
    """A learned rate for each tensor, on the host (as `torch.tensor(0.1)` is) or on the device."""
    model = _mlp(place)
    rates = [_number(0.1 + 0.02 * i) for i, _ in enumerate(model.parameters())]
    rates = rates if host else [place(rate) for rate in rates]
    groups = [
        {"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates, strict=True)
    ]
    opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    program = unrollc.compile(model, opt, F.cross_entropy)
    return Setting(program, *_points(place, 4), [*model.parameters(), *rates])


def adam(place: Place, *, capturable: bool, learned: bool = False) -> Setting:
    """Its step counters are on the device where it is capturable, on the host otherwise."""
    model = _mlp(place)
    opt = torch.optim.Adam(model.parameters(), lr=0.01, capturable=capturable)
    rates = []
    if learned:
        rates = [_number(0.01), _number(0.8)]
        opt.param_groups[0]["lr"], opt.param_groups[0]["betas"] = rates[0], (rates[1], 0.99)
    program = unrollc.compile(model, opt, F.cross_entropy)
    return Setting(program, *_points(place, 4), [*model.parameters(), *rates])


def conv(place: Place) -> Setting:
    """Buffers, and noise from a generator of the device."""
    body = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2)]
    model = placed(nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 3)), place)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, F.cross_entropy)
    return Setting(program, *_points(place, 1, 6, 6), list(model.parameters()))


def per_step(place: Place, *, memory: int | None = None) -> Setting:
    """A rate for each step, on the host; few of them, so forward mode may be taken."""
    model = _mlp(place)
    rates = torch.linspace(0.1, 0.2, T, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["lr"] = unrollc.PerStep(rates)  # type: ignore[assignment]
    program = unrollc.compile(model, opt, F.cross_entropy, meta=[rates], memory=memory)
    train, val = _points(place, 4)
    setting = Setting(program, list(zip(*train, strict=True)), val, [rates])
    setting.away = 1
    return setting


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 8), nn.Parameter(torch.randn(5, 8))
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places
        q, k, v = self.mix(self.norm(x)).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(F.gelu(x)).flatten(0, 1)


def gpt(place: Place, *, memory: str | None = None) -> Setting:
    """Causal attention under AdamW."""
    model = placed(_Attention(), place)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens, target = torch.randint(7, (T, 2, 5)), torch.randint(7, (T, 10))
    program = unrollc.compile(model, opt, F.cross_entropy, memory=memory)
    train, val = (place(tokens), place(target)), (place(tokens[0]), place(target[0]))
    return Setting(program, train, val, list(model.parameters()))


def closures(place: Place, *, weighted: bool = False) -> Setting:
    """A loss with a learned number of the host, and with class weights that it makes itself."""
    model, scale = _mlp(place), _number(0.7)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        weight = None
        if weighted:
            weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, device=prediction.device)
        return scale * F.cross_entropy(prediction, target, weight) + prediction.mean() * scale**2

    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    program = unrollc.compile(model, opt, loss, val_loss=F.cross_entropy)
    return Setting(program, *_points(place, 4), [*model.parameters(), scale])


def zero_branch(place: Place) -> Setting:
    """A term that the optimizer skips because its hyperparameter is zero, on the host."""
    model, decay = _mlp(place), _number(0.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["weight_decay"] = decay
    program = unrollc.compile(model, opt, F.cross_entropy)
    return Setting(program, *_points(place, 4), [*model.parameters(), decay])


PROGRAMS: dict[str, Callable[[Place], Setting]] = {
    "sgd, rates on the host": functools.partial(sgd_rates, host=True),
    "sgd, rates on the device": functools.partial(sgd_rates, host=False),
    "adam": functools.partial(adam, capturable=False),
    "adam, learned": functools.partial(adam, capturable=False, learned=True),
    "conv, BatchNorm, dropout": conv,
    "a rate a step": per_step,
    "attention": gpt,
    "attention under a budget": functools.partial(gpt, memory="56KiB"),
    "closures": closures,
    "a rate that is zero": zero_branch,
}

#: Others, which make tensors in ways that only a real device knows.
ON_DEVICE: dict[str, Callable[[Place], Setting]] = {
    **PROGRAMS,
    "class weights": functools.partial(closures, weighted=True),
    "adam, capturable": functools.partial(adam, capturable=True),
}


def settled(build: Callable[[Place], Setting], place: Place) -> Setting:
    """The same numbers at every call, wherever they are placed."""
    torch.manual_seed(0)
    return build(place)


def gradients(setting: Setting) -> list[Tensor]:
    """The meta-gradients of one call."""
    torch.manual_seed(1)
    loss = setting.program(setting.train, setting.val).loss
    return list(torch.autograd.grad(loss, setting.meta))


def twins() -> dict[str, list[str]]:
    """What is found while a generated program runs, once the host takes part in its loop."""
    from tests.oracles.stand_in_cuda import Traffic, on_cuda

    setting = settled(PROGRAMS["sgd, rates on the host"], on_cuda)
    inputs = setting.program.inputs(setting.train, setting.val)
    code = setting.program.lower(setting.train, setting.val).code
    found = {}
    for line in BROKEN:
        broken = code.replace("    return state, loss", f"    {line}\n    return state, loss")
        assert broken != code
        with Traffic() as traffic:
            generated(broken)["adapt"](inputs, 0)
        found[line] = traffic.faults
    return found


#: Lines that would make the host take part in every step.
BROKEN = (
    "loss.item()",
    "float(loss)",
    "state[0].cpu()",
    "state[0][state[0] > 0]",
    "state[0] + torch.ones(state[0].shape, dtype=torch.float64)",
    "state[0].nonzero()",
    'torch.ones(3, device="cpu").to(loss.device)',
)


def generated(code: str) -> dict[str, Any]:
    """The names of a generated program."""
    names: dict[str, Any] = {}
    exec(compile(code, "generated", "exec"), names)
    return names


def examined(build: Callable[[Place], Setting]) -> dict[str, Any]:
    """What is found about a program on the stand-in device."""
    from tests.oracles.stand_in_cuda import Traffic, on_cuda, on_host

    expected = gradients(settled(build, lambda tensor: tensor))
    setting = settled(build, on_cuda)
    lowered = setting.program.lower(setting.train, setting.val)
    graphs = {name: faults_of_graph(graph) for name, graph in lowered.pieces.named_graphs}
    inputs = setting.program.inputs(setting.train, setting.val)
    names = generated(lowered.code)
    with Traffic() as inside:
        prepared = names["prepare"](inputs) if "prepare" in names else inputs
        _, _, losses, *_ = names["adapt"](prepared, 0)
        names["loss_and_gradients"](inputs, 0)
    with Traffic() as call:
        found = gradients(setting)
    pairs = zip(found, expected, strict=True)
    return {
        "graphs": {name: faults for name, faults in graphs.items() if faults},
        "code": faults_of_code(lowered.code),
        "inside": inside.faults,
        "call": call.faults,
        "ran": [inside.ran, call.ran],
        "away": setting.away,
        "losses": losses.device.type,
        "error": max(float((on_host(a).cpu() - b).norm() / b.norm()) for a, b in pairs),
    }


if __name__ == "__main__":
    from tests.oracles.stand_in_cuda import register

    registered = register()
    results = {name: examined(build) for name, build in PROGRAMS.items()}
    print(json.dumps({"programs": results, "twins": twins()}))
