"""The adapter under test: ragged contexts, deterministic inputs, and how far two answers are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Adapter, Cache, has_turns, token_log_probs
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.masked import Independent
from lightning_unigrpo.rollout import Start, rollout, sample_image_tokens, sample_masked_image
from lightning_unigrpo.testing.report import ATOL, COARSE, NoRolloutError
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    sampled,
)

Build: TypeAlias = Callable[[], Cache]


class Subject:
    """The adapter under test, with ragged contexts and deterministic inputs."""

    def __init__(
        self, adapter: Adapter, prompts: Sequence[Prompt], rounds: int, atol: float | None
    ) -> None:
        self.adapter, self.prompts, self.rounds = adapter, prompts, rounds
        weight = next(adapter.net.parameters())
        self.device = weight.device
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.atol = ATOL.get(weight.dtype, COARSE) if atol is None else atol
        self.is_flow = adapter.image_policy == "flow"
        self.is_masked = adapter.image_policy == "masked"
        self._drawn: dict[int, list[Trajectory] | None] = {}

    @property
    def trajectories(self) -> list[Trajectory]:
        """Six trajectories of three prompts, drawn once per number of rounds."""
        if self._drawn.get(self.rounds, []) is None:
            raise NoRolloutError
        if self.rounds not in self._drawn:
            self._drawn[self.rounds] = None
            self._drawn[self.rounds] = self.draw()
        return self._drawn[self.rounds] or []

    @property
    def has_turns(self) -> bool:
        """Whether the user speaks between the rounds of some trajectories."""
        return self.rounds > 1 and has_turns(self.adapter)

    def draw(self) -> list[Trajectory]:
        """Draw two trajectories a prompt, between whose rounds the user is silent and speaks, if he can.

        They are tempered, so that a forgotten temperature is found. The last of those with turns has one
        round fewer: there the user has nothing more to say.
        """
        starts = [Start(prompt, i, m) for i, prompt in enumerate(self.prompts) for m in range(2)]
        sampling = Sampling(
            plan=("text", "image"),
            rounds=self.rounds,
            max_text_tokens=6,
            temperature=0.8,
            num_timesteps=5,
            schedule="steps",
            window_size=2,
            window_range=(0, 4),
            seed=0,
        )
        if not self.has_turns:
            return list(chain.from_iterable(rollout(self.adapter, starts, sampling)))
        dialogue = replace(sampling, plan=("text", "image", "turn", "text", "image"))
        silent, spoken = (
            chain.from_iterable(rollout(self.adapter, rows, plan, speaker=self.say))
            for rows, plan in ((starts[::2], sampling), (starts[1::2], dialogue))
        )
        return [*chain.from_iterable(zip(silent, spoken, strict=True))]

    def say(self, trajectories: Sequence[Trajectory], number: int) -> list[str | None]:
        """Say words that the tokenizer knows: another prompt's."""
        last = len(self.prompts) - 1
        return [
            None
            if t.group == last and number == self.rounds - 2
            else "".join(self.prompts[t.group - 1].pieces())
            for t in trajectories
        ]

    # ---- inputs: three ragged rows

    @property
    def contexts(self) -> list[list[Segment]]:
        """The given segments of the prompts."""
        return [self.adapter.tokenize(prompt) for prompt in self.prompts]

    @property
    def grid(self) -> Grid:
        """The grid of the first prompt; all rows of a call share it."""
        return self.adapter.image_grid(self.prompts[0])

    def texts(self) -> list[TextSegment]:
        """Return likely words as given texts: short and stopped, cut off, long and stopped."""
        cache = self.adapter.prefill(self.contexts)
        logits = self.adapter.next_logits(cache, None, self.active())
        logits[:, self.adapter.stop_token] = -math.inf
        words = logits.topk(4).indices
        stop = words.new_tensor([self.adapter.stop_token])
        return [
            TextSegment(tokens=torch.cat([words[0, :1], stop])),
            TextSegment(tokens=words[1, :3], stopped=False),
            TextSegment(tokens=torch.cat([words[2], stop])),
        ]

    def pictures(self) -> list[Segment]:
        """Return given images that later segments see."""
        if self.is_flow:
            return [
                self.adapter.look(ImageSegment(latent=x, grid=self.grid, is_context=True))
                for x in self.noise(range(3))
            ]
        return [
            self.adapter.look(TokenImageSegment(tokens=row, grid=self.grid, is_context=True))
            for row in self.codes()
        ]

    def codes(self) -> Tensor:
        """Return the codes ``[3, N]`` of discrete images."""
        num = self.grid[0] * self.grid[1]
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.num_codes, (3, num), generator=generator).to(self.device)

    @property
    def num_codes(self) -> int:
        """How many codes a place of a discrete image may hold."""
        return self.image_output(self.adapter.prefill(self.contexts)).shape[-1]

    def history(self) -> list[list[Segment]]:
        """Return what follows the prompts: a text, and an image and another text per further round."""
        texts = self.texts()
        places: list[Sequence[Segment]] = [texts]
        for number in range(1, self.rounds):
            turned = texts[::-1] if number % 2 else texts
            places += [self.pictures(), turned]
        return [list(row) for row in zip(*places, strict=True)]

    # ---- the same segments with other contents

    def others(self, segments: Sequence[Segment], start: int) -> list[Segment]:
        """Return segments of the same lengths from some place on, in which everything is another."""
        found: list[Segment] = []
        for number, segment in enumerate(segments[start:], start):
            if isinstance(segment, TextSegment):
                found.append(self.other_text(segment))
                continue
            image = self.other_image(segments, number)
            if isinstance(image, ImageSegment) and image.states is not None:
                image.states = image.states + 1
            found.append(image)
        return found

    def other_text(self, text: TextSegment) -> TextSegment:
        """Return a text of the same length in which every token but the stop token is another."""
        one, two = self.texts()[2].tokens[:2]
        words = torch.where(text.tokens == one, two, one)
        is_stop = text.tokens == self.adapter.stop_token
        return replace(text, tokens=text.tokens.where(is_stop, words))

    def other_image(
        self, segments: Sequence[Segment], number: int
    ) -> ImageSegment | TokenImageSegment:
        """Return an image whose latent, or every code, is another; its noisy states are the same."""
        image = segments[number]
        found: ImageSegment | TokenImageSegment
        if isinstance(image, ImageSegment):
            found = replace(image, latent=image.latent + 1)
        else:
            assert isinstance(image, TokenImageSegment)
            found = replace(image, tokens=(image.tokens + 1) % self.num_codes)
        if not found.is_context:
            return found
        turn_follows = any(
            isinstance(segment, TextSegment) and not segment.is_sampled
            for segment in segments[number + 1 : number + 2]
        )
        seen: ImageSegment | TokenImageSegment = self.adapter.look(found, turn_follows=turn_follows)
        return seen

    def noise(self, rows: Sequence[int]) -> Tensor:
        """Return ``[B, N, C]`` standard normals, the same for the same row."""
        shape = (self.grid[0] * self.grid[1], self.adapter.latent_channels)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def active(self, rows: Sequence[bool] = (True, True, True)) -> Tensor:
        """Return ``[B]`` bool."""
        return torch.tensor(rows, device=self.device)

    # ---- outputs

    def image_output(self, cache: Cache, rows: Sequence[int] | None = None) -> Tensor:
        """Ask a cache for velocities at different noise levels, or for the first codes' logits."""
        rows = range(len(cache)) if rows is None else rows
        if self.is_flow:
            sigma = torch.tensor([0.9 / (1 + row) for row in rows], device=self.device)
            return self.adapter.velocity(cache, self.noise(rows), sigma, self.grid)
        num = self.grid[0] * self.grid[1]
        codes = torch.full((len(rows), num), -1, device=self.device)
        if not self.is_masked:
            return self.adapter.next_image_logits(cache, codes, 0, self.grid)
        where = torch.ones_like(codes, dtype=torch.bool)
        logits = self.adapter.masked_logits(cache, codes, where, self.grid)
        return logits.view(len(rows), num, -1)

    def image_codes(self, cache: Cache) -> list[TokenImageSegment]:
        """Draw discrete images."""
        num = self.grid[0] * self.grid[1]
        uniforms = torch.linspace(0, 0.99, len(cache) * 2 * num, device=self.device)
        uniforms = uniforms.view(len(cache), 2, num)
        if not self.is_masked:
            return sample_image_tokens(
                self.adapter, cache, uniforms[:, 0], self.grid, temperature=1.0
            )
        return sample_masked_image(
            self.adapter, cache, Independent(uniforms, 3), self.grid, temperature=1.0
        )

    def asked(self, build: Build, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Return what caches know: logits of a new text, word by word, and of an image."""
        cache = build()
        active = torch.ones(len(cache), dtype=torch.bool, device=self.device)
        opened = self.adapter.next_logits(cache, None, active)
        word = torch.full_like(
            active, (self.adapter.stop_token + 1) % opened.shape[1], dtype=torch.long
        )
        second = self.adapter.next_logits(cache, word, active)
        return [opened, second, self.image_output(build(), rows)]

    def differ(self, one: Build, other: Build) -> float:
        """Return how far apart two caches are, by their answers."""
        pairs = zip(self.asked(one), self.asked(other), strict=True)
        return worst([apart(a, b) for a, b in pairs])

    def decoded(self, cache: Cache, texts: Sequence[TextSegment]) -> list[Tensor]:
        """Feed texts word by word, as ``rollout.sample_text`` does; returns log-probabilities."""
        lengths = torch.tensor([len(text.tokens) for text in texts], device=self.device)
        table = nn.utils.rnn.pad_sequence([text.tokens for text in texts], batch_first=True)
        found = []
        logits = self.adapter.next_logits(cache, None, lengths > 0)
        for i, token in enumerate(table.T):
            found.append(token_log_probs(logits, token)[0])
            active = lengths > i + 1
            if active.any():
                logits = self.adapter.next_logits(cache, token, active)
        return [row[:n] for row, n in zip(torch.stack(found, 1), lengths.tolist(), strict=True)]


def apart(a: Tensor, b: Tensor) -> float:
    """Return ``max ||a - b|| / ||b||`` over rows ``[B, *]``, NaN if anything is not finite.

    Where both are -inf they agree: so logits say what must never be drawn.
    """
    if a.shape != b.shape:
        return math.nan
    if not a.numel():
        return 0.0
    never = (a == -math.inf) & (b == -math.inf)
    a, b = a.masked_fill(never, 0), b.masked_fill(never, 0)
    error, size = (a - b).double().flatten(1).norm(dim=1), b.double().flatten(1).norm(dim=1)
    return float((error / size.clamp_min(1e-12)).max())


def scores_apart(a: Scores, b: Scores) -> float:
    """Return the largest disagreement: nats of tokens and codes, relative norms of velocities."""
    errors = [0.0]
    for name in ("text", "entropy", "image_tokens"):
        pairs = zip(getattr(a, name), getattr(b, name), strict=True)
        errors += [nats(x, y) for x, y in pairs]
    errors += [apart(x, y) for x, y in zip(a.velocity, b.velocity, strict=True)]
    return worst(errors)


def nats(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of log-probabilities."""
    if a.shape != b.shape:
        return math.nan
    return float((a - b).abs().max()) if a.numel() else 0.0


def worst(errors: Sequence[float]) -> float:
    """Return the largest error; NaN wins, where ``max`` may lose it."""
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def short_list(names: Sequence[str], most: int = 5) -> str:
    """Name a few things, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def extended(adapter: Adapter, cache: Cache, segments: Sequence[Segment]) -> Cache:
    """Extend a cache and return it."""
    adapter.extend(cache, segments)
    return cache


def trajectory_of(prompt: Prompt, segments: list[Segment]) -> Trajectory:
    """Return a trajectory of one group."""
    return Trajectory(prompt=prompt, segments=segments, group=0, member=0)


def only_first(trajectory: Trajectory, kind: str) -> Trajectory:
    """Return what a plan of one text or one image leaves of a trajectory: the prompt, and that segment."""
    given = trajectory.segments[: trajectory.num_given]
    first = next(
        segment
        for _, segment in sampled([trajectory])
        if isinstance(segment, TextSegment) == (kind == "text")
    )
    return trajectory_of(trajectory.prompt, [*given, first])


def joined(parts: Sequence[Scores]) -> Scores:
    """Return the scores of several calls as those of one."""
    return Scores(
        text=[x for part in parts for x in part.text],
        entropy=[x for part in parts for x in part.entropy],
        velocity=[x for part in parts for x in part.velocity],
        image_tokens=[x for part in parts for x in part.image_tokens],
    )


def last_scores(scores: Scores) -> Scores:
    """Return the last entry of each kind."""
    return Scores(
        text=scores.text[-1:],
        entropy=scores.entropy[-1:],
        velocity=scores.velocity[-1:],
        image_tokens=scores.image_tokens[-1:],
    )


def text_scores(scores: Scores) -> Scores:
    """Return the text part alone."""
    return Scores(text=scores.text, entropy=scores.entropy)


def weighted(parts: Sequence[Tensor]) -> Tensor:
    """Return a sum with fixed random weights, in which errors do not cancel."""
    flat = torch.cat([part.flatten() for part in parts])
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(0))
    return (flat.double() * weights.to(flat.device)).sum()


def image_total(scores: Scores) -> Tensor:
    """Return a weighted sum of everything about images."""
    return weighted([*scores.velocity, *scores.image_tokens])


def flat_gradient(s: Subject) -> tuple[Scores, Tensor]:
    """Return scores and the flat gradient of a weighted sum of all of them."""
    live = [p for p in s.adapter.net.parameters() if p.requires_grad]
    with torch.enable_grad():
        scores = s.adapter(s.trajectories)
        total = image_total(scores) + weighted(scores.text)
        found = torch.autograd.grad(total, live, allow_unused=True, materialize_grads=True)
    return scores, torch.cat([g.flatten() for g in found])


@contextmanager
def with_values(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters other values, and restore them to the bit."""
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
