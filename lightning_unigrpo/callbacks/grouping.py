"""Who draws what, and what it was worth relative to its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo import distributed
from lightning_unigrpo.advantage import (
    Advantages,
    gdpo_advantages,
    group_advantages,
    round_returns,
)
from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.reward import combine, require_scores, table_of_rounds
from lightning_unigrpo.rollout import Start
from lightning_unigrpo.types import Prompt, after_each_round, sampled_by_round

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
        rewards = penalised_rounds(experience, objective.truncation_reward)
        final = combine(rewards[:, -1], experience.reward_weights)
        for trajectory, reward in zip(trajectories, final.tolist(), strict=True):
            trajectory.reward = reward
        groups = torch.tensor([t.group for t in trajectories], device=rewards.device)
        last = [max((number for number, _ in sampled_by_round(t)), default=0) for t in trajectories]
        ends = torch.tensor(last, device=rewards.device)
        table = distributed.gather_rows(
            torch.cat([torch.stack([groups, ends], 1).double(), rewards.double().flatten(1)], 1)
        )
        index, rewards = table[:, 0].long(), table[:, 2:].float().unflatten(1, rewards.shape[1:])
        known = distributed.gather_rows(experience.rewards)
        # Made here: a user's subclass may have a constructor of its own, and need not call ours.
        silent: dict[str, int] = vars(self).setdefault("_silent", {})
        require_scores(known, experience.reward_names, experience.reward_weights, silent)
        returns = round_returns(rewards, objective.round_rewards, objective.round_weights)
        if objective.round_credit == "trajectory":
            returns = returns[:, :1]
        else:  # who ended before a round has no action there to be compared
            number = torch.arange(returns.shape[1], device=returns.device)
            returns[table[:, 1:2].long() < number] = torch.nan
        found = [self.advantages(module, index, each, experience) for each in returns.unbind(1)]
        offset = distributed.rank() * len(trajectories)  # assign() deals equal shares
        for i, trajectory in enumerate(trajectories, offset):
            trajectory.usable = any(bool(each.usable[i]) for each in found)
            for place, segment in sampled_by_round(trajectory):
                worth = float(found[min(place, len(found) - 1)].values[i])
                # The surrogate is linear in it.
                segment.advantage = worth * objective.loss_weight(place)
        combined = combine(rewards, experience.reward_weights)
        experience.metrics |= group_metrics(combined[:, -1], index, found[0])
        experience.metrics |= round_metrics(combined)

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


def penalised_rounds(experience: Experience, truncation_reward: float | None) -> Tensor:
    """Return the rewards ``[n, K, m]`` of each round with those behind truncated reasoning replaced.

    When the limit equals the longest useful text the stop token has no effect on the image, and
    drifts away unless its absence costs something. Where only the last image is scored, K is 1.
    Rewards of rounds that a trajectory did without are those of its last.
    """
    rewards = experience.round_rewards
    if rewards is None:
        rewards = experience.rewards.unsqueeze(1)
    if truncation_reward is None:
        return rewards
    count = rewards.shape[1]
    rounds = [after_each_round(t, count) for t in experience.trajectories]
    stopped = torch.tensor([[part.stopped] for parts in rounds for part in parts]).reshape(-1, 1)
    table = table_of_rounds(stopped, [*map(len, rounds)], count)
    return torch.where(table.to(rewards.device).bool(), rewards, truncation_reward)


def round_metrics(reward: Tensor) -> dict[str, float]:
    """Return the mean of each round, where there are several.

    Args:
        reward: ``[n, K]`` combined, NaN = not scorable.
    """
    if reward.shape[1] == 1:
        return {}
    return {f"reward/round_{k + 1}": float(each.nanmean()) for k, each in enumerate(reward.T)}


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
