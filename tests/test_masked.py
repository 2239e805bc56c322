"""Unmasking: schedules against upstream's numbers, draws against enumeration and plain Python."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_unigrpo.masked import (
    Confident,
    Independent,
    choice_temperatures,
    mask_ratios,
    most_confident,
    num_masked,
    reveal_steps,
)
from lightning_unigrpo.rollout import sample_masked_image
from tests.conftest import golden_folder

UPSTREAM = load_file(golden_folder("showo1") / "cases.safetensors")
GRID = (1, 3)


class Table:
    """A masked policy over 3 codes of 2 values, whose logits hang on what is known."""

    def image_prefix(self, cache: Any) -> None:
        return None

    def masked_logits(self, cache: Any, tokens: Tensor, where: Tensor, grid: Any) -> Tensor:
        known = torch.tensor([0.3, -0.7, 1.1]) * tokens  # -1 where masked
        each = known.sum(1, keepdim=True) + torch.tensor([0.2, -0.4, 0.6])
        return torch.stack([each, -each], -1)[where]


def probability(tokens: tuple[int, ...], where: int, value: int) -> float:
    """Return the probability of one code by hand."""
    known = sum(w * t for w, t in zip((0.3, -0.7, 1.1), tokens, strict=True))
    logit = known + (0.2, -0.4, 0.6)[where]
    return 1 / (1 + math.exp(2 * logit * (1 if value else -1)))


def test_ratios_are_the_cosine_and_end_at_nothing() -> None:
    found = mask_ratios(6)
    expected = [math.cos(math.pi / 2 * k / 6) for k in range(6)]
    torch.testing.assert_close(found[:-1], torch.tensor(expected, dtype=torch.float64))
    assert found[-1] == 0
    with pytest.raises(ValueError, match=r"sampling\.num_timesteps"):
        mask_ratios(0)


def test_one_uniform_stands_for_all_decisions_to_stay() -> None:
    """Shares of a fine grid of uniforms equal ``g_k - g_{k+1}``; step by step, ``g_{k+1} / g_k`` stay."""
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    steps, ratios = reveal_steps(uniforms, 5), mask_ratios(5)
    shares = torch.bincount(steps, minlength=5) / len(steps)
    torch.testing.assert_close(shares.double(), -ratios.diff(), atol=2e-5, rtol=0)
    for k in range(5):
        stayed = (steps > k).sum() / (steps >= k).sum()
        assert float(stayed) == pytest.approx(float(ratios[k + 1] / ratios[k]), abs=1e-4)
    assert reveal_steps(torch.tensor([0.0]), 5).tolist() == [4]


def test_rules_of_confidence_are_upstreams() -> None:
    """How many are masked again, and the temperatures, of a whole run of Show-o."""
    temperatures = choice_temperatures(1.0, 6)
    torch.testing.assert_close(
        torch.tensor(temperatures), UPSTREAM["v1_sampling.temperature"], atol=1e-7, rtol=1e-6
    )
    unknown = 36
    for step, upstream in enumerate(UPSTREAM["v1_sampling.mask_len"]):
        found = num_masked(36, step, 6, unknown)
        # Upstream masks one again at the last step too, and returns it nevertheless.
        assert [max(found, 1)] * 2 == upstream.tolist()
        unknown = found
    assert unknown == 0


def test_the_likeliest_stay_with_gumbel_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(4, 9, generator=generator)
    uniforms = torch.rand(4, 9, generator=generator)
    for keep, temperature in itertools.product((0, 1, 4, 9), (0.0, 0.5)):
        found = most_confident(log_probs, uniforms, temperature, keep)
        for row in range(4):
            scores = [
                float(p) - temperature * math.log(-math.log(float(u)))
                for p, u in zip(log_probs[row], uniforms[row], strict=True)
            ]
            best = sorted(range(9), key=lambda i: -scores[i])[:keep]
            assert found[row].nonzero().squeeze(1).tolist() == sorted(best)


def outcomes(num_steps: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every image, over all orders in which its codes may be revealed."""
    chance = (-mask_ratios(num_steps).diff()).tolist()
    total = dict.fromkeys(itertools.product((0, 1), repeat=3), 0.0)
    for steps in itertools.product(range(num_steps), repeat=3):
        order = math.prod(chance[s] for s in steps)
        for image in total:
            p = order
            for where, step in enumerate(steps):
                seen = tuple(c if s < step else -1 for c, s in zip(image, steps, strict=True))
                p *= probability(seen, where, image[where])
            total[image] += p
    return total


def test_images_are_drawn_as_often_as_their_probability() -> None:
    """Against enumeration of all orders: the reveal rule is no part of the policy."""
    count = 40_000
    uniforms = torch.rand(count, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    cache: Any = None
    adapter: Any = Table()
    drawn = sample_masked_image(adapter, cache, Independent(uniforms, 2), GRID, temperature=1.0)
    expected = outcomes(2)
    assert sum(expected.values()) == pytest.approx(1)
    codes = torch.stack([image.tokens for image in drawn])
    for image, p in expected.items():
        share = float((codes == torch.tensor(image)).all(1).float().mean())
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))
    for image in drawn[:50]:
        for place, score in zip(image.scored.tolist(), image.log_prob, strict=True):  # type: ignore[arg-type]
            seen = image.tokens.where(image.step < image.step[place], -1)  # type: ignore[operator,index]
            p = probability(tuple(seen.tolist()), place, int(image.tokens[place]))
            assert float(score) == pytest.approx(math.log(p), abs=1e-5)


def test_confident_images_follow_a_plain_reading_of_the_rule() -> None:
    """Row by row in plain Python; log-probabilities are those of the step a code was kept in."""
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(20, 4, 2, 3, generator=generator).double()
    cache: Any = None
    adapter: Any = Table()
    drawn = sample_masked_image(adapter, cache, Confident(uniforms, 0.8), GRID, temperature=1.0)
    for row, image in enumerate(drawn):
        codes, logs, at, tau = [-1] * 3, [0.0] * 3, [-1] * 3, 0.8
        for k in range(4):
            tau *= 1 - (k + 1) / 4
            value, luck = uniforms[row, k].tolist()
            masked = [n for n in range(3) if codes[n] < 0]
            new = {}
            for n in masked:
                zero = probability(tuple(codes), n, 0)
                code = 0 if value[n] < zero else 1
                p = probability(tuple(codes), n, code)
                new[n] = (math.log(p) - tau * math.log(-math.log(luck[n])), code, math.log(p))
            share = math.floor(3 * math.cos(math.pi / 2 * (k + 1) / 4))
            again = 0 if k == 3 else max(1, min(len(masked) - 1, share))
            for n in sorted(masked, key=lambda n: -new[n][0])[: len(masked) - again]:
                codes[n], logs[n], at[n] = new[n][1], new[n][2], k
        assert image.tokens.tolist() == codes
        assert image.step.tolist() == at  # type: ignore[union-attr]
        expected = torch.tensor(logs)[image.scored]
        torch.testing.assert_close(image.log_prob, expected, atol=1e-5, rtol=0)
