"""Show-o2 on two ranks: they draw and train as one process does, with whole and with sharded weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_unigrpo.guard import FLOAT32, REDUCED
from lightning_unigrpo.types import ImageSegment, TextSegment
from tests.rank_cases import EPOCHS, Record, file_of, run_alone
from tests.ranks import run
from tests.showo2_ranks import CASES
from tests.test_distributed import by_member, far, figures, moved

RUNS = ["ddp/one round/auto", "fsdp/two rounds/sharded", "fsdp2/two rounds/resident"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    run("tests.showo2_ranks:rollouts", 2, found)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sharded_weights_are_the_same_policy(folder: Path, strategy: str, precision: str) -> None:
    """To the bit, over two rounds of texts of any lengths; and the guard finds rounding, no more."""
    bounds = FLOAT32 if precision == "32-true" else REDUCED
    for rank in range(2):
        whole, sharded = (
            torch.load(file_of(folder, f"{strategy}/{precision}/{mode}", rank), weights_only=False)
            for mode in ("resident", "sharded")
        )
        pairs = [
            (a, b)
            for one, other in zip(whole.drawn, sharded.drawn, strict=True)
            for a, b in zip(one.segments, other.segments, strict=True)
        ]
        assert len(pairs) > 10
        for a, b in pairs:
            if isinstance(a, ImageSegment):
                assert torch.equal(a.latent, b.latent)
            elif isinstance(a, TextSegment) and a.log_prob is not None:
                assert torch.equal(a.tokens, b.tokens)
                assert torch.equal(a.log_prob, b.log_prob)
        for name, bound in bounds.items():
            value = whole.metrics[0][f"guard/{name}"]
            assert value == sharded.metrics[0][f"guard/{name}"]
            assert 0 < value < bound


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in this process, then on two ranks."""
    found = tmp_path_factory.mktemp("both")
    for key, case in CASES.items():
        torch.save(run_alone(case, found), found / f"{key}.pt")
    run("tests.showo2_ranks:trained", 2, found, *RUNS)
    return found


@pytest.mark.dist
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one_process(both: Path, name: str) -> None:
    """The same words and noise, rounding of the rest; and six updates end at the same weights."""
    key = name.split("/")[1]
    expected: Record = torch.load(both / f"{key}.pt", weights_only=False)[1]
    records = [torch.load(file_of(both, name, rank), weights_only=False) for rank in range(2)]
    drawn = {m: t for record in records for m, t in by_member(record.drawn).items()}
    assert drawn.keys() == by_member(expected.drawn).keys()
    for member, one in by_member(expected.drawn).items():
        for a, b in zip(one.segments, drawn[member].segments, strict=True):
            if isinstance(a, ImageSegment):
                assert far(a.noise, b.noise) == 0
                assert far(a.latent, b.latent) < 1e-5
                assert far(a.ref_velocity, b.ref_velocity) < 2e-5
            elif isinstance(a, TextSegment):
                assert torch.equal(a.tokens, b.tokens)
                assert far(a.log_prob, b.log_prob) < 2e-5
    assert len(expected.metrics) == CASES[key].iterations * EPOCHS >= 6
    for number, (first, other) in enumerate(zip(expected.metrics, records[0].metrics, strict=True)):
        # A step begins where the last one ended: roundings add up.
        rel = 1e-5 if number == 0 else 1e-3
        assert figures(other) == pytest.approx(figures(first), rel=rel, abs=2e-6), number
    assert moved(records[0].before, expected.before) == 0
    way = moved(expected.before, expected.after)
    assert way > 0.01
    assert moved(records[0].after, expected.after) < 2e-4 * way
