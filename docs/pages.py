"""What the generators of pages share."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence


def write_or_compare(page: pathlib.Path, text: str, arguments: Sequence[str]) -> int:
    """Write a page, or with ``--check`` say whether it is what would be written.

    Returns:
        The exit code: 1 where they differ.
    """
    if "--check" in arguments:
        same = page.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{page.name} differs from what is generated")
        return 0 if same else 1
    page.write_text(text, encoding="utf-8")
    return 0
