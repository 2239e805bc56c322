"""Low-rank adapters on chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_unigrpo.adapters.common.lora import PROJECTIONS, LowRank


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Which experts get adapters, and of what size."""

    experts: tuple[str, ...] = ("text", "flow")
    """``text``: the understanding expert, ``flow``: the generation expert."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("experts", self.experts, ("text", "flow"))

    @property
    def pattern(self) -> str:
        """A regular expression over module names, as peft matches it."""
        both = {"text", "flow"} <= set(self.experts)
        suffix = "(_moe_gen)?" if both else "_moe_gen" if "flow" in self.experts else ""
        attention = "|".join(p for p in self.projections if p in PROJECTIONS[:4])
        mlp = "|".join(p for p in self.projections if p in PROJECTIONS[4:])
        parts = [rf"self_attn\.({attention}){suffix}"] if attention else []
        parts += [rf"mlp{suffix}\.({mlp})"] if mlp else []
        return rf".*\.({'|'.join(parts)})"
