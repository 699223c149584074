"""Every example runs as a command and shows what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(example: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
        "TERM": "dumb",
    }
    command = [sys.executable, str(ROOT / "examples" / example), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=600
    )


def succeed(example: str, *arguments: str, cwd: Path) -> str:
    done = run(example, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_maml(output: str) -> None:
    for title in ("meta-training", "requirements", "memory plan", "generated code"):
        assert title in output
    assert "running accuracy" in output
    assert "blocks.0.0.weight" in output and 'param_groups[0]["lr"]' in output
    assert "exists" in output
    assert re.search(r"peak\W+[\d.]+ [KM]iB", output)
    assert "op_convolution(" in output
    table = output[output.index("on never-seen characters") :]
    accuracies = re.findall(r"([\d.]+) % ± [\d.]+ %\W+(MAML|fine-tuned):", table)
    assert [method for _, method in accuracies] == ["MAML", "fine-tuned"]
    assert all(20 <= float(accuracy) <= 100 for accuracy, _ in accuracies)


def check_figure(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
        assert width > 1500 and height > 800
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 100


def test_maml_glyphs(tmp_path: Path) -> None:
    output = succeed("maml_glyphs.py", "--quick", cwd=tmp_path)
    check_maml(output)
    check_figure(tmp_path / "maml_glyphs.png")


def test_maml_on_omniglot(tmp_path: Path, omniglot_folder: Path) -> None:
    figure = tmp_path / "elsewhere.png"
    arguments = ("--quick", "--omniglot", str(omniglot_folder), "--figure", str(figure))
    output = succeed("maml_glyphs.py", *arguments, cwd=tmp_path)
    assert "42 characters for meta-training" in output
    check_maml(output)
    check_figure(figure)


def test_maml_names_the_wrong_folder(tmp_path: Path) -> None:
    done = run("maml_glyphs.py", "--quick", "--omniglot", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "--omniglot" in done.stderr and "images_background" in done.stderr
    assert "Traceback" not in done.stderr


def test_hyperparameters(tmp_path: Path) -> None:
    output = succeed("hyperparameters.py", "--quick", cwd=tmp_path)
    assert "3 gradients" in output
    assert re.search(r"\d+ × \d+ cells", output)
    rows = dict(re.findall(r"(untuned|grid search|meta-learned)\s+│(.+)", output))
    assert set(rows) == {"untuned", "grid search", "meta-learned"}
    assert "8.weight" in output and "wall time" in output


def test_learned_optimizer(tmp_path: Path) -> None:
    output = succeed("learned_optimizer.py", "--quick", cwd=tmp_path)
    assert "3 held-out problems" in output and "4 meta-gradients (exact)" in output
    rows = dict(re.findall(r"(learned|Adam|SGD)\s+│(.+±.+)", output))
    assert set(rows) == {"learned", "Adam", "SGD"}
    losses = {
        method: [float(x) for x in re.findall(r"([\d.]+) ±", row)] for method, row in rows.items()
    }
    assert all(len(row) == 3 for row in losses.values())
    assert losses["SGD"][0] > losses["SGD"][1]  # it trains
    # The sentence that is printed agrees with the table.
    at_the_end = re.search(
        r"At step 40: learned is (\w+): its loss is ([\d.]+) times that of SGD", output
    )
    assert at_the_end is not None
    assert at_the_end[1] == "worse" and float(at_the_end[2]) > 1
    assert losses["learned"][1] > losses["SGD"][1]


EXAMPLES = ["maml_glyphs.py", "hyperparameters.py", "learned_optimizer.py", "long_horizon.py"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_help(example: str, tmp_path: Path) -> None:
    assert "--quick" in succeed(example, "--help", cwd=tmp_path)
