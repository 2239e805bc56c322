"""Sizes and special tokens of a Bagel model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
    ) -> BagelConfig:
        """Read the published JSON fields.

        Args:
            llm_config: ``llm_config.json``.
            bagel_config: ``latent_patch_size`` and ``max_latent_size``.
            vae_config: ``z_channels`` and ``downsample``.
            special_tokens: ``bos_token_id``, ``eos_token_id``, ``start_of_image``, ``end_of_image``.
        """
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
            "rope_theta",
        )
        return cls(
            **{name: llm_config[name] for name in names},
            z_channels=vae_config["z_channels"],
            latent_downsample=vae_config["downsample"],
            latent_patch_size=bagel_config["latent_patch_size"],
            max_latent_size=bagel_config["max_latent_size"],
            bos=special_tokens["bos_token_id"],
            eos=special_tokens["eos_token_id"],
            start_of_image=special_tokens["start_of_image"],
            end_of_image=special_tokens["end_of_image"],
        )
