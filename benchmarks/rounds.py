"""What rounds cost: thinking and drawing once, twice and three times, and what caches and packing save.

In one process, in turn, random weights (speed does not depend on them), a prompt of twenty words:

* a rollout, its cache ``extended`` by each segment as the trainer does; ``per round``: built anew from all
  segments before every round but the first; ``per segment``: built anew before every text and every image,
  as calls that keep nothing would;
* an update's forward and backward, ``packed``: all rounds in one pass; ``per round``: one pass for each
  round, which reads everything before it again.

All ways are checked to do the same work: equal words, latents and gradients, to rounding.

    python -m benchmarks.rounds --out benchmarks/results/rounds.json
    python -m benchmarks.rounds --model bagel --text-tokens 200 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rollout import PROMPT_TOKENS, SIZES, Nothing, Size, build, build_two_stacks
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import Grid, ImageSegment, Prompt, Segment, Trajectory, as_given

ROUNDS = (1, 2, 3)
MODELS: dict[str, Callable[..., Any]] = {"bagel": build, "showo2": build_two_stacks}
PARTS = ("words", "denoising", "contexts")
TOLERANCE = 1e-3
"""Relative; float32 over sums of different lengths."""


class Words(Nothing):
    """Every prompt is the same ids."""

    def encode(self, text: str) -> list[int]:
        """Return some."""
        return [*range(4, 4 + PROMPT_TOKENS)]


class Extended:
    """An adapter that says where the time of a rollout goes."""

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def timed(self, part: str, work: Callable[..., Any], *args: Any) -> Any:
        """Add the seconds of some work to a part."""
        begin = time.process_time()
        found = work(*args)
        self.seconds[part] += time.process_time() - begin
        return found

    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> Any:
        """Read contexts."""
        self.rows = [list(context) for context in contexts]
        return self.timed("contexts", self.adapter.prefill, contexts)

    def extend(self, cache: Any, segments: Sequence[Segment]) -> None:
        """Append one segment per row."""
        self.timed("contexts", self.adapter.extend, cache, segments)

    def next_logits(self, *args: Any) -> Any:
        """Decode a word."""
        return self.timed("words", self.adapter.next_logits, *args)

    def velocity(self, *args: Any) -> Any:
        """Take a denoising step."""
        return self.timed("denoising", self.adapter.velocity, *args)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Return no picture worth looking at: there is no autoencoder."""
        return latents.new_zeros(len(latents), 3, 8, 8)


class PerSegment(Extended):
    """Reads everything again wherever the other would go on."""

    def extend(self, cache: Any, segments: Sequence[Segment]) -> None:
        """Forget the cache and read the longer lists."""
        if len(self.rows) < len(segments):  # one prompt, many members
            self.rows = [list(self.rows[0]) for _ in segments]
        for row, segment in zip(self.rows, segments, strict=True):
            row.append(segment)
        if self.is_due():
            fresh = self.timed("contexts", self.adapter.prefill, self.rows)
            vars(cache).update(vars(fresh))
        else:
            super().extend(cache, segments)

    def is_due(self) -> bool:
        """Whether the cache is built anew."""
        return True


class PerRound(PerSegment):
    """Reads everything again when a round begins."""

    def is_due(self) -> bool:
        """Whether an image was the last."""
        return len(self.rows[0]) % 2 == 1  # the prompt, and whole rounds


WAYS: dict[str, type[Extended]] = {
    "extended": Extended,
    "per round": PerRound,
    "per segment": PerSegment,
}


def draw(
    adapter: Any, size: Size, rounds: int, way: type[Extended]
) -> tuple[list[Trajectory], dict[str, float]]:
    """Draw the members of one group; returns them and the seconds of each part."""
    watched = way(adapter)
    sampling = Sampling(
        plan=("text", "image") * rounds, max_text_tokens=size.text_tokens, num_timesteps=10, seed=0
    )
    starts = [Start(Prompt(text=""), 0, member) for member in range(size.rows)]
    (trajectories,) = rollout(watched, starts, sampling)  # type: ignore[arg-type]
    return trajectories, watched.seconds


def parts_of(trajectory: Trajectory) -> list[Trajectory]:
    """Return one trajectory per round: what came before is given, and its own image is seen by nothing."""
    given, *drawn = trajectory.segments
    found = []
    for end in range(2, len(drawn) + 1, 2):
        *before, text, image = drawn[:end]
        own = [text, replace(image, is_context=False)]
        found.append(replace(trajectory, segments=[given, *map(as_given, before), *own]))
    return found


def learn(adapter: Any, passes: Sequence[Sequence[Trajectory]]) -> tuple[float, Tensor]:
    """Run forwards and backwards; returns the seconds and the gradient."""
    adapter.zero_grad()
    begin = time.process_time()
    for batch in passes:
        scores = adapter(batch)
        total = sum(text.sum() for text in scores.text)
        total = total + sum(velocity.square().mean() for velocity in scores.velocity)
        total.backward()
    seconds = time.process_time() - begin
    found = [p.grad.flatten() for p in adapter.net.parameters() if p.grad is not None]
    return seconds, torch.cat(found)


def apart(one: Tensor, other: Tensor) -> float:
    """Return a relative distance."""
    return float((one - other).norm() / other.norm())


def contents(segment: Segment) -> Tensor:
    """Return the words or the latent of a segment."""
    return segment.latent if isinstance(segment, ImageSegment) else segment.tokens.double()


def require_same(what: str, error: float) -> None:
    """Refuse to compare the speed of different work.

    Raises:
        RuntimeError: when the two sides differ by more than rounding.
    """
    if error > TOLERANCE:
        raise RuntimeError(f"{what} differ by {error:.1e}: the two ways do not do the same work.")


def measure(adapter: Any, size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Return the seconds of the parts of each way to draw, and of each way to learn."""
    found: dict[str, dict[str, float]] = {}
    drawn: dict[str, list[Trajectory]] = {}
    for name, way in WAYS.items():
        drawn[name], found[name] = draw(adapter, size, rounds, way)
    together = drawn["extended"]
    for others in (drawn["per round"], drawn["per segment"]):
        for one, other in zip(together, others, strict=True):
            for a, b in zip(one.segments, other.segments, strict=True):
                require_same("Rollouts", apart(contents(a), contents(b)))
    alone = list(zip(*map(parts_of, together), strict=True))
    update: dict[str, float] = {}
    for _ in range(2):  # the first to run also pays for new memory
        packed, gradient = learn(adapter, [together])
        again, other = learn(adapter, alone)
        require_same("Gradients", apart(other, gradient))
        for name, seconds in (("packed", packed), ("per round", again)):
            update[name] = min(seconds, update.get(name, seconds))
    return found | {"update": update}


def summary(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return medians, whole rollouts, and ratios to what the trainer does."""
    found = {
        name: {part: median(run[name][part] for run in runs) for part in runs[0][name]}
        for name in runs[0]
    }
    update = found.pop("update")
    whole = {name: sum(parts.values()) for name, parts in found.items()}
    ratios = {
        name: {
            "rollout": whole[name] / whole["extended"],
            "contexts": found[name]["contexts"] / found["extended"]["contexts"],
        }
        for name in found
        if name != "extended"
    }
    return {
        "rollout_s": {name: {**parts, "whole": whole[name]} for name, parts in found.items()},
        "update_s": update,
        "ratios": {**ratios, "update": update["per round"] / update["packed"]},
    }


def machine() -> dict[str, Any]:
    """Return what was measured on, and the state of the code."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True)  # noqa: S603 - our own
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def report(name: str, size: Size, found: dict[int, dict[str, Any]]) -> None:
    """Print seconds and ratios of one model."""
    tokens = (size.side // 2) ** 2
    title = f"{name}: {size.rows} rows, {size.text_tokens} words and {tokens} latents a round"
    table = Table(title=f"{title}, process seconds", title_justify="left")
    columns = [f"{number} round{'s' * (number > 1)}" for number in found]
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for way in WAYS:
        for part in (*PARTS, "whole"):
            seconds = [each["rollout_s"][way][part] for each in found.values()]
            table.add_row(f"rollout, {way}: {part}", *(f"{s:.2f}" for s in seconds))
        table.add_section()
    for way in ("packed", "per round"):
        seconds = [each["update_s"][way] for each in found.values()]
        table.add_row(f"update, {way}", *(f"{s:.2f}" for s in seconds))
    table.add_section()
    for way in ("per round", "per segment"):
        for part in ("rollout", "contexts"):
            ratios = [each["ratios"][way][part] for each in found.values()]
            table.add_row(f"{part}: {way} / extended", *(f"{r:.2f}" for r in ratios))
    ratios = [each["ratios"]["update"] for each in found.values()]
    table.add_row("update: per round / packed", *(f"{r:.2f}" for r in ratios))
    Console(width=110).print(table)


def main() -> None:
    """Measure the models in turn and print seconds and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, nargs="+", default=[*MODELS])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=48)
    parser.add_argument("--side", type=int, default=16, help="latent pixels; a token has 2 x 2")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = replace(SIZES[-1], rows=args.rows, text_tokens=args.text_tokens, side=args.side)
    record: dict[str, Any] = {"machine": machine(), "size": asdict(size)}
    for name in args.model:
        torch.manual_seed(0)
        adapter = MODELS[name](size, compiled=False)
        adapter.tokenizer = Words()
        measure(adapter, replace(size, text_tokens=4), 1)  # warms up
        found = {
            rounds: summary([measure(adapter, size, rounds) for _ in range(args.repeats)])
            for rounds in ROUNDS
        }
        report(name, size, found)
        record[name] = found
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
