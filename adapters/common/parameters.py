"""Which weights are trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def freeze(net: nn.Module, parts: Sequence[str]) -> None:
    """Stop training the parameters whose names contain one of some parts.

    Raises:
        ValueError: when a part is in no name.
    """
    for part in parts:
        found = [p for name, p in net.named_parameters() if part in name]
        if not found:
            known = dict.fromkeys(n.split(".")[-2] for n, _ in net.named_parameters())
            raise ValueError(
                f"adapter.freeze has {part!r}, which is part of no parameter's name; names are made of "
                f"{', '.join(known)}."
            )
        for parameter in found:
            parameter.requires_grad_(False)
