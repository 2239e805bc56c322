"""Keys and values of both stacks, side by side."""

from __future__ import annotations

import torch

from lightning_unigrpo.adapters.common.cache import DecoderCache, RowCache, Sizes


class ShowO2Cache(DecoderCache):
    """Remembers layers of the language model and, numbered behind them, of the flow stack.

    Both stacks see the same rows, so lengths and positions are shared; heads differ in number and size.

    Args:
        language: what a row is in the language model.
        flow: what it is in the flow stack.
        num_rows: B.
        device: of the keys and values.
        dtype: likewise.
        vocab_size: V.
    """

    def __init__(
        self,
        language: Sizes,
        flow: Sizes,
        num_rows: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
    ) -> None:
        super().__init__(language, num_rows, device=device, dtype=dtype, vocab_size=vocab_size)
        beside = RowCache(flow, num_rows, device=device, dtype=dtype)
        self.keys += beside.keys
        self.values += beside.values
