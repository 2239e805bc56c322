"""How Bagel looks at a picture: a SigLIP tower over patches of any grid, and the bridge behind it.

Names of submodules are those of the published checkpoint. The tower is frozen and has no strategy's
wrapping: it runs once per picture, and its rows enter the packed pass as given embeddings.

Source: Bagel, https://arxiv.org/abs/2505.14683; SigLIP, https://arxiv.org/abs/2303.15343.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from lightning_unigrpo.adapters.bagel.config import VisionConfig
from lightning_unigrpo.adapters.bagel.network import PositionTable
from lightning_unigrpo.adapters.bagel.packing import position_ids


class SiglipAttention(nn.Module):
    """Full attention inside one picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, d]``."""
        query, key, value = (
            project(x).unflatten(1, (self.num_heads, -1)).transpose(0, 1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(query, key, value)
        return cast(Tensor, self.out_proj(mixed.transpose(0, 1).flatten(1)))


class SiglipMLP(nn.Module):
    """``fc2(gelu(fc1(x)))``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, d]``."""
        return cast(Tensor, self.fc2(gelu(self.fc1(x), approximate="tanh")))


class SiglipLayer(nn.Module):
    """Attention and MLP, normalised before."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn, self.mlp = SiglipAttention(config), SiglipMLP(config)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, d]``."""
        x = x + self.self_attn(self.layer_norm1(x))
        return cast(Tensor, x + self.mlp(self.layer_norm2(x)))


class SiglipEmbeddings(nn.Module):
    """A linear layer over flat patches, and a learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.patch_embedding = nn.Linear(config.patch_channels, d)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, d)

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Return ``[N, d]`` for patches ``[N, p * p * channels]`` at table rows ``[N]``."""
        return cast(Tensor, self.patch_embedding(patches) + self.position_embedding(ids))


class SiglipEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_hidden_layers))


class SiglipTower(nn.Module):
    """Patches to features, without a pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings, self.encoder = SiglipEmbeddings(config), SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Return ``[N, d]`` of one picture."""
        x = self.embeddings(patches, ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return cast(Tensor, self.post_layernorm(x))


class Connector(nn.Module):
    """Features to rows of the language model."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, d]``."""
        return cast(Tensor, self.fc2(gelu(self.fc1(x), approximate="tanh")))


class BagelVision(nn.Module):
    """Tower, connector and table of positions.

    Args:
        config: of the tower.
        hidden_size: d of the language model.
    """

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.vit_model = nn.ModuleDict({"vision_model": SiglipTower(config)})
        self.connector = Connector(config.hidden_size, hidden_size)
        self.vit_pos_embed = PositionTable(config.max_patches_per_side, hidden_size)

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return rows ``[N, d]`` per picture ``[channels, H, W]`` in [-1, 1], sides multiples of a patch."""
        p = self.config.patch_size
        found = []
        for image in images:
            grid = image.shape[1] // p, image.shape[2] // p
            ids = position_ids(grid, self.config.max_patches_per_side).to(image.device)
            found.append(self.rows(patchify(image, p), ids))
        return found

    def rows(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Return ``[N, d]`` for the patches ``[N, p * p * channels]`` of one picture."""
        weight = self.connector.fc1.weight
        features = self.vit_model["vision_model"](patches.to(weight.dtype), ids)
        return cast(Tensor, self.connector(features) + self.vit_pos_embed.pos_embed[ids])


def patchify(x: Tensor, side: int) -> Tensor:
    """Cut ``[*, C, H, W]`` into cells, ``[*, h * w, side * side * C]``, channel fastest; crops the rest.

    Example:
        >>> import torch
        >>> patchify(torch.arange(8).view(2, 2, 2), 2)
        tensor([[0, 4, 1, 5, 2, 6, 3, 7]])
    """
    h, w = x.shape[-2] // side, x.shape[-1] // side
    cells = x[..., : h * side, : w * side].unflatten(-2, (h, side)).unflatten(-1, (w, side))
    tokens: Tensor = cells.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)
    return tokens


def unpatchify(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Undo :func:`patchify`: ``[*, h * w, side * side * C]`` to ``[*, C, h * side, w * side]``.

    Example:
        >>> import torch
        >>> unpatchify(torch.tensor([[0, 4, 1, 5, 2, 6, 3, 7]]), (1, 1), 2).tolist()
        [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    """
    cells = tokens.unflatten(-2, grid).unflatten(-1, (side, side, -1))
    images: Tensor = cells.transpose(-4, -3).movedim(-1, -5).flatten(-2).flatten(-3, -2)
    return images
