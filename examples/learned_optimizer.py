"""Learn an optimizer: an LSTM that looks at each weight's gradient and says how to move it.

After Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent". The
optimizer is an ordinary `torch.optim.Optimizer` whose step runs the LSTM. It learns on a small
network for scikit-learn's digits, with fresh weights and batches in each training. A training of
100 steps is cut into segments; the gradient of the loss at the end of a segment goes back through
all its steps into the LSTM, second-order terms included. What comes out is compared, on images and
weights that it has not seen, with Adam and SGD, each tuned by as many trainings as the LSTM has
learned from.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from digits import draw_batches, load_parts, reinitialise
from display import console, progress
from fewshot import Batch, Estimate
from rich.table import Table
from torch import Tensor, nn

import unrollc

SEGMENT = 20  # inner steps that a meta-gradient goes back through
BATCH = 128
TRAINING_IMAGES = 1000  # of 1,797; the others are for held-out problems
OUTER_LR = 3e-3
CLIP = 1.0
REPEATS = 8  # trainings that judge a cell of a grid, or a checkpoint
CHECKPOINT_EVERY = 10  # trainings
ADAM_LRS = (3e-3, 0.5)
SGD_LRS = (3e-2, 3.0)
MOMENTA = (0.0, 0.9, 0.95)


def optimizee() -> nn.Sequential:
    """One hidden layer of 20 sigmoid units, as in the paper; images [n, 64] to logits [n, 10]."""
    return nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))


class CoordinatewiseLSTM(nn.Module):
    """Gradients [n] and memory to updates [n] and memory; every coordinate is on its own.

    The inputs are the gradient's log-magnitude and sign (appendix A of the paper), and the
    gradient and its running mean in units of its running root mean square.
    """

    LOG_RANGE = 10.0
    OUTPUT_SCALE = 0.1

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(5, hidden), nn.LSTMCell(hidden, hidden)
        self.out = nn.Linear(hidden, 1)
        with torch.no_grad():  # begin with small updates
            self.out.weight.mul_(0.1)
            self.out.bias.zero_()

    def blank(self, n: int) -> dict[str, Any]:
        """The memory before the first step."""
        zeros = [torch.zeros(n, self.out.in_features) for _ in range(4)]
        first, second = (zeros[0], zeros[1]), (zeros[2], zeros[3])
        return {"mean": torch.zeros(n), "square": torch.zeros(n), "first": first, "second": second}

    def forward(self, g: Tensor, memory: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        mean = 0.9 * memory["mean"] + 0.1 * g
        square = 0.95 * memory["square"] + 0.05 * g * g
        scale = (square + 1e-12).sqrt()
        small = math.exp(-self.LOG_RANGE)
        inputs = [
            g.abs().clamp(min=small).log() / self.LOG_RANGE,
            torch.where(g.abs() < small, g / small, g.sign()),
            0.5 * g / scale,
            mean / scale,
            scale.log() / self.LOG_RANGE,
        ]
        first = self.first(torch.stack(inputs, 1), memory["first"])
        second = self.second(first[0], memory["second"])
        updates = self.OUTPUT_SCALE * self.out(second[0]).squeeze(1)
        return updates, {"mean": mean, "square": square, "first": first, "second": second}


class LearnedOptimizer(torch.optim.Optimizer):
    """Runs a network over all weights at once; its memory is the optimizer's state."""

    def __init__(self, params: Any, net: CoordinatewiseLSTM) -> None:
        super().__init__(params, {})
        self.net = net

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = torch.cat([p.grad.flatten() for p in params])
        memory = self.state["coordinates"] or self.net.blank(len(gradients))
        updates, self.state["coordinates"] = self.net(gradients, memory)
        for p, update in zip(params, updates.split([p.numel() for p in params]), strict=True):
            p.add_(update.view_as(p))


class Trainee:
    """An optimizee with its optimizer, and one segment of its training, compiled."""

    def __init__(self, build: Callable[[Any], torch.optim.Optimizer], **options: Any) -> None:
        self.model = optimizee()
        self.opt = build(self.model.parameters())
        self.program = unrollc.compile(self.model, self.opt, F.cross_entropy, **options)

    def restart(self, generator: torch.Generator) -> None:
        reinitialise(self.model, generator)
        self.opt.state.clear()

    def segment(self, part: Batch, generator: torch.Generator) -> unrollc.Result:
        """The next steps, on batches of a part of the images; judged on all of the part."""
        return self.program(draw_batches(part, SEGMENT, BATCH, generator), part)

    def train(self, part: Batch, segments: int, generator: torch.Generator) -> list[float]:
        """Losses at the ends of the segments of one training from fresh weights."""
        self.restart(generator)
        losses = []
        with torch.no_grad():
            for _ in range(segments):
                result = self.segment(part, generator)
                result.apply()
                losses.append(result.loss.item())
        return losses


def final_loss(trainee: Trainee, part: Batch, segments: int, seed: int) -> float:
    """Mean over trainings that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    finals = [trainee.train(part, segments, generator)[-1] for _ in range(REPEATS)]
    loss = sum(finals) / len(finals)
    return loss if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Method:
    """A way to train, and what finding it cost."""

    trainee: Trainee
    found: str
    trainings: int
    seconds: float


def meta_learn(
    part: Batch, trainings: int, segments: int, first_order: bool, generator: torch.Generator
) -> Method:
    """Descend the logarithm of the loss at the end of each segment.

    The logarithm lets the late segments, whose losses are small, count as much as the first one.
    The checkpoint that does best on problems of `part` is taken.
    """
    net = CoordinatewiseLSTM()
    trainee = Trainee(
        lambda params: LearnedOptimizer(params, net),
        meta=list(net.parameters()),
        gradient=unrollc.FirstOrder() if first_order else "exact",
    )
    outer = torch.optim.Adam(net.parameters(), lr=OUTER_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, trainings)
    best, kept = math.inf, copy.deepcopy(net.state_dict())
    judged = 0
    begin = time.perf_counter()
    with progress("learned", trainings) as advance:
        for number in range(1, trainings + 1):
            trainee.restart(generator)
            for _ in range(segments):
                result = trainee.segment(part, generator)
                outer.zero_grad()
                result.loss.log().backward()
                nn.utils.clip_grad_norm_(net.parameters(), CLIP)
                outer.step()
                result.apply()
            schedule.step()
            if number % CHECKPOINT_EVERY == 0 or number == trainings:
                loss = final_loss(trainee, part, segments, seed=1)
                judged += REPEATS
                if loss < best:
                    best, kept = loss, copy.deepcopy(net.state_dict())
            advance(f"loss {result.loss.item():.3f}, best checkpoint {best:.4f}")
    net.load_state_dict(kept)
    order = "first order" if first_order else "exact"
    found = f"{trainings * segments} meta-gradients ({order})"
    return Method(trainee, found, trainings + judged, time.perf_counter() - begin)


def grid_search(
    name: str,
    kind: type[torch.optim.Optimizer],
    cells: Sequence[dict[str, float]],
    part: Batch,
    segments: int,
) -> Method:
    """The hyperparameters with the lowest mean loss at the end."""
    trainee = Trainee(lambda params: kind(params, lr=0.1))
    (group,) = trainee.opt.param_groups

    def use(cell: dict[str, float]) -> None:  # as tensors they are inputs of one program
        group.update({key: torch.tensor(value) for key, value in cell.items()})

    losses: list[float] = []
    begin = time.perf_counter()
    with progress(name, len(cells)) as advance:
        for cell in cells:
            use(cell)
            losses.append(final_loss(trainee, part, segments, seed=1))
            advance(f"best loss {min(losses):.4f}")
    chosen = cells[losses.index(min(losses))]
    use(chosen)
    found = ", ".join(f"{key} {value:.3g}" for key, value in chosen.items())
    seconds = time.perf_counter() - begin
    return Method(trainee, f"{found} (of {len(cells)})", len(cells) * REPEATS, seconds)


def grids(trainings: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Cells for Adam and for SGD whose trainings are about as many as the learned one's."""
    cells = max(2, trainings // REPEATS)
    adam = [{"lr": lr} for lr in log_range(*ADAM_LRS, cells)]
    lrs = log_range(*SGD_LRS, max(2, cells // len(MOMENTA)))
    sgd = [{"lr": lr, "momentum": momentum} for lr, momentum in itertools.product(lrs, MOMENTA)]
    return adam, sgd


def log_range(low: float, high: float, count: int) -> list[float]:
    return torch.logspace(math.log10(low), math.log10(high), count).tolist()


def compare(
    methods: dict[str, Method], part: Batch, segments: int, problems: int, seed: int
) -> dict[str, Tensor]:
    """Losses [problems, 2 * segments] on the same held-out problems, to twice the horizon."""
    curves = {}
    for name, method in methods.items():
        generator = torch.Generator().manual_seed(seed)
        rows = [method.trainee.train(part, 2 * segments, generator) for _ in range(problems)]
        curves[name] = torch.tensor(rows, dtype=torch.float64)
    return curves


def show_curves(methods: dict[str, Method], curves: dict[str, Tensor], segments: int) -> None:
    problems = len(next(iter(curves.values())))
    columns = sorted({*range(0, segments, 2), segments - 1, 2 * segments - 1})
    table = Table(title=f"Loss on {problems} held-out problems, mean ± 95 % interval")
    table.add_column("method", no_wrap=True)
    for column in columns:
        beyond = " (beyond)" if column >= segments else ""
        table.add_column(f"step {SEGMENT * (column + 1)}{beyond}", justify="right")
    for name in methods:
        estimates = [Estimate.of(curves[name][:, column].tolist()) for column in columns]
        table.add_row(name, *(f"{e.mean:.4f} ± {e.half_width:.4f}" for e in estimates))
    console.print(table)
    costs = Table(title="What finding them cost")
    for heading in ("method", "found"):
        costs.add_column(heading)
    for heading in ("trainings", "seconds"):
        costs.add_column(heading, justify="right")
    for name, method in methods.items():
        costs.add_row(name, method.found, str(method.trainings), f"{method.seconds:.1f}")
    console.print(costs)


def verdict(curves: dict[str, Tensor], step: int, rival: str) -> str:
    """How the learned optimizer's loss stands to that of a rival, by the ratio on each problem."""
    ratios = (curves["learned"][:, step] / curves[rival][:, step]).log()
    ratio = Estimate.of(ratios.tolist())
    low, high = (math.exp(ratio.mean + sign * ratio.half_width) for sign in (-1, 1))
    said = (
        f"{math.exp(ratio.mean):.2f} times that of {rival} (95 % interval {low:.2f} to {high:.2f})"
    )
    if high < 1:
        return f"learned is better: its loss is {said}"
    if low > 1:
        return f"learned is worse: its loss is {said}"
    return f"no difference is shown: its loss is {said}"


def main(
    trainings: Annotated[int, typer.Option(help="Trainings that the LSTM learns from.")] = 120,
    segments: Annotated[int, typer.Option(help=f"Of {SEGMENT} steps in a training.")] = 5,
    problems: Annotated[int, typer.Option(help="Held-out problems that judge a method.")] = 30,
    first_order: Annotated[
        bool, typer.Option(help="Take the optimizee's gradients as constants, as the paper does.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data split, weights and batches.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few small steps, to see that it runs.")] = False,
) -> None:
    """Meta-train an LSTM as an optimizer; compare with tuned Adam and SGD."""
    if quick:
        trainings, segments, problems = 2, 2, 3
    torch.set_num_threads(1)  # the matrices are too small to share out
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    seen, held_out = load_parts([TRAINING_IMAGES], generator)
    learned = meta_learn(seen, trainings, segments, first_order, generator)
    adam, sgd = grids(learned.trainings)
    methods = {
        "learned": learned,
        "Adam": grid_search("Adam", torch.optim.Adam, adam, seen, segments),
        "SGD": grid_search("SGD", torch.optim.SGD, sgd, seen, segments),
    }
    curves = compare(methods, held_out, segments, problems, seed=seed + 1000)
    show_curves(methods, curves, segments)
    console.print(
        "Adam and SGD keep one learning rate, as in the paper; the LSTM may vary its own."
    )
    for rival in ("Adam", "SGD"):
        for step in (segments - 1, 2 * segments - 1):
            beyond = ", beyond what it was trained for" if step >= segments else ""
            where = f"At step {SEGMENT * (step + 1)}{beyond}"
            console.print(f"{where}: {verdict(curves, step, rival)}.")


if __name__ == "__main__":
    typer.run(main)
