"""From scores and experience to one number: walks the segments and calls the mathematics.

Every mean is over the whole update and all ranks. A micro-batch therefore contributes *sums divided
by global counts* (:class:`Counts`): adding the micro-batches up, on one rank or on many, gives the same
loss as one large batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_unigrpo.config import Objective, Sampling
from lightning_unigrpo.flow import transition
from lightning_unigrpo.objective import (
    clipped_surrogate,
    inverse_step_weight,
    k3_kl,
    latent_kl,
    plain_log_ratio,
    ratio_norm,
    rescale_clip,
    token_weights,
    unigrpo_loss,
    velocity_mse,
)
from lightning_unigrpo.types import (
    ImageSegment,
    Scores,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    sampled,
)


class Counts(NamedTuple):
    """What the means of an update divide by; summed over its micro-batches and over ranks.

    Losses are divided by what was planned. A trajectory that ends early has fewer segments, by its own
    choice: divided by as many as there are, the rest would weigh more whenever others ended early, and the
    gradient would not be that of the expected reward.
    """

    sequences: float
    """Texts that may be sampled."""
    tokens: float
    """Sampled text tokens."""
    images: float
    """Images that may be drawn."""
    drawn: float
    """Drawn images."""
    image_tokens: float
    """Codes of discrete images that are scored."""


def count(trajectories: Sequence[Trajectory], sampling: Sampling) -> Counts:
    """Count the sampled segments, masked groups included: they keep their place with advantage 0.

    Args:
        trajectories: of this rank.
        sampling: with the plan that they were drawn by.
    """
    segments = [segment for _, segment in sampled(trajectories)]
    texts = [s for s in segments if isinstance(s, TextSegment)]
    codes = [s for s in segments if isinstance(s, TokenImageSegment)]
    return Counts(
        sequences=len(trajectories) * sampling.kinds.count("text"),
        tokens=sum(len(s.tokens) for s in texts),
        images=len(trajectories) * sampling.num_images,
        drawn=len(segments) - len(texts),
        image_tokens=sum(len(_known(s.log_prob)) for s in codes),
    )


class Transitions(NamedTuple):
    """The SDE steps of R images of one shape, stacked; K steps each."""

    x: Tensor
    """``[R, K, N, C]`` states before each step."""
    noise: Tensor
    """``[R, K, N, C]``."""
    old_velocity: Tensor
    """``[R, K, N, C]``."""
    sigma: Tensor
    """``[R, K]``."""
    sigma_next: Tensor
    """``[R, K]``."""
    first: Tensor
    """``[R, K]`` bool: step 0 of the schedule."""
    x_next: Tensor
    """``[R, K, N, C]`` states after each step."""

    @classmethod
    def stack(cls, images: Sequence[ImageSegment]) -> Transitions:
        """Stack the windows of sampled images of one shape."""
        states = torch.stack([_known(image.states) for image in images])
        sigmas = torch.stack([_known(image.sigmas) for image in images])
        steps = torch.arange(sigmas.shape[1] - 1, device=sigmas.device)
        starts = torch.tensor([image.start for image in images], device=sigmas.device)
        return cls(
            x=states[:, :-1],
            noise=torch.stack([_known(image.noise) for image in images]),
            old_velocity=torch.stack([_known(image.velocity) for image in images]),
            sigma=sigmas[:, :-1],
            sigma_next=sigmas[:, 1:],
            first=(starts.unsqueeze(1) + steps) == 0,
            x_next=states[:, 1:],
        )

    def moments(self, velocity: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Return mean ``[R, K, N, C]`` and std of every transition under a velocity."""
        return transition(
            velocity,
            self.x,
            self.sigma,
            self.sigma_next,
            eta=sampling.eta,
            kind=sampling.sde,
            first=self.first,
        )


def by_shape(
    trajectories: Sequence[Trajectory], velocities: Sequence[Tensor]
) -> Iterator[tuple[list[ImageSegment], Tensor]]:
    """Group the sampled images of one latent shape, with their velocities ``[R, K, N, C]``."""
    images = [s for _, s in sampled(trajectories) if isinstance(s, ImageSegment)]
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.latent.shape, []).append(i)
    for members in groups.values():
        yield [images[i] for i in members], torch.stack([velocities[i] for i in members])


@dataclass
class Metrics:
    """What an update says about itself, accumulated over micro-batches.

    ``sums`` are shares of a global mean: adding them over micro-batches and ranks gives the mean.
    ``maxima`` are combined by the largest.
    """

    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]

    @classmethod
    def empty(cls) -> Metrics:
        """Return metrics of nothing."""
        return cls({}, {})

    def add(self, other: Metrics) -> None:
        """Accumulate another micro-batch."""
        for key, value in other.sums.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
        for key, value in other.maxima.items():
            mine = self.maxima.get(key)
            self.maxima[key] = value if mine is None else torch.maximum(mine, value)


def trajectory_loss(
    scores: Scores,
    trajectories: Sequence[Trajectory],
    *,
    objective: Objective,
    sampling: Sampling,
    counts: Counts,
) -> tuple[Tensor, Metrics]:
    r"""Return this micro-batch's share of -J and what it says about itself.

    ``-J = -J_text - λ J_flow + γ MSE(v_θ, v_ref)``

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Eqs. 2 and 6 to 8.

    Args:
        scores: of these trajectories, from ``adapter(trajectories)``.
        trajectories: with advantages, and reference values where their weights are on.
        objective: weights, clips, reductions.
        sampling: the law of the transitions that were sampled.
        counts: global denominators of the update.

    Returns:
        A scalar float32 loss and the metrics.
    """
    metrics = Metrics.empty()
    text, text_kl = _text_terms(scores, trajectories, objective, sampling, counts, metrics)
    flow, mse, kl = _flow_terms(scores, trajectories, objective, sampling, counts, metrics)
    codes, code_kl = _code_terms(scores, trajectories, objective, counts, metrics)
    loss = unigrpo_loss(
        objective.text_weight * text,
        flow,
        mse,
        flow_weight=objective.flow_weight,
        mse_weight=objective.mse_weight,
        image_token_loss=codes,
        image_token_weight=objective.image_weight("tokens"),
        image_token_kl=code_kl,
        image_token_kl_weight=objective.image_token_kl_weight,
        latent_kl=kl,
        latent_kl_weight=objective.latent_kl_weight,
        text_kl=text_kl,
        text_kl_weight=objective.text_kl_weight,
    )
    metrics.sums["loss"] = loss.detach()
    return loss, metrics


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, (
        "a sampled segment lacks a value its rollout or reference should have set"
    )
    return value


class _Tokens(NamedTuple):
    """The clipped surrogate of n tokens or codes, sequence after sequence."""

    losses: Tensor
    """``[n]``."""
    clipped: Tensor
    """``[n]`` bool."""
    log_ratio: Tensor
    """``[n]``, detached."""
    lengths: Tensor
    """``[S]`` int64, per sequence."""


def _token_surrogate(
    log_probs: Sequence[Tensor],
    segments: Sequence[TextSegment | TokenImageSegment],
    *,
    clip_low: float,
    clip_high: float,
) -> _Tokens:
    """GRPO per token: a ratio each, the advantage of its sequence."""
    new, old = torch.cat(list(log_probs)), torch.cat([_known(s.log_prob) for s in segments])
    lengths = torch.tensor([len(x) for x in log_probs], device=new.device)
    advantage = new.new_tensor([s.advantage for s in segments]).repeat_interleave(lengths)
    log_ratio = new - old
    losses, clipped = clipped_surrogate(
        log_ratio, advantage, clip_low=clip_low, clip_high=clip_high
    )
    return _Tokens(losses, clipped, log_ratio.detach(), lengths)


def _text_terms(
    scores: Scores,
    trajectories: Sequence[Trajectory],
    objective: Objective,
    sampling: Sampling,
    counts: Counts,
    metrics: Metrics,
) -> tuple[Tensor, Tensor]:
    segments = [s for _, s in sampled(trajectories) if isinstance(s, TextSegment)]
    if not segments:
        return torch.zeros(()), torch.zeros(())
    tokens = _token_surrogate(
        scores.text,
        segments,
        clip_low=objective.text_clip_low,
        clip_high=objective.text_clip_high,
    )
    weights = token_weights(
        tokens.lengths,
        aggregation=objective.text_aggregation,
        num_sequences=counts.sequences,
        num_tokens=counts.tokens,
        constant_length=objective.text_constant_length or sampling.longest_text,
    )
    share = 1.0 / counts.tokens
    metrics.sums |= {
        "text/ratio_mean": tokens.log_ratio.exp().sum() * share,
        "text/clip_fraction": tokens.clipped.float().sum() * share,
        "text/entropy": torch.cat(scores.entropy).sum() * share,
    }
    metrics.maxima["text/log_ratio_max"] = tokens.log_ratio.abs().max()
    text_kl = weights.new_zeros(())
    if objective.text_kl_weight > 0:
        reference = torch.cat([_known(s.ref_log_prob) for s in segments])
        text_kl = (weights * k3_kl(torch.cat(scores.text), reference)).sum()
        metrics.sums["text/kl"] = text_kl.detach()
    return (weights * tokens.losses).sum(), text_kl


def _flow_terms(
    scores: Scores,
    trajectories: Sequence[Trajectory],
    objective: Objective,
    sampling: Sampling,
    counts: Counts,
    metrics: Metrics,
) -> tuple[Tensor, Tensor, Tensor]:
    flow = mse = kl = torch.zeros(())
    for images, velocity in by_shape(trajectories, scores.velocity):
        if velocity.shape[1] == 0:
            flow = flow + velocity.sum()  # 0, and backward still reaches every parameter
            continue
        steps = Transitions.stack(images)
        mean, std = steps.moments(velocity, sampling)
        share = 1.0 / (velocity.shape[1] * counts.images)  # mean over steps, then over images
        seen = 1.0 / (velocity.shape[1] * counts.drawn)
        flow = flow + share * _surrogate(
            steps, mean, std, images, objective, sampling, seen, metrics
        )
        if objective.needs_ref_velocity:
            reference = torch.stack([_known(image.ref_velocity) for image in images])
            error = velocity_mse(velocity, reference, reduction=objective.mse_reduction)
            mse = mse + share * error.sum()
            _add(metrics, "flow/velocity_mse", seen * error.detach().sum())
            if objective.latent_kl_weight > 0:
                ref_mean, _ = steps.moments(reference, sampling)
                divergence = latent_kl(mean, ref_mean, std)
                kl = kl + share * divergence.sum()
                _add(metrics, "flow/latent_kl", seen * divergence.detach().sum())
    return flow, mse, kl


def _surrogate(
    steps: Transitions,
    mean: Tensor,
    std: Tensor,
    images: Sequence[ImageSegment],
    objective: Objective,
    sampling: Sampling,
    share: float,
    metrics: Metrics,
) -> Tensor:
    """Return the clipped surrogate summed over images and steps."""
    old_mean, _ = steps.moments(steps.old_velocity, sampling)
    if objective.ratio_norm:
        log_ratio = ratio_norm(steps.noise, mean, old_mean)
    else:
        log_ratio = plain_log_ratio(steps.noise, mean, old_mean, std)
    bounds = {"clip_low": objective.flow_clip_low, "clip_high": objective.flow_clip_high}
    if objective.clip_reference_size is not None:
        size, reference = images[0].latent.numel(), objective.clip_reference_size
        bounds = {
            k: rescale_clip(v, latent_size=size, reference_size=reference)
            for k, v in bounds.items()
        }
    advantage = mean.new_tensor([image.advantage for image in images]).unsqueeze(1)
    losses, clipped = clipped_surrogate(log_ratio, advantage.expand_as(log_ratio), **bounds)
    if objective.inverse_step_weight:
        losses = losses * inverse_step_weight(steps.sigma, steps.sigma_next)
    drift = log_ratio.detach()
    _add(metrics, "flow/log_ratio_mean", share * drift.sum())
    _add(metrics, "flow/clip_fraction", share * clipped.float().sum())
    largest = metrics.maxima.get("flow/log_ratio_max", drift.new_zeros(()))
    metrics.maxima["flow/log_ratio_max"] = torch.maximum(largest, drift.abs().max())
    return losses.sum()


def _code_terms(
    scores: Scores,
    trajectories: Sequence[Trajectory],
    objective: Objective,
    counts: Counts,
    metrics: Metrics,
) -> tuple[Tensor, Tensor]:
    """GRPO over the codes of discrete images: a ratio per code, a mean per image, then over images."""
    segments = [s for _, s in sampled(trajectories) if isinstance(s, TokenImageSegment)]
    if not segments:
        return torch.zeros(()), torch.zeros(())
    if not any(len(x) for x in scores.image_tokens):  # no step asked for, or none revealed a code
        nothing = torch.cat(
            scores.image_tokens
        ).sum()  # 0, and backward still reaches every parameter
        return nothing, nothing.detach()
    tokens = _token_surrogate(
        scores.image_tokens,
        segments,
        clip_low=objective.image_token_clip_low,
        clip_high=objective.image_token_clip_high,
    )
    weights = token_weights(
        tokens.lengths,
        aggregation="sequence_mean",
        num_sequences=counts.images,
        num_tokens=counts.image_tokens,
    )
    share = 1.0 / counts.image_tokens
    metrics.sums |= {
        "image/ratio_mean": tokens.log_ratio.exp().sum() * share,
        "image/clip_fraction": tokens.clipped.float().sum() * share,
    }
    metrics.maxima["image/log_ratio_max"] = tokens.log_ratio.abs().max()
    kl = weights.new_zeros(())
    if objective.image_token_kl_weight > 0:
        reference = torch.cat([_known(s.ref_log_prob) for s in segments])
        kl = (weights * k3_kl(torch.cat(scores.image_tokens), reference)).sum()
        metrics.sums["image/kl"] = kl.detach()
    return (weights * tokens.losses).sum(), kl


def _add(metrics: Metrics, key: str, value: Tensor) -> None:
    metrics.sums[key] = metrics.sums[key] + value if key in metrics.sums else value
