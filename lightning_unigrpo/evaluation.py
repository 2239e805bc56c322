"""What validation and test say about a policy: rewards, by task too, the texts, and signs of hacking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from lightning_unigrpo.callbacks.base import Experience
from lightning_unigrpo.callbacks.grouping import penalised_rounds
from lightning_unigrpo.callbacks.rewards import diversity, saturation
from lightning_unigrpo.config import Evaluation, Objective, Sampling
from lightning_unigrpo.metrics import ScoreMetric
from lightning_unigrpo.reward import combine
from lightning_unigrpo.rewards.geneval import TASKS
from lightning_unigrpo.types import Trajectory

OTHERS = ("stopped", "text_length", "image/diversity", "image/saturation")
"""Figures beside the rewards."""


def drawn_by(sampling: Sampling, evaluation: Evaluation) -> Sampling:
    """Return the settings with what an evaluation draws: the plan, or its last image alone."""
    if evaluation.thinking or not sampling.num_images:
        return sampling
    return replace(sampling, plan=("image",), rounds=None)


class Figures(nn.ModuleDict):
    """A :class:`ScoreMetric` for each figure of validation and of test, under its name in the logs.

    Args:
        names: of the rewards.
        evaluation: says how many images a prompt has, and which column names its task.
        rounds: images of a trajectory.
    """

    def __init__(self, names: Sequence[str], evaluation: Evaluation, rounds: int = 1) -> None:
        self.rewards = ("reward", *(f"reward/{name}" for name in names))
        several = range(1, rounds + 1) if evaluation.every_round and rounds > 1 else ()
        self.all = (*self.rewards, *(f"reward/round_{k}" for k in several), *OTHERS)
        metrics = {
            f"{stage}/{name}": ScoreMetric(tasks=TASKS if name in self.rewards else ())
            for stage in ("val", "test")
            for name in self.all
        }
        super().__init__(metrics)
        self.evaluation = evaluation

    def add(self, stage: str, experience: Experience, objective: Objective) -> Tensor:
        """Count a batch; all ranks must, an empty one too.

        Returns:
            The combined rewards ``[n]``.
        """
        values = evaluation_values(experience, objective)
        column = self.evaluation.task_column
        tasks = [t.prompt.columns.get(column) for t in experience.trajectories]
        for name, each in values.items():
            cast(ScoreMetric, self[f"{stage}/{name}"]).update(each, tasks)
        return values["reward"]

    def finish(self, stage: str) -> dict[str, Tensor]:
        """Return the means over all ranks and begin anew.

        Of rewards also ``failures``, the means of tasks that occurred with their ``overall``, and of
        the combined one the ``std`` where a prompt has several images. What was never seen is left out.
        """
        found: dict[str, Tensor] = {}
        for name in self.all:
            key, metric = f"{stage}/{name}", cast(ScoreMetric, self[f"{stage}/{name}"])
            numbers = metric.compute()
            metric.reset()
            mean, spread, failures = (numbers.pop(each) for each in ("mean", "std", "failures"))
            if name.startswith("image/") and bool(mean.isnan()):
                continue
            found[key] = mean
            if name == "reward" and self.evaluation.num_images > 1:
                found[f"{key}/std"] = spread
            if name in self.rewards[1:]:
                found[f"{key}/failures"] = failures
            found |= {f"{key}/{task}": value for task, value in numbers.items()}
        return found


def evaluation_values(experience: Experience, objective: Objective) -> dict[str, Tensor]:
    """Return ``[n]`` values per trajectory under their names in the logs; NaN = not scorable."""
    by_round = penalised_rounds(experience, objective.truncation_reward)
    rewards, trajectories = by_round[:, -1], experience.trajectories
    columns = zip(experience.reward_names, rewards.unbind(1), strict=True)
    combined = combine(by_round, experience.reward_weights)  # [n, K]
    rounds = combined.unbind(1) if experience.round_rewards is not None else ()
    lengths = [sum(len(text.tokens) for text in t.texts) for t in trajectories]
    return {
        "reward": combined[:, -1],
        **{f"reward/{name}": column for name, column in columns},
        **{f"reward/round_{k}": each for k, each in enumerate(rounds, 1)},
        "stopped": torch.tensor([float(t.stopped) for t in trajectories]),
        "text_length": torch.tensor(lengths, dtype=torch.float32),
        "image/diversity": _spread(trajectories),
        "image/saturation": torch.tensor(
            [float("nan") if t.image is None else float(saturation(t.image)) for t in trajectories]
        ),
    }


def _spread(trajectories: Sequence[Trajectory]) -> Tensor:
    """Return the diversity of each prompt's images at its first one, NaN elsewhere and for a single one."""
    groups: dict[int, list[int]] = {}
    for i, t in enumerate(trajectories):
        if t.image is not None:
            groups.setdefault(t.group, []).append(i)
    found = torch.full((len(trajectories),), torch.nan)
    for members in groups.values():
        images = [image for i in members if (image := trajectories[i].image) is not None]
        if len(images) > 1 and len({image.shape for image in images}) == 1:
            found[members[0]] = diversity(torch.stack(images))
    return found
