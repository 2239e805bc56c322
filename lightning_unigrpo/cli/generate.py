"""``unigrpo generate PROMPT ...``: think and draw, with a configuration and its checkpoint."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lightning_unigrpo.cli import training
from lightning_unigrpo.data import SUFFIXES


def run(arguments: Sequence[str]) -> Path:
    """Draw and return the folder; what is unknown here goes to ``predict`` (``--config``, ``--ckpt_path``).

    Raises:
        ValueError: when there are no prompts.
    """
    prompts = list(takewhile(lambda word: not word.startswith("-"), arguments))
    parser = ArgumentParser(
        prog="unigrpo generate",
        usage="unigrpo generate PROMPT [PROMPT ...] --config FILE [options]",
        description="Think and draw. PROMPT is a request in words, or one file of them. Further options are "
        "those of `unigrpo predict`: --ckpt_path (a path, or last), --model.sampling.guidance_scale, ...",
    )
    parser.add_argument("--num_images", help="images per prompt")
    parser.add_argument("--seed", help="keys the draws: the same seed, the same images")
    parser.add_argument("--thinking", help="false = draw without reasoning")
    parser.add_argument("--output", type=Path, default=Path("generated"), help="folder to write to")
    parser.add_argument("--scale", type=int, default=1, help="enlarge each pixel this many times")
    known, rest = parser.parse_known_args(arguments[len(prompts) :])
    if not prompts:
        raise ValueError(
            "unigrpo generate has no prompts: put them first, each in quotation marks, as in "
            "unigrpo generate 'a red cube' 'two cats' --config FILE."
        )
    settings = {
        "model.evaluation.num_images": known.num_images,
        "model.evaluation.thinking": known.thinking,
        "model.sampling.seed": known.seed,
    }
    writer = {
        "class_path": "lightning_unigrpo.callbacks.PredictionWriter",
        "init_args": {"folder": str(known.output), "scale": known.scale},
    }
    progress = {"class_path": "lightning_unigrpo.callbacks.RolloutProgress"}
    # Of the callbacks that wrote the checkpoint, none has anything to say here.
    warnings.filterwarnings(
        "ignore", "Be aware that when using `ckpt_path`, callbacks", UserWarning
    )
    with TemporaryDirectory() as folder:
        training.run(
            [
                "predict",
                *rest,
                f"--data.predict={_file_of(prompts, Path(folder))}",
                *(f"--{key}={value}" for key, value in settings.items() if value is not None),
                f"--trainer.callbacks={json.dumps([writer, progress])}",
                "--trainer.logger=false",
            ]
        )
    _show(known.output)
    return Path(known.output)


def _file_of(prompts: Sequence[str], folder: Path) -> Path:
    """Return the file that was named, or one in ``folder`` with what was said."""
    if len(prompts) == 1 and Path(prompts[0]).suffix in SUFFIXES:
        return Path(prompts[0])
    file = folder / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in prompts), encoding="utf-8"
    )
    return file


@rank_zero_only
def _show(folder: Path) -> None:
    table = Table("prompt", "reasoning", "image", show_lines=True)
    for file in sorted(folder.glob("predictions*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            image = str(folder / record["image"]) if "image" in record else "none"
            table.add_row(record["prompt"], record["reasoning"], image)
    Console().print(table)
