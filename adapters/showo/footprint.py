"""How much memory a Show-o rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.footprint import Gathered
from lightning_unigrpo.adapters.showo.config import ShowOConfig
from lightning_unigrpo.config import Sampling, num_steps
from lightning_unigrpo.masked import mask_ratios

FLOAT32 = 4
"""Bytes."""
SPARE = 2
"""Slots that a rollout reserves for marks around a text, which this layout has not."""


class Rows(NamedTuple):
    """How many a prompt and its images take."""

    given: int
    """Words of the prompt."""
    prefix: int
    """Words that an image is drawn behind, at most."""
    codes: int
    """Of an image."""


def footprint(
    config: ShowOConfig,
    sampling: Sampling,
    rows: Rows,
    *,
    gradient_checkpointing: bool,
    dtype: torch.dtype,
    weights: torch.dtype,
) -> Footprint:
    """Return the bytes per trajectory of rollouts whose texts are as long as allowed.

    Copies of the weights that autocast makes are not counted: they are the same for any number of rows.

    Args:
        config: sizes.
        sampling: plan, lengths, window.
        rows: of the prompt and of images.
        gradient_checkpointing: whether layers are recomputed.
        dtype: of matrix products.
        weights: dtype of the weights, which the residual stream is in.
    """
    phi: Any = config.phi()
    size, stream = (torch.finfo(each).bits // 8 for each in (dtype, weights))
    size = min(size, stream)  # without autocast products are in the weights' dtype
    counts = _count(sampling, rows)
    d, ff, layers = phi.hidden_size, phi.intermediate_size, phi.num_hidden_layers
    sizes = cache_sizes(phi)
    kv = sizes.num_heads * sizes.head_dim
    # And the logits of the next word: those remembered, a copy handed out, and new ones.
    slots = counts.capacity + counts.beside
    cache = slots * layers * 2 * kv * size + 3 * config.num_words * FLOAT32
    window, drawn, image = sampling.window_size, len(counts.prefixes), rows.codes + 2
    states = drawn * window * image
    context = counts.gathered.context
    total = context + sum(counts.prefixes) + states
    dense = total * total <= attention.DENSE_LIMIT
    # Samples are padded to each other: with masks only what states see is.
    samples, widest = 1 + drawn, max(context, *counts.prefixes, 0)
    if dense:
        padded = samples * widest + states
        keys = padded + drawn * window * widest
    else:
        longest = max(context, *(before + window * image for before in counts.prefixes), 0)
        padded = samples * longest
        keys = counts.gathered.keys
    # Queries and keys before their norms, what attention finds, as rows; the MLP and its tanh; means and
    # deviations of three norms, sums of attention. Queries, and what attention finds, in its own order.
    per_row = _norm(d, size, stream) + (3 * d + 5 * ff) * size + (2 + 5 * sizes.num_heads) * FLOAT32
    layer = total * per_row + (padded + (padded if dense else total)) * d * size
    layer += keys * 2 * kv * size + (0 if dense else counts.gathered.masks * size)
    kept = layer * layers
    if gradient_checkpointing:
        kept = total * d * stream * layers + layer
    kept += total * d * stream + counts.words * (d * size + config.num_words * FLOAT32)
    asked = drawn * _revealed(rows.codes, sampling) if drawn else 0
    kept += asked * (d * size + config.codebook_size * FLOAT32)
    turned = int(sizes.head_dim * phi.rope_parameters["partial_rotary_factor"])
    kept += total * 2 * turned * stream  # cosines and sines
    if dense:
        kept += (samples * widest**2 + states * (widest + image)) * size  # masks
    return Footprint(cache=cache, activations=kept)


class _Counts(NamedTuple):
    """What a trajectory of the longest texts comes to."""

    gathered: Gathered
    """Rows of words, and of images that are looked at; what each sample's blocks gather."""
    words: int
    """Sampled."""
    prefixes: list[int]
    """Words before each image."""
    capacity: int
    """Slots of the cache of words."""
    beside: int
    """Slots of the cache of an image."""


def _count(sampling: Sampling, rows: Rows) -> _Counts:
    gathered, image = Gathered(), rows.codes + 2
    gathered.seen(rows.given)
    capacity = spoken = rows.given
    prefixes: list[int] = []
    heard = 0
    for step in sampling.steps:
        if step.kind != "image":
            spare = SPARE if step.kind == "text" else 0
            capacity = max(capacity, gathered.context + step.max_tokens + spare)
            gathered.seen(step.max_tokens)
            spoken += step.max_tokens
            heard += step.max_tokens if step.kind == "turn" else 0
            continue
        prefixes.append(min(rows.prefix, spoken + 2))  # the task before bos, and eos
        if step.is_seen:
            gathered.seen(image, causal=False)
            gathered.seen(1)  # bos behind it
            capacity = max(capacity, gathered.context)
    for before in prefixes:
        alone = Gathered()
        alone.seen(before)
        alone.hidden(image, copies=sampling.window_size)
        gathered.keys, gathered.masks = gathered.keys + alone.keys, gathered.masks + alone.masks
    return _Counts(
        gathered=gathered,
        words=spoken - heard - rows.given,
        prefixes=prefixes,
        capacity=capacity,
        beside=max((n + image for n in prefixes), default=0),
    )


def _revealed(num_codes: int, sampling: Sampling) -> int:
    """Return how many codes a window reveals, wherever it lies: as many as are expected, and 4 deviations."""
    steps = num_steps(sampling.num_timesteps, sampling.schedule)
    ratios, (low, high) = mask_ratios(steps).tolist(), sampling.window_range
    starts = range(low, max(low, min(high, steps) - sampling.window_size) + 1)
    ends = (min(start + sampling.window_size, steps) for start in starts)
    share: float = max(ratios[start] - ratios[end] for start, end in zip(starts, ends, strict=True))
    spread = 4 * math.sqrt(num_codes * share * (1 - share))
    return min(num_codes, math.ceil(num_codes * share + spread))


def _norm(d: int, size: int, stream: int) -> int:
    """Return the bytes that a layer's norm of ``d`` numbers and what reads it take.

    The input, and its result; in mixed precision a copy of it for each of four projections.
    """
    if size < FLOAT32 <= stream:
        return d * FLOAT32 + 4 * d * size
    return 2 * d * size
