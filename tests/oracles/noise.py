"""Eager PyTorch with the noise that a program draws.

A program's noise follows from the run's seed and the number of the step alone. Under this mode the
random ops of ordinary modules draw from the same generators in the same order, so that eager
double backward is an oracle for modules with randomness as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles.objectives import Batch, Loss, Objective, as_objective

aten = torch.ops.aten


def seed_of_next_run() -> int:
    """The seed that the next call of a noisy program takes from the default generator."""
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(2**62, (), dtype=torch.int64))


class SameNoise(TorchDispatchMode):
    """Draws the noise of one run; `numbered` tells where its steps begin.

    Attributes:
        drawn: How many random ops have run.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.drawn = 0
        self._seed = seed
        self._step = -1
        self._generator = torch.Generator()

    def numbered(self, loss: Loss | Objective) -> Objective:
        """``loss``, each evaluation of which is the next step (the validation loss is the last)."""
        objective = as_objective(loss)

        def evaluate(model: nn.Module, batch: Batch) -> Tensor:
            self._step += 1
            self._generator.manual_seed((self._seed * 1000003 + self._step) % 2**63)
            return objective.fn(model, batch)

        return Objective(evaluate)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.drawn += 1
        if func is aten.rrelu_with_noise.default:
            return self._rrelu(*args, **kwargs)
        if func is aten.rand.default:
            like = torch.empty(args[0], **{k: v for k, v in kwargs.items() if k != "pin_memory"})
            return like.uniform_(0.0, 1.0, generator=self._generator)
        return func(*args, **{**kwargs, "generator": self._generator})

    def _rrelu(
        self, x: Tensor, noise: Tensor, lower: float, upper: float, training: bool
    ) -> Tensor:
        assert training
        slopes = torch.empty_like(x).uniform_(lower, upper, generator=self._generator)
        noise.copy_(slopes.where(x <= 0, 1.0))
        return x * noise
