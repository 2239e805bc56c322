"""The guard sees what ratios cannot, at the size of a 1024 px latent too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_unigrpo.config import Guard, Sampling
from lightning_unigrpo.flow import sde_step, sigma_schedule
from lightning_unigrpo.guard import FLOAT32, Mismatch, beyond_bounds
from lightning_unigrpo.loss import Transitions
from lightning_unigrpo.objective import ratio_norm
from lightning_unigrpo.types import ImageSegment, Prompt, Scores, TextSegment, Trajectory

SAMPLING = Sampling()


def image(num: int, channels: int, generator: torch.Generator) -> tuple[ImageSegment, Tensor]:
    """An image whose two-step window was really sampled with a random velocity."""
    sigmas = sigma_schedule(25, shift=3.0, convention="points")[:3]
    velocity = torch.randn(2, num, channels, generator=generator)
    noise = torch.randn(2, num, channels, generator=generator)
    states = [torch.randn(num, channels, generator=generator)]
    for k in range(2):
        states.append(
            sde_step(
                velocity[k],
                states[k],
                sigmas[k],
                sigmas[k + 1],
                noise[k],
                eta=0.8,
                kind="flow",
                first=k == 0,
            )
        )
    segment = ImageSegment(
        latent=states[-1],
        grid=(1, num),
        states=torch.stack(states),
        sigmas=sigmas,
        noise=noise,
        velocity=velocity,
    )
    return segment, velocity


def measure(
    segment: ImageSegment, velocity: Tensor, log_prob: Tensor | None = None
) -> dict[str, float]:
    text = TextSegment(tokens=torch.tensor([1, 2]), log_prob=torch.tensor([-1.0, -2.0]))
    trajectory = Trajectory(prompt=Prompt(text=""), segments=[text, segment], group=0, member=0)
    new = torch.tensor([-1.0, -2.0]) if log_prob is None else log_prob
    worst = Mismatch.measure(Scores(text=[new], velocity=[velocity]), [trajectory], SAMPLING)
    return {key: float(value) for key, value in worst.named().items()}


@pytest.mark.parametrize("shape", [(4, 16), (4096, 64)])
def test_agreement_passes(shape: tuple[int, int], generator: torch.Generator) -> None:
    segment, velocity = image(*shape, generator)
    figures = measure(segment, velocity)
    assert figures["guard/velocity"] == 0
    assert figures["guard/residual"] < 1e-5  # float32 rounding of x_next over std >= 0.4
    assert beyond_bounds(figures, Guard(), exact=True) is None


@pytest.mark.parametrize("shape", [(4, 16), (4096, 64)])
def test_one_percent_of_velocity_is_stopped(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    segment, velocity = image(*shape, generator)
    problem = beyond_bounds(measure(segment, velocity * 1.01), Guard(), exact=True)
    assert problem is not None
    assert "model.guard.velocity" in problem


def test_a_ratio_would_not_have_seen_it(generator: torch.Generator) -> None:
    """At D = 262,144 even an unrelated velocity leaves the averaged ratio within 1e-3 of 1."""
    segment, velocity = image(4096, 64, generator)
    other = torch.randn(velocity.shape, generator=generator)
    steps = Transitions.stack([segment])
    mean, _ = steps.moments(other.unsqueeze(0), SAMPLING)
    old_mean, _ = steps.moments(velocity.unsqueeze(0), SAMPLING)
    assert ratio_norm(steps.noise, mean, old_mean).abs().max() < 1e-3
    assert measure(segment, other)["guard/velocity"] > 1


def test_text_and_nan_are_seen(generator: torch.Generator) -> None:
    segment, velocity = image(4, 16, generator)
    shifted = torch.tensor([-1.0, -2.0 + 2 * FLOAT32["log_prob"]])
    assert "model.guard.log_prob" in str(
        beyond_bounds(measure(segment, velocity, shifted), Guard(), exact=True)
    )
    assert (
        beyond_bounds(measure(segment, velocity * float("nan")), Guard(), exact=False) is not None
    )


def test_the_users_bound_counts(generator: torch.Generator) -> None:
    segment, velocity = image(4, 16, generator)
    figures = measure(segment, velocity * 1.01)
    lenient = Guard(velocity=0.1, residual=1.0)
    assert beyond_bounds(figures, lenient, exact=True) is None
