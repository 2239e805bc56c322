"""What Show-o2 makes of an image before its language model: two embeddings of latents, fused.

Names of submodules are those of the published checkpoint. Clean and noisy images take the same way.

Source: Show-o2, https://arxiv.org/abs/2506.15564; SigLIP, https://arxiv.org/abs/2303.15343.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from lightning_unigrpo.adapters.showo2.config import SemanticConfig
from lightning_unigrpo.types import Grid


class PatchEmbed(nn.Module):
    """A convolution over squares of latents."""

    def __init__(self, channels: int, size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, N', W]``, row-major, for latents ``[n, C, h, w]``."""
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Full attention with biases."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, N', W]``."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.out_proj(found.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around a GELU by tanh."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, N', W]``."""
        return cast(Tensor, self.fc2(gelu(self.fc1(x), approximate="tanh")))


class SemanticLayer(nn.Module):
    """A pre-norm residual block of SigLIP."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, N', W]``."""
        x = x + self.self_attn(self.layer_norm1(x))
        return cast(Tensor, x + self.mlp(self.layer_norm2(x)))


class SemanticLayers(nn.Module):
    """The layers alone: no norm behind them, no pooling."""

    def __init__(self, config: SemanticConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SemanticLayer(config) for _ in range(config.layers))


def positions_for(table: Tensor, grid: Grid) -> Tensor:
    """Return the embeddings of positions ``[h * w, W]`` on a grid.

    The table of ``[G * G, W]`` itself on its own grid, else interpolated (bicubic, corners not aligned, no
    antialiasing), in float32.
    """
    side = round(len(table) ** 0.5)
    if grid == (side, side):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    wide = wide.unflatten(0, (1, side, side)).permute(0, 3, 1, 2)
    found = interpolate(wide, grid, mode="bicubic", align_corners=False)
    return found.flatten(2).squeeze(0).T.to(table.dtype)
