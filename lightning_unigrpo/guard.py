"""The on-policy guard: rollout and training must be the same policy, and that is measured.

Sampling walks through caches, learning through one packed pass. Before the first update after each
collection both are evaluated with the same weights, so every difference is an error of the backbone
(or of its precision). The guard compares *quantities*; ratios are blind: the averaged log-ratio of
262,144 latent numbers hides even a random velocity.

What rollout and training share, no guard can see: golden vectors and marginal tests are for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unigrpo.config import Guard, Sampling
from lightning_unigrpo.loss import Transitions, by_shape
from lightning_unigrpo.types import Scores, TextSegment, TokenImageSegment, Trajectory, sampled

FLOAT32 = {"velocity": 1e-4, "log_prob": 5e-5, "residual": 1e-4}
"""Bounds in float32; the digits model stays a decade below them."""
REDUCED = {"velocity": 5e-2, "log_prob": 1.0, "residual": 5e-2}
"""Bounds in reduced precision, a decade above the digits model under bf16-mixed (5e-3, 0.09 nats, 3e-3):
they find a wrong policy, not a rounded one."""

_ADVICE = {
    "velocity": "the image path: positions of the noise block, the expert of the image marks, rows of the "
    "context cache",
    "log_prob": "the text path: positions of decoded tokens, the temperature, rows of the cache that "
    "finished earlier",
    "residual": "the transition: sigmas, the first-step rule, or states stored in a lower precision",
}


class OnPolicyError(RuntimeError):
    """Rollout and training disagree by more than rounding: the update would follow another policy."""


@dataclass
class Mismatch:
    """The largest disagreement between rollout and training, each a scalar float32 tensor."""

    velocity: Tensor
    """``max ||v_train - v_rollout|| / ||v_rollout||`` over window steps."""
    log_prob: Tensor
    """``max |log p_train - log p_rollout|`` over tokens, nats."""
    residual: Tensor
    """``max rms(x_next - mean_train - std * noise) / std`` over transitions."""

    @classmethod
    def measure(
        cls, scores: Scores, trajectories: Sequence[Trajectory], sampling: Sampling
    ) -> Mismatch:
        """Compare scores with what the rollout stored.

        Args:
            scores: of the trajectories under the weights that sampled them.
            trajectories: as sampled, before any update.
            sampling: the law of the transitions.
        """
        worst = cls(*(torch.zeros(()) for _ in range(3)))
        segments = [s for _, s in sampled(trajectories)]
        for kind, new in ((TextSegment, scores.text), (TokenImageSegment, scores.image_tokens)):
            old = [s.log_prob for s in segments if isinstance(s, kind) and s.log_prob is not None]
            spared = bool(new) and not any(len(x) for x in new)  # no step was asked for
            if old and not spared:
                worst.log_prob = _larger(worst.log_prob, torch.cat(new) - torch.cat(old))
        for images, velocity in by_shape(trajectories, scores.velocity):
            if velocity.shape[1] == 0:
                continue
            steps = Transitions.stack(images)
            error, size = velocity - steps.old_velocity, steps.old_velocity
            relative = error.norm(dim=(-2, -1)) / size.norm(dim=(-2, -1)).clamp_min(1e-12)
            worst.velocity = _larger(worst.velocity, relative)
            mean, std = steps.moments(velocity, sampling)
            left_over = (steps.x_next - mean) / std - steps.noise
            worst.residual = _larger(worst.residual, left_over.square().mean((-2, -1)).sqrt())
        return worst

    @classmethod
    def largest(cls, parts: Sequence[Mismatch]) -> Mismatch:
        """Combine the micro-batches of an update."""
        return cls(*(torch.stack([getattr(p, name) for p in parts]).max() for name in _ADVICE))

    def named(self) -> dict[str, Tensor]:
        """Return the quantities under their names in the logs."""
        return {f"guard/{name}": getattr(self, name) for name in _ADVICE}


def beyond_bounds(figures: Mapping[str, float], guard: Guard, *, exact: bool) -> str | None:
    """Say what is wrong, in words; None when every figure is within its bound.

    Args:
        figures: as named by :meth:`Mismatch.named`, the largest over ranks.
        guard: bounds set by the user; those left open follow the precision.
        exact: whether the run computes in float32 (or better).
    """
    bounds = FLOAT32 if exact else REDUCED
    found = []
    for name, advice in _ADVICE.items():
        given = getattr(guard, name)
        value, bound = figures[f"guard/{name}"], bounds[name] if given is None else given
        if not value <= bound:  # NaN counts as beyond
            found.append(
                f"  {name}: {value:.3g}, bound {bound:.3g} (model.guard.{name}); look at {advice}."
            )
    if not found:
        return None
    return (
        "Rollout and training are not the same policy.\n"
        + "\n".join(found)
        + "\nRun `lightning_unigrpo.testing.check_adapter(adapter)` to see which part of the adapter "
        "disagrees; raise the bound only if the difference is the precision's."
    )


def _larger(worst: Tensor, values: Tensor) -> Tensor:
    # torch.maximum propagates NaN, so a NaN is never hidden by a smaller number.
    return torch.maximum(worst.to(values.device), values.detach().abs().max().float())
