"""The flow stack: ten layers over all rows behind the language model, modulated inside images.

Names of submodules are those of the published checkpoint.

Source: Show-o2, https://arxiv.org/abs/2506.15564; adaLN, https://arxiv.org/abs/2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lightning_unigrpo.adapters.common.attention import Attention, Heads
from lightning_unigrpo.adapters.showo2.config import FlowConfig, rotary_frequencies
from lightning_unigrpo.types import Grid

SINUSOIDS = 256
"""Width of a time before its MLP."""
EPS = 1e-6
"""Of norms whose eps no file says."""


class Run(NamedTuple):
    """Neighbouring images of one grid, as rows and as images."""

    grid: Grid
    images: slice
    rows: slice
    """Among all rows; those of words come first."""


def wide(x: Tensor) -> Tensor:
    """Leave reduced precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulated(x: Tensor, runs: Sequence[Run], scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return ``x scale + shift`` inside images, and x elsewhere, float32.

    Args:
        x: ``[M, D]``, rows of words first.
        runs: of images.
        scale: ``[I, D]``, one for each image.
        shift: ``[I, D]``, or None for 0.
    """
    parts = [x[: runs[0].rows.start]] if runs else [x]
    for _, images, rows in runs:
        part = x[rows].unflatten(0, (images.stop - images.start, -1)) * scale[images].unsqueeze(1)
        if shift is not None:
            part = part + shift[images].unsqueeze(1)
        parts.append(part.flatten(0, 1))
    return torch.cat(parts)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time and an MLP.

    ``[cos(t f), sin(t f)]``, ``f_j = 10000^(-j / 128)``, with ``t`` from 0 (noise) to 1 (data).

    Source: DDPM, https://arxiv.org/abs/2006.11239; cosines first, the time not multiplied.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """Return ``[I, D]`` for ``[I]`` times, float32 or wider."""
        half = SINUSOIDS // 2
        steps = torch.arange(half, device=time.device, dtype=time.dtype)
        angles = time.unsqueeze(1) * torch.exp(-math.log(10000) * steps / half)
        found = torch.cat([angles.cos(), angles.sin()], 1)
        return cast(Tensor, self.mlp(found.to(cast(Tensor, self.mlp[0].weight).dtype)))


def rotary(config: FlowConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[M, 1, D]`` float32 for positions ``[M]``."""
    frequencies = torch.tensor(rotary_frequencies(config), device=positions.device)
    angles = positions.unsqueeze(1).float() * frequencies
    angles = torch.cat([angles, angles], 1).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``[M, H, D]`` turned."""
    first, second = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-second, first], -1) * tables[1]


class FlowAttention(nn.Module):
    """Grouped attention without biases; queries and keys are normalised before they are turned."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        d, q, kv = (
            config.width,
            config.heads * config.head_dim,
            config.key_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(d, q, bias=False)
        self.k_proj = nn.Linear(d, kv, bias=False)
        self.v_proj = nn.Linear(d, kv, bias=False)
        self.o_proj = nn.Linear(q, d, bias=False)
        self.q_norm = Qwen2RMSNorm(config.head_dim, EPS)
        self.k_norm = Qwen2RMSNorm(config.head_dim, EPS)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], attention: Attention, layer: int
    ) -> Tensor:
        """Return ``[M, D]``.

        Args:
            x: ``[M, D]``.
            tables: from :func:`rotary`.
            attention: which sequences the rows form, and what they see.
            layer: number of this layer in the attention's cache.
        """
        x = x.to(self.q_proj.weight.dtype)
        q, k, v = (
            project(x).unflatten(1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(self.q_norm(q), tables), rotated(self.k_norm(k), tables)
        # A cache holds what products are in; so does the packed pass.
        (found,) = attention(layer, Heads(q.to(v.dtype), k.to(v.dtype), v), [len(x)])
        return cast(Tensor, self.o_proj(found.to(self.o_proj.weight.dtype)))


class FlowMLP(nn.Module):
    """A gated MLP without biases."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[M, D]``."""
        x = x.to(self.gate_proj.weight.dtype)
        return cast(Tensor, self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)))


class FlowLayer(nn.Module):
    """Attention and MLP; inside images scaled, shifted and gated by the time.

    ``d + g1 Attn(RMS(d) (1 + s1) + b1)``, then ``d + g2 MLP(RMS(d) (1 + s2) + b2)``; words have
    ``g = 1, s = b = 0``. Modulation, gates and the residual stream are float32.

    Source: adaLN, https://arxiv.org/abs/2212.09748; order shift, scale, gate.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.input_layernorm = Qwen2RMSNorm(config.width, config.eps)
        self.self_attn = FlowAttention(config)
        self.post_attention_layernorm = Qwen2RMSNorm(config.width, config.eps)
        self.mlp = FlowMLP(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(
        self,
        d: Tensor,
        times: Tensor,
        runs: Sequence[Run],
        tables: tuple[Tensor, Tensor],
        attention: Attention,
        layer: int,
    ) -> Tensor:
        """Return ``[M, D]`` float32.

        Args:
            d: ``[M, D]`` float32.
            times: ``[I, D]`` embeddings of the images' times.
            runs: the rows of images.
            tables: from :func:`rotary`.
            attention: which sequences the rows form, and what they see.
            layer: number of this layer in the attention's cache.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = wide(self.adaLN_modulation(times)).chunk(
            6, 1
        )
        x = modulated(self.input_layernorm(d), runs, 1 + scale1, shift1)
        d = d + modulated(wide(self.self_attn(x, tables, attention, layer)), runs, gate1)
        x = modulated(self.post_attention_layernorm(d), runs, 1 + scale2, shift2)
        return d + modulated(wide(self.mlp(x)), runs, gate2)


class FinalLayer(nn.Module):
    """Hidden states to what each row says of the latents."""

    def __init__(self, config: FlowConfig, out_size: int) -> None:
        super().__init__()
        self.norm_final = Qwen2RMSNorm(config.width, EPS)
        self.linear = nn.Linear(config.width, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, d: Tensor, times: Tensor) -> Tensor:
        """Return ``[n, N', out_size]`` float32 for ``[n, N', D]`` and embeddings ``[n, D]``."""
        shift, scale = wide(self.adaLN_modulation(times)).unsqueeze(1).chunk(2, 2)
        x = self.norm_final(d) * (1 + scale) + shift
        return wide(self.linear(x.to(self.linear.weight.dtype)))
