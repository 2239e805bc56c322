"""Advantages against NumPy in float64, group by group, and the cases that must be masked."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_unigrpo.advantage import gdpo_advantages, group_advantages, num_masked_groups

NAN, INF = math.nan, math.inf


def reference_group(
    rewards: np.ndarray, groups: np.ndarray, *, scale: str, eps: float
) -> np.ndarray:
    """UniGRPO Eq. 1 in a loop; only for groups with spread."""
    values = np.zeros(len(rewards))
    finite = np.isfinite(rewards)
    for g in set(groups.tolist()):
        members = (groups == g) & finite
        r = rewards[members]
        divisor = {"group": r.std() + eps, "batch": rewards[finite].std() + eps, "none": 1.0}[scale]
        values[members] = (r - r.mean()) / divisor
    return values


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Five interleaved groups with odd ids, two rewards missing."""
    rewards = torch.randn(40, generator=generator, dtype=torch.float64) * 3 + 1
    rewards[3], rewards[11] = NAN, INF
    ids = torch.tensor([-7, 0, 3, 10**12, 5])
    groups = ids[torch.arange(40) % 5][torch.randperm(40, generator=generator)]
    return rewards, groups


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_follow_the_equation(scale: str, batch: tuple[Tensor, Tensor]) -> None:
    rewards, groups = batch
    values, usable = group_advantages(rewards, groups, scale=scale, eps=1e-4, clamp=INF)
    expected = reference_group(rewards.numpy(), groups.numpy(), scale=scale, eps=1e-4)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13)  # float64
    assert torch.equal(usable, rewards.isfinite())


def test_population_standard_deviation() -> None:
    # mean 3, population variance (4 + 0 + 4) / 3 = 8/3; the sample variance would be 4
    values, _ = group_advantages(torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3).long(), eps=0.0)
    expected = [-2 / math.sqrt(8 / 3), 0.0, 2 / math.sqrt(8 / 3)]
    np.testing.assert_allclose(values, expected, rtol=1e-6)  # float32
    assert values.dtype == torch.float32


def test_clamp() -> None:
    # One of 101: deviation 100/101 of 1, std sqrt(100)/101, so 10 standard deviations
    rewards = torch.zeros(101)
    rewards[0] = 1.0
    groups = torch.zeros(101, dtype=torch.int64)
    assert group_advantages(rewards, groups, eps=0.0, clamp=INF).values[0].item() == pytest.approx(
        10
    )
    assert group_advantages(rewards, groups, eps=0.0).values[0].item() == 5.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "dead",
    [
        [0.1, 0.1, 0.1],
        [0.0, 0.0, 0.0],
        [0.7, NAN, INF],
        [NAN, NAN, NAN],
        # three ways to add 0.1 + 0.2 + 0.3 in float32: two roundings apart
        [0.6, 0.6000000238418579, 0.6000000834465027],
        [1e6, 1e6 + 0.0625, 1e6],  # one rounding at this size
        [-30.0, -30.0 + 2e-6, -30.0],
    ],
)
def test_groups_without_information_are_masked(dead: list[float], scale: str) -> None:
    rewards, groups = torch.tensor([*dead, 1.0, 2.0]), torch.tensor([4, 4, 4, 1, 1])
    values, usable = group_advantages(rewards, groups, scale=scale)
    assert usable.tolist() == [False, False, False, True, True]
    assert values[:3].tolist() == [0.0, 0.0, 0.0]
    assert values[3].item() == -values[4].item() < 0
    assert num_masked_groups(groups, usable) == 1


@pytest.mark.parametrize("alive", [[0.0, 1e-4], [1000.0, 1000.1], [0.5, 0.5001]])
def test_small_differences_are_information(alive: list[float]) -> None:
    assert group_advantages(torch.tensor(alive), torch.zeros(2).long()).usable.all()


def test_a_missing_reward_is_as_if_never_drawn() -> None:
    rewards, groups = torch.tensor([1.0, NAN, 4.0, 2.0]), torch.tensor([0, 0, 0, 0])
    values, usable = group_advantages(rewards, groups)
    alone, _ = group_advantages(rewards[[0, 2, 3]], groups[[0, 2, 3]])
    assert usable.tolist() == [True, False, True, True]
    assert torch.equal(values[[0, 2, 3]], alone)
    assert values[1] == 0


def test_nothing_at_all() -> None:
    values, usable = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(values) == len(usable) == 0


# --- GDPO ----------------------------------------------------------------------------------------


def reference_gdpo(
    rewards: np.ndarray, groups: np.ndarray, weights: np.ndarray, *, eps: float
) -> np.ndarray:
    """GDPO for a full table: normalise columns group by group, add, normalise the batch."""
    z = np.zeros_like(rewards)
    for g in set(groups.tolist()):
        block = rewards[groups == g]
        z[groups == g] = (block - block.mean(0)) / (block.std(0) + eps)
    total = z @ weights
    return (total - total.mean()) / (total.std() + eps)


def test_gdpo_follows_the_equations(generator: torch.Generator) -> None:
    rewards = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    rewards = rewards * torch.tensor([1.0, 50.0, 0.1]) + torch.tensor([0.0, 9.0, -1.0])
    groups, weights = torch.arange(24) % 4, torch.tensor([1.0, 0.5, 2.0]).double()
    values, usable = gdpo_advantages(rewards, groups, weights, clamp=INF)
    expected = reference_gdpo(rewards.numpy(), groups.numpy(), weights.numpy(), eps=1e-4)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13)
    assert usable.all()


def test_gdpo_skips_single_missing_entries() -> None:
    # Column 0 without row 1: mean 2, std 1, so z = -1, -, 1. Column 1: mean 3, std sqrt(8/3).
    rewards = torch.tensor([[1.0, 1.0], [NAN, 3.0], [3.0, 5.0]], dtype=torch.float64)
    values, usable = gdpo_advantages(rewards, torch.zeros(3).long(), torch.ones(2), eps=0.0)
    total = np.array([-1 - 2 / math.sqrt(8 / 3), 0.0, 1 + 2 / math.sqrt(8 / 3)])
    np.testing.assert_allclose(values, total / total.std(), atol=1e-13)
    assert usable.all()


def test_gdpo_masks() -> None:
    rewards = torch.tensor(
        [
            [1.0, 1.0],  # group 0: both kinds alive
            [2.0, 5.0],
            [3.0, NAN],  # group 1: nothing has two known, different values
            [3.0, 2.0],
            [NAN, 1.0],  # group 2: the first is unknown in both kinds
            [NAN, NAN],
            [NAN, 2.0],
            [1.0, 4.0],  # group 3: equal and opposite
            [2.0, 2.0],
        ]
    )
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    values, usable = gdpo_advantages(rewards, groups, torch.ones(2), eps=0.0)
    assert usable.tolist() == [True, True, False, False, True, False, True, False, False]
    assert (values[~usable] == 0).all()
    assert (values[usable] != 0).all()
    assert num_masked_groups(groups, usable) == 2


def test_gdpo_ignores_kinds_of_weight_0() -> None:
    rewards, groups = torch.tensor([[1.0, 5.0], [1.0, 6.0]]), torch.zeros(2).long()
    assert not gdpo_advantages(rewards, groups, torch.tensor([1.0, 0.0])).usable.any()
    with_it = gdpo_advantages(rewards, groups, torch.tensor([0.0, 1.0])).values
    alone = gdpo_advantages(rewards[:, 1:], groups, torch.tensor([1.0])).values
    assert torch.equal(with_it, alone)


def test_gdpo_needs_a_kind_that_counts() -> None:
    # The last rollout is known in the kind of weight 0 only.
    rewards, groups = torch.tensor([[1.0, 5.0], [2.0, 6.0], [NAN, 7.0]]), torch.zeros(3).long()
    values, usable = gdpo_advantages(rewards, groups, torch.tensor([1.0, 0.0]), eps=0.0)
    assert usable.tolist() == [True, True, False]
    assert values.tolist() == [-1.0, 1.0, 0.0]


def test_gdpo_weighs_kinds_not_units() -> None:
    rewards, groups = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.2, 0.9]]), torch.zeros(3).long()
    weights = torch.tensor([1.0, 0.3])
    once = gdpo_advantages(rewards, groups, weights, eps=0.0).values
    scaled = gdpo_advantages(rewards * torch.tensor([1.0, 1000.0]), groups, weights, eps=0.0).values
    torch.testing.assert_close(once, scaled, rtol=1e-5, atol=1e-5)  # float32 rewards


# --- errors --------------------------------------------------------------------------------------


def test_wrong_shapes_and_names() -> None:
    two, table = torch.zeros(2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one group a rollout"):
        group_advantages(two, torch.zeros(3).long())
    with pytest.raises(ValueError, match="one number a rollout"):
        group_advantages(table, torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"\[n, m\] and \[m\]"):
        gdpo_advantages(table, torch.zeros(2).long(), torch.ones(2))
    with pytest.raises(ValueError, match=r"objective\.advantage_scale"):
        group_advantages(two, torch.zeros(2).long(), scale="range")


def test_num_masked_groups() -> None:
    groups = torch.tensor([5, 5, -1, 8, 8])
    assert num_masked_groups(groups, torch.tensor([True, False, False, False, False])) == 2
    assert num_masked_groups(groups, torch.ones(5, dtype=torch.bool)) == 0
