"""Rewards of the reasoning's words, against numbers counted by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unigrpo.rewards import LengthBand, PromptCoverage, Repetition


def test_the_band_is_flat_and_falls_on_both_sides() -> None:
    band = LengthBand(low=4, high=10)
    # Up by 1/4 a token, flat from 4 to 10, down by 1/10 a token to 20.
    counts = [0, 1, 3, 4, 7, 10, 11, 15, 20, 99]
    expected = [0, 0.25, 0.75, 1, 1, 1, 0.9, 0.5, 0, 0]
    assert band(num_tokens=counts) == pytest.approx(expected)
    assert LengthBand(low=1, high=1)(num_tokens=[0, 1, 2]) == [0, 1, 0]
    for low, high in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match=rf"low={low} and high={high}; give 1 <= low <= high"):
            LengthBand(low=low, high=high)


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
def test_repetition_counts_runs_said_before(words: list[str], n: int) -> None:
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    again = sum(count - 1 for count in runs.values())
    share = again / runs.total() if runs else 0.0
    assert Repetition(n)(completions=[" ".join(words)]) == pytest.approx([1 - share])


def test_repetition_hears_words_whatever_their_case_and_marks() -> None:
    # Pairs: red-cube, cube-red, red-cube, cube-don't: one of four was said before.
    assert Repetition(2)(completions=["Red cube; red, CUBE! Don't", "", "one"]) == [0.75, 1, 1]
    with pytest.raises(ValueError, match=r"Repetition\.n is 0; give 1 or more"):
        Repetition(0)


@pytest.mark.parametrize(
    ("prompt", "completion", "score"),
    [
        ("two red cubes and a dog", "Two cubes. A red dog.", 1.0),
        ("two red cubes and a dog", "A Cube, red.", 0.5),
        ("two red cubes and a dog", "the and a of", 0.0),
        ("a glass bus", "glasses, a bu", 0.0),  # no plural of one letter more; "bus" is none
        ("two buses", "a bus; two", 0.5),  # nor is "es" known
        ("a sign that says 'café 24'", "Café, 24", 0.5),  # sign, says; café, 24
        ("red red red dog", "red", 0.5),  # asked for once
        ("a photo of the", "dog", None),
        ("", "dog", None),
    ],
)
def test_coverage_counts_what_is_named(prompt: str, completion: str, score: float | None) -> None:
    found = PromptCoverage()(prompts=[prompt], completions=[completion])
    assert found == [score]
