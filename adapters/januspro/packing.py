"""Turn trajectories into the rows of one packed pass, and blocks of new input into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.attention import Block, Kind, Layout
from lightning_unigrpo.adapters.common.packing import RowPacker
from lightning_unigrpo.adapters.januspro.network import Pack
from lightning_unigrpo.types import TokenImageSegment

FEATURE, CODE = 1 << 40, 1 << 41
"""Where rows of each sort are numbered from, until all are known: words and marks from 0."""


@dataclass
class Packer(RowPacker):
    """Collects blocks sample by sample; knows pictures as features and as codes."""

    width: int
    """d of features."""
    begin_image: int
    """Mark before codes."""
    features: list[Tensor] = field(default_factory=list)
    feature_positions: list[int] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    code_positions: list[int] = field(default_factory=list)
    image_rows: list[int] = field(default_factory=list)
    drawn: list[TokenImageSegment] = field(default_factory=list)

    def seen(
        self,
        key: object,
        before: Sequence[int],
        features: Tensor,
        after: Sequence[int],
        position: int,
    ) -> None:
        """Add a causal block that later ones see: marks, a picture's features, marks.

        Args:
            key: of the picture; equal keys are shared rows, where those are asked for.
            before: ids.
            features: ``[n, d]``.
            after: ids.
            position: of the first row.
        """

        def rows() -> Block:
            first, count = FEATURE + len(self.feature_positions), len(features)
            self.features.append(features.to(self.device))
            behind = position + len(before)
            self.feature_positions += range(behind, behind + count)
            return Kind.CAUSAL, [
                *self._words(before, position),
                *range(first, first + count),
                *self._words(after, behind + count),
            ]

        self.visible((key, *before, *after), rows)

    def drawing(self, image: TokenImageSegment, position: int) -> None:
        """Add the rows that predict a picture's N codes: the mark and all codes but the last.

        Nothing sees them: a picture that is looked at is looked at as features.
        """
        first, codes = CODE + len(self.code_positions), image.tokens[:-1]
        self.codes.append(codes.to(self.device))
        self.code_positions += range(position + 1, position + 1 + len(codes))
        rows = [
            *self._words([self.begin_image], position),
            *range(first, first + len(codes)),
        ]
        self.samples[-1].append((Kind.CAUSAL_NOISE, rows))
        self.image_rows += rows
        self.drawn.append(image)

    def _words(self, ids: Sequence[int], position: int) -> range:
        first = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return range(first, len(self.ids))

    def finish(self) -> tuple[Pack, Layout]:
        """Return the rows and the sequences they form."""
        to_feature = len(self.ids) - FEATURE
        to_code = len(self.ids) + len(self.feature_positions) - CODE

        def number(row: int) -> int:
            return row if row < FEATURE else row + (to_feature if row < CODE else to_code)

        samples = [
            [(kind, [*map(number, rows)]) for kind, rows in blocks] for blocks in self.samples
        ]
        none = torch.zeros(0, self.width, device=self.device)
        pack = Pack(
            token_ids=self.long(self.ids),
            features=torch.cat(self.features) if self.features else none,
            codes=torch.cat(self.codes) if self.codes else self.long([]),
            positions=self.long(self.positions + self.feature_positions + self.code_positions),
            logit_rows=self.long([*map(number, self.logit_rows)]),
            image_rows=self.long([*map(number, self.image_rows)]),
        )
        return pack, Layout.build(samples, self.device)
