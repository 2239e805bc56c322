"""How well JPEG can pack an image: rewards that need no model, for first runs and for tests."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


class JPEGIncompressibility:
    """The size of an image as JPEG, in kilobytes: rich texture and noise score high.

    ``r = bytes / 1000``

    Source: DDPO, https://arxiv.org/abs/2305.13301; scale and quality of flow_grpo.

    Args:
        quality: of the JPEG, 1 to 100. Width, height and quality decide about the scale: compare nothing
            across them.

    Raises:
        ValueError: when JPEG has no such quality.

    Example:
        >>> from PIL import Image
        >>> JPEGIncompressibility()([Image.new("RGB", (8, 8)), None])
        [0.631, None]
    """

    image_format = "pil"

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(
                f"model.rewards: {type(self).__name__}.quality is {quality}; give 1 to 100."
            )
        self.quality = quality

    def __call__(self, images: Sequence[Image | None]) -> list[float | None]:
        """Score images; returns a number for each, ``None`` where nothing was drawn."""
        return [None if image is None else self.score(self.count(image)) for image in images]

    def score(self, size: int) -> float:
        """Turn bytes into the reward."""
        return size / 1000

    def count(self, image: Image) -> int:
        """Return the bytes of an image as JPEG."""
        buffer = BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()


class JPEGCompressibility(JPEGIncompressibility):
    """Minus the size of an image as JPEG: smooth, empty images score high.

    ``r = -bytes / 1000 / 500``

    Source: DDPO, https://arxiv.org/abs/2305.13301; scale and quality of flow_grpo, about -1 to 0 for
    images of 512 x 512. Below 0, so an image is worth less than reasoning that was cut off
    (``objective.truncation_reward``, 0): set that lower.

    Args:
        quality: of the JPEG, 1 to 100.

    Example:
        >>> from PIL import Image
        >>> JPEGCompressibility()([Image.new("RGB", (8, 8))])
        [-0.001262]
    """

    def score(self, size: int) -> float:
        """Turn bytes into the reward."""
        return -super().score(size) / 500
