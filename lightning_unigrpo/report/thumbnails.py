"""Images of a run small enough for one page, by measuring them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

LEVELS = ((256, 85), (192, 75), (128, 70), (96, 60), (64, 50), (48, 40), (32, 30))
"""Largest side in pixels and WebP quality, tried from the first on."""
SHARP = 64
"""Images of at most this many pixels a side are kept without loss while they are not made smaller."""
SAMPLE = 64
"""Images measured before a level is chosen."""


@dataclass(frozen=True, kw_only=True)
class Thumbnails:
    """Images as data URIs."""

    uris: tuple[str | None, ...]
    """In the order of the files; ``None`` where one is missing or broken."""
    side: int
    """Largest side that was allowed."""
    original: int
    """Largest side among the files."""

    @property
    def reduced(self) -> bool:
        """Whether images lost size."""
        return self.original > self.side

    @property
    def missing(self) -> int:
        """How many files could not be read."""
        return self.uris.count(None)


def make(files: Sequence[Path], budget: int) -> Thumbnails:
    """Encode images at the best level at which all of them together fit.

    A level is chosen by what an even sample of the images takes, and lowered while all of them take more.

    Args:
        files: images of any size; missing and broken ones are passed over.
        budget: characters for all of them.
    """
    sample = files[:: max(1, len(files) // SAMPLE)]
    for side, quality in LEVELS:
        last = (side, quality) == LEVELS[-1]
        if not last and _size(_encode(sample, side, quality)) * len(files) > budget * len(sample):
            continue
        found = _encode(files, side, quality)
        if last or _size(found) <= budget:
            break
    return Thumbnails(
        uris=tuple(uri for uri, _ in found),
        side=side,
        original=max((original for _, original in found), default=0),
    )


def _size(found: Sequence[tuple[str | None, int]]) -> int:
    return sum(len(uri) for uri, _ in found if uri)


def _encode(files: Sequence[Path], side: int, quality: int) -> list[tuple[str | None, int]]:
    with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it works
        return [*pool.map(lambda file: encode(file, side, quality), files)]


def encode(file: Path, side: int, quality: int) -> tuple[str | None, int]:
    """Return an image as a data URI, and its largest side; ``None`` and 0 where it cannot be read.

    Args:
        file: of the image.
        side: largest side of the result, in pixels.
        quality: of WebP, 0 to 100.
    """
    try:
        with Image.open(file) as opened:
            original = max(opened.size)
            opened.thumbnail((side, side))  # before the pixels are read: JPEG skips most of them
            picture = opened.convert("RGB")
    except (OSError, ValueError):
        return None, 0
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=quality, lossless=original <= min(SHARP, side))
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}", original
