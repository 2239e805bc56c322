"""Sizes of a Show-o2 model, from its published ``config.json`` and that of its Qwen2.5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen2Config

from lightning_unigrpo.adapters.common.cache import Sizes
from lightning_unigrpo.types import Grid

LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How the flow stack's rotation is scaled, in the release."""
ARGUMENTS = (
    "llm_vocab_size",
    "image_latent_dim",
    "patch_size",
    "hidden_size",
    "clip_latent_dim",
)
"""Fields of ``config.json`` that must be there."""


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """The first layers of a SigLIP that read the latents of an image; the release's are the defaults."""

    width: int = 1152
    layers: int = 26
    """Layers that are built and stored: upstream drops the last of 27."""
    heads: int = 16
    mlp_width: int = 4304
    side: int = 27
    """Rows and columns of the table of positions."""
    eps: float = 1e-6

    @classmethod
    def from_upstream(cls, found: Mapping[str, Any]) -> SemanticConfig:
        """Read ``siglip_vision_config``, fields of ``SiglipVisionConfig``."""
        return cls(
            width=found["hidden_size"],
            layers=found["num_hidden_layers"] - 1,
            heads=found["num_attention_heads"],
            mlp_width=found["intermediate_size"],
            side=found["image_size"] // found["patch_size"],
            eps=found["layer_norm_eps"],
        )


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The stack behind the language model that says velocities; the release's are the defaults."""

    width: int = 2048
    layers: int = 10
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 64
    mlp_width: int = 8192
    eps: float = 1e-5
    """Of the two norms around a layer's halves; all others have 1e-6."""
    rope_theta: float = 500000.0
    rope_scaling: Mapping[str, float] = field(default_factory=lambda: dict(LLAMA3))

    @classmethod
    def from_upstream(cls, found: Mapping[str, Any], layers: int) -> FlowConfig:
        """Read ``diffusion_head_config``.

        Raises:
            ValueError: for a rotation of another kind, or linear layers with biases.
        """
        scaling = found["rope_scaling"]
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind != "llama3":
            raise ValueError(
                f"config.json: diffusion_head_config.rope_scaling has rope_type {kind!r}; only 'llama3' is "
                "supported."
            )
        for name in ("attention_bias", "mlp_bias"):
            if found.get(name):
                raise ValueError(
                    f"config.json: diffusion_head_config.{name} is true; only false is supported."
                )
        return cls(
            width=found["hidden_size"],
            layers=layers,
            heads=found["num_attention_heads"],
            key_heads=found["num_key_value_heads"],
            head_dim=found["head_dim"],
            mlp_width=found["intermediate_size"],
            eps=found["rms_norm_eps"],
            rope_theta=found["rope_theta"],
            rope_scaling={name: float(scaling[name]) for name in LLAMA3},
        )


@dataclass(frozen=True, kw_only=True)
class ShowO2Config:
    """A Qwen2.5 that reads words and images, and a flow stack behind it.

    Source: Show-o2, https://arxiv.org/abs/2506.15564; field names as in the published files.
    """

    language: Mapping[str, Any]
    """Fields of ``Qwen2Config``, with the vocabulary of the checkpoint."""
    semantic: SemanticConfig = SemanticConfig()
    flow: FlowConfig = FlowConfig()
    latent_channels: int = 16
    """C of the autoencoder."""
    patch_size: int = 2
    """Latents per side of what one row of an image reads."""
    bos: int = 151644
    """Opens every context."""
    eos: int = 151645
    """Ends a text: an action, if it is sampled; no image sees it."""
    begin_of_image: int = 151652
    end_of_image: int = 151653

    @classmethod
    def from_upstream(
        cls,
        found: Mapping[str, Any],
        language: Mapping[str, Any],
        marks: Mapping[str, int] | None = None,
    ) -> ShowO2Config:
        """Read ``config.json`` and that of the language model.

        Args:
            found: arguments of upstream's constructor; objects ``siglip_vision_config`` and
                ``diffusion_head_config``, which the release does not have, give other sizes.
            language: fields of ``Qwen2Config``.
            marks: ids of ``bos``, ``eos``, ``begin_of_image`` and ``end_of_image``.

        Raises:
            ValueError: when fields are missing or unsupported.
        """
        missing = [name for name in ARGUMENTS if found.get(name) is None]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}: it is not that of a Show-o2."
            )
        if not found.get("add_time_embeds", True):
            raise ValueError("config.json: add_time_embeds is false; only true is supported.")
        width, hidden = language["hidden_size"], found["hidden_size"]
        if width != hidden:
            raise ValueError(
                f"config.json has hidden_size {hidden}, the language model's config.json {width}: give "
                "adapter.language the Qwen2.5 that the checkpoint was built from."
            )
        if language.get("use_sliding_window"):
            raise ValueError(
                "The language model's config.json: use_sliding_window is true; only false is supported."
            )
        semantic, layers = found.get("siglip_vision_config"), found.get("num_diffusion_layers", 10)
        head = found.get("diffusion_head_config")
        config = cls(
            language={**language, "vocab_size": found["llm_vocab_size"]},
            semantic=SemanticConfig.from_upstream(semantic) if semantic else SemanticConfig(),
            flow=FlowConfig.from_upstream(head, layers) if head else FlowConfig(layers=layers),
            latent_channels=found["image_latent_dim"],
            patch_size=found["patch_size"],
            **(marks or {}),
        )
        if config.semantic.width != found["clip_latent_dim"]:
            raise ValueError(
                f"config.json: clip_latent_dim is {found['clip_latent_dim']}, but the semantic layers are "
                f"{config.semantic.width} wide; make them equal."
            )
        return config

    def qwen(self) -> Qwen2Config:
        """Return the language model's configuration."""
        known = {k: v for k, v in self.language.items() if k not in ("architectures", "use_cache")}
        return Qwen2Config(**known)

    @property
    def flow_sizes(self) -> Sizes:
        """What a cache remembers of a row in the flow stack."""
        return Sizes(self.flow.layers, self.flow.key_heads, self.flow.head_dim)

    def num_rows(self, grid: Grid) -> int:
        """Return the rows of an image: the time's, and one per square of latents.

        Raises:
            ValueError: when the grid is no multiple of a square.
        """
        h, w = grid
        if h % self.patch_size or w % self.patch_size:
            raise ValueError(
                f"A latent grid of {h} x {w} does not divide into squares of {self.patch_size}; ask for "
                "another Prompt.size."
            )
        return 1 + h * w // self.patch_size**2


def rotary_frequencies(config: FlowConfig) -> list[float]:
    """Return the flow stack's angles per position, float32.

    ``f_i = theta^(-2 i / D)``; beyond a wavelength of ``original / low`` divided by ``factor``, below
    ``original / high`` as it is, between them interpolated.

    Source: Llama 3, https://arxiv.org/abs/2407.21783; ``rope_type`` "llama3" of ``transformers``.
    """
    size, scaling = config.head_dim, config.rope_scaling
    plain = 1.0 / config.rope_theta ** (torch.arange(0, size, 2).float() / size)
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    share = (length / wavelength - low) / (high - low)
    between = (1 - share) * plain / factor + share * plain
    found = torch.where(wavelength > length / low, plain / factor, between)
    return torch.where(wavelength < length / high, plain, found).tolist()


def qwen(hidden: int, layers: int, heads: int, key_heads: int, mlp: int, tied: bool) -> Any:
    """Return the fields of a Qwen2.5-Instruct with Show-o2's vocabulary."""
    return {
        "vocab_size": 151669,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    }


SMALL = ShowO2Config(language=qwen(1536, 28, 12, 2, 8960, True))
RELEASES = {
    "showlab/show-o2-1.5B": SMALL,
    "showlab/show-o2-1.5B-HQ": SMALL,
    "showlab/show-o2-7B": ShowO2Config(language=qwen(3584, 28, 28, 4, 18944, False)),
}
"""Sizes of published models, for estimates without their files."""
