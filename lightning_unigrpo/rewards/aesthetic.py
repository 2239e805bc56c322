"""Is the image pleasant to look at? LAION's head on CLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lightning_unigrpo.rewards.towers import Towers

LAYER = re.compile(r"(\d+)\.weight$")


class AestheticScore(Towers):
    """How people would rate an image, whatever its prompt.

    ``r = (w · image + b) / divisor``, about 1 to 10 with ``divisor=1``, of the unit vector of the image
    under CLIP. The published head is five linear layers with nothing between them (dropout while it was
    trained), so it is one.

    Source: https://github.com/christophschuhmann/improved-aesthetic-predictor; flow_grpo (``aesthetic``),
    which does not divide.

    Args:
        head: file with the head, ``sac+logos+ava1-l14-linearMSE.pth`` of that repository (3.7 MB).
        source: folder or hub id of the CLIP that the head was trained on.
        divisor: as above; 10 brings it to the scale of rewards in [0, 1].
        **towers: see :class:`Towers`.

    Raises:
        ValueError: when the divisor makes no sense.
    """

    def __init__(
        self,
        head: str,
        *,
        source: str = "openai/clip-vit-large-patch14",
        divisor: float = 1.0,
        **towers: Any,
    ) -> None:
        super().__init__(source, **towers)
        if divisor <= 0:
            raise ValueError(f"{self._key('divisor')} is {divisor}; give more than 0.")
        self.head, self.divisor = head, divisor
        self._line: tuple[Tensor, Tensor] | None = None

    def prepare(self, device: torch.device | str) -> None:
        """Have head and model on a device; raises what :meth:`Towers.prepare` does."""
        if self._line is None:
            self._line = self._read_head()
        super().prepare(device)
        width, wanted = len(self._line[0]), self._model.config.projection_dim
        if width != wanted:
            raise ValueError(
                f"{self._key('head')} is made for vectors of {width} numbers, but {self._key('source')}, "
                f"{self.source!r}, gives {wanted}. The published head belongs to "
                "'openai/clip-vit-large-patch14'."
            )

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Score images.

        Args:
            images: ``[n, 3, H, W]`` float32 in [0, 1], or a list when sizes differ or some are missing.

        Returns:
            ``[n]`` float32 on the images' device, NaN where there is no image.
        """
        shown = self.embed_images(images)
        assert self._line is not None
        weight, bias = (part.to(shown.device) for part in self._line)
        return (shown @ weight + bias) / self.divisor

    def _read_head(self) -> tuple[Tensor, Tensor]:
        path = Path(self.head).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"{self._key('head')} is {self.head!r}, which is no file; get "
                "sac+logos+ava1-l14-linearMSE.pth from "
                "https://github.com/christophschuhmann/improved-aesthetic-predictor."
            )
        try:
            return collapse(torch.load(path, map_location="cpu", weights_only=True))
        except (UnpicklingError, AttributeError, RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self._key('head')}: {path} is no chain of linear layers that ends in one number "
                f"({error!r})."
            ) from error


def collapse(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Multiply a chain of linear layers out.

    ``w = W_k ... W_1`` and ``b = W_k (... W_2 b_1 + b_2 ...) + b_k``

    Args:
        state: ``<any>.<number>.weight`` and ``.bias``; the numbers give the order.

    Returns:
        ``[E]`` and ``[]``, float32, multiplied out in float64.

    Raises:
        ValueError: when there is no layer, or more than one number comes out.
    """
    layers = sorted((int(found[1]), name) for name in state if (found := LAYER.search(name)))
    if not layers:
        raise ValueError(f"no layers among {sorted(state)[:3]}")
    weight, bias = torch.eye(state[layers[0][1]].shape[1]).double(), torch.zeros(()).double()
    for _, name in layers:
        matrix = state[name].double()
        bias = matrix @ bias.expand(matrix.shape[1]) + state[f"{name[:-6]}bias"].double()
        weight = matrix @ weight
    if len(weight) != 1:
        raise ValueError(f"{len(weight)} numbers come out")
    return weight[0].float(), bias[0].float()
