"""The figure of the few-shot example: learning curve, comparison, held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fewshot import Estimate, Task
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

INK, MUTED, MAML, OTHER, WRONG = "#1b1f24", "#8b949e", "#0b6e4f", "#b08968", "#c1121f"
QUERIES_SHOWN = 12
WINDOW = 10  # outer steps of the moving mean


@dataclass(frozen=True)
class Prediction:
    """A held-out task and the labels MAML gives its queries."""

    task: Task
    predicted: Tensor


@dataclass(frozen=True)
class Summary:
    """What the figure shows.

    Attributes:
        curve: accuracy on the queries of every outer step.
        maml, baseline: meta-test accuracies.
    """

    curve: Sequence[float]
    maml: Estimate
    baseline: Estimate
    predictions: Sequence[Prediction]


def save_figure(summary: Summary, path: Path) -> None:
    """Draw and write a PNG."""
    heights = [3.6, 0.4 + 0.85 * len(summary.predictions)]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    curve, bars = top.subplots(1, 2, width_ratios=[3, 1])
    draw_curve(curve, summary)
    draw_comparison(bars, summary)
    draw_tasks(bottom, summary.predictions)
    figure.savefig(path, dpi=160)


def draw_curve(axes: Axes, summary: Summary) -> None:
    accuracy = 100 * np.asarray(summary.curve)
    steps = np.arange(1, len(accuracy) + 1)
    axes.plot(steps, accuracy, color=MAML, alpha=0.25, linewidth=1, label="one outer step")
    window = min(WINDOW, len(accuracy))
    smooth = np.convolve(accuracy, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=MAML, linewidth=2, label=f"mean of {window}")
    axes.set(
        title="Meta-training",
        xlabel="outer step",
        ylabel="query accuracy after adaptation (%)",
        ylim=(min(50, accuracy.min()), 100),
    )
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    _strip(axes)


def draw_comparison(axes: Axes, summary: Summary) -> None:
    estimates = [summary.baseline, summary.maml]
    means = [100 * estimate.mean for estimate in estimates]
    errors = [100 * estimate.half_width for estimate in estimates]
    bars = axes.bar(
        ["fine-tuned", "MAML"], means, yerr=errors, color=[OTHER, MAML], width=0.6, capsize=4
    )
    axes.bar_label(bars, [f"{mean:.1f} %" for mean in means], padding=3, color=INK, fontsize=9)
    chance = 100 / len(summary.predictions[0].task.names)
    axes.axhline(chance, color=MUTED, linestyle=":", linewidth=1)
    axes.annotate("chance", (0.5, chance), ha="center", va="bottom", color=MUTED, fontsize=8)
    axes.set(title="Never-seen characters", ylabel="meta-test accuracy (%)", ylim=(0, 110))
    _strip(axes)


def draw_tasks(figure: SubFigure, predictions: Sequence[Prediction]) -> None:
    """A row for each task: its support images, a gap, some of its queries."""
    ways = len(predictions[0].task.names)
    figure.suptitle(
        "Held-out tasks: one support image per class, and queries with MAML's prediction",
        fontsize=11,
        color=INK,
    )
    widths = [1.0] * ways + [0.4] + [1.0] * QUERIES_SHOWN
    axes = figure.subplots(
        len(predictions), len(widths), width_ratios=widths, squeeze=False, gridspec_kw={"wspace": 0}
    )
    for row, prediction in zip(axes, predictions, strict=True):
        for panel in row:
            panel.set_axis_off()
        draw_support(row[:ways], prediction.task)
        draw_queries(row[ways + 1 :], prediction)


def draw_support(row: np.ndarray, task: Task) -> None:
    images, labels = task.support
    for label, panel in enumerate(row):
        _show(panel, images[labels == label][0, 0], f"class {label + 1}", INK)


def draw_queries(row: np.ndarray, prediction: Prediction) -> None:
    images, labels = prediction.task.query
    shown = np.linspace(0, len(labels) - 1, len(row)).round().astype(int)
    shown = np.random.default_rng(0).permutation(shown)
    for panel, index in zip(row, shown.tolist(), strict=True):
        predicted, truth = int(prediction.predicted[index]), int(labels[index])
        right = predicted == truth
        text = f"{predicted + 1} ✓" if right else f"{predicted + 1} ✗ ({truth + 1})"
        _show(panel, images[index, 0], text, MAML if right else WRONG)


def _show(panel: Axes, image: Tensor, title: str, colour: str) -> None:
    panel.imshow(255 - 255 * image.numpy(), cmap="gray", vmin=0, vmax=255)
    panel.set_title(title, fontsize=8, color=colour, pad=2)


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_color(INK)
    axes.tick_params(labelsize=8)
