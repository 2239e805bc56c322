"""What a check is, and how a run of them is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from lightning_unigrpo.testing.subject import Subject


ATOL = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Default bound by precision of the weights; velocities leave the adapter as float32."""
COARSE = 0.1
"""Default bound in lower precision."""
MAX_DIFFERENCE_ERROR = 0.05
"""Bound of a gradient against finite differences of float32 numbers."""


class Finding(NamedTuple):
    """What a check measured."""

    value: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule of the contract."""

    name: str
    measure: Callable[[Subject], Finding | float | None]
    """Returns what is compared with the bound; None = does not apply to this adapter."""
    rule: str
    """What must hold."""
    mend: str
    """Where to look when it does not."""
    bound: float | None
    """Largest value that passes; None = the tolerance of the run."""
    at_least: bool = False
    """The value must exceed the bound instead."""
    per_round: bool = False
    """Runs once for each number of rounds."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one check went."""

    check: Check
    rounds: int | None
    """Rounds of the trajectories, for checks that run per round."""
    value: float | None
    """None = skipped."""
    bound: float
    detail: str = ""

    @property
    def name(self) -> str:
        """Name of the check."""
        return self.check.name

    @property
    def passed(self) -> bool:
        """Whether the rule holds; a skipped check does not fail."""
        if self.value is None:
            return True
        return self.value > self.bound if self.check.at_least else self.value <= self.bound

    def __str__(self) -> str:
        label = self.name if self.rounds is None else f"{self.name} ({self.rounds} rounds)"
        if self.value is None:
            return f"skip  {label:<38} {self.detail}"
        sign = ">" if self.check.at_least else "<="
        state = "ok  " if self.passed else "FAIL"
        line = f"{state}  {label:<38} {self.value:.1e} {sign} {self.bound:.0e}"
        if self.passed:
            return line
        found = f"\n      found: {self.detail}" if self.detail else ""
        return f"{line}\n      rule:  {self.check.rule}{found}\n      mend:  {self.check.mend}"


@dataclass(frozen=True)
class Report:
    """How all checks went; ``str(report)`` is a table, with advice under what failed."""

    adapter: str
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        """Results that break the contract."""
        return [result for result in self.results if not result.passed]

    @property
    def failed_names(self) -> set[str]:
        """Names of the checks that failed."""
        return {result.name for result in self.failed}

    def __str__(self) -> str:
        ran = sum(result.value is not None for result in self.results)
        head = f"{self.adapter}: {ran - len(self.failed)} of {ran} checks passed"
        return "\n".join([head, *map(str, self.results)])


CHECKS: list[Check] = []
"""Every check, in the order in which they run: parts first, so that a failure explains later ones."""


class NoRolloutError(Exception):
    """Trajectories could not be drawn; the check ``rollout`` says why."""


def rule(
    rule: str,
    *,
    mend: str,
    bound: float | None = None,
    at_least: bool = False,
    per_round: bool = False,
) -> Callable[[Callable[[Subject], Finding | float | None]], Check]:
    """Make a check of a function and enter it in :data:`CHECKS`."""

    def enter(measure: Callable[[Subject], Finding | float | None]) -> Check:
        check = Check(
            name=measure.__name__,
            measure=measure,
            rule=rule,
            mend=mend,
            bound=bound,
            at_least=at_least,
            per_round=per_round,
        )
        CHECKS.append(check)
        return check

    return enter
