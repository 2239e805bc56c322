"""Bagel's Mixture-of-Transformers: two experts per layer, one attention over all tokens.

Names of submodules are those of the published checkpoint. One operation serves prefill, decoding,
denoising and training: everything outside attention runs on flat rows without padding, understanding
rows first and generation rows second, and an attention object knows which sequences they form.

Source: Bagel, https://arxiv.org/abs/2505.14683; numerics in upstream's ``modeling/bagel``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.common.attention import Attention, Heads


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """The rows of one forward. Mu understanding rows (words and image marks), Mg latent rows."""

    token_ids: Tensor
    """``[Mt]`` int64; the words and marks among the understanding rows."""
    positions: Tensor
    """``[Mu]`` int64 RoPE positions."""
    latents: Tensor
    """``[Mg, C]`` float32."""
    sigma: Tensor
    """``[I]`` float32, one for each image, 0 for a clean one."""
    image_of: Tensor
    """``[Mg]`` int64, which image a latent row belongs to."""
    latent_ids: Tensor
    """``[Mg]`` int64 rows of the table of latent positions."""
    latent_positions: Tensor
    """``[Mg]`` int64 RoPE positions."""
    logit_rows: Tensor
    """``[R]`` int64, understanding rows whose next-token logits are wanted."""
    velocity_rows: Tensor
    """``[Mv]`` int64, latent rows whose velocity is wanted."""
    extra: Tensor | None = None
    """``[Mu - Mt, d]`` understanding rows that are given as embeddings (vision), behind the words."""

    @classmethod
    def words(cls, token_ids: Tensor, positions: Tensor, latent_channels: int) -> Pack:
        """Return words ``[M]`` at ``[M]`` that all want logits, and no image."""
        none = token_ids[:0]
        return cls(
            token_ids=token_ids,
            positions=positions,
            latents=torch.zeros(0, latent_channels, device=token_ids.device),
            sigma=torch.zeros(0, device=token_ids.device),
            image_of=none,
            latent_ids=none,
            latent_positions=none,
            logit_rows=torch.arange(len(token_ids), device=token_ids.device),
            velocity_rows=none,
        )


class RMSNorm(nn.Module):
    """Normalise in float32, cast back, then scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[*, size]`` in the dtype of x."""
        if x.dtype == torch.float32 == self.weight.dtype:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        d, ff = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, ff, bias=False)
        self.up_proj = nn.Linear(d, ff, bias=False)
        self.down_proj = nn.Linear(ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[*, d]``."""
        gated: Tensor = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return cast(Tensor, self.down_proj(gated))


class Projections(nn.Module):
    """The projections of both experts; ``""`` understands, ``"_moe_gen"`` generates."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        for expert in EXPERTS:
            self.add_module(f"q_proj{expert}", nn.Linear(d, d))
            self.add_module(f"k_proj{expert}", nn.Linear(d, kv))
            self.add_module(f"v_proj{expert}", nn.Linear(d, kv))
            self.add_module(f"o_proj{expert}", nn.Linear(d, d, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(config.head_dim, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(config.head_dim, config.rms_norm_eps))


EXPERTS = ("", "_moe_gen")


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the tables ``[M, 1, D]`` float32 of ``positions * theta^(-2k/D)`` for :func:`rotate`.

    The cosines twice, and the sines with the sign of the half they are added to.
    """
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = (positions.float().unsqueeze(1) * theta ** (-steps / head_dim)).unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to ``[M, H, D]``, halves as pairs."""
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([b, a], -1) * sin.to(x.dtype)


class Expert(NamedTuple):
    """The modules of one expert in one layer."""

    input_norm: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    o_proj: nn.Module
    output_norm: nn.Module
    mlp: nn.Module


def before_attention(expert: Expert, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """Project rows ``[M, d]``, normalise queries and keys per head, then rotate them."""

    def split(flat: Tensor) -> Tensor:  # a size of -1 is ambiguous when there are no rows
        return flat.view(len(flat), flat.shape[1] // cos.shape[-1], cos.shape[-1])

    x = expert.input_norm(x)
    query, key = (
        rotate(norm(split(project(x))), cos, sin)
        for norm, project in ((expert.q_norm, expert.q_proj), (expert.k_norm, expert.k_proj))
    )
    return Heads(query, key, split(expert.v_proj(x)))


def after_attention(expert: Expert, x: Tensor, attended: Tensor) -> Tensor:
    """Return rows ``[M, d]`` with the attention's output and the MLP's added."""
    x = x + expert.o_proj(attended)
    return cast(Tensor, x + expert.mlp(expert.output_norm(x)))


class Layer(nn.Module):
    """One layer with an expert per kind of row."""

    before_attention: Callable[..., Heads]
    after_attention: Callable[..., Tensor]

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.before_attention, self.after_attention = before_attention, after_attention
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Projections(config)
        for expert in EXPERTS:
            self.add_module(f"mlp{expert}", MLP(config))
            self.add_module(f"input_layernorm{expert}", RMSNorm(d, eps))
            self.add_module(f"post_attention_layernorm{expert}", RMSNorm(d, eps))

    def expert(self, number: int) -> Expert:
        """Return the modules of expert 0 (understanding) or 1 (generation)."""
        own, inner, name = self._modules, self.self_attn._modules, EXPERTS[number]
        found = [own[f"input_layernorm{name}"]]
        found += [inner[f"{part}{name}"] for part in Expert._fields[1:7]]
        found += [own[f"post_attention_layernorm{name}"], own[f"mlp{name}"]]
        return Expert(*cast(list[nn.Module], found))

    def forward(
        self,
        rows: tuple[Tensor, Tensor],
        ropes: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        attention: Attention,
        number: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the rows of both experts after attention and MLP."""
        # A call without any row still runs: ranks that shard weights gather them in lockstep.
        live = [e for e, x in enumerate(rows) if len(x)] or [0]
        experts = [self.expert(e) for e in live]
        heads = [
            self.before_attention(expert, rows[e], *ropes[e])
            for e, expert in zip(live, experts, strict=True)
        ]
        joint = heads[0] if len(heads) == 1 else Heads(*map(torch.cat, zip(*heads, strict=True)))
        mixed = attention(number, joint, [len(rows[e]) for e in live])
        new = list(rows)
        for e, expert, attended in zip(live, experts, mixed, strict=True):
            new[e] = self.after_attention(expert, rows[e], attended)
        return new[0], new[1]


class Decoder(nn.Module):
    """Embedding, layers, and a final norm per expert."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """The decoder and its head."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class TimeEmbedder(nn.Module):
    """256 sinusoids of sigma in [0, 1] (no factor 1000), then an MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Tensor) -> Tensor:
        """Return ``[M, d]`` for ``[M]`` noise levels."""
        steps = torch.arange(128, device=sigma.device, dtype=torch.float32)
        angles = sigma.float().unsqueeze(1) * torch.exp(-math.log(10000) * steps / 128)
        features = torch.cat([angles.cos(), angles.sin()], 1).to(next(self.mlp.parameters()).dtype)
        return cast(Tensor, self.mlp(features))


class PositionTable(nn.Module):
    """A frozen table of 2-D sinusoids: row ``h * side + w``; w in the first half of the columns."""

    def __init__(self, side: int, size: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_table(side, size), requires_grad=False)


def sincos_table(side: int, size: int) -> Tensor:
    """Return ``[side * side, size]`` float32, computed in float64."""
    omega = 10000.0 ** (-np.arange(size // 4) / (size / 4))
    angles = np.arange(side)[:, None] * omega
    line = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    table = np.concatenate([np.tile(line, (side, 1)), np.repeat(line, side, 0)], 1)
    return torch.from_numpy(table).float()


class BagelNet(nn.Module):
    """The trainable network; every weight is used through one call."""

    def __init__(self, config: BagelConfig, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        d, c = config.hidden_size, config.latent_channels
        self.language_model = LanguageModel(config)
        self.vae2llm, self.llm2vae = nn.Linear(c, d), nn.Linear(d, c)
        self.time_embedder = TimeEmbedder(d)
        self.latent_pos_embed = PositionTable(config.max_latent_size, d)

    def compile_layers(self, **settings: Any) -> None:
        """Compile both halves of a layer, once for all layers: attention is a kernel already.

        Whole layers would be compiled again for each plan of attention, and soon not at all.

        Args:
            settings: of ``torch.compile``, such as ``backend``.
        """
        # Beyond the limit (8 by default) torch goes on uncompiled. Grad mode, precision, LoRA on and off,
        # and a frozen expert are graphs of their own.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(32, limits.recompile_limit)
        before = torch.compile(before_attention, dynamic=True, **settings)
        after = torch.compile(after_attention, dynamic=True, **settings)
        for layer in self.language_model.model.layers:
            assert isinstance(layer, Layer)
            layer.before_attention, layer.after_attention = before, after

    def forward(self, pack: Pack, attention: Attention) -> tuple[Tensor, Tensor]:
        """Run rows through the network.

        Args:
            pack: flat rows of both experts.
            attention: which sequences they form, and what they see.

        Returns:
            Logits ``[R, V]`` and velocities ``[Mv, C]``, float32.
        """
        config, decoder = self.config, self.language_model.model
        words = decoder.embed_tokens(pack.token_ids)
        if pack.extra is not None:
            words = torch.cat([words, pack.extra.to(words)])
        rows = (words, self._latent_rows(pack, words))
        ropes = tuple(
            rope_tables(p, config.head_dim, config.rope_theta)
            for p in (pack.positions, pack.latent_positions)
        )
        for number, layer in enumerate(decoder.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                rows = checkpoint(layer, rows, ropes, attention, number, use_reentrant=False)
            else:
                rows = layer(rows, ropes, attention, number)
        logits = self.language_model.lm_head(decoder.norm(rows[0][pack.logit_rows]))
        velocity = self.llm2vae(decoder.norm_moe_gen(rows[1][pack.velocity_rows]))
        return _wide(logits), _wide(velocity)

    def _latent_rows(self, pack: Pack, like: Tensor) -> Tensor:
        if not len(pack.latents):
            return like.new_zeros(0, self.config.hidden_size)
        place = self.latent_pos_embed.pos_embed[pack.latent_ids]
        latents = self.vae2llm(pack.latents.to(self.vae2llm.weight.dtype))
        return cast(Tensor, latents + self.time_embedder(pack.sigma)[pack.image_of] + place)


def _wide(x: Tensor) -> Tensor:
    """Leave reduced precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
