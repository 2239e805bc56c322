"""Turn trajectories into the rows of one packed pass, and blocks of new input into rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.attention import Block, Kind, Layout
from lightning_unigrpo.adapters.common.packing import RowPacker
from lightning_unigrpo.adapters.janusflow.config import JanusFlowConfig
from lightning_unigrpo.adapters.janusflow.network import Pack
from lightning_unigrpo.types import Grid

SEEN, DRAWN = 1 << 40, 1 << 41
"""Where rows of each sort are numbered from, until all are known: words from 0."""


@dataclass
class Packer(RowPacker):
    """Collects blocks sample by sample; knows rows and positions, nothing of policies."""

    config: JanusFlowConfig
    """Sizes."""
    seen: list[Tensor] = field(default_factory=list)
    seen_positions: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    drawn_positions: list[int] = field(default_factory=list)
    velocity_shapes: list[torch.Size] = field(default_factory=list)

    def picture(self, key: object, features: Tensor, position: int) -> None:
        """Add rows ``[n, d]`` of a picture, one position each; they see those before them.

        Args:
            key: what equal pictures share.
            features: the rows.
            position: of the first.
        """

        def rows() -> Block:
            first = SEEN + len(self.seen_positions)
            self.seen.append(features.to(self.device))
            self.seen_positions += range(position, position + len(features))
            return Kind.CAUSAL, list(range(first, first + len(features)))

        self.visible((key, SEEN), rows)

    def noisy(self, latents: Tensor, sigmas: Tensor, grid: Grid, position: int) -> None:
        """Add k images ``[k, N, C]`` at noise levels ``[k]``, side by side; they want velocities."""
        num, first = self.config.num_rows(grid), DRAWN + len(self.drawn_positions)
        for row in range(first, first + len(latents) * num, num):
            self.drawn_positions += range(position, position + num)
            self.samples[-1].append((Kind.CAUSAL_NOISE, list(range(row, row + num))))
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
        empty = torch.zeros(0, self.config.flow.latent_channels, device=self.device)
        pack = Pack(
            token_ids=self.long(self.ids),
            seen=torch.cat(self.seen) if self.seen else None,
            latents=torch.cat([x.flatten(0, 1) for x in self.latents]) if self.latents else empty,
            sigma=torch.cat(self.sigmas) if self.sigmas else empty[:, 0],
            grids=tuple(self.grids),
            positions=self.long(self.positions + self.seen_positions + self.drawn_positions),
            logit_rows=self.long([*map(number, self.logit_rows)]),
        )
        return pack, Layout.build(samples, self.device)
