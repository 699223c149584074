"""Tune a learning rate for each of 10,000 steps of SGD by its exact meta-gradient, in 64 MiB.

An MLP on scikit-learn's digits is trained for 10,000 steps. The learning rates of all steps are
the exponentials of a free vector; the gradient of the validation loss with respect to its 10,000
entries, through the whole training, drives an outer Adam. States of the training go to the disk,
one every hundred steps.

Kill the program at any moment and start it again with the same state directory: it goes on where
it was, within a training too, and its result is the same to the last bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from digits import load_parts, reinitialise
from display import console
from fewshot import Batch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import unrollc

START_LR = 0.01
OUTER_LR = 0.1  # in units of log learning rate
BATCH = 16
JUDGES = 3  # trainings with unseen weights and batches, by which a curve is judged
BARS = "▁▂▃▄▅▆▇█"


class Trainer:
    """An MLP, its SGD, and the compiled training.

    A batch is the numbers of its images, so that 10,000 batches take little memory.
    """

    def __init__(
        self, steps: int, memory: str, spill: Path, show: Callable[[int, int], None]
    ) -> None:
        split = load_parts([1000, 400], torch.Generator().manual_seed(0))
        self.train_part, self.validation, self.test = split
        self.steps = steps
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.opt = torch.optim.SGD(self.model.parameters(), lr=START_LR)
        self.program = unrollc.compile(
            self.model,
            self.opt,
            unrollc.objective(self.training_loss),
            val_loss=unrollc.objective(validation_loss),
            meta=['param_groups[0]["lr"]'],
            memory=memory,
            spill=spill,
            progress=show,
        )

    def training_loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        images, labels = self.train_part
        (rows,) = batch
        return F.cross_entropy(model(images[rows]), labels[rows])

    def train(self, lr: Tensor, seed: int) -> unrollc.Result:
        """Train with learning rates [steps]; initial weights and batches follow from the seed."""
        generator = torch.Generator().manual_seed(seed)
        reinitialise(self.model, generator)
        rows = torch.randint(len(self.train_part[1]), (self.steps, BATCH), generator=generator)
        self.opt.param_groups[0]["lr"] = unrollc.PerStep(lr)
        return self.program((rows,), self.validation)

    def plan(self, lr: Tensor) -> str:
        """What a training will hold and how often its steps run, before it runs."""
        rows = torch.zeros(self.steps, BATCH, dtype=torch.int64)
        self.opt.param_groups[0]["lr"] = unrollc.PerStep(lr)
        return str(self.program.lower((rows,), self.validation).plan)

    def judge(self, lr: Tensor) -> tuple[float, float]:
        """Mean validation loss and accuracy on the test part, of trainings with fresh seeds."""
        images, labels = self.test
        lr = lr.detach().requires_grad_()  # what meta= names has to
        losses, hits = [], []
        with torch.no_grad():
            for seed in range(JUDGES):
                result = self.train(lr, 1_000_000 + seed)
                logits = torch.func.functional_call(self.model, dict(result.params), (images,))
                losses.append(result.loss.item())
                hits.append((logits.argmax(1) == labels).float().mean().item())
        return sum(losses) / JUDGES, sum(hits) / JUDGES


def validation_loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


class Outer:
    """The outer optimization, whose state lies in a file between two of its steps.

    Attributes:
        log_lr: The free vector [steps].
        losses: The validation loss of every outer step done.
    """

    def __init__(self, steps: int, file: Path) -> None:
        self.file = file
        self.log_lr = torch.full((steps,), math.log(START_LR), requires_grad=True)
        self.adam = torch.optim.Adam([self.log_lr], lr=OUTER_LR)
        self.losses: list[float] = []
        if file.exists():
            saved = torch.load(file)
            if len(saved["log_lr"]) != steps:
                raise typer.BadParameter(
                    f"{file.parent} holds a curve of {len(saved['log_lr'])} steps: pass --steps "
                    f"{len(saved['log_lr'])}, or another --state"
                )
            with torch.no_grad():
                self.log_lr.copy_(saved["log_lr"])
            self.adam.load_state_dict(saved["adam"])
            self.losses = saved["losses"]

    def step(self, trainer: Trainer) -> float:
        """One meta-gradient and one step of Adam; returns the validation loss before it."""
        result = trainer.train(self.log_lr.exp(), seed=len(self.losses))
        self.adam.zero_grad()
        result.loss.backward()
        self.adam.step()
        self.losses.append(result.loss.item())
        self.save()
        return self.losses[-1]

    def save(self) -> None:
        """Replace the file in one rename: a kill leaves the old state or the new one."""
        draft = self.file.with_suffix(".new")
        saved = {
            "log_lr": self.log_lr.detach(),
            "adam": self.adam.state_dict(),
            "losses": self.losses,
        }
        with draft.open("wb") as stream:
            torch.save(saved, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self.file)


def sketch(curve: Tensor, width: int = 60) -> str:
    """A curve [steps] as a line of bars: means over equal parts, from its lowest to its highest."""
    parts = torch.stack([part.mean() for part in curve.tensor_split(min(width, len(curve)))])
    low, high = parts.min(), parts.max()
    heights = (parts - low) / (high - low).clamp_min(1e-12) * (len(BARS) - 1)
    return "".join(BARS[int(height)] for height in heights.round())


def show_result(trainer: Trainer, outer: Outer) -> None:
    tuned = outer.log_lr.detach().exp()
    table = Table(title="from unseen weights and batches", title_justify="left")
    for heading in ("learning rates", "validation loss", "test accuracy"):
        table.add_column(heading)
    for name, lr in ((f"all {START_LR}", torch.full_like(tuned, START_LR)), ("tuned", tuned)):
        loss, accuracy = trainer.judge(lr)
        table.add_row(name, f"{loss:.4f}", f"{100 * accuracy:.1f} %")
    console.print(table)
    console.print(f"learning rate, {tuned.min():.4f} to {tuned.max():.4f} a step:")
    console.print(sketch(tuned), highlight=False)


def main(
    steps: Annotated[int, typer.Option(min=2, help="SGD steps of a training.")] = 10_000,
    outer_steps: Annotated[int, typer.Option(min=1, help="Meta-gradients in all.")] = 20,
    memory: Annotated[str, typer.Option(help="What a training may hold.")] = "64MiB",
    state: Annotated[
        Path, typer.Option(file_okay=False, help="Where a run is kept and taken up again.")
    ] = Path("long_horizon_state"),
    quick: Annotated[bool, typer.Option("--quick", help="200 SGD steps, 3 outer ones.")] = False,
) -> None:
    """Tune a whole learning-rate curve; start again after a kill, and it goes on."""
    if quick:
        steps, outer_steps = 200, 3
    torch.set_num_threads(1)  # the matrices are too small to share out
    state.mkdir(parents=True, exist_ok=True)
    bar = Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
    )
    outer = Outer(steps, state / "outer.pt")
    overall = bar.add_task("meta-gradients", total=outer_steps, completed=len(outer.losses))
    inner = bar.add_task("steps, there and back", total=2 * steps)
    trainer = Trainer(
        steps,
        memory,
        state / "spilled",
        lambda done, total: bar.update(inner, completed=done, total=total),
    )
    if outer.losses:
        console.print(f"{state} holds {len(outer.losses)} outer steps: going on from there")
    else:
        console.print(trainer.plan(outer.log_lr.exp()), highlight=False, soft_wrap=True)
    with bar:
        while len(outer.losses) < outer_steps:
            loss = outer.step(trainer)
            bar.update(overall, completed=len(outer.losses))
            bar.console.print(f"outer step {len(outer.losses)}: validation loss {loss:.4f}")
    show_result(trainer, outer)


if __name__ == "__main__":
    typer.run(main)
