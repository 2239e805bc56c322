"""Who draws what, and what it was worth relative to its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo import distributed
from lightning_unigrpo.advantage import Advantages, gdpo_advantages, group_advantages
from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.reward import combine, require_scores
from lightning_unigrpo.rollout import Start
from lightning_unigrpo.types import Prompt, sampled

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class RolloutGrouping(UniGRPOCallback):
    """Lay the G members of each group over the ranks, and compare them when their rewards are known.

    Members are numbered through all groups and cut into equal contiguous parts, so a group may sit on
    one rank or on several; draws are keyed by prompt and member and rewards are gathered, so the
    advantages are the same either way.
    """

    def assign(
        self, prompts: Sequence[Prompt], group_size: int, *, rank: int = 0, world_size: int = 1
    ) -> list[Start]:
        """Return this rank's share of the trajectories to draw.

        Args:
            prompts: of one iteration, the same on all ranks.
            group_size: G.
            rank: this rank.
            world_size: number of ranks.

        Raises:
            ValueError: when the members cannot be dealt out equally.
        """
        total = len(prompts) * group_size
        if total % world_size:
            raise ValueError(
                f"{len(prompts)} prompts x {group_size} members = {total} rollouts cannot be dealt out "
                f"equally to {world_size} ranks; change data.prompts_per_iteration or "
                "model.sampling.group_size."
            )
        share = total // world_size
        mine = range(rank * share, (rank + 1) * share)
        return [Start(prompts[i // group_size], i // group_size, i % group_size) for i in mine]

    @override
    def on_rewards(self, trainer: Trainer, module: UniGRPOModule, experience: Experience) -> None:
        trajectories, objective = experience.trajectories, module.objective
        rewards = penalise_truncation(experience, objective.truncation_reward)
        for trajectory, reward in zip(
            trajectories, combine(rewards, experience.reward_weights).tolist(), strict=True
        ):
            trajectory.reward = reward
        groups = torch.tensor([t.group for t in trajectories], device=rewards.device)
        table = distributed.gather_rows(
            torch.cat([groups.unsqueeze(1).double(), rewards.double()], 1)
        )
        known = distributed.gather_rows(experience.rewards)
        # Made here: a user's subclass may have a constructor of its own, and need not call ours.
        silent: dict[str, int] = vars(self).setdefault("_silent", {})
        require_scores(known, experience.reward_names, experience.reward_weights, silent)
        everyone = self.advantages(module, table[:, 0].long(), table[:, 1:].float(), experience)
        offset = distributed.rank() * len(trajectories)  # assign() deals equal shares
        for i, trajectory in enumerate(trajectories):
            trajectory.usable = bool(everyone.usable[offset + i])
            value = float(everyone.values[offset + i])
            for _, segment in sampled([trajectory]):
                segment.advantage = value
        experience.metrics |= group_metrics(
            combine(table[:, 1:].float(), experience.reward_weights), table[:, 0].long(), everyone
        )

    def advantages(
        self, module: UniGRPOModule, groups: Tensor, rewards: Tensor, experience: Experience
    ) -> Advantages:
        """Compare the members of each group; override for another baseline.

        Args:
            module: for its objective.
            groups: ``[n]`` int64, over all ranks.
            rewards: ``[n, m]`` float32, over all ranks.
            experience: for the reward weights.
        """
        objective = module.objective
        settings = {"eps": objective.advantage_eps, "clamp": objective.advantage_clamp}
        weights = experience.reward_weights
        if objective.combine_rewards == "gdpo":
            return gdpo_advantages(rewards, groups, weights, **settings)
        combined = combine(rewards, weights)
        return group_advantages(combined, groups, scale=objective.advantage_scale, **settings)


def penalise_truncation(experience: Experience, truncation_reward: float | None) -> Tensor:
    """Return the rewards ``[n, m]`` with those of truncated reasoning replaced.

    When the limit equals the longest useful text the stop token has no effect on the image, and
    drifts away unless its absence costs something.
    """
    if truncation_reward is None:
        return experience.rewards
    cut = torch.tensor(
        [not t.stopped for t in experience.trajectories], device=experience.rewards.device
    )
    return torch.where(cut.unsqueeze(1), truncation_reward, experience.rewards)


def group_metrics(reward: Tensor, groups: Tensor, advantages: Advantages) -> dict[str, float]:
    """Return how much the groups have to say: mean, spread, share without information.

    Args:
        reward: ``[n]`` combined, NaN = not scorable.
        groups: ``[n]`` int64.
        advantages: of the same rows.
    """
    _, index = groups.unique(return_inverse=True)
    known = reward.isfinite()
    size = torch.zeros(int(index.max()) + 1, device=reward.device)
    count = size.index_add(0, index, known.float()).clamp_min(1)
    value = reward.nan_to_num()
    mean = size.index_add(0, index, value) / count
    spread = size.index_add(0, index, torch.where(known, value - mean[index], 0.0).square()) / count
    alive = size.index_add(0, index, advantages.usable.float()) > 0
    return {
        "reward": float(value.sum() / known.sum().clamp_min(1)),
        "reward/group_std": float(spread.sqrt().mean()),
        "reward/masked_groups": float((~alive).float().mean()),
        "reward/unscored": float((~known).float().mean()),
    }
