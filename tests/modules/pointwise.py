"""Activations, dropout, linear layers, shapes and containers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules.case import NO_SECOND, Calling, Case, layer


def _plain(names: str) -> list[Case]:
    return [layer(name, "", getattr(nn, name)) for name in names.split()]


ACTIVATIONS = [
    *_plain(
        "CELU ELU GELU Hardshrink Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU "
        "ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
    ),
    layer("Hardsigmoid", "", nn.Hardsigmoid, finite=NO_SECOND),
    layer("GELU", "approximate='tanh'", lambda: nn.GELU("tanh")),
    layer("ELU", "alpha=0.5, inplace", lambda: nn.ELU(0.5, inplace=True)),
    layer("ReLU", "inplace", lambda: nn.ReLU(inplace=True)),
    layer("Softplus", "beta=2, threshold=1", lambda: nn.Softplus(2, 1)),
    layer("PReLU", "one a channel", lambda: nn.PReLU(3), (2, 3, 2)),
    layer("Threshold", "", lambda: nn.Threshold(0.1, 0.3)),
    layer("RReLU", "training", nn.RReLU, noisy=True),
    layer("RReLU", "evaluation", nn.RReLU, evaluating=True),
    layer("GLU", "", nn.GLU, (2, 4)),
    layer("Softmax", "", lambda: nn.Softmax(-1)),
    layer("Softmax2d", "", nn.Softmax2d, (1, 3, 2, 2)),
    layer("Softmin", "", lambda: nn.Softmin(-1)),
    layer("LogSoftmax", "", lambda: nn.LogSoftmax(-1)),
]

DROPOUT = [
    layer("Dropout", "training", lambda: nn.Dropout(0.4), (3, 4), noisy=True),
    layer("Dropout", "inplace", lambda: nn.Dropout(0.4, inplace=True), (3, 4), noisy=True),
    layer("Dropout", "evaluation", nn.Dropout, evaluating=True),
    layer("Dropout1d", "training", lambda: nn.Dropout1d(0.4), (2, 3, 2), noisy=True),
    layer("Dropout2d", "training", lambda: nn.Dropout2d(0.4), (2, 3, 2, 1), noisy=True),
    layer("Dropout3d", "training", lambda: nn.Dropout3d(0.4), (2, 3, 2, 1, 1), noisy=True),
    layer("AlphaDropout", "training", lambda: nn.AlphaDropout(0.4), (3, 4), noisy=True),
    layer(
        "FeatureAlphaDropout",
        "training",
        lambda: nn.FeatureAlphaDropout(0.4),
        (2, 3, 2),
        noisy=True,
    ),
]

LINEAR = [
    layer("Identity", "", nn.Identity),
    layer("Linear", "", lambda: nn.Linear(3, 2)),
    layer("Linear", "bias=False, three dimensions", lambda: nn.Linear(3, 2, bias=False), (2, 2, 3)),
    layer("Bilinear", "", lambda: nn.Bilinear(3, 2, 2), (2, 3), (2, 2)),
    layer("CosineSimilarity", "", nn.CosineSimilarity, (2, 3), (2, 3)),
    layer("PairwiseDistance", "", nn.PairwiseDistance, (2, 3), (2, 3)),
    layer("PairwiseDistance", "p=1", lambda: nn.PairwiseDistance(1.0), (2, 3), (2, 3)),
    layer(
        "PairwiseDistance", "p=3", lambda: nn.PairwiseDistance(3.0, keepdim=True), (2, 3), (2, 3)
    ),
    *[
        layer(
            "torch.cdist",
            f"p={p:g}",
            lambda p=p: Calling(lambda a, b: torch.cdist(a, b, p)),
            (2, 3),
            (3, 3),
            finite=NO_SECOND,
        )
        for p in (1.0, 2.0, 3.0, float("inf"))
    ],
    layer("F.pdist", "", lambda: Calling(F.pdist), (3, 3), finite=NO_SECOND),
]

SHAPES = [
    layer("Flatten", "", nn.Flatten, (2, 3, 2)),
    layer("Unflatten", "", lambda: nn.Unflatten(1, (2, 2)), (2, 4)),
    layer("PixelShuffle", "", lambda: nn.PixelShuffle(2), (1, 4, 2, 1)),
    layer("PixelUnshuffle", "", lambda: nn.PixelUnshuffle(2), (1, 1, 2, 4)),
    layer("ChannelShuffle", "", lambda: nn.ChannelShuffle(2), (1, 4, 2, 1)),
    layer("Fold", "", lambda: nn.Fold((3, 3), (2, 2)), (1, 4, 4)),
    layer("Unfold", "", lambda: nn.Unfold((2, 2), padding=1, stride=2), (1, 2, 3, 3)),
]


class Residual(nn.Module):
    """The plain use of the class `Module`: children and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * torch.tanh(self.inner(x))


class Held(nn.Module):
    """Children or parameters in a container, used in order."""

    def __init__(self, container: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.container = container
        self._use = use

    def forward(self, x: Tensor) -> Tensor:
        return self._use(self.container, x)


def _in_turn(children: Any, x: Tensor) -> Tensor:
    for child in children:
        x = torch.tanh(child(x))
    return x


CONTAINERS = [
    layer("Module", "", Residual),
    layer(
        "Sequential",
        "named children",
        lambda: nn.Sequential(OrderedDict(a=nn.Linear(3, 3), b=nn.Tanh(), c=nn.Linear(3, 2))),
    ),
    layer(
        "ModuleList",
        "",
        lambda: Held(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]), _in_turn),
    ),
    layer(
        "ModuleDict",
        "",
        lambda: Held(
            nn.ModuleDict({"up": nn.Linear(3, 4), "down": nn.Linear(4, 2)}),
            lambda parts, x: parts["down"](torch.tanh(parts["up"](x))),
        ),
    ),
    layer(
        "ParameterList",
        "",
        lambda: Held(
            nn.ParameterList([torch.rand(3, 3), torch.rand(3)]), lambda p, x: x @ p[0] + p[1]
        ),
    ),
    layer(
        "ParameterDict",
        "",
        lambda: Held(
            nn.ParameterDict({"weight": torch.rand(3, 3), "bias": torch.rand(3)}),
            lambda p, x: torch.tanh(x @ p["weight"] + p["bias"]),
        ),
    ),
    layer("DataParallel", "no device", lambda: nn.DataParallel(nn.Linear(3, 2))),
]

CASES = [*ACTIVATIONS, *DROPOUT, *LINEAR, *SHAPES, *CONTAINERS]
