"""How much memory a Bagel rollout and update need, from sizes alone; measured against in a test."""

from __future__ import annotations

import torch

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.config import Sampling

MARKS = 2
"""Rows around a text or an image."""


def footprint(
    config: BagelConfig,
    sampling: Sampling,
    *,
    given_tokens: int,
    image_tokens: int,
    patches: int,
    gradient_checkpointing: bool,
    dtype: torch.dtype,
) -> Footprint:
    """Return the bytes per trajectory of text-to-image rollouts whose texts are as long as allowed.

    Args:
        config: sizes.
        sampling: plan, lengths, window.
        given_tokens: words of system prompt and request, their marks included.
        image_tokens: latent tokens of a drawn image.
        patches: what the tower sees of a drawn image that is looked at; 0 without a tower.
        gradient_checkpointing: whether layers are recomputed.
        dtype: of computation.
    """
    size, image = torch.finfo(dtype).bits // 8, image_tokens + MARKS
    words, context, noise = given_tokens, given_tokens, 0
    capacity = given_tokens
    attention = 0  # rows of keys that noise blocks gather
    scored = 0
    for place, kind in enumerate(sampling.plan):
        if kind == "text":
            words += sampling.max_text_tokens + MARKS
            context += sampling.max_text_tokens + MARKS
            scored += sampling.max_text_tokens
            capacity = _grown(capacity, context)
            continue
        capacity = _grown(capacity, context + image)
        noise += sampling.window_size * image
        attention += sampling.window_size * (context + image)
        if place < len(sampling.plan) - 1:  # looked at: latents, and patches
            seen = image + (patches + MARKS if patches else 0)
            context += seen
            capacity = _grown(capacity, context)
    d, ff = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    cache = capacity * config.num_hidden_layers * 2 * kv * size
    rows = context + noise
    # The residual stream twice and its two norms, each with its scaled input; queries before and after
    # their norm and in attention, its output twice; keys before and after; four widths of the MLP.
    per_row = (11 * d + 2 * kv + 4 * ff) * size
    layer = rows * per_row + (context + attention) * 2 * kv * size
    kept = rows * d * size * config.num_hidden_layers + layer
    if not gradient_checkpointing:
        kept = layer * config.num_hidden_layers
    return Footprint(cache=cache, activations=kept + scored * config.vocab_size * 4)


def _grown(capacity: int, needed: int) -> int:
    """Return how many slots a cache has afterwards; it at least doubles when it grows."""
    return capacity if needed <= capacity else max(needed, 2 * capacity)
