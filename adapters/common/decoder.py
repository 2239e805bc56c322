"""A decoder of ``transformers`` on flat rows: its layers and weights, our attention and caches.

Llama, Qwen2 and Phi keep their attention behind ``transformers``' ``AttentionInterface``. Under the name
registered here they hand queries, keys and values of flat rows to an attention object of
:mod:`~lightning_unigrpo.adapters.common.attention`. So ragged contexts need no padding, decoding writes into
one preallocated cache, and several noise blocks stand side by side in a training pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PretrainedConfig

from lightning_unigrpo.adapters.common.attention import Attention, Heads
from lightning_unigrpo.adapters.common.cache import Sizes

NAME = "flat_rows"
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
"""Fields of configurations."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Attend as ``settings["rows"]`` says; ``[1, H, M, D]`` in, ``[1, M, H, D]`` out."""
    attention: Attention = settings["rows"]
    heads = Heads(*(x[0].transpose(0, 1) for x in (query, key, value)))
    (found,) = attention(module.layer_idx, heads, [len(heads.query)])
    return found.view(1, *heads.query.shape), None


AttentionInterface.register(NAME, _attend)


def _alone(layer: int, heads: Heads, sizes: list[int]) -> list[Tensor]:
    """Let every row be what it is without others."""
    return [heads.query.flatten(1)]


def use_flat_rows(config: PretrainedConfig) -> PretrainedConfig:
    """Let a decoder that is built from this configuration attend through :func:`run_decoder` only.

    Raises:
        ValueError: when something drops out.
    """
    for name in DROPOUTS:
        if found := getattr(config, name, 0.0):
            raise ValueError(
                f"{name} is {found} in the model's config; give 0: a rollout and its update must be one "
                "policy."
            )
    config._attn_implementation = NAME
    return config


def run_decoder(
    decoder: nn.Module,
    x: Tensor,
    positions: Tensor,
    attention: Attention,
    *,
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Run the layers and the final norm.

    Args:
        decoder: ``LlamaModel``, ``Qwen2Model``, ``PhiModel``; built from a configuration that
            :func:`use_flat_rows` saw.
        x: ``[M, d]`` embeddings of flat rows.
        positions: ``[M]`` int64, for the rotation.
        attention: which sequences they form, and what they see.
        gradient_checkpointing: recompute each layer in the backward pass.

    Returns:
        ``[M, d]`` after the decoder's last norm.
    """
    model = cast(Any, decoder)
    if not len(x):
        # transformers cannot shape no rows; ranks that shard weights still gather them on every call.
        x, positions, attention = x.new_zeros(1, x.shape[1]), positions.new_zeros(1), _alone
        return run_decoder(decoder, x, positions, attention)[:0]
    hidden = x.unsqueeze(0)
    tables = model.rotary_emb(hidden, positions.unsqueeze(0))

    def run(layer: nn.Module, hidden: Tensor) -> Tensor:
        found = layer(hidden, position_embeddings=tables, rows=attention)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

    for layer in model.layers:
        if gradient_checkpointing and torch.is_grad_enabled():
            hidden = cast(Tensor, checkpoint(run, layer, hidden, use_reentrant=False))
        else:
            hidden = run(layer, hidden)
    # Phi calls its last norm otherwise.
    norm = model.norm if hasattr(model, "norm") else model.final_layernorm
    return cast(Tensor, norm(hidden).squeeze(0))


def cache_sizes(config: PretrainedConfig) -> Sizes:
    """Return what a cache remembers of a row of a Llama-like decoder."""
    found: Any = config
    head_dim = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    return Sizes(found.num_hidden_layers, found.num_key_value_heads, head_dim)
