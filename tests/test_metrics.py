"""Rewards as metrics: against NumPy, against the benchmark's own summary, on one process and on two."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unigrpo.metrics import RewardMetric, ScoreMetric
from lightning_unigrpo.rewards.geneval import TASKS
from tests.ranks import run

VALUES = torch.randn(40, generator=torch.Generator().manual_seed(0))
VALUES[[3, 17, 18]] = torch.tensor([torch.nan, torch.inf, torch.nan])
NAMES = [*TASKS[:5], "another", None] * 6


def metric() -> ScoreMetric:
    return ScoreMetric(tasks=TASKS)


def expected() -> dict[str, float]:
    """Return the numbers by NumPy."""
    values, names = VALUES.double().numpy(), NAMES[: len(VALUES)]
    finite = np.isfinite(values)
    found = {
        "mean": values[finite].mean(),
        "std": values[finite].std(),
        "failures": float((~finite).sum()),
    }
    tasks = {}
    for task in TASKS:
        chosen = values[finite & np.array([name == task for name in names])]
        if len(chosen):
            tasks[task] = chosen.mean()
    return found | tasks | {"overall": float(np.mean([*tasks.values()]))}


def test_numbers_are_numpys_however_they_are_added() -> None:
    """In parts of any size; a task that did not occur has no number, and none in the mean of means."""
    found = metric()
    for first, last in ((0, 7), (7, 7), (7, 8), (8, 40)):
        found.update(VALUES[first:last], NAMES[first:last])
    got = found.compute()
    assert "color_attr" not in got
    assert {k: float(v) for k, v in got.items()} == pytest.approx(expected(), rel=1e-6)
    found.reset()
    found.update(torch.tensor([torch.nan]))
    assert math.isnan(float(found.compute()["mean"]))
    assert float(found.compute()["failures"]) == 1


def test_a_reward_is_called_with_what_it_names_and_is_no_module_of_the_metric() -> None:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.weight * images.mean((1, 2, 3))

    found = RewardMetric(Scorer(), tasks=("dark", "bright"), task_column="kind")
    assert not list(found.parameters())
    assert not found.state_dict()
    images = torch.stack([torch.full((3, 2, 2), x) for x in (0.0, 0.5, 1.0)])
    found.update(images=images, prompts=["a"] * 3, kind=["dark", "dark", "bright"])
    got = {k: round(float(v), 4) for k, v in found.compute().items()}
    assert got == {
        "mean": 1.0,
        "std": 0.8165,
        "failures": 0,
        "dark": 0.5,
        "bright": 2.0,
        "overall": 1.25,
    }


def synced(folder: Path) -> None:
    """Add this rank's share, of unequal sizes, and write what is computed; what ranks start."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = slice(0, 29) if rank == 0 else slice(29, 40)
    found = metric()
    found.update(VALUES[share], NAMES[share])
    got = {k: float(v) for k, v in found.compute().items()}
    local = float(found.failed)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps((got, local)))


@pytest.mark.dist
def test_two_processes_are_one(tmp_path: Path) -> None:
    """The same numbers on both ranks; their own sums are their own again afterwards."""
    run("tests.test_metrics:synced", 2, tmp_path)
    both = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    for got, _ in both:
        assert got == pytest.approx(expected(), rel=1e-6)
    assert [local for _, local in both] == [3, 0]
