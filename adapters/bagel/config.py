"""Sizes and special tokens of a Bagel model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_unigrpo.adapters.common.cache import Sizes

LLM_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)
VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "layer_norm_eps",
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A SigLIP tower as Bagel uses it; field names as in ``vit_config.json``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """Layers that are built and stored: one fewer than ``vit_config.json`` says."""
    num_attention_heads: int
    num_channels: int = 3
    image_size: int = 980
    """Pixels per side that the learned table of positions covers."""
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    max_patches_per_side: int = 70
    """Side of the language model's table of patch positions."""

    @property
    def patch_channels(self) -> int:
        """Numbers per patch: row, column, channel, channel fastest."""
        return self.patch_size**2 * self.num_channels

    @classmethod
    def from_upstream(
        cls, vit_config: Mapping[str, Any], max_patches_per_side: int = 70
    ) -> VisionConfig:
        """Read ``vit_config.json``, whose last layer upstream leaves out."""
        return cls(
            **{name: vit_config[name] for name in VISION_FIELDS if name in vit_config},
            num_hidden_layers=vit_config["num_hidden_layers"] - 1,
            max_patches_per_side=max_patches_per_side,
        )

    def to_upstream(self) -> dict[str, Any]:
        """Return the fields of ``vit_config.json``."""
        fields = {name: getattr(self, name) for name in VISION_FIELDS}
        return {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            **fields,
            "num_hidden_layers": self.num_hidden_layers + 1,
        }


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    """A Bagel language model with its generation path.

    Source: Bagel, https://arxiv.org/abs/2505.14683; field names as in the published files.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    bos: int
    """Opens every text."""
    eos: int
    """Closes every text; a sampled one as an action, a truncated one as a mark."""
    start_of_image: int
    end_of_image: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    z_channels: int = 16
    """Channels of one latent pixel."""
    latent_patch_size: int = 2
    """Latent pixels per side of one latent token."""
    latent_downsample: int = 8
    """Image pixels per side of one latent pixel."""
    max_latent_size: int = 64
    """Side of the table of latent positions."""
    vision: VisionConfig | None = None
    """The tower for input images; ``None`` = this model does not look at images."""

    @property
    def cache_sizes(self) -> Sizes:
        """What is remembered of a row."""
        return Sizes(self.num_hidden_layers, self.num_key_value_heads, self.head_dim)

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def latent_channels(self) -> int:
        """C, numbers per latent token: patch row, patch column, channel, channel fastest."""
        return self.latent_patch_size**2 * self.z_channels

    @property
    def pixels_per_token(self) -> int:
        """Image pixels per side of one latent token."""
        return self.latent_patch_size * self.latent_downsample

    @classmethod
    def from_upstream(
        cls,
        *,
        llm_config: Mapping[str, Any],
        bagel_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        special_tokens: Mapping[str, int],
        vit_config: Mapping[str, Any] | None = None,
    ) -> BagelConfig:
        """Read the published JSON fields.

        Args:
            llm_config: ``llm_config.json``.
            bagel_config: ``latent_patch_size``, ``max_latent_size``, ``vit_max_num_patch_per_side``.
            vae_config: ``z_channels`` and ``downsample``.
            special_tokens: ``bos_token_id``, ``eos_token_id``, ``start_of_image``, ``end_of_image``.
            vit_config: ``vit_config.json``; ``None`` = without vision.
        """
        # transformers 5 moves rope_theta when it writes a Qwen2 configuration.
        theta = llm_config.get("rope_theta") or llm_config["rope_parameters"]["rope_theta"]
        vision = vit_config and VisionConfig.from_upstream(
            vit_config, bagel_config["vit_max_num_patch_per_side"]
        )
        return cls(
            **{name: llm_config[name] for name in LLM_FIELDS},
            rope_theta=theta,
            z_channels=vae_config["z_channels"],
            latent_downsample=vae_config["downsample"],
            latent_patch_size=bagel_config["latent_patch_size"],
            max_latent_size=bagel_config["max_latent_size"],
            bos=special_tokens["bos_token_id"],
            eos=special_tokens["eos_token_id"],
            start_of_image=special_tokens["start_of_image"],
            end_of_image=special_tokens["end_of_image"],
            vision=vision or None,
        )

    def to_upstream(self) -> dict[str, Any]:
        """Return the fields of ``llm_config.json``."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "qk_norm": True,
            "tie_word_embeddings": False,
            "layer_module": "Qwen2MoTDecoderLayer",
            **{name: getattr(self, name) for name in LLM_FIELDS},
            "rope_theta": self.rope_theta,
        }


RELEASES = {
    "ByteDance-Seed/BAGEL-7B-MoT": BagelConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        bos=151644,
        eos=151645,
        start_of_image=151652,
        end_of_image=151653,
        vision=VisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16
        ),
    )
}
"""Sizes of published models, for estimates without their files."""
