"""The four-block convolutional network of few-shot classification (Vinyals et al. 2016)."""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Conv4(nn.Module):
    """Four blocks of convolution, BatchNorm, ReLU and max-pooling, then a linear head.

    Images [n, 1, 28, 28] to logits [n, outputs]. The convolutions need no bias: BatchNorm
    takes every constant out again.
    """

    def __init__(self, outputs: int, channels: int = 32) -> None:
        super().__init__()
        widths = (1, channels, channels, channels, channels)
        self.blocks = nn.Sequential(*(block(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(channels, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images).flatten(1))


def block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
