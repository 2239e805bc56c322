"""The states of the global random generators, from which rewards and other code of a user may draw."""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import numpy as np
import torch

States: TypeAlias = dict[str, Any]
"""By library; tensors, numbers and tuples only, which ``torch.load`` reads without trusting anybody."""


def get_states(device: torch.device) -> States:
    """Return the states of Python's, NumPy's and torch's generators, and that of a GPU.

    Args:
        device: of this rank; a CPU has no generator beside torch's own.
    """
    kind, key, *rest = np.random.get_state()  # noqa: NPY002 - the global one is what others draw from
    states = {
        "python": random.getstate(),
        "numpy": (str(kind), tuple(int(word) for word in key), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_states(states: States, device: torch.device) -> None:
    """Continue from states of :func:`get_states`; a GPU's is left out where there is none."""
    random.setstate(states["python"])
    kind, key, *rest = states["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
