"""The command line, ``unigrpo COMMAND``: one module per command, imported when it is asked for.

A mistake of the user's is one screen, not a stack of frames.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NamedTuple

from rich.console import Console

import lightning_unigrpo

PREFIX = "UNIGRPO_"


class Command(NamedTuple):
    """Where a command is."""

    module: str
    """In this package; its ``run`` takes the arguments behind the command."""
    about: str
    reads_configs: bool = False
    """Whether its arguments are those of LightningCLI, which may come from the environment."""


COMMANDS = {
    "fit": Command("training", "train: think, draw, reward, update", True),
    "validate": Command("training", "score the development prompts", True),
    "test": Command("training", "score the test prompts", True),
    "predict": Command("training", "draw the prompts of data.predict", True),
    "generate": Command("generate", "think and draw prompts given on the command line", True),
    "chat": Command(
        "chat", "a dialogue in the terminal: ask, watch it draw, say what to change", True
    ),
    "export": Command("export", "write a checkpoint as the published model is laid out", True),
    "estimate": Command("estimate", "memory, forwards and traffic, from sizes alone", True),
    "report": Command("report", "make a page about a run from its files"),
    "check-adapter": Command("check", "check an adapter of yours against the contract"),
    "serve-reward": Command("serve", "put a reward behind HTTP"),
    "consolidate": Command("consolidate", "make one file of a checkpoint that several ranks wrote"),
    "doctor": Command("doctor", "say what is installed, what this machine can do, what is missing"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: the command and what follows it; ``None`` = those of the process.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name not in COMMANDS:
        overview(name)
    command = COMMANDS[name]
    # As `python -m` does, but last: a reward in a file beside the configuration is found by its name.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if command.reads_configs:
            words = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
            rest[words:words] = from_environment(name, os.environ)
        if command.module == "training":
            rest = [name, *rest]
        import_module(f"{__name__}.{command.module}").run(rest)
    except (ArgumentError, ImportError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("UNIGRPO_TRACEBACK") or not (_lost_a_rank(error) or _is_ours(error)):
            raise
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
        hint = "(UNIGRPO_TRACEBACK=1 shows where it was raised)"
        Console(stderr=True, soft_wrap=True).print(f"error: {text}\n{hint}", markup=False)
        sys.exit(1)


def overview(word: str) -> None:
    """Print the commands, or the version, and leave; an unknown word is an error that names its like."""
    width = max(map(len, COMMANDS))
    parser = ArgumentParser(
        prog="unigrpo",
        usage="unigrpo COMMAND ...",
        description=lightning_unigrpo.__doc__ and lightning_unigrpo.__doc__.splitlines()[0],
        epilog="\n".join(
            ["commands:"]
            + [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
            + ["", "unigrpo COMMAND --help tells more; docs/cli.md tells all."]
        ),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"lightning-unigrpo {lightning_unigrpo.__version__}"
    )
    if word.startswith("-"):
        parser.parse_args([word])
    like = get_close_matches(word, COMMANDS, n=1)
    meant = f"; did you mean {like[0]!r}?" if like else f"; there are {', '.join(COMMANDS)}."
    parser.error(f"there is no command {word!r}{meant}")


def from_environment(command: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the arguments that environment variables stand for; put first, configurations override them.

    jsonargparse reads variables, too, but passes over those of nested settings, such as
    ``model.sampling.group_size``, without a word.

    Args:
        command: the first word of the variables' names.
        environment: ``UNIGRPO_FIT__MODEL__SAMPLING__GROUP_SIZE=8`` is ``--model.sampling.group_size=8``.

    Example:
        >>> list(from_environment("fit", {"UNIGRPO_FIT__DATA__SEED": "3", "HOME": "/root"}))
        ['--data.seed=3']
    """
    start = f"{PREFIX}{command.upper()}__"
    for name in sorted(environment):
        if name.startswith(start):
            key = name.removeprefix(start).lower().replace("__", ".")
            yield f"--{key}={environment[name]}"


def _lost_a_rank(error: BaseException) -> bool:
    # Where torch was never imported, no rank was there to be lost.
    if "torch" not in sys.modules:
        return False
    from lightning_unigrpo.callbacks.checkpoint import lost_a_rank

    return lost_a_rank(error)


def _is_ours(error: BaseException) -> bool:
    """Whether this package, or the parser on its behalf, raised the error on purpose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.split(".")[0] in {"lightning_unigrpo", "jsonargparse"}
