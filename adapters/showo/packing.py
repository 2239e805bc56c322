"""Turn trajectories into the rows of one packed pass, and blocks of new input into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.attention import Block, Kind, Layout
from lightning_unigrpo.adapters.common.packing import RowPacker
from lightning_unigrpo.adapters.showo.config import ShowOConfig
from lightning_unigrpo.adapters.showo.network import Pack
from lightning_unigrpo.types import TokenImageSegment

Runs = list[list[int]]
"""Words of a context, a list for each stretch between its images."""


@dataclass
class Packer(RowPacker):
    """Collects blocks sample by sample; an image that is drawn is a sample of its own."""

    config: ShowOConfig
    """Marks and codes."""
    heard: Runs = field(default_factory=lambda: [[]])
    """Words of the present sample."""
    image_rows: list[int] = field(default_factory=list)
    drawn: list[tuple[TokenImageSegment, Tensor]] = field(default_factory=list)
    """Images, with the positions ``[m]`` of the codes that are asked for, in the order of ``image_rows``."""

    def sample(self) -> None:
        """Begin the next sample."""
        super().sample()
        self.heard = [[]]

    def picture(self, image: TokenImageSegment, position: int) -> int:
        """Add an image that later blocks see; returns its number of rows."""
        ids = self.framed(image.tokens)

        def rows() -> Block:
            return Kind.FULL, self._rows(ids, position)

        self.visible(("picture", *ids), rows)
        return len(ids)

    def words_before(self, ids: Sequence[int], position: int) -> None:
        """Add the words that an image is drawn behind to the present sample, which has none yet."""
        self.visible(("drawn", *ids), lambda: (Kind.CAUSAL, self._rows([*ids], position)))

    def state(self, codes: Tensor, where: Sequence[int], position: int) -> None:
        """Add an image as a step sees it, ``[N]`` codes and -1; ``where`` says which codes are asked for."""
        rows = self._rows(self.framed(codes), position)
        self.samples[-1].append((Kind.NOISE, rows))
        self.image_rows += [rows[1 + n] for n in where]

    def drawing(
        self, image: TokenImageSegment, ids: Sequence[int], steps: slice, position: int
    ) -> None:
        """Add a sampled image, its words and states, as a sample of its own beside the present one.

        Args:
            image: with the steps it is scored at.
            ids: of the words that it was drawn behind.
            steps: which of them.
            position: of the image's first row; the words end right before it.
        """
        present, chain, heard = self.samples.pop(), self.prefix, self.heard
        self.sample()
        self.words_before(ids, position - len(ids))
        revealed = [torch.zeros(0, dtype=torch.long)]
        for codes, where in image.masked_states(steps):
            self.state(codes, where.tolist(), position)
            revealed.append(where.cpu())
        self.drawn.append((image, torch.cat(revealed)))
        self.samples.append(present)
        self.prefix, self.heard = chain, heard

    def framed(self, codes: Tensor) -> list[int]:
        """Return the ids of an image ``[N]`` and the marks around it; -1 is the mask."""
        config = self.config
        ids = torch.where(codes < 0, config.mask_id, codes + config.code_offset)
        return [config.begin_image, *ids.tolist(), config.end_image]

    def _rows(self, ids: list[int], position: int) -> list[int]:
        first = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return [*range(first, len(self.ids))]

    def finish(self) -> tuple[Pack, Layout]:
        """Return the rows and the sequences they form."""
        pack = Pack(
            token_ids=self.long(self.ids),
            positions=self.long(self.positions),
            logit_rows=self.long(self.logit_rows),
            image_rows=self.long(self.image_rows),
        )
        return pack, Layout.build(self.samples, self.device)
