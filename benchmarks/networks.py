"""The networks of the benchmark workloads, each as a user would write it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tanh_mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for pair in itertools.pairwise(widths):
        layers += [nn.Linear(*pair), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def conv4(channels: int = 64, ways: int = 5) -> nn.Sequential:
    """Images [n, 1, 28, 28] to logits (Vinyals et al. 2016): four blocks and a linear head."""
    layers: list[nn.Module] = []
    for pair in itertools.pairwise((1, *[channels] * 4)):
        layers += [
            nn.Conv2d(*pair, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, ways))


def lenet(classes: int = 10) -> nn.Sequential:
    """Images [n, 1, 28, 28] to logits, in the manner of LeCun et al. 1998."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, classes),
    )


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.wide = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.wide(self.norm_2(x))


class GPT(nn.Module):
    """Tokens [n, length] to logits [n, length, words]: pre-norm blocks, learned positions."""

    def __init__(self, layers: int, width: int, heads: int, length: int, words: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(4 * growth)
        self.narrow = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.wide = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.narrow(F.relu(self.norm_1(x)))
        return torch.cat([x, self.wide(F.relu(self.norm_2(inner)))], 1)


def densenet(depth: int = 40, growth: int = 12, classes: int = 10) -> nn.Sequential:
    """DenseNet-BC for 32x32 images (Huang et al. 2017): three dense blocks, halved between."""
    channels, layers = 2 * growth, []
    layers.append(nn.Conv2d(3, channels, 3, padding=1, bias=False))
    for block in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(Bottleneck(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(channels, classes))


class CoordinatewiseLSTM(nn.Module):
    """Gradients [n] and memory to updates [n] and memory (Andrychowicz et al. 2016)."""

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(1, hidden), nn.LSTMCell(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def blank(self, like: Tensor) -> tuple[Tensor, ...]:
        """The memory before the first step, for gradients `like` [n]."""
        return tuple(like.new_zeros(len(like), self.out.in_features) for _ in range(4))

    def forward(self, g: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        first = self.first(10 * g.unsqueeze(1), memory[:2])
        second = self.second(first[0], memory[2:])
        return 0.1 * self.out(second[0]).squeeze(1), (*first, *second)


class LearnedOptimizer(torch.optim.Optimizer):
    """Runs a network over all weights at once; its memory is the optimizer's state."""

    def __init__(self, params: Any, net: CoordinatewiseLSTM) -> None:
        super().__init__(params, {})
        self.net = net

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = torch.cat([p.grad.flatten() for p in params])
        memory = self.state["coordinates"] or self.net.blank(gradients)
        updates, self.state["coordinates"] = self.net(gradients, memory)
        for p, update in zip(params, updates.split([p.numel() for p in params]), strict=True):
            p.add_(update.view_as(p))
