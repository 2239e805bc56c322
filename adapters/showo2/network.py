"""Show-o2's trainable network: a Qwen2 and a flow stack on flat rows.

Names of submodules are those of the published checkpoint. One operation serves prefill, decoding,
denoising and training. An image is a block ``[time, squares of latents]`` whose rows see each other and all
before them, in both stacks.

Source: Show-o2, https://arxiv.org/abs/2506.15564; numerics in upstream's ``show-o2/models``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lightning_unigrpo.adapters.common.attention import Attention
from lightning_unigrpo.adapters.common.decoder import run_decoder, use_flat_rows
from lightning_unigrpo.adapters.common.rotary import Rotary
from lightning_unigrpo.adapters.showo2.config import ShowO2Config
from lightning_unigrpo.adapters.showo2.flow import (
    EPS,
    FinalLayer,
    FlowLayer,
    Run,
    TimeEmbedding,
    rotary,
    wide,
)
from lightning_unigrpo.adapters.showo2.semantic import PatchEmbed, SemanticLayers, positions_for
from lightning_unigrpo.types import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """The rows of one forward: words, then images that are seen, then images being drawn.

    An image of ``N`` latents has ``1 + N / patch_size^2`` rows; the first is its time.
    """

    token_ids: Tensor
    """``[Mt]`` int64."""
    latents: Tensor
    """``[Ml, C]`` float32, the images' latents one after another, each row-major over its grid."""
    sigma: Tensor
    """``[I]`` float32 noise levels, 1 = noise, 0 = an image that is seen."""
    grids: Sequence[Grid]
    """Per image."""
    num_seen: int
    """How many images are seen, and want no velocity."""
    positions: Tensor
    """``[M]`` int64, for the rotation, of all rows."""
    logit_rows: Tensor
    """``[R]`` int64, rows whose next-token logits are wanted."""

    @classmethod
    def words(cls, token_ids: Tensor, positions: Tensor, latent_channels: int) -> Pack:
        """Return words ``[M]`` at ``[M]`` that all want logits, and no image."""
        return cls(
            token_ids=token_ids,
            latents=torch.zeros(0, latent_channels, device=token_ids.device),
            sigma=torch.zeros(0, device=token_ids.device),
            grids=(),
            num_seen=0,
            positions=positions,
            logit_rows=torch.arange(len(token_ids), device=token_ids.device),
        )

    def __len__(self) -> int:
        """Return the number of rows M."""
        return len(self.positions)


class LanguageModel(nn.Module):
    """The decoder and its head, which is the embedding where both are tied."""

    def __init__(self, config: ShowO2Config) -> None:
        super().__init__()
        qwen = config.qwen()
        use_flat_rows(qwen)
        self.model = Qwen2Model(qwen)
        self.model.rotary_emb = cast(Any, Rotary(cast(Any, qwen)))
        self.is_tied = bool(qwen.tie_word_embeddings)
        if not self.is_tied:
            self.lm_head = nn.Linear(qwen.hidden_size, qwen.vocab_size, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[R, V]`` for ``[R, d]``."""
        if self.is_tied:
            return linear(hidden, self.model.embed_tokens.weight)
        return cast(Tensor, self.lm_head(hidden))


class ShowO2Net(nn.Module):
    """The trainable network; every weight is used through one call."""

    def __init__(self, config: ShowO2Config, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        flow, semantic = config.flow, config.semantic
        d, width = cast(int, config.language["hidden_size"]), flow.width
        self.showo = LanguageModel(config)
        channels, size = config.latent_channels, config.patch_size
        self.image_embedder_und = PatchEmbed(channels, size, semantic.width)
        self.image_embedder_gen = PatchEmbed(channels, size, d)
        self.position_embedding = nn.Embedding(semantic.side**2, semantic.width)
        self.und_trans = SemanticLayers(semantic)
        self.fusion_proj = nn.Sequential(
            Qwen2RMSNorm(semantic.width + d, EPS),
            nn.Linear(semantic.width + d, d),
            nn.GELU(),
            nn.Linear(d, d),
        )
        self.time_embed = TimeEmbedding(width)
        # Upstream has neither where the widths are equal.
        self.time_embed_proj: nn.Module = nn.Identity()
        self.diff_proj: nn.Module = nn.Identity()
        if width != d:
            self.time_embed_proj = nn.Linear(width, d)
            self.diff_proj = nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, width))
        self.diffusion_head_a = nn.ModuleList(FlowLayer(flow) for _ in range(flow.layers))
        self.diffusion_head_b = FinalLayer(flow, channels * size**2)

    def forward(self, pack: Pack, attention: Attention) -> tuple[Tensor, Tensor]:
        """Run rows through both stacks.

        Args:
            pack: flat rows.
            attention: which sequences they form, and what they see; layers of the flow stack are numbered
                behind those of the language model.

        Returns:
            Logits ``[R, V]`` and velocities (noise - data) ``[Md, C]`` of the images being drawn, float32.
        """
        model = self.showo.model
        words = model.embed_tokens(pack.token_ids)
        runs = self._runs(pack, len(words))
        times = self.time_embed(1 - pack.sigma)  # upstream's time runs towards the data
        hidden = run_decoder(
            model,
            torch.cat([words, *self._embedded(pack, runs, times, words)]),
            pack.positions,
            attention,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        logits = self.showo.logits(hidden[pack.logit_rows])
        d, tables = wide(self.diff_proj(hidden)), rotary(self.config.flow, pack.positions)
        for number, layer in enumerate(self.diffusion_head_a, len(model.layers)):
            d = self._saving(layer, d, times, runs, tables, attention, number)
        return wide(logits), self._velocity(pack, runs, d, times)

    def _saving(self, layer: nn.Module, *args: Any) -> Tensor:
        """Call a layer, which is run again in the backward pass where that is asked for."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, *args, use_reentrant=False))
        return cast(Tensor, layer(*args))

    def _runs(self, pack: Pack, first_row: int) -> list[Run]:
        found: list[Run] = []
        image, row = 0, first_row
        for grid, group in groupby(pack.grids):
            count = len(list(group))
            rows = count * self.config.num_rows(grid)
            found.append(Run(grid, slice(image, image + count), slice(row, row + rows)))
            image, row = image + count, row + rows
        return found

    def _embedded(
        self, pack: Pack, runs: Sequence[Run], times: Tensor, like: Tensor
    ) -> list[Tensor]:
        """Return the rows ``[n (1 + N'), d]`` of each run's images, in the words' dtype."""
        found, first = [], 0
        times = self.time_embed_proj(times)
        for grid, images, _ in runs:
            h, w = grid
            last = first + h * w * (images.stop - images.start)
            latents = pack.latents[first:last].unflatten(0, (-1, h, w)).permute(0, 3, 1, 2)
            rows = self._fused(latents.to(like.dtype), grid)
            time = times[images].unsqueeze(1)
            found.append(torch.cat([time.to(like.dtype), rows.to(like.dtype)], 1).flatten(0, 1))
            first = last
        return found

    def _fused(self, latents: Tensor, grid: Grid) -> Tensor:
        """Return ``[n, N', d]`` for latents ``[n, C, h, w]``."""
        size = self.config.patch_size
        table = positions_for(self.position_embedding.weight, (grid[0] // size, grid[1] // size))
        meaning = self.image_embedder_und(latents)
        meaning = meaning + table.to(meaning.dtype)
        for layer in self.und_trans.layers:
            meaning = self._saving(layer, meaning)
        detail = self.image_embedder_gen(latents)
        joined = torch.cat([meaning, detail.to(meaning.dtype)], -1)
        return cast(Tensor, self.fusion_proj(joined))

    def _velocity(self, pack: Pack, runs: Sequence[Run], d: Tensor, times: Tensor) -> Tensor:
        """Return velocities of the images being drawn.

        The row of square k says the latents ``4k .. 4k + 3`` of the raster, not the four that it reads:
        upstream learned it so.
        """
        found = []
        for _, images, rows in runs:
            part = d[rows].unflatten(0, (images.stop - images.start, -1))
            skip = max(0, pack.num_seen - images.start)
            if skip < len(part):
                # Upstream's is data - noise.
                out = -self.diffusion_head_b(part[skip:, 1:], times[images][skip:])
                found.append(out.reshape(-1, self.config.latent_channels))
        return torch.cat(found) if found else pack.latents[:0]
