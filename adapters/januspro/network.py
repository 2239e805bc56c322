"""Janus-Pro's trainable network on flat rows: one Llama for words and for the codes of a picture.

Modules and names are those of ``transformers``' ``JanusForConditionalGeneration``; what is frozen (vision
tower, VQ model) stands beside it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusVisionModel, JanusVQVAE, LlamaModel
from transformers.models.janus.modeling_janus import (
    JanusVisionAlignerMLP,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)

from lightning_unigrpo.adapters.common.attention import Attention
from lightning_unigrpo.adapters.common.decoder import run_decoder, use_flat_rows
from lightning_unigrpo.adapters.common.rotary import Rotary

FLOW_MODULES = ("generation_embeddings", "generation_aligner", "generation_head")
"""What only draws: codes to rows, and rows to codes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """Flat rows: words and marks, then features of pictures that are seen, then codes."""

    token_ids: Tensor
    """``[T]`` int64."""
    features: Tensor
    """``[S, d]`` float32, of the frozen tower and its aligner."""
    codes: Tensor
    """``[K]`` int64."""
    positions: Tensor
    """``[T + S + K]`` int64."""
    logit_rows: Tensor
    """``[R]`` int64 rows whose next word is asked for."""
    image_rows: Tensor
    """``[Mi]`` int64 rows whose next code is asked for."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.positions)


class Generation(nn.Module):
    """The decoder and what turns codes into rows and rows into codes."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        vq: Any = config.vq_config
        # A copy: what flat rows need to know is no setting of the model.
        text: Any = use_flat_rows(deepcopy(cast(Any, config.text_config)))
        decoder: Any = LlamaModel(text)
        decoder.rotary_emb = Rotary(text)
        self.language_model = decoder
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(vq)
        self.generation_head = JanusVQVAEHead(vq)


class JanusProNet(nn.Module):
    """The trainable network; every weight is used through one call.

    Source: Janus-Pro, https://arxiv.org/abs/2501.17811; modules of ``transformers``.

    Args:
        config: sizes; its ``tie_word_embeddings`` is not followed, published heads are untied.
    """

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.model = Generation(config)
        text = self.model.language_model.config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.gradient_checkpointing = False

    def forward(self, pack: Pack, attention: Attention) -> tuple[Tensor, Tensor]:
        """Run rows through the network.

        Args:
            pack: flat rows.
            attention: which sequences they form, and what they see.

        Returns:
            Logits of words ``[R, V]`` and of codes ``[Mi, num_codes]``, float32.
        """
        model, decoder = self.model, self.model.language_model
        words = decoder.embed_tokens(pack.token_ids)
        # Without codes too: ranks that shard weights or reduce gradients do the same on every call.
        codes = model.generation_aligner(model.generation_embeddings(pack.codes))
        hidden = run_decoder(
            decoder,
            torch.cat([words, pack.features.to(words), codes.to(words.dtype)]),
            pack.positions,
            attention,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        logits = self.lm_head(hidden[pack.logit_rows])
        return _wide(logits), _wide(model.generation_head(hidden[pack.image_rows]))


def _wide(x: Tensor) -> Tensor:
    """Leave reduced precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class JanusVision(nn.Module):
    """The frozen tower, and the aligner to the decoder's width."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        vision, tower = cast(Any, config.vision_config), cast(Any, JanusVisionModel)
        self.model = nn.Module()
        self.model.vision_model = tower._from_config(vision)
        self.model.aligner = JanusVisionAlignerMLP(vision)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``[B, n, d]`` features of ``[B, 3, H, W]`` normalised pixels."""
        parts: Any = self.model
        found: Tensor = parts.aligner(parts.vision_model(pixels).last_hidden_state)
        return found


class JanusVQ(nn.Module):
    """The frozen VQ model, of which only the decoder is used."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.vqmodel = cast(Any, JanusVQVAE)._from_config(config.vq_config)

    def forward(self, codes: Tensor) -> Tensor:
        """Return pixels ``[B, 3, H, W]``, about [-1, 1], of codes ``[B, N]``."""
        found: Tensor = cast(Any, self.model).vqmodel.decode(codes)
        return found
