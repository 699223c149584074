"""Writes docs/optimizers.md: what is verified of every optimizer of `torch.optim`.

``python -m docs.generate_optimizers`` runs every configuration against its oracles and writes the
page (some minutes); ``--check`` compares it with what would be written. The tests hold the page
row by row (`tests/optimizers/test_torch_optimizers.py`).
"""

from __future__ import annotations

import itertools
import pathlib
import sys

import torch
from rich.progress import track

from docs.pages import write_or_compare
from tests.optimizers.configurations import COLUMNS, Configuration, configurations, evaluate

PAGE = pathlib.Path(__file__).parent / "optimizers.md"

_HEAD = """# The optimizers of torch.optim

Written by `python -m docs.generate_optimizers` with torch {version}; every row is a test.

The optimizers' own `step` is captured, so there is no list of supported ones. This page says what
was verified of the configurations on which PyTorch tests its own optimizers (`optim_db`), and of a
few more:

* **steps**: five captured steps equal five steps of the real optimizer, weights and optimizer
  state alike, to a relative 1e-10 in float64; the number is that of the distinct captured steps.
* **= differences**: meta-gradients that equal finite differences of the real optimizer's training
  to 1e-5. Every number of the param group was a tensor, also where PyTorch wants a number.
* **= eager**: those that eager PyTorch (`differentiable=True`) computes too, equal to 1e-10.
* **eager differs**: those for which eager PyTorch gives another number, which differences refute:
  SGD starts its momentum from a detached gradient, for one.
* **no gradient**: where unrollc says so, and why.

Muon iterates in bfloat16, whose rounding hides its derivatives from finite differences; for the
comparison alone the cast goes to float64 on both sides.
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD.format(version=torch.__version__.partition("+")[0])]
    everything = track(configurations(), "optimizers", console=None)
    for kind, chosen in itertools.groupby(everything, lambda c: c.kind.__name__):
        parts += [f"\n## {kind}\n\n", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        parts += [row(configuration) for configuration in chosen]
    return "".join(parts)


def row(configuration: Configuration) -> str:
    """One line of the page."""
    return _line(evaluate(configuration).cells())


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    text = page()
    return write_or_compare(PAGE, text, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
