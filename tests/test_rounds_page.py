"""The page about editing says what ``benchmarks/rounds.py`` measured."""

import json
from pathlib import Path

import pytest

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
