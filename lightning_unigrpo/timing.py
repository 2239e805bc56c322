"""How long an iteration took, and what of it."""

from __future__ import annotations

import time

import torch

COSTS = ("time/", "throughput/", "memory/")
"""How the names begin of what is logged here: no two runs have the same."""


class PhaseClock:
    """Seconds by phase, of one iteration on this rank.

    Phases report when a part of them is done: the time since the last report was theirs. A GPU works behind
    the program, so a phase that waits for nothing leaves its last work to the next one.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        """Seconds by phase, since :meth:`start`."""
        self._begun = self._since = time.perf_counter()

    def start(self) -> None:
        """Begin an iteration."""
        self.spent = {}
        self._begun = self._since = time.perf_counter()

    def tick(self, phase: str) -> None:
        """Give a phase the time since the last tick."""
        now = time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + now - self._since
        self._since = now

    def figures(self, rollouts: int) -> dict[str, float]:
        """Return what is logged of an iteration that ends now.

        Args:
            rollouts: that all ranks drew together.

        Returns:
            ``time/<phase>`` and ``time/iteration`` in seconds, ``throughput/rollouts_per_second``.
        """
        total = time.perf_counter() - self._begun
        phases = {f"time/{phase}": seconds for phase, seconds in self.spent.items()}
        return {
            **phases,
            "time/iteration": total,
            "throughput/rollouts_per_second": rollouts / total,
        }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return ``memory/peak_gib``, the most that tensors took on a GPU since the last call; else nothing."""
    if device.type != "cuda":
        return {}
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return {"memory/peak_gib": peak}
