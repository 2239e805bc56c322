"""``unigrpo generate PROMPT ...``: think and draw, with a configuration and its checkpoint."""

from __future__ import annotations

import json
import warnings
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_unigrpo.adapter import Adapter, has_turns
from lightning_unigrpo.budget import MemoryBudget
from lightning_unigrpo.cli import training
from lightning_unigrpo.config import Kind, Sampling
from lightning_unigrpo.data import SUFFIXES
from lightning_unigrpo.dialogue import Turns
from lightning_unigrpo.module import UniGRPOModule


class Asked(NamedTuple):
    """What a command line asks of the rollouts, beside the configuration."""

    seed: int | None = None
    rounds: int | None = None
    turns: Sequence[str] = ()


class GenerateCLI(training.UniGRPOCLI):
    """Draws other rounds than the configuration: settings the adapter brings are known once it is built."""

    def __init__(self, *args: Any, asked: Asked, **settings: Any) -> None:
        self.asked = asked
        super().__init__(*args, **settings)

    @override
    def after_instantiate_classes(self) -> None:
        adopt(self.model, self.asked)
        super().after_instantiate_classes()


def run(arguments: Sequence[str]) -> Path:
    """Draw and return the folder; what is unknown here goes to ``predict`` (``--config``, ``--ckpt_path``).

    Raises:
        ValueError: when there are no prompts, or the rounds asked for cannot be drawn.
    """
    prompts = list(takewhile(lambda word: not word.startswith("-"), arguments))
    parser = ArgumentParser(
        prog="unigrpo generate",
        usage="unigrpo generate PROMPT [PROMPT ...] --config FILE [options]",
        description="Think and draw. PROMPT is a request in words, or one file of them. Further options are "
        "those of `unigrpo predict`: --ckpt_path (a path, or last), --model.sampling.guidance_scale, ...",
    )
    parser.add_argument("--num_images", help="images per prompt")
    parser.add_argument("--seed", type=int, help="keys the draws: the same seed, the same images")
    parser.add_argument("--thinking", help="false = draw without reasoning")
    parser.add_argument("--rounds", type=int, help="draw so often, each time behind all before")
    parser.add_argument(
        "--turn",
        action="append",
        default=[],
        metavar="TEXT",
        help="what the user says behind an image; again for the next one, the last behind all that follow",
    )
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
            ],
            GenerateCLI,
            asked=Asked(known.seed, known.rounds, known.turn),
        )
    _show(known.output)
    return Path(known.output)


def adopt(module: UniGRPOModule, asked: Asked) -> None:
    """Let a module that was built draw what was asked for.

    Raises:
        ValueError: when it cannot.
    """
    sampling = module.sampling
    if asked.seed is not None:
        sampling = replace(sampling, seed=asked.seed)
    if asked.rounds is not None or asked.turns:
        sampling = in_rounds(sampling, asked.rounds, len(asked.turns))
        if not module.evaluation.thinking and sampling.num_images > 1:
            raise ValueError(
                "--rounds and --turn ask for several images, and without thinking (--thinking, "
                "model.evaluation.thinking) one is drawn: leave out either."
            )
    if asked.turns:
        require_turns(module.adapter)
        module.turns = Turns(asked.turns)
    module.sampling = sampling
    module.budget = MemoryBudget(module.adapter, sampling, module.optim)


def in_rounds(sampling: Sampling, rounds: int | None, num_turns: int) -> Sampling:
    """Return settings with as many rounds, and with room for what the user says between them.

    Args:
        sampling: as configured.
        rounds: how many; ``None`` = as many as the plan has, or as the turns need.
        num_turns: how often the user speaks; where the plan does not say when, behind every image but the
            last.

    Raises:
        ValueError: when the plan cannot be repeated, or has fewer turns.
    """
    if rounds is None and "turn" not in sampling.kinds:
        rounds = max(sampling.num_images, num_turns + 1)
    kinds = replace(sampling, rounds=sampling.rounds if rounds is None else rounds).kinds
    if num_turns and "turn" not in kinds:
        kinds = with_turns(kinds)
    if kinds.count("turn") < num_turns:
        raise ValueError(
            f"--turn is given {num_turns} times, and {kinds.count('turn')} turns fit between the segments "
            f"{list(kinds)}: raise --rounds, or say less."
        )
    return replace(sampling, plan=kinds, rounds=None)


def with_turns(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Return a plan in which the user speaks behind each image but the last.

    Example:
        >>> with_turns(("text", "image", "text", "image"))
        ('text', 'image', 'turn', 'text', 'image')
    """
    found: list[Kind] = []
    for place, kind in enumerate(kinds):
        found.append(kind)
        if kind == "image" and "image" in kinds[place + 1 :]:
            found.append("turn")
    return tuple(found)


def require_turns(adapter: Adapter) -> None:
    """Raise where the user cannot speak in the middle of a dialogue.

    Raises:
        ValueError: when the adapter has no ``turn``.
    """
    if not has_turns(adapter):
        raise ValueError(
            f"{type(adapter).__name__} has no turn(text, behind), so the user speaks once, in the prompt: "
            "leave out --turn."
        )


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
            first, *others = record.get("rounds", [record])
            for said, each in (
                (record["prompt"], first),
                *((r.get("turn", ""), r) for r in others),
            ):
                image = str(folder / each["image"]) if "image" in each else "none"
                table.add_row(said, each["reasoning"], image)
    Console().print(table)
