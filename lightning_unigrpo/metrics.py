"""Rewards as metrics: sums on each rank, one number over all of them.

A reward gives a number per rollout of this rank; a metric adds them up and is synced when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unigrpo.reward import Reward, read_scores


class ScoreMetric(Metric):
    """Mean, spread and failures of scores, over all and by task.

    ``mean``, ``std`` (of rollouts, biased) and ``failures`` (rollouts without a score, a count); with tasks
    their means, and ``overall``, the unweighted mean of the means of those that occurred, as GenEval has it.

    Args:
        tasks: names of tasks.
        settings: of ``torchmetrics.Metric``.

    Example:
        >>> metric = ScoreMetric(tasks=("short", "long"))
        >>> metric.update(torch.tensor([1.0, 2.0, torch.nan, 9.0]), ["short", "short", "short", "long"])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'mean': 4.0, 'std': 3.55..., 'failures': 1.0, 'short': 1.5, 'long': 9.0, 'overall': 5.25}
    """

    full_state_update = False
    sums: Tensor
    """``[1 + tasks]`` float64, of all and of each task."""
    squares: Tensor
    """float64."""
    known: Tensor
    """``[1 + tasks]`` float64, how many were added."""
    failed: Tensor
    """float64."""

    def __init__(self, *, tasks: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self.tasks = tuple(tasks)
        each, one = torch.zeros(1 + len(self.tasks)).double(), torch.zeros(()).double()
        for name, zero in {"sums": each, "known": each, "squares": one, "failed": one}.items():
            self.add_state(name, zero, dist_reduce_fx="sum")

    def update(self, values: Tensor, tasks: Sequence[Any] | None = None) -> None:
        """Add scores.

        Args:
            values: ``[n]`` float, NaN = not scorable.
            tasks: of each; names that are no task of this metric count among all only.
        """
        values = values.to(self.sums.device, torch.float64)
        finite = values.isfinite()
        values = values.where(finite, 0.0)
        names = [None] * len(values) if tasks is None else tasks
        members = [[True] * len(values), *([name == task for name in names] for task in self.tasks)]
        counted = torch.tensor(members, device=values.device).bool() & finite  # [1 + tasks, n]
        self.sums = self.sums + (counted * values).sum(1)
        self.known = self.known + counted.sum(1)
        self.squares = self.squares + values.square().sum()
        self.failed = self.failed + (~finite).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the numbers over all ranks; NaN for the mean of nothing, tasks only where they occurred."""
        means = self.sums / self.known
        spread = (self.squares / self.known[0] - means[0].square()).clamp_min(0).sqrt()
        found = {"mean": means[0], "std": spread, "failures": self.failed}
        occurred = {
            name: mean
            for name, mean, count in zip(
                self.tasks, means[1:], self.known[1:].tolist(), strict=True
            )
            if count
        }
        if occurred:
            found |= occurred | {"overall": torch.stack([*occurred.values()]).mean()}
        return {name: value.float() for name, value in found.items()}


class RewardMetric(ScoreMetric):
    """:class:`ScoreMetric` of a reward, which it calls.

    Args:
        reward: scores what :meth:`update` is given. It is no part of the metric's modules: checkpoints do
            not hold it.
        tasks: names of tasks.
        task_column: of the prompts, with the name of each one's task.
        settings: of ``torchmetrics.Metric``.

    Example:
        >>> metric = RewardMetric(lambda length: length, tasks=("short", "long"))
        >>> metric.update(length=[1.0, 3.0, 9.0], tag=["short", "short", "long"])
        >>> float(metric.compute()["overall"])
        5.5
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        *,
        tasks: Sequence[str] = (),
        task_column: str = "tag",
        **settings: Any,
    ) -> None:
        super().__init__(tasks=tasks, **settings)
        # A list: a module would be registered.
        self._rewards = [reward if isinstance(reward, Reward) else Reward(reward)]
        self.task_column = task_column

    def update(self, **columns: Any) -> None:  # type: ignore[override]
        """Score rollouts and add them.

        Args:
            columns: keyword lists, as a reward is called with.
        """
        (reward,) = self._rewards
        count = len(next(iter(columns.values())))
        values, _ = read_scores(str(reward.name), reward(**columns), count)
        super().update(values, columns.get(self.task_column))
