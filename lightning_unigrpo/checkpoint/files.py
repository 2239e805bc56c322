"""Checkpoints on a disk: written whole or not at all, found again after a crash, refused when torn.

A checkpoint is a file, or a folder with a part from each rank. Either is written under another name,
brought to the disk, and renamed; a folder ends with a manifest of its files and their sizes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lightning_unigrpo.checkpoint.origin import ORIGIN, Origin

LAST = "last.ckpt"
NAMES = (LAST, f"{LAST}.old", "iteration=*.ckpt")
"""Of checkpoints to go on with; of two that were written together, the first."""
MANIFEST = "manifest.json"
META = "meta.pt"
"""Where Lightning puts, in a folder, what is neither weights nor optimizer."""


def part_of(path: Path) -> Path:
    """Return the name under which a checkpoint is written."""
    return path.with_name(path.name + ".part")


def old_of(path: Path) -> Path:
    """Return where the previous checkpoint stays until the new one is in its place."""
    return path.with_name(path.name + ".old")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Clear away what a process left that ended while it wrote; for the owner of the folder."""
    for path in folder.glob("*.ckpt.part"):
        remove(path)


# ---- writing


def publish(path: Path, origin: Origin) -> None:
    """Give the checkpoint that lies under :func:`part_of` its name; for one rank, when all have written.

    At every moment a whole checkpoint lies under ``path``, or under :func:`old_of` while a folder takes
    the place of another.

    Args:
        path: may hold the previous checkpoint.
        origin: goes into a folder's manifest.

    Raises:
        RuntimeError: when this rank does not see what another wrote.
    """
    part, old = part_of(path), old_of(path)
    if part.is_dir():
        _complete(part, origin)
    else:
        _sync(part)
    if part.is_dir() or path.is_dir():  # neither replaces the other in one step
        if path.exists():
            remove(old)
            path.rename(old)
        part.rename(path)
    else:
        part.replace(path)
    _sync(path.parent)
    remove(old)


def keep_copy(path: Path, copy: Path) -> None:
    """Keep a checkpoint under a second name, by links where the disk can, so that it takes no time."""
    part = part_of(copy)
    remove(part)
    if path.is_dir():
        shutil.copytree(path, part, copy_function=_link)
    else:
        _link(path, part)
    remove(copy)
    part.rename(copy)
    _sync(copy.parent)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _complete(folder: Path, origin: Origin) -> None:
    """Write the manifest, when everything else is on the disk."""
    lacking = sorted(set(_parts(folder)) - set(_sizes(folder)))
    if lacking:
        raise RuntimeError(
            f"{folder} lacks {', '.join(lacking)}, which other ranks wrote: rank 0 sees another disk. Set "
            "IterationCheckpoint's dirpath to a folder that all nodes share."
        )
    for name in _sizes(folder):
        _sync(folder / name)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**origin, "files": _sizes(folder)}, indent=1) + "\n")
    _sync(manifest)
    _sync(folder)


def _parts(folder: Path) -> Iterator[str]:
    """Yield the files that hold weights, one or more of each rank."""
    if (folder / ".metadata").is_file():
        for place in FileSystemReader(folder).read_metadata().storage_data.values():
            yield str(place.relative_path)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def _sync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk: a rename may outlive what it names."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- finding and judging


def fault(path: Path) -> str | None:
    """Say why a checkpoint is not whole; None when it is."""
    if path.is_dir():
        return _fault_of_folder(path)
    if not path.is_file():
        return "there is no such file or folder"
    if zipfile.is_zipfile(path):
        return None
    with path.open("rb") as file:
        begins_well = file.read(2) == b"PK"
    if begins_well or not path.stat().st_size:
        return f"it is torn: {path.stat().st_size:,} bytes are there, and the end is missing"
    return "it is not a file that torch.save wrote"


def _fault_of_folder(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return _no_manifest(folder)
    except ValueError:
        return f"its {MANIFEST} is torn"
    if not isinstance(manifest, dict) or "files" not in manifest:
        return f"its {MANIFEST} is of another program"
    found = _sizes(folder)
    wrong = [
        f"{name} ({found[name]:,} of {size:,} bytes)" if name in found else f"{name} (missing)"
        for name, size in manifest["files"].items()
        if found.get(name) != size
    ]
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return f"it is torn: {', '.join(wrong[:4])}{more}" if wrong else None


def _no_manifest(folder: Path) -> str:
    if not (folder / META).is_file():
        return f"it is a folder without {MANIFEST} and without {META}, so no checkpoint"
    return (
        f"it has no {MANIFEST}, which is written last: its writer was ended before, or was Lightning's "
        f"ModelCheckpoint. If you know that it is whole, `unigrpo consolidate {folder}` makes a file of it"
    )


def read_origin(path: Path, *, weights_only: bool | None = None) -> Origin | None:
    """Return what a whole checkpoint says of its run; None when another program wrote it.

    Args:
        path: a file, whose weights stay on the disk, or a folder.
        weights_only: as for ``torch.load``; ``None`` trusts nobody.

    Raises:
        ValueError: when it cannot be read.
    """
    if path.is_dir():
        manifest = json.loads((path / MANIFEST).read_text())
        return manifest if "parameters" in manifest else None
    try:
        read = torch.load(
            path, map_location="cpu", mmap=True, weights_only=weights_only is not False
        )
    except pickle.UnpicklingError as error:
        found = re.findall(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"The checkpoint {path} holds more than tensors and numbers ({', '.join(found[:1])}), which may "
            "run code while it is read. If you trust its writer, set weights_only to false."
        ) from error
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The checkpoint {path} is damaged: {reason}") from error
    return read.get(ORIGIN) if isinstance(read, dict) else None


def find_whole(path: Path) -> Path:
    """Return ``path``, or what was moved aside for a checkpoint that never came."""
    return old_of(path) if not path.exists() and fault(old_of(path)) is None else path


def beside(path: Path) -> list[Path]:
    """Return what lies in the folder of a checkpoint under the name of another."""
    return [found for name in NAMES for found in path.parent.glob(name)]


def whole_ones(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield those checkpoints that are whole, the newest first."""
    yield from (path for path in sorted(paths, key=_written, reverse=True) if fault(path) is None)


def latest_checkpoint(*places: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run, to go on with after a crash.

    Args:
        places: folders of runs, searched with all below them for ``last.ckpt`` and ``iteration=*.ckpt``.

    Returns:
        Its path, for ``trainer.fit(..., ckpt_path=...)``; None where there is none, so that a first start
        and a restart are the same line.

    Example:
        >>> latest_checkpoint("no/such/folder") is None
        True
    """
    found = [path for place in places for name in NAMES for path in Path(place).rglob(name)]
    return next(whole_ones(found), None)


def _written(path: Path) -> float:
    manifest = path / MANIFEST
    return (manifest if manifest.is_file() else path).stat().st_mtime
