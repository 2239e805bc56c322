"""Show-o2's published files: checked before anything heavy, read a tensor at a time.

Layout: ``config.json`` with the arguments of upstream's constructor, and ``pytorch_model.bin`` (one file, or
shards with an index), or the same tensors as ``model.safetensors``. Sizes of the language model and the
tokenizer are in the folder of the Qwen2.5 that it was built from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapters.common.files import (
    find_tensors,
    read_json,
    read_tensors,
    require_same,
    set_parameter,
)
from lightning_unigrpo.adapters.common.lora import base_name, first_value
from lightning_unigrpo.adapters.showo2.network import ShowO2Net

WEIGHTS, PICKLED, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
EMBEDDING, HEAD = "showo.model.embed_tokens.weight", "showo.lm_head.weight"
"""Both are in the file, also where they are one weight."""


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
        self.tensors = find_tensors(folder, (WEIGHTS, PICKLED))
        missing = [CONFIG] if not (folder / CONFIG).is_file() else []
        missing += [f"{PICKLED} (or {WEIGHTS})"] if not self.tensors else []
        if missing:
            here = sorted(path.name for path in folder.iterdir())[:12]
            raise FileNotFoundError(
                f"adapter.source {folder} is not a Show-o2 checkpoint: {', '.join(missing)} missing; it "
                f"holds {', '.join(here) or 'nothing'}."
            )
        self.json = read_json(folder / CONFIG)

    def check(self, net: ShowO2Net) -> None:
        """Compare names and shapes with the network's, before a byte of weights is read.

        Raises:
            ValueError: naming what differs.
        """
        expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        expected.setdefault(HEAD, expected[EMBEDDING])
        found = {name: file.shape for name, file in self.tensors.items()}
        require_same(
            self.folder,
            found,
            expected,
            hint="Sizes come from config.json, and from that of adapter.language.",
        )

    def read(self, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors one at a time, each a view of its mapped file.

        Args:
            wanted: what to call a tensor, to its name in the file.
        """
        return read_tensors({name: self.tensors[known] for name, known in wanted.items()})

    def fill(self, part: nn.Module, *, prefix: str = "", device: torch.device) -> None:
        """Replace what is on the meta device, one tensor in memory at a time; each keeps its dtype.

        Args:
            part: of the network.
            prefix: of its names there.
            device: of the tensors afterwards.

        Raises:
            ValueError: when the language model's head is tied, and the file holds two weights for it.
        """
        lacking = {name: p for name, p in part.named_parameters() if p.is_meta}
        wanted = {
            name: known
            for name in lacking
            if (known := base_name(prefix + name)) in self.tensors and "lora_" not in name
        }
        names = {prefix + name for name, _ in part.named_parameters()}
        for name, tensor in self.read(wanted):
            if wanted[name] == EMBEDDING and HEAD not in names:
                self._require_tied(tensor)
            set_parameter(part, name, tensor, device)
        for name in lacking.keys() - wanted.keys():
            set_parameter(part, name, first_value(prefix + name, lacking[name]), device)

    def _require_tied(self, embedding: Tensor) -> None:
        ((_, head),) = self.read({HEAD: HEAD})
        if not torch.equal(embedding, head):
            raise ValueError(
                f"adapter.source {self.folder}: {HEAD} and {EMBEDDING} differ, but the language model's "
                "config.json has tie_word_embeddings true; set it to false there, and give that folder as "
                "adapter.language."
            )
