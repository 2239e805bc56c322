"""Checkpoints that always fall between iterations, also when somebody presses Ctrl-C."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_unigrpo import distributed
from lightning_unigrpo.checkpoint import LAST, keep_copy, part_of, publish, tidy

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says when another rank does not answer."""


class IterationCheckpoint(Checkpoint):
    """Save ``last.ckpt`` every few iterations, and on SIGINT or SIGTERM after the running one.

    Never in the middle of an iteration: half-updated weights would replay their batch. The first
    signal finishes the running iteration, saves and stops without validation; the second aborts and
    leaves the last checkpoint, which continues to the same numbers.

    A checkpoint is a file, or a folder where the strategy saves a part from each rank (FSDP with
    ``state_dict_type="sharded"``, ModelParallelStrategy). It is written as ``last.ckpt.part`` and renamed
    when all of it is on the disk; while a folder takes the place of another, the one before is
    ``last.ckpt.old``, which is loaded when ``last.ckpt`` is missing.

    Args:
        every: iterations between checkpoints; 0 = only at the end and on a signal.
        dirpath: folder; ``None`` = ``checkpoints`` in the logger's folder, or in
            ``trainer.default_root_dir`` without a logger.
        keep: also keep ``iteration=N.ckpt`` every so many iterations; 0 = only the last.
    """

    def __init__(self, every: int = 10, dirpath: str | None = None, keep: int = 0) -> None:
        if every < 0 or keep < 0:
            raise ValueError(
                f"IterationCheckpoint got every={every} and keep={keep}; give 0 or more iterations."
            )
        self.every, self.dirpath, self.keep = every, dirpath, keep
        self.interrupted = False
        self.last_path: Path | None = None
        self._handlers: dict[int, Any] = {}
        self._saved = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        root = self.dirpath or str(
            Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        )
        self._folder = Path(trainer.strategy.broadcast(root))
        if trainer.is_global_zero:
            _require_writable(self._folder)
            tidy(self._folder)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interrupted = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: Lightning has put a handler for SIGTERM in place by now, which ends the run in the
        # middle of an epoch, and which talks to other ranks at a moment that is another one on each.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        rank_zero_info(
            "\nInterrupted: finishing this iteration, then saving. Once more aborts at once."
        )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop = trainer.strategy.reduce_boolean_decision(self.interrupted, all=False)
        iteration = int(pl_module.iteration)  # type: ignore[arg-type]
        # After the last iteration too, here rather than in on_train_end: there the epoch has moved on.
        if stop or _is_last(trainer) or (self.every and iteration % self.every == 0):
            self._save(trainer, pl_module, iteration)
        if stop:
            self.interrupted = True
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # a user who waits for the prompt wants no validation

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers()
        iteration = int(pl_module.iteration)  # type: ignore[arg-type]
        if not self.interrupted and iteration != self._saved:
            self._save(trainer, pl_module, iteration)
        if self.last_path is not None:
            rank_zero_info(f"Checkpoint of iteration {self._saved}: {self.last_path}")

    def _save(self, trainer: Trainer, module: LightningModule, iteration: int) -> None:
        path = self._folder / LAST
        trainer.save_checkpoint(part_of(path), weights_only=False)
        error: Exception | None = None
        try:
            if trainer.is_global_zero:
                publish(path, module.origin())  # type: ignore[operator]
                if self.keep and iteration % self.keep == 0:
                    keep_copy(path, self._folder / f"iteration={iteration}.ckpt")
        except (OSError, RuntimeError) as raised:
            error = raised
        distributed.agree(error)  # ranks that went on would wait for this one
        self.last_path, self._saved = path, iteration

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()
        alike = [c for c in trainer.checkpoint_callbacks if isinstance(c, IterationCheckpoint)]
        if lost_a_rank(exception) and self is alike[0]:
            text = max(alike, key=lambda each: each._saved)._how_to_go_on(trainer)
            if sys.version_info >= (3, 11):
                exception.add_note(text)
            else:
                logging.getLogger(__name__).error(text)

    def _how_to_go_on(self, trainer: Trainer) -> str:
        path = self.last_path or trainer.ckpt_path
        saved = f" of iteration {self._saved}" if self.last_path else ""
        return (
            f"Rank {trainer.global_rank} of {trainer.world_size} does not reach another rank: that process "
            "has ended or is stuck, and its own output says why. "
            + (
                f"Go on from the last checkpoint{saved} with ckpt_path={path} (command line: --ckpt_path "
                "last); it repeats what came after it to the same numbers."
                if path
                else "No checkpoint was written yet; IterationCheckpoint's every says how often."
            )
        )

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def lost_a_rank(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer any more."""
    if isinstance(error, distributed.RankLostError):
        return error.__cause__ is not None and lost_a_rank(error.__cause__)
    if isinstance(error, torch.distributed.DistError):  # of NCCL, and while ranks find each other
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)


def _is_last(trainer: Trainer) -> bool:
    """Whether the limits of the trainer end the run after this iteration."""
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs


def _require_writable(folder: Path) -> None:
    """Fail now rather than after the first hour."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"Checkpoints cannot be written to {folder} ({error.strerror}). Choose another folder with "
            "IterationCheckpoint's dirpath, the logger's save_dir or trainer.default_root_dir."
        ) from error
