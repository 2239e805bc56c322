"""``unigrpo export``: a checkpoint becomes a model that others load."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from lightning_unigrpo.adapters.common.lora import save_lora
from lightning_unigrpo.checkpoint import accept, consolidate, find_whole
from lightning_unigrpo.cli.training import SettingsCLI, build, find_checkpoint
from lightning_unigrpo.module import UniGRPOModule


def run(arguments: Sequence[str]) -> Path:
    """Write the model of a checkpoint and return where.

    Raises:
        ValueError: when the checkpoint does not fit, or the adapter cannot be written.
    """
    parser = ArgumentParser(
        prog="unigrpo export",
        usage="unigrpo export --config FILE --ckpt_path PATH --output FOLDER [options]",
        description="Write a checkpoint as the published model is laid out. --config is that of the run "
        "(the config.yaml in its folder); further options are those of `unigrpo fit`.",
    )
    parser.add_argument("--ckpt_path", required=True, help="file or folder; last = the newest")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--merge_lora", choices=("true", "false"), default="true", help="false = the factors alone"
    )
    known, rest = parser.parse_known_args(arguments)
    cli = build(SettingsCLI, rest, run=False, save_config_callback=None)
    writer = writer_of(cli.model.adapter, merge_lora=known.merge_lora == "true")
    load_checkpoint(cli, known.ckpt_path, known.output)
    writer(known.output)
    Console().print(str(known.output), highlight=False, soft_wrap=True)
    return Path(known.output)


def writer_of(adapter: Any, *, merge_lora: bool) -> Callable[[Path], None]:
    """Return what writes the adapter, before minutes were spent on reading it.

    Raises:
        ValueError: when nothing can.
    """
    name = type(adapter).__name__
    if merge_lora:
        if not hasattr(adapter, "save_pretrained"):
            raise ValueError(f"{name} has no save_pretrained(folder), which unigrpo export calls.")
        return adapter.save_pretrained  # type: ignore[no-any-return]
    if getattr(adapter, "lora", None) is None:
        raise ValueError(
            f"merge_lora is false, and {name} was trained without LoRA (model.adapter.lora): leave it out."
        )
    return partial(save_lora, adapter.net, adapter.lora)


def load_checkpoint(cli: SettingsCLI, asked: str, output: Path) -> None:
    """Read the weights that a command line asks for.

    Args:
        cli: that was built; its model gets them.
        asked: as :func:`~lightning_unigrpo.cli.training.find_checkpoint` takes it.
        output: beside it a folder of parts is put together.

    Raises:
        ValueError: when there is no such checkpoint, or it does not fit.
    """
    found = find_checkpoint(asked, cli.config.trainer)
    if found is None:
        raise ValueError(f"ckpt_path is {asked}, and no checkpoint was written yet.")
    with as_a_file(find_whole(Path(found)), output) as file:
        load(cli.model, file)


@contextmanager
def as_a_file(checkpoint: Path, output: Path) -> Iterator[Path]:
    """Give a checkpoint as one file; of a folder one is made beside the output, and removed again."""
    if not checkpoint.is_dir():
        yield checkpoint
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        yield consolidate(checkpoint, Path(folder) / "whole.ckpt")


def load(module: UniGRPOModule, file: Path) -> None:
    """Read a checkpoint's weights into a module that was built, and was given a trainer."""
    accept(file, module.origin(), fitting=False)
    module.adapter.materialize()
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    module.load_state_dict(state)
