"""Can the words be read that the prompt asks for?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.text import edit_distance

QUOTED = re.compile(r'"([^"]*)"')
PARTS = ("rapidocr", "onnxruntime")


class OCRReward:
    r"""How close the text in an image is to the text that was asked for.

    ``r = 1`` when the target is part of what was read, else
    ``r = 1 - min(d(read, target), |target|) / |target|`` with ``d`` the edit distance in characters; both
    without white space and in lower case, everything read in an image joined in reading order.

    Source: flow_grpo and Flow-Factory (``OCR``), which read with PaddleOCR; here the same family of models
    runs on onnxruntime (rapidocr, whose wheel holds them). It takes about half a second of one core per
    image, of whatever size; ``Reward(fn=..., remote=True, concurrency=4)`` reads beside the rollout.

    Deviation: a prompt that asks for no text is not scorable (``None``) instead of an error, and so is a
    rollout without an image. Where the text asked for is empty, 1 for an image without text, else 0.

    Args:
        column: of the data set that holds the target; ``None`` = what stands between the first two double
            quotes of the prompt.
        threads: of one call. More than one rank on a machine share its cores.

    Example:
        >>> OCRReward().compare(["HELL0 w", "so: hello world"], ["Hello World", "Hello World"])
        [0.5, 1.0]
    """

    image_format = "uint8"

    def __init__(self, column: str | None = None, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(
                f"model.rewards: OCRReward.threads is {threads}; give 1 or more threads."
            )
        self.column, self.threads = column, threads
        self._idle: list[Any] = []
        """Engines that nobody uses: one call, in whatever thread, has one for itself."""
        # Which columns a reward is given, and whether one is missing, is read from its signature.
        self.__signature__ = Signature(
            [
                Parameter(name, Parameter.POSITIONAL_OR_KEYWORD)
                for name in ("images", column or "prompts")
            ]
        )

    def prepare(self, device: torch.device) -> None:
        """Make the first engine, on the CPU whatever the device.

        Raises:
            ModuleNotFoundError: when the extra is not installed.
        """
        if not self._idle:
            self._idle.append(self._engine())

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engines behind: another process makes its own."""
        return self.__dict__ | {"_idle": []}

    def __call__(
        self,
        images: Sequence[Tensor | None],
        prompts: Sequence[str] = (),
        **columns: Sequence[str | None],
    ) -> list[float | None]:
        """Score images.

        Args:
            images: ``[3, H, W]`` uint8 each, or ``None``.
            prompts: one for each image, unless a column holds the targets.
            **columns: that column.

        Returns:
            One number in [0, 1] for each, or ``None``.
        """
        named = {"prompts": prompts, **columns}
        targets = named[self.column] if self.column else map(quoted, prompts)
        asked = [
            (i, image, target)
            for i, (image, target) in enumerate(zip(images, targets, strict=True))
            if image is not None and target is not None
        ]
        found = self.compare(
            [self.read(image) for _, image, _ in asked], [str(target) for *_, target in asked]
        )
        scores: list[float | None] = [None] * len(images)
        for (i, *_), score in zip(asked, found, strict=True):
            scores[i] = score
        return scores

    def read(self, image: Tensor) -> str:
        """Return all text in one image ``[3, H, W]`` uint8, in reading order."""
        bgr = np.ascontiguousarray(image.cpu().numpy()[::-1].transpose(1, 2, 0))
        engine = self._idle.pop() if self._idle else self._engine()
        try:
            # All three: what a call leaves out is as the call before had it.
            result = engine(bgr, use_det=True, use_cls=True, use_rec=True)
        finally:
            self._idle.append(engine)
        return "".join(result.txts or ())

    def compare(self, read: Sequence[str], targets: Sequence[str]) -> list[float]:
        """Score what was read; returns one number in [0, 1] for each."""
        found, wanted = ([plain(text) for text in texts] for texts in (read, targets))
        if not wanted:
            return []
        distances = edit_distance(found, wanted, reduction="none").tolist()
        return [score(*each) for each in zip(found, wanted, distances, strict=True)]

    def _engine(self) -> Any:
        missing = [name for name in PARTS if find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"model.rewards: OCRReward needs {' and '.join(missing)}; run "
                "pip install 'lightning-unigrpo[ocr]'."
            )
        from rapidocr import RapidOCR

        engine = "EngineConfig.onnxruntime"
        return RapidOCR(
            params={
                # It prints each model at INFO, and each image without text at WARNING.
                "Global.log_level": "critical",
                f"{engine}.intra_op_num_threads": self.threads,
                f"{engine}.inter_op_num_threads": 1,
            }
        )


def quoted(prompt: str | None) -> str | None:
    """Return what stands between the first two double quotes, ``None`` where there are none.

    Example:
        >>> quoted('a sign that says "Open" over "Shut"')
        'Open'
    """
    match = QUOTED.search(prompt or "")
    return match[1] if match else None


def plain(text: str) -> str:
    """Return a text without white space, in lower case."""
    return "".join(text.split()).lower()


def score(read: str, target: str, distance: int) -> float:
    """Turn the edit distance of two plain texts into the reward."""
    if not target:
        return float(not read)
    return 1.0 if target in read else 1 - min(distance, len(target)) / len(target)
