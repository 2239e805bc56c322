"""``unigrpo consolidate FOLDER``: one file of a checkpoint that several ranks wrote."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_unigrpo.checkpoint import consolidate


def run(arguments: Sequence[str]) -> Path:
    """Run ``unigrpo consolidate FOLDER [--output FILE]``."""
    parser = ArgumentParser(prog="unigrpo consolidate", description=consolidate.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    known = parser.parse_args(arguments)
    file = consolidate(known.folder, known.output)
    Console().print(str(file), highlight=False, soft_wrap=True)
    return file
