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


class RewardMetric(Metric):
    """Mean, spread and failures of a reward, over all and by task.

    ``mean``, ``std`` (of rollouts, biased) and ``failures`` (rollouts without a score, a count); with tasks
    their means, and ``overall``, the unweighted mean of the means of those that occurred, as GenEval has it.

    Args:
        reward: scores what :meth:`update` is given; ``None`` = only :meth:`add` is used. It is no part of the
            metric's modules: checkpoints do not hold it.
        tasks: names of tasks.
        task_column: of the prompts, with the name of each one's task.
        settings: of ``torchmetrics.Metric``.

    Example:
        >>> metric = RewardMetric(lambda length: length, tasks=("short", "long"))
        >>> metric.update(length=[1.0, 2.0, None, 9.0], tag=["short", "short", "short", "long"])
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'mean': 4.0, 'std': 3.55..., 'failures': 1.0, 'short': 1.5, 'long': 9.0, 'overall': 5.25}
    """

    full_state_update = False
    sums: Tensor
    """``[1 + tasks]`` float64, of all and of each task."""
    squares: Tensor
    """float64."""
    known: Tensor
    """``[1 + tasks]`` int64, how many were added."""
    failed: Tensor
    """int64."""

    def __init__(
        self,
        reward: Callable[..., Any] | None = None,
        *,
        tasks: Sequence[str] = (),
        task_column: str = "tag",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        wrapped = reward if isinstance(reward, Reward) or reward is None else Reward(reward)
        self._rewards = [wrapped]  # a list: a module would be registered
        self.tasks, self.task_column = tuple(tasks), task_column
        rows = 1 + len(self.tasks)
        zeros = {"sums": torch.zeros(rows), "squares": torch.zeros(()), "known": torch.zeros(rows)}
        for name, value in zeros.items():
            self.add_state(name, value.double(), dist_reduce_fx="sum")
        self.add_state("failed", torch.zeros(()).double(), dist_reduce_fx="sum")

    def update(self, **columns: Any) -> None:
        """Score rollouts and add them.

        Args:
            columns: keyword lists, as a reward is called with.

        Raises:
            ValueError: when there is no reward to call.
        """
        (reward,) = self._rewards
        if reward is None:
            raise ValueError("RewardMetric was given no reward to call; use add(values).")
        count = len(next(iter(columns.values())))
        values, _ = read_scores(str(reward.name), reward(**columns), count)
        self._count(values, columns.get(self.task_column))

    def add(self, values: Tensor, tasks: Sequence[Any] | None = None) -> None:
        """Add scores that are known; counts as an update.

        Args:
            values: ``[n]`` float, NaN = not scorable.
            tasks: of each; names that are no task of this metric count among all only.
        """
        self._update_count += 1
        self._computed = None
        self._count(values, tasks)

    def _count(self, values: Tensor, tasks: Sequence[Any] | None) -> None:
        values = values.to(self.sums.device, torch.float64)
        finite = values.isfinite()
        values = values.where(finite, 0.0)
        every = torch.ones_like(values, dtype=torch.bool)
        named = [every] + [
            torch.tensor(
                [t == name for t in tasks or [None] * len(values)], device=values.device
            ).bool()
            for name in self.tasks
        ]
        members = torch.stack(named) & finite  # [1 + tasks, n]
        self.sums = self.sums + (members * values).sum(1)
        self.known = self.known + members.sum(1)
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
