"""What a rank's memory does while a checkpoint is read: ``python -m tests.materialize FOLDER OUT``.

Started by :mod:`tests.test_bagel_checkpoint` as two ranks of one process group.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_unigrpo import Objective, UniGRPOModule
from lightning_unigrpo.adapters.bagel import BagelAdapter


def now() -> int:
    """Return resident bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Watch(threading.Thread):
    """Remembers the largest resident size: the kernel's own high-water mark includes the imports."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.running = now(), True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, now())
            time.sleep(0.0005)


class Measured(UniGRPOModule):
    """Writes what configure_model cost, and stops."""

    out: Path

    def configure_model(self) -> None:
        before, watch = now(), Watch()
        watch.start()
        super().configure_model()
        watch.running = False
        watch.join()
        kept = [
            *self.adapter.parameters(),
            *(p for m in self.adapter.frozen_modules() for p in m.parameters()),
        ]
        tensors = [p.numel() * p.element_size() for p in kept]
        found = {"peak": watch.peak - before, "kept": sum(tensors), "largest": max(tensors)}
        (self.out / f"{self.trainer.global_rank}.json").write_text(json.dumps(found))


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    adapter = BagelAdapter.from_pretrained(folder)
    # Without the velocity MSE no reference is kept, which would be a second network.
    model = Measured(
        adapter,
        rewards=[lambda images, **_: [0.0] * len(images)],
        objective=Objective(mse_weight=0.0),
    )
    model.out = Path(out)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, train_dataloaders=[])


if __name__ == "__main__":
    main(*sys.argv[1:])
