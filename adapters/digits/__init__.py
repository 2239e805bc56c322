"""The embedded default: arithmetic in words, reasoning in tokens, the answer as a handwritten digit."""

from lightning_unigrpo.adapters.digits.adapter import DigitsAdapter
from lightning_unigrpo.adapters.digits.classifier import DigitReward, ReasoningReward

__all__ = ["DigitReward", "DigitsAdapter", "ReasoningReward"]
