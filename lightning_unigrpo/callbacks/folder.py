"""Write what an evaluation draws as GenEval lays it out, so that the benchmark's own scorer runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.rounds import strip, transcript, with_rounds
from lightning_unigrpo.data import FIRST_ID
from lightning_unigrpo.reward import convert_images
from lightning_unigrpo.types import Trajectory

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class EvaluationFolder(UniGRPOCallback):
    """Write ``<number>/metadata.jsonl`` and ``<number>/samples/<image>.png`` for every prompt of ``test``.

    The metadata are the prompt's record with its ``prompt``. Beside each image stand its reasoning, in
    ``<image>.txt``, and where there are several rounds all their images side by side, in
    ``<image>-rounds.png``: the benchmark's scorer reads neither. Ranks write what they drew.

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
        adapter = cast("UniGRPOModule", pl_module).adapter
        for trajectory in experience.trajectories:
            if trajectory.image is not None:
                write_sample(self._path(trainer), with_rounds(adapter, trajectory))

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(f"Images in GenEval's layout: {self._path(trainer)}")


def write_sample(folder: Path, trajectory: Trajectory) -> None:
    """Write one image of a test prompt, its reasoning, and the prompt's record.

    Args:
        folder: of the evaluation.
        trajectory: with an image; its ``rounds`` are drawn where there are several.
    """
    prompt = trajectory.prompt
    place = folder / f"{prompt.id - FIRST_ID['test']:05d}"
    samples = place / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    known = {name: value for name, value in prompt.columns.items() if value is not None}
    record = json.dumps({**known, "prompt": prompt.text}, ensure_ascii=False)
    (place / "metadata.jsonl").write_text(record + "\n", encoding="utf-8")
    assert trajectory.image is not None
    name = f"{trajectory.member:05d}"
    pictures: dict[str, Tensor | None] = {name: trajectory.image}
    if len(trajectory.rounds) > 1:
        pictures[f"{name}-rounds"] = strip(trajectory)
    for file, picture in zip(pictures, convert_images([*pictures.values()], "pil"), strict=True):
        picture.save(samples / f"{file}.png")
    (samples / f"{name}.txt").write_text("\n".join(transcript(trajectory)), encoding="utf-8")
