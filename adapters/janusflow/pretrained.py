"""Load a published JanusFlow checkpoint, and write what was trained in the same layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common.files import DTYPES, copy_files, read_json, read_tensors
from lightning_unigrpo.adapters.common.hub import find_folder
from lightning_unigrpo.adapters.common.lora import merged
from lightning_unigrpo.adapters.common.pictures import PictureProcessor
from lightning_unigrpo.adapters.janusflow.adapter import VAE
from lightning_unigrpo.adapters.janusflow.checkpoint import CONFIG, VISION, WEIGHTS, Checkpoint
from lightning_unigrpo.adapters.janusflow.config import RELEASES, JanusFlowConfig
from lightning_unigrpo.adapters.janusflow.network import JanusFlowNet
from lightning_unigrpo.adapters.janusflow.tokenizer import JanusFlowTokenizer
from lightning_unigrpo.adapters.janusflow.vae import JanusFlowVAE
from lightning_unigrpo.adapters.janusflow.vision import JanusFlowVision
from lightning_unigrpo.distributed import rank, whole_state

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.janusflow.adapter import JanusFlowAdapter

Diffusers: Any = AutoencoderKL  # its methods have no types
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
SDXL_VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
"""Sizes of SDXL's autoencoder, for estimates without its files."""
UNTRAINED = (
    CONFIG,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that are copied as they were: upstream's older libraries could not read them written anew."""


def open_checkpoint(
    source: str | Path,
    *,
    vae: str | Path,
    dtype: str,
    vision: bool,
    revision: str | None,
    vae_revision: str | None,
) -> Source:
    """Read everything but the weights.

    Args:
        source: folder or hub id.
        vae: folder or hub id of the autoencoder.
        dtype: of the network's weights.
        vision: whether to build the tower, where the checkpoint has one.
        revision: of a hub id.
        vae_revision: of the autoencoder's.

    Returns:
        The parts of an adapter, its networks on the meta device.

    Raises:
        ValueError: for an unknown dtype or weights of another model.
        FileNotFoundError: when files are missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"adapter.dtype is {dtype!r}; known are {', '.join(DTYPES)}.")
    if SIZES_ONLY.get() and str(source) in RELEASES:
        config = RELEASES[str(source)]
        config = config if vision else replace(config, vision=None)
        return Source(config=config, vae=vae_on_meta(SDXL_VAE), **on_meta(config, DTYPES[dtype]))
    checkpoint = Checkpoint(find_folder(source, example=next(iter(RELEASES)), revision=revision))
    tokenizer = JanusFlowTokenizer.from_folder(checkpoint.folder, checkpoint.processor)
    config = checkpoint.config(tokenizer.marks)
    if not (vision and checkpoint.has_vision):
        config = replace(config, vision=None)
    largest, size = max(tokenizer.marks.values()), config.llama().vocab_size
    if largest >= size:
        raise ValueError(
            f"The tokenizer of {checkpoint.folder} gives a mark the id {largest}, but config.json has "
            f"vocab_size {size}: the files belong to different models."
        )
    parts = on_meta(config, DTYPES[dtype])
    checkpoint.check({name: part for name, part in parts.items() if part is not None})
    folder = find_folder(vae, example=VAE, revision=vae_revision, key="adapter.vae")
    pictures = None
    if config.vision is not None:
        pictures = PictureProcessor.from_upstream(
            checkpoint.pictures, config.vision.image_size, rounding="down"
        )
    return Source(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        vae=open_vae(folder, config.flow.latent_channels),
        vae_folder=folder,
        pictures=pictures,
        **parts,
    )


def on_meta(config: JanusFlowConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return ``net`` and ``vision`` without memory; the tower is float32, or None."""
    with torch.device("meta"):
        net = JanusFlowNet(config).to(dtype=dtype)
        d, tower = config.llama().hidden_size, config.vision
        vision = JanusFlowVision(tower, d) if tower is not None else None
    return {"net": net, "vision": vision}


def open_vae(folder: Path, channels: int) -> JanusFlowVAE:
    """Return an autoencoder on the meta device.

    Args:
        folder: in the layout of ``diffusers``.
        channels: C that the network draws.

    Raises:
        FileNotFoundError: when files are missing.
        ValueError: when it is another autoencoder.
    """
    missing = [name for name in (CONFIG, VAE_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"adapter.vae {folder} has no autoencoder as diffusers lays it out: {', '.join(missing)} missing."
        )
    found = read_json(folder / CONFIG)
    kind, own = found.get("_class_name"), found.get("latent_channels")
    if kind != "AutoencoderKL" or own != channels:
        raise ValueError(
            f"adapter.vae {folder} is {kind} of {own} channels; this model draws {channels} channels for an "
            f"AutoencoderKL: give {VAE}."
        )
    return vae_on_meta(found)


def vae_on_meta(config: dict[str, Any]) -> JanusFlowVAE:
    """Return an autoencoder without memory."""
    with torch.device("meta"):
        return JanusFlowVAE(Diffusers.from_config(config))


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checkpoint that was opened: what an adapter is built from, and where its weights are."""

    config: JanusFlowConfig
    net: JanusFlowNet
    vision: JanusFlowVision | None
    vae: JanusFlowVAE
    checkpoint: Checkpoint | None = None
    """``None`` while sizes are only estimated."""
    tokenizer: Any = None
    vae_folder: Path | None = None
    pictures: PictureProcessor | None = None

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the network that are on the meta device, tensor by tensor."""
        if self.checkpoint is not None and not SIZES_ONLY.get():
            self.checkpoint.fill(part, prefix=prefix, device=torch.get_default_device())

    def fill_frozen(self, adapter: JanusFlowAdapter) -> None:
        """Read tower and autoencoder, in float32."""
        if self.checkpoint is None or SIZES_ONLY.get():
            return
        device = torch.get_default_device()
        if adapter.vision is not None:
            self.checkpoint.fill(adapter.vision, device=device)
        if adapter.vae is not None and adapter.vae.vae.device.type == "meta":
            # diffusers' loader: older files name the attention's projections otherwise.
            found = Diffusers.from_pretrained(
                self.vae_folder, torch_dtype=torch.float32, local_files_only=True
            )
            adapter.vae.vae = found.to(device)
        for module in adapter.frozen_modules():
            module.eval().requires_grad_(False)


def save_pretrained(adapter: JanusFlowAdapter, folder: str | Path) -> None:
    """Write an adapter's weights in the published layout; every rank must call it, the first one writes.

    Args:
        adapter: loaded by ``from_pretrained``; the tower, which is never trained, is copied from where it
            came, as are tensors that are never run. The autoencoder is not part of the layout.
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
    left_out = {name: file for name, file in checkpoint.tensors.items() if name not in state}
    assert all(name.startswith(VISION) for name in left_out)
    state |= dict(read_tensors(left_out))
    copy_files(checkpoint.folder, target, UNTRAINED)
    # Under another name first: a full disk must not leave half a file where a whole one was.
    written = target / f"{WEIGHTS}.tmp"
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, written)
    os.replace(written, target / WEIGHTS)
