"""Human Preference Score: a CLIP tuned to preferences, published with the names of open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor

from lightning_unigrpo.rewards.clip import CLIPScore
from lightning_unigrpo.rewards.towers import not_found

PARTS = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # sic
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
"""How names begin in open_clip, and in transformers."""
INSIDE = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
"""The same for names inside a layer."""
TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
"""Matrices that one multiplies from the left and the other from the right."""
FUSED = re.compile(r"\.attn\.in_proj_(weight|bias)$")
APART = re.compile(r"\.self_attn\.([qkv])_proj\.(weight|bias)$")
DERIVED = {
    "attn_mask",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
}
"""Constants that older files hold."""


class HPSv2(CLIPScore):
    """How much people prefer an image for its prompt.

    ``r = cos(text, image)``, about 0.2 to 0.35; comparable between images of one prompt only, which is
    what a group compares.

    Source: HPSv2.1, https://arxiv.org/abs/2306.09341. 986 million parameters, 3.9 GB.

    Args:
        checkpoint: the weights in open_clip's names: a file, a folder with ``file``, or a hub id.
        file: of the folder or repository.
        source: folder or hub id of a CLIP of the same sizes, for its ``config.json``; its weights are not
            read.
        scale: of the cosine; ``None`` as in :class:`CLIPScore`.
        **towers: see :class:`Towers`.
    """

    def __init__(
        self,
        checkpoint: str = "xswu/HPSv2",
        *,
        file: str = "HPS_v2.1_compressed.pt",
        source: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scale: float | None = 1.0,
        **towers: Any,
    ) -> None:
        super().__init__(source, scale=scale, **towers)
        self.checkpoint, self.file = checkpoint, file

    def _load(self) -> Any:
        from transformers import CLIPModel

        config, path = self._read_config(), self._find()
        try:
            read = torch.load(path, map_location="cpu", weights_only=True)
            state = from_open_clip(read.get("state_dict", read))
        except (UnpicklingError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self._key('checkpoint')}: {path} is no file of open_clip weights ({error})."
            ) from error
        try:
            read = cast(Any, CLIPModel).from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        except RuntimeError as error:
            raise ValueError(
                f"{self._key('checkpoint')}: {path} has other sizes than the config.json of "
                f"{self._key('source')}, {self.source!r}."
            ) from error
        model, report = read
        self._require_whole("checkpoint", str(path), report)
        return model

    def _find(self) -> Path:
        """Return the file with the weights, downloaded if ``checkpoint`` is a hub id."""
        from huggingface_hub import hf_hub_download

        path = Path(self.checkpoint).expanduser()
        if path.is_file():
            return path
        if (path / self.file).is_file():
            return path / self.file
        try:
            return Path(hf_hub_download(self.checkpoint, self.file))
        except Exception as error:  # httpx's are no OSErrors
            raise not_found(self._key("checkpoint"), self.checkpoint, error) from error


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an open_clip CLIP as transformers' ``CLIPModel`` has them.

    Raises:
        ValueError: naming what is no part of a CLIP.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in DERIVED:
            continue
        renamed = _rename(name, [*PARTS], [*INSIDE])
        if fused := FUSED.search(renamed):
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[FUSED.sub(f".self_attn.{letter}_proj.{fused[1]}", renamed)] = part
        else:
            found[renamed] = value.T if name in TRANSPOSED else value
    return found


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of transformers' ``CLIPModel`` as open_clip has them: the way back.

    Raises:
        ValueError: naming what is no part of a CLIP.
    """
    backwards = [(theirs, ours) for ours, theirs in PARTS], [(b, a) for a, b in INSIDE]
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in DERIVED:
            continue
        apart = APART.search(name)
        if apart and apart[1] != "q":
            continue
        renamed = _rename(name, *backwards)
        if apart:
            keys = [APART.sub(f".self_attn.{letter}_proj.{apart[2]}", name) for letter in "qkv"]
            fused = APART.sub(f".attn.in_proj_{apart[2]}", renamed)
            found[fused] = torch.cat([state[key] for key in keys])
        else:
            found[renamed] = value.T if name in TRANSPOSED.values() else value
    return found


def _rename(name: str, parts: list[tuple[str, str]], inside: list[tuple[str, str]]) -> str:
    for old, new in parts:
        # Some names are beginnings of others: visual.proj is a whole name.
        if name == old or (old.endswith(".") and name.startswith(old)):
            renamed = new + name[len(old) :]
            break
    else:
        raise ValueError(
            f"model.rewards: HPSv2.checkpoint holds {name!r}, which is no part of a CLIP."
        )
    for old, new in inside:
        renamed = renamed.replace(old, new)
    return renamed
