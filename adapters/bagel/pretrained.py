"""Load a published Bagel checkpoint, and write what was trained in the same layout."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.bagel.checkpoint import (
    AUTOENCODER,
    LLM,
    VISION,
    VIT,
    WEIGHTS,
    Checkpoint,
)
from lightning_unigrpo.adapters.bagel.config import RELEASES, BagelConfig
from lightning_unigrpo.adapters.bagel.network import BagelNet
from lightning_unigrpo.adapters.bagel.tokenizer import BagelTokenizer
from lightning_unigrpo.adapters.bagel.vae import BagelVAE, build_vae, vae_names
from lightning_unigrpo.adapters.bagel.vision import BagelVision
from lightning_unigrpo.adapters.common.files import DTYPES, copy_files, read_tensors
from lightning_unigrpo.adapters.common.hub import find_folder
from lightning_unigrpo.adapters.common.lora import merged
from lightning_unigrpo.distributed import rank, whole_state

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.bagel.adapter import BagelAdapter


def open_checkpoint(
    source: str | Path,
    *,
    dtype: str,
    vision: bool,
    revision: str | None,
    overrides: Mapping[str, Any],
) -> Source:
    """Read everything but the weights.

    Args:
        source: folder or hub id.
        dtype: of the network's weights.
        vision: whether to build the tower, where the checkpoint has one.
        revision: of a hub id.
        overrides: fields of the configuration.

    Returns:
        The parts of an adapter, its networks on the meta device.

    Raises:
        ValueError: for an unknown dtype or weights of another model.
        FileNotFoundError: when files are missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"adapter.dtype is {dtype!r}; known are {', '.join(DTYPES)}.")
    if SIZES_ONLY.get() and str(source) in RELEASES:
        return released(str(source), DTYPES[dtype], vision=vision)
    checkpoint = Checkpoint(find_folder(source, example=next(iter(RELEASES)), revision=revision))
    tokenizer = BagelTokenizer.from_folder(checkpoint.folder)
    vision = vision and checkpoint.has_vision
    config = checkpoint.config(tokenizer.marks, vision=vision, **overrides)
    largest = max(tokenizer.marks.values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer of {checkpoint.folder} gives a mark the id {largest}, but llm_config.json has "
            f"vocab_size {config.vocab_size}: the files belong to different models."
        )
    net, tower = on_meta(config, DTYPES[dtype])
    with torch.device("meta"):
        vae = build_vae({name: file.shape for name, file in checkpoint.autoencoder.items()})
    checkpoint.check({"net": net} | ({"vision": tower} if tower is not None else {}))
    return Source(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        net=net,
        vision=tower,
        vae=BagelVAE(vae, config.latent_patch_size),
    )


def on_meta(config: BagelConfig, dtype: torch.dtype) -> tuple[BagelNet, BagelVision | None]:
    """Return network and tower without memory; the tower is float32."""
    with torch.device("meta"):
        net = BagelNet(config).to(device="meta", dtype=dtype)
        tower = BagelVision(config.vision, config.hidden_size) if config.vision else None
    return net, tower.to("meta") if tower is not None else None


UNTRAINED = (
    AUTOENCODER,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""Files that are copied as they were: upstream's older libraries could not read them written anew."""


def released(name: str, dtype: torch.dtype, *, vision: bool) -> Source:
    """Return the parts of a published model without any of its files."""
    config = RELEASES[name] if vision else replace(RELEASES[name], vision=None)
    channels = (128, 256, 512, 512)
    net, tower = on_meta(config, dtype)
    with torch.device("meta"):
        vae = build_vae(
            {
                "encoder.conv_in.weight": (channels[0], 3, 3, 3),
                "decoder.conv_in.weight": (channels[-1], config.z_channels, 3, 3),
                "decoder.conv_out.weight": (3, channels[0], 3, 3),
                **{
                    f"encoder.down.{i}.block.{k}.conv2.weight": (c, c, 3, 3)
                    for i, c in enumerate(channels)
                    for k in range(2)
                },
            }
        )
    return Source(
        checkpoint=None,
        config=config,
        tokenizer=None,
        net=net,
        vision=tower,
        vae=BagelVAE(vae, config.latent_patch_size),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checkpoint that was opened: what an adapter is built from, and where its weights are."""

    checkpoint: Checkpoint | None
    """``None`` while sizes are only estimated."""
    config: BagelConfig
    tokenizer: Any
    net: BagelNet
    vision: BagelVision | None
    vae: BagelVAE

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the network that are on the meta device, tensor by tensor."""
        if self.checkpoint is not None and not SIZES_ONLY.get():
            self.checkpoint.fill(part, prefix=prefix, device=torch.get_default_device())

    def fill_frozen(self, adapter: BagelAdapter) -> None:
        """Read tower and autoencoder, in float32."""
        if self.checkpoint is None or SIZES_ONLY.get():
            return
        device = torch.get_default_device()
        if adapter.vision is not None:
            self.checkpoint.fill(adapter.vision, device=device)
        vae = adapter.vae.vae if adapter.vae is not None else None
        if vae is not None and vae.device.type == "meta":
            self.checkpoint.fill_autoencoder(vae, vae_names(self.checkpoint.autoencoder))
            vae.to(device)
        for module in adapter.frozen_modules():
            module.eval().requires_grad_(False)


def save_pretrained(adapter: BagelAdapter, folder: str | Path) -> None:
    """Write an adapter's weights in the published layout; every rank must call it, the first one writes.

    Args:
        adapter: loaded by ``from_pretrained``; parts that were left out are copied from where it came.
        folder: made if it does not exist.

    Raises:
        ValueError: when the adapter did not come from a checkpoint: nothing to copy the autoencoder from.
    """
    if adapter.source is None or adapter.source.checkpoint is None:
        raise ValueError(
            "save_pretrained writes what from_pretrained read; this adapter was built otherwise."
        )
    checkpoint, target = adapter.source.checkpoint, Path(folder)
    state = whole_state(adapter.net)
    if rank() > 0:
        return
    target.mkdir(parents=True, exist_ok=True)
    if adapter.lora is not None:
        state = merged(state, adapter.lora)
    if adapter.vision is not None:
        state |= adapter.vision.state_dict()
    left_out = {name: file for name, file in checkpoint.tensors.items() if name not in state}
    assert all(name.startswith(VISION) for name in left_out)
    state |= dict(read_tensors(left_out))
    for name, config in (
        (LLM, checkpoint.llm_config | adapter.config.to_upstream()),
        *([(VIT, checkpoint.vit_config)] if checkpoint.vit_config is not None else []),
    ):
        (target / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_files(checkpoint.folder, target, UNTRAINED)
    # Under another name first: a full disk must not leave half a file where a whole one was.
    written = target / f"{WEIGHTS}.tmp"
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, written)
    os.replace(written, target / WEIGHTS)
