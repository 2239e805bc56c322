"""Draw trajectories: tokens, then an image, then whatever the plan says next, until it is done.

Everything random is drawn before it is needed, on the CPU, from a key (seed, iteration, prompt,
member, place in the plan, phase). So the placement of a group on ranks, the composition of a batch,
the device and a resume do not change what is drawn, and checkpoints hold no generator state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from lightning_unigrpo.adapter import Adapter, Cache, token_log_probs
from lightning_unigrpo.config import Sampling, Step, num_steps
from lightning_unigrpo.flow import draw_window, ode_step, sde_step, sigma_schedule
from lightning_unigrpo.masked import Confident, Independent, Unmasking
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Round,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)`` while a rollout runs."""
Listener: TypeAlias = Callable[[Tensor, Tensor], None]
"""Called as ``heard(tokens, active)`` after every token of a text: ``[B, L]`` int64, the tokens drawn so far,
and ``[B]`` bool, the rows to which the last one belongs."""
Speaker: TypeAlias = Callable[[Sequence[Trajectory], int], Sequence[str | None]]
"""Called as ``speaker(trajectories, number)`` with trajectories as they stand, and the number of the turn
from 0; returns what the user says to each, or None where there is nothing left to say."""

_TOKENS, _LATENT, _WINDOW = range(3)


class Start(NamedTuple):
    """Where one trajectory begins."""

    prompt: Prompt
    group: int
    member: int


class Draws:
    """The random numbers of one collection, each a pure function of its key."""

    def __init__(self, seed: int, iteration: int) -> None:
        self.key = (seed, iteration)

    def _generator(self, start: Start, place: int, phase: int) -> np.random.Generator:
        key = (*self.key, start.prompt.id, start.member, place, phase)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def uniforms(self, starts: Sequence[Start], place: int, count: int) -> Tensor:
        """Return ``[B, count]`` float64 in [0, 1), one per token that may be drawn."""
        rows = [self._generator(start, place, _TOKENS).random(count) for start in starts]
        return torch.from_numpy(np.stack(rows))

    def normals(
        self, starts: Sequence[Start], place: int, phase: int, shape: tuple[int, ...]
    ) -> Tensor:
        """Return ``[B, *shape]`` float32 standard normals."""
        rows = [
            self._generator(start, place, phase).standard_normal(shape, dtype=np.float32)
            for start in starts
        ]
        return torch.from_numpy(np.stack(rows))


def draw_tokens(
    logits: Tensor, uniforms: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Draw tokens by inverting the cumulative distribution at given uniforms.

    ``token = min {i : sum_{j<=i} softmax(logits / temperature)_j > u}``

    Args:
        logits: ``[*, V]``.
        uniforms: ``[*]`` in [0, 1); ``None`` takes the most probable token.
        temperature: > 0, of the distribution that is drawn from and scored.

    Returns:
        Tokens ``[*]`` int64 and their log-probabilities ``[*]`` float32, nats.

    Example:
        >>> logits = torch.tensor([[0.25, 0.75]]).log()
        >>> draw_tokens(logits, torch.tensor([0.2]), 1.0)[0], draw_tokens(logits, torch.tensor([0.3]), 1.0)[0]
        (tensor([0]), tensor([1]))
    """
    if uniforms is None:
        tokens = logits.argmax(-1)
    else:
        # float64: a float32 cumulative sum over 150,000 tokens would lose the rare ones.
        cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
        total = cdf[..., -1]
        # Rounding must not push the target to the total, where only impossible tokens are left.
        target = torch.minimum(uniforms.to(cdf) * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cdf, target.unsqueeze(-1), right=True).squeeze(-1)
    return tokens, token_log_probs(logits, tokens, temperature=temperature)[0]


def restrict(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Make all but the most probable tokens impossible; for evaluation.

    Args:
        logits: ``[B, V]``, tempered.
        top_k: how many tokens stay; ``None`` = all.
        top_p: probability that those that stay have together; 1 = all.

    Returns:
        ``[B, V]`` with -inf at the others.
    """
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    ids: Any = None  # what was drawn before does not matter to either
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(ids, logits)
    return TopPLogitsWarper(top_p)(ids, logits) if top_p < 1 else logits


def sample_text(
    adapter: Adapter,
    cache: Cache,
    uniforms: Tensor | None,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    progress: Progress | None = None,
    heard: Listener | None = None,
) -> list[TextSegment]:
    """Decode one text in every row until its stop token or the length limit.

    Args:
        adapter: the policy.
        cache: of B rows; afterwards it holds the texts but for their last token.
        uniforms: ``[B, max_tokens]`` in [0, 1); ``None`` decodes greedily.
        max_tokens: length limit, stop token included.
        temperature: of the draws, > 0.
        top_k: tokens to choose from, for evaluation; log-probabilities are then of these only.
        top_p: likewise, the probability they have together.
        progress: told the number of tokens decoded so far.
        heard: told the tokens themselves.

    Returns:
        B sampled segments.
    """
    active, limited = torch.ones(len(cache), dtype=torch.bool), top_k is not None or top_p < 1
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    lengths = torch.zeros(len(cache), dtype=torch.long)
    cache.reserve(max_tokens + 2)  # and the marks that open and close it
    logits = adapter.next_logits(cache, None, active)
    active, lengths = active.to(logits.device), lengths.to(logits.device)
    for i in range(max_tokens):
        u = None if uniforms is None else uniforms[:, i].to(logits.device)
        tempered = restrict(logits / temperature, top_k, top_p) if limited else logits
        token, log_prob = draw_tokens(tempered, u, 1.0 if limited else temperature)
        tokens.append(token)
        log_probs.append(log_prob)
        lengths += active
        if heard is not None:
            heard(torch.stack(tokens, 1), active)
        active = active & (token != adapter.stop_token)
        if progress is not None:
            progress("text", i + 1, max_tokens)
        if i + 1 == max_tokens or not bool(active.any()):
            break
        logits = adapter.next_logits(cache, token, active)
    table, scores = torch.stack(tokens, 1), torch.stack(log_probs, 1)  # [B, L]
    return [
        TextSegment(
            tokens=table[b, :length],
            log_prob=scores[b, :length],
            stopped=not running,
            temperature=temperature,
        )
        for b, (length, running) in enumerate(zip(lengths.tolist(), active.tolist(), strict=True))
    ]


def sample_image(
    adapter: Adapter,
    cache: Cache,
    noise: Tensor,
    sigmas: Tensor,
    grid: Grid,
    *,
    windows: Sequence[range] | None = None,
    window_noise: Tensor | None = None,
    sampling: Sampling,
    unconditional: Any | None = None,
    progress: Progress | None = None,
) -> list[ImageSegment]:
    """Integrate dx = v dsigma from noise to data: ODE steps, and SDE steps inside each row's window.

    Args:
        adapter: the policy.
        cache: of B rows, left as it was.
        noise: ``[B, N, C]`` float32, x at sigma 1.
        sigmas: ``[T+1]`` float32, descending from 1 to 0.
        grid: ``(h, w)`` of all rows.
        windows: B ranges of equal length K; ``None`` = ODE throughout (evaluation).
        window_noise: ``[B, K, N, C]`` float32 for the SDE steps.
        sampling: kind and eta of the SDE, guidance scale.
        unconditional: from ``adapter.guidance``, for guided evaluation; ``None`` = no guidance.
        progress: told the number of denoising steps done.

    Returns:
        B segments, with the window's states when ``windows`` is given.
    """
    x, num = noise, len(sigmas) - 1
    record = _Window(windows, x) if windows is not None else None
    for i in range(num):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        if unconditional is None:
            velocity = adapter.velocity(cache, x, sigma.expand(len(x)), grid)
        else:
            velocity = adapter.guided_velocity(
                cache, unconditional, x, sigma.expand(len(x)), grid, scale=sampling.guidance_scale
            )
        x_next = ode_step(velocity, x, sigma, sigma_next)
        if record is not None and window_noise is not None and record.covers(i):
            rows, k = record.rows(i)
            x_next[rows] = sde_step(
                velocity[rows],
                x[rows],
                sigma,
                sigma_next,
                window_noise[rows, k],
                eta=sampling.eta,
                kind=sampling.sde,
                first=i == 0,
            )
            record.write(rows, k, x, velocity, x_next)
        x = x_next
        if progress is not None:
            progress("denoise", i + 1, num)
    if record is None or window_noise is None:
        return [ImageSegment(latent=row, grid=grid) for row in x]
    return record.segments(x, sigmas, window_noise, grid)


class _Window:
    """States and velocities of the SDE steps, row by row."""

    def __init__(self, windows: Sequence[range], x: Tensor) -> None:
        self.starts = torch.tensor([window.start for window in windows])
        self.size = len(windows[0])
        self.steps = {i for window in windows for i in window}
        shape = (len(x), self.size + 1, *x.shape[1:])
        self.states, self.velocity = x.new_empty(shape), x.new_empty(shape)[:, 1:]

    def covers(self, step: int) -> bool:
        return step in self.steps

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        offset = step - self.starts
        rows = ((offset >= 0) & (offset < self.size)).nonzero().squeeze(1)
        return rows, offset[rows]

    def write(self, rows: Tensor, k: Tensor, x: Tensor, velocity: Tensor, x_next: Tensor) -> None:
        self.states[rows, k] = x[rows]
        self.velocity[rows, k] = velocity[rows]
        self.states[rows, k + 1] = x_next[rows]

    def segments(self, x: Tensor, sigmas: Tensor, noise: Tensor, grid: Grid) -> list[ImageSegment]:
        return [
            ImageSegment(
                latent=x[b],
                grid=grid,
                start=start,
                states=self.states[b],
                sigmas=sigmas[start : start + self.size + 1],
                noise=noise[b],
                velocity=self.velocity[b],
            )
            for b, start in enumerate(self.starts.tolist())
        ]


def sample_image_tokens(
    adapter: Adapter,
    cache: Cache,
    uniforms: Tensor,
    grid: Grid,
    *,
    temperature: float,
    unconditional: Any | None = None,
    guidance_scale: float = 1.0,
    progress: Progress | None = None,
) -> list[TokenImageSegment]:
    """Draw the codes of one discrete image in every row, one after the other.

    Args:
        adapter: the policy.
        cache: of B rows.
        uniforms: ``[B, N]`` in [0, 1), one per code.
        grid: ``(h, w)`` of all rows, ``h * w = N``.
        temperature: of the draws, > 0.
        unconditional: from ``adapter.guidance``, for guided evaluation; ``None`` = no guidance.
        guidance_scale: of guided evaluation.
        progress: told the number of codes drawn.

    Returns:
        B sampled segments.
    """
    num_rows, num = uniforms.shape
    tokens = torch.full((num_rows, num), -1, dtype=torch.long, device=uniforms.device)
    log_prob = torch.zeros(num_rows, num, device=tokens.device)
    for step in range(num):
        if unconditional is None:
            logits = adapter.next_image_logits(cache, tokens, step, grid)
        else:
            logits = adapter.guided_image_logits(
                cache, unconditional, tokens, step, grid, scale=guidance_scale
            )
        tokens[:, step], log_prob[:, step] = draw_tokens(logits, uniforms[:, step], temperature)
        if progress is not None:
            progress("image tokens", step + 1, num)
    return [
        TokenImageSegment(
            tokens=tokens[b], grid=grid, log_prob=log_prob[b], temperature=temperature
        )
        for b in range(num_rows)
    ]


def sample_masked_image(
    adapter: Adapter,
    cache: Cache,
    unmasking: Unmasking,
    grid: Grid,
    *,
    temperature: float,
    windows: Sequence[range] | None = None,
    unconditional: Any | None = None,
    guidance_scale: float = 1.0,
    progress: Progress | None = None,
) -> list[TokenImageSegment]:
    """Reveal the codes of one masked image in every row, some at each step.

    Args:
        adapter: the policy.
        cache: of B rows, left as it was.
        unmasking: says which codes a step reveals, and holds the random numbers.
        grid: ``(h, w)`` of all rows, ``h * w = N``.
        temperature: of the draws, > 0.
        windows: B ranges of steps whose codes are scored; ``None`` = all.
        unconditional: from ``adapter.guidance``, for guided evaluation; ``None`` = no guidance.
        guidance_scale: of guided evaluation.
        progress: told the number of steps done.

    Returns:
        B sampled segments.
    """
    tokens = torch.full_like(unmasking.values(0), -1, dtype=torch.long)
    step_of, log_prob = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float32)
    for step in range(unmasking.num_steps):
        where = unmasking.asked(tokens < 0, step)
        if unconditional is None:
            logits = adapter.masked_logits(cache, tokens, where, grid)
        else:
            logits = adapter.guided_masked_logits(
                cache, unconditional, tokens, where, grid, scale=guidance_scale
            )
        drawn, scores = draw_tokens(logits, unmasking.values(step)[where], temperature)
        candidate = tokens.masked_scatter(where, drawn)
        score = log_prob.masked_scatter(where, scores.to(log_prob.dtype))
        kept = unmasking.kept(where, score, step)
        tokens, log_prob = candidate.where(kept, tokens), score.where(kept, log_prob)
        step_of = step_of.masked_fill(kept, step)
        if progress is not None:
            progress("image tokens", step + 1, unmasking.num_steps)
    prefixes = adapter.image_prefix(cache)
    images = [
        TokenImageSegment(
            tokens=tokens[b],
            grid=grid,
            prefix=None if prefixes is None else prefixes[b],
            step=step_of[b],
            window=None if windows is None else (windows[b].start, windows[b].stop),
            temperature=temperature,
        )
        for b in range(len(tokens))
    ]
    for image, known in zip(images, log_prob, strict=True):
        image.log_prob = known[image.scored]
    return images


@torch.no_grad()
def rollout(
    adapter: Adapter,
    starts: Sequence[Start],
    sampling: Sampling,
    *,
    iteration: int = 0,
    evaluate: bool = False,
    every_image: bool = False,
    speaker: Speaker | None = None,
    progress: Progress | None = None,
    heard: Listener | None = None,
) -> Iterator[list[Trajectory]]:
    """Yield finished trajectories, chunk by chunk, in the order of ``starts``.

    A prompt that several consecutive starts share is read once and its cache expanded. A trajectory ends with
    the plan, with a text that says ``sampling.stop_phrase``, or where the user has nothing left to say.

    Args:
        adapter: the policy, in eval mode.
        starts: prompt, group and member of each trajectory.
        sampling: the plan and its settings.
        iteration: part of the key of every draw.
        evaluate: greedy text (or ``sampling.eval_temperature``), ODE with
            ``sampling.eval_num_timesteps``, guidance if asked for, and no window.
        every_image: decode every image that is drawn (``Trajectory.rounds``), or only the last.
        speaker: says the turns of the plan.
        progress: told what is being drawn and how far it is.
        heard: told the tokens of the texts while they are drawn.

    Yields:
        Lists of at most ``sampling.rows_per_chunk`` trajectories with decoded images and texts.

    Raises:
        ValueError: when a turn is longer than ``sampling.max_turn_tokens``, or nobody says it.
    """
    size = sampling.rows_per_chunk or max(1, len(starts))
    for first in range(0, len(starts), size):
        chunk = starts[first : first + size]
        drawn = _Chunk(
            adapter, chunk, sampling, iteration, evaluate, speaker, progress, heard
        ).run()
        decode_images(adapter, drawn, every=every_image and sampling.num_images > 1)
        yield drawn


class _Chunk:
    """Rows that are drawn together, and how far they are."""

    def __init__(
        self,
        adapter: Adapter,
        starts: Sequence[Start],
        sampling: Sampling,
        iteration: int,
        evaluate: bool,
        speaker: Speaker | None = None,
        progress: Progress | None = None,
        heard: Listener | None = None,
    ) -> None:
        self.adapter, self.starts, self.sampling = adapter, starts, sampling
        self.iteration, self.evaluate = iteration, evaluate
        self.speaker, self.progress, self.heard = speaker, progress, heard
        self.seed = sampling.seed or 0
        self.draws = Draws(self.seed, iteration)
        self.steps = sampling.steps

    def run(self) -> list[Trajectory]:
        runs = [(p, len(list(run))) for p, run in groupby(s.prompt for s in self.starts)]
        given = [self.adapter.tokenize(prompt) for prompt, _ in runs]
        counts = [count for _, count in runs]
        cache = self.adapter.prefill(given).expand(counts)
        beginnings = [segments for segments, n in zip(given, counts, strict=True) for _ in range(n)]
        done = [
            Trajectory(
                prompt=s.prompt,
                segments=[*segments],
                num_given=len(segments),
                group=s.group,
                member=s.member,
            )
            for s, segments in zip(self.starts, beginnings, strict=True)
        ]
        self.rows = [*done]
        self.device = next(self.adapter.net.parameters()).device
        for place, step in enumerate(self.steps):
            new = self._draw(cache, place, step)
            for row, segment in zip(self.rows, new, strict=True):
                row.segments += [segment] if segment is not None else []
                row.completion = "\n".join(text.words for text in row.texts)
            going = [n for n, segment in enumerate(new) if self._goes_on(segment, step)]
            if not going or place + 1 == len(self.steps):
                break
            if len(going) < len(new):
                cache = cache.select(torch.tensor(going, device=self.device))
                self.starts = [self.starts[n] for n in going]
                self.rows = [self.rows[n] for n in going]
            self.adapter.extend(cache, [cast(Segment, new[n]) for n in going])
        return done

    def _draw(self, cache: Cache, place: int, step: Step) -> Sequence[Segment | None]:
        """Return the next segment of each row, None where there is none."""
        kinds = [each.kind for each in self.steps]
        if step.kind == "turn":
            return self._turn(kinds[:place].count("turn"))
        if step.kind == "text":
            return self._text(cache, place, step)
        return self._image(
            cache, place, step, turn_follows=kinds[place + 1 : place + 2] == ["turn"]
        )

    def _goes_on(self, segment: Segment | None, step: Step) -> bool:
        """Whether anything follows: the policy may end a dialogue that has an image, the user any."""
        phrase = self.sampling.stop_phrase
        if phrase is None or step.kind != "text" or step.round == 0:
            return segment is not None
        return isinstance(segment, TextSegment) and phrase not in segment.words

    def _turn(self, number: int) -> list[Segment | None]:
        if self.speaker is None:
            raise ValueError(
                "sampling.plan has a 'turn', but nobody says it: give model.turns, or leave it out."
            )
        if getattr(self.speaker, "needs_images", True):
            decode_images(self.adapter, self.rows, every=False)
        turns = self.speaker(self.rows, number)
        if self.progress is not None:
            self.progress("turn", len(turns), len(turns))
        return [
            None if words is None else said(self.adapter, words, row.segments[-1], self.sampling)
            for words, row in zip(turns, self.rows, strict=True)
        ]

    def _text(self, cache: Cache, place: int, step: Step) -> Sequence[TextSegment]:
        s = self.sampling
        temperature = s.eval_temperature if self.evaluate else s.temperature
        greedy = temperature == 0
        texts = sample_text(
            self.adapter,
            cache,
            None if greedy else self.draws.uniforms(self.starts, place, step.max_tokens),
            max_tokens=step.max_tokens,
            temperature=1.0 if greedy else temperature,
            top_k=s.eval_top_k if self.evaluate else None,
            top_p=s.eval_top_p if self.evaluate else 1.0,
            progress=self.progress,
            heard=self.heard,
        )
        for text in texts:
            text.words = self.adapter.detokenize(text.tokens)
        return texts

    def _image(
        self, cache: Cache, place: int, step: Step, *, turn_follows: bool
    ) -> Sequence[Segment]:
        """Draw the images grid by grid: the rows of one network call share it."""
        grids = [self.adapter.image_grid(start.prompt) for start in self.starts]
        images: list[Segment | None] = [None] * len(grids)
        for grid in dict.fromkeys(grids):
            members = [b for b, g in enumerate(grids) if g == grid]
            whole = len(members) == len(grids)
            rows = cache if whole else cache.select(torch.tensor(members))
            drawn = self._one_grid(rows, members, place, grid)
            for b, image in zip(members, drawn, strict=True):
                image.is_context = step.is_seen
                images[b] = (
                    self.adapter.look(image, turn_follows=turn_follows) if step.is_seen else image
                )
        return cast(list[Segment], images)

    def _one_grid(
        self, cache: Cache, members: list[int], place: int, grid: Grid
    ) -> Sequence[ImageSegment | TokenImageSegment]:
        s, starts, num = self.sampling, [self.starts[b] for b in members], grid[0] * grid[1]
        guided = self.evaluate and s.guidance_scale != 1
        unconditional = (
            self.adapter.guidance([self.rows[b].segments for b in members]) if guided else None
        )
        if self.adapter.image_policy == "masked":
            return self._masked(cache, starts, place, grid, unconditional)
        if self.adapter.image_policy == "tokens":
            return sample_image_tokens(
                self.adapter,
                cache,
                self.draws.uniforms(starts, place, num).to(self.device),
                grid,
                temperature=1.0 if self.evaluate else s.temperature,
                unconditional=unconditional,
                guidance_scale=s.guidance_scale,
                progress=self.progress,
            )
        timesteps = s.eval_num_timesteps if self.evaluate else s.num_timesteps
        sigmas = sigma_schedule(timesteps, shift=s.shift, convention=s.schedule).to(self.device)
        shape = (num, self.adapter.latent_channels)
        noise = self.draws.normals(starts, place, _LATENT, shape).to(self.device)
        if self.evaluate:
            return sample_image(
                self.adapter,
                cache,
                noise,
                sigmas,
                grid,
                sampling=s,
                unconditional=unconditional,
                progress=self.progress,
            )
        window_noise = self.draws.normals(starts, place, _WINDOW, (s.window_size, *shape))
        return sample_image(
            self.adapter,
            cache,
            noise,
            sigmas,
            grid,
            windows=[self._window(start, place, len(sigmas) - 1) for start in starts],
            window_noise=window_noise.to(self.device),
            sampling=s,
            progress=self.progress,
        )

    def _masked(
        self, cache: Cache, starts: Sequence[Start], place: int, grid: Grid, unconditional: Any
    ) -> Sequence[TokenImageSegment]:
        s, num = self.sampling, grid[0] * grid[1]
        timesteps = s.eval_num_timesteps if self.evaluate else s.num_timesteps
        count = num_steps(timesteps, s.schedule)
        is_confident = (s.eval_reveal if self.evaluate else s.reveal) == "confident"
        shape = (count, 2, num) if is_confident else (2, num)
        uniforms = self.draws.uniforms(starts, place, math.prod(shape)).to(self.device)
        uniforms = uniforms.unflatten(1, shape)
        return sample_masked_image(
            self.adapter,
            cache,
            Confident(uniforms, s.reveal_temperature)
            if is_confident
            else Independent(uniforms, count),
            grid,
            temperature=1.0 if self.evaluate else s.temperature,
            # One step more than there are: the last may be trained as well as any other.
            windows=None
            if self.evaluate
            else [self._window(start, place, count + 1) for start in starts],
            unconditional=unconditional,
            guidance_scale=s.guidance_scale,
            progress=self.progress,
        )

    def _window(self, start: Start, place: int, num_steps: int) -> range:
        s = self.sampling
        return draw_window(
            num_steps,
            size=s.window_size,
            low=s.window_range[0],
            high=s.window_range[1],
            mode=s.window_mode,
            seed=self.seed,
            step=self.iteration,
            group=start.group,
            image=self.steps[place].round,
        )


def said(adapter: Adapter, words: str, behind: Segment, sampling: Sampling) -> TextSegment:
    """Return a turn of the user behind a segment.

    Raises:
        ValueError: when it is too long.
    """
    turn, limit = adapter.turn(words, behind), sampling.max_turn_tokens
    if len(turn.tokens) > limit:
        raise ValueError(
            f"The turn {words[:80]!r} takes {len(turn.tokens)} tokens, more than sampling.max_turn_tokens "
            f"{limit}: raise it, or say less (model.turns)."
        )
    turn.words = words
    return turn


def decode_images(adapter: Adapter, trajectories: Sequence[Trajectory], *, every: bool) -> None:
    """Turn images of trajectories into pixels.

    Args:
        adapter: decodes them.
        trajectories: get their last ``image``, where they have one.
        every: whether every image, as their ``rounds``.
    """
    places = [
        [
            place
            for place, segment in enumerate(t.segments)
            if place >= t.num_given and not isinstance(segment, TextSegment)
        ]
        for t in trajectories
    ]
    wanted = [
        (t, place)
        for t, each in zip(trajectories, places, strict=True)
        for place in (each if every else each[-1:])
    ]
    pixels = _pixels(adapter, [t.segments[place] for t, place in wanted])
    for (trajectory, place), image in zip(wanted, pixels, strict=True):
        trajectory.image = image
        if every:
            texts = replace(trajectory, segments=trajectory.segments[:place]).texts
            words = "\n".join(text.words for text in texts)
            trajectory.rounds.append(Round(image, words, place + 1))


def _pixels(adapter: Adapter, images: Sequence[Any]) -> list[Tensor]:
    """Decode grid by grid: the rows of one call share it."""
    found: dict[int, Tensor] = {}
    for grid in dict.fromkeys(image.grid for image in images):
        members = [b for b, image in enumerate(images) if image.grid == grid]
        codes = [
            images[b].latent if isinstance(images[b], ImageSegment) else images[b].tokens
            for b in members
        ]
        found |= zip(members, adapter.decode(torch.stack(codes), grid), strict=True)
    return [found[b] for b in range(len(images))]
