"""Turn trajectories into the rows of one packed pass, and blocks of new input into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lightning_unigrpo.adapters.bagel.attention import Block, Kind, Layout
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.network import Pack
from lightning_unigrpo.types import Grid


@dataclass
class Packer:
    """Collects blocks sample by sample; knows marks and positions, nothing of policies.

    Understanding rows are numbered 0, 1, ...; latent rows are kept as -1, -2, ... until :meth:`finish`
    knows how many understanding rows stand before them.
    """

    config: BagelConfig
    device: torch.device
    samples: list[list[Block]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    velocity_rows: list[int] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    sigma: list[Tensor] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    latent_positions: list[int] = field(default_factory=list)
    num_latents: int = 0

    def sample(self) -> None:
        """Begin the next sample."""
        self.samples.append([])

    def text(
        self, ids: Sequence[int], position: int, *, score: int = 0, last: bool = False
    ) -> None:
        """Add a causal block; ``score`` rows from its start (or its ``last`` row) want logits."""
        first = len(self.ids)
        self.ids.extend(ids)
        self.positions.extend(range(position, position + len(ids)))
        self.logit_rows.extend(range(first, first + score))
        if last:
            self.logit_rows.append(len(self.ids) - 1)
        self.samples[-1].append((Kind.CAUSAL, list(range(first, len(self.ids)))))

    def image(
        self, latent: Tensor, sigma: Tensor, grid: Grid, position: int, *, noise: bool
    ) -> None:
        """Add one bidirectional block: mark, latent tokens ``[N, C]`` at sigma ``[N]``, mark.

        Every row of it has the same RoPE position.
        """
        start, num = len(self.ids), len(latent)
        self.ids += [self.config.start_of_image, self.config.end_of_image]
        self.positions += [position, position]
        first = self.num_latents
        self.num_latents += num
        self.latents.append(latent)
        self.sigma.append(sigma)
        self.grids.append(grid)
        self.latent_positions.extend([position] * num)
        if noise:
            self.velocity_rows.extend(range(first, first + num))
        rows = [start, *range(-1 - first, -1 - first - num, -1), start + 1]
        self.samples[-1].append((Kind.NOISE if noise else Kind.FULL, rows))

    def finish(self) -> tuple[Pack, Layout]:
        """Return the rows and the sequences they form."""
        offset = len(self.ids) - 1
        for blocks in self.samples:
            for number, (kind, rows) in enumerate(blocks):
                if kind is not Kind.CAUSAL:
                    blocks[number] = (kind, [r if r >= 0 else offset - r for r in rows])
        empty = torch.zeros(0, self.config.latent_channels, device=self.device)
        ids = [latent_ids(grid, self.config.max_latent_size) for grid in self.grids]
        pack = Pack(
            token_ids=self._long(self.ids),
            positions=self._long(self.positions),
            latents=torch.cat(self.latents) if self.latents else empty,
            sigma=torch.cat(self.sigma) if self.sigma else empty[:, 0],
            latent_ids=torch.cat(ids).to(self.device) if ids else self._long([]),
            latent_positions=self._long(self.latent_positions),
            logit_rows=self._long(self.logit_rows),
            velocity_rows=self._long(self.velocity_rows),
        )
        return pack, Layout.build(self.samples, self.device)

    def _long(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


@lru_cache(maxsize=64)
def latent_ids(grid: Grid, side: int) -> Tensor:
    """Return ``[h * w]`` rows of the position table, ``i * side + j``; shared, so do not write to it.

    No centring and no interpolation, at any grid.

    Raises:
        ValueError: when the grid is larger than the table.
    """
    h, w = grid
    if max(grid) > side:
        raise ValueError(
            f"An image of {h} x {w} latent tokens does not fit this checkpoint's table of latent positions "
            f"({side} x {side}); ask for a smaller Prompt.size."
        )
    return (torch.arange(h).unsqueeze(1) * side + torch.arange(w)).flatten()
