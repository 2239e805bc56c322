"""Load a published Janus-Pro checkpoint, and write what was trained in the layout of ``transformers``."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import JanusConfig

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common.files import DTYPES, copy_files
from lightning_unigrpo.adapters.common.hub import find_folder
from lightning_unigrpo.adapters.common.lora import merged
from lightning_unigrpo.adapters.common.pictures import PictureProcessor
from lightning_unigrpo.adapters.januspro.checkpoint import (
    CONFIG,
    PICTURES,
    VISION,
    WEIGHTS,
    Checkpoint,
)
from lightning_unigrpo.adapters.januspro.config import RELEASED_MARKS, RELEASES, Marks, released
from lightning_unigrpo.adapters.januspro.network import JanusProNet, JanusVision, JanusVQ
from lightning_unigrpo.adapters.januspro.tokenizer import JanusProTokenizer
from lightning_unigrpo.distributed import rank, whole_state

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.januspro.adapter import JanusProAdapter

GENERATION = "generation_config.json"
WORDS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files that are copied as they were."""
PROCESSORS = (GENERATION, PICTURES, "processor_config.json")
"""Likewise, from the layout of ``transformers``: in the original one they are of other classes."""


def open_checkpoint(
    source: str | Path, *, dtype: str, vision: bool, revision: str | None
) -> Source:
    """Read everything but the weights.

    Args:
        source: folder or hub id.
        dtype: of the network's weights.
        vision: whether to build the tower, where the checkpoint has one.
        revision: of a hub id.

    Returns:
        The parts of an adapter, its networks on the meta device.

    Raises:
        ValueError: for an unknown dtype or weights of another model.
        FileNotFoundError: when files are missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"adapter.dtype is {dtype!r}; known are {', '.join(DTYPES)}.")
    if SIZES_ONLY.get() and str(source) in RELEASES:
        config = released(*RELEASES[str(source)])
        parts = on_meta(config, DTYPES[dtype], vision=vision)
        return Source(config=config, marks=RELEASED_MARKS, **parts)
    checkpoint = Checkpoint(find_folder(source, example=next(iter(RELEASES)), revision=revision))
    tokenizer = JanusProTokenizer.from_folder(checkpoint.folder)
    config = checkpoint.config(tokenizer.marks, tokenizer.image_token)
    largest, size = max(asdict(tokenizer.marks).values()), cast(Any, config).text_config.vocab_size
    if largest >= size:
        raise ValueError(
            f"The tokenizer of {checkpoint.folder} gives a mark the id {largest}, but config.json has "
            f"vocab_size {size}: the files belong to different models."
        )
    parts = on_meta(config, DTYPES[dtype], vision=vision and checkpoint.has_vision)
    checkpoint.check([part for part in parts.values() if part is not None])
    side = cast(Any, config).vision_config.image_size
    return Source(
        config=config,
        marks=tokenizer.marks,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        pictures=PictureProcessor.from_upstream(checkpoint.pictures, side),
        **parts,
    )


def on_meta(config: JanusConfig, dtype: torch.dtype, *, vision: bool) -> dict[str, Any]:
    """Return the network, tower and VQ model without memory; the last two are float32."""
    with torch.device("meta"):
        net = JanusProNet(config).to(device="meta", dtype=dtype)
        tower = JanusVision(config).to("meta", torch.float32) if vision else None
        vq = JanusVQ(config).to("meta", torch.float32)
    if tower is not None:  # a buffer in no file
        embeddings = cast(Any, tower.model).vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
    return {"net": net, "vision": tower, "vq": vq}


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checkpoint that was opened: what an adapter is built from, and where its weights are."""

    config: JanusConfig
    marks: Marks
    net: JanusProNet
    vision: JanusVision | None
    vq: JanusVQ
    checkpoint: Checkpoint | None = None
    """``None`` while sizes are only estimated."""
    tokenizer: Any = None
    pictures: PictureProcessor | None = None

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the network that are on the meta device, tensor by tensor."""
        if self.checkpoint is not None and not SIZES_ONLY.get():
            self.checkpoint.fill(part, prefix=prefix, device=torch.get_default_device())

    def fill_frozen(self, adapter: JanusProAdapter) -> None:
        """Read tower and VQ model, in float32."""
        if self.checkpoint is None or SIZES_ONLY.get():
            return
        device = torch.get_default_device()
        for module in adapter.frozen_modules():
            self.checkpoint.fill(module, device=device)
            module.to(device).eval().requires_grad_(False)


def save_pretrained(adapter: JanusProAdapter, folder: str | Path) -> None:
    """Write weights for ``transformers``; every rank must call it, the first one writes.

    Args:
        adapter: loaded by ``from_pretrained``, from either layout; a tower that was left out is copied from
            where it came.
        folder: made if it does not exist.

    Raises:
        ValueError: when the adapter did not come from a checkpoint: nothing to copy the other files from.
    """
    source = adapter.source
    if not isinstance(source, Source) or source.checkpoint is None:
        raise ValueError(
            "save_pretrained writes what from_pretrained read; this adapter was built otherwise."
        )
    checkpoint, target = source.checkpoint, Path(folder)
    state = whole_state(adapter.net)
    if rank() > 0:
        return
    target.mkdir(parents=True, exist_ok=True)
    if adapter.lora is not None:
        state = merged(state, adapter.lora)
    for module in adapter.frozen_modules():
        state |= module.state_dict()
    left_out = [name for name in checkpoint.tensors if name not in state]
    assert all(name.startswith(VISION) for name in left_out)
    state |= dict(checkpoint.read({name: name for name in left_out}))
    _write_settings(source, target, state["lm_head.weight"].dtype)
    # Under another name first: a full disk must not leave half a file where a whole one was.
    written = target / f"{WEIGHTS}.tmp"
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, written, metadata={"format": "pt"})
    os.replace(written, target / WEIGHTS)


def _write_settings(source: Source, target: Path, dtype: torch.dtype) -> None:
    """Write everything but the weights; of an original checkpoint, as ``transformers`` has it."""
    checkpoint = source.checkpoint
    assert checkpoint is not None
    config: Any = deepcopy(source.config)
    config.architectures = ["JanusForConditionalGeneration"]
    # Two different tensors are in the file, whatever the published configuration says.
    config.tie_word_embeddings = False
    for part in (config, config.text_config, config.vision_config, config.vq_config):
        part.dtype = str(dtype).removeprefix("torch.")
    (target / CONFIG).write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    copy_files(checkpoint.folder, target, WORDS)
    if not checkpoint.is_original:
        copy_files(checkpoint.folder, target, PROCESSORS)
        return
    assert source.pictures is not None
    marks = source.marks
    generation = {
        "bos_token_id": marks.bos,
        "eos_token_id": marks.eos,
        "pad_token_id": marks.pad,
        "generation_kwargs": {"boi_token_id": marks.begin_image},
    }
    for name, content in ((PICTURES, source.pictures.to_upstream()), (GENERATION, generation)):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
