"""Bagel as one policy: reason with the understanding expert, draw with the generation expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Adapter, token_log_probs
from lightning_unigrpo.adapters.bagel.attention import CachedAttention, PackedAttention
from lightning_unigrpo.adapters.bagel.cache import BagelCache
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.network import BagelNet, Pack
from lightning_unigrpo.adapters.bagel.packing import Packer
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    Trajectory,
    sampled,
)

FLOW_MODULES = ("vae2llm", "llm2vae", "time_embedder")
"""The bridges between latents and the language model; with ``moe_gen`` they are the flow group."""


class Tokenizer(Protocol):
    """What the adapter needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without marks."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""


class BagelAdapter(Adapter):
    """Bagel's language and generation path.

    Layout of a context, one linear sequence: every text is ``bos + ids + eos``, every image
    ``start + latents + end``. RoPE counts words; all rows of an image share one position. A segment's
    ids never hold ``bos``; a sampled text ends with ``eos`` if it stopped, and the adapter adds ``eos``
    wherever it is missing.

    Source: Bagel, https://arxiv.org/abs/2505.14683.

    Args:
        config: sizes and special tokens.
        tokenizer: turns prompts into ids.
        net: the network; ``None`` builds one with random weights.
        default_size: height and width in pixels of an image whose prompt names none.
        detach_context: cut the image loss's gradient into the reasoning's keys and values.
        gradient_checkpointing: recompute each layer in the backward pass.
        train_bridges: also train ``vae2llm``, ``llm2vae`` and ``time_embedder``.
        share_prefixes: in the packed pass, run what trajectories begin with in common (the prompt of a
            group, given images, equal reasonings) once for all of them; the numbers stay the same.
    """

    def __init__(
        self,
        config: BagelConfig,
        tokenizer: Tokenizer,
        *,
        net: BagelNet | None = None,
        default_size: tuple[int, int] = (1024, 1024),
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
        train_bridges: bool = True,
        share_prefixes: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = tokenizer
        self.net: BagelNet = net or BagelNet(config)
        self.net.gradient_checkpointing = gradient_checkpointing
        self.default_size, self.detach_context = default_size, detach_context
        self.share_prefixes = share_prefixes
        self.stop_token, self.latent_channels = config.eos, config.latent_channels
        if not train_bridges:
            for name in FLOW_MODULES:
                getattr(self.net, name).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.net.vae2llm.weight.device

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return the prompt as one text; Bagel has no chat template."""
        ids = torch.tensor(self.tokenizer.encode(prompt.text), dtype=torch.long)
        return [TextSegment(tokens=ids.to(self.device))]

    def detokenize(self, tokens: Tensor) -> str:
        """Return the words of ``[L]`` ids without the closing ``eos``."""
        ids = tokens.tolist()
        return str(self.tokenizer.decode(ids[:-1] if ids[-1:] == [self.config.eos] else ids))

    def image_grid(self, prompt: Prompt) -> Grid:
        """Return the latent grid of the size asked for.

        Raises:
            ValueError: when the size is not a multiple of a latent token's pixels.
        """
        height, width = prompt.size or self.default_size
        side = self.config.pixels_per_token
        if height % side or width % side:
            raise ValueError(
                f"Prompt.size {(height, width)} must be multiples of {side} pixels (one latent token)."
            )
        return height // side, width // side

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Turn latents into pixels; needs a subclass that owns an image decoder.

        Raises:
            TypeError: always, here.
        """
        raise TypeError(
            f"{type(self).__name__} has no image decoder: override decode(latents, grid) -> [B, 3, H, W]."
        )

    # ---- sampling

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> BagelCache:
        """Read ragged contexts segment by segment."""
        dtype = torch.get_autocast_dtype(self.device.type) if self._autocast() else None
        weight = self.net.vae2llm.weight
        cache = BagelCache(
            self.config, len(contexts), device=self.device, dtype=dtype or weight.dtype
        )
        for place in range(max((len(c) for c in contexts), default=0)):
            self.extend(cache, [c[place] if place < len(c) else None for c in contexts])
        return cache

    def _autocast(self) -> bool:
        return torch.is_autocast_enabled(self.device.type)

    @torch.no_grad()
    def extend(self, cache: BagelCache, segments: Sequence[Segment | None]) -> None:  # type: ignore[override]
        """Append one segment per row; None appends nothing."""
        packer, positions = self._packer(), cache.positions.tolist()
        advance = []
        for b, segment in enumerate(segments):
            packer.sample()
            if isinstance(segment, TextSegment):
                ids = self._closed(segment.tokens)[cache.open[b] :]
                if ids:
                    packer.text(ids, positions[b])
                cache.open[b] = 0
                advance.append(len(ids))
            elif isinstance(segment, ImageSegment) and segment.is_context:
                packer.clean(segment, positions[b])
                advance.append(1)
            else:
                advance.append(0)
        if any(advance):
            added = self._append(cache, packer)[1]
            cache.advance(added, torch.tensor(advance, device=self.device))

    def _closed(self, tokens: Tensor) -> list[int]:
        ids = tokens.tolist()
        tail = [] if ids[-1:] == [self.config.eos] else [self.config.eos]
        return [self.config.bos, *ids, *tail]

    def _packer(self) -> Packer:
        return Packer(self.config, self.device)

    def _append(self, cache: BagelCache, packer: Packer) -> tuple[Tensor, Tensor]:
        """Run new rows against the cache; returns logits, and how many slots each row filled."""
        pack, layout = packer.finish()
        cache.reserve(layout.rows.shape[1])
        logits, _ = self.net(pack, CachedAttention(cache, layout))
        return logits, layout.valid.sum(1)

    @torch.no_grad()
    def next_logits(self, cache: BagelCache, tokens: Tensor | None, active: Tensor) -> Tensor:  # type: ignore[override]
        """Feed ``bos`` (``tokens`` None) or the tokens just sampled to the active rows."""
        packer, positions = self._packer(), cache.positions.tolist()
        rows = active.tolist()
        ids = [self.config.bos] * len(cache) if tokens is None else tokens.tolist()
        for b, is_active in enumerate(rows):
            packer.sample()
            if is_active:
                packer.text([ids[b]], positions[b], last=True)
                cache.open[b] += 1
        found, added = self._append(cache, packer)
        cache.advance(added, added)
        logits = found.new_zeros(len(cache), found.shape[1])
        logits[active.to(found.device)] = found
        return logits

    @torch.no_grad()
    def velocity(  # type: ignore[override]
        self, cache: BagelCache, latents: Tensor, sigma: Tensor, grid: Grid
    ) -> Tensor:
        """Run one noise block per row; its keys go to scratch slots that nothing remembers."""
        if grid not in cache.plans:
            cache.plans[grid] = self._noise_plan(cache, grid)
        pack, attention = cache.plans[grid]
        pack = replace(pack, latents=latents.flatten(0, 1), sigma=sigma)
        found: Tensor = self.net(pack, attention)[1]
        return found.view_as(latents)

    def _noise_plan(self, cache: BagelCache, grid: Grid) -> tuple[Pack, CachedAttention]:
        """Lay out one noise block per row; the same for all denoising steps of an image."""
        packer = self._packer()
        empty = torch.zeros(1, grid[0] * grid[1], self.latent_channels, device=self.device)
        for position in cache.positions.tolist():
            packer.sample()
            packer.noisy(empty, empty[:, 0, 0], grid, position)
        pack, layout = packer.finish()
        cache.reserve(layout.rows.shape[1])
        return pack, CachedAttention(cache, layout)

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> BagelCache:
        """Return empty contexts: plain text-to-image has nothing else to drop."""
        return self.prefill([[] for _ in contexts])

    # ---- learning

    def forward(self, trajectories: Sequence[Trajectory], steps: slice = slice(None)) -> Scores:
        """Score all trajectories in one packed pass; equal beginnings are packed once."""
        packer = Packer(self.config, self.device, share=self.share_prefixes)
        for trajectory in trajectories:
            packer.sample()
            position = 0
            for segment in trajectory.segments:
                position = self._pack(packer, segment, position, steps)
        pack, layout = packer.finish()
        num_rows = len(pack.positions) + len(pack.latents)
        attention = PackedAttention(layout, num_rows, detach_context=self.detach_context)
        logits, velocity = self.net(pack, attention)
        shapes = packer.velocity_shapes
        parts = velocity.split([shape[:2].numel() for shape in shapes]) if shapes else ()
        scores = Scores(velocity=[v.view(s) for v, s in zip(parts, shapes, strict=True)])
        if texts := [s for _, s in sampled(trajectories) if isinstance(s, TextSegment)]:
            scores.text, scores.entropy = score_texts(logits, texts)
        return scores

    def _pack(self, packer: Packer, segment: Segment, position: int, steps: slice) -> int:
        """Add a segment to the present sample; returns the position behind it.

        The window's states stand side by side at one position, each blind to the others.
        """
        if isinstance(segment, TextSegment):
            ids = self._closed(segment.tokens)
            packer.text(ids, position, score=len(segment.tokens) if segment.is_sampled else 0)
            return position + len(ids)
        assert isinstance(segment, ImageSegment)
        if segment.is_sampled:
            assert segment.states is not None
            assert segment.sigmas is not None
            states, levels = segment.states[:-1][steps], segment.sigmas[:-1][steps]
            packer.noisy(states, levels, segment.grid, position)
        if not segment.is_context:
            return position
        packer.clean(segment, position)
        return position + 1

    # ---- strategies and optimizers

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the understanding expert (with embedding and head) and the generation expert."""
        groups: dict[str, list[nn.Parameter]] = {"text": [], "flow": []}
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                is_flow = "moe_gen" in name or any(part in name for part in FLOW_MODULES)
                groups["flow" if is_flow else "text"].append(parameter)
        return groups

    def shard_units(self) -> list[nn.Module]:
        """Return the layers."""
        return list(self.net.language_model.model.layers)


def score_texts(logits: Tensor, texts: Sequence[TextSegment]) -> tuple[list[Tensor], list[Tensor]]:
    """Return log-probabilities and entropies ``[L]`` per text.

    Args:
        logits: ``[sum L, V]`` in the order of the texts.
        texts: sampled segments.
    """
    lengths = [len(text.tokens) for text in texts]
    tokens = torch.cat([text.tokens for text in texts])
    temperatures = {text.temperature for text in texts}
    temperature = temperatures.pop()
    if temperatures:  # more than one: temper row by row
        each = logits.new_tensor([text.temperature for text in texts])
        logits = logits / each.repeat_interleave(
            torch.tensor(lengths, device=each.device)
        ).unsqueeze(1)
        temperature = 1.0
    log_prob, entropy = token_log_probs(logits, tokens, temperature=temperature)
    return list(log_prob.split(lengths)), list(entropy.split(lengths))
