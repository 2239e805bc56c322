"""Turn trajectories into the rows of one packed pass, and blocks of new input into rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.attention import Block, Kind, Layout
from lightning_unigrpo.adapters.common.packing import RowPacker
from lightning_unigrpo.adapters.showo2.config import ShowO2Config
from lightning_unigrpo.adapters.showo2.network import Pack
from lightning_unigrpo.types import Grid

SEEN, DRAWN = 1 << 40, 1 << 41
"""Where rows of each sort are numbered from, until all are known: words from 0."""


@dataclass
class Packer(RowPacker):
    """Collects blocks sample by sample; knows rows and positions, nothing of policies."""

    config: ShowO2Config
    """Sizes and marks."""
    seen: list[Tensor] = field(default_factory=list)
    seen_grids: list[Grid] = field(default_factory=list)
    seen_positions: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    drawn_positions: list[int] = field(default_factory=list)
    velocity_shapes: list[torch.Size] = field(default_factory=list)
    before: tuple[list[Block], tuple[object, ...]] | None = None
    """Blocks and contents of the present sample before the mark of an image that nothing else follows."""

    def sample(self) -> None:
        """Begin the next sample."""
        super().sample()
        self.before = None

    def open(self, position: int) -> int:
        """Add the mark before an image, unless the present sample just did; returns the next position."""
        if self.before is None:
            self.before = (list(self.samples[-1]), self.prefix)
            self.text([self.config.begin_of_image], position)
        return position + 1

    def go_on(self) -> None:
        """Let what comes next see nothing of an image that was drawn and is not seen, nor its mark.

        The mark is no block of noise, so the sample is left as it is and its rows go on in another.
        """
        if self.before is not None:
            blocks, prefix = self.before
            self.sample()
            self.samples[-1], self.prefix = list(blocks), prefix

    def picture(self, key: object, latents: Tensor, grid: Grid, position: int) -> None:
        """Add an image that later blocks see, behind its mark.

        Args:
            key: what equal images share.
            latents: ``[N, C]``, clean.
            grid: ``(h, w)``.
            position: of the first row.
        """
        num = self.config.num_rows(grid)

        def rows() -> Block:
            first = SEEN + len(self.seen_positions)
            self.seen.append(latents)
            self.seen_grids.append(grid)
            self.seen_positions += range(position, position + num)
            return Kind.FULL, list(range(first, first + num))

        self.visible((key, SEEN), rows)
        self.before = None

    def noisy(self, latents: Tensor, sigmas: Tensor, grid: Grid, position: int) -> None:
        """Add k images ``[k, N, C]`` at noise levels ``[k]``, side by side; they want velocities."""
        num, first = self.config.num_rows(grid), DRAWN + len(self.drawn_positions)
        for row in range(first, first + len(latents) * num, num):
            self.drawn_positions += range(position, position + num)
            self.samples[-1].append((Kind.NOISE, list(range(row, row + num))))
        self.latents.append(latents)
        self.sigmas.append(sigmas)
        self.grids += [grid] * len(latents)
        self.velocity_shapes.append(latents.shape)

    def finish(self) -> tuple[Pack, Layout]:
        """Return the rows and the sequences they form."""
        to_seen = len(self.ids) - SEEN
        to_drawn = len(self.ids) + len(self.seen_positions) - DRAWN

        def number(row: int) -> int:
            return row if row < SEEN else row + (to_seen if row < DRAWN else to_drawn)

        samples = [
            [(kind, rows if rows[0] < SEEN else [*map(number, rows)]) for kind, rows in blocks]
            for blocks in self.samples
        ]
        empty = torch.zeros(0, self.config.latent_channels, device=self.device)
        latents = [*self.seen, *(x.flatten(0, 1) for x in self.latents)]
        clean = torch.zeros(len(self.seen), device=self.device)
        pack = Pack(
            token_ids=self.long(self.ids),
            latents=torch.cat([x.to(self.device) for x in latents]) if latents else empty,
            sigma=torch.cat([clean, *self.sigmas]),
            grids=(*self.seen_grids, *self.grids),
            num_seen=len(self.seen),
            positions=self.long(self.positions + self.seen_positions + self.drawn_positions),
            logit_rows=self.long([*map(number, self.logit_rows)]),
        )
        return pack, Layout.build(samples, self.device)
