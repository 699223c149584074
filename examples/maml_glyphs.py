"""Learn to learn letterforms: MAML on characters that the network has never seen.

Five characters, one image of each: five SGD steps on those five images, and the network should
tell 75 new images of them apart. Meta-training finds the initial weights and a learning rate for
each tensor from which five steps suffice (MAML, Finn et al. 2017; Meta-SGD, Li et al. 2017), by
the exact gradient of the query loss through all five steps.

The same network, trained in the ordinary way on as many images of the same characters and then
fine-tuned on the five, is the comparison.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from baseline import BATCH, choose_recipe, fine_tune, pretrain, pretraining_steps
from conv4 import Conv4
from display import console, progress
from fewshot import Estimate, Split, Task, TaskSampler
from glyphs import load_glyphs
from maml_figure import Prediction, Summary, save_figure
from omniglot import OmniglotLayoutError, load_omniglot
from rich.syntax import Syntax
from rich.table import Table
from torch import Tensor

import unrollc

WAYS = 5
INNER_STEPS = 5
INNER_LR = 0.1  # where every learning rate starts
OUTER_LR = 3e-3  # of the initial weights
OUTER_LR_OF_LR = 1e-2
RUNNING = 50  # tasks in the running accuracy
CODE_LINES = 40
SAMPLE_TASKS = 3


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        steps: outer steps.
        tasks: tasks in an outer step.
        test_tasks: held-out tasks that give the accuracies.
        validation_tasks: tasks that choose how the baseline is fine-tuned.
    """

    steps: int
    tasks: int
    test_tasks: int = 160
    validation_tasks: int = 20


class Maml:
    """A network, one learning rate for each of its tensors, and the compiled inner loop."""

    def __init__(self) -> None:
        self.model = Conv4(outputs=WAYS)
        self.rates = {
            name: torch.tensor(INNER_LR, requires_grad=True)
            for name, _ in self.model.named_parameters()
        }
        groups = [
            {"params": [parameter], "lr": self.rates[name]}
            for name, parameter in self.model.named_parameters()
        ]
        inner = torch.optim.SGD(groups, lr=INNER_LR)
        self.program = unrollc.compile(self.model, inner, F.cross_entropy)

    def adapt(self, task: Task) -> unrollc.Result:
        """Five steps on the support images; `loss` is that of the queries."""
        return self.program(unrollc.repeat(task.support, INNER_STEPS), task.query)

    def lower(self, task: Task) -> unrollc.Lowered:
        """What `adapt` runs."""
        return self.program.lower(unrollc.repeat(task.support, INNER_STEPS), task.query)

    def predict(self, result: unrollc.Result, images: Tensor) -> Tensor:
        """Labels by the adapted weights."""
        buffers = {name: buffer.clone() for name, buffer in result.buffers.items()}
        state = {**result.params, **buffers}  # BatchNorm writes to its buffers: to copies
        with torch.no_grad():
            return torch.func.functional_call(self.model, state, (images,)).argmax(1)

    def accuracy(self, result: unrollc.Result, task: Task) -> float:
        images, labels = task.query
        return (self.predict(result, images) == labels).float().mean().item()


def meta_train(maml: Maml, sampler: TaskSampler, budget: Budget) -> list[float]:
    """Outer Adam over initial weights and learning rates; query accuracy of every outer step."""
    outer = torch.optim.Adam(
        [
            {"params": list(maml.model.parameters()), "lr": OUTER_LR},
            {"params": list(maml.rates.values()), "lr": OUTER_LR_OF_LR},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, budget.steps)
    accuracies: list[float] = []
    curve: list[float] = []
    with progress("meta-training", budget.steps) as advance:
        for _ in range(budget.steps):
            outer.zero_grad()
            for _ in range(budget.tasks):
                task = sampler.draw()
                result = maml.adapt(task)
                (result.loss / budget.tasks).backward()
                accuracies.append(maml.accuracy(result, task))
            outer.step()
            schedule.step()
            curve.append(mean(accuracies[-budget.tasks :]))
            advance(f"running accuracy {100 * mean(accuracies[-RUNNING:]):.1f} %")
    return curve


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def meta_test(maml: Maml, tasks: list[Task]) -> Estimate:
    """Accuracy of the queries over held-out tasks."""
    accuracies: list[float] = []
    with progress("meta-test", len(tasks)) as advance, torch.no_grad():
        for task in tasks:
            accuracies.append(maml.accuracy(maml.adapt(task), task))
            advance(f"accuracy {100 * mean(accuracies):.1f} %")
    return Estimate.of(accuracies)


@dataclass(frozen=True)
class BaselineReport:
    """Meta-test accuracy of ordinary training, and how it was had."""

    estimate: Estimate
    account: str


def test_baseline(
    split: Split, images: int, budget: Budget, tasks: list[Task], seed: int
) -> BaselineReport:
    """Train on `images` images, choose how to fine-tune on validation tasks, test on `tasks`."""
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    with progress("ordinary training", pretraining_steps(images)) as advance:
        network = pretrain(split.train, images, generator, lambda loss: advance(f"loss {loss:.2f}"))
    seconds = time.perf_counter() - begin
    sampler = TaskSampler(split.validation, generator, WAYS)
    validation = [sampler.draw() for _ in range(budget.validation_tasks)]
    with progress("choose fine-tuning", len(validation)) as advance:
        recipe = choose_recipe(network, validation, advance)
    accuracies: list[float] = []
    with progress("fine-tuning", len(tasks)) as advance:
        for task in tasks:
            accuracies += fine_tune(network, task, recipe.learning_rate, [recipe.steps])
            advance(f"accuracy {100 * mean(accuracies):.1f} %")
    account = (
        f"ordinary training on {pretraining_steps(images) * BATCH:,} images "
        f"({seconds:.0f} s), then "
        f"{recipe.steps} steps at learning rate {recipe.learning_rate}"
    )
    return BaselineReport(Estimate.of(accuracies), account)


def show_program(lowered: unrollc.Lowered) -> None:
    """Verdicts, memory plan and the first inner step in the code that has just been run."""
    console.rule("requirements")
    print(lowered.requirements)
    console.rule("memory plan")
    print(lowered.plan)
    lines = lowered.code.splitlines()
    step = next(index for index, line in enumerate(lines) if line.startswith("def step_0("))
    first = next(n for n in range(step, len(lines)) if lines[n].strip().startswith("# --"))
    console.rule(f"generated code, lines {first + 1} to {first + CODE_LINES} of {len(lines):,}")
    for line in lines[first : first + CODE_LINES]:
        console.print(Syntax(line, "python", background_color="default"), no_wrap=True)


def show_rates(maml: Maml) -> None:
    table = Table(title=f"Learned learning rates (all started at {INNER_LR})")
    table.add_column("tensor")
    table.add_column("learning rate", justify="right")
    for name, rate in maml.rates.items():
        table.add_row(name, f"{rate.item():.3f}")
    console.print(table)


def show_comparison(maml: Estimate, account: str, baseline: BaselineReport, tasks: int) -> None:
    table = Table(title=f"{WAYS}-way 1-shot on never-seen characters, {tasks} tasks, 95 % interval")
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("network")
    table.add_row(str(maml), f"MAML: {account}")
    table.add_row(str(baseline.estimate), f"fine-tuned: {baseline.account}")
    console.print(table)


def read_characters(omniglot: Path | None, seed: int) -> Split:
    """Omniglot where its folder is given, letterforms otherwise."""
    if omniglot is None:
        return load_glyphs(seed)
    try:
        return load_omniglot(omniglot, seed)
    except OmniglotLayoutError as error:
        raise typer.BadParameter(str(error), param_hint="--omniglot") from error


def main(
    steps: Annotated[int, typer.Option(min=1, help="Outer steps.")] = 120,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks in an outer step.")] = 4,
    seed: Annotated[int, typer.Option(help="Of split, weights and tasks.")] = 0,
    figure: Annotated[Path, typer.Option(help="Where to write the figure.")] = Path(
        "maml_glyphs.png"
    ),
    omniglot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of Omniglot, to use instead.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="For ordinary training; by default as many as MAML draws.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Very little of everything.")] = False,
) -> None:
    """Meta-train on letterforms; compare with ordinary training and fine-tuning."""
    budget = Budget(3, 2, test_tasks=4, validation_tasks=1) if quick else Budget(steps, tasks)
    torch.set_num_threads(1)  # small tensors: threads gain little, and lose much on a busy machine
    torch.manual_seed(seed)
    split = read_characters(omniglot, seed)
    console.print(
        f"{len(split.train):,} characters for meta-training, {len(split.validation):,} for "
        f"meta-validation, {len(split.test):,} for meta-testing"
    )
    sampler = TaskSampler(split.train, torch.Generator().manual_seed(seed), WAYS)
    test_sampler = TaskSampler(split.test, torch.Generator().manual_seed(seed + 1), WAYS)
    test_tasks = [test_sampler.draw() for _ in range(budget.test_tasks)]

    maml = Maml()
    begin = time.perf_counter()
    curve = meta_train(maml, sampler, budget)
    seconds = time.perf_counter() - begin
    show_program(maml.lower(test_tasks[0]))
    show_rates(maml)
    accuracy = meta_test(maml, test_tasks)

    drawn = budget.steps * budget.tasks * sampler.images_per_task
    baseline = test_baseline(split, images or drawn, budget, test_tasks, seed)
    account = f"meta-training on {drawn:,} images ({seconds:.0f} s), then {INNER_STEPS} steps"
    show_comparison(accuracy, account, baseline, len(test_tasks))
    save_figure(Summary(curve, accuracy, baseline.estimate, predictions(maml, test_tasks)), figure)
    console.print(f"figure: {figure}")


def predictions(maml: Maml, tasks: list[Task]) -> list[Prediction]:
    """For the figure, the first few held-out tasks."""
    with torch.no_grad():
        return [
            Prediction(task, maml.predict(maml.adapt(task), task.query[0]))
            for task in tasks[:SAMPLE_TASKS]
        ]


if __name__ == "__main__":
    typer.run(main)
