"""Classifier-free guidance over text and input images, for evaluation; training never uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Renorm: TypeAlias = Literal["global", "channel", "text_channel"]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Bagel's second scale, interval and renormalisation; the text scale is ``sampling.guidance_scale``."""

    image_scale: float = 1.0
    """b, against a context without images and reasoning; upstream: 2 for editing."""
    interval: tuple[float, float] = (0.4, 1.0)
    """Guidance acts where ``low < sigma <= high``; upstream: (0, 1) for editing."""
    renorm: Renorm = "global"
    """What is scaled back to the length it has without guidance; upstream: text_channel for editing."""
    renorm_min: float = 0.0
    """Smallest factor of that; 1 = off."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"adapter.guide.interval is {self.interval}; give 0 <= low < high <= 1."
            )
        if not 0 <= self.renorm_min <= 1:
            raise ValueError(f"adapter.guide.renorm_min is {self.renorm_min}; it lies in [0, 1].")


def guided(
    velocity: Tensor,
    without_text: Tensor,
    without_image: Tensor | None,
    *,
    text_scale: float,
    guide: Guidance,
) -> Tensor:
    r"""Combine three velocities of the same state.

    ``g = v_t + a (v_c - v_t)``, ``g <- v_i + b (g - v_i)`` if b > 1, and ``g <- g clip(|v_c| / |g|, r, 1)``;
    ``text_channel`` renormalises before the second term instead. a <= 1 is no guidance at all.

    Source: Bagel, https://arxiv.org/abs/2505.14683. Upstream's ``global`` length runs over the whole
    batch, where samples change each other; here it is each sample's own.

    Args:
        velocity: ``[B, N, C]`` under the whole context, v_c.
        without_text: ``[B, N, C]``, v_t.
        without_image: ``[B, N, C]``, v_i; only used if b > 1.
        text_scale: a.
        guide: the other settings; its interval is the caller's business.

    Returns:
        ``[B, N, C]``.
    """
    if text_scale <= 1:
        return velocity
    mixed = without_text + text_scale * (velocity - without_text)
    if guide.renorm == "text_channel":
        mixed = _shrink(mixed, velocity, (-1,), guide.renorm_min)
    if guide.image_scale > 1 and without_image is not None:
        mixed = without_image + guide.image_scale * (mixed - without_image)
    if guide.renorm == "text_channel":
        return mixed
    axes = (-2, -1) if guide.renorm == "global" else (-1,)
    return _shrink(mixed, velocity, axes, guide.renorm_min)


def _shrink(x: Tensor, like: Tensor, axes: tuple[int, ...], least: float) -> Tensor:
    """Scale x down to the length of another tensor; never up."""
    wanted, length = (v.norm(dim=axes, keepdim=True) for v in (like, x))
    factor: Tensor = (wanted / (length + 1e-8)).clamp(least, 1.0)
    return x * factor
