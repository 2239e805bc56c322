"""The autoencoder of Wan 2.1, latents as rows; an image is a video of one frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_unigrpo.types import Grid


class ShowO2VAE(nn.Module):
    """Pixels to latent rows and back; a latent is ``(mean - latents_mean) / latents_std``, float32.

    Args:
        vae: ``AutoencoderKLWan`` of ``diffusers``.
    """

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        config = self.vae.config
        self.channels = int(config["z_dim"])
        self.downsample = 2 ** (len(config["dim_mult"]) - 1)
        self.mean = tuple(float(x) for x in config["latents_mean"])
        self.std = tuple(float(x) for x in config["latents_std"])

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_tensor(self.mean), x.new_tensor(self.std)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Return pixels ``[B, 3, H, W]`` in [-1, 1] for ``[B, N, C]`` row-major latents."""
        mean, std = self._constants(latents.float())
        z = (latents.float() * std + mean).transpose(1, 2).unflatten(2, grid).unsqueeze(2)
        with torch.autocast(z.device.type, enabled=False):
            pixels = self.vae.decode(z.to(self.vae.dtype)).sample
        found: Tensor = pixels.squeeze(2).float()
        return found

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents ``[B, N, C]`` for pixels ``[B, 3, H, W]`` in [-1, 1]: means, nothing drawn."""
        with torch.autocast(pixels.device.type, enabled=False):
            found = self.vae.encode(pixels.unsqueeze(2).to(self.vae.dtype)).latent_dist.mode()
        mean, std = self._constants(found.float())
        rows: Tensor = found.float().squeeze(2).flatten(2).transpose(1, 2)
        return (rows - mean) / std
