"""Rotary tables without buffers: nothing to load on the meta device, nothing a cast could round."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PhiConfig
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding


class Rotary(nn.Module):
    """What ``PhiRotaryEmbedding`` computes, its frequencies made anew each time, in float32.

    It is Llama's where the configuration has no ``partial_rotary_factor``, the share of D that is turned.

    Those of ``transformers`` are a buffer outside the state dict: on the meta device it has no value, and
    ``module.to(torch.bfloat16)`` would round it, and turn far words by whole radians.

    Args:
        config: of a Llama-like decoder, or of a Phi.

    Raises:
        ValueError: for scaled frequencies (``rope_type`` other than ``default``).
    """

    def __init__(self, config: LlamaConfig | PhiConfig) -> None:
        super().__init__()
        self.config = config
        kind = cast(Any, config.rope_parameters)["rope_type"]
        if kind != "default":
            raise ValueError(
                f"config.json: rope_type is {kind!r}; only 'default' is supported here."
            )

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[B, M, D]`` in the dtype of x for positions ``[B, M]``.

        D is only what is turned of a head.
        """
        with torch.device(x.device):
            frequencies, _ = PhiRotaryEmbedding.compute_default_rope_parameters(
                cast(Any, self.config)
            )
        angles = position_ids.unsqueeze(-1).float() * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
