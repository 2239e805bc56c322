"""Keys and values of B ragged contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_unigrpo.adapter import Cache
from lightning_unigrpo.types import Grid

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.common.attention import CachedAttention


class Sizes(NamedTuple):
    """Of what a layer remembers of a row."""

    num_layers: int
    num_heads: int
    """Of keys and values."""
    head_dim: int


class RowCache(Cache):
    """Preallocated keys (normalised and rotated) and values per layer, with a length per row.

    Slots behind a row's length are scratch: a denoising step writes its own keys there and leaves the
    length alone. The RoPE counter is not the length: an image takes many slots and one position.

    Args:
        sizes: of keys and values.
        num_rows: B.
        device: of the keys and values.
        dtype: likewise.
        grain: capacity and what attention reads are multiples of it, so that few shapes occur.
    """

    keys: list[Tensor]
    """Per layer ``[B, S, H_kv, D]``."""
    values: list[Tensor]
    """Per layer ``[B, S, H_kv, D]``."""
    lengths: Tensor
    """``[B]`` int64, slots in use."""
    positions: Tensor
    """``[B]`` int64, RoPE position of the next token."""
    open: Tensor
    """``[B]`` int64, how many tokens of an unfinished text have been fed, its begin mark included."""
    longest: int
    """No row is longer; known without asking the device."""
    plans: dict[Grid, tuple[Any, CachedAttention]]
    """Rows and layout of a noise block behind the present contexts, kept between denoising steps."""

    def __init__(
        self,
        sizes: Sizes,
        num_rows: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        grain: int = 1,
    ) -> None:
        shape = (num_rows, 0, sizes.num_heads, sizes.head_dim)
        layers = range(sizes.num_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.positions, self.open = torch.zeros_like(self.lengths), torch.zeros_like(self.lengths)
        self.longest, self.grain, self.plans = 0, grain, {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def select(self, rows: Tensor) -> Self:
        """Return a copy of some rows, scratch left behind."""
        chosen = object.__new__(type(self))
        index = rows.to(self.lengths.device)
        chosen.lengths, chosen.positions = self.lengths[index], self.positions[index]
        chosen.open, chosen.grain, chosen.plans = self.open[index], self.grain, {}
        chosen.longest = int(chosen.lengths.max()) if len(rows) else 0
        used = chosen.reach(0)
        chosen.keys = [x[index, :used] for x in self.keys]
        chosen.values = [x[index, :used] for x in self.values]
        return chosen

    def advance(self, slots: Tensor, positions: Tensor, *, most: int | None = None) -> None:
        """Make the rows just written part of the contexts.

        Args:
            slots: ``[B]`` int64, how many each row has more.
            positions: ``[B]`` int64, how many RoPE positions they take.
            most: no row has more; ``None`` asks the device.
        """
        self.lengths, self.positions = self.lengths + slots, self.positions + positions
        self.longest = int(self.lengths.max()) if most is None else self.longest + most
        self.plans.clear()

    def reach(self, extra: int) -> int:
        """Return how many slots attention reads when each row gets up to ``extra`` more."""
        return -(-(self.longest + extra) // self.grain) * self.grain

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many more slots in every row, and no more than that."""
        self._grow(self.reach(num_tokens))

    def make_room(self, num_tokens: int) -> None:
        """Make room where nobody reserved it: capacity at least doubles, or text would move it each time."""
        needed, capacity = self.reach(num_tokens), self.keys[0].shape[1]
        if needed > capacity:
            self._grow(max(needed, 2 * capacity))

    def _grow(self, capacity: int) -> None:
        more = capacity - self.keys[0].shape[1]
        if more <= 0:
            return
        # Zeros, not garbage: a masked key of NaN would still spoil the product with the values.
        pad = (0, 0, 0, 0, 0, more)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one at a time: two caches may not fit
                tensors[layer] = torch.nn.functional.pad(old, pad)


class DecoderCache(RowCache):
    """Remembers, beside keys and values, what comes next; and may follow a branch for a while.

    Args:
        sizes: of keys and values.
        num_rows: B.
        device: of the keys and values.
        dtype: likewise.
        vocab_size: V.
    """

    logits: Tensor
    """``[B, V]`` float32 of the word behind the last row; 0 behind an empty context."""

    def __init__(
        self,
        sizes: Sizes,
        num_rows: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
    ) -> None:
        super().__init__(sizes, num_rows, device=device, dtype=dtype)
        self.logits = torch.zeros(num_rows, vocab_size, device=device)
        self._fork: tuple[Tensor, Tensor, int] | None = None

    def select(self, rows: Tensor) -> Self:
        """Return a copy of some rows, scratch and branch left behind."""
        self.rewind()
        chosen = super().select(rows)
        chosen.logits, chosen._fork = self.logits[rows.to(self.logits.device)], None
        return chosen

    def branch(self) -> None:
        """Remember this place: what is appended until :meth:`rewind` is of no later segment's context."""
        self.rewind()
        self._fork = (self.lengths, self.positions, self.longest)

    def rewind(self) -> None:
        """Go back to where :meth:`branch` was called, if it was."""
        if self._fork is not None:
            self.lengths, self.positions, self.longest = self._fork
            self._fork = None
            self.plans.clear()
