"""Log-probabilities of several texts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unigrpo.adapter import token_log_probs
from lightning_unigrpo.types import TextSegment


def score_texts(logits: Tensor, texts: Sequence[TextSegment]) -> tuple[list[Tensor], list[Tensor]]:
    """Return log-probabilities and entropies ``[L]`` per text.

    Args:
        logits: ``[sum L, V]`` in the order of the texts.
        texts: sampled segments.
    """
    lengths = [len(text.tokens) for text in texts]
    tokens = torch.cat([text.tokens for text in texts])
    temperatures = {text.temperature for text in texts}
    temperature = temperatures.pop()
    if temperatures:  # more than one: temper row by row
        each = logits.new_tensor([text.temperature for text in texts])
        logits = logits / each.repeat_interleave(
            torch.tensor(lengths, device=each.device)
        ).unsqueeze(1)
        temperature = 1.0
    log_prob, entropy = token_log_probs(logits, tokens, temperature=temperature)
    return list(log_prob.split(lengths)), list(entropy.split(lengths))
