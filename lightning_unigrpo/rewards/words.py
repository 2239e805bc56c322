"""Does the reasoning say something, and say it once?"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
"""Letters and digits, with apostrophes inside. Scripts without spaces count as one long word."""


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


FUNCTION_WORDS = frozenset(
    words_of(
        """a an the this that these those some any each every both all no not
    and or but nor so than then as if of in on at by for from to into onto with without within over under
    is are was were be been being am has have had do does did will would can could shall should may might must
    it its he she they them his her their there here who which what where when while very just also only
    image picture photo photograph"""
    )
)
"""What need not be named: words that carry grammar, and "a photo of"."""


class LengthBand:
    """1 for reasoning of a length that was asked for, less for shorter and for longer.

    ``r = clip(min(L / low, 2 - L / high), 0, 1)``: 0 at no token and at twice ``high``.

    Args:
        low: sampled text tokens from which on nothing is missing.
        high: up to which nothing is too much.

    Raises:
        ValueError: when there is no such band.

    Example:
        >>> LengthBand(low=20, high=40)(num_tokens=[0, 10, 20, 40, 60, 90])
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, low: int, high: int) -> None:
        if not 1 <= low <= high:
            raise ValueError(
                f"model.rewards: LengthBand got low={low} and high={high}; give 1 <= low <= high."
            )
        self.low, self.high = low, high

    def __call__(self, num_tokens: Sequence[int]) -> list[float]:
        """Score lengths in sampled text tokens; returns one number in [0, 1] for each."""
        return [min(1.0, max(0.0, min(n / self.low, 2 - n / self.high))) for n in num_tokens]


class Repetition:
    """1 for reasoning that never repeats itself, less by the share of runs of words said before.

    ``r = (number of different n-grams) / (number of n-grams)``; 1 for fewer than n words.

    Source: distinct-n, https://arxiv.org/abs/1510.03055.

    Args:
        n: words of a run.

    Raises:
        ValueError: when a run would hold no word.

    Example:
        >>> Repetition(n=2)(completions=["a red cube on a blue cube", "red cube red cube red"])
        [1.0, 0.5]
    """

    def __init__(self, n: int = 3) -> None:
        if n < 1:
            raise ValueError(f"model.rewards: Repetition.n is {n}; give 1 or more words.")
        self.n = n

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """Score completions in words; returns one number in (0, 1] for each."""
        return [self._distinct(words_of(text)) for text in completions]

    def _distinct(self, words: list[str]) -> float:
        runs = list(zip(*(words[i:] for i in range(self.n)), strict=False))
        return len(set(runs)) / len(runs) if runs else 1.0


class PromptCoverage:
    """How much of what the prompt asks for the reasoning names.

    ``r = |C(prompt) ∩ W(reasoning)| / |C(prompt)|`` with W the different words of a text and C those that
    are no function words, both without the "s" of a plural. ``None`` (not scorable) where C is empty.

    Example:
        >>> PromptCoverage()(
        ...     prompts=["a photo of two red cubes", "the"], completions=["Cubes, both red.", "So."]
        ... )
        [0.6666666666666666, None]
    """

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float | None]:
        """Score prompts and completions in words; returns one number in [0, 1] for each, or ``None``."""
        return [_coverage(*pair) for pair in zip(prompts, completions, strict=True)]


def _coverage(prompt: str, completion: str) -> float | None:
    asked = {_singular(word) for word in words_of(prompt) if word not in FUNCTION_WORDS}
    named = {_singular(word) for word in words_of(completion)}
    return len(asked & named) / len(asked) if asked else None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") else word
