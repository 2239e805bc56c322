"""Show-o's trainable network: a phi-1.5 on flat rows, one vocabulary for words and codes.

Names of submodules are those of the published checkpoint. One operation serves prefill, decoding, unmasking
and training. An image is a block ``<|soi|> codes <|eoi|>`` whose rows see each other and all before them; a
row of it says its own code, a row of words the next one.

Source: Show-o, https://arxiv.org/abs/2408.12528; numerics in upstream's ``models/modeling_showo.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PhiModel

from lightning_unigrpo.adapters.common.attention import Attention
from lightning_unigrpo.adapters.common.decoder import run_decoder, use_flat_rows
from lightning_unigrpo.adapters.common.rotary import Rotary
from lightning_unigrpo.adapters.showo.config import ShowOConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """The rows of one forward, each an id of the whole vocabulary."""

    token_ids: Tensor
    """``[M]`` int64 words, marks, codes and masks."""
    positions: Tensor
    """``[M]`` int64, for the rotation."""
    logit_rows: Tensor
    """``[R]`` int64 rows whose next word is asked for."""
    image_rows: Tensor
    """``[Mi]`` int64 rows whose own code is asked for."""

    def __len__(self) -> int:
        """Return the number of rows M."""
        return len(self.token_ids)


class Head(nn.Linear):
    """A linear layer of which some outputs are computed."""

    def forward(self, x: Tensor, ids: range) -> Tensor:  # type: ignore[override]
        """Return ``[R, len(ids)]``, the logits of a range of ids, for ``[R, d]``."""
        rows = slice(ids.start, ids.stop)
        return linear(x, self.weight[rows], self.bias[rows])


class LanguageModel(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: ShowOConfig) -> None:
        super().__init__()
        phi = config.phi()
        use_flat_rows(phi)
        self.model = PhiModel(phi)
        self.model.rotary_emb = cast(Any, Rotary(phi))
        self.lm_head = Head(phi.hidden_size, phi.vocab_size)


class ShowONet(nn.Module):
    """The trainable network; every weight is used through one call.

    Args:
        config: sizes.

    Raises:
        ValueError: when the language model drops out.
    """

    def __init__(self, config: ShowOConfig) -> None:
        super().__init__()
        self.config = config
        self.showo = LanguageModel(config)
        self.gradient_checkpointing = False

    def forward(self, pack: Pack, attention: Attention) -> tuple[Tensor, Tensor]:
        """Run rows through the network.

        Args:
            pack: flat rows.
            attention: which sequences they form, and what they see.

        Returns:
            Logits of words ``[R, num_words]`` and of codes ``[Mi, codebook_size]``, float32.
        """
        model, config = self.showo.model, self.config
        hidden = run_decoder(
            model,
            cast(Tensor, model.embed_tokens(pack.token_ids)),
            pack.positions,
            attention,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        # Without rows of a sort too: ranks that shard weights do the same on every call.
        words = self.showo.lm_head(hidden[pack.logit_rows], range(config.num_words))
        codes = range(config.code_offset, config.mask_id)
        return _wide(words), _wide(self.showo.lm_head(hidden[pack.image_rows], codes))


def _wide(x: Tensor) -> Tensor:
    """Leave reduced precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
