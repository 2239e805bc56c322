"""Load a published Show-o checkpoint, and write what was trained in the same layout."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common.files import (
    DTYPES,
    copy_files,
    fill_from,
    read_json,
    read_tensors,
)
from lightning_unigrpo.adapters.common.hub import (
    FILES,
    LANGUAGE_CONFIG,
    TOKENIZER,
    find_folder,
    find_language,
)
from lightning_unigrpo.adapters.common.lora import merged
from lightning_unigrpo.adapters.showo.checkpoint import CONFIG, WEIGHTS, Checkpoint, VQCheckpoint
from lightning_unigrpo.adapters.showo.config import PHI, RELEASES, VQ, ShowOConfig
from lightning_unigrpo.adapters.showo.network import ShowONet
from lightning_unigrpo.adapters.showo.tokenizer import ShowOTokenizer
from lightning_unigrpo.adapters.showo.vq import ShowOVQ
from lightning_unigrpo.distributed import rank, whole_state

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.showo.adapter import ShowOAdapter

DOWNLOADED = (*FILES, "pytorch_model*.bin")


def open_checkpoint(
    source: str | Path,
    *,
    language: str | Path | None,
    vq: str | Path,
    dtype: str,
    revision: str | None,
    language_revision: str | None,
    vq_revision: str | None,
) -> Source:
    """Read everything but the weights.

    Args:
        source: folder or hub id.
        language: folder or hub id of the phi-1.5; ``None`` = where the checkpoint says.
        vq: folder or hub id of the VQ model.
        dtype: of the network's weights.
        revision: of a hub id.
        language_revision: of the language model's.
        vq_revision: of the VQ model's.

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
        return Source(config=config, net=on_meta(config, DTYPES[dtype]), vq=vq_on_meta())
    folder = find_folder(source, example=next(iter(RELEASES)), revision=revision, files=DOWNLOADED)
    checkpoint = Checkpoint(folder)
    words, sizes = find_language(
        folder, checkpoint.json, language, revision=language_revision, example=PHI
    )
    tokenizer = ShowOTokenizer.from_folder(words)
    config = ShowOConfig.from_upstream(checkpoint.json, read_json(sizes), tokenizer.marks)
    require_words(config, tokenizer, words)
    net = on_meta(config, DTYPES[dtype])
    checkpoint.check(net)
    found = find_folder(vq, example=VQ, revision=vq_revision, key="adapter.vq", files=DOWNLOADED)
    codes = VQCheckpoint(found)
    return Source(
        config=config,
        net=net,
        vq=open_vq(codes, config),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        codes=codes,
        language=(words, sizes),
    )


def require_words(config: ShowOConfig, tokenizer: ShowOTokenizer, folder: Path) -> None:
    """Raise a ValueError when a tokenizer has more or fewer words than the checkpoint was trained with."""
    if tokenizer.num_words != config.llm_vocab_size:
        raise ValueError(
            f"The tokenizer of adapter.language {folder} has {tokenizer.num_words} words, but config.json "
            f"has llm_vocab_size {config.llm_vocab_size}: the files belong to different models; give {PHI!r}."
        )
    marks = len(tokenizer.tokenizer) - tokenizer.num_words
    if marks != config.num_new_special_tokens:
        raise ValueError(
            f"config.json has num_new_special_tokens {config.num_new_special_tokens}; only {marks} is "
            "supported."
        )


def on_meta(config: ShowOConfig, dtype: torch.dtype) -> ShowONet:
    """Return the network without memory."""
    with torch.device("meta"):
        return ShowONet(config).to(dtype=dtype)


def vq_on_meta(**sizes: Any) -> ShowOVQ:
    """Return a VQ model without memory; the release's without sizes."""
    with torch.device("meta"):
        return ShowOVQ(**sizes)


def open_vq(codes: VQCheckpoint, config: ShowOConfig) -> ShowOVQ:
    """Return a VQ model on the meta device.

    Raises:
        ValueError: when it is another model, or has other codes than the network draws.
    """
    vq = vq_on_meta(**codes.sizes)
    codes.check(vq)
    if vq.num_codes != config.codebook_size:
        raise ValueError(
            f"adapter.vq {codes.folder} has {vq.num_codes} codes, but config.json has codebook_size "
            f"{config.codebook_size}: give the model that the checkpoint was trained with, {VQ!r}."
        )
    return vq


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A checkpoint that was opened: what an adapter is built from, and where its weights are."""

    config: ShowOConfig
    net: ShowONet
    vq: ShowOVQ
    checkpoint: Checkpoint | None = None
    """``None`` while sizes are only estimated."""
    tokenizer: Any = None
    codes: VQCheckpoint | None = None
    """Where the VQ model's weights are."""
    language: tuple[Path, Path] | None = None
    """Folder of the tokenizer, file of the language model's sizes."""

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of the network that are on the meta device, tensor by tensor."""
        if self.checkpoint is not None and not SIZES_ONLY.get():
            device = torch.get_default_device()
            fill_from(part, self.checkpoint.tensors, prefix=prefix, device=device)

    def fill_frozen(self, adapter: ShowOAdapter) -> None:
        """Read the VQ model, in float32."""
        if self.codes is None or SIZES_ONLY.get() or adapter.vq is None:
            return
        fill_from(adapter.vq, self.codes.tensors, device=torch.get_default_device())
        adapter.vq.eval().requires_grad_(False)


def save_pretrained(adapter: ShowOAdapter, folder: str | Path) -> None:
    """Write an adapter's weights in the published layout; every rank must call it, the first one writes.

    Args:
        adapter: loaded by ``from_pretrained``. The tokenizer's files and the language model's sizes are
            written beside the weights, so that the folder needs no other; the VQ model is not part of the
            layout. A projector of CLIP features is copied from where it came.
        folder: made if it does not exist.

    Raises:
        ValueError: when the adapter did not come from a checkpoint: nothing to copy the other files from.
    """
    source = adapter.source
    if not isinstance(source, Source) or source.checkpoint is None or source.language is None:
        raise ValueError(
            "save_pretrained writes what from_pretrained read; this adapter was built otherwise."
        )
    checkpoint, target, state = source.checkpoint, Path(folder), whole_state(adapter.net)
    if rank() > 0:
        return
    target.mkdir(parents=True, exist_ok=True)
    if adapter.lora is not None:
        state = merged(state, adapter.lora)
    state |= dict(read_tensors({name: checkpoint.tensors[name] for name in checkpoint.left_out}))
    words, sizes = source.language
    copy_files(checkpoint.folder, target, (CONFIG,))
    copy_files(words, target, TOKENIZER)
    if sizes.resolve() != (target / LANGUAGE_CONFIG).resolve():
        (target / LANGUAGE_CONFIG).write_bytes(sizes.read_bytes())
    # Under another name first: a full disk must not leave half a file where a whole one was.
    written = target / f"{WEIGHTS}.tmp"
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, written, metadata={"format": "pt"})
    os.replace(written, target / WEIGHTS)
