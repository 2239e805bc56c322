"""Files of tensors and JSON: looked at before anything heavy, read a tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_unigrpo.adapters.common.lora import base_name, first_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLE = ".bin"
"""Ends the name of what ``torch.save`` wrote."""


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor is, and its shape, from the header alone."""

    path: Path
    name: str
    shape: tuple[int, ...]


def find_shards(folder: Path, weights: str, *, key: str = "adapter.source") -> list[Path]:
    """Return the file of some weights, or the shards that its index names; nothing where neither is there.

    Args:
        folder: where to look.
        weights: name of the single file; the index is called ``weights + ".index.json"``.
        key: the setting that names the folder, for the message.

    Raises:
        FileNotFoundError: when the index names files that are missing.
    """
    whole, index = folder / weights, folder / f"{weights}.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    names = sorted(set(read_json(index)["weight_map"].values()))
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        raise FileNotFoundError(f"{key} {folder}: {index.name} names {', '.join(lost)}, missing.")
    return [folder / name for name in names]


def find_tensors(
    folder: Path, weights: Sequence[str], *, key: str = "adapter.source"
) -> dict[str, TensorFile]:
    """Return the tensors of the first of some weights that is there; nothing where none is.

    Args:
        folder: where to look.
        weights: names of the single files; any of them may be in shards.
        key: the setting that names the folder, for the message.

    Raises:
        FileNotFoundError: when an index names files that are missing.
        ValueError: when a file is truncated, or holds something else than tensors.
    """
    for name in weights:
        if paths := find_shards(folder, name, key=key):
            return {k: v for path in paths for k, v in read_header(path).items()}
    return {}


Shapes = Mapping[str, tuple[int, ...]]
Agree = Callable[[str, "tuple[int, ...] | None", "tuple[int, ...] | None"], bool]


def require_same(
    folder: Path,
    found: Shapes,
    expected: Shapes,
    *,
    hint: str,
    key: str = "adapter.source",
    agree: Agree = lambda _name, a, b: a == b,
) -> None:
    """Compare names and shapes of a file with a model's, before a byte of weights is read.

    Args:
        folder: for the message.
        found: in the file.
        expected: in the model.
        hint: last line of the message: where sizes come from.
        key: the setting that names the folder, for the message.
        agree: whether a tensor's shapes, ``None`` where it is missing, go together; equality by default.

    Raises:
        ValueError: naming what differs.
    """
    wrong = [
        f"  {name}: {found.get(name, 'missing')} in the file, "
        f"{expected.get(name, 'unknown')} in the model"
        for name in sorted(found.keys() | expected.keys())
        if not agree(name, found.get(name), expected.get(name))
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"{key} {folder} holds another model; {len(wrong)} tensors differ:\n"
            + "\n".join(wrong[:8])
            + more
            + f"\n{hint}"
        )


def set_parameter(module: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    """Replace a parameter, keeping its dtype and whether it is trained."""
    path, _, leaf = name.rpartition(".")
    old = module.get_parameter(name)
    # A copy even where nothing changes: the original is a page of the file.
    value = value.to(device=device, dtype=old.dtype, copy=True).contiguous()
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def fill_from(
    part: nn.Module, tensors: Mapping[str, TensorFile], *, prefix: str = "", device: torch.device
) -> None:
    """Replace what is on the meta device, one tensor in memory at a time; each keeps its dtype.

    Args:
        part: of a module with names as in the file.
        tensors: of the file.
        prefix: of the part's names there.
        device: of the tensors afterwards.
    """
    lacking = {name: p for name, p in part.named_parameters() if p.is_meta}
    wanted = {
        name: tensors[file]
        for name in lacking
        if (file := base_name(prefix + name)) in tensors and "lora_" not in name
    }
    for name, tensor in read_tensors(wanted):
        set_parameter(part, name, tensor, device)
    for name in lacking.keys() - wanted.keys():
        set_parameter(part, name, first_value(prefix + name, lacking[name]), device)


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
    """Return names and shapes of a safetensors or a ``.bin`` file without reading tensors.

    Raises:
        ValueError: when the file is truncated, or of another sort.
    """
    if path.suffix == PICKLE:
        return _read_pickled_header(path)
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


def _read_pickled_header(path: Path) -> dict[str, TensorFile]:
    """Return names and shapes of a ``.bin`` file; nothing in it is run."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        return {name: TensorFile(path, name, tuple(value.shape)) for name, value in state.items()}
    except Exception as error:  # torch raises what it meets
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); it is truncated or no file of tensors: "
            "download it again."
        ) from error


def read_tensors(files: Mapping[str, TensorFile]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the names of the mapping; pages stay in memory until the next one only.

    Each is a view of the mapped file: a safetensors file that stayed open would come to hold all of it.
    """
    pickled: dict[Path, dict[str, Tensor]] = {}
    for name, tensor in files.items():
        if tensor.path.suffix == PICKLE:
            if tensor.path not in pickled:
                pickled[tensor.path] = torch.load(
                    tensor.path, map_location="cpu", weights_only=True, mmap=True
                )
            yield name, pickled[tensor.path][tensor.name]
            continue
        with safe_open(tensor.path, "pt") as file:
            yield name, file.get_tensor(tensor.name)


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy files that training does not change."""
    for name in names:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            shutil.copyfile(source / name, target / name)
