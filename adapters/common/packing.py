"""Turn trajectories into flat rows: what every packer does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.attention import HIDDEN, Block, Kind


@dataclass(kw_only=True)
class RowPacker:
    """Collects blocks sample by sample; knows words and equal beginnings.

    Words are numbered from 0; a subclass numbers rows of other sorts from numbers that words never reach,
    and moves them behind the words when all are known.

    Args:
        device: of the rows.
        share: let samples that begin with the same words and images share those rows.
    """

    device: torch.device
    share: bool = False
    prefix: tuple[object, ...] = ()
    known: dict[tuple[object, ...], Block] = field(default_factory=dict)
    samples: list[list[Block]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Begin the next sample."""
        self.samples.append([])
        self.prefix = ()

    @property
    def last_row(self) -> int:
        """The last row of the present sample that later ones see.

        Raises:
            ValueError: when there is none.
        """
        for kind, rows in reversed(self.samples[-1]):
            if kind not in HIDDEN and rows:
                return rows[-1]
        raise ValueError(
            "A sampled text stands at the very beginning: its first word has nothing to follow. Give the "
            "prompt at least one token."
        )

    def text(
        self, ids: Sequence[int], position: int, *, score: int = 0, last: bool = False
    ) -> None:
        """Add a causal block; ``score`` rows from its start (or its ``last`` row) want logits."""

        def rows() -> Block:
            first = len(self.ids)
            self.ids.extend(ids)
            self.positions.extend(range(position, position + len(ids)))
            return Kind.CAUSAL, list(range(first, len(self.ids)))

        _, numbers = self.visible((*ids,), rows)
        self.logit_rows += numbers[-1:] if last else numbers[:score]

    def read_on(self, ids: Sequence[int], position: int, *, score: int = 0) -> None:
        """Add a causal block that may be empty; of ``score`` words the first follows the row before it."""
        if score:
            self.logit_rows.append(self.last_row)
        if ids:
            self.text(ids, position, score=score - 1 if score else 0)

    def visible(self, content: tuple[object, ...], rows: Callable[[], Block]) -> Block:
        """Add a block that later ones see: new rows, or those of an equal beginning."""
        self.prefix = (self.prefix, *content)
        block = self.known.get(self.prefix) if self.share else None
        if block is None:
            block = self.known[self.prefix] = rows()
        self.samples[-1].append(block)
        return block

    def long(self, values: list[int]) -> Tensor:
        """Return int64 on the rows' device."""
        return torch.tensor(values, dtype=torch.long, device=self.device)
