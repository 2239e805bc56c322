"""Sizes of a JanusFlow model, from its published ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from lightning_unigrpo.types import Grid

SIGLIP = {
    "siglip_so400m_patch14_384": {
        "width": 1152,
        "layers": 27,
        "heads": 16,
        "patch_size": 14,
        "mlp_ratio": 3.7362,
        "image_size": 384,
    },
    "siglip_large_patch16_384": {
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "patch_size": 16,
        "mlp_ratio": 4.0,
        "image_size": 384,
    },
}
"""Sizes that upstream looks up by ``model_name``; ``params`` that name them win."""


def _read(found: Mapping[str, Any], names: tuple[str, ...], where: str) -> dict[str, Any]:
    """Return some fields of a JSON object.

    Raises:
        ValueError: when one is missing.
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"config.json: {where} lacks {', '.join(missing)}.")
    return {name: found[name] for name in names}


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A SigLIP tower in timm's layout, which reads pictures."""

    width: int
    layers: int
    """Layers that are built and stored."""
    heads: int
    patch_size: int
    image_size: int
    mlp_ratio: float = 4.0

    @property
    def num_patches(self) -> int:
        """Rows of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def mlp_width(self) -> int:
        """Width inside an MLP."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_upstream(cls, params: Mapping[str, Any]) -> VisionConfig:
        """Read ``vision_und_enc_config.params``.

        Raises:
            ValueError: for an unknown tower.
        """
        name = params.get("model_name")
        sizes = {**SIGLIP.get(str(name), {}), **{k: v for k, v in params.items() if v is not None}}
        try:
            sizes = _read(
                sizes,
                ("width", "layers", "heads", "patch_size", "image_size", "mlp_ratio"),
                "vision_und_enc_config.params",
            )
        except ValueError as error:
            raise ValueError(
                f"{error} They are known for model_name {', '.join(SIGLIP)}; it is {name!r}."
            ) from error
        select = params.get("select_layer", -1)
        layers = sizes["layers"]
        sizes["layers"] = min(layers, layers + select + 1 if select <= 0 else select)
        return cls(**sizes)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The encoder of noisy latents and the decoder of velocities; fields of the same name in both files."""

    latent_channels: int
    """C of the autoencoder."""
    encoder_width: int
    encoder_blocks: int
    encoder_eps: float
    kernel_size: int
    stride: int
    padding: int
    decoder_channels: int
    """Width of what the language model hands to the decoder."""
    decoder_blocks: int
    decoder_eps: float
    upsamples: int
    """Doublings of the grid; ``2 ** upsamples`` undoes the stride."""

    @classmethod
    def from_upstream(cls, encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> FlowConfig:
        """Read the ``params`` of ``vision_gen_enc_config`` and ``vision_gen_dec_config``.

        Raises:
            ValueError: for what is not supported, or does not fit together.
        """
        for where, params in (("enc", encoder), ("dec", decoder)):
            where = f"vision_gen_{where}_config.params"
            if not params.get("use_bias", True):
                raise ValueError(f"config.json: {where}.use_bias is false; only true is supported.")
            if not params.get("use_mid_block", True):
                raise ValueError(
                    f"config.json: {where}.use_mid_block is false; only true is supported."
                )
            if params.get("dropout"):
                raise ValueError(
                    f"config.json: {where}.dropout is {params['dropout']}; give 0: a rollout and its update "
                    "must be one policy."
                )
        e = _read(
            encoder,
            ("input_channels", "stride", "kernel_size", "block_out_channels", "layers_in_middle"),
            "vision_gen_enc_config.params",
        )
        d = _read(
            decoder,
            ("in_channels", "out_channels", "block_out_channels", "upsamples", "layers_in_middle"),
            "vision_gen_dec_config.params",
        )
        kernel, stride, padding = e["kernel_size"], e["stride"], encoder.get("padding")
        width, skip = _first(e["block_out_channels"]), _first(d["block_out_channels"][-1:])
        if width != skip:
            raise ValueError(
                f"config.json: the flow encoder's block_out_channels are {e['block_out_channels']}, the "
                f"decoder's {d['block_out_channels']}; the skip needs them equal."
            )
        fits = d["upsamples"] >= 1 and stride == 2 ** d["upsamples"]
        if e["input_channels"] != d["out_channels"] or not fits:
            raise ValueError(
                f"config.json: the flow encoder reads {e['input_channels']} channels at stride {stride}, the "
                f"decoder writes {d['out_channels']} after {d['upsamples']} doublings; they must fit."
            )
        return cls(
            latent_channels=e["input_channels"],
            encoder_width=width,
            encoder_blocks=e["layers_in_middle"],
            encoder_eps=encoder.get("norm_eps", 1e-6),
            kernel_size=kernel,
            stride=stride,
            padding=math.ceil(kernel - stride) if padding is None else padding,
            decoder_channels=d["in_channels"],
            decoder_blocks=d["layers_in_middle"],
            decoder_eps=decoder.get("norm_eps", 1e-6),
            upsamples=d["upsamples"],
        )


@dataclass(frozen=True, kw_only=True)
class JanusFlowConfig:
    """A Llama that speaks and draws, with the parts around it.

    Source: JanusFlow, https://arxiv.org/abs/2411.07975; field names as in the published file.
    """

    language: Mapping[str, Any]
    """``language_config``: fields of ``LlamaConfig``."""
    flow: FlowConfig
    vision: VisionConfig | None = None
    """The tower for pictures; ``None`` = this model does not look at them."""
    bos: int = 100000
    """Opens every context."""
    eos: int = 100001
    """Ends a text of the assistant: an action, if it is sampled."""
    end_of_image: int = 100593
    """Stands behind a picture."""

    @classmethod
    def from_upstream(
        cls, found: Mapping[str, Any], marks: Mapping[str, int] | None = None
    ) -> JanusFlowConfig:
        """Read ``config.json``.

        Args:
            found: its object.
            marks: ids of ``bos``, ``eos`` and ``end_of_image``.

        Raises:
            ValueError: when fields are missing or unsupported.
        """
        parts = ("language_config", "vision_gen_enc_config", "vision_gen_dec_config")
        language, encoder, decoder = _read(found, parts, "the file").values()
        vision = found.get("vision_und_enc_config")
        return cls(
            language=language,
            flow=FlowConfig.from_upstream(encoder["params"], decoder["params"]),
            vision=VisionConfig.from_upstream(vision["params"]) if vision else None,
            **(marks or {}),
        )

    def llama(self) -> LlamaConfig:
        """Return the decoder's configuration; the head is not tied, as in the release."""
        return LlamaConfig(**{"tie_word_embeddings": False, **self.language})

    def num_rows(self, grid: Grid) -> int:
        """Return the rows of an image being drawn: the time embedding, and one per square of latents.

        Raises:
            ValueError: when the grid is no multiple of a square.
        """
        h, w = grid
        if h % self.flow.stride or w % self.flow.stride:
            raise ValueError(
                f"A latent grid of {h} x {w} does not divide into squares of {self.flow.stride}; ask for "
                "another Prompt.size."
            )
        return 1 + h * w // self.flow.stride**2


RELEASES = {
    "deepseek-ai/JanusFlow-1.3B": JanusFlowConfig(
        language={
            "model_type": "llama",
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        },
        flow=FlowConfig(
            latent_channels=4,
            encoder_width=768,
            encoder_blocks=2,
            encoder_eps=1e-6,
            kernel_size=2,
            stride=2,
            padding=0,
            decoder_channels=768,
            decoder_blocks=2,
            decoder_eps=1e-6,
            upsamples=1,
        ),
        vision=VisionConfig(width=1024, layers=24, heads=16, patch_size=16, image_size=384),
    )
}
"""Sizes of published models, for estimates without their files."""
