r"""The objective: what UniGRPO changes in FlowGRPO, and the terms that both are made of.

1. Reasoning and image are one Markov decision process with one reward at its end: the tokens of the
   chain of thought and the denoising steps share one group-relative advantage, and one loss trains
   both experts, ``-J = -J_text - lambda J_flow + gamma MSE``.
2. No classifier-free guidance while training: rollouts stay one linear chain, one branch a step.
3. RatioNorm (:func:`ratio_norm`, from GRPO-Guard): the importance ratio of a denoising step is
   centred and rescaled, so that one clip range fits all noise levels.
4. A mean squared error between the velocities of policy and reference (:func:`velocity_mse`)
   replaces the latent KL (:func:`latent_kl`), which weighs noise levels very unevenly.

Source: UniGRPO, https://arxiv.org/abs/2603.23500. Shape letters: ``N`` latent tokens, ``C`` latent
channels, ``D = N C``, ``[*]`` any leading dimensions. Ratios are new over old policy.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def log_clip_bounds(clip_low: float, clip_high: float | None) -> tuple[float, float]:
    r"""Express a clip range of ratios as a range of log-ratios.

    ``(log(1 - clip_low), log(1 + clip_high))``

    Source: PPO, https://arxiv.org/abs/1707.06347; two bounds: DAPO,
    https://arxiv.org/abs/2503.14476.

    Args:
        clip_low: in [0, 1).
        clip_high: >= 0; ``None`` leaves ratios unbounded above.

    Returns:
        Lower bound <= 0 and upper bound >= 0, nats.

    Raises:
        ValueError: outside these ranges.

    Example:
        >>> log_clip_bounds(0.2, 0.2)
        (-0.22314355131420976, 0.1823215567939546)
    """
    if not 0 <= clip_low < 1 or (clip_high is not None and not clip_high >= 0):
        raise ValueError(
            f"clip range ({clip_low}, {clip_high}); ratios are positive, so give 0 <= low < 1 and "
            "high >= 0 (objective.text_clip_low and _high, objective.flow_clip_low and _high)."
        )
    # log1p: 1 + 1e-6 alone would already be rounded by 5% of the range in float32.
    return math.log1p(-clip_low), math.inf if clip_high is None else math.log1p(clip_high)


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    r"""Return PPO's pessimistic surrogate as a loss, element by element.

    ``loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)``, ``rho = exp(log_ratio)``

    The comparison is made on log-ratios by explicit masks: an element is clipped when A > 0 and
    ``log_ratio > log(1 + clip_high)``, or A < 0 and ``log_ratio < log(1 - clip_low)``. It then
    contributes a constant and no gradient. ``min`` of two tensors would halve the gradient on ties,
    and at clip ranges of 1e-6, eight float32 numbers wide, ties are frequent.

    Source: PPO, https://arxiv.org/abs/1707.06347; UniGRPO, https://arxiv.org/abs/2603.23500,
    Eqs. 2 and 6.

    Args:
        log_ratio: ``[*]`` new minus old log-probability, nats, any float dtype.
        advantage: ``[*]`` or broadcastable, unitless; 0 contributes nothing whatever the ratio.
        clip_low: in [0, 1).
        clip_high: >= 0; ``None`` = not clipped above.

    Returns:
        Loss ``[*]`` float32 (float64 stays float64) and clipped ``[*]`` bool.

    Raises:
        ValueError: for clip ranges without meaning.

    Example:
        >>> log_ratio = torch.tensor([2.0, 0.5, 2.0]).log()
        >>> advantage = torch.tensor([1.0, 1.0, -1.0])
        >>> clipped_surrogate(log_ratio, advantage, clip_low=0.2, clip_high=0.2)
        (tensor([-1.2000, -0.5000,  2.0000]), tensor([ True, False, False]))
    """
    low, high = log_clip_bounds(clip_low, clip_high)
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    above = (advantage > 0) & (log_ratio > high)
    below = (advantage < 0) & (log_ratio < low)
    # Replaced before exp: a where() behind it would turn an overflow into a NaN gradient.
    bounded = log_ratio.masked_fill(above, high).masked_fill(below, low)
    bounded = bounded.masked_fill(advantage == 0, 0.0)
    return -advantage * bounded.exp(), above | below


def token_weights(
    lengths: Tensor,
    *,
    aggregation: Literal["sequence_mean", "token_mean", "constant"],
    num_sequences: float,
    num_tokens: float,
    constant_length: int | None = None,
) -> Tensor:
    r"""Return the weight of each token, so that ``loss = sum(weights * token_losses)``.

    ``sequence_mean``: ``1 / (L_i num_sequences)``, all chains count the same (the paper);
    ``token_mean``: ``1 / num_tokens``, all tokens count the same;
    ``constant``: ``1 / (num_sequences constant_length)``, free of the length bias of both.

    The counts are those of the whole update, over micro-batches and ranks, so adding up the parts
    gives the same loss however the sequences are cut into micro-batches.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Eq. 2; DAPO,
    https://arxiv.org/abs/2503.14476; Dr. GRPO, https://arxiv.org/abs/2503.20783.

    Args:
        lengths: ``[b]`` int64 tokens of each sequence of this micro-batch; 0 is allowed.
        aggregation: how tokens share the loss.
        num_sequences: of the whole update.
        num_tokens: of the whole update.
        constant_length: divisor of ``constant``, tokens > 0; required there.

    Returns:
        ``[sum(lengths)]`` float32, sequence after sequence.

    Raises:
        ValueError: for an unknown aggregation, or ``constant`` without its length.

    Example:
        >>> lengths = torch.tensor([1, 2])
        >>> token_weights(lengths, aggregation="sequence_mean", num_sequences=2, num_tokens=3)
        tensor([0.5000, 0.2500, 0.2500])
    """
    if aggregation == "sequence_mean":
        divisor = lengths.float().clamp_min(1) * max(num_sequences, 1)
    elif aggregation == "token_mean":
        divisor = torch.full_like(lengths, max(num_tokens, 1), dtype=torch.float32)
    elif aggregation == "constant":
        if constant_length is None or constant_length < 1:
            raise ValueError(
                f"aggregation 'constant' divides by a length, given is {constant_length}; set "
                "objective.text_constant_length to 1 or more."
            )
        product = max(num_sequences, 1) * constant_length
        divisor = torch.full_like(lengths, product, dtype=torch.float32)
    else:
        raise ValueError(
            f"{aggregation!r} is not 'sequence_mean', 'token_mean' or 'constant' "
            "(objective.text_aggregation)."
        )
    return divisor.reciprocal().repeat_interleave(lengths)


def ratio_norm(noise: Tensor, mean: Tensor, mean_old: Tensor) -> Tensor:
    r"""Return RatioNorm's log-ratio of a denoising step, in its direct form.

    Defined as ``log r = std [log rho + mean(d^2) / (2 std^2)]`` with ``d = mean - mean_old``. The
    state was drawn as ``x_next = mean_old + std noise``, hence

    ``log rho = mean((std noise)^2 - (std noise - d)^2) / (2 std^2)
    = mean(noise d) / std - mean(d^2) / (2 std^2)`` and

    ``log r = mean(noise d)``.

    No two log-probabilities are subtracted, nothing is divided by std, and equal means give exactly
    0.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Eq. 5; GRPO-Guard,
    https://arxiv.org/abs/2510.22319. Both write ``std`` as ``sigma_t sqrt(dt)``; means over D stand
    for their norms, as log-probabilities are means over D.

    Args:
        noise: ``[*, N, C]`` that was drawn, ``(x_next - mean_old) / std``.
        mean: ``[*, N, C]`` of the policy in training.
        mean_old: ``[*, N, C]`` of the policy that drew.

    Returns:
        ``[*]`` float32 (float64 stays float64); 0 on-policy. Its size falls as ``1 / sqrt(D)``.

    Example:
        >>> ratio_norm(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.3, 0.1]]), torch.zeros(1, 2))
        tensor(0.1000)
    """
    return (_float(noise) * (_float(mean) - _float(mean_old))).mean((-2, -1))


def plain_log_ratio(noise: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    r"""Return the log-ratio of a denoising step without RatioNorm, from the drift.

    ``log rho = mean(noise d) / std - mean(d^2) / (2 std^2)``, ``d = mean - mean_old``: the
    difference of the two mean log-probabilities of ``x_next = mean_old + std noise``, without
    subtracting them.

    Source: Flow-GRPO, https://arxiv.org/abs/2505.05470; the algebra is in :func:`ratio_norm`.

    Args:
        noise: ``[*, N, C]`` that was drawn.
        mean: ``[*, N, C]`` of the policy in training.
        mean_old: ``[*, N, C]`` of the policy that drew.
        std: ``[*, 1, 1]`` of the step, > 0.

    Returns:
        ``[*]`` nats per latent number, float32 (float64 stays float64); 0 on-policy.

    Example:
        >>> noise, mean = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.2, 0.2]])
        >>> plain_log_ratio(noise, mean, torch.zeros(1, 2), torch.full((1, 1), 0.5))
        tensor(-0.0800)
    """
    drift = (_float(mean) - _float(mean_old)) / std
    return (drift * (_float(noise) - 0.5 * drift)).mean((-2, -1))


def inverse_step_weight(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    r"""Return GRPO-Guard's optional weight of a denoising step.

    ``1 / h = 1 / (sigma - sigma_next)``

    It undoes the step size that RatioNorm leaves in the gradient. Warning: on Bagel's 25 points it
    is 70 at step 0, 55 at step 4 and 9 at the last, and it multiplies J_flow only: learning rate,
    clip norm and the meaning of gamma (the weight of the velocity error) change with it. UniGRPO
    does not say whether it is used.

    Source: GRPO-Guard, https://arxiv.org/abs/2510.22319 (gradient reweighting).

    Args:
        sigma: ``[*]`` in (0, 1].
        sigma_next: ``[*]`` in [0, sigma).

    Returns:
        ``[*]`` > 1.

    Example:
        >>> inverse_step_weight(torch.tensor([1.0, 0.75]), torch.tensor([0.75, 0.25]))
        tensor([4., 2.])
    """
    return 1 / (sigma - sigma_next)


def velocity_mse(
    velocity: Tensor, ref_velocity: Tensor, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    r"""Return the squared distance to the reference's velocity.

    ``mean((velocity - ref_velocity)^2)`` over ``N, C``, without a weight for the noise level.

    Deviation: the paper writes a squared norm and calls it MSE. ``mean`` follows the name and the
    known reimplementations, ``sum`` the norm: gamma on ``sum`` equals gamma D on ``mean``.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Eq. 8.

    Args:
        velocity: ``[*, N, C]`` of the policy, differentiable.
        ref_velocity: ``[*, N, C]`` of the reference, at the same states and the same text.
        reduction: over the latent.

    Returns:
        ``[*]`` >= 0, float32 (float64 stays float64), squared unit of the latent.

    Example:
        >>> velocity_mse(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor(5.)
    """
    error = (_float(velocity) - _float(ref_velocity)).square()
    return error.mean((-2, -1)) if reduction == "mean" else error.sum((-2, -1))


def latent_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    r"""Return the KL divergence of a denoising step from the reference's, per latent number.

    ``mean((mean - ref_mean)^2) / (2 std^2)``: exact for Gaussians of one std.

    Deviation: Flow-GRPO's code leaves sqrt(h) out of std, others the factor 1/2. Weights do not
    carry over between any of them.

    Source: Flow-GRPO, https://arxiv.org/abs/2505.05470 (its KL term, which UniGRPO replaces by
    :func:`velocity_mse`).

    Args:
        mean: ``[*, N, C]`` of the policy.
        ref_mean: ``[*, N, C]`` of the reference.
        std: ``[*, 1, 1]`` of the step, > 0, sqrt(h) included.

    Returns:
        ``[*]`` >= 0, nats per latent number.

    Example:
        >>> latent_kl(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.ones(1, 1))
        tensor(2.5000)
    """
    return (0.5 * ((_float(mean) - _float(ref_mean)) / std).square()).mean((-2, -1))


def k3_kl(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    r"""Estimate the KL divergence of a token's distribution from the reference's.

    ``exp(r) - r - 1``, ``r = ref_log_prob - log_prob``: unbiased over tokens of the policy, and
    never negative.

    Source: J. Schulman, http://joschu.net/blog/kl-approx.html (k3); GRPO,
    https://arxiv.org/abs/2402.03300.

    Args:
        log_prob: ``[*]`` of the tokens that were drawn, nats.
        ref_log_prob: ``[*]`` of the same tokens under the reference, nats.

    Returns:
        ``[*]`` >= 0, nats.

    Example:
        >>> k3_kl(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
        tensor([0.0000, 0.3679])
    """
    r = _float(ref_log_prob) - _float(log_prob)
    return torch.expm1(r) - r


def rescale_clip(clip: float, *, latent_size: int, reference_size: int) -> float:
    r"""Carry a clip range of the flow ratio over to another latent size.

    ``clip sqrt(D_ref / D)``: a log-ratio that is a mean over D independent numbers falls as
    ``1 / sqrt(D)``.

    Source: own derivation; the paper's 1e-6 belongs to D_ref = 64 * 64 * 64 (1024 px, Bagel).

    Args:
        clip: chosen at ``reference_size``.
        latent_size: D = N C > 0, of these images.
        reference_size: D_ref > 0.

    Returns:
        The clip range at ``latent_size``.

    Raises:
        ValueError: when a size is not positive.

    Example:
        >>> rescale_clip(1e-6, latent_size=256, reference_size=262_144)
        3.2e-05
    """
    if latent_size < 1 or reference_size < 1:
        raise ValueError(
            f"latent sizes {latent_size} and {reference_size}; give 1 or more "
            "(objective.clip_reference_size)."
        )
    return clip * math.sqrt(reference_size / latent_size)


def unigrpo_loss(
    text_loss: Tensor,
    flow_loss: Tensor,
    velocity_mse: Tensor,
    *,
    flow_weight: float,
    mse_weight: float,
    image_token_loss: Tensor | None = None,
    image_token_weight: float = 1.0,
    image_token_kl: Tensor | None = None,
    image_token_kl_weight: float = 0.0,
    latent_kl: Tensor | None = None,
    latent_kl_weight: float = 0.0,
    text_kl: Tensor | None = None,
    text_kl_weight: float = 0.0,
) -> Tensor:
    r"""Add the terms of the objective up.

    ``-J = L_text + lambda L_flow + gamma MSE [+ latent_kl_weight KL] [+ text_kl_weight KL_text]``, and for
    images of discrete tokens ``[+ image_token_weight L_tokens] [+ image_token_kl_weight KL_tokens]``.

    Terms of weight 0 are multiplied, not skipped: their graph keeps every rank's backward the same.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Eqs. 7 and 8, Table 3 (both KL weights 0).

    Args:
        text_loss: scalar, -J_text.
        flow_loss: scalar, -J_flow.
        velocity_mse: scalar >= 0, :func:`velocity_mse` averaged.
        flow_weight: lambda >= 0 (paper: 1).
        mse_weight: gamma >= 0 (paper: 1.5e-5).
        image_token_loss: scalar, the surrogate of discrete images; ``None`` = there are none.
        image_token_weight: >= 0.
        image_token_kl: scalar >= 0, :func:`k3_kl` averaged; ``None`` = not measured.
        image_token_kl_weight: >= 0.
        latent_kl: scalar >= 0, :func:`latent_kl` averaged; ``None`` = not measured.
        latent_kl_weight: >= 0 (paper: 0).
        text_kl: scalar >= 0, :func:`k3_kl` averaged; ``None`` = not measured.
        text_kl_weight: >= 0 (paper: 0).

    Returns:
        A scalar to minimise.

    Raises:
        ValueError: when a term has a weight but was not measured.

    Example:
        >>> one = torch.tensor(1.0)
        >>> unigrpo_loss(one, one, one, flow_weight=0.5, mse_weight=0.25)
        tensor(1.7500)
    """
    loss = text_loss + flow_weight * flow_loss + mse_weight * velocity_mse
    if image_token_loss is not None:
        loss = loss + image_token_weight * image_token_loss
    for name, term, weight in (
        ("image_token_kl", image_token_kl, image_token_kl_weight),
        ("latent_kl", latent_kl, latent_kl_weight),
        ("text_kl", text_kl, text_kl_weight),
    ):
        if term is not None:
            loss = loss + weight * term
        elif weight:
            raise ValueError(
                f"{name} has weight {weight} but was not measured; give it, or set "
                f"objective.{name}_weight to 0."
            )
    return loss


def _float(value: Tensor) -> Tensor:
    """Return float32 for lower precisions; float64 stays."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
