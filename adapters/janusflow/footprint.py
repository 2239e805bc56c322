"""How much memory a JanusFlow rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.janusflow.config import JanusFlowConfig
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import Grid

FLOAT32 = 4
"""Bytes."""


class Rows(NamedTuple):
    """How many a prompt and its images take."""

    given: int
    """Words and pictures of the prompt."""
    grid: Grid
    """Latents of a drawn image."""
    looked_at: int
    """Of a drawn image that is read again, its marks and template included."""


def footprint(
    config: JanusFlowConfig,
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
    llama = config.llama()
    size, stream = (torch.finfo(each).bits // 8 for each in (dtype, weights))
    size = min(size, stream)  # without autocast products are in the weights' dtype
    image, context = config.num_rows(rows.grid), rows.given
    capacity, blocks, scored = context, 0, 0
    for step in sampling.steps:
        if step.kind == "text":
            context += step.max_tokens
            scored += step.max_tokens
            capacity = max(capacity, context)
            continue
        if step.kind == "turn":
            context += step.max_tokens
            capacity = _grown(capacity, context)
            continue
        capacity = max(capacity, context + image)
        blocks += sampling.window_size
        if step.is_seen:
            context += rows.looked_at
            capacity = _grown(capacity, context)
    d, ff, vocabulary = (
        cast(int, getattr(llama, name))
        for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    layers, heads, head_dim = cache_sizes(llama)
    kv = heads * head_dim
    cache = capacity * layers * 2 * kv * size + 3 * vocabulary * FLOAT32  # and what comes next
    noise = blocks * image
    total = context + noise
    keys = total + blocks * context  # each block of noise gathers what it sees
    norm = _norm(d, size, stream)
    # Two norms; the attention's queries and result, and what its projection reads; four widths of the MLP.
    per_row = 2 * norm + (3 * d + 4 * ff) * size
    layer = total * per_row + keys * 2 * kv * size
    kept = layer * layers
    if gradient_checkpointing:
        kept = total * d * stream * layers + layer
    kept += total * _norm(d, size, stream, casts=0)
    kept += scored * (d * size + vocabulary * FLOAT32)
    kept += total * 2 * head_dim * stream  # cosines and sines
    kept += blocks * _halves(config, rows.grid, d, size, stream)
    if total * total <= attention.DENSE_LIMIT:
        kept += (context * context + noise * (context + image)) * size  # masks
    return Footprint(cache=cache, activations=kept)


def _norm(d: int, size: int, stream: int, *, casts: float = 2.5) -> int:
    """Return the bytes that a norm of ``d`` numbers and the inputs of the projections behind it take.

    The input, the scaled input, and what projections read: the result, or in mixed precision a copy of it
    for each of them.

    Args:
        d: numbers.
        size: bytes of a number in products.
        stream: bytes of a number in the residual stream.
        casts: projections that read the result; 2.5 is the average of a layer's two norms.
    """
    if size >= FLOAT32:
        return 2 * d * size + (d * size if casts else 0)
    if stream >= FLOAT32:
        return 2 * d * FLOAT32 + int(casts * d) * size
    return d * FLOAT32 + d * size + (d * size if casts else 0)


def _halves(config: JanusFlowConfig, grid: Grid, d: int, size: int, stream: int) -> int:
    """Return the bytes that the flow encoder and decoder keep of one image."""
    flow, squares = config.flow, config.num_rows(grid) - 1
    c, wide = flow.encoder_width, flow.encoder_width + flow.decoder_channels
    blocks = flow.encoder_blocks * c + flow.decoder_blocks * wide
    # Of a block, per channel and square: what convolution and modulation read, a norm, and three times the
    # fourfold width; a fourth time in float32, where the response is summed.
    per_channel = 2 * size + _norm(1, size, size, casts=1) + 3 * 4 * size
    per_channel += 4 * FLOAT32 if size < FLOAT32 else 0
    ends = _norm(d, size, stream, casts=1) + (d + 2 * wide + 2 * flow.decoder_channels) * size
    per_square = blocks * per_channel + ends
    return squares * per_square + squares * flow.stride**2 * flow.latent_channels * FLOAT32


def _grown(capacity: int, needed: int) -> int:
    """Return the most slots of a cache that makes room unreserved: it at least doubles when it grows.

    A shorter context may just not fit where the longest one does, so both are counted.
    """
    return max(capacity, needed, 2 * min(capacity, needed - 1))
