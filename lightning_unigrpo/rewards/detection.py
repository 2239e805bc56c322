"""Objects in images, and their colours: the networks behind GenEval.

Everything that the benchmark does around them is here; what they find is judged in :mod:`~.geneval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from lightning_unigrpo.rewards.coco import NAMES
from lightning_unigrpo.rewards.geneval import COLORS, Detection, Detections
from lightning_unigrpo.rewards.towers import Towers, not_found

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT, LONG, MULTIPLE = 800, 1333, 32
"""Pixels of an image's sides as the detector reads them, mmdet's setting; both are padded to a multiple."""
MOST = 100
"""Objects of an image."""
GREY = 0x99 / 255
"""What is not the object, in a crop whose colour is asked for."""
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


@dataclass(eq=False)
class Mask2FormerDetector:
    """Objects by a Mask2Former for instances, of ``transformers``.

    Deviation: the benchmark uses mmdet's own training of the same network; near thresholds the two differ.

    Source: Mask2Former, https://arxiv.org/abs/2112.01527.
    """

    source: str = "facebook/mask2former-swin-small-coco-instance"
    """A folder, or a hub id; its classes are COCO's 80, in their order."""
    batch_size: int = 8
    """Images in a forward."""
    dtype: str = "float32"
    """Of the network."""
    model: Any = field(default=None, repr=False)
    """A network instead of ``source``."""
    _held: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def prepare(self, device: torch.device) -> None:
        """Load the network if it is not there, and bring it to a device.

        Raises:
            FileNotFoundError: when there is no such checkpoint.
            ValueError: when it does not know 80 classes.
        """
        if "model" not in self._held:
            self._held["model"] = self.model or self._load()
            labels = self._held["model"].config.num_labels
            if labels != len(NAMES):
                raise ValueError(
                    f"{self.source} knows {labels} classes; GenEval needs a detector of COCO's {len(NAMES)}."
                )
        self._held["model"].to(device).eval().requires_grad_(False)

    def _load(self) -> Any:
        try:
            from transformers import Mask2FormerForUniversalSegmentation as Model

            return Model.from_pretrained(self.source, dtype=getattr(torch, self.dtype))
        except ImportError as error:
            raise ImportError(
                'GenEval\'s detector needs scipy: pip install "lightning-unigrpo[geneval]".'
            ) from error
        except OSError as error:
            key = "model.rewards: Mask2FormerDetector.source"
            raise not_found(key, self.source, error) from error

    def release(self) -> None:
        """Give the device's memory back."""
        if "model" in self._held:
            self._held["model"].to("cpu")

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> list[Detections]:
        """Return the objects of each image ``[3, H, W]`` in [0, 1]."""
        if not images:
            return []
        self.prepare(images[0].device)
        found: list[Detections] = [{} for _ in images]
        for shape in dict.fromkeys(image.shape for image in images):
            members = [i for i, image in enumerate(images) if image.shape == shape]
            for first in range(0, len(members), self.batch_size):
                batch = members[first : first + self.batch_size]
                pixels = torch.stack([images[i] for i in batch]).float()
                for i, objects in zip(batch, self._find(pixels), strict=True):
                    found[i] = objects
        return found

    def _find(self, pixels: Tensor) -> list[Detections]:
        model = self._held["model"]
        height, width = pixels.shape[2:]
        scaled = resized(pixels)
        read = prepared(scaled).to(model.dtype)
        found = model(pixel_values=read)
        masks = found.masks_queries_logits.float()
        masks = interpolate(masks, read.shape[2:], mode="bilinear", align_corners=False)
        masks = masks[:, :, : scaled.shape[2], : scaled.shape[3]]
        masks = interpolate(masks, (height, width), mode="bilinear", align_corners=False)
        rows = zip(found.class_queries_logits.float(), masks, strict=True)
        return [objects_of(classes, mask) for classes, mask in rows]


def resized(pixels: Tensor) -> Tensor:
    """Scale ``[B, 3, H, W]`` until the short side has 800 pixels or the long one 1333, whichever is first."""
    height, width = pixels.shape[2:]
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    size = (round(height * scale), round(width * scale))
    return interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)


def prepared(pixels: Tensor) -> Tensor:
    """Normalise ``[B, 3, H, W]`` and pad it at the right and at the bottom to multiples of 32."""
    mean, std = (pixels.new_tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    down, right = (-side % MULTIPLE for side in pixels.shape[2:])
    return pad((pixels - mean) / std, (0, right, 0, down))


def objects_of(classes: Tensor, masks: Tensor) -> dict[str, list[Detection]]:
    """Return the objects that a Mask2Former's outputs for one image stand for.

    Of all pairs of a query and a class the 100 likeliest; ``score = p(class) mean sigmoid(mask)`` over the
    pixels where the mask's logit is positive; the box is the extent of these pixels.

    Source: ``MaskFormerFusionHead.instance_postprocess`` of mmdet, facts alone.

    Args:
        classes: ``[Q, K + 1]`` logits, the last of no object.
        masks: ``[Q, H, W]`` logits at the image's size.

    Returns:
        By class, the best first; objects without a pixel are left out.
    """
    each = classes.softmax(-1)[:, :-1]
    best = each.flatten().topk(min(MOST, each.numel()))
    found: dict[str, list[Detection]] = {}
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        query, label = divmod(index, each.shape[1])
        logits = masks[query]
        mask = logits > 0
        if not bool(mask.any()):
            continue
        score = probability * float(logits[mask].sigmoid().mean())
        ys, xs = mask.nonzero(as_tuple=True)
        box = tuple(float(x) for x in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        found.setdefault(NAMES[label], []).append(Detection(box, score, mask))  # type: ignore[arg-type]
    return {name: sorted(objects, key=lambda d: -d.score) for name, objects in found.items()}


class CLIPColors(Towers):
    """The colour of an object, as CLIP names its crop.

    The crop is the object's box with ``#999`` around its mask; the colour is the likeliest of ten, each the
    mean of three templates.

    Source: GenEval, https://arxiv.org/abs/2310.11513.

    Args:
        source: folder or hub id of a CLIP in the layout of transformers.
        **towers: see :class:`Towers`.
    """

    def __init__(self, source: str = "openai/clip-vit-large-patch14", **towers: Any) -> None:
        super().__init__(source, **towers)
        self._classes: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, image: Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
        """Return the colours of objects of a class in an image ``[3, H, W]`` in [0, 1]."""
        seen = self.embed_images([cropped(image, each) for each in objects])
        return [COLORS[i] for i in (seen @ self._known(name, seen.device).T).argmax(1).tolist()]

    def _known(self, name: str, device: torch.device) -> Tensor:
        """Return ``[10, d]``: of each colour the mean of its templates, all of unit length."""
        if name not in self._classes:
            words = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
            each = self.embed_texts(words, device).view(len(COLORS), len(TEMPLATES), -1)
            self._classes[name] = normalize(each.mean(1), dim=-1)
        return self._classes[name].to(device)


def cropped(image: Tensor, found: Detection) -> Tensor:
    """Return the box of an object, grey where its mask is not.

    Args:
        image: ``[3, H, W]`` in [0, 1].
        found: the object.
    """
    if found.mask is not None:
        image = image.where(found.mask.to(image.device), GREY)
    x0, y0, x1, y1 = (round(x) for x in found.box)
    return image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
