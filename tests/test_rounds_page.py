"""The page about editing says what ``benchmarks/rounds.py`` measured, and who sees whom in a packed pass."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.masks import blocks_of, dialogue

CHECKOUT = Path(__file__).parent.parent
PAGE = (CHECKOUT / "docs/howto/editing.md").read_text(encoding="utf-8")
FOUND = json.loads((CHECKOUT / "benchmarks/results/rounds.json").read_text(encoding="utf-8"))
ROWS = {
    "a rollout, s": ("rollout_s", "extended", "whole"),
    "of it reading contexts, s": ("rollout_s", "extended", "contexts"),
    "an update, packed, s": ("update_s", "packed"),
    "contexts: cache built anew per round / extended": ("ratios", "per round", "contexts"),
    "contexts: per segment / extended": ("ratios", "per segment", "contexts"),
    "rollout: per round / extended": ("ratios", "per round", "rollout"),
    "rollout: per segment / extended": ("ratios", "per segment", "rollout"),
    "update: a pass per round / packed": ("ratios", "update"),
}


@pytest.mark.parametrize("label", ROWS)
@pytest.mark.parametrize(("model", "name"), [("bagel", "Bagel"), ("showo2", "Show-o2")])
def test_the_page_has_the_measured_numbers(model: str, name: str, label: str) -> None:
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {name}, {label} |")]
    for rounds, shown in enumerate(row.split("|")[2:-1], 1):
        value = FOUND[model][str(rounds)]
        for key in ROWS[label]:
            value = value[key]
        digits = len(shown.strip().partition(".")[2])
        assert shown.strip() == f"{value:.{digits}f}"


def test_the_page_says_who_sees_whom() -> None:
    """The table against the mask that attention gets, block by block."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| **")]
    table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
    (header,) = [line for line in PAGE.splitlines() if line.startswith("| | prompt |")]
    columns = [cell.strip() for cell in header.split("|")[2:-1]]
    assert columns == [row[0] for row in table]
    blocks = blocks_of(*dialogue())
    members = [name.split(",")[0] for name in blocks.names]
    assert set(members) == set(columns)
    for row, *cells in table:
        for column, cell in zip(columns, cells, strict=True):
            for one, other in (
                (a, b)
                for a, name in enumerate(members)
                for b, target in enumerate(members)
                if (name, target) == (row, column)
            ):
                found = blocks.sees(one, other)
                if cell == "earlier words":
                    assert torch.equal(found, torch.ones_like(found).tril())
                else:
                    is_seen = cell == "yes" or (cell in ("itself", "each itself") and one == other)
                    assert found.all() if is_seen else not found.any()
