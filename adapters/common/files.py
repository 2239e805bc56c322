"""Safetensors and JSON files: looked at before anything heavy, read a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor is, and its shape, from the header alone."""

    path: Path
    name: str
    shape: tuple[int, ...]


def set_parameter(module: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Replace a parameter, keeping its dtype and whether it is trained."""
    path, _, leaf = name.rpartition(".")
    old = module.get_parameter(name)
    # A copy even where nothing changes: the original is a page of the file.
    value = value.to(device=device, dtype=old.dtype, copy=True).contiguous()
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: when it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return found


def read_header(path: Path) -> dict[str, TensorFile]:
    """Return names and shapes without reading tensors.

    Raises:
        ValueError: when the file is truncated or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {
                name: TensorFile(path, name, tuple(file.get_slice(name).get_shape()))
                for name in names
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is truncated or not a safetensors file: download it again."
        ) from error


def read_tensors(files: Mapping[str, TensorFile]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the names of the mapping; pages stay in memory until the next one only.

    Each is a view of the mapped file: a file that stayed open would come to hold all of it.
    """
    for name, tensor in files.items():
        with safe_open(tensor.path, "pt") as file:
            yield name, file.get_tensor(tensor.name)


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy files that training does not change."""
    for name in names:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            shutil.copyfile(source / name, target / name)
