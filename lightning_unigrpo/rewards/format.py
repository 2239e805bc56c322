"""Does the reasoning have the shape that was asked for?"""

from __future__ import annotations

import re
from collections.abc import Sequence

THINK = r"\s*<think>(?:(?!</?think>).)+</think>(?:(?!</?think>).)*"
"""One pair of tags that stands first and is not empty; anything but tags may follow."""


class ThinkFormat:
    r"""1 for a completion that matches a regular expression as a whole, else 0.

    Args:
        pattern: a regular expression; ``.`` matches line ends too.

    Raises:
        ValueError: when the pattern is no regular expression.

    Example:
        >>> ThinkFormat()(completions=["<think>two cubes</think> Two cubes.", "two cubes"])
        [1.0, 0.0]
    """

    def __init__(self, pattern: str = THINK) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(
                f"ThinkFormat.pattern is {pattern!r}, no regular expression ({error}); see the syntax of "
                "Python's re module."
            ) from error

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """Score completions in words; returns one of 0.0 and 1.0 for each."""
        return [float(self.pattern.fullmatch(text) is not None) for text in completions]
