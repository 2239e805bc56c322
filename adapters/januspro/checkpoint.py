"""Janus-Pro's published files, in two layouts: checked before anything heavy, read a tensor at a time.

The layout of ``transformers`` (``deepseek-community/Janus-Pro-*``): ``config.json``, ``model.safetensors``
(one file, or shards with an index), ``tokenizer.json``, ``preprocessor_config.json``. The original layout
(``deepseek-ai/Janus-Pro-*``) has other names, fused projections in the tower, ``pytorch_model.bin``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import JanusConfig

from lightning_unigrpo.adapters.common.files import (
    TensorFile,
    find_shards,
    read_header,
    read_json,
    read_tensors,
    require_same,
    set_parameter,
)
from lightning_unigrpo.adapters.common.lora import base_name, first_value
from lightning_unigrpo.adapters.januspro.config import Marks

WEIGHTS, PICKLED, CONFIG = "model.safetensors", "pytorch_model.bin", "config.json"
PICTURES = "preprocessor_config.json"
VISION = ("model.vision_model.", "model.aligner.")
ORIGINAL = "gen_vision_model."
"""Begins names of the original layout only."""
RENAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^gen_embed\.", "model.generation_embeddings."),
    (r"^gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
    (r"^gen_head\.", "model.generation_head."),
    (r"^gen_aligner\.layers\.", "model.generation_aligner.layers."),
    (r"^aligner\.layers\.", "model.aligner.layers."),
    (r"aligner\.layers\.0\.", "aligner.fc1."),
    (r"aligner\.layers\.2\.", "aligner.hidden_layers.0."),
    (r"^vision_model\.vision_tower\.pos_embed$", "pos_embed.weight"),
    (r"^vision_model\.vision_tower\.patch_embed\.proj\.", "patch_embed."),
    (r"^vision_model\.vision_tower\.norm\.", "model.vision_model.post_layernorm."),
    (r"^vision_model\.vision_tower\.blocks\.", "model.vision_model.encoder.layers."),
    (r"^pos_embed\.", "model.vision_model.embeddings.position_embedding."),
    (r"^patch_embed\.", "model.vision_model.embeddings.patch_embedding."),
    (r"(encoder\.layers\.\d+\.)norm([12])\.", r"\1layer_norm\2."),
    (r"(encoder\.layers\.\d+\.)attn\.proj\.", r"\1self_attn.projection_layer."),
    (r"(encoder\.layers\.\d+\.)attn\.", r"\1self_attn."),
    (r"^gen_vision_model\.", "model.vqmodel."),
    (r"(vqmodel\.encoder\.)conv_blocks\.", r"\1down."),
    (r"(vqmodel\.decoder\.)conv_blocks\.", r"\1up."),
    (r"(vqmodel\.\w+\.(?:up|down)\.\d+\.)res\.", r"\1block."),
    (r"(vqmodel\.\w+\.mid\.)0\.", r"\1block_1."),
    (r"(vqmodel\.\w+\.mid\.)1\.", r"\1attn_1."),
    (r"(vqmodel\.\w+\.mid\.)2\.", r"\1block_2."),
)
"""Patterns and replacements, one after the other, from the original names to those of ``transformers``."""
UNUSED = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")
"""Original tensors that no forward uses."""


class Piece(NamedTuple):
    """Where a tensor is, as the model knows it."""

    file: TensorFile
    shape: tuple[int, ...]
    part: int | None = None
    """Which third of the file's rows; ``None`` = all."""


def renamed(files: Mapping[str, TensorFile]) -> dict[str, Piece]:
    """Return the tensors of the original layout under the names of ``transformers``.

    Queries, keys and values of the tower's blocks are thirds of one tensor; positions lose an axis of 1.

    Args:
        files: original name to file.
    """
    found: dict[str, Piece] = {}
    for name, file in files.items():
        if name.startswith(UNUSED):
            continue
        new = name
        for pattern, replacement in RENAMES:
            new = re.sub(pattern, replacement, new)
        shape = file.shape
        if ".self_attn.qkv." in new:
            for part, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                third = (shape[0] // 3, *shape[1:])
                found[new.replace(".qkv.", f".{projection}.")] = Piece(file, third, part)
        else:
            found[new] = Piece(file, shape[1:] if name.endswith("tower.pos_embed") else shape)
    return found


def read_pickled_header(path: Path) -> dict[str, TensorFile]:
    """Return names and shapes of a ``.bin`` file without reading tensors.

    Raises:
        ValueError: when the file is truncated or none of tensors.
    """
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what it meets
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); it is truncated or no file of tensors: "
            "download it again."
        ) from error
    return {name: TensorFile(path, name, tuple(value.shape)) for name, value in state.items()}


class Checkpoint:
    """The tensors of a folder in either layout.

    Args:
        folder: where the files are.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is truncated, or ``config.json`` is another model's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shards = find_shards(folder, WEIGHTS)
        pickled = find_shards(folder, PICKLED) if not shards else []
        missing = [CONFIG] if not (folder / CONFIG).is_file() else []
        missing += [f"{WEIGHTS} (or {PICKLED})"] if not shards + pickled else []
        if missing:
            here = sorted(path.name for path in folder.iterdir())[:12]
            raise FileNotFoundError(
                f"adapter.source {folder} is not a Janus-Pro checkpoint: {', '.join(missing)} missing; it "
                f"holds {', '.join(here) or 'nothing'}. {PICKLED} is not downloaded by itself: run "
                "`hf download` with the hub id, or take deepseek-community/Janus-Pro-1B or -7B."
            )
        self.json = read_json(folder / CONFIG)
        kind = self.json.get("model_type")
        if kind not in ("janus", "multi_modality"):
            raise ValueError(
                f"adapter.source {folder}: config.json has model_type {kind!r}; Janus-Pro's is 'janus', or "
                "'multi_modality' in the original layout."
            )
        self.pictures = read_json(folder / PICTURES) if (folder / PICTURES).is_file() else {}
        files = {k: v for path in shards for k, v in read_header(path).items()}
        files |= {k: v for path in pickled for k, v in read_pickled_header(path).items()}
        self.is_original = any(name.startswith(ORIGINAL) for name in files)
        self.tensors = (
            renamed(files)
            if self.is_original
            else {name: Piece(file, file.shape) for name, file in files.items()}
        )

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower is there."""
        return any(name.startswith(VISION) for name in self.tensors)

    def config(self, marks: Marks, image_token: int) -> JanusConfig:
        """Return the sizes; of the original layout, where code keeps most of them, from the tensors.

        Args:
            marks: ids of the special tokens.
            image_token: id of the placeholder of a picture.
        """
        if not self.is_original:
            return JanusConfig.from_dict(self.json)
        return original_config(self.json, self.tensors, marks, image_token)

    def check(self, modules: Iterable[nn.Module]) -> None:
        """Compare names and shapes with what modules expect, before a byte of weights is read.

        Args:
            modules: together they hold every tensor of the file that is ever run.

        Raises:
            ValueError: naming what differs.
        """
        expected = {
            name: tuple(value.shape)
            for module in modules
            for name, value in module.state_dict().items()
        }
        seen = any(name.startswith(VISION) for name in expected)
        found = {
            name: piece.shape
            for name, piece in self.tensors.items()
            if seen or not name.startswith(VISION)
        }
        require_same(self.folder, found, expected, hint="Sizes come from config.json.")

    def read(self, wanted: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors one at a time, each a view of its mapped file.

        Args:
            wanted: what to call a tensor, to its name in the model.
        """
        opened: dict[Path, dict[str, Tensor]] = {}
        for name, known in wanted.items():
            piece = self.tensors[known]
            path = piece.file.path
            if path.suffix == ".bin":
                if path not in opened:
                    opened[path] = torch.load(
                        path, map_location="cpu", weights_only=True, mmap=True
                    )
                tensor = opened[path][piece.file.name]
            else:
                ((_, tensor),) = read_tensors({name: piece.file})
            if piece.part is not None:
                tensor = tensor.chunk(3)[piece.part]
            yield name, tensor.reshape(piece.shape)

    def fill(self, part: nn.Module, *, prefix: str = "", device: torch.device) -> None:
        """Replace what is on the meta device, one tensor in memory at a time; each keeps its dtype.

        Args:
            part: of a module with names as in ``transformers``.
            prefix: of its names there.
            device: of the tensors afterwards.
        """
        lacking = {name: p for name, p in part.named_parameters() if p.is_meta}
        wanted = {
            name: known
            for name in lacking
            if (known := base_name(prefix + name)) in self.tensors and "lora_" not in name
        }
        for name, tensor in self.read(wanted):
            set_parameter(part, name, tensor, device)
        for name in lacking.keys() - wanted.keys():
            set_parameter(part, name, first_value(prefix + name, lacking[name]), device)


def original_config(
    found: Mapping[str, Any], tensors: Mapping[str, Piece], marks: Marks, image_token: int
) -> JanusConfig:
    """Return the configuration of a checkpoint in the original layout.

    Args:
        found: its ``config.json``.
        tensors: under the names of ``transformers``.
        marks: ids of the special tokens.
        image_token: id of the placeholder of a picture.
    """
    shape = {name: piece.shape for name, piece in tensors.items()}
    vq, vision = "model.vqmodel.", "model.vision_model."
    base = shape[f"{vq}encoder.conv_in.weight"][0]
    levels = _count(shape, rf"{vq}encoder\.down\.(\d+)\.")
    width, _, patch, _ = shape[f"{vision}embeddings.patch_embedding.weight"]
    side, given = _image_size(found)
    hidden = shape["lm_head.weight"][1]
    return JanusConfig(
        text_config={
            "bos_token_id": marks.bos,
            "eos_token_id": marks.eos,
            "pad_token_id": marks.pad,
            **found["language_config"],
            "model_type": "llama",
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": _count(shape, rf"{vision}encoder\.layers\.(\d+)\."),
            # Heads of 64 throughout upstream's table of towers, unless the file says otherwise.
            "num_attention_heads": given.get("heads") or width // 64,
            "image_size": side,
            "patch_size": patch,
            "mlp_ratio": shape[f"{vision}encoder.layers.0.mlp.fc1.weight"][0] / width,
            "projection_dim": hidden,
            "num_image_tokens": (side // patch) ** 2,
        },
        vq_config={
            "embed_dim": shape[f"{vq}quantize.embedding.weight"][1],
            "num_embeddings": shape[f"{vq}quantize.embedding.weight"][0],
            "latent_channels": shape[f"{vq}post_quant_conv.weight"][0],
            "base_channels": base,
            "channel_multiplier": [
                shape[f"{vq}encoder.down.{level}.block.0.conv2.weight"][0] // base
                for level in range(levels)
            ],
            "num_res_blocks": _count(shape, rf"{vq}encoder\.down\.0\.block\.(\d+)\."),
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
        },
        image_token_id=image_token,
        tie_word_embeddings=False,
    )


def _image_size(found: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Return the tower's pixels per side, and all that the file says of it."""
    params = (found.get("vision_config") or {}).get("params") or {}
    return int(params.get("image_size", 384)), params


def _count(names: Iterable[str], pattern: str) -> int:
    """Return how many numbers stand where a pattern has its group."""
    matches = (re.match(pattern, name) for name in names)
    return len({match[1] for match in matches if match})
