"""A callback that presses Ctrl-C at a chosen moment."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning_unigrpo import UniGRPOCallback


class PressCtrlC(UniGRPOCallback):
    """Send SIGINT to this process while a given iteration draws its images.

    Args:
        iteration: counted from 0.
        times: how often; the second one aborts.
    """

    def __init__(self, iteration: int, times: int = 1) -> None:
        self.iteration, self.left = iteration, times

    def on_phase(self, trainer: Any, module: Any, phase: str, done: int, total: int) -> None:
        now = trainer.training and module.iteration == self.iteration and phase == "denoise"
        if now and self.left:
            self.left -= 1
            os.kill(os.getpid(), signal.SIGINT)
