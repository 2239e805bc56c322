"""One page about a run, made from its folder alone; without torch, so that it starts fast."""

from lightning_unigrpo.report.page import write

__all__ = ["write"]
