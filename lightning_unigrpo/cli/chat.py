"""``unigrpo chat``: a dialogue in the terminal, one rollout that goes on as long as the user speaks."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL.Image import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo import distributed
from lightning_unigrpo.adapter import Adapter, has_turns
from lightning_unigrpo.callbacks.predictions import picture_of
from lightning_unigrpo.callbacks.rounds import ending, words_by_round
from lightning_unigrpo.cli import training
from lightning_unigrpo.cli.export import load_checkpoint
from lightning_unigrpo.cli.generate import Asked, adopt
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.data import FIRST_ID, load_image
from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.rollout import Start, decode_images, rollout, said
from lightning_unigrpo.types import Prompt, Segment, Trajectory

NUM_TURNS = 1000
"""Of a dialogue, at most: a plan has an end."""
HELP = (
    "Say what to draw, then what to change. An empty line or /new begins a new dialogue, /image FILE puts a "
    "picture before a request, /save FILE keeps the dialogue, Ctrl-C stops what is being drawn, /quit ends."
)


class ChatCLI(training.SettingsCLI):
    """Reads a configuration for one process on one device."""

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer for its device and its precision; no loop of it is run."""
        given = self.config.trainer
        return Trainer(
            accelerator=given.accelerator,
            devices=1,
            precision=given.precision,
            logger=False,
            enable_checkpointing=False,
        )


def run(arguments: Sequence[str]) -> None:
    """Talk until the user leaves.

    Raises:
        ValueError: when the settings or the checkpoint do not fit.
    """
    parser = ArgumentParser(
        prog="unigrpo chat",
        usage="unigrpo chat --config FILE [options]",
        description=f"Talk to a model, in one process on one device. {HELP} Further options are those of "
        "`unigrpo fit`: --model.sampling.eval_temperature, ...",
    )
    parser.add_argument(
        "--ckpt_path", help="file or folder; last = the newest; else the base model"
    )
    parser.add_argument("--output", type=Path, help="folder for the pictures; else chat/<time>")
    parser.add_argument("--seed", type=int, help="keys the draws, as of unigrpo generate")
    parser.add_argument("--scale", type=int, default=1, help="enlarge each pixel this many times")
    parser.add_argument(
        "--no_preview", action="store_true", help="show no pictures in the terminal"
    )
    known, rest = parser.parse_known_args(arguments)
    if known.scale < 1:
        raise ValueError(f"--scale is {known.scale}; give 1 or more.")
    cli = training.build(ChatCLI, rest, run=False, save_config_callback=None)
    adopt(cli.model, Asked(seed=known.seed))
    folder = known.output or Path("chat") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    prepare(cli, known.ckpt_path, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # lines are edited, and earlier ones found again
    screen = Screen(Console(), scale=known.scale, preview=not known.no_preview)
    precision = cli.trainer.strategy.precision_plugin
    with precision.predict_step_context(), distributed.cast_once(cli.model.adapter.net):
        Chat(cli.model, screen, folder).run()


def prepare(cli: ChatCLI, ckpt_path: str | None, folder: Path) -> None:
    """Read the weights and move them to the device, as a trainer does before its loop."""
    strategy, module = cli.trainer.strategy, cli.model
    strategy.connect(module)
    strategy.setup_environment()
    with strategy.tensor_init_context(), strategy.precision_plugin.module_init_context():
        module.configure_model()
    if ckpt_path is not None:
        load_checkpoint(cli, ckpt_path, folder)
    strategy.setup(cli.trainer)
    module.eval()


def endless(sampling: Sampling) -> Sampling:
    """Return settings in which the user may speak again and again.

    What the plan draws behind its last turn, or all of it where it has none, follows every turn.

    Example:
        >>> endless(Sampling()).plan[:6]
        ('text', 'image', 'turn', 'text', 'image', 'turn')
    """
    kinds = sampling.kinds
    last = max((place for place, kind in enumerate(kinds) if kind == "turn"), default=-1)
    again = ("turn", *kinds[last + 1 :])
    return replace(sampling, plan=kinds + again * NUM_TURNS, rounds=None)


class Screen:
    """What the user sees: words while they are drawn, and pictures.

    Args:
        console: where to.
        scale: enlarge each pixel of a picture this many times.
        preview: whether pictures are shown, where the console has colours.
    """

    def __init__(self, console: Console, *, scale: int = 1, preview: bool = True) -> None:
        self.console, self.scale = console, scale
        self.preview = preview and console.color_system is not None
        self._words = self._printed = ""
        self._status = console.status("")

    def ask(self, mark: str) -> str:
        """Return a line of the user's; ``mark`` stands before it on a terminal."""
        return self.console.input(mark if self.console.is_terminal else "").strip()

    def say(self, text: str) -> None:
        """Print a message."""
        self.close()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stream(self, words: str, *, first: bool) -> None:
        """Print what is new in a text that grows.

        Args:
            words: all of it so far.
            first: whether it is the beginning of another text.
        """
        if first:
            self.close()
        self._words = words
        # A letter of which bytes are still to come is not printed yet.
        if not words.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print()

    def _print(self) -> None:
        # A new token may change how those before it are written.
        if not self._words.startswith(self._printed):
            self.console.out()
            self._printed = ""
        self.console.out(self._words[len(self._printed) :], end="", highlight=False)
        self._printed = self._words

    def progress(self, phase: str, done: int, total: int) -> None:
        """Show how far an image is, where there is a terminal."""
        if phase == "text":
            return
        self.end_text()
        self._status.update(f"{phase} {done}/{total}")
        self._status.start()

    def end_text(self) -> None:
        """Print what was held back of a text, and end its line."""
        if self._words:
            self._print()
            self.console.out()
        self._words = self._printed = ""

    def close(self) -> None:
        """End what is in progress."""
        self._status.stop()
        self.end_text()

    def show(self, image: Tensor, file: Path) -> None:
        """Write an image ``[3, H, W]`` in [0, 1] to a file, and show it."""
        picture = picture_of(image, self.scale)
        picture.save(file)
        if self.preview:
            picture.thumbnail((self.console.width, 2 * max(1, self.console.height - 2)))
            self.close()
            self.console.print(half_blocks(picture), no_wrap=True)
        self.say(str(file))


def half_blocks(picture: Image) -> Text:
    """Return a picture as text: an upper half block is two pixels, one above the other."""
    pixels = np.asarray(picture.convert("RGB")).tolist()
    lines = []
    for above, below in zip_longest(pixels[::2], pixels[1::2]):
        line = Text()
        for place, pixel in enumerate(above):
            behind = Color.from_rgb(*below[place]) if below else None
            line.append("▀", Style(color=Color.from_rgb(*pixel), bgcolor=behind))
        lines.append(line)
    return Text("\n").join(lines)


class Chat:
    """One dialogue after the other.

    Args:
        module: on its device, with its weights.
        screen: of the user.
        folder: for the pictures.
    """

    def __init__(self, module: UniGRPOModule, screen: Screen, folder: Path) -> None:
        self.module, self.screen, self.folder = module, screen, folder
        self.adapter: Adapter = module.adapter
        self.sampling = module.eval_sampling
        self.images: list[Path] = []
        """Stand before the next request."""
        self.dialogue: Dialogue | None = None
        if has_turns(self.adapter):
            self.sampling = endless(self.sampling)

    def run(self) -> None:
        """Ask for requests and draw, until the user leaves."""
        self.screen.say(HELP)
        if not has_turns(self.adapter):
            name = type(self.adapter).__name__
            self.screen.say(f"{name} has no turn(text, behind): each request is a new dialogue.")
        with suppress(EOFError):
            self._talk()

    def _talk(self) -> None:
        number = 0
        while True:
            words = self.ask("> ")
            if words is None:
                self.images = []
            elif self.draw(words, number):
                number += 1

    def ask(self, mark: str) -> str | None:
        """Return what the user says, None for a new dialogue; commands are obeyed.

        Raises:
            EOFError: when the user leaves.
        """
        while True:
            try:
                line = self.screen.ask(mark)
            except KeyboardInterrupt:
                self.screen.say("\n/quit ends.")
                continue
            if line in ("", "/new"):
                return None
            if not line.startswith("/"):
                return line
            self.obey(*line.partition(" ")[::2])

    def obey(self, command: str, file: str) -> None:
        """Do what is no request.

        Raises:
            EOFError: when the user leaves.
        """
        if command == "/quit":
            raise EOFError
        action = {"/image": self.add, "/save": self.save}.get(command)
        try:
            self.screen.say(action(Path(file)) if action is not None and file else HELP)
        except OSError as error:
            self.screen.say(f"error: {error}")

    def add(self, file: Path) -> str:
        """Put an input image before the next request."""
        load_image(file)  # says what is wrong with it
        self.images.append(file)
        return f"{file} stands before the next request; /new in its place takes it away."

    def save(self, file: Path) -> str:
        """Keep the dialogue, or the one that has ended."""
        if self.dialogue is None:
            return "Nothing was drawn yet."
        self.dialogue.save(file)
        return str(file)

    def draw(self, words: str, number: int) -> bool:
        """Draw a dialogue from its first request to its end, and return whether anything was drawn."""
        dialogue = Dialogue(self, number)
        try:
            dialogue.draw(words)
        except (ValueError, torch.OutOfMemoryError) as error:
            self.screen.say(f"error: {error}")
        except KeyboardInterrupt:
            self.screen.say("Stopped; a new dialogue begins.")
        finally:
            self.screen.close()
        return dialogue.begun


class Dialogue:
    """One trajectory, and the user who speaks in it.

    Args:
        chat: that it is part of.
        number: of the dialogue, which keys its draws like the place of a prompt in ``unigrpo generate``.
    """

    needs_images = False
    """It decodes what it shows."""

    def __init__(self, chat: Chat, number: int) -> None:
        self.chat, self.number = chat, number
        self.inputs = [*chat.images]
        self.begun = False
        self.trajectory: Trajectory | None = None
        self.files: list[Path] = []
        self._shown = 0

    @torch.no_grad()
    def draw(self, words: str) -> None:
        """Draw until the user has nothing left to say.

        Raises:
            ValueError: when the request cannot be drawn.
        """
        chat, device = self.chat, self.chat.module.device
        prompt = Prompt(
            text=words,
            id=FIRST_ID["predict"] + self.number,
            images=tuple(load_image(path).to(device) for path in self.inputs),
        )
        chunks = rollout(
            chat.adapter,
            [Start(prompt, prompt.id, 0)],
            chat.sampling,
            evaluate=True,
            speaker=self,
            progress=self.progress,
            heard=self.heard,
        )
        for (trajectory,) in chunks:
            self.show(trajectory)
            if ending(trajectory, chat.sampling) == "phrase":
                chat.screen.say("The model is content; a new dialogue begins.")

    def heard(self, tokens: Tensor, active: Tensor) -> None:
        """Print a text while it is drawn."""
        words = self.chat.adapter.detokenize(tokens[0])
        self.chat.screen.stream(words, first=tokens.shape[1] == 1)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Say how far an image is; once anything is drawn, input images are used up."""
        if not self.begun:
            self.begun, self.chat.images = True, []
        self.chat.screen.progress(phase, done, total)

    def __call__(self, trajectories: Sequence[Trajectory], number: int) -> list[str | None]:
        """Show what was drawn and return what the user says to it."""
        (trajectory,) = trajectories
        self.show(trajectory)
        words = self.chat.ask(">> ")
        while words is not None and not self._can_be_said(words, trajectory.segments[-1]):
            words = self.chat.ask(">> ")
        return [words]

    def _can_be_said(self, words: str, behind: Segment) -> bool:
        """Say what is wrong with a turn here: in the rollout it would end the dialogue."""
        try:
            said(self.chat.adapter, words, behind, self.chat.sampling)
        except ValueError as error:
            self.chat.screen.say(f"error: {error}")
            return False
        return True

    def show(self, trajectory: Trajectory) -> None:
        """Show the images that are new."""
        self.trajectory, self.chat.dialogue = trajectory, self
        segments = trajectory.segments[max(self._shown, trajectory.num_given) :]
        new = replace(trajectory, segments=segments, num_given=0, rounds=[])
        decode_images(self.chat.adapter, [new], every=True)
        self._shown = len(trajectory.segments)
        for each in new.rounds:
            name = f"{self.number}_round{len(self.files) + 1}.png"
            self.files.append(self.chat.folder / name)
            self.chat.screen.show(each.image, self.files[-1])

    def save(self, file: Path) -> None:
        """Write words and files of the pictures, relative to ``file``, as JSON.

        Raises:
            OSError: when it cannot be written.
        """
        assert self.trajectory is not None

        def relative(path: Path) -> str:
            return os.path.relpath(path, file.parent)

        rounds = words_by_round(self.trajectory)
        for each, path in zip(rounds, self.files, strict=False):
            each["image"] = relative(path)
        record = {
            "prompt": self.trajectory.prompt.text,
            "images": [*map(relative, self.inputs)],
            "rounds": rounds,
        }
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
