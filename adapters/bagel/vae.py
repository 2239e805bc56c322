"""Bagel's image autoencoder: diffusers' ``AutoencoderKL`` under upstream's weight names.

The published ``ae.safetensors`` is FLUX.1's autoencoder. Its sizes are read from the shapes in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lightning_unigrpo.adapters.bagel.vision import patchify, unpatchify
from lightning_unigrpo.types import Grid

SCALE, SHIFT = 0.3611, 0.1159
"""``latent = SCALE * (z - SHIFT)``; constants of upstream's code, in no file."""


class BagelVAE(nn.Module):
    """Pixels to latent tokens and back, in float32.

    Args:
        vae: diffusers' ``AutoencoderKL``, with its scale and shift in its configuration.
        patch: latent pixels per side of a token.
    """

    def __init__(self, vae: Any, patch: int) -> None:
        super().__init__()
        self.vae = vae
        self.patch = patch
        config = self.vae.config
        self.scale, self.shift = float(config["scaling_factor"]), float(config["shift_factor"])
        self.vae.enable_slicing()  # one image at a time: a decoder's activations at 1024 px are 4 GB

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return tokens ``[B, N, C]`` float32.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1], sides multiples of a token's pixels.
            generator: of the posterior's sample; ``None`` takes its mean.
        """
        with torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return patchify(self.scale * (z.float() - self.shift), self.patch)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Return ``[B, 3, H, W]`` float32 in about [-1, 1] for tokens ``[B, N, C]``."""
        z = unpatchify(tokens.float(), grid, self.patch) / self.scale + self.shift
        with torch.autocast(z.device.type, enabled=False):
            pixels: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return pixels.float()


def build_vae(shapes: Mapping[str, Sequence[int]], **overrides: Any) -> AutoencoderKL:
    """Return an autoencoder of the sizes that upstream's tensors have.

    Args:
        shapes: name to shape in ``ae.safetensors``.
        overrides: other arguments of ``AutoencoderKL``, such as ``scaling_factor``.
    """
    levels = _count(LEVEL, shapes)
    channels = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)]
    settings: dict[str, Any] = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": channels,
        "layers_per_block": _count(r"encoder\.down\.0\.block\.(\d+)\.", shapes),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": 32,
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "force_upcast": False,
    }
    return AutoencoderKL(**(settings | overrides))  # type: ignore[no-untyped-call]


LEVEL = r"encoder\.down\.(\d+)\."


def _count(pattern: str, names: Iterable[str]) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.match(pattern, name)))


RENAMES = (
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def diffusers_name(name: str, levels: int) -> str:
    """Return diffusers' name of upstream's tensor; its decoder counts levels from the other end.

    Example:
        >>> diffusers_name("decoder.up.3.block.0.nin_shortcut.weight", 4)
        'decoder.up_blocks.0.resnets.0.conv_shortcut.weight'
    """
    for pattern, new in RENAMES:
        name = re.sub(pattern, new, name)
    up = re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name)
    if up:
        part = "resnets" if up[2] == "block" else "upsamplers.0"
        name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{part}.{up[3]}"
    return name


def vae_names(upstream: Iterable[str]) -> dict[str, str]:
    """Return upstream's names with those of diffusers."""
    names = list(upstream)
    levels = _count(LEVEL, names)
    return {name: diffusers_name(name, levels) for name in names}
