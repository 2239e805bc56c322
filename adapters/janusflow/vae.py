"""The autoencoder of SDXL, latents as rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_unigrpo.types import Grid


class JanusFlowVAE(nn.Module):
    """Latent rows to pixels; latents are the autoencoder's times its scaling factor, float32.

    Args:
        vae: ``AutoencoderKL`` of ``diffusers``, with ``scaling_factor`` and without ``shift_factor``.

    Raises:
        ValueError: when latents are shifted: this is another model's autoencoder.
    """

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        config = self.vae.config
        if config.get("shift_factor"):
            raise ValueError(
                f"adapter.vae has shift_factor {config['shift_factor']}; JanusFlow draws with SDXL's "
                "autoencoder, which has none: give stabilityai/sdxl-vae, or a folder with its files."
            )
        self.scale = float(config["scaling_factor"])
        self.channels = int(config["latent_channels"])
        self.downsample = 2 ** (len(config["block_out_channels"]) - 1)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Return pixels ``[B, 3, H, W]`` in about [-1, 1] for ``[B, N, C]`` row-major latents."""
        z = latents.float().transpose(1, 2).unflatten(2, grid) / self.scale
        # Half precision overflows in it.
        with torch.autocast(z.device.type, enabled=False):
            pixels: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return pixels.float()
