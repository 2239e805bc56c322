"""``unigrpo doctor``: what is installed, what this machine can do, what is missing."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, get_session, get_token
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_unigrpo.environment import NAME, Package, describe, devices, packages


class Line(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: str
    """``ok``, ``missing`` (something of ours does not work without it), or ``none``."""
    says: str


def run(arguments: Sequence[str]) -> dict[str, list[Line]]:
    """Look, print, and leave with 1 where a package that every run needs is missing or too old."""
    parser = ArgumentParser(prog="unigrpo doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs, and for bug reports")
    parser.add_argument(
        "--offline", action="store_true", help="do not ask the hub whether it answers"
    )
    known = parser.parse_args(arguments)
    found = {
        "packages": [*required(packages())],
        "extras": [*optional(packages())],
        "machine": [*machine()],
        "strategies": [*strategies()],
        "hub": [*hub(ask=not known.offline)],
    }
    if known.json:
        lines: dict[str, Any] = {
            part: [line._asdict() for line in each] for part, each in found.items()
        }
        sys.stdout.write(json.dumps({"environment": describe(), **lines}, indent=1) + "\n")
    else:
        show(found)
    if any(line.state != "ok" for line in found["packages"]):
        sys.exit(1)
    return found


def show(found: dict[str, list[Line]]) -> None:
    """Print one table for each part."""
    console = Console()
    colours = {"ok": "green", "missing": "red", "none": "yellow"}
    for part, lines in found.items():
        table = Table(title=part, title_justify="left", show_header=False, box=None)
        for line in lines:
            table.add_row(Text(line.state, colours[line.state]), Text(line.what), Text(line.says))
        console.print(table)


def required(known: Iterator[Package]) -> Iterator[Line]:
    """Yield what no run can do without."""
    for package in known:
        if package.extra is None:
            found = package.found or "not installed"
            wanted = "" if package.fits else f", but {package.wanted} is needed"
            yield Line(package.name, "ok" if package.fits else "missing", found + wanted)


def optional(known: Iterator[Package]) -> Iterator[Line]:
    """Yield each extra, and how to add it where something of it is missing."""
    named = sorted((p for p in known if p.extra is not None), key=lambda p: str(p.extra))
    for extra, group in groupby(named, key=lambda p: p.extra):
        members = [*group]
        absent = [package.name for package in members if not package.fits]
        versions = ", ".join(f"{p.name} {p.found}" for p in members)
        add = f'pip install "{NAME}[{extra}]" (lacks {", ".join(absent)})'
        yield Line(str(extra), "none" if absent else "ok", add if absent else versions)


def machine() -> Iterator[Line]:
    """Yield processor, GPUs and what torch was built for."""
    about = describe()
    yield Line("python", "ok", f"{about['python']} on {about['system']}")
    yield Line("cores", "ok", about["cores"])
    gpus = devices()
    yield Line("gpus", "ok" if gpus else "none", "; ".join(gpus) or "runs are made on the CPU")
    build = about["cuda of torch"]
    yield Line("torch", "ok", f"{torch.__version__}, CUDA: {build}")
    if gpus:
        is_there = torch.cuda.is_bf16_supported()
        yield Line(
            "bf16-mixed", "ok" if is_there else "none", "supported" if is_there else "not here"
        )


def strategies() -> Iterator[Line]:
    """Yield what ``trainer.strategy`` can be here."""
    gpus = len(devices())
    yield Line("auto", "ok", "one GPU" if gpus == 1 else f"{gpus} GPUs, as ddp" if gpus else "CPU")
    yield Line("ddp", "ok", f"nccl, {gpus} GPUs" if gpus else "gloo, processes of this CPU")
    yield Line("ModelParallelStrategy (FSDP2)", "ok", f"{gpus} GPUs" if gpus else "gloo, likewise")
    for name in ("fsdp", "deepspeed"):
        lacks = [] if gpus else ["Lightning wants a GPU for it"]
        if name == "deepspeed" and not any(p.name == name and p.fits for p in packages()):
            lacks.append(f'pip install "{NAME}[deepspeed]"')
        yield Line(name, "none" if lacks else "ok", "; ".join(lacks) or f"{gpus} GPUs")


def hub(*, ask: bool) -> Iterator[Line]:
    """Yield whether published weights can be fetched, and where they are kept."""
    cache = Path(constants.HF_HUB_CACHE)
    count = len([*cache.glob("models--*")]) if cache.is_dir() else 0
    yield Line("cache", "ok", f"{cache}, {count} models (HF_HOME moves it)")
    yield Line(
        "token",
        "ok" if get_token() else "none",
        "there" if get_token() else "none: gated models need one (hf auth login)",
    )
    if constants.HF_HUB_OFFLINE:
        yield Line("access", "none", "HF_HUB_OFFLINE is set: only what is in the cache is read")
    elif ask:
        yield reach(os.environ.get("HF_ENDPOINT", constants.ENDPOINT))


def reach(endpoint: str, timeout: float = 5.0) -> Line:
    """Ask a hub whether it answers."""
    try:
        status = get_session().head(endpoint, timeout=timeout).status_code
    except Exception as error:  # whatever the client of this version raises
        return Line("access", "none", f"{endpoint} does not answer ({type(error).__name__})")
    return Line("access", "ok", f"{endpoint} answers ({status})")
