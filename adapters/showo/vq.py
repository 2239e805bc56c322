"""Show-o's codes of an image: a MAGVIT-v2, whose quantiser keeps the sign of each channel.

Names are those of the published file; the blocks are those of ``transformers``' Janus, which has the same.

Source: MAGVIT-v2, https://arxiv.org/abs/2310.05737; sizes in upstream's ``models/modeling_magvitv2.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.janus import modeling_janus
from transformers.models.janus.configuration_janus import JanusVQVAEConfig

from lightning_unigrpo.types import Grid

janus: Any = modeling_janus  # its classes have no types
BLOCKS = JanusVQVAEConfig(dropout=0.0)
"""The one setting that a block reads."""


class Levels(NamedTuple):
    """The resolutions of an encoder or a decoder, from the finest; each halves the one before."""

    widths: tuple[int, ...]
    """Channels, in multiples of the base."""
    blocks: tuple[int, ...]
    """How many there are."""


ENCODER = Levels((1, 2, 2, 4, 4), (4, 3, 4, 3, 4))
DECODER = Levels((1, 1, 2, 2, 4), (4, 4, 3, 4, 3))


def _level(width_in: int, width: int, blocks: int, **resampling: nn.Module) -> nn.Sequential:
    """Return the blocks of one resolution, and what leads to the next."""
    widths = [width_in, *[width] * (blocks - 1)]
    block = nn.Sequential(*(janus.JanusVQVAEResnetBlock(BLOCKS, w, width) for w in widths))
    return nn.Sequential(OrderedDict(block=block, **resampling))


class Encoder(nn.Module):
    """Pixels to one number per bit of a code."""

    def __init__(self, base: int, levels: Levels, bits: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.down, width = nn.Sequential(), base
        for number, (multiple, blocks) in enumerate(zip(*levels, strict=True), 1):
            width_in, width = width, base * multiple
            is_last = number == len(levels.widths)
            more = {} if is_last else {"downsample": janus.JanusVQVAEConvDownsample(width)}
            self.down.append(_level(width_in, width, blocks, **more))
        self.mid = janus.JanusVQVAEMidBlock(BLOCKS, width)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return ``[B, bits, h, w]`` for ``[B, 3, H, W]``."""
        x = self.mid(self.down(self.conv_in(pixels)))
        return cast(Tensor, self.quant_conv(self.conv_out(silu(self.norm_out(x)))))


class Decoder(nn.Module):
    """Bits of codes to pixels."""

    def __init__(self, base: int, levels: Levels, bits: int) -> None:
        super().__init__()
        width = base * levels.widths[-1]
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, width, 3, padding=1)
        self.mid = janus.JanusVQVAEMidBlock(BLOCKS, width)
        up = []
        for number, (multiple, blocks) in reversed([*enumerate(zip(*levels, strict=True))]):
            width_in, width = width, base * multiple
            more = {"upsample": janus.JanusVQVAEConvUpsample(width)} if number else {}
            up.append(_level(width_in, width, blocks, **more))
        self.up = nn.ModuleList(reversed(up))  # numbered from the finest, run from the coarsest
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, bits: Tensor) -> Tensor:
        """Return ``[B, 3, H, W]`` for ``[B, bits, h, w]``."""
        x = self.mid(self.conv_in(self.post_quant_conv(bits)))
        for level in reversed(self.up):
            x = level(x)
        return cast(Tensor, self.conv_out(silu(self.norm_out(x))))


class ShowOVQ(nn.Module):
    """Pixels to codes and back; the release's sizes are the defaults.

    Bit ``b`` of a code, the highest first, is 1 where channel ``b`` of the encoder is positive; the decoder
    reads +1 and -1. So there is no table to look codes up in.

    Args:
        base: channels of the finest resolution, a multiple of 32.
        encoder: resolutions of the encoder.
        decoder: resolutions of the decoder, as many.
        bits: of a code.
    """

    def __init__(
        self,
        *,
        base: int = 128,
        encoder: Levels = ENCODER,
        decoder: Levels = DECODER,
        bits: int = 13,
    ) -> None:
        super().__init__()
        self.bits, self.stride = bits, 2 ** (len(encoder.widths) - 1)
        self.encoder, self.decoder = Encoder(base, encoder, bits), Decoder(base, decoder, bits)

    @property
    def num_codes(self) -> int:
        """Codes that there are."""
        return 1 << self.bits

    def _shifts(self, device: torch.device) -> Tensor:
        return torch.arange(self.bits - 1, -1, -1, device=device).view(-1, 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return codes ``[B, N]`` int64, row-major, for ``[B, 3, H, W]`` in [-1, 1].

        H and W are multiples of :attr:`stride`.
        """
        weight = self.encoder.conv_in.weight
        # Reduced precision would change signs.
        with torch.autocast(pixels.device.type, enabled=False):
            bits: Tensor = self.encoder(pixels.to(weight.dtype)).flatten(2) > 0
        return (bits.long() << self._shifts(bits.device)).sum(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Return pixels ``[B, 3, H, W]`` float32, about [-1, 1], for codes ``[B, N]`` of a grid."""
        weight = self.decoder.conv_in.weight
        bits = codes.unsqueeze(1) >> self._shifts(codes.device) & 1
        signs = (2 * bits - 1).to(weight.dtype).unflatten(2, grid)
        with torch.autocast(codes.device.type, enabled=False):
            return cast(Tensor, self.decoder(signs)).float()
