"""Write the trained model as others load it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_unigrpo.callbacks.base import UniGRPOCallback


class SavePretrained(UniGRPOCallback):
    """Call ``adapter.save_pretrained(folder)`` when training ends, also when it was interrupted.

    Args:
        folder: where to; an existing model in it is replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module.adapter, "save_pretrained"):
            raise ValueError(
                f"{type(pl_module.adapter).__name__} has no save_pretrained: leave the callback "
                "SavePretrained out, or give the adapter that method."
            )
        if stage == "fit":  # now, not after hours of training
            self.folder.mkdir(parents=True, exist_ok=True)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks: sharded weights are gathered, and the first rank writes.
        pl_module.adapter.save_pretrained(self.folder)  # type: ignore[union-attr, operator]
