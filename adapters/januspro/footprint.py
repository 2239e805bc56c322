"""How much memory a Janus-Pro rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import JanusConfig

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.decoder import cache_sizes
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
    context = capacity = rows.given
    drawn = scored = again = 0
    for step in sampling.steps:
        if step.kind == "text":
            capacity = max(capacity, context + step.max_tokens + SPARE)
            again += context
            context += step.max_tokens
            scored += step.max_tokens
            continue
        if step.kind == "turn":
            again += context
            context += step.max_tokens
            capacity = _grown(capacity, context)
            continue
        capacity = max(capacity, context + rows.codes)
        drawn += 1
        if step.is_seen:
            again += context
            context += rows.looked_at
            capacity = _grown(capacity, context)
    d, ff, layers = llama.hidden_size, llama.intermediate_size, llama.num_hidden_layers
    sizes = cache_sizes(llama)
    kv = sizes.num_heads * sizes.head_dim
    # And the logits of the next word: those remembered, a copy handed out, and new ones.
    cache = capacity * layers * 2 * kv * size + 3 * llama.vocab_size * FLOAT32
    codes = drawn * rows.codes
    total = context + codes
    dense = total * total <= attention.DENSE_LIMIT
    # Each image gathers what it sees; without masks every text does, too.
    keys = total + drawn * context + (0 if dense else again)
    norm = _norm(d, size, stream)
    # Two norms; the attention's queries and result, and what its projection reads; four widths of the MLP.
    per_row = 2 * norm + (3 * d + 4 * ff) * size
    layer = total * per_row + keys * 2 * kv * size
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


def _grown(capacity: int, needed: int) -> int:
    """Return the most slots of a cache that makes room unreserved: it at least doubles when it grows.

    A shorter context may just not fit where the longest one does, so both are counted.
    """
    return max(capacity, needed, 2 * min(capacity, needed - 1))
