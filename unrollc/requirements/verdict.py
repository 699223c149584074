"""Verdicts on meta-parameters and how they print."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from unrollc.errors import RequirementError, Source


@dataclass(frozen=True)
class Finding:
    """Whether one requirement holds for one meta-parameter.

    Attributes:
        holds: True, False, or None where the requirement does not concern the meta-parameter.
        reason: The path that proves it, or what cuts it.
        where: The user's line, if one is to blame.
    """

    holds: bool | None
    reason: str
    where: Source | None = None

    def __str__(self) -> str:
        return {True: "holds", False: "fails", None: "-"}[self.holds]


@dataclass(frozen=True)
class Verdict:
    """Whether the meta-gradient with respect to one meta-parameter exists.

    Attributes:
        label: The meta-parameter.
        status: "exists", "zero" (no path leads from it to Lval) or "undefined" (Python code
            took its value, so that its gradient is lost).
        reason, where, remedy: Why, the user's line, and what to do.
        I, II, IIIa, IIIb: The requirements, each with its own finding.
        requested: Whether the user asks for this gradient.
    """

    label: str
    status: str
    reason: str
    where: Source | None
    remedy: str
    I: Finding
    II: Finding
    IIIa: Finding
    IIIb: Finding
    requested: bool = True

    def error(self) -> RequirementError:
        """The error that a failed verdict raises."""
        failed = [
            name for name in ("I", "II", "IIIa", "IIIb") if getattr(self, name).holds is False
        ]
        names = ", ".join(f"Requirement {name}" for name in failed)
        return RequirementError(
            f"no meta-gradient reaches {self.label}: it is {self.status}",
            where=self.where,
            why=f"{self.reason} ({names})" if names else self.reason,
            remedy=self.remedy,
        )


@dataclass(frozen=True)
class Requirements:
    """The verdicts on all meta-parameters, by label or by tensor.

    ``requirements["fc.weight"]`` and ``requirements[model.fc.weight]`` are the same `Verdict`.
    """

    verdicts: Mapping[str, Verdict]
    labels: Mapping[int, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @property
    def failed(self) -> list[Verdict]:
        """Verdicts on requested gradients that do not exist.

        A tensor in several places (a rate of two groups, data for training and validation) has
        a gradient where one of them has.
        """
        present = {v.label for v in self.verdicts.values() if v.status == "exists"}
        shared = {
            label for labels in self.labels.values() if present & set(labels) for label in labels
        }
        return [
            v
            for v in self.verdicts.values()
            if v.requested
            and v.status != "exists"
            and not (v.status == "zero" and v.label in shared)
        ]

    @property
    def ok(self) -> bool:
        """Whether every requested meta-gradient exists."""
        return not self.failed

    def __getitem__(self, key: str | Tensor | Any) -> Verdict:
        tensor = getattr(key, "per_step", key)
        labels = (key,) if isinstance(key, str) else self.labels.get(id(tensor), ())
        found = [self.verdicts[label] for label in labels if label in self.verdicts]
        if not found:
            known = ", ".join(self.verdicts)
            raise KeyError(f"{key!r} is not a meta-parameter; these are: {known}")
        return next((verdict for verdict in found if verdict.status == "exists"), found[0])

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts.values())

    def __len__(self) -> int:
        return len(self.verdicts)

    def raise_for_failure(self) -> None:
        """Raise the first failed verdict that was requested.

        Raises:
            RequirementError: If a requested meta-gradient is zero or undefined.
        """
        for verdict in self.failed:
            raise verdict.error()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data for tools: one entry a meta-parameter."""
        return {
            v.label: {
                "status": v.status,
                "reason": v.reason,
                "where": str(v.where) if v.where else None,
                "remedy": v.remedy,
                **{
                    name: {"holds": finding.holds, "reason": finding.reason}
                    for name in ("I", "II", "IIIa", "IIIb")
                    for finding in (getattr(v, name),)
                },
            }
            for v in self.verdicts.values()
        }

    def __str__(self) -> str:
        table = Table(title="Requirements (GIMLI §2.4)", title_justify="left")
        for column in ("meta-parameter", "gradient", "I", "II", "IIIa", "IIIb", "reason"):
            table.add_column(column, overflow="fold")
        for v in self.verdicts.values():
            where = f" ({v.where.short})" if v.where else ""
            status = v.status if v.requested else f"{v.status}, not requested"
            findings = (str(f) for f in (v.I, v.II, v.IIIa, v.IIIb))
            table.add_row(v.label, status, *findings, v.reason + where)
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(table)
        return out.getvalue().rstrip()
