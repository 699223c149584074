"""Errors that say what failed, where in the user's code, why, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A place in the user's code.

    Attributes:
        file: Path of the file, or "" where only the module is known.
        line: 1-based line number, 0 where unknown.
        text: The line itself, stripped.
        module: Dotted name of the innermost ``nn.Module`` that was running, or "".
    """

    file: str
    line: int
    text: str = ""
    module: str = ""

    @property
    def short(self) -> str:
        """``model.py:41``, or ``module net.0`` where there is no line of the user's."""
        if self.file:
            return f"{self.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{self.line}"
        return f"module {self.module}"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else f"module {self.module!r}"
        return f"{place}   {self.text}" if self.text else place


class UnrollcError(Exception):
    """Base of all errors that unrollc raises for its users.

    Args:
        what: What failed, in one line.
        where: The user's line, if there is one.
        why: What causes it.
        remedy: What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: Source | str | None = None,
        why: str = "",
        remedy: str = "",
    ) -> None:
        self.what = what
        self.where = where
        self.why = why
        self.remedy = remedy
        lines = [what]
        if where:
            lines.append(f"  at {where}")
        if why:
            lines.append(f"  {why}")
        if remedy:
            lines.append(f"  Fix: {remedy}")
        super().__init__("\n".join(lines))


class InputError(UnrollcError, ValueError):
    """An argument of ``compile`` or of a program has the wrong form."""


class CaptureError(UnrollcError):
    """The user's model, loss or optimizer cannot be captured as a graph.

    Attributes:
        in_update: Whether the optimizer's step was running.
    """

    in_update = False


class RequirementError(UnrollcError):
    """A requested meta-gradient is severed, undefined or structurally zero (GIMLI, §2.4)."""


class BudgetError(UnrollcError, MemoryError):
    """No schedule of the program fits into the memory budget.

    Attributes:
        smallest: Bytes of the smallest budget that works.
    """

    smallest = 0


class NonFiniteError(UnrollcError, ArithmeticError):
    """A NaN or an infinity was found while running with ``debug=True``."""


class SpillError(UnrollcError):
    """States cannot be spilled to the disk, or are no longer there."""


class BackendError(UnrollcError):
    """Inductor cannot compile a program on this machine."""
