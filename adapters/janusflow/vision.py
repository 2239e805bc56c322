"""How JanusFlow looks at a picture: a SigLIP tower in timm's layout, and the bridge behind it.

Names of submodules are those of the published checkpoint. The tower is frozen and has no strategy's
wrapping: it runs once per picture, and its rows enter the packed pass as given embeddings.

Source: JanusFlow, https://arxiv.org/abs/2411.07975; SigLIP, https://arxiv.org/abs/2303.15343.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_unigrpo.adapters.janusflow.config import VisionConfig

LAYER_NORM_EPS = 1e-6
"""Of every norm of the tower."""
DROPPED = "vision_und_enc_model.vision_tower.attn_pool."
"""Tensors of the file that upstream loads and never runs."""


class Attention(nn.Module):
    """Full attention; queries, keys and values from one projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]``."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.proj(found.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]``."""
        return cast(Tensor, self.fc2(nn.functional.gelu(self.fc1(x))))


class Block(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, LAYER_NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]``."""
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A convolution over patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]``, row-major."""
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """The transformer over patches, without a class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.width))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width, LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]`` for ``[B, 3, S, S]``."""
        return cast(Tensor, self.norm(self.blocks(self.patch_embed(x) + self.pos_embed)))


class JanusFlowVision(nn.Module):
    """The tower, its bridge, and the embedding that stands for the begin mark of a picture.

    Args:
        config: sizes.
        hidden_size: of the language model.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.vision_und_enc_model = nn.ModuleDict({"vision_tower": Tower(config)})
        self.vision_und_enc_aligner = nn.Linear(config.width, hidden_size)
        self.beg_of_und_embed = nn.Parameter(torch.zeros(1, hidden_size))

    def features(self, pixels: Tensor) -> Tensor:
        """Return ``[B, N, W]`` for normalised pixels ``[B, 3, S, S]``."""
        return cast(Tensor, self.vision_und_enc_model["vision_tower"](pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the rows ``[B, 1 + N, d]`` of pictures: the begin mark and the patches."""
        rows = self.vision_und_enc_aligner(self.features(pixels))
        mark = self.beg_of_und_embed.to(rows.dtype).expand(len(rows), 1, -1)
        return torch.cat([mark, rows], 1)
