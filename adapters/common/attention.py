"""Which rows see which: packed for learning, cached for sampling.

Everything but attention runs on flat rows without padding; an attention object knows which sequences they
form. Visibility inside one sample: a query sees a key that comes before it, or that shares its image block
where that is bidirectional, unless the key lies in a noise block that is not the query's own. Noise blocks
are images at sigma > 0: nothing later may see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.common.cache import RowCache


class Heads(NamedTuple):
    """Queries ``[M, H, D]``, keys and values ``[M, H_kv, D]`` of flat rows."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attention(Protocol):
    """How flat rows see each other."""

    def __call__(self, layer: int, heads: Heads, sizes: list[int]) -> list[Tensor]:
        """Return ``[M_e, H * D]`` per expert, ``sizes`` of the rows; a dense model has one expert.

        None is a view of another: a compiled function would tell them from tensors of their own.
        """


DENSE_LIMIT = 1 << 24
"""Largest ``B * L * L`` for which a dense mask is built; beyond it attention runs block by block."""


TILE = 128
"""Rows of noise blocks that attend in one call under a mask: what a flash kernel reads at once."""


class Kind(IntEnum):
    """How a block sees itself, and whether later blocks see it."""

    CAUSAL = 0
    """Text."""
    FULL = 1
    """A clean image: bidirectional."""
    NOISE = 2
    """An image being denoised: bidirectional and invisible to later blocks."""
    CAUSAL_NOISE = 3
    """An image being denoised whose rows see those before them; invisible to later blocks."""


CAUSAL = (Kind.CAUSAL, Kind.CAUSAL_NOISE)
"""Kinds whose rows see those before them only."""
HIDDEN = (Kind.NOISE, Kind.CAUSAL_NOISE)
"""Kinds that no later block sees."""


Block = tuple[Kind, list[int]]
"""Neighbours in a sequence, as flat rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The sequences that flat rows form: B samples, padded to L; samples may share whole blocks."""

    samples: Sequence[Sequence[Block]]
    """Per sample its blocks in order."""
    rows: Tensor
    """``[B, L]`` int64, the flat row at each place; anything where ``valid`` is False."""
    valid: Tensor
    """``[B, L]`` bool."""
    block: Tensor
    """``[B, L]`` int64, number of the block inside the sample."""
    kind: Tensor
    """``[B, L]`` int64, :class:`Kind` of the block."""

    @classmethod
    def build(cls, samples: Sequence[Sequence[Block]], device: torch.device) -> Layout:
        """Lay out blocks of flat rows.

        Args:
            samples: per sample its blocks in order, each a kind and its flat rows.
            device: of the tensors.
        """
        lengths = [sum(len(rows) for _, rows in blocks) for blocks in samples]
        table = np.zeros((4, len(samples), max(lengths, default=0)), dtype=np.int64)
        each = [(n, kind, len(rows)) for blocks in samples for n, (kind, rows) in enumerate(blocks)]
        numbers, kinds, sizes = np.array(each, dtype=np.int64).reshape(-1, 3).T
        flat = chain.from_iterable(rows for blocks in samples for _, rows in blocks)
        valid = np.arange(table.shape[2]) < np.array(lengths, dtype=np.int64)[:, None]
        table[0, valid] = np.fromiter(flat, dtype=np.int64)
        table[1, valid], table[2, valid] = np.repeat(numbers, sizes), np.repeat(kinds, sizes)
        table[3] = valid
        places = torch.from_numpy(table).to(device)
        return cls(
            samples=samples,
            rows=places[0],
            valid=places[3].bool(),
            block=places[1],
            kind=places[2],
        )

    def visible(self) -> Tensor:
        """Return the dense mask ``[B, L, L]``, True where a query (row) sees a key (column)."""
        length = self.rows.shape[1]
        order = torch.arange(length, device=self.rows.device)
        same = self.block.unsqueeze(2) == self.block.unsqueeze(1)
        together = same & ~_is(self.kind, CAUSAL).unsqueeze(2)
        hidden = _is(self.kind, HIDDEN).unsqueeze(1) & ~same
        mask = ((order.unsqueeze(1) >= order) | together) & ~hidden & self.valid.unsqueeze(1)
        return mask | torch.eye(length, dtype=torch.bool, device=mask.device)  # padding sees itself


def _is(kind: Tensor, known: Sequence[Kind]) -> Tensor:
    """Return where a kind is one of some, bool."""
    first, second = map(int, known)  # torch 2.13's FlexAttention loses comparisons with an IntEnum
    return (kind == first) | (kind == second)


class Mask:
    """A mask in the form that attention adds, made once: torch would make and keep one per layer.

    Args:
        visible: ``[B, 1, Q, S]`` bool, True where a query sees a key.
    """

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self._added: Tensor | None = None

    def __call__(self, query: Tensor) -> Tensor:
        """Return 0 and -inf ``[B, 1, Q, S]`` in the dtype that attention will run in."""
        kind, dtype = query.device.type, query.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if self._added is None or self._added.dtype != dtype:
            zeros = torch.zeros(self.visible.shape, dtype=dtype, device=query.device)
            self._added = zeros.masked_fill_(~self.visible, -torch.inf)
        return self._added


class PackedAttention:
    """Attention of whole samples in one differentiable pass.

    Noise blocks are many and see much, but nothing sees them: so contexts (all other blocks) attend
    among themselves under one mask, and noise blocks attend to their context and themselves, batched.

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
        samples, length = layout.rows.shape
        self.dense = samples * length * length <= DENSE_LIMIT if dense is None else dense
        if self.dense:
            self._split(num_rows)
        parts = [self.context, self.noise] if self.dense else [layout]
        rows = torch.cat([part.rows.flatten() for part in parts]).cpu().numpy()
        places = torch.cat([part.valid.flatten() for part in parts]).cpu().numpy().nonzero()[0]
        place = np.zeros(num_rows, dtype=np.int64)
        place[rows[places]] = places  # of a shared row, whichever: all its places hold the same
        self.place = torch.from_numpy(place).to(layout.rows.device)

    def _split(self, num_rows: int) -> None:
        """Separate the noise blocks from their contexts; small neighbours go together."""
        device = self.layout.rows.device
        contexts: dict[tuple[int, ...], tuple[int, list[Block]]] = {}
        noise: list[list[Block]] = []
        owner: list[int] = []
        seen: list[int] = []
        for blocks in self.layout.samples:
            context: list[Block] = []
            so_far = room = 0
            for kind, rows in blocks:
                if kind not in HIDDEN:
                    context.append((kind, rows))
                    so_far, room = so_far + len(rows), 0
                    continue
                if len(rows) > room:
                    noise.append([])
                    seen.append(so_far)
                    room = TILE
                noise[-1].append((kind, rows))
                room -= len(rows)
            begins = tuple(rows[0] for _, rows in context)  # rows have one block: equal for equals
            number, _ = contexts.setdefault(begins, (len(contexts), context))
            owner += [number] * (len(noise) - len(owner))
        self.context = Layout.build([context for _, context in contexts.values()], device)
        self.noise = Layout.build(noise, device)
        self.context_mask = Mask(self.context.visible().unsqueeze(1))
        order = torch.arange(self.context.rows.shape[1], device=device)
        past = order < torch.tensor(seen, device=device).unsqueeze(1)
        own = self.noise.visible()
        past = past.unsqueeze(1).expand(-1, own.shape[1], -1)
        self.noise_mask = Mask(torch.cat([past, own], 2).unsqueeze(1))  # [U, 1, Q, S]
        outside = self.context.rows[torch.tensor(owner, dtype=torch.long, device=device)]
        inside = self.noise.rows + (num_rows if self.detach_context else 0)
        self.noise_keys = torch.cat([outside, inside], 1)  # [U, S]

    def __call__(self, layer: int, heads: Heads, sizes: list[int]) -> list[Tensor]:
        """Return ``[M_e, H * D]`` per expert."""
        if self.dense:
            parts = self._dense(*heads)
        else:
            parts = [self._by_block(*(x[self.layout.rows].transpose(1, 2) for x in heads))]
        flat = [part.transpose(1, 2).flatten(2).flatten(0, 1) for part in parts if part.numel()]
        return _rows(torch.cat(flat), self.place, sizes) if flat else [heads.query.flatten(1)]

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the outputs ``[B, H, L, D]`` of contexts and of noise blocks."""
        out = []
        if self.context.rows.numel():
            rows = self.context.rows
            q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))
            out.append(_attend(q, k, v, self.context_mask(q)))
        if self.noise.rows.numel():
            if self.detach_context:  # rows M to 2M keep their gradient: a noise block's own
                key, value = (torch.cat([x.detach(), x]) for x in (key, value))
            keys = self.noise_keys
            q, k, v = (x.transpose(1, 2) for x in (query[self.noise.rows], key[keys], value[keys]))
            out.append(_attend(q, k, v, self.noise_mask(q)))
        return out

    def _by_block(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(query)
        for b, blocks in enumerate(self.layout.samples):
            seen: list[slice] = []
            at = 0
            for kind, rows in blocks:
                here = slice(at, at + len(rows))
                at += len(rows)
                past = [self._context(x[b : b + 1], seen, kind) for x in (key, value)]
                k, v = (
                    torch.cat([*p, x[b : b + 1, :, here]], 2)
                    for p, x in zip(past, (key, value), strict=True)
                )
                mask = None
                if kind in CAUSAL:
                    size, total = len(rows), k.shape[2]
                    ones = torch.ones(size, total, dtype=torch.bool, device=k.device)
                    mask = ones.tril(total - size)
                out[b, :, here] = _attend(query[b : b + 1, :, here], k, v, mask)[0]
                if kind not in HIDDEN:
                    seen.append(here)
        return out

    def _context(self, x: Tensor, seen: list[slice], kind: Kind) -> list[Tensor]:
        parts = [x[:, :, where] for where in seen]
        cut = self.detach_context and kind in HIDDEN
        return [part.detach() for part in parts] if cut else parts


class FlexPackedAttention:
    """:class:`PackedAttention` by torch's FlexAttention: one call a layer, which skips blocks without pairs.

    CUDA only: torch has no backward of it for a CPU. A gradient cannot be cut in it.

    Args:
        layout: the sequences.
        num_rows: flat rows in all.

    Source: FlexAttention, https://arxiv.org/abs/2412.05496.
    """

    def __init__(self, layout: Layout, num_rows: int) -> None:
        self.layout = layout
        samples, length = layout.rows.shape
        block, kind, valid = layout.block, layout.kind, layout.valid

        def visible(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = block[b, q] == block[b, k]
            together = same & ~_is(kind[b, q], CAUSAL)
            hidden = _is(kind[b, k], HIDDEN) & ~same
            return ((q >= k) | together) & ~hidden & valid[b, k]

        device = str(layout.rows.device)
        self.mask = create_block_mask(visible, samples, None, length, length, device=device)
        places = valid.flatten().nonzero().squeeze(1)
        self.place = torch.empty(num_rows, dtype=torch.long, device=places.device)
        self.place[layout.rows.flatten()[places]] = places

    def __call__(self, layer: int, heads: Heads, sizes: list[int]) -> list[Tensor]:
        """Return ``[M_e, H * D]`` per expert."""
        query, key, value = (x[self.layout.rows].transpose(1, 2) for x in heads)
        run = _compiled_flex() if query.is_cuda else cast(Any, flex_attention)
        out: Tensor = run(query, key, value, block_mask=self.mask, enable_gqa=True)
        return _rows(out.transpose(1, 2).flatten(2).flatten(0, 1), self.place, sizes)


@cache
def _compiled_flex() -> Any:
    """Compile once: without it every pair of rows would have its score in memory."""
    return torch.compile(flex_attention, dynamic=True)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``[B, H, L, D]`` for ``[B, H, L, D]`` and ``[B, H_kv, S, D]``.

    Always with a batch: without one torch takes the kernel that keeps the matrix of probabilities.
    """
    shares_keys = query.shape[1] != key.shape[1]
    if shares_keys and query.is_cuda and mask is not None:
        # No fused CUDA kernel takes both a mask and fewer key heads.
        key, value = (_repeat(x, query) for x in (key, value))
        shares_keys = False
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=shares_keys)


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

    def __init__(self, cache: RowCache, layout: Layout) -> None:
        # Weak: the cache keeps this plan, and a cycle would hold its keys until the collector runs.
        self.cache, self.layout = weakref.proxy(cache), layout
        _samples, length = layout.rows.shape
        order = torch.arange(length, device=layout.rows.device)
        lengths = cache.lengths.unsqueeze(1)
        slots = lengths + order
        count = layout.valid.sum(1, keepdim=True)
        reach = torch.where(_is(layout.kind, CAUSAL), slots + 1, lengths + count)
        self.total = cache.reach(length)
        keys = torch.arange(self.total, device=slots.device)
        # At least one visible key, so that the softmax of padding is finite.
        self.mask = Mask((keys < reach.clamp_min(1).unsqueeze(2)).unsqueeze(1))  # [B, 1, Q, S]
        places = layout.valid.flatten().nonzero().squeeze(1)
        self.place = torch.empty_like(places)  # per flat row
        self.place[layout.rows.flatten()[places]] = places
        self.sample, self.slot = self.place // length, slots.flatten()[self.place]

    def __call__(self, layer: int, heads: Heads, sizes: list[int]) -> list[Tensor]:
        """Return ``[M_e, H * D]`` per expert."""
        if not len(heads.query):
            return [heads.query.flatten(1)]
        query = heads.query[self.layout.rows].transpose(1, 2)
        key, value = _remember(self.cache, layer, heads, (self.sample, self.slot), self.total)
        out = _attend(query, key, value, self.mask(query))
        return _rows(out.transpose(1, 2).flatten(2).flatten(0, 1), self.place, sizes)


class NextWord:
    """One more word in some of B ragged sequences: what decoding does, without a word to the host.

    Args:
        cache: of B rows; its capacity must hold one more slot.
        rows: ``[M]`` int64, the sequences that get a word; a repeated one writes the same twice.
    """

    def __init__(self, cache: RowCache, rows: Tensor) -> None:
        self.cache, self.rows, self.total = cache, rows, cache.reach(1)
        self.slot = cache.lengths[rows]
        keys = torch.arange(self.total, device=rows.device)
        self.mask = Mask((keys <= cache.lengths.unsqueeze(1))[:, None, None])  # [B, 1, 1, S]

    def __call__(self, layer: int, heads: Heads, sizes: list[int]) -> list[Tensor]:
        """Return ``[M_e, H * D]`` per expert."""
        if not len(heads.query):
            return [heads.query.flatten(1)]
        query = heads.query.new_zeros(len(self.cache), *heads.query.shape[1:])
        query[self.rows] = heads.query
        key, value = _remember(self.cache, layer, heads, (self.rows, self.slot), self.total)
        out = _attend(query.unsqueeze(2), key, value, self.mask(query))
        return _rows(out.flatten(1), self.rows, sizes)


def _rows(flat: Tensor, place: Tensor, sizes: list[int]) -> list[Tensor]:
    """Take the rows at some places, expert by expert."""
    return [flat[each] for each in place.split(sizes)]


def _remember(
    cache: RowCache, layer: int, heads: Heads, where: tuple[Tensor, Tensor], total: int
) -> tuple[Tensor, Tensor]:
    """Write keys and values of new rows into a cache; return what it holds, ``[B, H_kv, S, D]``."""
    found = []
    for held, new in ((cache.keys[layer], heads.key), (cache.values[layer], heads.value)):
        held[where] = new.to(held.dtype)
        found.append(held[:, :total].transpose(1, 2).to(heads.query.dtype))
    return found[0], found[1]
