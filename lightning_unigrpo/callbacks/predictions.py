"""Write what `predict` draws: one picture per prompt, and the reasoning beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL.Image import Image, Resampling
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo.callbacks.rounds import words_by_round
from lightning_unigrpo.reward import convert_images
from lightning_unigrpo.types import Trajectory


def picture_of(image: Tensor, scale: int = 1) -> Image:
    """Return an image ``[3, H, W]`` in [0, 1] as a picture, each pixel so many times as large."""
    picture: Image = convert_images([image], "pil")[0]
    return picture.resize((picture.width * scale, picture.height * scale), Resampling.NEAREST)


class PredictionWriter(BasePredictionWriter):
    """Write pictures, and one ``predictions.jsonl`` with prompt, reasoning and file of each.

    A picture is ``<id>.png``, or ``<id>_<member>.png`` where ``model.evaluation.num_images`` is above 1.
    Those of earlier rounds are ``<id>_round1.png`` and so on, and the list ``rounds`` of a record then holds
    ``turn`` (the user's words, if there were any), ``reasoning`` and ``image`` of each round.

    Args:
        folder: where to; ``None`` = ``predictions`` in ``trainer.default_root_dir``.
        scale: enlarge each pixel this many times (8 x 8 digits are hard to see).
    """

    def __init__(self, folder: str | None = None, scale: int = 1) -> None:
        super().__init__(write_interval="batch")
        if scale < 1:
            raise ValueError(f"PredictionWriter.scale is {scale}; give 1 or more.")
        self.folder, self.scale = folder, scale

    def _path(self, trainer: Trainer) -> Path:
        path = Path(self.folder or Path(trainer.default_root_dir) / "predictions")
        path.mkdir(parents=True, exist_ok=True)
        return path

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here, before any rank goes on: another number of ranks left other tables.
        if stage == "predict" and trainer.is_global_zero:
            for table in self._path(trainer).glob("predictions*.jsonl"):
                table.unlink()

    @staticmethod
    def _table(trainer: Trainer) -> str:
        return (
            "predictions.jsonl"
            if trainer.world_size == 1
            else f"predictions.{trainer.global_rank}.jsonl"
        )

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[Trajectory],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        folder = self._path(trainer)
        several = max((t.member for t in prediction), default=0) > 0
        with (folder / self._table(trainer)).open("a", encoding="utf-8") as table:
            for t in prediction:
                name = f"{t.prompt.id}_{t.member}" if several else str(t.prompt.id)
                record: dict[str, Any] = {
                    "id": t.prompt.id,
                    "prompt": t.prompt.text,
                    "reasoning": t.completion,
                }
                if t.image is not None:
                    record["image"] = f"{name}.png"
                    picture_of(t.image, self.scale).save(folder / record["image"])
                if t.rounds:
                    record["rounds"] = self._rounds(t, folder, name)
                table.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _rounds(self, trajectory: Trajectory, folder: Path, name: str) -> list[dict[str, str]]:
        """Return the records of the rounds; the last picture is written already."""
        files = [f"{name}_round{k}.png" for k in range(1, len(trajectory.rounds))]
        for file, each in zip(files, trajectory.rounds, strict=False):
            picture_of(each.image, self.scale).save(folder / file)
        records = words_by_round(trajectory)
        for record, file in zip(records, [*files, f"{name}.png"], strict=False):
            record["image"] = file
        return records

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Pictures and reasoning: {self._path(trainer)}")
