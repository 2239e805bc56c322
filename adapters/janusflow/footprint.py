"""How much memory a JanusFlow rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.footprint import Gathered
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
    before: int
    """Before a drawn image that is read again: what closes the assistant's turn and opens the user's."""
    picture: int
    """Of that image; 0 = it is not read."""
    after: int
    """Of what is said of it, where the user does not speak next; without its end mark."""


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
    image = config.num_rows(rows.grid)
    gathered, capacity, scored = _count(sampling, rows, image)
    context, blocks = gathered.context, sampling.num_images * sampling.window_size
    d, ff, vocabulary = (
        cast(int, getattr(llama, name))
        for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    layers, heads, head_dim = cache_sizes(llama)
    kv = heads * head_dim
    cache = capacity * layers * 2 * kv * size + 3 * vocabulary * FLOAT32  # and what comes next
    noise = blocks * image
    total = context + noise
    dense = total * total <= attention.DENSE_LIMIT
    # Each block of noise gathers what it sees; without masks every other block does, too.
    keys = total + blocks * context if dense else gathered.keys
    norm = _norm(d, size, stream)
    # Two norms; the attention's queries and result, and what its projection reads; four widths of the MLP.
    per_row = 2 * norm + (3 * d + 4 * ff) * size
    layer = total * per_row + keys * 2 * kv * size + (0 if dense else gathered.masks * size)
    kept = layer * layers
    if gradient_checkpointing:
        kept = total * d * stream * layers + layer
    kept += total * _norm(d, size, stream, casts=0)
    kept += scored * (d * size + vocabulary * FLOAT32)
    kept += total * 2 * head_dim * stream  # cosines and sines
    kept += blocks * _halves(config, rows.grid, d, size, stream)
    if dense:
        kept += (context * context + noise * (context + image)) * size  # masks
    return Footprint(cache=cache, activations=kept)


def _count(sampling: Sampling, rows: Rows, image: int) -> tuple[Gathered, int, int]:
    """Return the rows of a trajectory of the longest texts, slots of a cache, and sampled words."""
    gathered, scored, steps = Gathered(), 0, sampling.steps
    gathered.seen(rows.given)
    capacity = rows.given
    for step, later in zip(steps, (*steps[1:], None), strict=True):
        if step.kind == "image":
            capacity = max(capacity, gathered.context + image)
            gathered.hidden(image, copies=sampling.window_size, causal=True)
            is_open = later is not None and later.kind == "turn"
            if step.is_seen and rows.picture:
                for num in (rows.before, rows.picture, 1 + (0 if is_open else rows.after)):
                    gathered.seen(num)
        else:
            gathered.seen(step.max_tokens)
            scored += step.max_tokens if step.kind == "text" else 0
        capacity = max(capacity, gathered.context)
    return gathered, capacity, scored


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
