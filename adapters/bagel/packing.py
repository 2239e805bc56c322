"""Turn trajectories into the rows of one packed pass, and blocks of new input into rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.network import Pack
from lightning_unigrpo.adapters.common.attention import Block, Kind, Layout
from lightning_unigrpo.adapters.common.packing import RowPacker
from lightning_unigrpo.types import Grid, ImageSegment

VISION, LATENT = 1 << 40, 1 << 41
"""Where rows of each sort are numbered from, until all are known: words and marks from 0."""


@dataclass
class Packer(RowPacker):
    """Collects blocks sample by sample; knows marks and positions, nothing of policies."""

    config: BagelConfig
    """Marks and sizes."""
    vision: list[Tensor] = field(default_factory=list)
    vision_positions: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    latent_positions: list[int] = field(default_factory=list)
    velocity_rows: list[int] = field(default_factory=list)
    velocity_shapes: list[torch.Size] = field(default_factory=list)

    def clean(self, image: ImageSegment, position: int) -> None:
        """Add an image that later blocks see, as latents at sigma 0."""

        def rows() -> Block:
            latent = image.views.get("vae", image.latent).to(self.device).unsqueeze(0)
            zero = latent.new_zeros(1)
            return self._images(Kind.FULL, latent, zero, image.grid, position)[0]

        self.visible((image, "vae"), rows)

    def seen(self, image: ImageSegment, position: int) -> None:
        """Add what the vision tower saw of an image, ``image.views["vit"]``."""

        def rows() -> Block:
            found = image.views["vit"].to(self.device)
            first = VISION + len(self.vision_positions)
            self.vision.append(found)
            self.vision_positions += [position] * len(found)
            return self._between_marks(Kind.FULL, range(first, first + len(found)), position)

        self.visible((image, "vit"), rows)

    def noisy(self, latents: Tensor, sigmas: Tensor, grid: Grid, position: int) -> None:
        """Add k images ``[k, N, C]`` at noise levels ``[k]``, side by side; they want velocities."""
        first, shape = len(self.latent_positions), latents.shape
        self.samples[-1] += self._images(Kind.NOISE, latents, sigmas, grid, position)
        self.velocity_rows += range(first, len(self.latent_positions))
        self.velocity_shapes.append(shape)

    def _images(
        self, kind: Kind, latents: Tensor, sigmas: Tensor, grid: Grid, position: int
    ) -> list[Block]:
        count, num, _ = latents.shape
        first = LATENT + len(self.latent_positions)
        self.latents.append(latents)
        self.sigmas.append(sigmas)
        self.grids += [grid] * count
        self.latent_positions += [position] * count * num
        return [
            self._between_marks(kind, range(row, row + num), position)
            for row in range(first, first + count * num, num)
        ]

    def _between_marks(self, kind: Kind, rows: range, position: int) -> Block:
        """Return a bidirectional block; all rows of it are at one RoPE position."""
        mark = len(self.ids)
        self.ids += [self.config.start_of_image, self.config.end_of_image]
        self.positions += [position, position]
        return kind, [mark, *rows, mark + 1]

    def finish(self) -> tuple[Pack, Layout]:
        """Return the rows and the sequences they form."""
        to_vision = len(self.ids) - VISION
        to_latent = len(self.ids) + len(self.vision_positions) - LATENT

        def number(row: int) -> int:
            return row if row < VISION else row + (to_vision if row < LATENT else to_latent)

        samples = [
            [(kind, rows if kind is Kind.CAUSAL else [*map(number, rows)]) for kind, rows in blocks]
            for blocks in self.samples
        ]
        empty = torch.zeros(0, self.config.latent_channels, device=self.device)
        ids = [position_ids(grid, self.config.max_latent_size) for grid in self.grids]
        sizes = [len(each) for each in ids]
        pack = Pack(
            token_ids=self.long(self.ids),
            positions=self.long(self.positions + self.vision_positions),
            latents=torch.cat([x.flatten(0, 1) for x in self.latents]) if self.latents else empty,
            sigma=torch.cat(self.sigmas) if self.sigmas else empty[:, 0],
            image_of=self.long([i for i, size in enumerate(sizes) for _ in range(size)]),
            latent_ids=torch.cat(ids).to(self.device) if ids else self.long([]),
            latent_positions=self.long(self.latent_positions),
            logit_rows=self.long(self.logit_rows),
            velocity_rows=self.long(self.velocity_rows),
            extra=torch.cat(self.vision) if self.vision else None,
        )
        return pack, Layout.build(samples, self.device)


@lru_cache(maxsize=64)
def position_ids(grid: Grid, side: int) -> Tensor:
    """Return ``[h * w]`` rows of the position table, ``i * side + j``; shared, so do not write to it.

    No centring and no interpolation, at any grid.

    Raises:
        ValueError: when the grid is larger than the table.
    """
    h, w = grid
    if max(grid) > side:
        raise ValueError(
            f"An image of {h} x {w} tokens does not fit this checkpoint's table of positions "
            f"({side} x {side}); ask for a smaller Prompt.size."
        )
    return (torch.arange(h).unsqueeze(1) * side + torch.arange(w)).flatten()
