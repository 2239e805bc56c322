"""Show-o's published files: checked before anything heavy, read a tensor at a time.

Layout: ``config.json`` with the arguments of upstream's constructor, and ``pytorch_model.safetensors`` or
``pytorch_model.bin`` (one file, or shards with an index). Sizes of the language model and the tokenizer are
in the folder of the phi-1.5 that it was built from; the VQ model is in a folder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_unigrpo.adapters.common.files import find_tensors, read_json, require_same
from lightning_unigrpo.adapters.showo.config import VQ
from lightning_unigrpo.adapters.showo.vq import Levels, ShowOVQ

CONFIG, WEIGHTS = "config.json", "pytorch_model.safetensors"
ALL_WEIGHTS = (WEIGHTS, "model.safetensors", "pytorch_model.bin")
"""Names that are looked for, in this order; upstream writes the first."""
PROJECTOR = "mm_projector."
"""Begins names of what reads features of a CLIP tower: in some releases, and never run here."""
TABLES = ("quantize.embedding", "quantize.power_vals")
"""Tensors of the VQ model that follow from its sizes."""


class Checkpoint:
    """The tensors of a folder in the published layout.

    Args:
        folder: where the files are.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = find_tensors(folder, ALL_WEIGHTS)
        missing = [CONFIG] if not (folder / CONFIG).is_file() else []
        missing += [" or ".join(ALL_WEIGHTS)] if not self.tensors else []
        if missing:
            raise FileNotFoundError(
                f"adapter.source {folder} is not a Show-o checkpoint: {', '.join(missing)} missing; it "
                f"holds {holdings(folder)}."
            )
        self.json = read_json(folder / CONFIG)

    @property
    def left_out(self) -> list[str]:
        """Names of tensors that no module here has."""
        return [name for name in self.tensors if name.startswith(PROJECTOR)]

    def check(self, net: nn.Module) -> None:
        """Compare names and shapes with the network's, before a byte of weights is read.

        Raises:
            ValueError: naming what differs.
        """
        left_out = set(self.left_out)
        require_same(
            self.folder,
            {name: file.shape for name, file in self.tensors.items() if name not in left_out},
            shapes_of(net),
            hint="Sizes come from config.json, and from that of adapter.language.",
        )


class VQCheckpoint:
    """The tensors of a MAGVIT-v2, whose ``config.json`` says nothing of sizes.

    Args:
        folder: where the files are.

    Raises:
        FileNotFoundError: when there are no weights.
        ValueError: when a file is truncated, or of another model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = find_tensors(folder, ALL_WEIGHTS, key="adapter.vq")
        if not self.tensors:
            raise FileNotFoundError(
                f"adapter.vq {folder} has no {' or '.join(ALL_WEIGHTS)}; it holds {holdings(folder)}. Give "
                f"the MAGVIT-v2 {VQ!r}."
            )
        self.shapes = {n: file.shape for n, file in self.tensors.items() if n not in TABLES}

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments of :class:`ShowOVQ`.

        Raises:
            ValueError: when the file is another model's.
        """
        first, bits = (
            self.shapes.get(f"encoder.{name}.weight") for name in ("conv_in", "quant_conv")
        )
        if not first or not bits:
            raise ValueError(f"adapter.vq {self.folder} holds no MAGVIT-v2; give {VQ!r}.")
        return {
            "base": first[0],
            "encoder": levels_of(self.shapes, "encoder.down", first[0]),
            "decoder": levels_of(self.shapes, "decoder.up", first[0]),
            "bits": bits[0],
        }

    def check(self, vq: ShowOVQ) -> None:
        """Compare names and shapes with a model's, before a byte of weights is read.

        Raises:
            ValueError: naming what differs.
        """
        hint = f"Sizes are read from some of its tensors; the rest is as in {VQ!r}."
        require_same(self.folder, self.shapes, shapes_of(vq), hint=hint, key="adapter.vq")


def levels_of(shapes: Mapping[str, tuple[int, ...]], stack: str, base: int) -> Levels:
    """Return the resolutions that names and shapes of a stack tell.

    Args:
        shapes: of the file.
        stack: ``encoder.down`` or ``decoder.up``.
        base: channels of the finest resolution.
    """
    found: dict[int, list[int]] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(rf"{stack}\.(\d+)\.block\.\d+\.conv2\.weight", name):
            found.setdefault(int(match[1]), []).append(shape[0] // base)
    levels = [found[number] for number in sorted(found)]
    return Levels(tuple(each[0] for each in levels), tuple(map(len, levels)))


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as a file should have them."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def holdings(folder: Path) -> str:
    """Return what is in a folder, for a message."""
    names: Iterable[str] = sorted(path.name for path in folder.iterdir())[:12]
    return ", ".join(names) or "nothing"
