"""The code in README and docs runs, block after block in one namespace a page."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/guide.md", "docs/requirements.md"]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str) -> None:
    found = blocks(page)
    assert found
    namespace: dict[str, object] = {"__name__": "page"}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, block in enumerate(found):
            exec(compile(block, f"{page}, block {number}", "exec"), namespace)


def test_every_link_leads_somewhere() -> None:
    for page in [*PAGES, "CONTRIBUTING.md", "docs/design/system.md", "docs/design/decisions.md"]:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_named_files_exist() -> None:
    """Files and folders that README and system.md name in backticks."""
    for page in ("README.md", "docs/design/system.md"):
        text = (ROOT / page).read_text()
        for name in re.findall(r"`((?:tests|examples|unrollc|docs)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
