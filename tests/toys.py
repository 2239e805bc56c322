"""The smallest adapters that keep the whole contract, one for each image policy.

``ToyFlow`` draws continuous latents, ``ToyTokens`` codes one after the other, ``ToyMasked`` codes a
few at a time. They differ in what the rows of an image hold and which of them are scored; network,
cache, text and packing are shared. A new adapter may start as a copy of this file.

One linear sequence per sample: a text is ``begin, words, stop``, an image ``begin, its rows, end``.
RoPE counts words; the rows of an image share one position and are told apart by a table of places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, rms_norm, scaled_dot_product_attention, silu
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lightning_unigrpo.adapter import Adapter, Cache, token_log_probs
from lightning_unigrpo.config import Objective, Optim, Sampling
from lightning_unigrpo.types import (
    Defaults,
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

WORDS = "abcdefgh"
STOP, VOCABULARY = 0, 1 + len(WORDS)
BEGIN_TEXT, BEGIN_IMAGE, END_IMAGE = range(VOCABULARY, VOCABULARY + 3)
"""Marks have embeddings but no logits: they can never be sampled."""
SIDE, PIXELS = 4, 2
"""Largest grid, and pixels per latent token, along one side."""
CHANNELS, CODES, MASK = 4, 8, 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """What the network reads: one sequence of new rows per sample, padded to L."""

    words: Tensor
    """``[B, L]`` int64 words and marks; anything on image rows."""
    features: Tensor
    """``[B, L, F]`` float32 contents of image rows; 0 on word rows."""
    places: Tensor
    """``[B, L]`` int64 place of an image row in the grid; -1 on word rows."""
    positions: Tensor
    """``[B, L]`` int64 RoPE positions."""
    block: Tensor
    """``[B, L]`` int64 number of the block in its sequence; -1 on padding."""
    causal: Tensor
    """``[B, L]`` bool: sees of its own block only what came before."""
    hidden: Tensor
    """``[B, L]`` bool: not seen by later blocks."""

    def visible(self) -> Tensor:
        """Return ``[B, L, L]``, which row (second axis) sees which (third)."""
        order = torch.arange(self.words.shape[1], device=self.words.device)
        query, key = self.block.unsqueeze(2), self.block.unsqueeze(1)
        before = order.unsqueeze(1) >= order
        inside = (query == key) & (before | ~self.causal.unsqueeze(2))
        earlier = (key >= 0) & (key < query) & ~self.hidden.unsqueeze(1)
        return inside | earlier | torch.eye(len(order), dtype=torch.bool, device=order.device)


class Block(NamedTuple):
    """One text, or one image in one state."""

    words: Tensor
    """``[n]`` int64."""
    features: Tensor
    """``[n, F]`` float32."""
    places: Tensor
    """``[n]`` int64."""
    is_text: bool
    causal: bool
    hidden: bool = False

    @property
    def num_positions(self) -> int:
        """How many RoPE positions it takes from those behind it."""
        if self.hidden:
            return 0
        return len(self.words) if self.is_text else 1

    def first(self, count: int) -> Block:
        """Return its first rows."""
        words, features, places = (x[:count] for x in (self.words, self.features, self.places))
        return self._replace(words=words, features=features, places=places)


class ToyCache(Cache):
    """Keys and values of B ragged prefixes; a slot counts for the rows where it is ``valid``."""

    def __init__(self, net: ToyNet, num_rows: int) -> None:
        weight = net.words.weight  # for dtype and device only: a rank may hold a part of it
        like = {"dtype": weight.dtype, "device": weight.device}
        empty = torch.zeros(num_rows, net.heads, 0, net.size // net.heads, **like)
        self.keys = [empty] * len(net.layers)  # [B, H, S, D] each
        self.values = [empty] * len(net.layers)
        self.valid = torch.zeros(num_rows, 0, dtype=torch.bool, device=weight.device)  # [B, S]
        self.positions = torch.zeros(num_rows, dtype=torch.long, device=weight.device)
        """Where the segment in progress, or else the next one, begins."""
        self.open = torch.zeros_like(self.positions)
        """Rows of the segment in progress that have been fed."""

    def __len__(self) -> int:
        return len(self.positions)

    def select(self, rows: Tensor) -> ToyCache:
        chosen = object.__new__(ToyCache)
        rows = rows.to(self.positions.device)
        chosen.keys, chosen.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        chosen.valid, chosen.positions, chosen.open = (
            x[rows] for x in (self.valid, self.positions, self.open)
        )
        return chosen

    def append(self, new: Sequence[tuple[Tensor, Tensor]], valid: Tensor) -> None:
        """Add slots; rows in which they are not valid stay as they were."""
        self.keys = [torch.cat([x, k], 2) for x, (k, _) in zip(self.keys, new, strict=True)]
        self.values = [torch.cat([x, v], 2) for x, (_, v) in zip(self.values, new, strict=True)]
        self.valid = torch.cat([self.valid, valid], 1)

    def drop_open(self, rows: Tensor) -> None:
        """Forget the segment in progress in some rows, ``[B]`` bool."""
        kept = self.valid.sum(1) - self.open * rows
        self.valid = self.valid & (self.valid.cumsum(1) <= kept.unsqueeze(1))
        self.open = self.open * ~rows


class ToyLayer(nn.Module):
    """One layer of a Mixture-of-Transformers: weights per kind of row, one attention."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.text, self.flow = (
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(size, 3 * size),
                    "out": nn.Linear(size, size),
                    "up": nn.Linear(size, 2 * size),
                    "down": nn.Linear(2 * size, size),
                }
            )
            for _ in range(2)
        )

    def forward(
        self, x: Tensor, rows: Rows, visible: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new ``x [B, L, d]``, keys and values ``[B, H, L, D]`` of the new rows."""
        is_image = rows.places.unsqueeze(2) >= 0

        def experts(name: str, value: Tensor) -> Tensor:
            return torch.where(is_image, self.flow[name](value), self.text[name](value))

        qkv = experts("qkv", rms_norm(x, x.shape[-1:])).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, H, L, D] each
        query, key = rotate(query, rows.positions), rotate(key, rows.positions)
        seen = (key, value)
        if past is not None:
            seen = tuple(torch.cat(pair, 2) for pair in zip(past, seen, strict=True))
        mixed = scaled_dot_product_attention(query, *seen, attn_mask=visible.unsqueeze(1))
        x = x + experts("out", mixed.transpose(1, 2).flatten(2))
        return x + experts("down", silu(experts("up", rms_norm(x, x.shape[-1:])))), key, value


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Apply rotary positions ``[B, L]`` to ``[B, H, L, D]``, halves as pairs."""
    a, b = x.chunk(2, -1)
    steps = torch.arange(a.shape[-1], device=x.device)
    angles = positions[:, None, :, None] * 30.0 ** (-steps / a.shape[-1])
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class ToyNet(nn.Module):
    """Every weight of a toy, reached through one call."""

    def __init__(self, num_in: int, num_out: int, *, size: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.size, self.heads, self.gradient_checkpointing = size, 2, False
        self.words = nn.Embedding(VOCABULARY + 3, size)
        self.head = nn.Linear(size, VOCABULARY)
        self.image_in, self.image_out = nn.Linear(num_in, size), nn.Linear(size, num_out)
        self.image_places = nn.Embedding(SIDE * SIDE, size)
        self.layers = nn.ModuleList(ToyLayer(size, self.heads) for _ in range(layers))

    def forward(
        self, rows: Rows, cache: ToyCache | None = None
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Run new rows, behind the cached ones if a cache is given.

        Returns:
            Logits ``[B, L, V]``, image outputs ``[B, L, O]``, new keys and values per layer.
        """
        visible = rows.visible()
        if cache is not None:
            seen = cache.valid.unsqueeze(1).expand(-1, visible.shape[1], -1)
            visible = torch.cat([seen, visible], 2)
        places = self.image_places(rows.places.clamp_min(0))
        picture = self.image_in(rows.features.to(self.image_in.weight.dtype)) + places
        x = torch.where(rows.places.unsqueeze(2) >= 0, picture, self.words(rows.words))
        new = []
        for number, layer in enumerate(self.layers):
            past = (cache.keys[number], cache.values[number]) if cache is not None else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, *pair = checkpoint(layer, x, rows, visible, past, use_reentrant=False)
            else:
                x, *pair = layer(x, rows, visible, past)
            new.append(tuple(pair))
        x = rms_norm(x, x.shape[-1:])
        return self.head(x), self.image_out(x), new


class Toy(Adapter):
    """What the three toys share: words, packing, the cache."""

    num_in: int
    num_out: int
    image_is_causal: ClassVar[bool] = False
    stop_token = STOP
    net: ToyNet

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = ToyNet(self.num_in, self.num_out)

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return one word per word, by its first letter."""
        ids = [1 + (ord(word[0]) - ord("a")) % len(WORDS) for word in prompt.text.split()]
        return [TextSegment(tokens=torch.tensor(ids, dtype=torch.long, device=self.device))]

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return a text like any other."""
        (found,) = self.tokenize(Prompt(text=text))
        assert isinstance(found, TextSegment)
        return found

    def detokenize(self, tokens: Tensor) -> str:
        return " ".join(WORDS[i - 1] for i in tokens.tolist() if i != STOP)

    def image_grid(self, prompt: Prompt) -> Grid:
        height, width = prompt.size or (2 * PIXELS, 2 * PIXELS)
        return height // PIXELS, width // PIXELS

    @property
    def device(self) -> torch.device:
        return self.net.words.weight.device

    # ---- blocks: what a segment looks like to the network

    def blocks(self, segment: Segment, steps: slice = slice(None)) -> list[Block]:
        """Return the blocks of a segment: hidden copies of what is scored, then what others see."""
        if isinstance(segment, TextSegment):
            tail = [STOP] if segment.tokens[-1:].tolist() != [STOP] else []
            words = torch.tensor([BEGIN_TEXT, *segment.tokens.tolist(), *tail], device=self.device)
            features = torch.zeros(len(words), self.num_in, device=self.device)
            places = torch.full_like(words, -1)
            return [Block(words, features, places, is_text=True, causal=True)]
        return self.image_blocks(segment, steps)

    def image_blocks(self, segment: Segment, steps: slice) -> list[Block]:
        """Return the blocks of an image."""
        raise NotImplementedError

    def picture(self, features: Tensor, grid: Grid, *, hidden: bool = False) -> Block:
        """Frame the rows ``[N, F]`` of one image by its marks."""
        h, w = grid
        marks = torch.tensor([BEGIN_IMAGE, *[0] * len(features), END_IMAGE], device=self.device)
        table = torch.arange(SIDE * SIDE, device=self.device).view(SIDE, SIDE)[:h, :w].flatten()
        places = nn.functional.pad(table, (1, 1), value=-1)
        rows = nn.functional.pad(features.to(self.device), (0, 0, 1, 1))
        return Block(marks, rows, places, is_text=False, causal=self.image_is_causal, hidden=hidden)

    def pack(self, samples: Sequence[Sequence[Block]], bases: Tensor, skip: Tensor) -> Rows:
        """Lay out blocks, each sample from its base position on, without ``skip`` rows."""
        columns: dict[str, list[Tensor]] = {field.name: [] for field in fields(Rows)}
        empty = self.blocks(TextSegment(tokens=torch.tensor([STOP])))[0].first(0)
        for blocks, base, skipped in zip(samples, bases.tolist(), skip.tolist(), strict=True):
            position = base
            parts: list[dict[str, Tensor]] = []
            for number, block in enumerate([empty, *blocks]):
                order = torch.arange(len(block.words), device=self.device)
                parts.append(
                    {
                        "words": block.words,
                        "features": block.features,
                        "places": block.places,
                        "positions": position + order * block.is_text,
                        "block": torch.full_like(order, number),
                        "causal": torch.full_like(order, block.causal, dtype=torch.bool),
                        "hidden": torch.full_like(order, block.hidden, dtype=torch.bool),
                    }
                )
                position += block.num_positions
            for name, column in columns.items():
                column.append(torch.cat([part[name] for part in parts])[skipped:])
        padding = {"places": -1, "block": -1}
        return Rows(**{k: pad_sequence(v, True, padding.get(k, 0)) for k, v in columns.items()})

    # ---- sampling

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> ToyCache:
        cache = ToyCache(self.net, len(contexts))
        if not contexts:
            return cache
        self.feed(cache, [[b for s in c for b in self.seen(s)] for c in contexts])
        return cache

    @torch.no_grad()
    def extend(self, cache: ToyCache, segments: Sequence[Segment]) -> None:  # type: ignore[override]
        self.feed(cache, [self.seen(segment) for segment in segments])

    def seen(self, segment: Segment) -> list[Block]:
        """Return what later segments see of a segment."""
        return [block for block in self.blocks(segment, slice(0, 0)) if not block.hidden]

    def feed(self, cache: ToyCache, samples: Sequence[Sequence[Block]]) -> None:
        """Append whole blocks; of the segment in progress only what is missing."""
        cache.drop_open(torch.tensor([not blocks for blocks in samples], device=self.device))
        self.append(cache, samples, skip=cache.open)
        taken = [sum(block.num_positions for block in blocks) for blocks in samples]
        cache.positions = cache.positions + torch.tensor(taken, device=self.device)
        cache.open = torch.zeros_like(cache.open)

    def append(
        self, cache: ToyCache, samples: Sequence[Sequence[Block]], *, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run rows and remember them; returns logits and image outputs."""
        rows = self.pack(samples, cache.positions, skip)
        logits, image, new = self.net(rows, cache)
        cache.append(new, rows.block >= 0)
        return logits, image

    @torch.no_grad()
    def next_logits(  # type: ignore[override]
        self, cache: ToyCache, tokens: Tensor | None, active: Tensor
    ) -> Tensor:
        active = active.to(self.device)
        words = torch.full_like(cache.positions, BEGIN_TEXT) if tokens is None else tokens
        rows = Rows(
            words=words.unsqueeze(1),
            features=torch.zeros(len(cache), 1, self.num_in, device=self.device),
            places=torch.full_like(cache.positions, -1).unsqueeze(1),
            positions=(cache.positions + cache.open).unsqueeze(1),
            block=(active.long() - 1).unsqueeze(1),
            causal=torch.ones_like(active).unsqueeze(1),
            hidden=torch.zeros_like(active).unsqueeze(1),
        )
        logits, _, new = self.net(rows, cache)
        cache.append(new, active.unsqueeze(1))
        cache.open = cache.open + active
        return logits[:, 0].float()

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> ToyCache:
        return self.prefill([[] for _ in contexts])

    # ---- learning

    def forward(self, trajectories: Sequence[Trajectory], steps: slice = slice(None)) -> Scores:
        samples = [[self.blocks(s, steps) for s in t.segments] for t in trajectories]
        start = torch.zeros(len(trajectories), dtype=torch.long)
        flat = [list(chain.from_iterable(sample)) for sample in samples]
        logits, image, _ = self.net(self.pack(flat, start, start))
        scores = Scores()
        for b, (trajectory, sample) in enumerate(zip(trajectories, samples, strict=True)):
            at = 0
            for segment, blocks in zip(trajectory.segments, sample, strict=True):
                end = at + sum(len(block.words) for block in blocks)
                if isinstance(segment, TextSegment) and segment.is_sampled:
                    found = logits[b, at : at + len(segment.tokens)]
                    log_prob, entropy = token_log_probs(
                        found, segment.tokens, temperature=segment.temperature
                    )
                    scores.text.append(log_prob)
                    scores.entropy.append(entropy)
                elif segment.is_sampled:
                    # Without any block (no step asked for) the result still hangs on the graph.
                    shape = (len(blocks), segment.grid[0] * segment.grid[1] + 2, self.num_out)
                    self.score(scores, segment, image[b, at:end].reshape(shape), steps)
                at = end
        return scores

    def score(self, scores: Scores, segment: Segment, outputs: Tensor, steps: slice) -> None:
        """Add what the outputs ``[blocks, N + 2, O]`` of one image say about it."""
        raise NotImplementedError

    # ---- strategies, optimizers, users

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"text": [], "flow": []}
        for name, parameter in self.net.named_parameters():
            is_flow = "flow" in name or "image" in name  # FSDP puts words before it
            groups["flow" if is_flow else "text"].append(parameter)
        return groups

    def shard_units(self) -> list[nn.Module]:
        return list(self.net.layers)

    def unreached(self, plan: Sequence[str]) -> list[nn.Parameter]:
        idle = [] if "text" in plan else list(self.net.head.parameters())
        return idle if "image" in plan else [*idle, *self.net.image_out.parameters()]

    def defaults(self) -> Defaults:
        prompts = [Prompt(text=text, id=i) for i, text in enumerate(("a b", "c", "d a h", "e f"))]
        return Defaults(
            train=prompts,
            val=prompts[:2],
            test=prompts[2:],
            rewards=[brightness, share_of_a],
            sampling=Sampling(
                group_size=8,
                max_text_tokens=5,
                num_timesteps=6,
                schedule="steps",
                shift=1.0,
                window_size=2,
                window_range=(0, 4),
                eval_num_timesteps=6,
            ),
            objective=Objective(flow_clip_low=1e-2, flow_clip_high=1e-2, mse_weight=0.0),
            optim=Optim(text_lr=1e-2, flow_lr=1e-2, ppo_epochs=1),
        )


def brightness(*, images: Tensor, **_: object) -> Tensor:
    """Return ``[n]`` mean grey levels in [0, 1]."""
    return images.mean((1, 2, 3))


def share_of_a(*, completions: Sequence[str], **_: object) -> list[float]:
    """Return the share of the word "a" in each text."""
    words = [text.split() for text in completions]
    return [found.count("a") / max(1, len(found)) for found in words]


class ToyFlow(Toy):
    """Continuous latents: each image row holds C numbers and their noise level."""

    num_in, num_out, latent_channels = CHANNELS + 1, CHANNELS, CHANNELS

    def state(self, x: Tensor, sigma: Tensor, grid: Grid, *, hidden: bool) -> Block:
        """Return an image at one noise level."""
        return self.picture(torch.cat([x, sigma.expand(len(x), 1)], 1), grid, hidden=hidden)

    def image_blocks(self, segment: Segment, steps: slice) -> list[Block]:
        assert isinstance(segment, ImageSegment)
        found = []
        if segment.states is not None and segment.sigmas is not None:
            window = zip(segment.states[:-1][steps], segment.sigmas[:-1][steps], strict=True)
            found = [self.state(x, sigma, segment.grid, hidden=True) for x, sigma in window]
        if segment.is_context:
            clean = segment.latent.new_zeros(())
            found.append(self.state(segment.latent, clean, segment.grid, hidden=False))
        return found

    @torch.no_grad()
    def velocity(  # type: ignore[override]
        self, cache: ToyCache, latents: Tensor, sigma: Tensor, grid: Grid
    ) -> Tensor:
        levels = zip(latents, sigma, strict=True)
        states = [[self.state(x, level, grid, hidden=True)] for x, level in levels]
        rows = self.pack(states, cache.positions, torch.zeros_like(cache.open))
        return self.net(rows, cache)[1][:, 1:-1].float()

    def score(self, scores: Scores, segment: Segment, outputs: Tensor, steps: slice) -> None:
        assert isinstance(segment, ImageSegment)
        scores.velocity.append(outputs[: len(outputs) - segment.is_context, 1:-1].float())

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        pixels = latents.sigmoid().view(-1, *grid, PIXELS, PIXELS).transpose(2, 3)
        return pixels.flatten(3).flatten(1, 2).unsqueeze(1).expand(-1, 3, -1, -1)


class ToyCodes(Toy):
    """Discrete images: each row holds a code, or the mask."""

    num_in, num_out, image_policy = CODES + 1, CODES, "tokens"

    def codes(self, tokens: Tensor, grid: Grid, *, hidden: bool = False) -> Block:
        """Return an image of codes ``[N]``, -1 where not yet revealed."""
        features = one_hot(torch.where(tokens < 0, MASK, tokens), CODES + 1).float()
        return self.picture(features, grid, hidden=hidden)

    def add(self, scores: Scores, segment: TokenImageSegment, logits: Tensor) -> None:
        """Score the codes ``[N]`` under ``[N, CODES]``."""
        log_prob, _ = token_log_probs(logits, segment.tokens, temperature=segment.temperature)
        scores.image_tokens.append(log_prob)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        grey = (latents.float() / (CODES - 1)).view(-1, 1, *grid)
        grey = grey.repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3)
        return grey.expand(-1, 3, -1, -1)


class ToyTokens(ToyCodes):
    """Codes one after the other: row n (the begin mark is row 0) predicts code n."""

    image_is_causal = True

    def image_blocks(self, segment: Segment, steps: slice) -> list[Block]:
        assert isinstance(segment, TokenImageSegment)
        if segment.is_context or segment.is_sampled:
            return [self.codes(segment.tokens, segment.grid, hidden=not segment.is_context)]
        return []

    @torch.no_grad()
    def next_image_logits(  # type: ignore[override]
        self, cache: ToyCache, tokens: Tensor, step: int, grid: Grid
    ) -> Tensor:
        if step == 0:
            cache.drop_open(torch.ones_like(cache.open, dtype=torch.bool))
        drawn = [[self.codes(row, grid).first(step + 1)] for row in tokens]
        _, image = self.append(cache, drawn, skip=cache.open)
        cache.open = cache.open + 1
        return image[:, -1].float()

    def score(self, scores: Scores, segment: Segment, outputs: Tensor, steps: slice) -> None:
        assert isinstance(segment, TokenImageSegment)
        self.add(scores, segment, outputs[0, :-2])


class ToyMasked(ToyCodes):
    """Codes some at a time: every step sees what earlier steps revealed, and masks."""

    image_policy = "masked"

    def image_blocks(self, segment: Segment, steps: slice) -> list[Block]:
        assert isinstance(segment, TokenImageSegment)
        found = []
        if segment.is_sampled:
            for state, _ in segment.masked_states(steps):
                found.append(self.codes(state, segment.grid, hidden=True))
        if segment.is_context:
            found.append(self.codes(segment.tokens, segment.grid))
        return found

    @torch.no_grad()
    def masked_logits(  # type: ignore[override]
        self, cache: ToyCache, tokens: Tensor, where: Tensor, grid: Grid
    ) -> Tensor:
        states = [[self.codes(row, grid, hidden=True)] for row in tokens]
        rows = self.pack(states, cache.positions, torch.zeros_like(cache.open))
        return self.net(rows, cache)[1][:, 1:-1].float()[where]

    def score(self, scores: Scores, segment: Segment, outputs: Tensor, steps: slice) -> None:
        assert isinstance(segment, TokenImageSegment)
        found = [outputs.flatten()[:0]]  # without any state the result still hangs on the graph
        for (_, where), block in zip(segment.masked_states(steps), outputs, strict=False):
            codes, logits = segment.tokens[where], block[1 + where]
            found.append(token_log_probs(logits, codes, temperature=segment.temperature)[0])
        scores.image_tokens.append(torch.cat(found))
