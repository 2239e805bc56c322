"""Pixels before they become latents or patches: sizes that fit the tables, and the resizing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import interpolate

from lightning_unigrpo.adapters.bagel.config import BagelConfig, VisionConfig


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Bring an image to sides that are multiples of a stride, its aspect kept as well as that allows.

    Source: upstream's ``data/transforms.py``, by ``specs``' description; sizes in pixels.
    """

    stride: int
    min_size: int
    """Shorter side at least, where the longer one then still fits."""
    max_size: int
    """Longer side at most."""
    max_pixels: int = 14 * 14 * 9 * 1024

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Return the new height and width.

        Example:
            >>> Resize(stride=16, min_size=512, max_size=1024).fit(300, 500)
            (512, 848)
        """
        scale = min(self.max_size / max(height, width), 1.0)
        scale = max(scale, self.min_size / min(height, width))
        height, width = self._round(height, width, scale)
        if height * width > self.max_pixels:
            height, width = self._round(height, width, self.max_pixels / (height * width))
        if max(height, width) > self.max_size:
            height, width = self._round(height, width, self.max_size / max(height, width))
        return height, width

    def _round(self, height: int, width: int, scale: float) -> tuple[int, int]:
        sides = (round(side * scale / self.stride) * self.stride for side in (height, width))
        height, width = (max(self.stride, side) for side in sides)
        return height, width

    def __call__(self, pixels: Tensor) -> Tensor:
        """Resize ``[3, H, W]`` in [0, 1], bicubic with antialiasing."""
        size = self.fit(*pixels.shape[1:])
        if size == tuple(pixels.shape[1:]):
            return pixels
        found = interpolate(pixels.unsqueeze(0), size, mode="bicubic", antialias=True)
        return found.squeeze(0).clamp(0, 1)


def latent_resize(config: BagelConfig) -> Resize:
    """Return the rule for the autoencoder's input; 512 to 1024 pixels in steps of 16 in the release."""
    largest = config.pixels_per_token * config.max_latent_size
    return Resize(stride=config.pixels_per_token, min_size=largest // 2, max_size=largest)


def patch_resize(config: VisionConfig) -> Resize:
    """Return the rule for the tower's input; 224 to 980 pixels in steps of 14 in the release."""
    side, p = config.max_patches_per_side, config.patch_size
    return Resize(stride=p, min_size=p * min(16, max(1, side // 4)), max_size=p * side)
