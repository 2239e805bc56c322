r"""Sampling by flow matching: noise levels, deterministic and stochastic steps, their densities.

One convention everywhere: ``sigma`` is 1 at pure noise and 0 at data, ``x = (1 - sigma) data +
sigma noise``, and ``velocity = dx/dsigma = noise - data``. A step goes down from ``sigma`` to
``sigma_next`` and ``h = sigma - sigma_next > 0``. A velocity implies both ends of its path:
``data^ = x - sigma velocity`` and ``noise^ = x + (1 - sigma) velocity``.

Rollout and training call the same functions on float32 states, so that both see the same moments.
Shape letters: ``N`` latent tokens, ``C`` latent channels, ``T`` steps, ``[*]`` any leading
dimensions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Kind: TypeAlias = Literal["flow", "dance", "cps"]
"""The law of a stochastic step: Flow-SDE, Dance-SDE, coefficient-preserving sampling."""


class Transition(NamedTuple):
    """The Gaussian of one stochastic step, ``x_next = mean + std * noise``."""

    mean: Tensor
    """``[*, N, C]`` float32 (float64 for float64 inputs), differentiable in the velocity."""
    std: Tensor
    """``[*, 1, 1]``, same dtype: what multiplies the noise, sqrt(h) included, for every kind."""


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    r"""Move noise levels towards 1, where large images need more of the steps.

    ``sigma' = k sigma / (1 + (k - 1) sigma)``

    Source: Stable Diffusion 3, https://arxiv.org/abs/2403.03206 (resolution-dependent shift).

    Args:
        sigma: ``[*]`` float in [0, 1].
        shift: k > 0; 1 leaves the levels alone.

    Returns:
        ``[*]`` in [0, 1], same dtype; 0 and 1 stay where they are.

    Raises:
        ValueError: when ``shift`` is not positive.

    Example:
        >>> shift_sigma(torch.tensor([1.0, 0.5, 0.0]), 3.0)
        tensor([1.0000, 0.7500, 0.0000])
    """
    if not shift > 0:
        raise ValueError(f"shift is {shift}; give a positive number (sampling.shift).")
    return shift * sigma / (1 + (shift - 1) * sigma)


def point_sigmas(num_points: int, shift: float = 3.0) -> Tensor:
    r"""Place N points from 1 to 0, both included: N - 1 steps, Bagel's reading of "timesteps".

    ``sigma_i = shift_sigma(1 - i / (N - 1), k)``, ``i = 0 .. N-1``

    Source: Bagel, https://arxiv.org/abs/2505.14683 (inference schedule of its release).

    Args:
        num_points: N >= 2.
        shift: k > 0.

    Returns:
        ``[N]`` float32, descending from 1 to 0.

    Raises:
        ValueError: when no step would be left.

    Example:
        >>> point_sigmas(3)
        tensor([1.0000, 0.7500, 0.0000])
    """
    if num_points < 2:
        raise ValueError(
            f"{num_points} time points leave no step; give 2 or more (sampling.num_timesteps)."
        )
    # float64: a last-digit difference between two ways of building the grid is another policy.
    return shift_sigma(torch.linspace(1, 0, num_points, dtype=torch.float64), shift).float()


def step_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    r"""Place N steps, the last of which ends at 0: the reading of "timesteps" in diffusers.

    ``sigma_i = shift_sigma(1 - i / N, k)``, ``i = 0 .. N``

    Source: diffusers, FlowMatchEulerDiscreteScheduler given linspace(1, 1/N, N); it appends the 0.

    Args:
        num_steps: N >= 1.
        shift: k > 0.

    Returns:
        ``[N+1]`` float32, descending from 1 to 0.

    Raises:
        ValueError: when there is no step.

    Example:
        >>> step_sigmas(2)
        tensor([1.0000, 0.7500, 0.0000])
    """
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps; give 1 or more (sampling.num_timesteps).")
    return point_sigmas(num_steps + 1, shift)


def sigma_schedule(
    num_timesteps: int, *, shift: float, convention: Literal["points", "steps"]
) -> Tensor:
    """Build the noise levels of a rollout in either convention.

    ``points``: :func:`point_sigmas`; ``steps``: :func:`step_sigmas`.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Table 3 ("25 timesteps", shift 3).

    Args:
        num_timesteps: points or steps, as ``convention`` says.
        shift: k > 0.
        convention: what is counted; 25 points are 24 network calls, 25 steps are 25.

    Returns:
        ``[T+1]`` float32, descending from 1 to 0, for T network calls.

    Raises:
        ValueError: when no step would be left or the convention is unknown.

    Example:
        >>> [len(sigma_schedule(25, shift=3.0, convention=c)) - 1 for c in ("points", "steps")]
        [24, 25]
    """
    if convention not in ("points", "steps"):
        raise ValueError(f"{convention!r} is not 'points' or 'steps' (sampling.schedule).")
    build = point_sigmas if convention == "points" else step_sigmas
    return build(num_timesteps, shift)


def ode_step(
    velocity: Tensor, x: Tensor, sigma: Tensor | float, sigma_next: Tensor | float
) -> Tensor:
    """Take one deterministic Euler step.

    ``x_next = x - h velocity``, ``h = sigma - sigma_next``

    Source: Flow matching, https://arxiv.org/abs/2210.02747; Bagel,
    https://arxiv.org/abs/2505.14683.

    Args:
        velocity: ``[*, N, C]`` at ``x``.
        x: ``[*, N, C]`` state at ``sigma``.
        sigma: ``[*]`` or a number, in (0, 1].
        sigma_next: ``[*]`` or a number, in [0, sigma).

    Returns:
        ``[*, N, C]`` float32 (float64 stays float64).

    Example:
        >>> ode_step(torch.ones(1, 2), torch.zeros(1, 2), 1.0, 0.75)
        tensor([[-0.2500, -0.2500]])
    """
    velocity, x = _promote(velocity, x)
    return x - (_column(sigma, x) - _column(sigma_next, x)) * velocity


def transition(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    eta: float,
    kind: Kind = "flow",
    first: Tensor | bool = False,
) -> Transition:
    r"""Return the moments of one stochastic step.

    With ``S = eta sqrt(sigma / (1 - sigma))`` for ``flow`` and ``S = eta`` for ``dance``:

    ``mean = x - h (velocity + S^2 / (2 sigma) noise^)``, ``std = S sqrt(h)``;

    ``cps``: ``mean = (1 - sigma_next) data^ + sqrt(sigma_next^2 - std^2) noise^``,
    ``std = sigma_next sin(eta pi / 2)``. With eta 0 each of them is the ODE step.

    At step 0 sigma is 1 and S of ``flow`` infinite. Then the sigma in ``1 - sigma`` *inside S*, and
    no other, becomes the second level of the schedule, which is this step's ``sigma_next``; hence
    std is eta there, for any schedule. The rule goes by the step's index: ``sigma == 1`` fails on a
    grid that was rounded.

    Source: Flow-GRPO, https://arxiv.org/abs/2505.05470 (``flow`` and, in its released code, the
    rule for step 0); DanceGRPO, https://arxiv.org/abs/2505.07818; CPS,
    https://arxiv.org/abs/2509.05952. UniGRPO, https://arxiv.org/abs/2603.23500, does not say what
    happens at step 0.

    Args:
        velocity: ``[*, N, C]`` at ``x``, any float dtype.
        x: ``[*, N, C]`` state at ``sigma``, any float dtype.
        sigma: ``[*]`` or a number, in (0, 1]; below 1 for ``flow`` unless ``first``.
        sigma_next: ``[*]`` or a number, in [0, sigma).
        eta: noise level >= 0; at most 1 for ``cps``.
        kind: the law of the step.
        first: ``[*]`` bool or a bool: whether this is step 0 of the schedule.

    Returns:
        Mean ``[*, N, C]`` and std ``[*, 1, 1]``, in float32 whatever the autocast state (float64
        stays).

    Raises:
        ValueError: for an unknown kind, a negative eta, or ``cps`` with eta above 1.

    Example:
        >>> velocity, x = torch.zeros(1, 2), torch.ones(1, 2)
        >>> tuple(transition(velocity, x, 1.0, 0.9, eta=0.8, first=True))
        (tensor([[0.6800, 0.6800]]), tensor([[0.8000]]))
    """
    _check_law(eta, kind)
    velocity, x = _promote(velocity, x)
    sigma, sigma_next = _column(sigma, x), _column(sigma_next, x)  # [*, 1, 1]
    noise_hat = x + (1 - sigma) * velocity
    if kind == "cps":
        # sqrt(sigma_next^2 - std^2) without the cancellation: sin^2 + cos^2 = 1.
        angle = eta * math.pi / 2
        kept = sigma_next * math.cos(angle)
        mean = (1 - sigma_next) * (x - sigma * velocity) + kept * noise_hat
        std = sigma_next * math.sin(angle)
    else:
        h = sigma - sigma_next
        diffusion = torch.full_like(sigma, eta)
        if kind == "flow":
            is_first = torch.as_tensor(first, device=x.device)[..., None, None]
            diffusion = eta * (sigma / (1 - torch.where(is_first, sigma_next, sigma))).sqrt()
        mean = x - h * (velocity + diffusion.square() / (2 * sigma) * noise_hat)
        std = diffusion * h.sqrt()
    return Transition(mean, std.expand(*mean.shape[:-2], 1, 1))


def sde_step(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    noise: Tensor,
    *,
    eta: float,
    kind: Literal["ode", "flow", "dance", "cps"],
    first: Tensor | bool = False,
) -> Tensor:
    """Take one step of any kind; the deterministic one shares the signature.

    ``x_next = mean + std * noise``, see :func:`transition`; ``ode``: :func:`ode_step`, noise
    unused.

    Source: as :func:`transition`.

    Args:
        velocity: ``[*, N, C]`` at ``x``.
        x: ``[*, N, C]`` state at ``sigma``.
        sigma: ``[*]`` or a number, in (0, 1].
        sigma_next: ``[*]`` or a number, in [0, sigma).
        noise: ``[*, N, C]`` standard normal.
        eta: noise level >= 0; at most 1 for ``cps``.
        kind: the law of the step.
        first: ``[*]`` bool or a bool: whether this is step 0 of the schedule.

    Returns:
        ``[*, N, C]`` float32 (float64 stays float64).

    Raises:
        ValueError: as :func:`transition`.

    Example:
        >>> velocity, x, noise = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2)
        >>> sde_step(velocity, x, 1.0, 0.9, noise, eta=0.8, kind="flow", first=True)
        tensor([[1.4800, 1.4800]])
    """
    if kind == "ode":
        return ode_step(velocity, x, sigma, sigma_next)
    mean, std = transition(velocity, x, sigma, sigma_next, eta=eta, kind=kind, first=first)
    return mean + std * noise


def log_prob(
    x_next: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    normalizer: bool = False,
) -> Tensor:
    r"""Score a state under the Gaussian of its step.

    ``-(x_next - mean)^2 / (2 std^2) [- log std - log sqrt(2 pi)]``, reduced over ``N, C``.

    Deviation: the papers write the joint density, a sum; like all known code the default is the
    mean, because clip ranges of 1e-6 exist only for it. ``sum`` is the joint density.
    Deviation: for ``cps`` the released codes drop ``1 / (2 std^2)``; here it is the true Gaussian
    for every kind, so CPS log-ratios are ``1 / (2 std^2)`` times theirs and need other clip ranges.

    Source: Flow-GRPO, https://arxiv.org/abs/2505.05470 (policy of one denoising step).

    Args:
        x_next: ``[*, N, C]`` the state that was drawn.
        mean: ``[*, N, C]`` of :func:`transition`.
        std: ``[*, 1, 1]`` of :func:`transition`, > 0.
        reduction: over the latent.
        normalizer: add the terms that do not depend on the mean; they cancel in every ratio.

    Returns:
        ``[*]`` nats (per latent number for ``mean``), float32 (float64 stays float64).

    Example:
        >>> log_prob(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2), torch.ones(1, 1))
        tensor(-1.)
    """
    x_next, mean = _promote(x_next, mean)
    value = -0.5 * ((x_next - mean) / std).square()
    if normalizer:
        value = value - std.log() - 0.5 * math.log(2 * math.pi)
    return value.mean((-2, -1)) if reduction == "mean" else value.sum((-2, -1))


def draw_window(
    num_steps: int,
    *,
    size: int,
    low: int,
    high: int,
    mode: Literal["random", "fixed", "sliding"] = "random",
    seed: int = 0,
    step: int = 0,
    group: int = 0,
    image: int = 0,
) -> range:
    """Choose which contiguous steps of a rollout are stochastic.

    ``random``: start uniform in ``{low .. high - size}``; ``fixed``: start at ``low``; ``sliding``:
    one further at every iteration, back to ``low`` after the last start. Never the last step of the
    schedule: nothing after it would remove its noise from the image.

    The draw is a function of (seed, step, group, image) alone: all members of a group on all ranks
    share it, a resumed run repeats it, and no global generator moves.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500, Table 3 (size 3 in [0, 5]); Flow-GRPO-Fast;
    ``sliding``: MixGRPO, https://arxiv.org/abs/2507.21802.

    Args:
        num_steps: T, steps of the schedule.
        size: K >= 1, steps of the window.
        low: first step allowed, >= 0.
        high: end of the allowed steps, exclusive; lowered to T - 1.
        mode: how the start is chosen.
        seed: >= 0, of the run.
        step: >= 0, iteration.
        group: >= 0, id of the group.
        image: >= 0, which of a trajectory's images: each has a window of its own.

    Returns:
        K consecutive steps inside ``[low, min(high, T - 1))``.

    Raises:
        ValueError: when the window does not fit, or for an unknown mode.

    Example:
        >>> sorted({draw_window(24, size=3, low=0, high=5, step=i).start for i in range(50)})
        [0, 1, 2]
    """
    end = min(high, num_steps - 1)
    num_starts = end - size - low + 1
    if size < 1 or low < 0 or num_starts < 1:
        raise ValueError(
            f"a window of {size} steps in [{low}, {high}) does not fit a schedule of {num_steps} "
            f"steps: it must hold at least 1 step and lie in [0, {end}), as the last step is never "
            "stochastic. Change sampling.window_size or sampling.window_range."
        )
    if mode == "random":
        # NumPy keeps the raw words the same in every version, not what integers() makes of them.
        key = [seed, step, group, *([image] if image else [])]
        word = np.random.Philox(np.random.SeedSequence(key)).random_raw()
        offset = int(word) % num_starts
    elif mode in ("fixed", "sliding"):
        offset = step % num_starts if mode == "sliding" else 0
    else:
        raise ValueError(f"{mode!r} is not 'random', 'fixed' or 'sliding' (sampling.window_mode).")
    return range(low + offset, low + offset + size)


def _promote(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in float32, or in float64 where one of them is."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _column(value: Tensor | float, x: Tensor) -> Tensor:
    """Return ``[*, 1, 1]`` in the dtype and on the device of ``x``."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)[..., None, None]


def _check_law(eta: float, kind: str) -> None:
    if kind not in ("flow", "dance", "cps"):
        raise ValueError(f"{kind!r} is not 'flow', 'dance' or 'cps' (sampling.sde).")
    if eta < 0:
        raise ValueError(f"eta is {eta}; give 0 or more (sampling.eta).")
    if kind == "cps" and eta > 1:
        raise ValueError(
            f"eta is {eta} with kind 'cps', whose noise sin(eta pi / 2) falls again beyond 1: "
            "lower sampling.eta to 1 or less, or choose 'flow' for sampling.sde."
        )
