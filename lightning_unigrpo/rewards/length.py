"""How much room the reasoning takes."""

from __future__ import annotations

from collections.abc import Sequence


class SoftLength:
    """1 for reasoning short enough, falling to 0 over the last ``buffer`` tokens before the limit.

    ``r = clip((max_tokens - L) / buffer, 0, 1)``

    Source: DAPO, Eq. 13 (soft overlong punishment), https://arxiv.org/abs/2503.14476.

    Deviation: in [0, 1] instead of [-1, 0]; the advantages are the same, and no finished text is worth
    less than one that was cut off (``objective.truncation_reward``, 0).

    Args:
        max_tokens: sampled text tokens at which nothing is left.
        buffer: tokens before it over which the reward falls.

    Raises:
        ValueError: when the buffer does not fit below the limit.

    Example:
        >>> SoftLength(max_tokens=100, buffer=40)(num_tokens=[10, 60, 80, 100, 120])
        [1.0, 1.0, 0.5, 0.0, 0.0]
    """

    def __init__(self, max_tokens: int, buffer: int) -> None:
        if not 1 <= buffer <= max_tokens:
            raise ValueError(
                f"SoftLength got max_tokens={max_tokens} and buffer={buffer}; give "
                "1 <= buffer <= max_tokens."
            )
        self.max_tokens, self.buffer = max_tokens, buffer

    def __call__(self, num_tokens: Sequence[int]) -> list[float]:
        """Score lengths in sampled text tokens; returns one number in [0, 1] for each."""
        return [min(1.0, max(0.0, (self.max_tokens - n) / self.buffer)) for n in num_tokens]
