"""JanusFlow's published files: checked before anything heavy, read a tensor at a time.

Layout: ``config.json``, ``model.safetensors`` (one file, or shards with an index), a tokenizer's files, and
``processor_config.json`` and ``preprocessor_config.json`` where they are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_unigrpo.adapters.common.files import (
    fill_from,
    find_shards,
    read_header,
    read_json,
    require_same,
)
from lightning_unigrpo.adapters.janusflow.config import JanusFlowConfig
from lightning_unigrpo.adapters.janusflow.vision import DROPPED

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PROCESSOR, PICTURES = "processor_config.json", "preprocessor_config.json"
VISION = ("vision_und_enc_model.", "vision_und_enc_aligner.", "beg_of_und_embed")


class Checkpoint:
    """The tensors of a folder in the published layout.

    Args:
        folder: where the files are.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = find_shards(folder, WEIGHTS)
        missing = [CONFIG] if not (folder / CONFIG).is_file() else []
        missing += [WEIGHTS] if not shards else []
        if missing:
            here = sorted(path.name for path in folder.iterdir())[:12]
            raise FileNotFoundError(
                f"adapter.source {folder} is not a JanusFlow checkpoint: {', '.join(missing)} missing; it "
                f"holds {', '.join(here) or 'nothing'}."
            )
        self.json = read_json(folder / CONFIG)
        self.processor = self._optional(PROCESSOR)
        self.pictures = self._optional(PICTURES)
        self.tensors = {k: v for path in shards for k, v in read_header(path).items()}

    def _optional(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower is there."""
        there = any(name.startswith(VISION) for name in self.tensors)
        return there and bool(self.json.get("vision_und_enc_config"))

    def config(self, marks: Mapping[str, int]) -> JanusFlowConfig:
        """Return the sizes.

        Args:
            marks: ids of the special tokens.

        Raises:
            ValueError: when ``config.json`` is another model's.
        """
        return JanusFlowConfig.from_upstream(self.json, marks)

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """Compare names and shapes with what modules expect, before a byte of weights is read.

        Args:
            modules: title to module; together they hold every tensor of the file that is ever run.

        Raises:
            ValueError: naming what differs.
        """
        expected = {
            name: tuple(value.shape)
            for module in modules.values()
            for name, value in module.state_dict().items()
        }
        unread = (DROPPED,) if any(name.startswith(VISION) for name in expected) else VISION
        found = {n: file.shape for n, file in self.tensors.items() if not n.startswith(unread)}
        require_same(self.folder, found, expected, hint="Sizes come from config.json.")

    def fill(self, part: nn.Module, *, prefix: str = "", device: torch.device) -> None:
        """Replace what is on the meta device, one tensor in memory at a time; each keeps its dtype."""
        fill_from(part, self.tensors, prefix=prefix, device=device)
