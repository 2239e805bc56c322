"""Does the image show what the prompt says? CLIP's answer, and that of CLIPs tuned to preferences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_unigrpo.rewards.towers import Towers


class CLIPScore(Towers):
    """The cosine between prompt and image under CLIP.

    ``r = scale * cos(text, image)``; ``scale=None`` is the model's own over 30, ``exp(logit_scale) / 30``,
    which is about 3.3 and brings the reward to about 0.5 to 1.2. The peers, all of one order:

    ============  =================================
    flow_grpo     ``None``
    Flow-Factory  1
    torchmetrics  100, clamped at 0 (this never is)
    ============  =================================

    Source: https://arxiv.org/abs/2103.00020 and https://arxiv.org/abs/2104.08718.

    Args:
        source: folder or hub id of a CLIP in the layout of transformers.
        scale: as above.
        **towers: see :class:`Towers`.
    """

    divisor: ClassVar[float] = 30.0
    """Of the model's own scale."""

    def __init__(
        self,
        source: str = "openai/clip-vit-large-patch14",
        *,
        scale: float | None = None,
        **towers: Any,
    ) -> None:
        super().__init__(source, **towers)
        self.scale = scale

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor | None], prompts: Sequence[str]) -> Tensor:
        """Score images.

        Args:
            images: ``[n, 3, H, W]`` float32 in [0, 1], or a list when sizes differ or some are missing.
            prompts: n texts.

        Returns:
            ``[n]`` float32 on the images' device, NaN where there is no image.
        """
        shown = self.embed_images(images)
        cosine = (shown * self.embed_texts(prompts, shown.device)).sum(-1)
        scale = self.logit_scale / self.divisor if self.scale is None else self.scale
        return scale * cosine


class PickScore(CLIPScore):
    """How well people who choose between two images would like this one for its prompt.

    ``r = exp(logit_scale) * cos(text, image) / 26``, about 0.8; the divisor is that of flow_grpo,
    verl-omni and Flow-Factory.

    Source: https://arxiv.org/abs/2305.01569. 986 million parameters, 3.9 GB.

    Args:
        source: folder or hub id of the model.
        processor: folder or hub id with the tokenizer and image settings, which the model is published
            without.
        **score: see :class:`CLIPScore`; ``scale`` is ``None`` as above.
    """

    divisor = 26.0

    def __init__(
        self,
        source: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **score: Any,
    ) -> None:
        super().__init__(source, processor=processor, **score)
