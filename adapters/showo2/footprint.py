"""How much memory a Show-o2 rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.footprint import Gathered
from lightning_unigrpo.adapters.showo2.config import ShowO2Config
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import Grid

FLOAT32 = 4
"""Bytes."""


class Rows(NamedTuple):
    """How many a prompt and its images take."""

    given: int
    """Words and pictures of the prompt."""
    squares: int
    """Of latents, in the pictures of the prompt."""
    grid: Grid
    """Latents of a drawn image."""


class Bytes(NamedTuple):
    """Of one number."""

    product: int
    """In matrix products."""
    stream: int
    """In the language model's residual stream; the flow stack's is float32."""


class _Counts(NamedTuple):
    """What a trajectory of the longest texts comes to."""

    gathered: Gathered
    noise: int
    """Rows of images being drawn."""
    blocks: int
    """Images being drawn, one for each step of a window."""
    seen: int
    """Drawn images that are looked at."""
    words: int
    """Sampled."""
    capacity: int
    """Slots of a cache."""


def footprint(
    config: ShowO2Config,
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
        weights: dtype of the weights.
    """
    product, stream = (torch.finfo(each).bits // 8 for each in (dtype, weights))
    each = Bytes(
        min(product, stream), stream
    )  # without autocast products are in the weights' dtype
    image, qwen = config.num_rows(rows.grid), config.qwen()
    counts = _count(sampling, rows, image)
    context = counts.gathered.context
    d, vocabulary = qwen.hidden_size, qwen.vocab_size
    language = cache_sizes(qwen)
    pairs = sum(layers * 2 * heads * size for layers, heads, size in (language, config.flow_sizes))
    cache = counts.capacity * pairs * each.product + 3 * vocabulary * FLOAT32  # and what comes next
    total, squares = context + counts.noise, rows.squares
    squares += (counts.blocks + counts.seen) * (image - 1)
    dense = total * total <= attention.DENSE_LIMIT
    # Each block of noise gathers what it sees; without masks every other block does, too.
    keys = total + counts.blocks * context if dense else counts.gathered.keys
    masks = 0 if dense else counts.gathered.masks * each.product
    layers = (
        (
            language.num_layers,
            masks + _language_layer(config, total, keys, each),
            total * d * stream,
        ),
        (
            config.flow.layers,
            masks + _flow_layer(config, total, keys, each),
            total * config.flow.width * 4,
        ),
        (
            config.semantic.layers,
            squares * _semantic_square(config, each),
            squares * config.semantic.width * each.product,
        ),
    )
    if gradient_checkpointing:
        kept = sum(num * held for num, _, held in layers) + max(layer for _, layer, _ in layers)
    else:
        kept = sum(num * layer for num, layer, _ in layers)
    kept += total * _between(config, each) + squares * _ends(config, each)
    kept += counts.words * (d * each.product + vocabulary * FLOAT32)
    if dense:
        kept += (context**2 + counts.noise * (context + image)) * each.product
    return Footprint(cache=cache, activations=kept)


def _count(sampling: Sampling, rows: Rows, image: int) -> _Counts:
    gathered, capacity = Gathered(), rows.given
    gathered.seen(rows.given - rows.squares)
    gathered.seen(rows.squares, causal=False)
    blocks = seen = words = 0
    for step in sampling.steps:
        if step.kind != "image":
            gathered.seen(step.max_tokens)
            words += step.max_tokens if step.kind == "text" else 0
        else:
            gathered.seen(1)  # the mark before it
            blocks += sampling.window_size
            capacity = max(capacity, gathered.context + image)
            gathered.hidden(image, copies=sampling.window_size)
            if step.is_seen:
                gathered.seen(image, causal=False)
                gathered.seen(1)  # the mark behind it
                seen += 1
        capacity = max(capacity, gathered.context)
    return _Counts(gathered, blocks * image, blocks, seen, words, capacity)


def _language_layer(config: ShowO2Config, total: int, keys: int, each: Bytes) -> int:
    """Return what a layer of the language model keeps."""
    qwen = config.qwen()
    d, ff = qwen.hidden_size, qwen.intermediate_size
    _, heads, size = cache_sizes(qwen)
    # Two norms; the attention's queries and result, and what its projection reads; four widths of the MLP.
    per_row = 2 * _norm(d, each) + (3 * d + 4 * ff) * each.product
    return total * per_row + keys * 2 * heads * size * each.product


def _flow_layer(config: ShowO2Config, total: int, keys: int, each: Bytes) -> int:
    """Return what a layer of the flow stack keeps."""
    flow, size = config.flow, each.product
    q, kv = flow.heads * flow.head_dim, flow.key_heads * flow.head_dim
    # Per half: its input, the scaled input, the norm's result, and what is gated, all float32.
    per_row = 2 * 4 * flow.width * FLOAT32
    # What projections read: in mixed precision a copy for each.
    copies = 1 if size == each.stream else 2.5
    per_row += int(2 * copies * flow.width) * size
    # Queries and keys before their norm, and scaled; queries once more, the result, what is read of it.
    per_row += (q + kv) * (FLOAT32 + size) + 3 * q * size
    per_row += 4 * flow.mlp_width * size + (2 + flow.heads + flow.key_heads) * FLOAT32
    return total * per_row + keys * 2 * kv * size


def _semantic_square(config: ShowO2Config, each: Bytes) -> int:
    """Return what a semantic layer keeps of a square of latents."""
    # Two norms and their results, queries, keys, values, what they find, and twice the MLP.
    return (8 * config.semantic.width + 2 * config.semantic.mlp_width) * each.product


def _between(config: ShowO2Config, each: Bytes) -> int:
    """Return what a row keeps between the stacks (a norm, the way over, rotations) and behind them."""
    d = config.qwen().hidden_size
    qwen = cache_sizes(config.qwen()).head_dim
    kept = _norm(d, each, casts=1) + config.flow.width * (2 * each.product + FLOAT32)
    return kept + 2 * qwen * each.stream + 2 * config.flow.head_dim * FLOAT32


def _ends(config: ShowO2Config, each: Bytes) -> int:
    """Return what a square keeps before the stacks and behind them."""
    d, w, width = config.qwen().hidden_size, config.semantic.width, config.flow.width
    before = _norm(w + d, each, casts=1) + 2 * d * each.product
    behind = 3 * width * FLOAT32
    latents = config.patch_size**2 * config.latent_channels * FLOAT32
    return before + behind + 2 * latents


def _norm(d: int, each: Bytes, *, casts: float = 2.5) -> int:
    """Return the bytes that a norm of ``d`` numbers and the inputs of the projections behind it take.

    The input, the scaled input, and what projections read: the result, or in mixed precision a copy of it
    for each of them.

    Args:
        d: numbers.
        each: bytes of a number.
        casts: projections that read the result; 2.5 is the average of a layer's two norms.
    """
    if each.product >= FLOAT32:
        return 3 * d * each.product
    if each.stream >= FLOAT32:
        return 2 * d * FLOAT32 + int(casts * d) * each.product
    return d * FLOAT32 + 2 * d * each.product
