r"""Sampling by unmasking: which codes of a discrete image stay masked after each step.

A masked policy sees an image of which some codes are known, and says the distribution of each of the others
on its own. A step draws some of them; they stay. Two rules say which:

``independent``: every masked code stays masked with probability ``g_{k+1} / g_k``, whatever was drawn. So
the rule is no part of the policy: the probability of a step is that of the codes it reveals, exactly.

``confident``: all masked codes are drawn, and the likeliest stay (MaskGIT). Which ones do depends on what
was drawn: the probability of the step has a second factor, that of the choice, which no one computes.
Log-probabilities here are those of the codes alone, and ratios ignore that factor.

Shape letters: ``B`` rows, ``N`` codes of an image, ``T`` steps, ``[*]`` any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


def mask_ratios(num_steps: int) -> Tensor:
    r"""Return the share of codes that is masked before and after each step.

    ``g_k = cos(pi / 2 k / T)``

    Source: MaskGIT, https://arxiv.org/abs/2202.04200, cosine schedule; Show-o,
    https://arxiv.org/abs/2408.12528.

    Args:
        num_steps: T >= 1.

    Returns:
        ``[T+1]`` float64, from 1 down to exactly 0.

    Raises:
        ValueError: when there is no step.

    Example:
        >>> mask_ratios(2)
        tensor([1.0000, 0.7071, 0.0000], dtype=torch.float64)
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} unmasking steps; give 1 or more (sampling.num_timesteps).")
    ratios = (torch.arange(num_steps + 1, dtype=torch.float64) * (math.pi / 2 / num_steps)).cos()
    ratios[-1] = 0.0  # the cosine leaves 6e-17, which a draw of 0 would not pass
    return ratios


def reveal_steps(uniforms: Tensor, num_steps: int) -> Tensor:
    r"""Draw the step at which each code is revealed, independently of all others.

    ``step = #{k in 1 .. T : u < g_k}``, so ``P(still masked after step k) = g_{k+1}``: one uniform per code
    stands for all its T decisions to stay masked with probability ``g_{k+1} / g_k``.

    A step may reveal nothing, and no two images reveal equally many codes at a step.

    Source: MaskGRPO, https://arxiv.org/abs/2510.02880 (its rollouts); :func:`mask_ratios`.

    Args:
        uniforms: ``[*]`` in [0, 1).
        num_steps: T >= 1.

    Returns:
        ``[*]`` int64 in ``0 .. T - 1``.

    Example:
        >>> reveal_steps(torch.tensor([0.9, 0.5, 0.0]), 2)
        tensor([0, 1, 1])
    """
    after = mask_ratios(num_steps)[1:].to(uniforms.device)
    return (uniforms.unsqueeze(-1).double() < after).sum(-1)


def num_masked(num_codes: int, step: int, num_steps: int, unknown: int) -> int:
    r"""Return how many codes the confidence rule masks again at a step.

    ``max(1, min(unknown - 1, floor(N g_{k+1})))``, and 0 at the last step

    The product is float32, as upstream's: at N = 36, T = 6, k = 3 double precision says 18 instead of 17.

    Deviation: upstream masks one code again at the last step as well, and returns the image nevertheless.

    Source: Show-o, https://github.com/showlab/Show-o, ``t2i_generate``.

    Args:
        num_codes: N.
        step: k, from 0.
        num_steps: T.
        unknown: how many are masked before the step, >= 1.

    Example:
        >>> [num_masked(36, 0, 6, 36), num_masked(36, 3, 6, 25), num_masked(36, 5, 6, 9)]
        [34, 17, 0]
    """
    if step + 1 >= num_steps:
        return 0
    share = torch.cos(torch.tensor((step + 1) / num_steps) * math.pi * 0.5)
    return max(1, min(unknown - 1, int((share * num_codes).floor())))


def choice_temperatures(temperature: float, num_steps: int) -> list[float]:
    r"""Return how strongly chance takes part in the confidence rule at each step.

    ``tau_k = tau prod_{j <= k} (1 - (j + 1) / T)``: it is annealed before its first use, to 0 at the last.

    Source: Show-o, https://github.com/showlab/Show-o, ``t2i_generate``.

    Args:
        temperature: tau >= 0, nats.
        num_steps: T.

    Example:
        >>> [round(x, 4) for x in choice_temperatures(1.0, 3)]
        [0.6667, 0.2222, 0.0]
    """
    found = []
    for step in range(num_steps):
        temperature *= 1 - (step + 1) / num_steps
        found.append(temperature)
    return found


def most_confident(log_probs: Tensor, uniforms: Tensor, temperature: float, keep: int) -> Tensor:
    r"""Choose which of the codes just drawn stay.

    ``confidence = log p + tau (-log(-log u))``, the ``keep`` largest stay

    Source: MaskGIT, https://arxiv.org/abs/2202.04200; Show-o, ``mask_by_random_topk``.

    Args:
        log_probs: ``[B, N]`` nats, of the codes drawn; -inf where nothing was masked.
        uniforms: ``[B, N]`` in [0, 1).
        temperature: tau >= 0 of the Gumbel noise, nats.
        keep: how many stay in every row, >= 0.

    Returns:
        ``[B, N]`` bool.

    Example:
        >>> most_confident(torch.tensor([[-1.0, -3.0, -2.0]]), torch.full((1, 3), 0.5), 0.0, 2)
        tensor([[ True, False,  True]])
    """
    tiny = torch.finfo(torch.float64).tiny
    gumbel = -(-uniforms.double().clamp_min(tiny).log()).log()
    confidence = log_probs.double() + temperature * gumbel
    chosen = confidence.topk(keep, dim=1).indices
    return torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, chosen, True)


class Unmasking(Protocol):
    """Which codes each step asks for and keeps, and the random numbers that they are drawn with."""

    num_steps: int
    """T."""

    def asked(self, masked: Tensor, step: int) -> Tensor:
        """Return which codes are drawn at a step, ``[B, N]`` bool, of those that are ``masked``, likewise."""

    def values(self, step: int) -> Tensor:
        """Return the uniforms ``[B, N]`` of a step's draws, in [0, 1)."""

    def kept(self, asked: Tensor, log_probs: Tensor, step: int) -> Tensor:
        """Return which of the codes just drawn stay, ``[B, N]`` bool.

        Args:
            asked: from :meth:`asked` of the same step.
            log_probs: ``[B, N]`` nats, of the codes drawn; anything elsewhere.
            step: k.
        """


class Independent:
    """Every code at a step of its own, whatever is drawn; see :func:`reveal_steps`.

    Args:
        uniforms: ``[B, 2, N]`` in [0, 1): of each code its value, and when it is revealed.
        num_steps: T.
    """

    def __init__(self, uniforms: Tensor, num_steps: int) -> None:
        self.num_steps = num_steps
        self._values, luck = uniforms.unbind(1)
        self._planned = reveal_steps(luck, num_steps)

    def asked(self, masked: Tensor, step: int) -> Tensor:
        """Return the codes whose step it is."""
        return self._planned == step

    def values(self, step: int) -> Tensor:
        """Return the one uniform of each code."""
        return self._values

    def kept(self, asked: Tensor, log_probs: Tensor, step: int) -> Tensor:
        """Return them all."""
        return asked


class Confident:
    """All masked codes are drawn, the most confident stay; see :func:`most_confident`.

    Args:
        uniforms: ``[B, T, 2, N]`` in [0, 1): of each code and step its value, and its luck.
        temperature: of the choice at the beginning, nats >= 0; see :func:`choice_temperatures`.
    """

    def __init__(self, uniforms: Tensor, temperature: float) -> None:
        self.num_steps = uniforms.shape[1]
        self._uniforms = uniforms
        self._temperatures = choice_temperatures(temperature, self.num_steps)
        self._unknown = uniforms.shape[-1]

    def asked(self, masked: Tensor, step: int) -> Tensor:
        """Return all that are masked."""
        return masked

    def values(self, step: int) -> Tensor:
        """Return a uniform of each code for this step alone."""
        return self._uniforms[:, step, 0]

    def kept(self, asked: Tensor, log_probs: Tensor, step: int) -> Tensor:
        """Return the most confident; as many in every row, as the schedule says."""
        again = num_masked(self._uniforms.shape[-1], step, self.num_steps, self._unknown)
        keep, self._unknown = self._unknown - again, again
        drawn = log_probs.masked_fill(~asked, -torch.inf)
        luck = self._uniforms[:, step, 1]
        return most_confident(drawn, luck, self._temperatures[step], keep)
