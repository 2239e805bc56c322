"""How much memory a Bagel rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

import torch

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.footprint import Gathered
from lightning_unigrpo.config import Sampling

MARKS = 2
"""Rows around a text or an image."""
FLOAT32 = 4
"""Bytes."""


def footprint(
    config: BagelConfig,
    sampling: Sampling,
    *,
    given_rows: int,
    seen_rows: int,
    image_tokens: int,
    patches: int,
    gradient_checkpointing: bool,
    dtype: torch.dtype,
    weights: torch.dtype,
    grain: int = 1,
) -> Footprint:
    """Return the bytes per trajectory of rollouts whose texts are as long as allowed.

    Copies of the weights that autocast makes are not counted: they are the same for any number of rows.

    Args:
        config: sizes.
        sampling: plan, lengths, window.
        given_rows: words and images of the prompt, system prompt and all marks included.
        seen_rows: of those, rows of images.
        image_tokens: latent tokens of a drawn image.
        patches: what the tower sees of a drawn image that is looked at; 0 without a tower.
        gradient_checkpointing: whether layers are recomputed.
        dtype: of matrix products.
        weights: dtype of the weights, which the residual stream is in.
        grain: slots of a cache are multiples of it.
    """
    # Without autocast products are in the weights' dtype, whatever the trainer is told.
    size, stream = (torch.finfo(each).bits // 8 for each in (dtype, weights))
    size = min(size, stream)
    image, gathered = image_tokens + MARKS, Gathered()
    gathered.seen(given_rows - seen_rows)
    gathered.seen(seen_rows, causal=False)
    slots, scored = given_rows, 0
    for step in sampling.steps:
        if step.kind == "image":
            slots = max(slots, gathered.context + image)
            gathered.hidden(image, copies=sampling.window_size)
            if step.is_seen:
                gathered.seen(image, causal=False)
            if step.is_seen and patches:
                gathered.seen(patches + MARKS, causal=False)
        else:
            gathered.seen(step.max_tokens + MARKS)
            scored += step.max_tokens if step.kind == "text" else 0
        slots = max(slots, gathered.context)
    context, blocks = gathered.context, sampling.num_images * sampling.window_size
    d, ff = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    cache = _rounded(slots, grain) * config.num_hidden_layers * 2 * kv * size
    noise = blocks * image
    rows = context + noise
    dense = rows * rows <= attention.DENSE_LIMIT
    # Each block of noise gathers what it sees; without masks every other block does, too.
    keys = rows + blocks * context if dense else gathered.keys
    norm = _norm(d, size, stream)
    # Two norms; queries and keys before and after theirs; the attention's queries and result, and what
    # its projection reads; four widths of the MLP.
    per_row = 2 * norm + _heads(d + kv, config.head_dim, size, stream) + (3 * d + 4 * ff) * size
    layer = rows * per_row + keys * 2 * kv * size + (0 if dense else gathered.masks * size)
    kept = layer * config.num_hidden_layers
    if gradient_checkpointing:
        kept = rows * d * stream * config.num_hidden_layers + layer
    kept += (scored + noise) * norm + scored * config.vocab_size * FLOAT32
    kept += rows * 2 * config.head_dim * FLOAT32  # cosines and sines
    if dense:
        kept += (context * context + noise * (context + image)) * size  # masks
    return Footprint(cache=cache, activations=kept)


def _norm(d: int, size: int, stream: int) -> int:
    """Return the bytes that a norm of ``d`` numbers and the inputs of the projections behind it take.

    Float32 throughout is one kernel: its input, the scaled input, and its result. Otherwise the norm runs
    in float32, and every projection of a float32 result casts it anew (2.5 of them on average).
    """
    if size >= FLOAT32:
        return 3 * d * size
    if stream >= FLOAT32:
        return 2 * d * FLOAT32 + 5 * d * size // 2
    return d * FLOAT32 + 2 * d * size


def _heads(width: int, head_dim: int, size: int, stream: int) -> int:
    """Return the bytes that the norms of queries and keys take, ``width`` numbers together."""
    if size >= FLOAT32:
        return 2 * width * size
    angles = 4 * head_dim * size if stream < FLOAT32 else 0  # cast for queries and for keys
    return width * (FLOAT32 + size) + angles


def _rounded(slots: int, grain: int) -> int:
    return -(-slots // grain) * grain
