"""Load a published Show-o2 checkpoint, and write what was trained in the same layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common.files import DTYPES, copy_files, read_json
from lightning_unigrpo.adapters.common.hub import (
    FILES,
    LANGUAGE_CONFIG,
    TOKENIZER,
    find_folder,
    find_language,
)
from lightning_unigrpo.adapters.common.lora import merged
from lightning_unigrpo.adapters.showo2.adapter import VAE
from lightning_unigrpo.adapters.showo2.checkpoint import (
    CONFIG,
    EMBEDDING,
    HEAD,
    PICKLED,
    Checkpoint,
)
from lightning_unigrpo.adapters.showo2.config import RELEASES, ShowO2Config
from lightning_unigrpo.adapters.showo2.network import ShowO2Net
from lightning_unigrpo.adapters.showo2.tokenizer import ShowO2Tokenizer
from lightning_unigrpo.adapters.showo2.vae import ShowO2VAE
from lightning_unigrpo.distributed import rank, whole_state

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.showo2.adapter import ShowO2Adapter

Diffusers: Any = AutoencoderKLWan  # its methods have no types
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


def open_checkpoint(
    source: str | Path,
    *,
    language: str | Path | None,
    vae: str | Path,
    dtype: str,
    revision: str | None,
    language_revision: str | None,
    vae_revision: str | None,
) -> Source:
    """Read everything but the weights.

    Args:
        source: folder or hub id.
        language: folder or hub id of the Qwen2.5; ``None`` = where the checkpoint says.
        vae: folder or hub id of the autoencoder.
        dtype: of the network's weights.
        revision: of a hub id.
        language_revision: of the language model's.
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
        return Source(config=config, vae=vae_on_meta({}), net=on_meta(config, DTYPES[dtype]))
    weights = (*FILES, "pytorch_model*.bin")
    folder = find_folder(source, example=next(iter(RELEASES)), revision=revision, files=weights)
    checkpoint = Checkpoint(folder)
    words, sizes = find_language(
        folder, checkpoint.json, language, revision=language_revision, example=QWEN
    )
    tokenizer = ShowO2Tokenizer.from_folder(words)
    config = ShowO2Config.from_upstream(checkpoint.json, read_json(sizes), tokenizer.marks)
    largest, size = max(tokenizer.marks.values()), config.qwen().vocab_size
    if largest >= size:
        raise ValueError(
            f"The tokenizer of {words} gives a mark the id {largest}, but {folder / CONFIG} has "
            f"llm_vocab_size {size}: the files belong to different models."
        )
    net = on_meta(config, DTYPES[dtype])
    checkpoint.check(net)
    pipeline = ("vae/*.json", f"vae/{VAE_WEIGHTS}", CONFIG, VAE_WEIGHTS)
    found = find_folder(vae, example=VAE, revision=vae_revision, key="adapter.vae", files=pipeline)
    found = found / "vae" if (found / "vae").is_dir() else found
    return Source(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        net=net,
        vae=open_vae(found, config.latent_channels),
        vae_folder=found,
        language=(words, sizes),
    )


def on_meta(config: ShowO2Config, dtype: torch.dtype) -> ShowO2Net:
    """Return the network without memory."""
    with torch.device("meta"):
        return ShowO2Net(config).to(dtype=dtype)


def open_vae(folder: Path, channels: int) -> ShowO2VAE:
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
    kind, own = found.get("_class_name"), found.get("z_dim")
    if kind != "AutoencoderKLWan" or own != channels:
        raise ValueError(
            f"adapter.vae {folder} is {kind} of {own} channels; this model draws {channels} channels for an "
            f"AutoencoderKLWan: give {VAE}."
        )
    return vae_on_meta(found)


def vae_on_meta(config: dict[str, Any]) -> ShowO2VAE:
    """Return an autoencoder without memory; Wan 2.1's without a configuration."""
    with torch.device("meta"):
        return ShowO2VAE(Diffusers.from_config(config))


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checkpoint that was opened: what an adapter is built from, and where its weights are."""

    config: ShowO2Config
    net: ShowO2Net
    vae: ShowO2VAE
    checkpoint: Checkpoint | None = None
    """``None`` while sizes are only estimated."""
    tokenizer: Any = None
    vae_folder: Path | None = None
    language: tuple[Path, Path] | None = None
    """Folder of the tokenizer, file of the language model's sizes."""

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the network that are on the meta device, tensor by tensor."""
        if self.checkpoint is not None and not SIZES_ONLY.get():
            self.checkpoint.fill(part, prefix=prefix, device=torch.get_default_device())

    def fill_frozen(self, adapter: ShowO2Adapter) -> None:
        """Read the autoencoder, in float32."""
        if self.checkpoint is None or SIZES_ONLY.get() or adapter.vae is None:
            return
        if adapter.vae.vae.device.type == "meta":
            found = Diffusers.from_pretrained(
                self.vae_folder, torch_dtype=torch.float32, local_files_only=True
            )
            adapter.vae.vae = found.to(torch.get_default_device())
        adapter.vae.eval().requires_grad_(False)


def save_pretrained(adapter: ShowO2Adapter, folder: str | Path) -> None:
    """Write an adapter's weights in the published layout; every rank must call it, the first one writes.

    Args:
        adapter: loaded by ``from_pretrained``. The tokenizer's files and the language model's sizes are
            written beside the weights, so that the folder needs no other; the autoencoder is not part of
            the layout.
        folder: made if it does not exist.

    Raises:
        ValueError: when the adapter did not come from a checkpoint: nothing to copy the other files from.
    """
    source = adapter.source
    if not isinstance(source, Source) or source.checkpoint is None or source.language is None:
        raise ValueError(
            "save_pretrained writes what from_pretrained read; this adapter was built otherwise."
        )
    target, state = Path(folder), whole_state(adapter.net)
    if rank() > 0:
        return
    target.mkdir(parents=True, exist_ok=True)
    if adapter.lora is not None:
        state = merged(state, adapter.lora)
    # torch.save writes one weight once, and upstream reads two names for it.
    state.setdefault(HEAD, state[EMBEDDING])
    words, sizes = source.language
    copy_files(source.checkpoint.folder, target, (CONFIG,))
    copy_files(words, target, TOKENIZER)
    if sizes.resolve() != (target / LANGUAGE_CONFIG).resolve():
        (target / LANGUAGE_CONFIG).write_bytes(sizes.read_bytes())
    # Under another name first: a full disk must not leave half a file where a whole one was.
    written = target / f"{PICKLED}.tmp"
    torch.save({name: value.detach().cpu().contiguous() for name, value in state.items()}, written)
    os.replace(written, target / PICKLED)
