"""Which rows see which: packed for learning, cached for sampling.

Visibility inside one sample (specified by upstream's training mask): a query sees a key that comes
before it or shares its image block, unless the key lies in a noise block that is not the query's own.
Noise blocks are images at sigma > 0: nothing later may see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_unigrpo.adapters.bagel.network import Heads

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.bagel.cache import BagelCache

DENSE_LIMIT = 1 << 24
"""Largest ``B * L * L`` for which a dense mask is built; beyond it attention runs block by block."""


class Kind(IntEnum):
    """How a block sees itself, and whether later blocks see it."""

    CAUSAL = 0
    """Text."""
    FULL = 1
    """A clean image: bidirectional."""
    NOISE = 2
    """An image being denoised: bidirectional and invisible to later blocks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The sequences that flat rows form: B samples, padded to L."""

    rows: Tensor
    """``[B, L]`` int64, the flat row at each place; anything where ``valid`` is False."""
    valid: Tensor
    """``[B, L]`` bool."""
    block: Tensor
    """``[B, L]`` int64, number of the block inside the sample."""
    kind: Tensor
    """``[B, L]`` int64, :class:`Kind` of the block."""

    @classmethod
    def build(
        cls, samples: Sequence[Sequence[tuple[Kind, Sequence[int]]]], device: torch.device
    ) -> Layout:
        """Lay out blocks of flat rows.

        Args:
            samples: per sample its blocks in order, each a kind and its flat rows.
            device: of the tensors.
        """
        lengths = [sum(len(rows) for _, rows in blocks) for blocks in samples]
        table = np.zeros((4, len(samples), max(lengths, default=0)), dtype=np.int64)
        for b, blocks in enumerate(samples):
            at = 0
            for number, (kind, rows) in enumerate(blocks):
                end = at + len(rows)
                table[0, b, at:end] = rows
                table[1, b, at:end] = number
                table[2, b, at:end] = kind
                at = end
            table[3, b, :at] = 1
        places = torch.from_numpy(table).to(device)
        return cls(rows=places[0], valid=places[3].bool(), block=places[1], kind=places[2])

    def visible(self) -> Tensor:
        """Return the dense mask ``[B, L, L]``, True where a query (row) sees a key (column)."""
        length = self.rows.shape[1]
        order = torch.arange(length, device=self.rows.device)
        same = self.block.unsqueeze(2) == self.block.unsqueeze(1)
        together = same & (self.kind != Kind.CAUSAL).unsqueeze(2)
        hidden = (self.kind == Kind.NOISE).unsqueeze(1) & ~same
        mask = ((order.unsqueeze(1) >= order) | together) & ~hidden & self.valid.unsqueeze(1)
        return mask | torch.eye(length, dtype=torch.bool, device=mask.device)  # padding sees itself

    def blocks(self) -> list[list[tuple[Kind, range]]]:
        """Return per sample its blocks as ranges of places."""
        found = []
        for b in range(len(self.rows)):
            number, kind = self.block[b, self.valid[b]].tolist(), self.kind[b].tolist()
            starts = [i for i, n in enumerate(number) if i == 0 or n != number[i - 1]]
            ends = [*starts[1:], len(number)][: len(starts)]
            found.append([(Kind(kind[s]), range(s, e)) for s, e in zip(starts, ends, strict=True)])
        return found


class PackedAttention:
    """Attention of whole samples in one differentiable pass.

    Noise blocks are many and see much, but nothing sees them: so contexts (all other blocks) attend
    among themselves under one mask, and every noise block attends to its context and itself, batched.

    Args:
        layout: the sequences.
        num_rows: flat rows in all.
        detach_context: cut the gradient from a noise block into the keys and values of everything
            outside it, so that the image loss no longer reaches the reasoning.
        dense: build masks; ``None`` decides by :data:`DENSE_LIMIT`.
    """

    def __init__(
        self,
        layout: Layout,
        num_rows: int,
        *,
        detach_context: bool = False,
        dense: bool | None = None,
    ) -> None:
        self.layout, self.detach_context = layout, detach_context
        self.ranges = layout.blocks()
        samples, length = layout.rows.shape
        self.dense = samples * length * length <= DENSE_LIMIT if dense is None else dense
        if self.dense:
            self._split()
            rows = [part.rows[part.valid] for part in (self.context, self.noise)]
            valid = torch.cat([part.valid.flatten() for part in (self.context, self.noise)])
        else:
            rows, valid = [layout.rows[layout.valid]], layout.valid.flatten()
        places = valid.nonzero().squeeze(1)
        self.place = torch.empty(num_rows, dtype=torch.long, device=places.device)
        self.place[torch.cat(rows)] = places

    def _split(self) -> None:
        """Separate the noise blocks from their contexts."""
        rows, device = self.layout.rows.tolist(), self.layout.rows.device
        contexts: list[list[tuple[Kind, list[int]]]] = []
        noise: list[list[tuple[Kind, list[int]]]] = []
        owner, seen = [], []
        for b, blocks in enumerate(self.ranges):
            contexts.append([])
            so_far = 0
            for kind, places in blocks:
                block = (kind, rows[b][places.start : places.stop])
                if kind == Kind.NOISE:
                    noise.append([block])
                    owner.append(b)
                    seen.append(so_far)
                else:
                    contexts[-1].append(block)
                    so_far += len(places)
        self.context, self.noise = Layout.build(contexts, device), Layout.build(noise, device)
        self.owner = torch.tensor(owner, dtype=torch.long, device=device)
        order = torch.arange(self.context.rows.shape[1], device=device)
        past = order < torch.tensor(seen, device=device).unsqueeze(1)
        self.noise_mask = torch.cat([past, self.noise.valid], 1)[:, None, None]  # [Bn, 1, 1, S]
        self.context_mask = self.context.visible().unsqueeze(1)

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        """Return ``[M, H * D]``."""
        if self.dense:
            parts = self._dense(*heads)
        else:
            query, key, value = (x[self.layout.rows].transpose(1, 2) for x in heads)
            parts = [self._by_block(query, _repeat(key, query), _repeat(value, query))]
        flat = [part.transpose(1, 2).flatten(2).flatten(0, 1) for part in parts if part.numel()]
        return torch.cat(flat)[self.place] if flat else heads.query.flatten(1)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the outputs ``[B, H, L, D]`` of contexts and of noise blocks."""
        past = Heads(*(x[self.context.rows].transpose(1, 2) for x in (query, key, value)))
        own = Heads(*(x[self.noise.rows].transpose(1, 2) for x in (query, key, value)))
        out = [_attend(past, self.context_mask)] if past.query.numel() else []
        if own.query.numel():
            seen = [x.detach() if self.detach_context else x for x in past]
            joint = (
                torch.cat([x[self.owner], y], 2) for x, y in zip(seen[1:], own[1:], strict=True)
            )
            out.append(_attend(Heads(own.query, *joint), self.noise_mask))
        return out

    def _by_block(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(query)
        for b, blocks in enumerate(self.ranges):
            seen: list[slice] = []
            for kind, places in blocks:
                here = slice(places.start, places.stop)
                past = [self._context(x[b], seen, kind) for x in (key, value)]
                k, v = (
                    torch.cat([*p, x[b, :, here]], 1)
                    for p, x in zip(past, (key, value), strict=True)
                )
                out[b, :, here] = _one_block(query[b, :, here], k, v, causal=kind == Kind.CAUSAL)
                if kind != Kind.NOISE:
                    seen.append(here)
        return out

    def _context(self, x: Tensor, seen: list[slice], kind: Kind) -> list[Tensor]:
        parts = [x[:, where] for where in seen]
        cut = self.detach_context and kind == Kind.NOISE
        return [part.detach() for part in parts] if cut else parts


def _attend(heads: Heads, mask: Tensor) -> Tensor:
    key, value = (_repeat(x, heads.query) for x in (heads.key, heads.value))
    return scaled_dot_product_attention(heads.query, key, value, attn_mask=mask)


def _one_block(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    mask = None
    if causal:
        size, total = query.shape[1], key.shape[1]
        mask = torch.ones(size, total, dtype=torch.bool, device=query.device).tril(total - size)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _repeat(x: Tensor, query: Tensor) -> Tensor:
    """Give each query head its key head: query head i uses head ``i // (H / H_kv)``."""
    times = query.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


class CachedAttention:
    """New rows of B ragged sequences see their cached context and each other.

    The rows' keys and values are written behind each row's context. They become part of it only when
    the cache's lengths are advanced; a denoising step does not do that.

    Args:
        cache: of B rows; its capacity must hold the new rows.
        layout: the new rows, one block per sample (causal text, or a bidirectional image).
    """

    def __init__(self, cache: BagelCache, layout: Layout) -> None:
        # Weak: the cache keeps this plan, and a cycle would hold its keys until the collector runs.
        self.cache, self.layout = weakref.proxy(cache), layout
        _samples, length = layout.rows.shape
        order = torch.arange(length, device=layout.rows.device)
        lengths = cache.lengths.unsqueeze(1)
        slots = lengths + order
        count = layout.valid.sum(1, keepdim=True)
        reach = torch.where(layout.kind == Kind.CAUSAL, slots + 1, lengths + count)
        self.total = int(slots.max()) + 1 if slots.numel() else 0
        keys = torch.arange(self.total, device=slots.device)
        # At least one visible key, so that the softmax of padding is finite.
        self.mask = (keys < reach.clamp_min(1).unsqueeze(2)).unsqueeze(1)  # [B, 1, Q, S]
        places = layout.valid.flatten().nonzero().squeeze(1)
        self.place = torch.empty_like(places)
        self.place[layout.rows.flatten()[places]] = places
        self.sample, self.slot = places // length, slots.flatten()[places]
        self.flat = layout.rows.flatten()[places]

    def __call__(self, layer: int, heads: Heads) -> Tensor:
        """Return ``[M, H * D]``."""
        if not len(heads.query):
            return heads.query.flatten(1)
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # [B, S, H_kv, D]
        keys[self.sample, self.slot] = heads.key[self.flat].to(keys.dtype)
        values[self.sample, self.slot] = heads.value[self.flat].to(values.dtype)
        query = heads.query[self.layout.rows].transpose(1, 2)
        key, value = (
            _repeat(x[:, : self.total].transpose(1, 2), query).to(query.dtype)
            for x in (keys, values)
        )
        out = scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)[self.place]
