"""``unigrpo report RUN``: a page about a run, from its files."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_unigrpo import report


def run(arguments: Sequence[str]) -> Path:
    """Write the page and return its path."""
    parser = ArgumentParser(
        prog="unigrpo report", description="Make a page about a run from its files."
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of runs: the newest is taken")
    parser.add_argument(
        "--output", type=Path, help="file to write; else report.html in the run's folder"
    )
    known = parser.parse_args(arguments)
    file = report.write(known.run, known.output)
    Console().print(str(file), highlight=False, soft_wrap=True)
    return file
