"""What Show-o remembers: the context of words, and beside it the one that an image is drawn behind."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_unigrpo.adapters.common.cache import DecoderCache, Sizes
from lightning_unigrpo.adapters.showo.packing import Runs


class ShowOCache(DecoderCache):
    """Keys and values of B contexts, and the words in them, which are laid out anew for an image.

    Args:
        sizes: of keys and values.
        num_rows: B.
        device: of the keys and values.
        dtype: likewise.
        vocab_size: words.
    """

    heard: list[Runs]
    """Per row the words of its context."""
    prefixes: list[Tensor] | None
    """``[P]`` int64 per row, what the next image is drawn behind; ``None`` = not laid out yet."""
    beside: DecoderCache | None
    """Keys and values of the prefixes, made when the first step asks for them."""
    plan: Any
    """Rows and attention of the images being drawn."""

    def __init__(
        self,
        sizes: Sizes,
        num_rows: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
    ) -> None:
        super().__init__(sizes, num_rows, device=device, dtype=dtype, vocab_size=vocab_size)
        self.heard = [[[]] for _ in range(num_rows)]
        self.forget_image()

    def forget_image(self) -> None:
        """Lay words out anew when the next image is drawn."""
        self.prefixes, self.beside, self.plan = None, None, None

    def select(self, rows: Tensor) -> Self:
        """Return a copy of some rows; what was laid out for an image is left behind."""
        chosen = super().select(rows)
        chosen.heard = [deepcopy(self.heard[b]) for b in rows.tolist()]
        chosen.forget_image()
        return chosen
