"""Losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.modules.case import (
    NO_SECOND,
    Calling,
    Case,
    Input,
    fixed,
    integers,
    layer,
    loss,
    normal,
    positive,
    signs,
)

_PAIR = ([normal(2, 3)], [normal(2, 3, moved=False)])
_LABELS = Input(lambda g: torch.randint(2, (2, 3), generator=g) * 1.0, moved=False)
_MANY = Input(
    lambda g: torch.stack([torch.randperm(3, generator=g) for _ in range(2)]), moved=False
)
_SHARES = Input(lambda g: torch.rand(2, 3, generator=g).softmax(-1), moved=False)


def _each_reduction(name: str, inputs: Any, target: Any, **rest: Any) -> list[Case]:
    kind = getattr(nn, name)
    return [
        loss(
            name,
            f"reduction='{reduction}'",
            lambda reduction=reduction: kind(reduction=reduction),
            inputs,
            target,
            **rest,
        )
        for reduction in ("mean", "sum", "none")
    ]


def _one(name: str, setting: str, inputs: Any, target: Any, *args: Any, **kwargs: Any) -> Case:
    rest = {
        k: kwargs.pop(k) for k in ("prepare", "finite", "noisy", "refused", "error") if k in kwargs
    }
    return loss(name, setting, lambda: getattr(nn, name)(*args, **kwargs), inputs, target, **rest)


_CLASSES = ([normal(2, 3)], [integers(3, 2)])
_IMAGE = ([normal(1, 3, 2, 2)], [integers(3, 1, 2, 2)])
_WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
_log_probabilities: Callable[[], nn.Module] = lambda: nn.LogSoftmax(1)  # noqa: E731
_normalised: Callable[[], nn.Module] = lambda: nn.LogSoftmax(-1)  # noqa: E731
_SEQUENCES = Input(lambda g: torch.randint(1, 3, (2, 2), generator=g), moved=False)
_LENGTHS = [fixed(torch.tensor([4, 3])), fixed(torch.tensor([2, 1]))]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sqrt().sum(-1)


LOSSES = [
    *_each_reduction("MSELoss", *_PAIR),
    *_each_reduction("L1Loss", *_PAIR),
    *_each_reduction("SmoothL1Loss", *_PAIR),
    _one("SmoothL1Loss", "beta=0", *_PAIR, beta=0.0),
    *_each_reduction("HuberLoss", *_PAIR),
    *_each_reduction("BCEWithLogitsLoss", [normal(2, 3)], [_LABELS]),
    _one("BCEWithLogitsLoss", "pos_weight", [normal(2, 3)], [_LABELS], pos_weight=_WEIGHT),
    *_each_reduction("BCELoss", [normal(2, 3)], [_LABELS], prepare=nn.Sigmoid),
    _one("BCELoss", "weight", [normal(2, 3)], [_LABELS], weight=_WEIGHT, prepare=nn.Sigmoid),
    *_each_reduction("CrossEntropyLoss", *_CLASSES),
    _one(
        "CrossEntropyLoss",
        "weight, label_smoothing, ignore_index",
        *_CLASSES,
        weight=_WEIGHT,
        label_smoothing=0.1,
        ignore_index=0,
    ),
    _one("CrossEntropyLoss", "class probabilities", [normal(2, 3)], [_SHARES]),
    _one("CrossEntropyLoss", "two spatial axes", *_IMAGE),
    *_each_reduction("NLLLoss", *_CLASSES, prepare=_log_probabilities),
    _one(
        "NLLLoss",
        "weight, ignore_index",
        *_CLASSES,
        weight=_WEIGHT,
        ignore_index=1,
        prepare=_log_probabilities,
    ),
    _one("NLLLoss2d", "", *_IMAGE, prepare=_log_probabilities),
    *_each_reduction("PoissonNLLLoss", [normal(2, 3)], [positive(2, 3, moved=False)]),
    _one(
        "PoissonNLLLoss",
        "log_input=False, full",
        [positive(2, 3)],
        [Input(lambda g: torch.rand(2, 3, generator=g) * 4, moved=False)],
        log_input=False,
        full=True,
    ),
    *_each_reduction(
        "GaussianNLLLoss", [normal(2, 3), normal(2, 3)], [positive(2, 3, moved=False)]
    ),
    *_each_reduction("KLDivLoss", [normal(2, 3)], [_SHARES], prepare=_log_probabilities),
    _one(
        "KLDivLoss",
        "reduction='batchmean', log_target",
        [normal(2, 3)],
        [normal(2, 3, moved=False)],
        reduction="batchmean",
        log_target=True,
        prepare=_log_probabilities,
    ),
    *_each_reduction("HingeEmbeddingLoss", [normal(2, 3)], [signs(2, 3)]),
    *_each_reduction("MarginRankingLoss", [normal(3), normal(3)], [signs(3)]),
    *_each_reduction("CosineEmbeddingLoss", [normal(2, 3), normal(2, 3)], [signs(2)]),
    *_each_reduction("SoftMarginLoss", [normal(2, 3)], [signs(2, 3)]),
    *_each_reduction("MultiLabelMarginLoss", [normal(2, 3)], [_MANY], finite=NO_SECOND),
    *_each_reduction("MultiLabelSoftMarginLoss", [normal(2, 3)], [_LABELS]),
    *_each_reduction("MultiMarginLoss", *_CLASSES, finite=NO_SECOND),
    _one("MultiMarginLoss", "p=2, weight", *_CLASSES, p=2, weight=_WEIGHT, finite=NO_SECOND),
    *_each_reduction(
        "TripletMarginLoss", [normal(2, 3), normal(2, 3)], [normal(2, 3, moved=False)]
    ),
    _one(
        "TripletMarginLoss",
        "p=3, swap",
        [normal(2, 3), normal(2, 3)],
        [normal(2, 3, moved=False)],
        p=3.0,
        swap=True,
    ),
    *_each_reduction(
        "TripletMarginWithDistanceLoss", [normal(2, 3), normal(2, 3)], [normal(2, 3, moved=False)]
    ),
    _one(
        "TripletMarginWithDistanceLoss",
        "distance_function, swap",
        [normal(2, 3), normal(2, 3)],
        [normal(2, 3, moved=False)],
        distance_function=_distance,
        swap=True,
    ),
    *_each_reduction(
        "CTCLoss", [normal(4, 2, 3)], [_SEQUENCES, *_LENGTHS], prepare=_normalised, finite=NO_SECOND
    ),
    _one(
        "CTCLoss",
        "concatenated targets, zero_infinity, blank=2",
        [normal(3, 2, 3)],
        [
            Input(lambda g: torch.tensor([0, 1, 1, 1]), moved=False),
            fixed(torch.tensor([3, 3])),
            fixed(torch.tensor([1, 3])),  # the second target does not fit
        ],
        zero_infinity=True,
        blank=2,
        prepare=_normalised,
        finite=NO_SECOND,
    ),
    _one(
        "CTCLoss",
        "one empty target",
        [normal(3, 2, 3)],
        [_SEQUENCES, fixed(torch.tensor([3, 2])), fixed(torch.tensor([2, 0]))],
        prepare=_normalised,
        finite=NO_SECOND,
    ),
    layer(
        "LinearCrossEntropyLoss",
        "",
        lambda: nn.LinearCrossEntropyLoss(3, 4),
        (2, 3),
        integers(4, 2),
    ),
    layer(
        "AdaptiveLogSoftmaxWithLoss",
        "",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]),
        (3, 4),
        integers(6, 3),
        refused="how many rows each cluster takes depends on the targets; log_prob with NLLLoss is "
        "the same loss and works",
        error="the shape of a result depends on the data",
    ),
    layer(
        "AdaptiveLogSoftmaxWithLoss",
        "log_prob",
        lambda: Calling(lambda m, x: m.log_prob(x), nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4])),
        (3, 4),
    ),
]

CASES = LOSSES
