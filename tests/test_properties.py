"""What must hold for any input: invariants of the formulas, searched by hypothesis."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_unigrpo.advantage import gdpo_advantages, group_advantages
from lightning_unigrpo.flow import draw_window, log_prob, ode_step, sigma_schedule, transition
from lightning_unigrpo.objective import (
    clipped_surrogate,
    k3_kl,
    latent_kl,
    log_clip_bounds,
    plain_log_ratio,
    ratio_norm,
    rescale_clip,
    token_weights,
    velocity_mse,
)

# Derandomised: a failure is the code's, never the day's. No data base: runs leave nothing behind.
modest = settings(derandomize=True, max_examples=40, deadline=None, database=None)

kinds = st.sampled_from(["flow", "dance", "cps"])
etas = st.floats(0.01, 1.0)
seeds = st.integers(0, 2**31 - 1)
shifts = st.floats(0.2, 10.0)
clips = st.floats(1e-7, 0.5)
aggregations = st.sampled_from(["sequence_mean", "token_mean", "constant"])
scales = st.sampled_from(["group", "batch", "none"])
conventions = st.sampled_from(["points", "steps"])


def normals(seed: int, count: int, *shape: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).unbind()


@st.composite
def steps(draw: st.DrawFn) -> dict[str, object]:
    """A step of a schedule, any but the last (where the noise of CPS is 0), in float64."""
    sigmas = sigma_schedule(draw(st.integers(3, 60)), shift=draw(shifts), convention="points")
    i = draw(st.integers(0, len(sigmas) - 3))
    return {
        "sigma": sigmas[i].double(),
        "sigma_next": sigmas[i + 1].double(),
        "eta": draw(etas),
        "kind": draw(kinds),
        "first": i == 0,
    }


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards in steps of 0.5 (float64), not all equal in any group, and their groups."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    ids = draw(st.lists(st.integers(-9, 9), min_size=len(sizes), max_size=len(sizes), unique=True))
    rewards: list[float] = []
    for size in sizes:
        values = draw(st.lists(st.integers(-20, 20), min_size=size, max_size=size))
        values[0] = values[1] + 1
        rewards += [value / 2 for value in values]
    groups = [g for g, size in zip(ids, sizes, strict=True) for _ in range(size)]
    order = draw(st.permutations(range(len(rewards))))
    table = torch.tensor(rewards, dtype=torch.float64)[list(order)]
    return table, torch.tensor(groups)[list(order)]


# --- flow ----------------------------------------------------------------------------------------


@modest
@given(num=st.integers(2, 300), shift=shifts, convention=conventions)
def test_schedules_fall_from_1_to_0(num: int, shift: float, convention: str) -> None:
    sigmas = sigma_schedule(num, shift=shift, convention=convention)
    assert len(sigmas) - 1 == (num - 1 if convention == "points" else num)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@modest
@given(step=steps(), seed=seeds)
def test_noise_that_vanishes_leaves_the_ode(step: dict[str, object], seed: int) -> None:
    v, x = normals(seed, 2, 4, 3)
    expected = ode_step(v, x, step["sigma"], step["sigma_next"])
    distances = []
    for eta in (1e-2, 1e-3, 0.0):
        mean, std = transition(v, x, **step | {"eta": eta})
        distances.append((mean - expected).abs().max().item() + std.abs().max().item())
    assert distances[1] < 0.2 * distances[0]  # std is of first order in eta, the mean of second
    assert distances[2] < 1e-13


@modest
@given(step=steps(), seed=seeds, a=st.floats(-2, 2))
def test_mean_is_affine_in_the_velocity(step: dict[str, object], seed: int, a: float) -> None:
    v, w, x = normals(seed, 3, 4, 3)
    mixed, std = transition(a * v + (1 - a) * w, x, **step)
    at_v, at_w = transition(v, x, **step), transition(w, x, **step)
    torch.testing.assert_close(mixed, a * at_v.mean + (1 - a) * at_w.mean, rtol=0, atol=1e-12)
    assert torch.equal(std, at_v.std)  # and std does not know the velocity


@modest
@given(step=steps(), seed=seeds)
def test_log_prob_is_largest_at_the_mean(step: dict[str, object], seed: int) -> None:
    v, x, away = normals(seed, 3, 4, 3)
    mean, std = transition(v, x, **step)
    assert log_prob(mean, mean, std) == 0
    assert log_prob(mean + away, mean, std) < 0
    assert log_prob(mean + 2 * away, mean, std) < log_prob(mean + away, mean, std)
    torch.testing.assert_close(
        log_prob(mean + away, mean, std, reduction="sum", normalizer=True),
        12 * log_prob(mean + away, mean, std, normalizer=True),  # N C = 4 * 3
    )


@modest
@given(num=st.integers(4, 30), eta=etas, kind=kinds, seed=seeds, cut=st.integers(1, 2))
def test_steps_may_be_taken_in_parts(num: int, eta: float, kind: str, seed: int, cut: int) -> None:
    sigmas = sigma_schedule(num, shift=3.0, convention="points")
    v, x = normals(seed, 2, num - 1, 4, 3)
    first = torch.arange(num - 1) == 0
    columns = (v, x, sigmas[:-1], sigmas[1:], first)
    whole = transition(*columns[:4], eta=eta, kind=kind, first=first)
    for part in (slice(0, cut), slice(cut, None)):
        *some, some_first = (column[part] for column in columns)
        moments = transition(*some, eta=eta, kind=kind, first=some_first)
        assert torch.equal(moments.mean, whole.mean[part])
        assert torch.equal(moments.std, whole.std[part])


@modest
@given(
    num_steps=st.integers(2, 60),
    data=st.data(),
    mode=st.sampled_from(["random", "fixed", "sliding"]),
    key=st.tuples(seeds, seeds, seeds),
)
def test_windows_lie_where_they_may(
    num_steps: int, data: st.DataObject, mode: str, key: tuple[int, int, int]
) -> None:
    low = data.draw(st.integers(0, num_steps - 2))
    size = data.draw(st.integers(1, num_steps - 1 - low))
    high = data.draw(st.integers(low + size, num_steps + 5))
    settings = {"size": size, "low": low, "high": high, "mode": mode}
    seed, step, group = key
    window = draw_window(num_steps, **settings, seed=seed, step=step, group=group)
    assert list(window) == list(range(window.start, window.start + size))
    assert window.start >= low
    assert window[-1] < min(high, num_steps - 1)
    assert window == draw_window(num_steps, **settings, seed=seed, step=step, group=group)


# --- objective -----------------------------------------------------------------------------------


@modest
@given(
    log_ratio=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    seed=seeds,
    low=clips,
    high=clips,
)
def test_surrogate_is_pessimistic(
    log_ratio: list[float], seed: int, low: float, high: float
) -> None:
    l = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    (advantage,) = normals(seed, 1, len(log_ratio))
    loss, clipped = clipped_surrogate(l, advantage, clip_low=low, clip_high=high)
    (gradient,) = torch.autograd.grad(loss.sum(), l)
    ratio, a = np.exp(log_ratio), advantage.numpy()
    expected = -np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-12)
    assert (loss.detach().numpy() >= -ratio * a - 1e-12).all()
    # No gradient where the ratio has already moved the way the advantage asks for, beyond the clip.
    improved = ((a > 0) & (ratio > 1 + high)) | ((a < 0) & (ratio < 1 - low))
    np.testing.assert_array_equal(clipped, improved)
    np.testing.assert_allclose(gradient, np.where(improved, 0.0, -ratio * a), rtol=1e-12)


@modest
@given(low=clips, high=clips)
def test_clip_bounds_are_ratios(low: float, high: float) -> None:
    bounds = log_clip_bounds(low, high)
    np.testing.assert_allclose(np.expm1(bounds), [-low, high], rtol=1e-12)


@modest
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    aggregation=aggregations,
    seed=seeds,
)
def test_micro_batches_do_not_change_the_loss(
    lengths: list[int], cut: int, aggregation: str, seed: int
) -> None:
    table, total = torch.tensor(lengths), sum(lengths)
    counts = {"num_sequences": len(lengths), "num_tokens": total, "constant_length": 7}
    (losses,) = normals(seed, 1, total)
    whole = token_weights(table, aggregation=aggregation, **counts)
    parts = [
        token_weights(p, aggregation=aggregation, **counts) for p in (table[:cut], table[cut:])
    ]
    assert torch.equal(torch.cat(parts), whole)
    if aggregation != "constant":
        filled = sum(length > 0 for length in lengths) / len(lengths)
        share = filled if aggregation == "sequence_mean" else float(total > 0)
        assert math.isclose(whole.sum().item(), share, rel_tol=1e-5)  # float32 weights
    if aggregation == "sequence_mean":
        chains = torch.split(losses, lengths)
        mean = sum(chain.mean() for chain in chains if len(chain)) / len(lengths)
        assert math.isclose((whole * losses).sum().item(), float(mean), rel_tol=1e-5, abs_tol=1e-6)


@modest
@given(seed=seeds, drift=st.floats(1e-8, 1.0), std=st.floats(0.05, 1.5))
def test_ratios(seed: int, drift: float, std: float) -> None:
    noise, old, towards = normals(seed, 3, 8, 4)
    new, scale = old + drift * towards, torch.full((1, 1), std, dtype=torch.float64)
    assert ratio_norm(noise, old, old) == 0
    assert plain_log_ratio(noise, old, old, scale) == 0
    normed, plain = ratio_norm(noise, new, old), plain_log_ratio(noise, new, old, scale)
    # RatioNorm rescales and recentres: log r = std (log rho + mean(d^2) / (2 std^2))
    restored = scale.squeeze() * (plain + latent_kl(new, old, scale))
    torch.testing.assert_close(normed, restored, rtol=1e-9, atol=1e-14)
    # It points where the state was drawn: moving the mean along the noise raises it.
    assert ratio_norm(noise, old + drift * noise, old) > 0


@modest
@given(seed=seeds, scale=st.floats(0.01, 3.0))
def test_penalties_are_0_at_the_reference_only(seed: int, scale: float) -> None:
    a, b = normals(seed, 2, 4, 3)
    std = torch.full((1, 1), scale, dtype=torch.float64)
    for penalty in (velocity_mse, lambda p, q: latent_kl(p, q, std), lambda p, q: k3_kl(p, q)):
        assert not penalty(a, a).any()
        assert (penalty(a, b) > 0).all()
    np.testing.assert_allclose(velocity_mse(a, b, reduction="sum"), 12 * velocity_mse(a, b))


@modest
@given(clip=clips, sizes=st.tuples(*[st.integers(1, 10**6)] * 3))
def test_clips_rescale_in_any_number_of_steps(clip: float, sizes: tuple[int, int, int]) -> None:
    a, b, c = sizes
    once = rescale_clip(clip, latent_size=c, reference_size=a)
    halfway = rescale_clip(clip, latent_size=b, reference_size=a)
    assert math.isclose(rescale_clip(halfway, latent_size=c, reference_size=b), once, rel_tol=1e-12)


# --- advantages ----------------------------------------------------------------------------------


@modest
@given(batch=batches(), scale=scales, shift=st.integers(-1000, 1000))
def test_advantages_ignore_a_shift(batch: tuple[Tensor, Tensor], scale: str, shift: int) -> None:
    rewards, groups = batch
    plain = group_advantages(rewards, groups, scale=scale)
    moved = group_advantages(rewards + shift, groups, scale=scale)
    torch.testing.assert_close(moved.values, plain.values, rtol=0, atol=1e-9)
    assert torch.equal(moved.usable, plain.usable)


@modest
@given(batch=batches(), factor=st.floats(0.1, 100), scale=st.sampled_from(["group", "batch"]))
def test_scaled_advantages_ignore_the_unit(
    batch: tuple[Tensor, Tensor], factor: float, scale: str
) -> None:
    rewards, groups = batch
    plain = group_advantages(rewards, groups, scale=scale, eps=1e-4)
    other = group_advantages(factor * rewards, groups, scale=scale, eps=factor * 1e-4)
    torch.testing.assert_close(other.values, plain.values, rtol=0, atol=1e-9)


@modest
@given(batch=batches(), scale=scales, seed=seeds)
def test_advantages_follow_the_order_and_not_the_names(
    batch: tuple[Tensor, Tensor], scale: str, seed: int
) -> None:
    rewards, groups = batch
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    plain = group_advantages(rewards, groups, scale=scale)
    other = group_advantages(rewards[order], 31 - 7 * groups[order], scale=scale)
    torch.testing.assert_close(other.values, plain.values[order], rtol=0, atol=1e-12)
    assert torch.equal(other.usable, plain.usable[order])


@modest
@given(batch=batches(), scale=scales, clamp=st.floats(0.1, 5))
def test_advantages_are_centred_and_bounded(
    batch: tuple[Tensor, Tensor], scale: str, clamp: float
) -> None:
    rewards, groups = batch
    values = group_advantages(rewards, groups, scale=scale, clamp=math.inf).values
    for g in groups.unique():
        assert abs(values[groups == g].sum()) < 1e-10
    clamped = group_advantages(rewards, groups, scale=scale, clamp=clamp).values
    assert torch.equal(clamped, values.clamp(-clamp, clamp))


@modest
@given(batch=batches(), data=st.data())
def test_missing_rewards_are_as_if_never_drawn(
    batch: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    rewards, groups = batch
    lost = data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards)))
    known = ~torch.tensor(lost)
    values, usable = group_advantages(rewards.masked_fill(~known, math.nan), groups)
    alone = group_advantages(rewards[known], groups[known])
    assert not values[~known].any()
    assert not usable[~known].any()
    torch.testing.assert_close(values[known], alone.values, rtol=0, atol=1e-12)
    assert torch.equal(usable[known], alone.usable)


@modest
@given(batch=batches(), weight=st.floats(0.1, 10), seed=seeds)
def test_gdpo(batch: tuple[Tensor, Tensor], weight: float, seed: int) -> None:
    rewards, groups = batch
    (other,) = normals(seed, 1, len(rewards))
    table, weights = torch.stack([rewards, other], 1), torch.tensor([1.0, weight])
    values, usable = gdpo_advantages(table, groups, weights, eps=0.0, clamp=math.inf)
    # Mean 0 and standard deviation 1 over the usable rollouts of the batch.
    chosen = values[usable]
    if len(chosen):
        assert abs(chosen.mean()) < 1e-9
        assert math.isclose(chosen.std(correction=0).item(), 1.0, rel_tol=1e-9)
    # One kind: the group advantage, normalised again, whatever the weight.
    single = gdpo_advantages(rewards[:, None], groups, weights[1:], eps=0.0, clamp=math.inf)
    plain = group_advantages(rewards, groups, eps=0.0, clamp=math.inf)
    torch.testing.assert_close(single.values, plain.values, rtol=0, atol=1e-9)
