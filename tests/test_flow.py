"""Schedules, steps and their densities, against equations, closed forms and golden vectors."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_unigrpo.flow import (
    draw_window,
    log_prob,
    ode_step,
    point_sigmas,
    sde_step,
    shift_sigma,
    sigma_schedule,
    step_sigmas,
    transition,
)

KINDS = ("flow", "dance", "cps")
BAGEL = sigma_schedule(25, shift=3.0, convention="points").double()
Golden = tuple[dict[str, Tensor], dict[str, Any]]


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def reference_moments(
    v: np.ndarray, x: np.ndarray, t: float, s: float, *, eta: float, kind: str, is_first: bool
) -> tuple[np.ndarray, float]:
    """Mean and step std of one image from the papers' equations, dt < 0, in another algebra."""
    dt = s - t
    x0, x1 = x - t * v, x + (1 - t) * v
    if kind == "cps":
        std = s * math.sin(eta * math.pi / 2)
        return (1 - s) * x0 + math.sqrt(s**2 - std**2) * x1, std
    if kind == "dance":  # the score of N((1-t) x0, t^2)
        score = -(x - (1 - t) * x0) / t**2
        return x + (v - 0.5 * eta**2 * score) * dt, eta * math.sqrt(-dt)
    diffusion = eta * math.sqrt(t / (1 - (s if is_first else t)))
    mean = x * (1 + diffusion**2 / (2 * t) * dt)
    mean = mean + v * (1 + diffusion**2 * (1 - t) / (2 * t)) * dt
    return mean, diffusion * math.sqrt(-dt)


# --- schedules -----------------------------------------------------------------------------------


def test_point_schedule_is_bagels() -> None:
    # u = 1, 23/24, ..., 0; sigma = 3u / (1 + 2u): sigma_1 = (69/24) / (70/24) = 69/70
    u = np.arange(24, -1, -1) / 24
    sigmas = point_sigmas(25, 3.0)
    assert sigmas.dtype == torch.float32
    assert sigmas[1].item() == np.float32(69 / 70)
    np.testing.assert_array_equal(sigmas.numpy(), (3 * u / (1 + 2 * u)).astype(np.float32))


def test_step_schedule_counts_calls() -> None:
    u = np.append(np.linspace(1, 1 / 25, 25), 0.0)  # as diffusers builds it
    sigmas = step_sigmas(25, 3.0)
    # Two ways to the same u differ by 1e-16; that may turn one float32 rounding: 6e-8.
    np.testing.assert_allclose(sigmas.numpy(), 3 * u / (1 + 2 * u), atol=6e-8, rtol=0)
    assert len(sigmas) == 26


def test_conventions_differ_by_one_call() -> None:
    points = sigma_schedule(25, shift=3.0, convention="points")
    steps = sigma_schedule(24, shift=3.0, convention="steps")
    assert torch.equal(points, steps)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: point_sigmas(1), "sampling.num_timesteps"),
        (lambda: step_sigmas(0), "sampling.num_timesteps"),
        (lambda: shift_sigma(torch.ones(1), 0.0), "sampling.shift"),
        (lambda: sigma_schedule(5, shift=1.0, convention="dots"), "sampling.schedule"),
    ],
)
def test_schedules_say_what_to_change(build: Callable[[], Tensor], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        build()


# --- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_moments_follow_the_equations(kind: str, eta: float, generator: torch.Generator) -> None:
    steps = len(BAGEL) - 1
    x, v = normal(2, steps, 6, 4, generator=generator), normal(2, steps, 6, 4, generator=generator)
    first = torch.arange(steps) == 0
    mean, std = transition(v, x, BAGEL[:-1], BAGEL[1:], eta=eta, kind=kind, first=first)
    assert std.shape == (2, steps, 1, 1)
    for b in range(2):
        for i in range(steps):
            expected = reference_moments(
                v[b, i].numpy(),
                x[b, i].numpy(),
                float(BAGEL[i]),
                float(BAGEL[i + 1]),
                eta=eta,
                kind=kind,
                is_first=i == 0,
            )
            # float64; cps at eta 1 takes sqrt(s^2 - c^2) of a rounding error in the reference: 1e-8
            np.testing.assert_allclose(mean[b, i], expected[0], atol=1e-7 if eta == 1 else 1e-12)
            np.testing.assert_allclose(std[b, i].item(), expected[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_tensors_agree(kind: str, generator: torch.Generator) -> None:
    x, v = normal(3, 2, 4, generator=generator), normal(3, 2, 4, generator=generator)
    numbers = transition(v, x, 1.0, 0.9, eta=0.5, kind=kind, first=True)
    tensors = transition(
        v,
        x,
        torch.ones(3),
        torch.full((3,), 0.9, dtype=torch.float64),
        eta=0.5,
        kind=kind,
        first=torch.ones(3, dtype=torch.bool),
    )
    assert torch.equal(numbers.mean, tensors.mean)
    assert torch.equal(numbers.std, tensors.std)
    assert numbers.std.shape == (3, 1, 1)


def test_first_step_rule_on_bagels_grid() -> None:
    # h_0 = 1 - sigma_1, S_0 = eta / sqrt(1 - sigma_1), so S_0 sqrt(h_0) = eta on any grid.
    # After it, for 25 points, shift 3, eta 0.8: 0.8 sqrt(sigma_i h_i / (1 - sigma_i)).
    x = torch.zeros(5, 1, 1, dtype=torch.float64)
    first = torch.arange(5) == 0
    _, std = transition(x, x, BAGEL[:5], BAGEL[1:6], eta=0.8, first=first)
    expected = [0.8, 0.8172921, 0.5820855, 0.4786344, 0.4173650]
    np.testing.assert_allclose(std.flatten(), expected, rtol=1e-5)  # grid rounded to float32: 4e-6


@pytest.mark.parametrize("num", [2, 5, 15, 50])
def test_std_of_the_first_step_is_eta(num: int) -> None:
    sigmas, x = point_sigmas(num), torch.zeros(1, 1)
    _, std = transition(x, x, sigmas[0], sigmas[1], eta=1.3, first=True)
    assert std.item() == pytest.approx(1.3, rel=1e-6)  # float32


def test_first_step_replaces_one_denominator_only() -> None:
    # sigma stays 1 in 1 - sigma and in 2 sigma: mean = x - h v - (eta^2 / 2) x = 2 - 0.3 - 0.64
    x, v = torch.full((1, 1), 2.0).double(), torch.full((1, 1), 3.0).double()
    mean, _ = transition(v, x, 1.0, 0.9, eta=0.8, first=True)
    assert mean.item() == pytest.approx(1.06, abs=1e-12)


def test_rule_goes_by_index_not_by_value() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    rounded = transition(x, x, 0.9999, 0.9, eta=0.8, first=True)
    # S = 0.8 sqrt(0.9999 / 0.1), h = 0.0999
    assert rounded.std.item() == pytest.approx(0.8 * math.sqrt(0.9999 / 0.1 * 0.0999), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_ode(kind: str, generator: torch.Generator) -> None:
    x, v = normal(24, 4, 3, generator=generator), normal(24, 4, 3, generator=generator)
    first = torch.arange(24) == 0
    mean, std = transition(v, x, BAGEL[:-1], BAGEL[1:], eta=0.0, kind=kind, first=first)
    torch.testing.assert_close(mean, ode_step(v, x, BAGEL[:-1], BAGEL[1:]), rtol=0, atol=1e-14)
    assert not std.any()


def test_the_ode_ends_at_the_data_of_a_straight_path(generator: torch.Generator) -> None:
    # velocity = noise - data is constant along x = (1 - sigma) data + sigma noise
    data, x = normal(2, 3, generator=generator), normal(2, 3, generator=generator)
    velocity = x - data
    for sigma, sigma_next in pairwise(BAGEL):
        x = ode_step(velocity, x, sigma, sigma_next)
    torch.testing.assert_close(x, data, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_sde_step_is_mean_plus_noise(kind: str, generator: torch.Generator) -> None:
    v, x, e = (normal(3, 2, 2, generator=generator) for _ in range(3))
    mean, std = transition(v, x, 0.8, 0.7, eta=0.6, kind=kind)
    drawn = sde_step(v, x, 0.8, 0.7, e, eta=0.6, kind=kind)
    np.testing.assert_allclose(drawn, mean.numpy() + std.numpy() * e.numpy(), rtol=0, atol=1e-15)
    ode = sde_step(v, x, 0.8, 0.7, e, eta=0.6, kind="ode")
    np.testing.assert_allclose(ode, x.numpy() + (0.7 - 0.8) * v.numpy(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_whatever_the_autocast_state(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype)
    outside = transition(x, x, 0.9, 0.8, eta=0.8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = transition(x, x, 0.9, 0.8, eta=0.8)
        score = log_prob(inside.mean + inside.std, *inside)
        stepped = ode_step(x, x, 0.9, 0.8)
    assert inside.mean.dtype == inside.std.dtype == score.dtype == stepped.dtype == torch.float32
    assert torch.equal(inside.mean, outside.mean)
    assert torch.equal(inside.std, outside.std)


@pytest.mark.parametrize(
    ("kind", "eta", "keys"),
    [
        ("cps", 1.1, ("sampling.eta", "sampling.sde")),
        ("flow", -0.1, ("sampling.eta",)),
        ("heun", 0.5, ("sampling.sde",)),
    ],
)
def test_laws_say_what_to_change(kind: str, eta: float, keys: tuple[str, ...]) -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"sampling\.") as error:
        transition(x, x, 0.9, 0.8, eta=eta, kind=kind)
    assert all(key in str(error.value) for key in keys)


# --- marginals: mean and variance of a linear policy, propagated in closed form -------------------

MEAN, VARIANCE = 1.0, 0.25


def marginal(sigma: float) -> tuple[float, float]:
    """Mean and variance of (1 - sigma) data + sigma noise for data ~ N(MEAN, VARIANCE)."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * VARIANCE + sigma**2


def exact_velocity(x: Tensor, sigma: float) -> Tensor:
    """E[noise - data | x]: regression of two jointly Gaussian variables, affine in x."""
    mean, variance = marginal(sigma)
    slope = (sigma - (1 - sigma) * VARIANCE) / variance
    return -MEAN + slope * (x - mean)


def propagate(sigmas: Tensor, start: tuple[float, float], *, kind: str, first: bool) -> np.ndarray:
    """Return mean and variance after all steps: each maps x to a x + b + std * noise."""
    mean, variance = start
    probes = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)  # [2, 1, 1]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        velocity = exact_velocity(probes, sigma)
        moments = transition(
            velocity, probes, sigma, sigma_next, eta=0.8, kind=kind, first=first and i == 0
        )
        at_0, at_1 = moments.mean.flatten().tolist()
        mean = (at_1 - at_0) * mean + at_0
        variance = (at_1 - at_0) ** 2 * variance + moments.std[0].item() ** 2
    return np.array([mean, variance])


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_sde_keeps_the_marginals(kind: str) -> None:
    # At the marginal's mean noise^ is 0 and the velocity -MEAN, so the mean is kept to rounding.
    # For the variance Euler-Maruyama is of first order: half the step, half the error.
    errors = []
    for steps in (400, 800):
        sigmas = torch.linspace(0.9, 0.05, steps + 1, dtype=torch.float64)
        end = propagate(sigmas, marginal(0.9), kind=kind, first=False)
        errors.append(np.abs(end - marginal(0.05)))
    assert max(error[0] for error in errors) < 1e-13
    assert errors[1][1] < 1e-3  # of the order of the step, 0.85 / 800
    assert errors[0][1] / errors[1][1] == pytest.approx(2.0, rel=0.02)  # + O(h)


def test_the_whole_schedule_ends_at_the_data() -> None:
    # Step 0 injects too much noise (std eta on any grid); later steps pull the surplus of variance
    # back like steps^(-eta^2), and the way to sigma 0 shrinks it further.
    end = propagate(point_sigmas(2001, 3.0).double(), (0.0, 1.0), kind="flow", first=True)
    assert end[0] == pytest.approx(MEAN, abs=1e-12)
    assert end[1] == pytest.approx(VARIANCE, abs=5e-4)


def test_noise_levels_of_the_first_steps_are_too_high_as_known() -> None:
    # Data 0: velocity x / sigma. From the exact level sigma_i, one step of Flow-SDE leaves the
    # noise sqrt((sigma - h - h S^2 / (2 sigma))^2 + S^2 h): 1.041 instead of 0.986 at step 0, ...
    x = torch.ones(5, 1, 1, dtype=torch.float64)
    sigma, sigma_next = BAGEL[:5], BAGEL[1:6]
    mean, std = transition(
        x / sigma[:, None, None], x, sigma, sigma_next, eta=0.8, first=torch.arange(5) == 0
    )
    level = (mean.square().flatten() * sigma.square() + std.square().flatten()).sqrt()
    np.testing.assert_allclose(level, [1.0408, 1.0330, 0.9733, 0.9473, 0.9259], atol=5e-5)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
def test_cps_keeps_the_noise_level_exactly(eta: float) -> None:
    # Data m: x = (1 - sigma) m + sigma noise and velocity (x - m) / sigma, exact. After any number
    # of steps the mean is (1 - sigma) m and the standard deviation sigma, to rounding.
    mean, variance, m = 0.0, 1.0, 0.7
    probes = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    for sigma, sigma_next in pairwise(BAGEL.tolist()):
        moments = transition((probes - m) / sigma, probes, sigma, sigma_next, eta=eta, kind="cps")
        at_0, at_1 = moments.mean.flatten().tolist()
        mean = (at_1 - at_0) * mean + at_0
        variance = (at_1 - at_0) ** 2 * variance + moments.std[0].item() ** 2
        assert mean == pytest.approx((1 - sigma_next) * m, abs=1e-13)
        assert math.sqrt(variance) == pytest.approx(sigma_next, abs=1e-13)


# --- golden vectors of the released codes ---------------------------------------------------------


@pytest.fixture
def released(golden: Callable[[str], Path]) -> Golden:
    folder = golden("bagel")
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "cases.safetensors")
    found = {k.removeprefix("l_sde/"): v for k, v in tensors.items() if k.startswith("l_sde/")}
    assert found, "no SDE group in the golden vectors"
    described = {k.removeprefix("l_sde/"): v for k, v in cases["tensors"].items()}
    return found, {name: described[name]["desc"] for name in found}


def test_golden_flow_grpo(released: Golden) -> None:
    tensors, _ = released
    grid, x, v = tensors["grid"], tensors["x_t"], tensors["v"]
    names = [re.fullmatch(r"flow_grpo_mean_(.+)", name) for name in tensors]
    etas = [match[1] for match in names if match]
    assert etas
    for eta in etas:
        first = torch.arange(len(grid) - 1) == 0
        mean, std = transition(v, x, grid[:-1], grid[1:], eta=float(eta), first=first)
        score = log_prob(tensors["x_next"], mean, std)
        # Theirs excludes sqrt(dt). float32 on both sides; S^2 reaches 22, 1 - sigma loses 4 bits.
        theirs = tensors[f"flow_grpo_std_{eta}"] * (grid[:-1] - grid[1:]).sqrt()
        close = {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(std.flatten(), theirs, **close)
        torch.testing.assert_close(mean, tensors[f"flow_grpo_mean_{eta}"], **close)
        torch.testing.assert_close(score, tensors[f"flow_grpo_logprob_{eta}"], **close)


@pytest.mark.parametrize("mode", ["constant", "monotonic"])
def test_golden_r3(released: Golden, mode: str) -> None:
    tensors, described = released
    grid, x, v = tensors["grid"], tensors["x_t"], tensors["v"]
    found = re.search(r"constant_eta=([\d.]+)", described[f"r3_{mode}_mean"])
    assert found
    for i, (sigma, sigma_next) in enumerate(pairwise(grid)):
        eta = float(found[1])
        if mode == "monotonic":
            # Their cap in place of a rule for step 0: Dance-SDE with another eta at each step.
            eta *= math.sqrt(sigma / (1 - min(float(sigma), 0.95)))
        mean, std = transition(v, x, sigma, sigma_next, eta=eta, kind="dance")
        score = log_prob(tensors["x_next"], mean, std)
        close = {"rtol": 2e-6, "atol": 2e-6}  # float32 on both sides
        torch.testing.assert_close(mean, tensors[f"r3_{mode}_mean"][i], **close)
        torch.testing.assert_close(std.squeeze(), tensors[f"r3_{mode}_std"][i], **close)
        # Theirs is one number a token, a mean over channels.
        torch.testing.assert_close(score, tensors[f"r3_{mode}_logprob"][i].mean(), **close)


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalizer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_is_a_gaussian(
    reduction: str, normalizer: bool, kind: str, generator: torch.Generator
) -> None:
    v, x, x_next = (normal(2, 3, 4, generator=generator) for _ in range(3))
    mean, std = transition(v, x, 0.8, 0.7, eta=0.6, kind=kind)
    score = log_prob(x_next, mean, std, reduction=reduction, normalizer=normalizer)
    density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x_next)
    if not normalizer:
        density = density - torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(mean)
    expected = getattr(density.flatten(1), reduction)(1)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_with_respect_to_the_velocity(kind: str, generator: torch.Generator) -> None:
    v, x, x_next = (normal(2, 3, 4, generator=generator) for _ in range(3))
    v.requires_grad_()
    first = torch.tensor([True, False])
    sigma, sigma_next = BAGEL[:2], BAGEL[1:3]

    def score(velocity: Tensor) -> Tensor:
        moments = transition(velocity, x, sigma, sigma_next, eta=0.8, kind=kind, first=first)
        return log_prob(x_next, *moments)

    assert torch.autograd.gradcheck(score, (v,))  # central differences, float64


def test_gradient_of_flow_sde_in_closed_form(generator: torch.Generator) -> None:
    # d mean / d v = -g, g = h (1 + S^2 (1 - sigma) / (2 sigma)) = 0.1 * 1.32, as S^2 = 0.64 * 4;
    # d log_prob / d v = -(x_next - mean) / std^2 * g / D
    v, x, x_next = (normal(3, 4, generator=generator) for _ in range(3))
    v.requires_grad_()
    mean, std = transition(v, x, 0.8, 0.7, eta=0.8)
    (gradient,) = torch.autograd.grad(log_prob(x_next, mean, std), v)
    expected = -(x_next - mean.detach()) / (0.64 * 4 * 0.1) * 0.132 / 12
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


# --- windows --------------------------------------------------------------------------------------

PAPER = {"size": 3, "low": 0, "high": 5}


def test_paper_window_starts_uniformly_at_0_1_2() -> None:
    starts = Counter(
        draw_window(24, **PAPER, step=i, group=g).start for i in range(300) for g in range(10)
    )
    assert set(starts) == {0, 1, 2}
    # 3000 draws with p = 1/3: standard deviation sqrt(3000 / 3 * 2 / 3) = 26; four of them
    assert all(abs(count - 1000) < 104 for count in starts.values())


@pytest.mark.parametrize("key", ["seed", "step", "group"])
def test_window_depends_on_its_whole_key(key: str) -> None:
    assert len({draw_window(24, **PAPER, **{key: i}) for i in range(30)}) == 3


def test_window_is_independent_of_global_generators() -> None:
    def states() -> tuple[object, ...]:
        legacy = np.random.get_state()  # noqa: NPY002 (the global generator is the point)
        return torch.get_rng_state().tolist(), legacy[1].tolist(), legacy[2], random.getstate()

    before = states()
    windows = [draw_window(24, **PAPER, seed=1, step=i) for i in range(20)]
    assert states() == before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert [draw_window(24, **PAPER, seed=1, step=i) for i in range(20)] == windows


def test_window_stays_the_same_between_versions() -> None:
    # A resumed run must find its windows again. Drawn once with NumPy 2.4.
    starts = [draw_window(24, **PAPER, seed=7, step=i, group=2).start for i in range(9)]
    assert starts == [0, 2, 1, 2, 2, 2, 0, 1, 0]


def test_fixed_and_sliding_windows() -> None:
    fixed = [draw_window(24, size=2, low=1, high=6, mode="fixed", step=i) for i in range(5)]
    assert fixed == [range(1, 3)] * 5
    sliding = [draw_window(24, size=2, low=1, high=5, mode="sliding", step=i) for i in range(5)]
    assert [window.start for window in sliding] == [1, 2, 3, 1, 2]


def test_the_last_step_is_never_stochastic() -> None:
    drawn = {draw_window(5, size=2, low=0, high=99, step=i) for i in range(50)}
    assert drawn == {range(2), range(1, 3), range(2, 4)}  # step 4 is the last


@pytest.mark.parametrize(
    ("num_steps", "window"),
    [
        (3, {"size": 3, "low": 0, "high": 5}),
        (24, {"size": 6, "low": 0, "high": 5}),
        (24, {"size": 0, "low": 0, "high": 5}),
        (24, {"size": 1, "low": -1, "high": 5}),
    ],
)
def test_windows_that_do_not_fit(num_steps: int, window: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"sampling\.window_size or sampling\.window_range"):
        draw_window(num_steps, **window)


def test_unknown_window_mode() -> None:
    with pytest.raises(ValueError, match=r"sampling\.window_mode"):
        draw_window(24, **PAPER, mode="scattered")
