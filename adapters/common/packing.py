"""Turn trajectories into flat rows: what every packer does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.attention import Block, Kind


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
