"""Tiny Janus and Show-o2 models on the digits task: contract, and what ``benchmarks/families.py`` found."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from benchmarks import families
from lightning_unigrpo import Prompt
from lightning_unigrpo.adapters.digits import DigitReward
from lightning_unigrpo.adapters.digits.images import load_digits
from lightning_unigrpo.testing import check_adapter
from tests.families import CodeDigits, FlowDigits, MaskedDigits, TwoStackDigits, codebook

BUILDS = {
    "janusflow": FlowDigits,
    "januspro": CodeDigits,
    "showo2": TwoStackDigits,
    "showo": MaskedDigits,
}
PAGE = Path(__file__).parent.parent / "docs" / "results.md"


@pytest.mark.parametrize("family", BUILDS)
def test_contract(family: str) -> None:
    adapter: Any = BUILDS[family]()
    prompts = [
        Prompt(text="what is three plus four", id=0),
        Prompt(text="draw two plus one plus five", id=1),
    ]
    # Without a tower the Januses never see what they drew.
    check_adapter(adapter, prompts=prompts, rounds=[1 if "janus" in family else 2])


@pytest.mark.parametrize("family", BUILDS)
def test_pictures_survive_their_encoding(family: str) -> None:
    """The reward's classifier reads real digits that were encoded and decoded."""
    adapter: Any = BUILDS[family]()
    pixels, labels = load_digits("held_out")
    encoded = adapter.encode(pixels)
    images = adapter.decode(encoded, adapter.image_grid(Prompt(text="")))
    read = DigitReward()(images=images, answer=labels.tolist())
    assert float(read.mean()) > 0.93
    if family in ("januspro", "showo"):
        assert encoded.shape == (len(pixels), 16)
        assert torch.equal(adapter.encode(images[:, 0] * 2 - 1), encoded)
        assert len(codebook()) == int(encoded.max()) + 1


@pytest.mark.parametrize("family", BUILDS)
def test_the_page_tells_what_was_measured(family: str) -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [row for row in families.markdown() if row.startswith(f"| {family} |")]
    assert len(rows) == 1 + len(families.ARMS)
    assert [row for row in rows if row not in page] == []


@pytest.mark.parametrize("family", BUILDS)
def test_every_seed_learns_and_both_halves_are_needed(family: str) -> None:
    """From a base of a quarter to a half; at least a quarter more; each half alone a tenth behind."""

    def rewards(arm: str, key: str = "greedy_reward") -> list[float]:
        files = sorted(families.RESULTS.glob(f"{family}_{arm}*.json"))
        return [json.loads(file.read_text())["test"][key] for file in files]

    (base,) = rewards("base")
    assert 0.25 < base < 0.5
    joint = rewards("joint")
    assert len(joint) == families.SEEDS
    assert min(joint) > base + 0.25
    for arm in ("text_only", "image_only"):
        assert len(rewards(arm)) == families.SEEDS
        assert mean(joint) > mean(rewards(arm)) + 0.1
    assert max(rewards("joint", "no_reasoning_reward")) < 0.2  # chance is 0.1
