"""The terms of the objective, against equations in NumPy float64, hand numbers and differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_unigrpo.flow import log_prob, sigma_schedule, transition
from lightning_unigrpo.objective import (
    clipped_surrogate,
    inverse_step_weight,
    k3_kl,
    latent_kl,
    log_clip_bounds,
    plain_log_ratio,
    ratio_norm,
    rescale_clip,
    token_weights,
    unigrpo_loss,
    velocity_mse,
)

AGGREGATIONS = ("sequence_mean", "token_mean", "constant")


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- clipping ------------------------------------------------------------------------------------


def test_clip_bounds() -> None:
    assert log_clip_bounds(0.2, 0.3) == pytest.approx((math.log(0.8), math.log(1.3)), rel=1e-15)
    assert log_clip_bounds(0.0, None) == (0.0, math.inf)
    # log(1 +- e) = +-e - e^2/2 + ...: five digits that float32's 1 + 1e-6 would not have
    low, high = log_clip_bounds(1e-6, 1e-6)
    assert low == pytest.approx(-1e-6 - 5e-13, rel=1e-12)
    assert high == pytest.approx(1e-6 - 5e-13, rel=1e-12)


@pytest.mark.parametrize("bounds", [(1.0, 0.2), (-0.1, 0.2), (0.2, -0.1), (math.nan, 0.1)])
def test_clip_bounds_say_what_to_change(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"objective\.flow_clip_low"):
        log_clip_bounds(*bounds)


def test_surrogate_by_hand() -> None:
    # clip [0.8, 1.3]:          loss                         clipped
    cases = [  # rho   A
        (1.5, 2.0, -1.3 * 2.0, True),  # min(3.0, 2.6)
        (0.5, 2.0, -0.5 * 2.0, False),  # min(1.0, 1.6): worse than the bound, gradient flows
        (0.5, -2.0, 0.8 * 2.0, True),  # min(-1.0, -1.6)
        (1.5, -2.0, 1.5 * 2.0, False),  # min(-3.0, -2.6)
        (1.1, 2.0, -1.1 * 2.0, False),
        (1.1, 0.0, 0.0, False),
    ]
    ratio, advantage, loss, clipped = map(torch.tensor, zip(*cases, strict=True))
    ours = clipped_surrogate(ratio.double().log(), advantage.double(), clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(ours[0], loss.double(), rtol=1e-6, atol=1e-12)  # float32 literals
    assert torch.equal(ours[1], clipped)


def test_surrogate_gradient_by_hand() -> None:
    # d loss / d log rho = -A rho where it is not clipped, and 0 where it is
    log_ratio = doubles(1.5, 0.5, 0.5, 1.5, 1.1, 9.0).log().requires_grad_()
    advantage = doubles(2, 2, -2, -2, 2, 0)
    loss, _ = clipped_surrogate(log_ratio, advantage, clip_low=0.2, clip_high=0.3)
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, doubles(0, -1.0, 0, 3.0, -2.2, 0))


def test_surrogate_at_the_papers_clip_range_in_float32() -> None:
    # In float32 exp(9.7e-7) and 1 + 1e-6 are one number (1 + 9.54e-7): a min() of ratios would tie.
    log_ratio = torch.tensor([9.7e-7, 1.1e-6, -9.7e-7, -1.1e-6, 0.0], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    loss, clipped = clipped_surrogate(log_ratio, advantage, clip_low=1e-6, clip_high=1e-6)
    assert clipped.tolist() == [False, True, False, True, False]
    loss.sum().backward()
    # whole gradients, never halves
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-1.0, 0.0, 1.0, 0.0, -1.0]))


def test_surrogate_without_an_upper_bound() -> None:
    loss, clipped = clipped_surrogate(doubles(5.0), doubles(1.0), clip_low=0.2, clip_high=None)
    assert loss.item() == pytest.approx(-math.exp(5.0), rel=1e-15)
    assert not clipped.any()


def test_surrogate_keeps_gradients_finite_beyond_the_clip() -> None:
    # exp(200) overflows float32
    log_ratio = torch.tensor([200.0, 200.0], requires_grad=True)
    loss, _ = clipped_surrogate(log_ratio, torch.tensor([1.0, 0.0]), clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.2, 0.0]))
    assert log_ratio.grad.tolist() == [0.0, 0.0]


def test_text_loss_against_central_differences(generator: torch.Generator) -> None:
    """Logits to loss: log-softmax, ratio, clip, aggregation."""
    lengths, vocabulary = torch.tensor([3, 2]), 5
    logits = torch.randn(5, vocabulary, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (5, 1), generator=generator)
    old = logits.log_softmax(-1).gather(1, tokens)[:, 0] + doubles(-0.9, 0.05, 0.9, -0.05, 0.9)
    advantage = doubles(1, -1, 1, 0.5, -2)  # the first is clipped; so is the last
    weights = token_weights(lengths, aggregation="sequence_mean", num_sequences=2, num_tokens=5)

    def loss(values: Tensor) -> Tensor:
        log_ratio = values.log_softmax(-1).gather(1, tokens)[:, 0] - old
        losses, clipped = clipped_surrogate(log_ratio, advantage, clip_low=0.2, clip_high=0.2)
        assert clipped.tolist() == [True, False, False, False, True]
        return (weights * losses).sum()

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_gradient_of_a_token_log_prob_in_closed_form(generator: torch.Generator) -> None:
    # On-policy, d loss / d logits = -A w (one-hot - softmax)
    logits = torch.randn(1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)[:, 2]
    loss, _ = clipped_surrogate(log_p - log_p.detach(), doubles(1.5), clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    expected = -1.5 * (doubles(0, 0, 1, 0) - logits.detach().softmax(-1))
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


# --- aggregation ---------------------------------------------------------------------------------


def test_token_weights_by_hand() -> None:
    lengths, losses = torch.tensor([1, 0, 3]), torch.tensor([6.0, 3.0, 6.0, 9.0])
    counts = {
        "num_sequences": 4,
        "num_tokens": 8,
    }  # another micro-batch holds one more, of 4 tokens
    expected = {
        "sequence_mean": (6 / 1 + 18 / 3) / 4,
        "token_mean": 24 / 8,
        "constant": 24 / (4 * 10),
    }
    for aggregation in AGGREGATIONS:
        weights = token_weights(lengths, aggregation=aggregation, **counts, constant_length=10)
        assert weights.dtype == torch.float32
        total = (weights * losses).sum().item()
        assert total == pytest.approx(expected[aggregation], rel=1e-6)  # float32


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_weigh(aggregation: str) -> None:
    empty = {"num_sequences": 0, "num_tokens": 0, "constant_length": 3}
    for lengths in (torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64)):
        assert token_weights(lengths, aggregation=aggregation, **empty).shape == (0,)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"aggregation": "constant"}, "objective.text_constant_length"),
        ({"aggregation": "median"}, "objective.text_aggregation"),
    ],
)
def test_aggregations_say_what_to_change(settings: dict[str, str], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        token_weights(torch.tensor([1]), **settings, num_sequences=1, num_tokens=1)


# --- ratios of denoising steps -------------------------------------------------------------------


def window(generator: torch.Generator, *, drift: float = 1e-2) -> dict[str, Tensor]:
    """The paper's first five steps in float64, drawn by one policy and scored by another."""
    sigmas = sigma_schedule(25, shift=3.0, convention="points").double()[:6]

    def normal() -> Tensor:
        return torch.randn(2, 5, 16, 8, generator=generator, dtype=torch.float64)

    x, velocity, noise = normal(), normal(), normal()
    settings = {"eta": 0.8, "first": torch.arange(5) == 0}
    mean_old, std = transition(velocity, x, sigmas[:-1], sigmas[1:], **settings)
    mean, _ = transition(velocity + drift * normal(), x, sigmas[:-1], sigmas[1:], **settings)
    h = sigmas[:-1] - sigmas[1:]
    return {
        "noise": noise,
        "mean": mean,
        "mean_old": mean_old,
        "std": std,
        "x_next": mean_old + std * noise,
        "h": h,
        "diffusion": std[..., 0, 0] / h.sqrt(),
    }


def test_ratio_norm_is_its_definition(generator: torch.Generator) -> None:
    w = window(generator)
    log_rho = log_prob(w["x_next"], w["mean"], w["std"]) - log_prob(
        w["x_next"], w["mean_old"], w["std"]
    )
    s, h = w["diffusion"].numpy(), w["h"].numpy()
    square = ((w["mean"] - w["mean_old"]) ** 2).numpy().mean((-2, -1))
    definition = s * np.sqrt(h) * (log_rho.numpy() + square / (2 * s**2 * h))
    direct = ratio_norm(w["noise"], w["mean"], w["mean_old"]).numpy()
    assert np.abs(direct).max() > 1e-6  # of the size that is clipped
    np.testing.assert_allclose(
        direct, definition, rtol=0, atol=1e-14
    )  # float64 log-probs of size 1


def test_plain_log_ratio_is_the_difference_of_log_probs(generator: torch.Generator) -> None:
    w = window(generator)
    new = log_prob(w["x_next"], w["mean"], w["std"])
    old = log_prob(w["x_next"], w["mean_old"], w["std"])
    ratio = plain_log_ratio(w["noise"], w["mean"], w["mean_old"], w["std"])
    torch.testing.assert_close(ratio, new - old, rtol=0, atol=1e-14)


def test_ratios_are_exact_on_policy_in_float32(generator: torch.Generator) -> None:
    w = {name: value.float() for name, value in window(generator).items()}
    assert not ratio_norm(w["noise"], w["mean_old"], w["mean_old"]).any()
    assert not plain_log_ratio(w["noise"], w["mean_old"], w["mean_old"], w["std"]).any()


def test_ratio_norm_has_no_bias_and_one_scale(generator: torch.Generator) -> None:
    # E[mean(e d)] = 0 and its std is rms(d) / sqrt(D) at every noise level. Not so the plain ratio:
    # its expectation is -mean(d^2) / (2 std^2).
    steps, size, draws = 5, 64, 4000
    std = doubles(0.8, 0.6, 0.4, 0.2, 0.1).reshape(steps, 1, 1)
    drift = 0.05 * torch.randn(steps, size, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(draws, steps, size, 1, generator=generator, dtype=torch.float64)
    rms = drift.square().mean((-2, -1)).sqrt()
    normed = ratio_norm(noise, drift, torch.zeros_like(drift)) / (rms / math.sqrt(size))
    plain = plain_log_ratio(noise, drift, torch.zeros_like(drift), std)
    # means of 4000 unit normals: 0.016; their standard deviations: 0.011; five of each
    torch.testing.assert_close(normed.mean(0), torch.zeros_like(rms), rtol=0, atol=0.08)
    torch.testing.assert_close(normed.std(0), torch.ones_like(rms), rtol=0, atol=0.056)
    bias = -(rms**2) / (2 * std.flatten() ** 2)
    error = rms / math.sqrt(size) / std.flatten() / math.sqrt(draws)
    assert ((plain.mean(0) - bias).abs() < 5 * error).all()


@pytest.mark.parametrize("normed", [True, False])
def test_flow_loss_against_central_differences(normed: bool, generator: torch.Generator) -> None:
    w = window(generator)
    advantage = torch.randn(2, 5, generator=generator, dtype=torch.float64)

    def loss(mean: Tensor) -> Tensor:
        if normed:
            log_ratio = ratio_norm(w["noise"], mean, w["mean_old"])
        else:
            log_ratio = plain_log_ratio(w["noise"], mean, w["mean_old"], w["std"])
        return clipped_surrogate(log_ratio, advantage, clip_low=1e-3, clip_high=1e-3)[0]

    mean = w["mean"].requires_grad_()
    assert torch.autograd.gradcheck(loss, (mean,), fast_mode=True)


# --- penalties, weights, total -------------------------------------------------------------------


def test_inverse_step_weight_on_bagels_grid() -> None:
    # h_0 = 1 - 69/70 = 1/70; h_4 = 60/64 - 57/62 = 9/496
    sigmas = sigma_schedule(25, shift=3.0, convention="points")
    weight = inverse_step_weight(sigmas[:-1], sigmas[1:])
    assert weight[0].item() == pytest.approx(70, rel=1e-5)  # 1 - 69/70 keeps 5 digits in float32
    assert weight[4].item() == pytest.approx(496 / 9, rel=1e-5)


def test_velocity_mse_in_both_conventions(generator: torch.Generator) -> None:
    a, b = (
        torch.randn(2, 3, 5, 4, generator=generator),
        torch.randn(2, 3, 5, 4, generator=generator),
    )
    square = (a.double().numpy() - b.double().numpy()) ** 2
    mean, total = velocity_mse(a, b), velocity_mse(a, b, reduction="sum")
    np.testing.assert_allclose(mean, square.mean((-2, -1)), rtol=1e-6)  # float32
    np.testing.assert_allclose(total, square.sum((-2, -1)), rtol=1e-6)
    assert velocity_mse(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_latent_kl_is_exact(generator: torch.Generator) -> None:
    w = window(generator, drift=1.0)
    std = w["std"].expand_as(w["mean"])
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(w["mean"], std), torch.distributions.Normal(w["mean_old"], std)
    ).mean((-2, -1))
    ours = latent_kl(w["mean"], w["mean_old"], w["std"])
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-15)  # theirs cancels terms of size 1


def test_velocity_mse_evens_out_what_the_latent_kl_does_not(generator: torch.Generator) -> None:
    # KL = g^2 dv^2 / (2 S^2 h): per unit of velocity error 1.6e-4, 3.0e-4, 6.6e-4, 1.1e-3, 1.6e-3
    sigmas = sigma_schedule(25, shift=3.0, convention="points").double()[:6]
    x = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    settings = {"eta": 0.8, "first": torch.arange(5) == 0}
    mean, std = transition(x, x, sigmas[:-1], sigmas[1:], **settings)
    shifted, _ = transition(x + 1, x, sigmas[:-1], sigmas[1:], **settings)
    np.testing.assert_allclose(velocity_mse(x + 1, x), 1.0, rtol=1e-12)
    expected = [1.594e-4, 3.0e-4, 6.6e-4, 1.1e-3, 1.65e-3]
    np.testing.assert_allclose(latent_kl(shifted, mean, std), expected, rtol=0.04)  # two digits


def test_k3_is_unbiased_over_the_policy(generator: torch.Generator) -> None:
    # sum_i p_i k3_i = KL(p || q) exactly, since sum_i p_i (q_i / p_i - 1) = 0
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * k3_kl(p, q)).sum(), expected, rtol=1e-12, atol=1e-14)


def test_k3_keeps_small_differences() -> None:
    # r^2 / 2 + r^3 / 6 at r = 1e-3; exp(r) - r - 1 in float32 would be off by 10%
    value = k3_kl(torch.tensor([0.0]), torch.tensor([1e-3]))
    assert value.item() == pytest.approx(5.001667e-7, rel=1e-3)


def test_clip_follows_the_latent_size() -> None:
    # 1024 px: 64 * 64 * 64; 512 px has a quarter of the tokens, so the range doubles
    assert rescale_clip(1e-6, latent_size=65_536, reference_size=262_144) == pytest.approx(2e-6)
    with pytest.raises(ValueError, match=r"objective\.clip_reference_size"):
        rescale_clip(1e-6, latent_size=0, reference_size=1)


def test_total_loss() -> None:
    text, flow, mse, kl, text_kl = (
        torch.tensor(float(v), requires_grad=True) for v in (2, 3, 5, 7, 11)
    )
    weights = {"flow_weight": 0.5, "mse_weight": 0.1}
    assert unigrpo_loss(text, flow, mse, **weights).item() == pytest.approx(2 + 1.5 + 0.5)
    total = unigrpo_loss(
        text,
        flow,
        mse,
        **weights,
        latent_kl=kl,
        latent_kl_weight=0.01,
        text_kl=text_kl,
        text_kl_weight=0.0,
    )
    total.backward()
    assert total.item() == pytest.approx(2 + 1.5 + 0.5 + 0.07)
    slopes = [term.grad.item() for term in (text, flow, mse, kl, text_kl)]
    assert slopes == pytest.approx([1.0, 0.5, 0.1, 0.01, 0.0])  # the last stays in the graph


@pytest.mark.parametrize("name", ["latent_kl", "text_kl"])
def test_a_weight_without_its_term(name: str) -> None:
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match=rf"objective\.{name}_weight"):
        unigrpo_loss(one, one, one, flow_weight=1.0, mse_weight=0.0, **{f"{name}_weight": 0.1})
