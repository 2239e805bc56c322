"""Make one file of a checkpoint that holds a part from each rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_unigrpo.checkpoint.files import META, part_of, publish, remove


def consolidate(folder: Path, file: Path | None = None) -> Path:
    """Write what every strategy reads, a single process too: weights, optimizer, everything else.

    As ``python -m lightning.pytorch.utilities.consolidate_checkpoint``, which knows the folders of FSDP
    only. The whole of it must fit into memory.

    Args:
        folder: of FSDP or FSDP2.
        file: to write; ``None`` = the folder's name with ``.consolidated``.

    Returns:
        The file.

    Raises:
        ValueError: when the folder is no checkpoint.
        FileExistsError: when the file is there already.
    """
    if not (folder / META).is_file():
        raise ValueError(
            f"{folder} is no folder with a checkpoint: it has no {META}. Give the folder that "
            "IterationCheckpoint wrote under a sharded strategy."
        )
    file = file or folder.with_name(f"{folder.name}.consolidated")
    if file.exists():
        raise FileExistsError(f"{file} is there already; remove it, or give --output.")
    weights = file.with_name(f"{file.name}.weights")
    try:
        dcp_to_torch_save(folder, weights)
        parts = torch.load(weights, map_location="cpu", mmap=True, weights_only=True)
        optimizers = sorted(key for key in parts if key.startswith("optimizer_"))
        whole = {
            **torch.load(folder / META, map_location="cpu", weights_only=True),
            "state_dict": parts["model" if "model" in parts else "state_dict"],
            "optimizer_states": [parts[key] for key in optimizers],
        }
        torch.save(whole, part_of(file))
        publish(file, {})
    finally:
        remove(weights)
    return file
