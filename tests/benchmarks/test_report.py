"""The page of results: it agrees with the committed JSON, and targets are judged by its numbers."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from report import FIGURE, PAGE, RESULTS, page_of
from results import best, best_peer
from tables import HEADS, reasons, rows_of
from targets import TARGETS, Target, judged
from workloads import WORKLOADS


def entry(
    implementation: str, peer: str, seconds: list[float], budget: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "workload": "mlp-small",
        "implementation": implementation,
        "peer": peer,
        "budget": budget,
        "steps": 50,
        "run": "today",
        "seconds": seconds,
        "resident": 2**20,
        "cold": 3.0,
        "warm": 0.5,
        **more,
    }


PROFILE = {"products": 0.1, "convolutions": 0.0, "other ops": 0.04, "rest": 0.06}


def small() -> dict[str, Any]:
    return {
        "machine": {
            "cpu": "a processor",
            "cores": 2,
            "threads": 2,
            "memory": 2**34,
            "system": "Linux",
            "versions": {"torch": "2"},
        },
        "runs": {"today": {"gemm_rate": 1e9, "load": 0.5}},
        "entries": [
            entry("unrollc aten", "unrollc", [0.1, 0.2, 0.3], operations=10**8, profile=PROFILE),
            entry("higher", "higher", [0.9, 1.0, 1.2], agreement={"worst": 2e-15, "steps": 2}),
            entry("jax", "JAX", [0.5, 0.5, 0.5]),
            entry("jax checkpoint", "JAX", [0.4, 0.4, 0.4], resident=2**22),
            entry("plain training", "plain training", [0.05]),
            entry("torchopt", "torchopt", [], failed="it cannot"),
        ],
    }


def test_the_page_agrees_with_the_results() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page_of(results), "run `python benchmarks/report.py`"
    assert FIGURE.exists()


def test_a_busy_machine_is_named_on_the_page() -> None:
    busy = small()
    busy["runs"]["today"]["load"] = 3.0
    assert "was busy" in page_of(busy) and "was busy" not in page_of(small())


def test_the_page_says_where_the_time_goes() -> None:
    page = page_of(small()).splitlines()
    assert "| mlp-small: unrollc aten | 200 | 100 | 100 |  | 40 | 60 |" in page


def test_a_changed_number_is_told_apart() -> None:
    """The broken twin."""
    other = small()
    other["entries"][0]["seconds"] = [0.1, 0.25, 0.3]
    assert page_of(other) != page_of(small())


def test_the_fastest_row_of_a_peer_counts_and_training_is_no_peer() -> None:
    results = small()
    assert best(results, "mlp-small", "JAX")["implementation"] == "jax checkpoint"  # type: ignore[index]
    assert best_peer(results, "mlp-small")["implementation"] == "jax checkpoint"  # type: ignore[index]
    assert best(results, "mlp-small", "torchopt") is None


def test_rows_have_numbers_or_a_reason() -> None:
    rows = {row[0]: dict(zip(HEADS, row, strict=True)) for row in rows_of(small(), "mlp-small")}
    assert rows["unrollc aten"]["ms a call"] == "200"
    assert rows["unrollc aten"]["× best peer"] == "0.50"
    assert rows["unrollc aten"]["products ms"] == "100"
    assert rows["jax"]["apart"] == "not compared"
    assert rows["higher"]["apart"] == "2e-15 (T = 2)"
    assert rows["torchopt"]["ms a call"] == "no"
    assert reasons(small(), "mlp-small") == ["torchopt: no: it cannot"]
    assert "it cannot" in page_of(small())


@pytest.mark.parametrize(
    ("target", "measured", "met"),
    [
        (Target("mlp-small", "run time", 0.5, "JAX"), 0.5, True),
        (Target("mlp-small", "run time", 0.1, "higher"), 0.2, False),
        (Target("mlp-small", "memory", 0.3, "JAX"), 0.25, True),
        (Target("mlp-small", "memory", 0.5), 1.0, False),
        (Target("mlp-small", "cold compile", 10), 3.0, True),
        (Target("mlp-small", "warm compile", 0.1), 0.5, False),
        (Target("mlp-small", "run time", 1, "the best peer"), 0.5, True),
    ],
    ids=str,
)
def test_targets_are_ratios_of_medians_or_amounts(target: Any, measured: float, met: bool) -> None:
    finding = judged(small(), target)
    assert finding.measured == pytest.approx(measured)
    assert finding.met is met


def test_without_a_measurement_there_is_no_verdict() -> None:
    results = small()
    assert judged(results, Target("mlp-small", "run time", 1, "torchopt")).met is None
    assert judged(results, Target("mlp", "run time", 1, "JAX")).met is None
    assert judged(results, Target("mlp-small", "memory", 64, budget="64MiB")).met is None


def test_numbers_of_two_runs_are_marked() -> None:
    results = copy.deepcopy(small())
    results["entries"][1]["run"] = "yesterday"
    assert judged(results, Target("mlp-small", "run time", 0.1, "higher")).apart
    assert not judged(results, Target("mlp-small", "run time", 0.5, "JAX")).apart


def test_targets_name_what_is_measured() -> None:
    for target in TARGETS:
        assert target.budget in WORKLOADS[target.workload].budgets
