"""Which checkpoints a run takes up: whole ones of the same policy; others are refused before they load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_unigrpo.checkpoint.files import beside, fault, read_origin, whole_ones
from lightning_unigrpo.checkpoint.origin import Origin, changes, refusals

STRATEGIES = {
    "whole": "DDP or a single device",
    "fsdp": "FSDP",
    "fsdp2": "ModelParallelStrategy (FSDP2)",
    "deepspeed": "DeepSpeed",
}


def accept(path: Path, ours: Origin, *, fitting: bool, weights_only: bool | None = None) -> Origin:
    """Return what a checkpoint says of its run, when it is whole and fits this one.

    Args:
        path: a file or a folder.
        ours: of this run, with its ``strategy``.
        fitting: whether training goes on.
        weights_only: as for ``torch.load``.

    Raises:
        ValueError: saying what is wrong with it, and what to do.
    """
    reason = fault(path)
    if reason is not None:
        raise ValueError(f"The checkpoint {path} is refused: {reason}.\n{_instead(path)}")
    theirs = read_origin(path, weights_only=weights_only)
    if theirs is None:
        raise ValueError(
            f"The checkpoint {path} is refused: no run of UniGRPOModule wrote it. Weights of a model "
            "are given to model.adapter instead."
        )
    if path.is_dir() and theirs["strategy"] != ours["strategy"]:
        raise ValueError(
            f"The checkpoint {path} is refused: it holds a part from each rank of "
            f"{STRATEGIES[theirs['strategy']]}, which only that strategy reads, and trainer.strategy is "
            f"{STRATEGIES[ours['strategy']]}. {_as_a_file(path, theirs)}"
        )
    wrong = "; ".join(refusals(theirs, ours, fitting=fitting))
    if wrong:
        raise ValueError(f"The checkpoint {path} is refused: {wrong}.")
    return theirs


def _as_a_file(path: Path, theirs: Origin) -> str:
    if theirs["strategy"] == "deepspeed":
        return "DeepSpeed's own zero_to_fp32.py, which lies in it, makes a file of its weights."
    return f"`unigrpo consolidate {path}` makes one file of it, which every strategy reads."


def _instead(path: Path) -> str:
    other = next((each for each in whole_ones(beside(path)) if each != path), None)
    if other is None:
        return "No other whole checkpoint lies in that folder."
    return f"The newest whole one in that folder is {other}: give its path as ckpt_path."


def notes(theirs: Origin, ours: Origin) -> Iterator[str]:
    """Yield what will be different in the run that goes on, each in one message."""
    before, now = theirs["world_size"], ours["world_size"]
    if before != now:
        yield (
            f"The checkpoint was written by {before} ranks and {now} go on. The same: weights, optimizer, "
            "position in the prompts, all draws (they are keyed by prompt and member). Other: which rank "
            "draws which rollouts, and so the order in which gradients are added, so metrics agree up to "
            "rounding only; generator states are not restored, which matters to rewards that draw."
        )
    elif theirs["strategy"] != ours["strategy"]:
        yield (
            f"The checkpoint was written under {STRATEGIES[theirs['strategy']]}, and this is "
            f"{STRATEGIES[ours['strategy']]}: gradients are added in another order, so metrics agree up to "
            "rounding only."
        )
    found = changes(theirs, ours)
    if found:
        yield (
            "The settings are not those of the checkpoint, so from here on this is another run than the "
            "one that was interrupted:\n" + "\n".join(f"  {line}" for line in found)
        )


def look_first(strategy: Any, accepted: Callable[..., Path]) -> None:
    """Have a strategy ask before it loads a checkpoint.

    Args:
        strategy: of Lightning; those of a kind load in their own ways, and call nobody before.
        accepted: called with what ``load_checkpoint`` is called with, returns the path to load.
    """
    load = type(strategy).load_checkpoint.__get__(strategy)  # not what an earlier run put there

    def load_checkpoint(path: str | Path, **settings: Any) -> Any:
        remote = "://" in str(path)  # on another machine: Lightning fetches it, and nobody can look
        return load(path if remote else accepted(path, **settings), **settings)

    strategy.load_checkpoint = load_checkpoint
