"""``unigrpo check-adapter CLASS_PATH``: the adapter's contract, checked."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
from rich.console import Console

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.data import SUFFIXES, read_prompts
from lightning_unigrpo.testing import Report, check_adapter
from lightning_unigrpo.types import Prompt


def run(arguments: Sequence[str]) -> Report:
    """Check an adapter, print the table, and leave with 1 where a rule is broken."""
    parser = jsonargparse.ArgumentParser(
        prog="unigrpo check-adapter",
        usage="unigrpo check-adapter CLASS_PATH [--adapter.ARGUMENT VALUE ...] [options]",
        description="Check an adapter against the contract; best a small one with random weights.",
        exit_on_error=False,
    )
    parser.add_subclass_arguments(Adapter, "adapter", required=True)
    parser.add_argument("--prompts", type=list[str], help="in words, or one file; else its own")
    parser.add_argument("--rounds", type=list[int], default=[1, 2], help="how often it draws")
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--adapter={arguments[0]}", *arguments[1:]]
    known = parser.instantiate(parser.parse_args(list(arguments)))
    known.adapter.materialize()
    report = check_adapter(
        known.adapter, read(known.prompts), rounds=known.rounds, raise_on_failure=False
    )
    Console().print(str(report), markup=False, highlight=False, soft_wrap=True)
    if report.failed:
        sys.exit(1)
    return report


def read(prompts: Sequence[str] | None) -> Sequence[Prompt] | None:
    """Return prompts in words or from a file; None where the adapter's own are meant."""
    if prompts is None:
        return None
    if len(prompts) == 1 and Path(prompts[0]).suffix in SUFFIXES:
        return read_prompts(prompts[0], first_id=0, key="prompts")
    return [Prompt(text=text, id=i) for i, text in enumerate(prompts)]
