"""Emu3 as a policy: one Llama whose vocabulary holds words and, behind them, the codes of pictures.

A trajectory is one causal sequence, in upstream's marks (https://arxiv.org/abs/2409.18869):

    <bos> You are a helpful assistant. USER: {prompt} ASSISTANT: {reasoning} <eos>
    <image start> h*w <image token> {w codes} <eol> ... {w codes} <eol> <eof> <image end>
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, DynamicCache, Emu3Config, Emu3ForConditionalGeneration

from lightning_unigrpo.adapter import Adapter, Cache, token_log_probs
from lightning_unigrpo.adapters.common.lora import LowRank, add_lora, lora_off, merged
from lightning_unigrpo.distributed import rank, whole_state
from lightning_unigrpo.types import Grid, Prompt, Scores, Segment, TextSegment, Trajectory

REQUEST, TURN, ANSWER = "You are a helpful assistant.", " USER: {}", " ASSISTANT:"
END_LINE, END_CODES, BEGIN, STOP = (f"<|extra_{number}|>" for number in (200, 201, 203, 204))
BEGIN_IMAGE, BEGIN_CODES, END_IMAGE = "<|image start|>", "<|image token|>", "<|image end|>"


class Block(NamedTuple):
    """A segment as the network reads it: ids ``[n]``, and the places ``[m]`` of what was chosen."""

    ids: Tensor
    actions: Tensor


class Emu3Cache(Cache):
    """Keys and values of B ragged rows, in S slots that some rows leave empty.

    ``seen``, ``[B, S]`` bool: slots that count; ``fed``, ``[B]``: ids of the segment in progress.
    """

    def __init__(self, past: DynamicCache, seen: Tensor, fed: Tensor) -> None:
        self.past, self.seen, self.fed = past, seen, fed

    def __len__(self) -> int:
        return len(self.fed)

    def select(self, rows: Tensor) -> Emu3Cache:
        past = DynamicCache([(keys[rows], values[rows]) for keys, values, *_ in self.past])
        return Emu3Cache(past, self.seen[rows], self.fed[rows])

    def drop_open(self, rows: Tensor) -> None:
        """Forget the segment in progress in some rows, ``[B]`` bool."""
        kept = self.seen.sum(1) - self.fed * rows
        self.seen = self.seen & (self.seen.cumsum(1) <= kept.unsqueeze(1))
        self.fed = self.fed * ~rows


class Emu3Adapter(Adapter):
    """Emu3 behind the contract.

    Args:
        source: a folder, or an id of the hub such as ``BAAI/Emu3-Gen-hf``.
        dtype: of the weights.
        size: height and width in pixels of pictures whose prompt names none.
        lora: train low-rank factors instead of all weights.
    """

    image_policy = "tokens"

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "float32",
        size: tuple[int, int] = (720, 720),
        lora: LowRank | None = None,
    ) -> None:
        super().__init__()
        config = Emu3Config.from_pretrained(source)
        config.text_config.attention_dropout = 0.0
        self.net = Emu3ForConditionalGeneration.from_pretrained(source, config=config, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.stop_token = self.tokenizer.convert_tokens_to_ids(STOP)
        self.codes = self.net.vocabulary_mapping.img2bpe_mapping_tensor.long()
        self.vq = (self.net.model.vqmodel.requires_grad_(False),)  # a tuple hides it from torch
        del self.net.model.vqmodel
        self.net.train()  # the VQ-VAE, with its batch norm, stays in eval mode
        self.size, self.lora = size, lora
        if lora is not None:
            add_lora(self.net, lora)

    # ---- words and pixels

    def encode(self, text: str) -> Tensor:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor(ids, dtype=torch.long, device=self.net.device)

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        if prompt.images:
            raise ValueError("Prompt.images is given; Emu3Adapter reads no pictures: leave it out.")
        return [TextSegment(tokens=self.encode(REQUEST + TURN.format(prompt.text)))]

    def turn(self, text: str, behind: Segment) -> TextSegment:
        return TextSegment(tokens=self.encode(TURN.format(text)))

    def detokenize(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens[tokens != self.stop_token])

    def image_grid(self, prompt: Prompt) -> Grid:
        (height, width), factor = prompt.size or self.size, self.vq[0].spatial_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"Prompt.size, or size, is {height, width}: use multiples of {factor}")
        return height // factor, width // factor

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        pixels = self.vq[0].decode(latents.view(-1, *grid))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    # ---- what a segment looks like to the network

    def block(self, segment: Segment) -> Block:
        if not isinstance(segment, TextSegment):
            ids, places = self.pictures(segment.tokens.unsqueeze(0), segment.grid)
            return Block(ids[0], places)
        if segment.stopped and segment.tokens[-1:].tolist() != [self.stop_token]:
            return Block(segment.tokens, segment.tokens[:0])  # a request, not an answer
        head, tail = self.encode(ANSWER), self.encode("" if segment.stopped else STOP)
        places = torch.arange(len(segment.tokens), device=self.net.device)
        return Block(torch.cat([head, segment.tokens, tail]), len(head) + places)

    def pictures(self, tokens: Tensor, grid: Grid) -> Block:
        """Return pictures of codes ``[B, N]`` as ids ``[B, n]``; a mark ends each line."""
        (h, w), rows = grid, len(tokens)
        head = self.encode(f"{BEGIN_IMAGE}{h}*{w}{BEGIN_CODES}")
        lines = self.codes.to(self.net.device)[tokens].view(rows, h, w)
        lines = torch.cat([lines, self.encode(END_LINE).expand(rows, h, 1)], 2).flatten(1)
        tail = self.encode(END_CODES + END_IMAGE)
        places = torch.arange(h * w, device=self.net.device)
        ids = torch.cat([head.expand(rows, -1), lines, tail.expand(rows, -1)], 1)
        return Block(ids, len(head) + places + places // w)

    def seen(self, segment: Segment) -> Tensor:
        is_seen = isinstance(segment, TextSegment) or segment.is_context
        return self.block(segment).ids if is_seen else segment.tokens[:0]

    def words(self, logits: Tensor) -> Tensor:
        # Marks of pictures and codes stand behind the stop token: they are no words.
        return logits[..., : self.stop_token + 1].float()

    def choices(self, logits: Tensor) -> Tensor:
        return logits[..., self.codes.to(self.net.device)].float()

    # ---- sampling

    def feed(self, cache: Emu3Cache, rows: Sequence[Tensor]) -> Tensor:
        """Append ids ``[n]`` to each row, none to some, and return the logits ``[B, V]`` of the last."""
        ids = pad_sequence(list(rows), batch_first=True, padding_value=-1, padding_side="left")
        new = ids >= 0
        cache.seen = torch.cat([cache.seen, new], 1)
        places = (cache.seen.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        # By position: releases of transformers differ in what they call the cache.
        given = (ids.clamp_min(0), None, None, cache.seen, places, cache.past)
        out = self.net(*given, logits_to_keep=1)
        cache.fed = cache.fed + new.sum(1)
        return out.logits[:, -1]

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> Emu3Cache:
        slots = torch.zeros(len(contexts), 0, dtype=torch.bool, device=self.net.device)
        cache = Emu3Cache(DynamicCache(), slots, slots.sum(1))
        self.feed(cache, [torch.cat([self.encode(BEGIN), *map(self.seen, c)]) for c in contexts])
        cache.fed = torch.zeros_like(cache.fed)
        return cache

    @torch.no_grad()
    def extend(self, cache: Emu3Cache, segments: Sequence[Segment]) -> None:
        rows = [self.seen(segment) for segment in segments]
        cache.drop_open(torch.tensor([not len(ids) for ids in rows], device=self.net.device))
        if any(map(len, rows)):
            self.feed(cache, [ids[n:] for ids, n in zip(rows, cache.fed.tolist(), strict=True)])
            cache.fed = torch.zeros_like(cache.fed)

    @torch.no_grad()
    def next_logits(self, cache: Emu3Cache, tokens: Tensor | None, active: Tensor) -> Tensor:
        new = self.encode(ANSWER).expand(len(cache), -1) if tokens is None else tokens.unsqueeze(1)
        rows = [ids if is_on else ids[:0] for ids, is_on in zip(new, active.tolist(), strict=True)]
        return self.words(self.feed(cache, rows))

    @torch.no_grad()
    def next_image_logits(self, cache: Emu3Cache, tokens: Tensor, step: int, grid: Grid) -> Tensor:
        if step == 0:
            cache.drop_open(torch.ones_like(cache.fed, dtype=torch.bool))
        ids, places = self.pictures(tokens, grid)
        rows = zip(ids[:, : places[step]], cache.fed.tolist(), strict=True)
        return self.choices(self.feed(cache, [row[n:] for row, n in rows]))

    @torch.no_grad()
    def idle(self) -> None:  # transformers' attention refuses a batch of no rows
        self.net(torch.zeros(1, 1, dtype=torch.long, device=self.net.device), use_cache=False)

    # ---- learning

    def forward(self, trajectories: Sequence[Trajectory], steps: slice = slice(None)) -> Scores:
        samples = [[self.block(segment) for segment in t.segments] for t in trajectories]
        rows = [torch.cat([self.encode(BEGIN), *(b.ids for b in blocks)]) for blocks in samples]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1)
        logits = self.net(ids.clamp_min(0), attention_mask=ids >= 0, use_cache=False).logits
        scores = Scores()
        for row, trajectory, blocks in zip(logits, trajectories, samples, strict=True):
            at = 0  # logits stand one place before their id; the first id is BEGIN
            for segment, block in zip(trajectory.segments, blocks, strict=True):
                if segment.is_sampled:
                    self.score(scores, segment, row[at + block.actions])
                at += len(block.ids)
        return scores

    def score(self, scores: Scores, segment: Segment, logits: Tensor) -> None:
        is_text = isinstance(segment, TextSegment)
        found = self.words(logits) if is_text else self.choices(logits)
        log_prob, entropy = token_log_probs(found, segment.tokens, temperature=segment.temperature)
        (scores.text if is_text else scores.image_tokens).append(log_prob)
        if is_text:
            scores.entropy.append(entropy)

    # ---- optimizers, strategies, files

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"text": [p for p in self.net.parameters() if p.requires_grad], "flow": []}

    def shard_units(self) -> list[nn.Module]:
        return list(self.net.model.text_model.layers)

    def frozen_modules(self) -> list[nn.Module]:
        return list(self.vq)

    def reference(self) -> AbstractContextManager[None] | None:
        return lora_off(self.net) if self.lora is not None else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``source`` may name; every rank must call it, the first one writes."""
        state = whole_state(self.net)
        if rank() == 0:
            state = merged(state, self.lora) if self.lora is not None else state
            state |= self.vq[0].state_dict(prefix="model.vqmodel.")
            self.net.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
