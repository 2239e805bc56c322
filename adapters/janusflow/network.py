"""JanusFlow's trainable network: a Llama on flat rows, between a flow encoder and a flow decoder.

Names of submodules are those of the published checkpoint. One operation serves prefill, decoding,
denoising and training. An image being drawn is a block ``[time embedding, latents]`` whose rows see those
before them, as words do.

Source: JanusFlow, https://arxiv.org/abs/2411.07975; numerics in upstream's ``janus/janusflow``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_unigrpo.adapters.common.attention import Attention
from lightning_unigrpo.adapters.common.decoder import run_decoder, use_flat_rows
from lightning_unigrpo.adapters.common.rotary import Rotary
from lightning_unigrpo.adapters.janusflow.config import JanusFlowConfig
from lightning_unigrpo.adapters.janusflow.flow import FlowDecoder, FlowEncoder
from lightning_unigrpo.types import Grid

TIMESTEPS = 1000
"""The time embedding counts from 0 (noise) to this (data)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """The rows of one forward: words, then rows of pictures that are seen, then images being drawn.

    An image of ``N`` latents has ``1 + N / stride^2`` rows; the first is its time embedding.
    """

    token_ids: Tensor
    """``[Mt]`` int64."""
    seen: Tensor | None
    """``[Ms, d]`` rows given as embeddings, or None."""
    latents: Tensor
    """``[Ml, C]`` float32, the images' latents one after another, each row-major over its grid."""
    sigma: Tensor
    """``[I]`` float32 noise levels, 1 = noise."""
    grids: Sequence[Grid]
    """Per image."""
    positions: Tensor
    """``[M]`` int64, for the rotation, of all rows."""
    logit_rows: Tensor
    """``[R]`` int64, rows whose next-token logits are wanted."""

    @classmethod
    def words(cls, token_ids: Tensor, positions: Tensor, latent_channels: int) -> Pack:
        """Return words ``[M]`` at ``[M]`` that all want logits, and no image."""
        return cls(
            token_ids=token_ids,
            seen=None,
            latents=torch.zeros(0, latent_channels, device=token_ids.device),
            sigma=torch.zeros(0, device=token_ids.device),
            grids=(),
            positions=positions,
            logit_rows=torch.arange(len(token_ids), device=token_ids.device),
        )

    def __len__(self) -> int:
        """Return the number of rows M."""
        return len(self.positions)


class LanguageModel(nn.Module):
    """The decoder and its head; not tied."""

    def __init__(self, config: JanusFlowConfig) -> None:
        super().__init__()
        llama = config.llama()
        use_flat_rows(llama)
        self.model = LlamaModel(llama)
        self.model.rotary_emb = cast(Any, Rotary(llama))
        self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)


class JanusFlowNet(nn.Module):
    """The trainable network; every weight is used through one call.

    Raises:
        ValueError: when the head is tied to the embedding, or attention drops out.
    """

    def __init__(self, config: JanusFlowConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        llama = config.llama()
        if llama.tie_word_embeddings:
            raise ValueError(
                "config.json: language_config.tie_word_embeddings is true; only false is supported."
            )
        d, flow = llama.hidden_size, config.flow
        self.language_model = LanguageModel(config)
        self.vision_gen_enc_model = FlowEncoder(flow, d)
        self.vision_gen_enc_aligner = nn.Linear(flow.encoder_width, d)
        self.vision_gen_dec_aligner_norm = LlamaRMSNorm(d, llama.rms_norm_eps)
        self.vision_gen_dec_aligner = nn.Linear(d, flow.decoder_channels)
        self.vision_gen_dec_model = FlowDecoder(flow, d)

    def forward(self, pack: Pack, attention: Attention) -> tuple[Tensor, Tensor]:
        """Run rows through the network.

        Args:
            pack: flat rows.
            attention: which sequences they form, and what they see.

        Returns:
            Logits ``[R, V]`` and velocities (noise - data) ``[Ml, C]``, float32.
        """
        model = self.language_model.model
        rows = [model.embed_tokens(pack.token_ids)]
        if pack.seen is not None:
            rows.append(pack.seen.to(rows[0]))
        first = len(rows[0]) + (0 if pack.seen is None else len(pack.seen))
        images = _Images(pack)
        encoded = {grid: self._encode(*images.inputs(grid)) for grid in images.of_grid}
        rows += images.in_order({grid: list(part[0]) for grid, part in encoded.items()})
        hidden = run_decoder(
            model,
            torch.cat([part.to(rows[0]) for part in rows]),
            pack.positions,
            attention,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        drawn = hidden[first:].split([self.config.num_rows(grid) for grid in pack.grids])
        velocity = {
            grid: list(self._decode(torch.stack([drawn[i] for i in images.of_grid[grid]]), *part))
            for grid, part in encoded.items()
        }
        logits = self.language_model.lm_head(hidden[pack.logit_rows])
        found = images.in_order(velocity)
        return _wide(logits), _wide(torch.cat(found)) if found else pack.latents

    def _encode(self, latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows ``[n, 1 + N', d]``, the skip and time embeddings for latents ``[n, C, h, w]``."""
        skip, e = self.vision_gen_enc_model(latents, TIMESTEPS * (1 - sigma))
        rows = self.vision_gen_enc_aligner(skip.flatten(2).transpose(1, 2))
        return torch.cat([e.unsqueeze(1).to(rows.dtype), rows], 1), skip, e

    def _decode(self, hidden: Tensor, _rows: Tensor, skip: Tensor, e: Tensor) -> Tensor:
        """Return velocities ``[n, N, C]`` for hidden states ``[n, 1 + N', d]``, the first unread."""
        hidden = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(hidden[:, 1:]))
        hidden = hidden.transpose(1, 2).unflatten(2, skip.shape[2:])
        # Upstream's is data - noise.
        velocity: Tensor = -self.vision_gen_dec_model(hidden, skip, e)
        return velocity.flatten(2).transpose(1, 2)


class _Images:
    """The images of a pack: those of one grid run together, and come back in the pack's order."""

    def __init__(self, pack: Pack) -> None:
        self.sigma, self.of_grid = pack.sigma, dict[Grid, list[int]]()
        self.latents = pack.latents.split([h * w for h, w in pack.grids])
        for i, grid in enumerate(pack.grids):
            self.of_grid.setdefault(grid, []).append(i)

    def inputs(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return latents ``[n, C, h, w]`` and noise levels ``[n]`` of a grid."""
        images = self.of_grid[grid]
        latents = torch.stack([self.latents[i] for i in images])
        sigma = self.sigma if len(images) == len(self.sigma) else self.sigma[images]
        return latents.transpose(1, 2).unflatten(2, grid), sigma

    def in_order(self, parts: dict[Grid, list[Tensor]]) -> list[Tensor]:
        """Return one tensor per image, from those of each grid."""
        found = {
            i: x
            for grid, part in parts.items()
            for i, x in zip(self.of_grid[grid], part, strict=True)
        }
        return [found[i] for i in range(len(self.sigma))]


def _wide(x: Tensor) -> Tensor:
    """Leave reduced precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
