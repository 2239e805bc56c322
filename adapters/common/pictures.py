"""Pixels as the vision towers of the Janus family want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


@dataclass(frozen=True, kw_only=True)
class PictureProcessor:
    """Values of ``preprocessor_config.json``; defaults are those of ``transformers``."""

    rounding: Literal["down", "nearest"] = "nearest"
    """Of the shorter side: upstream rounds down, ``transformers`` to the nearest."""
    size: int = 384
    min_size: int = 14
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_upstream(
        cls,
        found: Mapping[str, Any],
        size: int,
        *,
        rounding: Literal["down", "nearest"] = "nearest",
    ) -> PictureProcessor:
        """Read ``preprocessor_config.json``, of either layout.

        Args:
            found: its object.
            size: what the tower reads.
            rounding: of the shorter side.

        Raises:
            ValueError: when its pictures do not fit the tower.
        """
        given = found.get("image_size") or (found.get("size") or {}).get("height") or size
        if int(given) != size:
            raise ValueError(
                f"preprocessor_config.json makes pictures of {given} pixels, but the vision tower in "
                f"config.json reads {size}; make them equal."
            )
        fields: dict[str, Any] = {
            name: tuple(found[f"image_{name}"])
            for name in ("mean", "std")
            if found.get(f"image_{name}") is not None
        }
        least = int(found.get("min_size", cls.min_size))
        return cls(size=size, min_size=least, rounding=rounding, **fields)

    def to_upstream(self) -> dict[str, Any]:
        """Return the fields of ``preprocessor_config.json`` as ``transformers`` reads them."""
        return {
            "image_processor_type": "JanusImageProcessor",
            "size": {"height": self.size, "width": self.size},
            "min_size": self.min_size,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, pixels: Tensor) -> Tensor:
        """Bring the longer side to ``size``, pad to a square with the mean colour, and normalise.

        Args:
            pixels: ``[3, H, W]`` float32 in [0, 1].

        Returns:
            ``[3, size, size]`` float32.
        """
        h, w = (self._scaled(side, max(pixels.shape[1:])) for side in pixels.shape[1:])
        if (h, w) != tuple(pixels.shape[1:]):
            small = interpolate(pixels.unsqueeze(0), (h, w), mode="bicubic", antialias=True)
            pixels = small.squeeze(0).clamp(0, 1)
        mean, std = (
            torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (self.mean, self.std)
        )
        colour = (mean * 255).floor() / 255  # upstream pads with whole levels of 255
        top, left = (self.size - h) // 2, (self.size - w) // 2
        around = (left, self.size - w - left, top, self.size - h - top)
        return (pad(pixels - colour, around) + colour - mean) / std

    def _scaled(self, side: int, longest: int) -> int:
        if self.rounding == "down":
            return max(int(side / longest * self.size), self.min_size)
        return max(round(side * (self.size / longest)), self.min_size)
