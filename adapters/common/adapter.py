"""What adapters of one causal decoder have in common: contexts, decoding, the packed pass.

Such a backbone (JanusFlow, Janus-Pro, Show-o) runs words and images through the same layers. An adapter says
which rows an image is; everything else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.adapters.common import parameters
from lightning_unigrpo.adapters.common.attention import (
    Attention,
    CachedAttention,
    FlexPackedAttention,
    Layout,
    NextWord,
    PackedAttention,
)
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.lora import LowRank, add_lora, lora_off
from lightning_unigrpo.adapters.common.packing import RowPacker
from lightning_unigrpo.adapters.common.scores import score_texts
from lightning_unigrpo.types import (
    ImageSegment,
    Scores,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    sampled,
)

Image = ImageSegment | TokenImageSegment


def _seen(segment: Segment | None) -> Image | None:
    return segment if isinstance(segment, Image) and segment.is_context else None


def goes_on(segment: Segment, end: int) -> bool:
    """Whether words may go on in the turn that shows a picture: it is seen, its end mark the last row.

    Args:
        segment: with the ids behind it as a view, ``after``.
        end: the mark.
    """
    image = _seen(segment)
    after = image.views.get("after") if image is not None else None
    return after is not None and after.tolist() == [end]


class Source(Protocol):
    """A checkpoint that was opened, whose weights are still in their files."""

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the network that are on the meta device."""

    def fill_frozen(self, adapter: Any) -> None:
        """Read the parts outside the network."""


P = TypeVar("P", bound=RowPacker)


class DecoderAdapter(Adapter):
    """A backbone whose context is one sequence of rows of one decoder.

    A text enters the context as it is, given or sampled, without the stop token at its end: that is an
    action which ends, and nothing reads it. The first word of a sampled text is predicted by the row
    before it, whatever that is: the prompt's last token, or the last row of an image that is seen.

    Args:
        net: called as ``net(pack, attention)`` with rows from :meth:`packer` or :meth:`words`; returns logits
            ``[R, V]`` of the pack's ``logit_rows`` and what it says of images, both float32.
        stop_token: ends a sampled text.
        lora: train low-rank adapters instead of the weights; the base is then the reference.
        detach_context: cut the image loss's gradient into the reasoning's keys and values.
        gradient_checkpointing: recompute each layer in the backward pass.
        attention: of the packed pass: ``sdpa``, or ``flex`` (FlexAttention) on a GPU.
        freeze: parameters that are not trained, by any part of their names.
        share_prefixes: in the packed pass, run what trajectories begin with in common once for all of them;
            the numbers stay the same.
    """

    net: Any
    tokenizer: Any
    """``encode(text) -> ids``, without marks but those written in it, and ``decode(ids) -> text``."""

    def __init__(
        self,
        net: nn.Module,
        *,
        stop_token: int,
        lora: LowRank | None = None,
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flex"] = "sdpa",
        freeze: Sequence[str] = (),
        share_prefixes: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.net.gradient_checkpointing = gradient_checkpointing
        self.stop_token, self.lora, self.share_prefixes = stop_token, lora, share_prefixes
        if attention == "flex" and detach_context:
            raise ValueError(
                "adapter.attention is 'flex', where adapter.detach_context cannot cut a gradient; give "
                "'sdpa'."
            )
        self.attention, self.detach_context, self.freeze = attention, detach_context, tuple(freeze)
        parameters.freeze(self.net, self.freeze)
        if lora is not None:
            add_lora(self.net, lora)

    source: Source | None = None
    """Where ``from_pretrained`` found the weights."""

    # ---- what a backbone says

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The ``transformers`` decoder in ``net``: ``embed_tokens``, ``layers``, ``config``."""

    @abstractmethod
    def packer(self, *, share: bool = False) -> Any:
        """Return a new :class:`RowPacker` with ``finish() -> (pack, layout)``.

        ``len(pack)`` is the number of its rows.
        """

    @abstractmethod
    def words(self, ids: Tensor, positions: Tensor) -> Any:
        """Return a pack of words ``[M]`` at positions ``[M]`` that all want logits, made on the device."""

    @abstractmethod
    def see(self, packer: Any, image: Image, position: int) -> int:
        """Add the rows that later segments see of an image with ``is_context``.

        The last of them, or of :meth:`behind`, is what the next text's first word follows: the layout's
        glue belongs here.

        Returns:
            How many positions they take; 0 when nothing is seen.
        """

    def behind(self, image: Image) -> list[int]:
        """Return the marks that follow an image that is seen, where its own rows would see them otherwise.

        In a cache the rows that come at once with a bidirectional image are all seen by it; these come
        after it.
        """
        return []

    @abstractmethod
    def draw(self, packer: Any, image: Image, position: int, steps: slice) -> None:
        """Add the rows of a sampled image that are scored; later segments do not see them."""

    @abstractmethod
    def image_scores(self, scores: Scores, outputs: Tensor, packer: Any) -> None:
        """Enter what ``net`` says of the images of a packed pass into ``scores``."""

    @abstractmethod
    def is_flow(self, name: str) -> bool:
        """Whether a parameter of ``net`` belongs to the ``flow`` group."""

    # ---- words

    def given(self, ids: Sequence[int]) -> TextSegment:
        """Return ids as a given text."""
        return TextSegment(tokens=self._rows(ids))

    def detokenize(self, tokens: Tensor) -> str:
        """Return the words of ``[L]`` ids without the stop token."""
        return str(self.tokenizer.decode(self._read_ids(TextSegment(tokens=tokens))))

    # ---- weights

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        found: torch.device = self.decoder.embed_tokens.weight.device
        return found

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of ``net`` that ``from_pretrained`` left in their files."""
        if self.source is not None:
            self.source.fill(part, prefix)

    def materialize(self) -> None:
        """Read all that ``from_pretrained`` left in its files."""
        super().materialize()
        if self.source is not None:
            self.source.fill_frozen(self)

    def reference(self) -> AbstractContextManager[None] | None:
        """Return the base without its LoRA, where there is one."""
        return lora_off(self.net) if self.lora is not None else None

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of the decoder and of the parts that only draw."""
        groups: dict[str, list[nn.Parameter]] = {"text": [], "flow": []}
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                groups["flow" if self.is_flow(name) else "text"].append(parameter)
        return groups

    def shard_units(self) -> list[nn.Module]:
        """Return the decoder's layers."""
        return list(self.decoder.layers)

    # ---- sampling

    def new_cache(self, num_rows: int, dtype: torch.dtype) -> DecoderCache:
        """Return a cache of empty contexts, its keys and values in ``dtype``."""
        config = self.decoder.config
        return DecoderCache(
            cache_sizes(config),
            num_rows,
            device=self.device,
            dtype=dtype,
            vocab_size=config.vocab_size,
        )

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> DecoderCache:
        """Read ragged contexts segment by segment."""
        kind, weight = self.device.type, self.decoder.embed_tokens.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        cache = self.new_cache(len(contexts), dtype)
        for place in range(max((len(c) for c in contexts), default=0)):
            self._read(cache, [c[place] if place < len(c) else None for c in contexts])
        return cache

    @torch.no_grad()
    def extend(self, cache: DecoderCache, segments: Sequence[Segment]) -> None:  # type: ignore[override]
        """Append one segment per row."""
        cache.rewind()
        self._read(cache, segments)

    def _read(self, cache: DecoderCache, segments: Sequence[Segment | None]) -> None:
        packer, fed, advance = self.packer(), cache.open.tolist(), []
        for segment, position, done in zip(segments, cache.positions.tolist(), fed, strict=True):
            packer.sample()
            taken = 0
            if isinstance(segment, TextSegment):
                ids = self._read_ids(segment)[done:]
                packer.read_on(ids, position)
                taken = len(ids)
            elif segment is not None and segment.is_context:
                taken = self.see(packer, segment, position)
            advance.append(taken)
        kept = [segment is None for segment in segments]
        cache.open = cache.open * torch.tensor(kept, dtype=torch.long, device=self.device)
        images = [_seen(segment) for segment in segments]
        behind = [self.behind(image) if image is not None else [] for image in images]
        # At once, and no more than that: room that is made unreserved doubles.
        cache.reserve(max(advance, default=0) + max(map(len, behind), default=0))
        self._grow(cache, packer, advance)
        packer = self.packer()
        for position, ids in zip(cache.positions.tolist(), behind, strict=True):
            packer.sample()
            packer.read_on(ids, position)
        self._grow(cache, packer, [len(ids) for ids in behind])

    def _grow(self, cache: DecoderCache, packer: Any, advance: Sequence[int]) -> None:
        if any(advance):
            grown = [b for b, taken in enumerate(advance) if taken]
            logits = self.append(cache, packer, torch.tensor(advance), grown)[0]
            cache.logits = cache.logits.index_copy(0, self._rows(grown), logits)

    def append(
        self, cache: DecoderCache, packer: Any, positions: Tensor, grown: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Run rows against the cache and make them part of the contexts.

        Args:
            cache: of B rows.
            packer: with B samples.
            positions: ``[B]`` int64, how many positions each takes.
            grown: the samples that are not empty.

        Returns:
            Logits behind the last row of the grown samples, and what ``net`` says of images.
        """
        pack, layout = self.finish(packer, grown)
        cache.make_room(layout.rows.shape[1])
        found: tuple[Tensor, Tensor] = self.net(pack, CachedAttention(cache, layout))
        cache.advance(layout.valid.sum(1), positions.to(self.device))
        return found

    def finish(self, packer: Any, grown: Sequence[int]) -> tuple[Any, Layout]:
        """Ask for the logits behind the last row of some samples, and lay out."""
        packer.logit_rows += [packer.samples[b][-1][1][-1] for b in grown]
        found: tuple[Any, Layout] = packer.finish()
        return found

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def _read_ids(self, text: TextSegment) -> list[int]:
        ids: list[int] = text.tokens.tolist()
        return ids[:-1] if ids[-1:] == [self.stop_token] else ids

    @torch.no_grad()
    def next_logits(  # type: ignore[override]
        self, cache: DecoderCache, tokens: Tensor | None, active: Tensor
    ) -> Tensor:
        """Feed the tokens just sampled to the active rows; a new text begins with what is remembered."""
        cache.rewind()
        active = active.to(self.device)
        if tokens is None:
            return cache.logits.clone()
        rows = active.nonzero().squeeze(1)
        cache.make_room(1)
        pack = self.words(tokens.to(self.device)[rows], cache.positions[rows])
        found, _ = self.net(pack, NextWord(cache, rows))
        one = active.long()
        cache.advance(one, one, most=1)
        cache.open = cache.open + one
        cache.logits = cache.logits.index_copy(0, rows, found)
        return cache.logits.clone()

    def idle(self) -> None:
        """Call ``net`` once, without rows."""
        cache, packer = self.prefill([]), self.packer()
        pack, layout = packer.finish()
        with torch.no_grad():
            self.net(pack, CachedAttention(cache, layout))

    # ---- learning

    def forward(self, trajectories: Sequence[Trajectory], steps: slice = slice(None)) -> Scores:
        """Score all trajectories in one packed pass; equal beginnings are packed once."""
        packer = self.packer(share=self.share_prefixes)
        for trajectory in trajectories:
            packer.sample()
            position = 0
            for segment in trajectory.segments:
                position += self._pack(packer, segment, position, steps)
        pack, layout = packer.finish()
        logits, outputs = self.net(pack, self._packed_attention(layout, len(pack)))
        scores = Scores()
        if texts := [s for _, s in sampled(trajectories) if isinstance(s, TextSegment)]:
            scores.text, scores.entropy = score_texts(logits, texts)
        self.image_scores(scores, outputs, packer)
        return scores

    def _pack(self, packer: Any, segment: Segment, position: int, steps: slice) -> int:
        """Add a segment to the present sample; returns the positions it takes for later ones."""
        if isinstance(segment, TextSegment):
            ids = self._read_ids(segment)
            score = len(segment.tokens) if segment.is_sampled else 0
            packer.read_on(ids, position, score=score)
            return len(ids)
        if segment.is_sampled:
            self.draw(packer, segment, position, steps)
        if not segment.is_context:
            return 0
        taken, behind = self.see(packer, segment, position), self.behind(segment)
        packer.read_on(behind, position + taken)
        return taken + len(behind)

    def _packed_attention(self, layout: Layout, num_rows: int) -> Attention:
        if self.attention == "flex":
            if torch.is_grad_enabled() and self.device.type == "cpu":
                raise ValueError(
                    "adapter.attention is 'flex', which torch cannot differentiate on a CPU; give 'sdpa'."
                )
            return FlexPackedAttention(layout, num_rows)
        return PackedAttention(layout, num_rows, detach_context=self.detach_context)
