r"""Advantages: what a rollout was worth relative to the others of its group.

A reward that is NaN or infinite means "could not be scored": it takes part in no statistic, and its
rollout gets advantage 0. So does every rollout of a group that says nothing, because fewer than two
of its rewards are known or because they are all equal. Such rollouts are marked as not usable
instead of being removed: ranks must keep equal batches.

Statistics are computed in float64 on the CPU, where sums have a fixed order: all ranks get the same
bits from the same gathered rewards. Shape letters: ``n`` rollouts of all groups, ``m`` rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

# Rewards are float32 and often sums of several: the same image can score a few times 6e-8, relative
# to the reward's size, apart. 1e-6 is about ten such roundings. Below size 1 the bound is absolute:
# with the usual eps of 1e-4 a spread of 1e-6 gives advantages of 1%, which is noise as well.
_NO_SPREAD = 1e-6


class Advantages(NamedTuple):
    """Group-relative worth of rollouts."""

    values: Tensor
    """``[n]`` float32 (float64 for float64 rewards), unitless; 0 where not usable."""
    usable: Tensor
    """``[n]`` bool: scored, and in a group with something to compare."""


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-4,
    clamp: float = 5.0,
) -> Advantages:
    r"""Compare each reward with those of its group.

    ``A_i = (R_i - mean(R_g)) / (std(R_g) + eps)`` for every rollout ``i`` of group ``g``, with the
    population standard deviation (divisor G, not G - 1).

    Deviation: the paper writes neither eps nor clamp, and leaves groups of equal rewards undefined;
    here they are masked, since eps alone would divide rounding errors by 1e-4.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Eq. 1; ``batch`` and clamp: Flow-GRPO,
    https://arxiv.org/abs/2505.05470 (released code); ``none``: Dr. GRPO,
    https://arxiv.org/abs/2503.20783.

    Args:
        rewards: ``[n]`` float, any unit, over all ranks; NaN or infinite = could not be scored.
        groups: ``[n]`` int64 group of each rollout; any integers, in any order.
        scale: divide by the standard deviation of the group, of all known rewards, or by nothing.
        eps: >= 0, added to the standard deviation, unit of the rewards.
        clamp: > 0, largest absolute advantage; ``inf`` = none.

    Returns:
        Values ``[n]`` with zero mean in each group before the clamp, and usable ``[n]``, on the
        device of ``rewards``.

    Raises:
        ValueError: when rewards and groups do not match, or for an unknown scale.

    Example:
        >>> rewards = torch.tensor([1.0, 3.0, float("nan"), 5.0, 5.0])
        >>> group_advantages(rewards, torch.tensor([0, 0, 0, 9, 9]))
        Advantages(values=tensor([-0.9999,  0.9999,  0.0000,  0.0000,  0.0000]),
                   usable=tensor([ True,  True, False, False, False]))
    """
    if rewards.ndim != 1:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}; give one number a rollout.")
    index = _group_index(rewards, groups)
    reward = rewards.detach().cpu().double()
    mean, spread, live = _moments(reward, reward.isfinite(), index)
    if scale == "group":
        divisor = spread + eps
    elif scale == "batch":
        everyone = torch.zeros_like(index)
        divisor = _moments(reward, reward.isfinite(), everyone)[1] + eps
    elif scale == "none":
        divisor = torch.ones_like(reward)
    else:
        raise ValueError(
            f"{scale!r} is not 'group', 'batch' or 'none' (objective.advantage_scale)."
        )
    return _finish((reward - mean) / divisor, live, clamp, rewards)


def gdpo_advantages(
    rewards: Tensor, groups: Tensor, weights: Tensor, *, eps: float = 1e-4, clamp: float = 5.0
) -> Advantages:
    r"""Compare each kind of reward with its group first, then combine the kinds.

    ``z_ik = (R_ik - mean(R_gk)) / (std(R_gk) + eps)``, ``s_i = sum_k w_k z_ik``,
    ``A_i = (s_i - mean(s)) / (std(s) + eps)`` with mean and std over the usable rollouts of all
    groups.

    A kind with large variance does not drown the others, as it does in a sum of raw rewards. A kind
    that is unknown for a rollout, or without spread in its group, adds nothing to ``s``: the
    rollout then counts as average in that kind.

    Source: GDPO, https://arxiv.org/abs/2601.05242.

    Args:
        rewards: ``[n, m]`` float, any units, over all ranks; NaN or infinite = could not be scored.
        groups: ``[n]`` int64 group of each rollout.
        weights: ``[m]`` of the kinds, unitless; 0 = logged only.
        eps: >= 0, added to each standard deviation.
        clamp: > 0, largest absolute advantage; ``inf`` = none.

    Returns:
        Values ``[n]`` and usable ``[n]``, on the device of ``rewards``.

    Raises:
        ValueError: when the shapes do not match.

    Example:
        >>> rewards = torch.tensor([[1.0, 70.0], [2.0, 50.0], [3.0, 60.0]])
        >>> gdpo_advantages(rewards, torch.tensor([4, 4, 4]), torch.tensor([1.0, 1.0])).values
        tensor([ 0.0001, -1.2246,  1.2246])
    """
    if rewards.ndim != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)} and weights {tuple(weights.shape)}; give "
            "[n, m] and [m]."
        )
    index = _group_index(rewards, groups)
    table, weight = rewards.detach().cpu().double(), weights.detach().cpu().double()
    combined = torch.zeros_like(table[:, 0])
    known = torch.zeros_like(index, dtype=torch.bool)
    for kind, share in zip(table.unbind(1), weight, strict=True):
        mean, spread, live = _moments(kind, kind.isfinite(), index)
        live = live & (share != 0)
        combined = combined + torch.where(live, share * (kind - mean) / (spread + eps), 0.0)
        known = known | live
    # Kinds may cancel: then the group has nothing to compare although each kind has.
    _, _, live = _moments(combined, known, index)
    mean, spread, _ = _moments(combined, live, torch.zeros_like(index))
    return _finish((combined - mean) / (spread + eps), live, clamp, rewards)


def round_returns(
    rewards: Tensor,
    kind: Literal["last", "each", "improvement"],
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Return what the rest of a trajectory was worth, from each of its rounds on.

    ``G_k = sum_{j >= k} r_j`` with ``r_j = w_j R_j`` (``each``), ``w_j (R_j - R_{j-1})`` and ``R_0 = 0``
    (``improvement``), or nothing but ``r_K = R_K`` (``last``).

    Source: ``last``: UniGRPO, https://arxiv.org/abs/2603.23500 (one terminal reward).

    Deviation: ``each`` and ``improvement`` are not in the paper. With weights of 1 the improvements add up to
    ``R_K``: over a whole trajectory they are the paper's reward, and differ from it in later rounds only.

    Args:
        rewards: ``[n, K, m]`` float, of the image of each round; NaN = could not be scored.
        kind: which images count.
        weights: K of them, unitless; ``None`` = 1 each.

    Returns:
        ``[n, K, m]``, NaN where a reward that counts is.

    Example:
        >>> rewards = torch.tensor([[[0.25], [0.75]]])
        >>> round_returns(rewards, "each").squeeze(), round_returns(rewards, "improvement").squeeze()
        (tensor([1.0000, 0.7500]), tensor([0.7500, 0.5000]))
    """
    each = rewards
    if kind == "improvement":
        each = torch.cat([rewards[:, :1], rewards.diff(dim=1)], 1)
    weight = rewards.new_ones(rewards.shape[1])
    if kind == "last":
        weight[:-1] = 0
    elif weights is not None:
        weight = rewards.new_tensor(weights)
    # A round that does not count may be unknown.
    worth = torch.where(weight[:, None] == 0, 0.0, weight[:, None] * each)
    return worth.flip(1).cumsum(1).flip(1)


def num_masked_groups(groups: Tensor, usable: Tensor) -> int:
    """Count the groups from which nothing is learned.

    ``|{g : no member of g is usable}|``

    Source: DAPO, https://arxiv.org/abs/2503.14476, which samples such groups again.

    Args:
        groups: ``[n]`` int64.
        usable: ``[n]`` bool, of :class:`Advantages`.

    Returns:
        Number of groups, at least 0.

    Example:
        >>> num_masked_groups(torch.tensor([7, 7, 2, 2]), torch.tensor([True, False, False, False]))
        1
    """
    return len(set(groups.tolist()) - set(groups[usable].tolist()))


def _group_index(rewards: Tensor, groups: Tensor) -> Tensor:
    """Number the groups 0, 1, ...: ``[n]`` int64 on the CPU."""
    if groups.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)} and groups {tuple(groups.shape)}; give one "
            "group a rollout."
        )
    number = {group: i for i, group in enumerate(dict.fromkeys(groups.tolist()))}
    return torch.tensor([number[group] for group in groups.tolist()], dtype=torch.int64)


def _moments(values: Tensor, known: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and population std of each rollout's group, and who is comparable: ``[n]``."""
    per_group = values.new_zeros(len(index))  # never more groups than rollouts
    filled = values.where(known, 0.0)
    size = per_group.index_add(0, index, known.to(values.dtype))[index].clamp_min(1)
    mean = per_group.index_add(0, index, filled)[index] / size
    square = (filled - mean).square().where(known, 0.0)
    std = (per_group.index_add(0, index, square)[index] / size).sqrt()
    # One known reward alone has std 0, and fails here as well.
    live = known & (std > _NO_SPREAD * mean.abs().clamp_min(1))
    return mean, std, live


def _finish(values: Tensor, live: Tensor, clamp: float, like: Tensor) -> Advantages:
    """Clamp, mask, and return to the dtype and device of the rewards."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    values = values.where(live, 0.0).clamp(-clamp, clamp)
    return Advantages(values.to(like.device, dtype), live.to(like.device))
