"""What is happening inside an iteration, on a terminal and in a plain pipe."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typing_extensions import override

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback

if TYPE_CHECKING:
    from rich.progress import TaskID

    from lightning_unigrpo.module import UniGRPOModule


class RolloutProgress(UniGRPOCallback):
    """Show iterations, the phase inside the running one, and the current reward.

    On a terminal two live lines: iterations with the reward, and the phase (text, denoise, reward,
    reference, update). In a pipe one line every ``every`` seconds. It stands beside Lightning's bar, so
    run with ``trainer.enable_progress_bar: false`` when it is on.

    Args:
        every: seconds between two lines in a pipe.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self.console = Console(stderr=False)
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._rewards = {"train": float("nan"), "val": float("nan")}
        self._spent: dict[str, float] = {}
        self._said = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._spent, self._said = {}, time.monotonic()
        if trainer.is_global_zero and self.console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            total = self._total(trainer)
            self._tasks = {
                "iteration": self._live.add_task("iteration", total=total, note=""),
                "phase": self._live.add_task("phase", total=None, note=""),
            }
            self._live.start()

    def _total(self, trainer: Trainer) -> int | None:
        if trainer.max_steps > 0:
            module: Any = trainer.lightning_module
            return trainer.max_steps // int(
                module.optim.ppo_epochs * module.optim.updates_per_rollout
            )
        batches = trainer.num_training_batches
        known = trainer.max_epochs and trainer.max_epochs > 0 and batches != float("inf")
        return int(trainer.max_epochs * batches) if known and trainer.max_epochs else None

    @override
    def on_phase(
        self, trainer: Trainer, module: UniGRPOModule, phase: str, done: int, total: int
    ) -> None:
        if self._live is not None:
            task = self._tasks["phase"]
            self._live.update(task, description=phase, completed=done, total=total)

    @override
    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        self._rewards["train"] = experience.metrics["reward"]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "val/reward" in trainer.callback_metrics:
            self._rewards["val"] = float(trainer.callback_metrics["val/reward"])

    def _note(self) -> str:
        shown = [f"{k} {v:.3f}" for k, v in self._rewards.items() if v == v]
        return "reward: " + ", ".join(shown) if shown else ""

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = cast("UniGRPOModule", pl_module)
        done = module.iteration
        for phase, seconds in module.clock.spent.items():
            self._spent[phase] = self._spent.get(phase, 0.0) + seconds
        if self._live is not None:
            self._live.update(self._tasks["iteration"], completed=done, note=self._note())
        elif trainer.is_global_zero and time.monotonic() - self._said >= self.every:
            self._said = time.monotonic()
            spent = sum(self._spent.values()) or 1.0
            parts = ", ".join(f"{k} {100 * v / spent:.0f}%" for k, v in self._spent.items())
            total = self._total(trainer)
            of = f"/{total}" if total else ""
            line = f"iteration {done}{of}  {self._note()}  ({parts})"
            self.console.print(line, highlight=False, soft_wrap=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
