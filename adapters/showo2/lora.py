"""Low-rank adapters on chosen stacks."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unigrpo.adapters.common.lora import LowRank

STACKS = {"text": r"showo\.model\.layers", "flow": r"diffusion_head_a"}


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Which stacks get adapters, and of what size."""

    stacks: tuple[str, ...] = ("text", "flow")
    """``text``: the language model, ``flow``: the flow stack."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("stacks", self.stacks, tuple(STACKS))

    @property
    def pattern(self) -> str:
        """A regular expression over module names, as peft matches it."""
        where = "|".join(STACKS[stack] for stack in self.stacks)
        return rf"(.*\.)?({where})\.\d+\.\w+\.({'|'.join(self.projections)})"
