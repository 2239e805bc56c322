"""Handwritten digits as latents: 8 x 8 pixels in four patches of 4 x 4.

The images are the UCI optical digits that ship with scikit-learn (extra ``demo``). Only making and
judging models needs them; training with the shipped weights does not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

SIDE, PATCH = 8, 4
GRID = (SIDE // PATCH, SIDE // PATCH)


class Digits(NamedTuple):
    """Real images."""

    pixels: Tensor
    """``[n, 8, 8]`` float32 in [-1, 1]."""
    labels: Tensor
    """``[n]`` int64."""


@lru_cache
def load_digits(part: str) -> Digits:
    """Return the ``train`` (1437) or ``held_out`` (360) images, split by a fixed permutation.

    Raises:
        ImportError: when scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            'The handwritten digits ship with scikit-learn: pip install "lightning-unigrpo[demo]".'
        ) from error
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:360] if part == "held_out" else order[360:]
    pixels = torch.from_numpy(data.images[chosen]).float() / 8 - 1
    return Digits(pixels, torch.from_numpy(data.target[chosen]).long())


def patchify(pixels: Tensor) -> Tensor:
    """Turn ``[B, 8, 8]`` pixels into ``[B, 4, 16]`` latent tokens, row-major in and over patches."""
    cells = pixels.unflatten(1, (GRID[0], PATCH)).unflatten(3, (GRID[1], PATCH))
    return cast(Tensor, cells.transpose(2, 3).flatten(3).flatten(1, 2))


def unpatchify(latents: Tensor) -> Tensor:
    """Invert :func:`patchify`."""
    cells = latents.unflatten(1, GRID).unflatten(3, (PATCH, PATCH))
    return cast(Tensor, cells.transpose(2, 3).flatten(3, 4).flatten(1, 2))


def to_rgb(latents: Tensor) -> Tensor:
    """Return ``[B, 3, 8, 8]`` in [0, 1] of latents in [-1, 1]."""
    grey = ((unpatchify(latents) + 1) / 2).clamp(0, 1)
    return grey.unsqueeze(1).expand(-1, 3, -1, -1)
