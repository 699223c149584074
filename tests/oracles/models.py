"""Small models, losses and data for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 3


class MLP(nn.Module):
    def __init__(self, features: int = 4, hidden: int = 6, classes: int = CLASSES) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.output = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(x)))


class ConvNet(nn.Module):
    """Convolution, BatchNorm with running statistics, ReLU, max-pooling.

    The convolutions have no bias: before BatchNorm its gradient is zero but for rounding, and an
    adaptive optimizer divides that rounding by itself.
    """

    def __init__(self, channels: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.output = nn.Linear(channels * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.output(x.flatten(1))


class TransformerClassifier(nn.Module):
    """One encoder layer, mean over positions, a linear read-out.

    With ``bias=False`` every gradient is well away from zero. The bias of the attention's keys
    moves no output, so its gradient is rounding or exactly 0; an adaptive optimizer then takes
    the square root of 0, whose derivative is infinite in eager PyTorch.
    """

    def __init__(self, width: int = 8, classes: int = CLASSES, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width,
            nhead=2,
            dim_feedforward=10,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            bias=bias,
        )
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(x).mean(1))


class LSTMClassifier(nn.Module):
    """The last hidden state of an LSTM, read out by a linear layer."""

    def __init__(self, features: int = 3, hidden: int = 5, classes: int = CLASSES) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.output = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return self.output(states[:, -1])


class DropoutMLP(nn.Module):
    def __init__(self, features: int = 4, hidden: int = 16, p: float = 0.4) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.drop = nn.Dropout(p)
        self.output = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.drop(torch.tanh(self.hidden(x))))


class TiedAutoencoder(nn.Module):
    """Encoder and decoder are one parameter, under two names."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, features)
        self.decoder = nn.Linear(features, features)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class TwoInputs(nn.Module):
    """A model of two arguments: the inputs of a batch are a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(2, 5)
        self.output = nn.Linear(5, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.output(torch.tanh(self.left(left) * self.right(right)))


class Branching(nn.Module):
    """Control flow that depends on data, which one captured step cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the branch
            x = x * 2
        return self.output(x)


class WeightedLoss(nn.Module):
    """Cross-entropy with a learned weight per class and learned label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, CLASSES))
        self.smoothing = nn.Parameter(torch.tensor(-2.0))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        logs = F.log_softmax(prediction, -1)
        picked = logs.gather(1, target[:, None]).squeeze(1)
        smooth = torch.sigmoid(self.smoothing)
        each = -(1 - smooth) * picked - smooth * logs.mean(-1)
        return (F.softplus(self.weight)[target] * each).mean()
