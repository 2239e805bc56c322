"""The two shallow U-halves around the decoder: noisy latents in, velocities out.

Names of submodules are those of the published checkpoint.

Source: JanusFlow, https://arxiv.org/abs/2411.07975; ConvNeXt V2, https://arxiv.org/abs/2301.00808.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_unigrpo.adapters.janusflow.config import FlowConfig

GRN_EPS = 1e-6
"""Fixed upstream, whatever ``norm_eps`` says."""


class ChannelNorm(LlamaRMSNorm):
    """Root-mean-square norm over the channels of ``[B, C, h, w]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, h, w]``."""
        found: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return found.permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Global response normalisation, channels last.

    ``bias + (weight * n + 1) * u`` with ``n = g / (mean_c(g) + 1e-6)``, ``g`` the L2 norm over the grid.

    Source: ConvNeXt V2, https://arxiv.org/abs/2301.00808.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, size))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, size))

    def forward(self, u: Tensor) -> Tensor:
        """Return ``[B, h, w, C]``."""
        # A sum over the grid: in reduced precision it would lose the small summands.
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        g = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True)
        n = g / (g.mean(-1, keepdim=True) + GRN_EPS)
        found: Tensor = self.bias + (self.weight * n.to(u.dtype) + 1) * u
        return found


class Block(nn.Module):
    """A ConvNeXt block whose result is scaled and shifted by the time embedding, the skip included.

    Args:
        size: channels c.
        cond_size: of the time embedding.
        eps: of the norm.
    """

    def __init__(self, size: int, cond_size: int, eps: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(size, size, 7, padding=3, groups=size)
        self.norm = LlamaRMSNorm(size, eps)
        self.channelwise_linear_1 = nn.Linear(size, 4 * size)
        self.channelwise_norm = ResponseNorm(4 * size)
        self.channelwise_linear_2 = nn.Linear(4 * size, size)
        self.cond_embeds_mapper = nn.Linear(cond_size, 2 * size)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return ``[B, c, h, w]`` for time embeddings ``[B, cond_size]``."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.channelwise_norm(nn.functional.gelu(self.channelwise_linear_1(y)))
        y = self.channelwise_linear_2(y).permute(0, 3, 1, 2) + x
        scale, shift = self.cond_embeds_mapper(nn.functional.silu(e))[:, :, None, None].chunk(2, 1)
        return cast(Tensor, y * (1 + scale) + shift)


class MidBlock(nn.Module):
    """A stack of blocks."""

    def __init__(self, num_blocks: int, size: int, cond_size: int, eps: float) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(Block(size, cond_size, eps) for _ in range(num_blocks))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return ``[B, c, h, w]``."""
        for block in self.res_blocks:
            x = block(x, e)
        return x


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep and an MLP.

    ``[cos(t f), sin(t f)]``, ``f_j = 10000^(-j / half)`` for ``j = 0 .. half - 1``.

    Source: DDPM, https://arxiv.org/abs/2006.11239; no shift of the frequencies, cosines first.
    """

    def __init__(self, size: int, out_size: int) -> None:
        super().__init__()
        self.size = size
        self.linear_1 = nn.Linear(size, out_size)
        self.linear_2 = nn.Linear(out_size, out_size)

    def forward(self, timestep: Tensor) -> Tensor:
        """Return ``[B, out_size]`` for ``[B]`` timesteps, 0 (noise) to 1000 (data), float32 or wider."""
        half = self.size // 2
        steps = torch.arange(half, device=timestep.device, dtype=timestep.dtype)
        angles = timestep.unsqueeze(1) * torch.exp(-math.log(10000) * steps / half)
        features = torch.cat([angles.cos(), angles.sin()], 1).to(self.linear_1.weight.dtype)
        return cast(Tensor, self.linear_2(nn.functional.silu(self.linear_1(features))))


class FlowEncoder(nn.Module):
    """Noisy latents to features of a coarser grid, and the time embedding."""

    def __init__(self, config: FlowConfig, hidden_size: int) -> None:
        super().__init__()
        c = config.encoder_width
        self.time_embed = TimeEmbedding(c, hidden_size)
        self.in_conv = nn.Conv2d(
            config.latent_channels, c, config.kernel_size, config.stride, config.padding
        )
        self.mid_block = MidBlock(config.encoder_blocks, c, hidden_size, config.encoder_eps)

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            latents: ``[B, C, S, S]``.
            timestep: ``[B]`` float32 or wider, 0 (noise) to 1000 (data).

        Returns:
            Features ``[B, c, s, s]``, which are the decoder's skip too, and time embeddings ``[B, H]``.
        """
        e = self.time_embed(timestep)
        x = self.in_conv(latents.to(self.in_conv.weight.dtype))
        return self.mid_block(x, e), e


class OutConv(nn.Module):
    """Norm, a 1 x 1 convolution, and four channels become a square of pixels."""

    def __init__(self, size: int, out_size: int, eps: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(size, eps)
        self.unpatch_conv = nn.Conv2d(size, 4 * out_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, out_size, 2 h, 2 w]``."""
        return nn.functional.pixel_shuffle(self.unpatch_conv(self.norm(x)), 2)


class FlowDecoder(nn.Module):
    """Hidden states of a grid to velocities of the latents."""

    def __init__(self, config: FlowConfig, hidden_size: int) -> None:
        super().__init__()
        d, skip, eps = config.decoder_channels, config.encoder_width, config.decoder_eps
        self.input_norm = ChannelNorm(d, eps)
        self.mid_block = MidBlock(config.decoder_blocks, d + skip, hidden_size, eps)
        sizes = [d + skip, *[skip] * (config.upsamples - 1), config.latent_channels]
        self.out_convs = nn.ModuleList(OutConv(a, b, eps) for a, b in pairwise(sizes))

    def forward(self, hidden: Tensor, skip: Tensor, e: Tensor) -> Tensor:
        """Return upstream's velocity (data - noise) ``[B, C, S, S]``.

        Args:
            hidden: ``[B, d, s, s]``.
            skip: ``[B, c, s, s]``, from the encoder.
            e: ``[B, H]`` time embeddings.
        """
        x = self.mid_block(torch.cat([self.input_norm(hidden), skip], 1), e)
        for out in self.out_convs:
            x = out(x)
        return cast(Tensor, x)
