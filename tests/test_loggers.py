"""Samples reach each logger in its own form, read back with its own tools."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_unigrpo import RewardLogger, UniGRPOModule
from lightning_unigrpo.callbacks.figures import sample_grid
from lightning_unigrpo.callbacks.folder import write_sample
from lightning_unigrpo.callbacks.loggers import log_samples
from lightning_unigrpo.data import FIRST_ID
from lightning_unigrpo.types import Prompt, Round, TextSegment, Trajectory
from tests.test_module import fit, objective, optim, small
from tests.toys import ToyFlow


def samples() -> list[Trajectory]:
    """Return one of a single round, and one that drew again when it was told to."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = [
        Trajectory(
            prompt=Prompt(text=f"a | cube {number}"),
            segments=[],
            group=0,
            member=number,
            image=image,
            completion="line one\nline two",
            rewards={"ink": 0.25 * number},
            reward=0.5 + number,
        )
        for number, image in enumerate(images)
    ]
    second.segments = [
        text("line one", sampled=True),
        text("la|rger", sampled=False),
        text("line two", sampled=True),
    ]
    second.rounds = [Round(images[0], "line one", 2), Round(images[1], second.completion, 5)]
    return [first, second]


def text(words: str, *, sampled: bool) -> TextSegment:
    log_prob = torch.zeros(1) if sampled else None
    return TextSegment(tokens=torch.zeros(1, dtype=torch.long), words=words, log_prob=log_prob)


def pixels(sample: Trajectory) -> np.ndarray:
    """Return the images of a sample side by side, a white line of one pixel between them."""
    images = [each.image for each in sample.rounds] or [sample.image]
    drawn = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    white = np.full((8, 1, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in drawn for part in (white, image)][1:], 1)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.abs(one.astype(int) - other).max() <= 1


def test_tensorboard_has_a_figure_and_a_table(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_samples(logger, "samples", samples(), 3)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    (figure,) = events.Images("samples")
    assert figure.step == 3
    assert figure.width > 100
    (text,) = events.Tensors("samples/table/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == "| prompt | reasoning | reward | reward/ink |"
    assert lines[2] == r"| a \| cube 0 | line one line two | 0.5 | 0.0 |"
    assert lines[3].startswith(r"| a \| cube 1 | line one [user] la\|rger line two |")
    assert len(lines) == 4


def test_wandb_has_captioned_images_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    log_samples(logger, "samples", samples(), 3)
    folder = Path(logger.experiment.dir)
    tables = [*folder.rglob("media/table/**/*.json")]
    images = sorted(folder.rglob("media/images/samples_*.png"))
    logger.experiment.finish()
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["prompt", "reasoning", "reward", "reward/ink"]
    assert table["data"][1] == ["a | cube 1", "line one\n[user] la|rger\nline two", 1.5, 0.25]
    found = [np.asarray(Image.open(path).convert("RGB")) for path in images]
    for sample in samples():  # the files are named by their content
        assert any(alike(image, pixels(sample)) for image in found)


# mlflow's own code with pandas 3: https://pandas.pydata.org/docs/whatsnew/v3.0.0.html
@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")
def test_mlflow_has_images_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # other stores need the whole of mlflow
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path}")
    log_samples(logger, "samples", samples(), 3)
    log_samples(logger, "samples", samples(), 4)
    table = logger.experiment.load_table(logger.experiment_id, "samples.json", [logger.run_id])
    assert table["step"].tolist() == [3, 3, 4, 4]
    assert table["reward/ink"].tolist() == [0, 0.25] * 2
    images = list(tmp_path.rglob("images/*.png"))
    assert len(images) == 4
    shown = [np.asarray(Image.open(path).convert("RGB")) for path in images]
    for sample in samples():
        assert any(np.array_equal(image, pixels(sample)) for image in shown)


def test_an_evaluation_writes_what_its_scorer_does_not_read_beside_the_last_image(
    tmp_path: Path,
) -> None:
    (sample,) = samples()[1:]
    write_sample(tmp_path, replace(sample, prompt=Prompt(text="draw", id=FIRST_ID["test"] + 7)))
    folder = tmp_path / "00007" / "samples"
    # https://github.com/djghosh13/geneval, evaluation/evaluate_images.py, reads what this fits.
    assert [f.name for f in folder.iterdir() if re.match(r"\d+\.png", f.name)] == ["00001.png"]
    last = np.asarray(Image.open(folder / "00001.png"))
    assert np.array_equal(last, pixels(replace(sample, rounds=[])))
    assert np.array_equal(np.asarray(Image.open(folder / "00001-rounds.png")), pixels(sample))
    assert (folder / "00001.txt").read_text() == "line one\n[user] la|rger\nline two"


def test_images_of_samples_are_equally_large_in_a_figure() -> None:
    one, several = sample_grid({"base": samples()}).axes
    sides = []
    for axis, count in ((one, 1), (several, 2)):
        (picture,) = axis.get_images()
        low, high = axis.get_xlim()
        left, right, *_ = picture.get_extent()
        assert left - low == pytest.approx(high - right)
        sides.append((right - left) / (high - low) / count)
    assert sides == pytest.approx([0.5, 0.5], abs=0.01)
    assert several.get_xlabel() == "line one\n[user] la|rger\nline two\nreward 1.50"


def test_csv_is_left_alone(tmp_path: Path) -> None:
    log_samples(CSVLogger(tmp_path), "samples", samples(), 3)
    assert not [*tmp_path.rglob("*.png")]


def test_every_iteration_is_timed_by_phase(tmp_path: Path) -> None:
    module = UniGRPOModule(ToyFlow(), sampling=small(), objective=objective(), optim=optim())
    logger = TensorBoardLogger(tmp_path)
    callbacks = [RewardLogger(images_every=2, num_images=1)]
    fit(tmp_path, module, 3, *callbacks, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    assert [image.step for image in events.Images("samples")] == [0, 2 * optim().ppo_epochs]

    def logged(name: str) -> list[float]:
        return [event.value for event in events.Scalars(name)]

    whole = logged("time/iteration")
    phases = {name for name in events.Tags()["scalars"] if name.startswith("time/")}
    assert {"time/text", "time/denoise", "time/reward", "time/update"} <= phases
    parts = [logged(name) for name in phases - {"time/iteration"}]
    for total, *each in zip(whole, *parts, strict=True):
        assert all(seconds > 0 for seconds in each)
        assert 0.5 * total < sum(each) <= total * 1.001  # float32
    rates = logged("throughput/rollouts_per_second")
    count = [total * rate for total, rate in zip(whole, rates, strict=True)]
    assert count == pytest.approx([module.sampling.group_size * 2] * 3, rel=1e-4)
