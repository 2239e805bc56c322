"""Low-rank adapters on phi-1.5's projections."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unigrpo.adapters.common.lora import LowRank

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Size of the adapters, and which projections of each layer get them."""

    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        """Refuse projections that phi-1.5 has not, and a rank of nothing."""
        self.require_known("projections", self.projections, PROJECTIONS)
        self.require_rank()
