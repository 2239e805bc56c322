"""Write what an evaluation draws as GenEval lays it out, so that the benchmark's own scorer runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.data import FIRST_ID
from lightning_unigrpo.reward import convert_images
from lightning_unigrpo.types import Trajectory


class EvaluationFolder(UniGRPOCallback):
    """Write ``<number>/metadata.jsonl`` and ``<number>/samples/<image>.png`` for every prompt of ``test``.

    The metadata are the prompt's record with its ``prompt``; the reasoning of each image stands beside it
    in ``<image>.txt``, which the benchmark's scorer does not read. Ranks write what they drew.

    Source: https://github.com/djghosh13/geneval, ``generation/diffusers_generate.py``.

    Args:
        folder: where to; ``None`` = ``geneval`` in ``trainer.default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def _path(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "geneval")

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        experience: Experience = outputs["experience"]
        for trajectory in experience.trajectories:
            if trajectory.image is not None:
                write_sample(self._path(trainer), trajectory)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Images in GenEval's layout: {self._path(trainer)}")


def write_sample(folder: Path, trajectory: Trajectory) -> None:
    """Write one image of a test prompt, its reasoning, and the prompt's record.

    Args:
        folder: of the evaluation.
        trajectory: with an image.
    """
    prompt = trajectory.prompt
    place = folder / f"{prompt.id - FIRST_ID['test']:05d}"
    samples = place / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in prompt.columns.items() if value is not None}
    record = json.dumps({**known, "prompt": prompt.text}, ensure_ascii=False)
    (place / "metadata.jsonl").write_text(record + "\n", encoding="utf-8")
    assert trajectory.image is not None
    (picture,) = convert_images([trajectory.image], "pil")
    picture.save(samples / f"{trajectory.member:05d}.png")
    (samples / f"{trajectory.member:05d}.txt").write_text(trajectory.completion, encoding="utf-8")
