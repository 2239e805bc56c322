"""Checks of the sampling path: every cache operation, and sampling on top of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lightning_unigrpo.adapter import Cache
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import sigma_schedule
from lightning_unigrpo.rollout import sample_image
from lightning_unigrpo.testing.report import (
    rule,
)
from lightning_unigrpo.testing.subject import (
    Build,
    Subject,
    apart,
    extended,
    worst,
)
from lightning_unigrpo.types import (
    Segment,
)


@rule(
    "rows of a ragged batch, an empty context among them, are what they are alone",
    mend="mask the padding; take lengths and positions per row",
)
def ragged_rows(s: Subject) -> float:
    """Distance between rows together and rows alone."""
    rows: list[list[Segment]] = [[]]
    rows += [c + h[:n] for n, (c, h) in enumerate(zip(s.contexts, s.history(), strict=True))]
    together = s.asked(lambda: s.adapter.prefill(rows))
    errors = []
    for b, row in enumerate(rows):
        alone = s.asked(lambda row=row: s.adapter.prefill([row]), [b])  # type: ignore[misc]
        errors += [apart(x[b : b + 1], y) for x, y in zip(together, alone, strict=True)]
    return worst(errors)


@rule(
    "select and expand make new caches with the rows asked for; neither writes into the other",
    mend="index every tensor of the cache (lengths, positions, open texts too) and copy it",
)
def select_and_expand(s: Subject) -> float:
    """Distance to a prefill of the same rows, and of a used original to an unused one."""
    adapter, contexts = s.adapter, s.contexts

    def fresh() -> Cache:
        return adapter.prefill(contexts)

    def of(rows: Sequence[int]) -> Build:
        return lambda: adapter.prefill([contexts[b] for b in rows])

    def pair(use: int) -> Cache:
        caches = [fresh()]
        caches.append(caches[0].select(torch.arange(3)))
        for _ in range(2):
            opened = adapter.next_logits(caches[use], None, s.active())
            adapter.next_logits(caches[use], opened.argmax(1), s.active())
        return caches[1 - use]

    return worst(
        [
            s.differ(lambda: fresh().select(torch.tensor([2, 0, 0])), of([2, 0, 0])),
            s.differ(lambda: fresh().expand([1, 0, 2]), of([0, 2, 2])),
            s.differ(lambda: pair(0), fresh),
            s.differ(lambda: pair(1), fresh),
            math.nan if len(fresh().expand([1, 0, 2])) != 3 else 0.0,
        ]
    )


@rule(
    "next_logits leaves rows with active=False exactly as they were",
    mend="write keys, lengths and positions of active rows only",
)
def inactive_rows(s: Subject) -> float:
    """Change of a paused row's next two logits by what other rows were fed meanwhile."""
    fed = torch.stack([text.tokens[0] for text in s.texts()])

    def answers(*pauses: tuple[bool, bool, bool]) -> Tensor:
        cache = s.adapter.prefill(s.contexts)
        s.adapter.next_logits(cache, None, s.active())
        for active in pauses:
            s.adapter.next_logits(cache, fed, s.active(active))
        return torch.cat([s.adapter.next_logits(cache, fed, s.active())[:1] for _ in range(2)])

    return apart(answers((False, True, False), (False, True, True)), answers())


@rule(
    "velocity, or masked_logits, leaves the cache as it was",
    mend="use scratch slots, or a copy of keys and values; advance neither lengths nor positions",
)
def velocity_keeps_cache(s: Subject) -> float | None:
    """Change of a cache by asking for velocities, or for logits of masked codes."""
    if not (s.is_flow or s.is_masked):
        return None

    def used() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        for _ in range(2):
            s.image_output(cache)
        return cache

    return s.differ(used, lambda: s.adapter.prefill(s.contexts))


@rule(
    "masked_logits answers for the codes that are asked for, row by row",
    mend="index the logits [B, N, V] with where",
)
def masked_where(s: Subject) -> float | None:
    """Distance of the logits of some codes from those of all."""
    if not s.is_masked:
        return None
    cache, codes = s.adapter.prefill(s.contexts), s.codes()
    codes[:, ::2] = -1
    every = torch.ones_like(codes, dtype=torch.bool)
    some = codes < 0
    some[1] = False
    whole = s.adapter.masked_logits(cache, codes, every, s.grid).unflatten(0, codes.shape)
    return apart(s.adapter.masked_logits(cache, codes, some, s.grid), whole[some])


@rule(
    "extend equals prefill of the longer lists",
    mend="feed the marks of each segment, in every row; advance positions as prefill does",
    per_round=True,
)
def extend_equals_prefill(s: Subject) -> float:
    """Distance between extending segment by segment and reading everything at once."""

    def step_by_step() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        for place in zip(*s.history(), strict=True):
            s.adapter.extend(cache, place)
        return cache

    whole = [c + h for c, h in zip(s.contexts, s.history(), strict=True)]
    return s.differ(step_by_step, lambda: s.adapter.prefill(whole))


@rule(
    "extend completes a text that was decoded into the cache: its last token, a forced stop mark",
    mend="remember per row how much of an open text was fed; feed the rest, then forget it",
)
def extend_after_decoding(s: Subject) -> float:
    """Distance between decode, then extend, and prefill; rows stopped early or were cut."""
    texts = s.texts()

    def walked() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        s.decoded(cache, texts)
        return extended(s.adapter, cache, texts)

    whole = [[*c, text] for c, text in zip(s.contexts, texts, strict=True)]
    return s.differ(walked, lambda: s.adapter.prefill(whole))


@rule(
    "extend after drawing appends the drawn image once, as prefill does",
    mend="forget (or complete) the image in progress before the finished one is appended",
)
def extend_after_drawing(s: Subject) -> float | None:
    """Distance between draw, then extend, and prefill."""
    if s.rounds < 2:
        return None
    pictures: list[Segment] = []

    def walked() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        if s.is_flow:
            s.image_output(cache)
            pictures[:] = s.pictures()
        else:
            drawn = s.image_codes(cache)
            pictures[:] = [s.adapter.look(replace(image, is_context=True)) for image in drawn]
        return extended(s.adapter, cache, pictures)

    walked()
    whole = [[*c, image] for c, image in zip(s.contexts, pictures, strict=True)]
    return s.differ(walked, lambda: s.adapter.prefill(whole))


@rule(
    "the image depends on the reasoning: other words, another image",
    mend="show the sampled text to the image block",
    bound=1e-6,
    at_least=True,
)
def image_sees_text(s: Subject) -> float:
    """Change of the image's answer between two reasoning texts of the same length."""
    text = s.texts()[2]
    other = replace(text, tokens=torch.cat([text.tokens[:-1].flip(0), text.tokens[-1:]]))
    [one, two] = [
        s.image_output(s.adapter.prefill([[*s.contexts[0], words]]), [0]) for words in (text, other)
    ]
    return apart(one, two)


@rule(
    "integrating with eta 0 is a plain Euler loop over velocity, from a fresh cache each time",
    mend="velocity must depend on its arguments alone and leave no trace in the cache",
)
def ode_at_eta_0(s: Subject) -> float | None:
    """Distance of an evaluation, and of an SDE with hardly any noise, from the Euler loop."""
    if not s.is_flow:
        return None
    sigmas = sigma_schedule(5, shift=3.0, convention="steps").to(s.device)
    x = noise = s.noise(range(3))
    for sigma, sigma_next in pairwise(sigmas):
        cache = s.adapter.prefill(s.contexts)
        x = x - (sigma - sigma_next) * s.adapter.velocity(cache, x, sigma.expand(3), s.grid)
    errors = []
    for windows in (None, [range(b, b + 2) for b in range(3)]):
        images = sample_image(
            s.adapter,
            s.adapter.prefill(s.contexts),
            noise,
            sigmas,
            s.grid,
            windows=windows,
            window_noise=s.noise([3, 4]).expand(3, -1, -1, -1),
            sampling=Sampling(eta=s.atol / 10),
        )
        errors.append(apart(torch.stack([image.latent for image in images]), x))
    return worst(errors)
