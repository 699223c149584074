"""Verdicts on meta-parameters and how they print."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from unrollc.capture.kind import Branch
from unrollc.errors import RequirementError, Source
from unrollc.requirements.dependence import CutOp
from unrollc.requirements.kinks import Kink
from unrollc.step import StepGraph

if TYPE_CHECKING:
    from unrollc.requirements.calculus.derive import Derivation


@dataclass(frozen=True)
class Finding:
    """Whether one requirement holds for one meta-parameter.

    Attributes:
        holds: True, False, or None where the requirement does not concern the meta-parameter.
        reason: The path that proves it, or what cuts it.
        where: The user's line, if one is to blame.
        kinks: Where the derivative jumps or is infinite; then it holds almost everywhere.
        trace: Finds `path`.
    """

    holds: bool | None
    reason: str
    where: Source | None = None
    kinks: tuple[Kink, ...] = ()
    trace: Callable[[], tuple[str, ...]] | None = field(default=None, compare=False, repr=False)

    @property
    def path(self) -> tuple[str, ...]:
        """The proof of a finding that holds: the ops of a differentiable path, with their lines."""
        return self.trace() if self.trace is not None else ()

    def __str__(self) -> str:
        if self.holds and self.kinks:
            return "holds almost everywhere"
        return {True: "holds", False: "fails", None: "-"}[self.holds]


@dataclass(frozen=True)
class Verdict:
    """Whether the meta-gradient with respect to one meta-parameter exists.

    Attributes:
        label: The meta-parameter.
        status: "exists", "zero" (Lval does not change with it, to first order) or "undefined"
            (there is no derivative, or Python code took its value and lost it).
        reason, where, remedy: Why, the user's line, and what to do.
        I, II, IIIa, IIIb: The requirements, each with its own finding.
        requested: Whether the user asks for this gradient.
        cuts: A minimal set of ops that cut every path to Lval, for a verdict of "zero".
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
    cuts: tuple[CutOp, ...] = ()

    @property
    def kinks(self) -> tuple[Kink, ...]:
        """Where the meta-gradient jumps or does not exist; a set of measure zero."""
        findings = (self.I, self.II, self.IIIa, self.IIIb)
        return tuple(dict.fromkeys(kink for finding in findings for kink in finding.kinks))

    @property
    def proof(self) -> str:
        """The findings that hold, each with the ops of a differentiable path, a line each."""
        lines = []
        for name in _REQUIREMENTS:
            finding: Finding = getattr(self, name)
            if finding.holds:
                path = " → ".join(finding.path)
                lines.append(f"{name}: {finding.reason}" + (f": {path}" if path else ""))
        return "\n".join(lines)

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

    Attributes:
        verdicts: By label.
        labels: Labels of tensors by id, for look-up.
        steps: The distinct inner steps on which the verdicts were reached.
        I, II: The requirements that concern all meta-parameters alike.
        stops: Where code declares a derivative to be zero although the value depends on the
            meta-parameters; the meta-gradient follows the declaration.
        idle: Whether no fast weight has an inner gradient, so that the inner loop does nothing.
        branches: Tests of hyperparameters in the optimizer's code, with the outcome under which
            the verdicts hold; the program lowers again where one changes.
    """

    verdicts: Mapping[str, Verdict]
    labels: Mapping[int, tuple[str, ...]] = field(default_factory=dict, repr=False)
    steps: tuple[StepGraph, ...] = field(default=(), repr=False)
    I: Finding = Finding(None, "not decided")
    II: Finding = Finding(None, "not decided")
    stops: tuple[CutOp, ...] = ()
    idle: bool = False
    branches: tuple[Branch, ...] = ()

    @functools.cached_property
    def derivations(self) -> tuple[Derivation, ...]:
        """The update of the captured optimizer with its derivatives, one for each distinct update.

        Worked out when it is first asked for. Each prints as text, and as LaTeX (``.latex``).
        """
        from unrollc.requirements.calculus.derive import derive  # sympy is slow to import

        found: list[Derivation] = []
        for step in self.steps:
            found += [derivation for derivation in derive(step) if derivation not in found]
        return tuple(found)

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
        """Whether every requested meta-gradient exists (and the inner loop does anything)."""
        return not self.failed and not self.idle

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
            RequirementError: If a requested meta-gradient is zero or undefined, or if the inner
                loss reaches no fast weight.
        """
        for verdict in self.failed:
            raise verdict.error()
        self.raise_if_idle()

    def raise_if_idle(self) -> None:
        """Raise if the inner loss reaches no fast weight.

        Raises:
            RequirementError: With the line that cuts the inner gradient.
        """
        if not self.idle:
            return
        raise RequirementError(
            "the inner loss does not depend on any parameter that the optimizer holds",
            where=self.II.where,
            why="every inner gradient is absent, so the inner loop would change nothing: "
            f"{self.II.reason}",
            remedy="check that the loss uses the model's prediction, and for detach() or no_grad "
            "on the way",
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data for tools: one entry a meta-parameter, with one a requirement."""
        return {
            v.label: {
                "status": v.status,
                "reason": v.reason,
                "where": str(v.where) if v.where else None,
                "remedy": v.remedy,
                "requested": v.requested,
                "cuts": [_plain(cut.op, cut.reason, cut.where) for cut in v.cuts],
                **{name: _finding(getattr(v, name)) for name in _REQUIREMENTS},
            }
            for v in self.verdicts.values()
        }

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, color_system=None)
        console.print(self._parameters())
        if any(v.kinks for v in self):
            console.print(
                "a.e.: holds almost everywhere; the kinks are listed below", highlight=False
            )
        if self.verdicts:
            console.print(self._requirements())
        for kink in dict.fromkeys(kink for v in self for kink in v.kinks):
            console.print(f"kink: {kink}", highlight=False)
        for stop in self.stops:
            console.print(f"stop: {_with_line(stop.reason, stop.where)}", highlight=False)
        for branch in self.branches:
            console.print(f"branch: {_branch(branch)}", highlight=False)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def _parameters(self) -> Table:
        """A row for each meta-parameter."""
        table = Table(title="Requirements (GIMLI §2.4)", title_justify="left")
        labels = max((len(v.label) for v in self), default=0)
        table.add_column("meta-parameter", overflow="fold", min_width=min(labels, _LABEL_WIDTH))
        for column in ("gradient", *_REQUIREMENTS, "reason"):
            table.add_column(column, overflow="fold")
        for v in self:
            status = v.status if v.requested else f"{v.status}, not requested"
            findings = (_short(getattr(v, name)) for name in _REQUIREMENTS)
            table.add_row(v.label, status, *findings, _with_line(v.reason, v.where))
        return table

    def _requirements(self) -> Table:
        """A row for each requirement; III by the meta-parameters that differ in it."""
        table = Table(title="By requirement", title_justify="left")
        for column in ("requirement", "verdict", "meta-parameters", "reason"):
            table.add_column(column, overflow="fold")
        for name, text in _REQUIREMENTS.items():
            rows: dict[tuple[str, str], list[str]] = {}
            for v in self:
                finding = getattr(v, name)
                if finding.holds is not None:
                    key = (str(finding), _with_line(finding.reason, finding.where))
                    rows.setdefault(key, []).append(v.label)
            for (verdict, reason), labels in rows.items():
                every = len(labels) == len(self)
                table.add_row(f"{name}: {text}", verdict, "all" if every else _some(labels), reason)
        return table


_WIDTH = 110
_LABEL_WIDTH = 32

#: The requirements in the paper's words, shortened.
_REQUIREMENTS = {
    "I": "Lval differentiable in θ_T",
    "II": "opt differentiable in θ and G",
    "IIIa": "opt differentiable in it",
    "IIIb": "G differentiable in it",
}


def _short(finding: Finding) -> str:
    return "a.e." if finding.holds and finding.kinks else str(finding)


def _with_line(reason: str, where: Source | None) -> str:
    return f"{reason} ({where.short})" if where else reason


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")


def _branch(branch: Branch) -> str:
    labels, outcome = ", ".join(branch.labels), "true" if branch.outcome else "false"
    test = f"{branch.source.text!r} ({branch.source.short})" if branch.source else "a test"
    how = "is taken as" if branch.assumed else "is"
    return f"{labels}: {test} {how} {outcome}"


def _plain(op: str, reason: str, where: Source | None) -> dict[str, Any]:
    return {"op": op, "reason": reason, "where": str(where) if where else None}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "holds": finding.holds,
        "verdict": str(finding),
        "reason": finding.reason,
        "where": str(finding.where) if finding.where else None,
        "path": list(finding.path),
        "kinks": [_plain(kink.op, kink.at, kink.where) for kink in finding.kinks],
    }
