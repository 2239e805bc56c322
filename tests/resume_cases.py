"""What runs do in :mod:`tests.test_resume` and ``benchmarks/reliability.py``: train, and write it all down.

Every number that a run computes goes into a diary, one file for each rank, as text that gives the same
number back; the weights go in as a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_unigrpo import (
    IterationCheckpoint,
    PromptDataModule,
    ReferenceVelocity,
    Reward,
    UniGRPOCallback,
    UniGRPOModule,
)
from lightning_unigrpo.adapters.digits import DigitReward, DigitsAdapter
from lightning_unigrpo.callbacks import Experience
from lightning_unigrpo.checkpoint import LAST
from lightning_unigrpo.cli.training import run
from tests.ranks import strategy_of, trainer_of

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "fsdp full": ("fsdp", {"state_dict_type": "full"}),
    "fsdp sharded": ("fsdp", {"state_dict_type": "sharded"}),
    "fsdp2 full": ("fsdp2", {"save_distributed_checkpoint": False}),
    "fsdp2 distributed": ("fsdp2", {"save_distributed_checkpoint": True}),
}
"""Strategy and settings, by the form of the checkpoint."""
FOLDERS = ("fsdp sharded", "fsdp2 distributed")
DRAWS = ("single", "ddp", "fsdp full")
"""Where a reward draws from the global generators; the others can be compared over numbers of ranks."""


def moody(images: Tensor, **_: Any) -> list[float]:
    """A reward that draws from every global generator, and takes long enough to be killed in."""
    time.sleep(0.03)
    return [
        random.random() + float(np.random.random()) + float(torch.rand(()))  # noqa: NPY002
        for _ in images
    ]


class Diary(UniGRPOCallback):
    """Writes a line when training begins, after each iteration, and when training has ended.

    Args:
        path: of the file, to which lines are added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, module: UniGRPOModule, **facts: Any) -> None:
        line = {"iteration": module.iteration, "weights": checksum(module), "event": event, **facts}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_start(self, trainer: Trainer, module: UniGRPOModule) -> None:  # type: ignore[override]
        self.write("begins", module)

    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        self._experience = experience

    def on_train_batch_end(self, trainer: Trainer, module: UniGRPOModule, *_: Any) -> None:  # type: ignore[override]
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self.write("iteration", module, metrics=self._experience.metrics, rates=rates)


def checksum(module: UniGRPOModule) -> str:
    """Return a short text that changes with any bit of this rank's weights."""
    found = hashlib.sha256()
    for parameter in module.adapter.net.parameters():
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        found.update(part.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def diary_of(folder: Path, layout: str, run: str, rank: int | None = None) -> Path:
    """Return the file of a rank; ``None`` = of this one."""
    return folder / f"{layout}-{run}-{os.environ.get('RANK', '0') if rank is None else rank}.jsonl"


def read_diary(path: Path, event: str = "iteration") -> list[dict[str, Any]]:
    """Return the lines of one kind."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def differences(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> list[str]:
    """Return in what two diaries differ, iteration by iteration, bit for bit."""
    found = []
    for one, two in zip(a, b, strict=True):
        first, second = ({**line, **line["metrics"], "metrics": None} for line in (one, two))
        found += [
            f"iteration {one['iteration']}, {key}: {first.get(key)} {second.get(key)}"
            for key in first.keys() | second.keys()
            if first.get(key) != second.get(key)
        ]
    return sorted(found)


# ---- training


def build(seed: int = 3, *, draws: bool = True, **changes: Any) -> UniGRPOModule:
    """Return a small module.

    Args:
        seed: of the global generators; what the module draws has a seed of its own.
        draws: whether a reward draws from the global generators.
        changes: of the optimizer's settings.
    """
    seed_everything(seed, verbose=False)
    adapter = DigitsAdapter()
    defaults = adapter.defaults()
    assert defaults.sampling is not None
    assert defaults.optim is not None
    mood = [Reward(moody, weight=0.1)] if draws else []
    return UniGRPOModule(
        adapter,
        rewards=[Reward(DigitReward(), name="digit"), *mood],
        sampling=replace(defaults.sampling, seed=3, group_size=4),
        optim=replace(defaults.optim, **({"warmup_steps": 4} | changes)),
    )


def prompts(**settings: Any) -> PromptDataModule:
    """Return 2 iterations to a pass, so that short runs end passes on the way."""
    defaults = DigitsAdapter().defaults()
    settings = {"prompts_per_iteration": 2, **settings}
    return PromptDataModule.from_prompts(defaults.train[:4], val=defaults.val[:2], **settings)


def trainer(layout: str, steps: int, *callbacks: Any, **settings: Any) -> Trainer:
    """Return a trainer over all ranks, which wait for each other for 20 s at most."""
    kind, form = LAYOUTS[layout]
    patience = {} if kind == "single" else {"timeout": timedelta(seconds=20)}
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    strategy = strategy_of(kind, world_size, **form, **patience)
    saves = any(isinstance(callback, IterationCheckpoint) for callback in callbacks)
    settings = {"enable_checkpointing": saves, "strategy": strategy, **settings}
    return trainer_of(kind, steps, *callbacks, **settings)


def fit(
    folder: Path,
    layout: str,
    run: str,
    steps: int,
    *callbacks: Any,
    ckpt_path: Path | None = None,
    seed: int = 3,
    draws: bool | None = None,
    **settings: Any,
) -> None:
    """Train, and keep a diary.

    Args:
        folder: of the diaries.
        layout: one of :data:`LAYOUTS`.
        run: its name.
        steps: iterations.
        callbacks: more of them.
        ckpt_path: to go on from.
        seed: of the global generators.
        draws: whether a reward draws; ``None`` = under the layouts of :data:`DRAWS`.
        settings: of the trainer.
    """
    diary = Diary(diary_of(folder, layout, run))
    module = build(seed, draws=layout in DRAWS if draws is None else draws)
    trainer(layout, steps, diary, *callbacks, **settings).fit(
        module, prompts(), ckpt_path=ckpt_path
    )
    diary.write("ends", module)


def predict(folder: Path, layout: str, run: str, ckpt_path: Path) -> None:
    """Draw the images of this rank's share of four prompts, one at a time, and write them down."""
    module = build(99)
    data = prompts(eval_batch_size=1, predict="what is three plus four; draw nine minus one")
    batches = trainer(layout, 1).predict(module, data, ckpt_path=ckpt_path)
    assert batches is not None
    images = {t.prompt.text: t.image for batch in batches for t in batch}
    torch.save(images, diary_of(folder, layout, run).with_suffix(".pt"))


# ---- what ranks do


class Terminate(UniGRPOCallback):
    """Send SIGTERM to one rank in the middle of an iteration."""

    def __init__(self, rank: int, iteration: int) -> None:
        self.left = int(os.environ.get("RANK", "0")) == rank
        self.iteration = iteration

    def on_phase(
        self, trainer: Trainer, module: UniGRPOModule, phase: str, done: int, total: int
    ) -> None:
        if self.left and module.iteration == self.iteration and phase == "denoise":
            self.left = False
            os.kill(os.getpid(), signal.SIGTERM)


def saving(folder: Path, name: str, every: int = 1) -> IterationCheckpoint:
    """Return the callback that saves into a folder of its own."""
    return IterationCheckpoint(every=every, dirpath=str(folder / name))


def ema() -> EMAWeightAveraging:
    """Return Lightning's callback, which averages after every step."""
    return EMAWeightAveraging(decay=0.5)


def first_half(_: Path, place: str) -> None:
    """Train in one go, and as far as the checkpoint that :func:`second_half` goes on from."""
    folder = Path(place)
    for layout in LAYOUTS:
        if layout != "single":
            fit(folder, layout, "whole", 4, ReferenceVelocity(refresh_every=2))
            reference = ReferenceVelocity(refresh_every=2)
            fit(folder, layout, "part", 3, reference, saving(folder, layout))
    for layout in FOLDERS:
        predict(folder, layout, "predict", folder / layout / LAST)
    fit(folder, "ddp", "ema whole", 4, ema())
    fit(folder, "ddp", "ema part", 2, ema(), saving(folder, "ema"))
    fit(folder, "ddp", "terminated", 4, Terminate(1, 1), saving(folder, "terminated", 0))
    command_line(folder / "cli")


def command_line(folder: Path) -> None:
    """Run what a user types, with the tests before and after and the report at the end."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    config = Path(__file__).parent.parent / "configs" / "digits.yaml"
    small = ("max_steps=1", "devices=2", "strategy=ddp", "limit_test_batches=1")
    sizes = ("--data.prompts_per_iteration=1", "--data.eval_batch_size=2", "--ckpt_path=last")
    run(["fit", "--config", str(config), *(f"--trainer.{each}" for each in small), *sizes])


def second_half(_: Path, place: str) -> None:
    """Go on, in other processes with other global generators."""
    folder = Path(place)
    for layout in LAYOUTS:
        if layout != "single":
            path = folder / layout / LAST
            reference = ReferenceVelocity(refresh_every=2)
            fit(folder, layout, "rest", 4, reference, ckpt_path=path, seed=77)
    fit(folder, "ddp", "ema rest", 4, ema(), ckpt_path=folder / "ema" / LAST, seed=77)
    for layout in ("ddp", "fsdp full", "fsdp2 full"):
        alone = folder / "alone" / LAST
        fit(folder, layout, "from alone", 4, ckpt_path=alone, seed=77, draws=False)
    with pytest.raises(ValueError, match=r"Leave it out, or set trainer\.strategy to ddp"):
        fit(folder, "fsdp full", "ema", 1, ema())


def alone(_: Path, place: str) -> None:
    """Go on with the parts of two ranks, and with weights in one piece, in a single rank."""
    folder = Path(place)
    for layout in FOLDERS:
        path, reference = folder / layout / LAST, ReferenceVelocity(refresh_every=2)
        fit(folder, layout, "shrunk", 4, reference, ckpt_path=path, seed=77)
