"""How much memory a Janus-Pro rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import JanusConfig

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.footprint import Gathered
from lightning_unigrpo.config import Sampling

FLOAT32 = 4
"""Bytes."""
SPARE = 2
"""Slots that a rollout reserves for marks around a text, which this layout has not."""


class Rows(NamedTuple):
    """How many a prompt and its images take."""

    given: int
    """Words and pictures of the prompt."""
    codes: int
    """Of a drawn image; as many rows predict them."""
    looked_at: int
    """Of a drawn image that is read again, its marks and template included."""
    shown: int
    """Likewise, where a turn of the user stands in place of the template's words."""


def footprint(
    config: JanusConfig,
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
        sampling: plan and lengths.
        rows: of the prompt and of images.
        gradient_checkpointing: whether layers are recomputed.
        dtype: of matrix products.
        weights: dtype of the weights, which the residual stream is in.
    """
    llama: Any = config.text_config
    vq: Any = config.vq_config
    size, stream = (torch.finfo(each).bits // 8 for each in (dtype, weights))
    size = min(size, stream)  # without autocast products are in the weights' dtype
    gathered, capacity, scored = _count(sampling, rows)
    context, drawn = gathered.context, sampling.num_images
    d, ff, layers = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    sizes = cache_sizes(llama)
    kv = sizes.num_heads * sizes.head_dim
    # And the logits of the next word: those remembered, a copy handed out, and new ones.
    cache = capacity * layers * 2 * kv * size + 3 * llama.vocab_size * FLOAT32
    codes = drawn * rows.codes
    total = context + codes
    dense = total * total <= attention.DENSE_LIMIT
    # Each image gathers what it sees; without masks every other block does, too.
    keys = total + drawn * context if dense else gathered.keys
    norm = _norm(d, size, stream)
    # Two norms; the attention's queries and result, and what its projection reads; four widths of the MLP.
    per_row = 2 * norm + (3 * d + 4 * ff) * size
    layer = total * per_row + keys * 2 * kv * size + (0 if dense else gathered.masks * size)
    kept = layer * layers
    if gradient_checkpointing:
        kept = total * d * stream * layers + layer
    kept += total * norm + scored * (d * size + llama.vocab_size * FLOAT32)
    # Of a code: its embedding, two layers each of aligner and head with their activation, its logits.
    kept += codes * ((vq.embed_dim + 2 * d + 3 * vq.projection_dim) * size)
    kept += codes * vq.num_embeddings * FLOAT32
    kept += total * 2 * sizes.head_dim * stream  # cosines and sines
    if dense:
        kept += (context * context + codes * (context + rows.codes)) * size  # masks
    return Footprint(cache=cache, activations=kept)


def _count(sampling: Sampling, rows: Rows) -> tuple[Gathered, int, int]:
    """Return the rows of a trajectory of the longest texts, slots of a cache, and sampled words."""
    gathered, scored, steps = Gathered(), 0, sampling.steps
    gathered.seen(rows.given)
    capacity = rows.given
    for step, later in zip(steps, (*steps[1:], None), strict=True):
        if step.kind == "image":
            capacity = max(capacity, gathered.context + rows.codes)
            gathered.hidden(rows.codes, causal=True)
            is_open = later is not None and later.kind == "turn"
            if step.is_seen:
                gathered.seen(rows.shown if is_open else rows.looked_at)
        else:
            gathered.seen(step.max_tokens)
        if step.kind == "text":
            scored += step.max_tokens
            capacity = max(capacity, gathered.context + SPARE)
        capacity = max(capacity, gathered.context)
    return gathered, capacity, scored


def _norm(d: int, size: int, stream: int) -> int:
    """Return the bytes that a norm of ``d`` numbers and the inputs of the projections behind it take.

    The input, the scaled input, and its result; in reduced precision every projection casts a float32
    result anew (2.5 of them on average).
    """
    if size >= FLOAT32:
        return 3 * d * size
    if stream >= FLOAT32:
        return 2 * d * FLOAT32 + 5 * d * size // 2
    return d * FLOAT32 + 2 * d * size
