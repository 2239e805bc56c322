"""What every test shares: no network, one thread, seeded generators, golden vectors."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the hub's package is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two processes on two cores would wait for each other's threads

GOLDEN = Path(os.environ.get("UNIGRPO_GOLDEN", Path(__file__).parent / "golden"))


def golden_folder(family: str) -> Path:
    """Return the folder with the golden vectors of a family (UNIGRPO_GOLDEN moves them all)."""
    return GOLDEN / family


@pytest.fixture
def golden() -> Callable[[str], Path]:
    """Give :func:`golden_folder`."""
    return golden_folder


@pytest.fixture
def generator() -> torch.Generator:
    """Give a generator of its own to each test, so that their order does not matter."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """End runs without their page, which takes longer than a small run; others look at it."""
    for module in ("cli.training", "callbacks.report"):
        monkeypatch.setattr(f"lightning_unigrpo.{module}.write_page", lambda folder: None)
