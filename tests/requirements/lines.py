"""Lines of test files, named by a comment at their end."""

from pathlib import Path


def line_of(file: str, text: str) -> str:
    """``file.py:41`` for the one line of `file` that ends with the comment `text`."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    found = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith(f"# {text}")]
    assert len(found) == 1, text
    return f"{Path(file).name}:{found[0]}"
