"""Images of discrete tokens in the objective, against the formula written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_unigrpo import Objective, Sampling
from lightning_unigrpo.loss import count, trajectory_loss
from lightning_unigrpo.types import (
    Prompt,
    Scores,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

LOW, HIGH = 0.1, 0.3
"""Clips of image tokens; text keeps 0.2 on both sides."""
SIZES = [(3, 4), (2, 4)]
"""Text and image tokens of two trajectories."""
ADVANTAGES = [1.5, -0.7]


def settings(**changes: Any) -> Objective:
    clips = {"image_token_clip_low": LOW, "image_token_clip_high": HIGH, "mse_weight": 0.0}
    return Objective(**(clips | changes))


def drawn(generator: torch.Generator) -> tuple[list[Trajectory], Scores]:
    """Return trajectories whose ratios lie on both sides of every clip, and the new log-probabilities."""
    trajectories, scores = [], Scores()
    for (words, codes), advantage in zip(SIZES, ADVANTAGES, strict=True):
        parts = []
        for length, kind in ((words, TextSegment), (codes, TokenImageSegment)):
            old = -3 * torch.rand(length, generator=generator)
            new = old + 1.6 * (torch.rand(length, generator=generator) - 0.5)
            more: dict[str, Any] = {"grid": (2, 2)} if kind is TokenImageSegment else {}
            parts.append(
                kind(
                    tokens=torch.zeros(length, dtype=torch.long),
                    log_prob=old,
                    ref_log_prob=old - 0.1,
                    advantage=advantage,
                    **more,
                )
            )
            (scores.text if kind is TextSegment else scores.image_tokens).append(
                new.requires_grad_()
            )
        scores.entropy.append(torch.zeros(words))
        trajectories.append(Trajectory(prompt=Prompt(text=""), segments=parts, group=0, member=0))
    return trajectories, scores


def by_hand(
    new: torch.Tensor, old: torch.Tensor, advantage: float, low: float, high: float
) -> float:
    """Mean over a sequence of ``-min(r A, clip(r) A)``."""
    total = 0.0
    for a, b in zip(new.tolist(), old.tolist(), strict=True):
        ratio = math.exp(a - b)
        total -= min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return total / len(new)


def expected(trajectories: list[Trajectory], scores: Scores, image_weight: float) -> float:
    found = 0.0
    for t, text, codes in zip(trajectories, scores.text, scores.image_tokens, strict=True):
        words, image = t.segments
        assert isinstance(words, TextSegment)
        assert isinstance(image, TokenImageSegment)
        assert words.log_prob is not None
        assert image.log_prob is not None
        found += by_hand(text, words.log_prob, words.advantage, 0.2, 0.2)
        found += image_weight * by_hand(codes, image.log_prob, image.advantage, LOW, HIGH)
    return found / len(trajectories)


def loss_of(
    trajectories: list[Trajectory], scores: Scores, objective: Objective
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, metrics = trajectory_loss(
        scores,
        trajectories,
        objective=objective,
        sampling=Sampling(),
        counts=count(trajectories, Sampling()),
    )
    return loss, metrics.sums


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({}, 1.0),
        ({"flow_weight": 0.5}, 0.5),
        ({"flow_weight": 0.5, "image_token_weight": 2.0}, 2.0),
        ({"image_token_weight": 0.0}, 0.0),
    ],
)
def test_image_tokens_have_their_own_weight_and_clip(
    changes: dict[str, float], weight: float, generator: torch.Generator
) -> None:
    trajectories, scores = drawn(generator)
    loss, metrics = loss_of(trajectories, scores, settings(**changes))
    assert float(loss.detach()) == pytest.approx(expected(trajectories, scores, weight), rel=1e-5)
    assert 0 < float(metrics["image/clip_fraction"]) < 1


def test_clipped_tokens_have_no_gradient(generator: torch.Generator) -> None:
    trajectories, scores = drawn(generator)
    loss_of(trajectories, scores, settings())[0].backward()
    num_clipped = 0
    for t, new in zip(trajectories, scores.image_tokens, strict=True):
        image = t.segments[1]
        assert isinstance(image, TokenImageSegment)
        assert image.log_prob is not None
        assert new.grad is not None
        ratio = (new - image.log_prob).exp()
        clipped = ratio > 1 + HIGH if image.advantage > 0 else ratio < 1 - LOW
        assert torch.equal(new.grad == 0, clipped)
        num_clipped += int(clipped.sum())
    assert num_clipped


def test_the_kl_of_image_tokens(generator: torch.Generator) -> None:
    """``exp(d) - d - 1`` with d = reference - new, a mean per image."""
    trajectories, scores = drawn(generator)
    plain = loss_of(trajectories, scores, settings())[0]
    loss, metrics = loss_of(trajectories, scores, settings(image_token_kl_weight=0.3))
    kl = 0.0
    for t, new in zip(trajectories, scores.image_tokens, strict=True):
        image = t.segments[1]
        assert isinstance(image, TokenImageSegment)
        assert image.ref_log_prob is not None
        gaps = (image.ref_log_prob - new).tolist()
        kl += sum(math.exp(d) - d - 1 for d in gaps) / len(gaps) / len(trajectories)
    assert float(metrics["image/kl"]) == pytest.approx(kl, rel=1e-5)
    assert float((loss - plain).detach()) == pytest.approx(0.3 * kl, rel=1e-4)


@pytest.mark.parametrize("policy", ["flow", "tokens"])
def test_a_reference_is_asked_for_what_the_images_are(policy: Any) -> None:
    assert settings(mse_weight=0.1).needs_reference(policy) == (policy == "flow")
    assert settings(image_token_kl_weight=0.1).needs_reference(policy) == (policy == "tokens")
    assert settings(text_kl_weight=0.1).needs_reference(policy)
    assert not settings().needs_reference(policy)


@pytest.mark.parametrize(
    "name", ["image_token_weight", "image_token_clip_low", "image_token_kl_weight"]
)
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{name} is -0\.1"):
        Objective(**{name: -0.1})  # type: ignore[arg-type]
