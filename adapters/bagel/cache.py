"""Keys and values of B ragged contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_unigrpo.adapter import Cache
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.types import Grid

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.bagel.attention import CachedAttention
    from lightning_unigrpo.adapters.bagel.network import Pack


class BagelCache(Cache):
    """Preallocated keys (normalised and rotated) and values per layer, with a length per row.

    Slots behind a row's length are scratch: a denoising step writes its own keys there and leaves the
    length alone. The RoPE counter is not the length: an image takes many slots and one position.
    """

    keys: list[Tensor]
    """Per layer ``[B, S, H_kv, D]``."""
    values: list[Tensor]
    """Per layer ``[B, S, H_kv, D]``."""
    lengths: Tensor
    """``[B]`` int64, slots in use."""
    positions: Tensor
    """``[B]`` int64, RoPE position of the next token."""
    open: list[int]
    """Per row, how many tokens of an unfinished text have been fed, its begin mark included."""
    plans: dict[Grid, tuple[Pack, CachedAttention]]
    """Layouts of a noise block behind the present contexts, kept between denoising steps."""

    def __init__(
        self, config: BagelConfig, num_rows: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_rows, 0, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.lengths)
        self.open = [0] * num_rows
        self.plans = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.open)

    def select(self, rows: Tensor) -> BagelCache:
        """Return a copy of some rows, scratch left behind."""
        chosen = object.__new__(BagelCache)
        index = rows.to(self.lengths.device)
        used = int(self.lengths.max()) if len(self) else 0
        chosen.keys = [x[index, :used] for x in self.keys]
        chosen.values = [x[index, :used] for x in self.values]
        chosen.lengths, chosen.positions = self.lengths[index], self.positions[index]
        chosen.open, chosen.plans = [self.open[i] for i in rows.tolist()], {}
        return chosen

    def advance(self, slots: Tensor, positions: Tensor) -> None:
        """Make the rows just written part of the contexts; both ``[B]`` int64."""
        self.lengths, self.positions = self.lengths + slots, self.positions + positions
        self.plans.clear()

    def reserve(self, extra: int) -> None:
        """Make room for ``extra`` more slots in every row; capacity at least doubles when it grows."""
        needed = int(self.lengths.max()) + extra if len(self) else 0
        capacity = self.keys[0].shape[1]
        if needed <= capacity:
            return
        more = max(needed, 2 * capacity) - capacity
        # Zeros, not garbage: a masked key of NaN would still spoil the product with the values.
        pad = (0, 0, 0, 0, 0, more)
        self.keys = [torch.nn.functional.pad(x, pad) for x in self.keys]
        self.values = [torch.nn.functional.pad(x, pad) for x in self.values]
