"""Bagel's published files: checked before anything heavy, read a tensor at a time.

Layout: ``llm_config.json``, ``vit_config.json``, ``ema.safetensors`` (language model, bridges and vision
tower; one file, or shards with an index), ``ae.safetensors`` (the autoencoder), and a tokenizer's files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.network import sincos_table
from lightning_unigrpo.adapters.common.files import (
    find_shards,
    read_header,
    read_json,
    read_tensors,
    require_same,
    set_parameter,
)
from lightning_unigrpo.adapters.common.lora import base_name, first_value

WEIGHTS, AUTOENCODER = "ema.safetensors", "ae.safetensors"
LLM, VIT = "llm_config.json", "vit_config.json"
VISION = ("vit_model.", "connector.", "vit_pos_embed.")
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Sine tables: read when the file's fits, else left as computed."""
MARKS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
"""Special tokens, as :meth:`BagelConfig.from_upstream` names them; ``llm_config.json`` names others."""


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
        missing = [name for name in (LLM, AUTOENCODER) if not (folder / name).is_file()]
        shards = find_shards(folder, WEIGHTS)
        if not shards:
            missing.append(WEIGHTS)
        if missing:
            here = sorted(path.name for path in folder.iterdir())[:12]
            raise FileNotFoundError(
                f"adapter.source {folder} is not a Bagel checkpoint: {', '.join(missing)} missing; it holds "
                f"{', '.join(here) or 'nothing'}."
            )
        self.llm_config = read_json(folder / LLM)
        self.vit_config = read_json(folder / VIT) if (folder / VIT).is_file() else None
        self.tensors = {k: v for path in shards for k, v in read_header(path).items()}
        self.autoencoder = read_header(folder / AUTOENCODER)

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower is there."""
        return self.vit_config is not None and any(k.startswith(VISION) for k in self.tensors)

    def config(self, marks: Mapping[str, int], *, vision: bool, **overrides: Any) -> BagelConfig:
        """Return the sizes, from the JSON files and the tensors' shapes.

        Upstream keeps some of them in code. Where a tensor shows them, the tensor is believed.

        Args:
            marks: ids of the special tokens, as :data:`MARKS` names them.
            vision: whether to build the vision tower.
            overrides: fields of :class:`BagelConfig` to set instead.
        """
        z = self.autoencoder["decoder.conv_in.weight"].shape[1]
        levels = {
            name.split(".")[2] for name in self.autoencoder if name.startswith("encoder.down.")
        }
        channels = self._shape("vae2llm.weight", 1, 64)
        bagel = {
            "latent_patch_size": math.isqrt(channels // z),
            "max_latent_size": math.isqrt(self._shape(TABLES[0], 0, 64**2)),
            "vit_max_num_patch_per_side": math.isqrt(self._shape(TABLES[1], 0, 70**2)),
        }
        config = BagelConfig.from_upstream(
            llm_config=self.llm_config,
            vit_config=self.vit_config if vision else None,
            bagel_config=bagel,
            vae_config={"z_channels": z, "downsample": 2 ** (len(levels) - 1)},
            special_tokens=marks,
        )
        unknown = overrides.keys() - vars(config).keys()
        if unknown:
            raise ValueError(
                f"adapter.overrides has {', '.join(sorted(unknown))}; known are {', '.join(vars(config))}."
            )
        return BagelConfig(**(vars(config) | overrides))

    def _shape(self, name: str, axis: int, default: int) -> int:
        return self.tensors[name].shape[axis] if name in self.tensors else default

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """Compare names and shapes with what modules expect, before a byte of weights is read.

        Args:
            modules: title to module; together they hold every tensor of the file.

        Raises:
            ValueError: naming what differs.
        """
        expected = {
            name: tuple(value.shape)
            for module in modules.values()
            for name, value in module.state_dict().items()
        }
        found = {name: file.shape for name, file in self.tensors.items()}
        if not any(name.startswith(VISION) for name in expected):
            found = {name: shape for name, shape in found.items() if not name.startswith(VISION)}
        require_same(
            self.folder,
            found,
            expected,
            hint="Sizes come from llm_config.json and vit_config.json; adapter.overrides changes them.",
            agree=self._agree,
        )

    def _agree(
        self, name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None
    ) -> bool:
        if name in TABLES:
            return True
        if found is not None and expected is not None and name.endswith("patch_embedding.weight"):
            return math.prod(found) == math.prod(expected)  # as a convolution or flat
        return found == expected

    def fill(self, part: nn.Module, *, prefix: str = "", device: torch.device) -> None:
        """Replace what is on the meta device, one tensor in memory at a time; each keeps its dtype.

        Args:
            part: of a module with names as in the file.
            prefix: of its names there.
            device: of the tensors afterwards.
        """
        lacking = {name: p for name, p in part.named_parameters() if p.is_meta}
        wanted = {
            name: self.tensors[file]
            for name, p in lacking.items()
            if (file := base_name(prefix + name)) in self.tensors
            and (file not in TABLES or tuple(p.shape) == self.tensors[file].shape)
        }
        for name, tensor in read_tensors(wanted):
            value = flat_patch(tensor) if name.endswith("patch_embedding.weight") else tensor
            set_parameter(part, name, value, device)
        for name in lacking.keys() - wanted.keys():
            whole = prefix + name
            if whole in TABLES:
                rows, size = lacking[name].shape
                value = sincos_table(math.isqrt(rows), size)
            else:
                value = first_value(whole, lacking[name])
            set_parameter(part, name, value, device)

    def fill_autoencoder(self, vae: nn.Module, names: Mapping[str, str]) -> None:
        """Read the autoencoder in float32, under diffusers' names.

        Raises:
            ValueError: when the file holds another model.
        """
        expected = vae.state_dict()
        state = {
            names[name]: tensor.to(torch.float32, copy=True)
            for name, tensor in read_tensors(self.autoencoder)
        }
        for name, value in state.items():
            if name in expected and value.numel() == expected[name].numel():
                state[name] = value.reshape(
                    expected[name].shape
                )  # 1x1 convolutions as linear layers
        wrong = [
            name
            for name in sorted(state.keys() | expected.keys())
            if name not in state
            or name not in expected
            or state[name].shape != expected[name].shape
        ]
        if wrong:
            raise ValueError(
                f"{self.folder / AUTOENCODER} is not the autoencoder of FLUX.1's shape: {len(wrong)} tensors "
                f"differ, {', '.join(wrong[:4])} ..."
            )
        vae.load_state_dict(state, assign=True)


def flat_patch(weight: torch.Tensor) -> torch.Tensor:
    """Return a patch embedding as a linear weight; a convolution's ``[d, C, p, p]`` is permuted."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight
