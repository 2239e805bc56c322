"""Groups as they lie on the disk: a line of JSON for each, and the images that it names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.callbacks.base import Experience
from lightning_unigrpo.callbacks.grouping import penalised_rounds
from lightning_unigrpo.callbacks.rounds import (
    ending,
    has_rounds,
    num_images,
    only_images,
    split_rounds,
    with_rounds,
    words_by_round,
)
from lightning_unigrpo.config import Objective, Sampling
from lightning_unigrpo.reward import combine, convert_images
from lightning_unigrpo.types import Prompt, Trajectory, sampled

SMALL = 128
"""Images of at most this many pixels a side are kept as PNG, larger ones as JPEG: at 1024 pixels it is
written in 4 ms, WebP in 125, and a thumbnail is made without reading all of it."""


class Undecoded(NamedTuple):
    """Images of earlier rounds that nobody has looked at yet."""

    name: str
    """What the files of the member begin with."""
    rounds: list[dict[str, Any]]
    """Of the member's record, still without these images."""
    images: Trajectory
    """Nothing else."""


@dataclass
class Record:
    """One group as it is written: plain data, but for what :meth:`finish` is left to do."""

    name: str
    """What the files of the group begin with."""
    line: dict[str, Any]
    prompt: Prompt
    pictures: dict[str, Image] = field(default_factory=dict)
    undecoded: list[Undecoded] = field(default_factory=list)

    def add(self, name: str, pixels: Tensor) -> str:
        """Take an image ``[3, H, W]`` and return the name of its file."""
        (picture,) = convert_images([pixels.detach().float()], "pil")
        file = f"{name}.png" if max(picture.size) <= SMALL else f"{name}.jpg"
        self.pictures[file] = picture
        return file

    def add_rounds(self, name: str, rounds: list[dict[str, Any]], drawn: Trajectory) -> None:
        """Take the images of all rounds but the last, and name them in the record."""
        for number, (each, done) in enumerate(zip(rounds, drawn.rounds[:-1], strict=False), 1):
            each["image"] = self.add(f"{name}-round{number}", done.image)

    def finish(self, adapter: Adapter, device: torch.device) -> None:
        """Add input images, and those of earlier rounds that were not scored.

        Args:
            adapter: decodes them.
            device: where its decoder is.
        """
        for number, pixels in enumerate(self.prompt.images, 1):
            file = self.add(f"{self.name}-input{number}", pixels)
            self.line.setdefault("input_images", []).append(file)
        for name, rounds, images in self.undecoded:
            self.add_rounds(name, rounds, with_rounds(adapter, only_images(images, device)))
        self.undecoded = []


def record(
    group: Sequence[Trajectory],
    *,
    title: str,
    iteration: int,
    size: int,
    sampling: Sampling,
    worth: Mapping[tuple[int, int], Sequence[float]],
) -> Record:
    """Turn the members of one group into what is written of them.

    Args:
        group: trajectories of one prompt, at least one.
        title: ``train``, ``base`` or ``trained``.
        iteration: the group was drawn in, or the number of them before a test.
        size: members of the whole group, on all ranks.
        sampling: that they were drawn with.
        worth: of their rounds, as :func:`worth_by_round` returns it.
    """
    first = group[0]
    line: dict[str, Any] = {
        "title": title,
        "iteration": iteration,
        "group": first.group,
        "prompt_id": first.prompt.id,
        "prompt": first.prompt.text,
        "size": size,
        "members": [],
    }
    found = Record(f"{title}-{iteration:06d}-{first.group}", line, first.prompt)
    for trajectory in group:
        name = f"{found.name}-{trajectory.member}"
        member = _member(trajectory)
        if trajectory.image is not None:
            member["image"] = found.add(name, trajectory.image)
        if has_rounds(sampling):
            rewards = worth.get((trajectory.group, trajectory.member), ())
            member |= {
                "rounds": _rounds(trajectory, rewards),
                "ended": ending(trajectory, sampling),
            }
            _place_images(found, name, member, trajectory)
        line["members"].append(member)
    return found


def worth_by_round(
    experience: Experience, objective: Objective
) -> dict[tuple[int, int], list[float]]:
    """Return the combined reward of each image, by group and member; empty where only the last is scored."""
    if experience.round_rewards is None:
        return {}
    rewards = penalised_rounds(experience, objective.truncation_reward)
    rows = combine(rewards, experience.reward_weights).tolist()
    return {(t.group, t.member): row for t, row in zip(experience.trajectories, rows, strict=True)}


def _rounds(trajectory: Trajectory, rewards: Sequence[float]) -> list[dict[str, Any]]:
    worth, words = dict(enumerate(rewards)), words_by_round(trajectory)
    return [
        {
            **said,
            "image": None,
            "reward": _finite(worth.get(number, math.nan)),
            "advantage": next((_finite(s.advantage) for s in segments if s.is_sampled), None),
        }
        for number, (said, segments) in enumerate(zip(words, split_rounds(trajectory), strict=True))
    ]


def _place_images(found: Record, name: str, member: dict[str, Any], trajectory: Trajectory) -> None:
    """Name the images of rounds; those that were not decoded wait: any iteration may be the last."""
    count, rounds = num_images(trajectory), member["rounds"]
    if count:
        rounds[count - 1]["image"] = member["image"]
    if trajectory.rounds:
        found.add_rounds(name, rounds, trajectory)
    elif count > 1:
        found.undecoded.append(Undecoded(name, rounds, only_images(trajectory, "cpu")))


def _member(trajectory: Trajectory) -> dict[str, Any]:
    segment = next((segment for _, segment in sampled([trajectory])), None)
    return {
        "member": trajectory.member,
        "reasoning": trajectory.completion,
        "rewards": {name: _finite(value) for name, value in trajectory.rewards.items()},
        "reward": _finite(trajectory.reward),
        "advantage": None if segment is None else _finite(segment.advantage),
        "stopped": trajectory.stopped,
        "usable": trajectory.usable,
        "image": None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def write_records(folder: Path, name: str, records: Sequence[Record]) -> None:
    """Append groups to a file of JSON lines, after their images: a line never names one that is missing.

    Args:
        folder: ``rollouts`` of a run; made when it is missing.
        name: of the file in it.
        records: may be empty.
    """
    if not records:
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for each in records:
        for file, picture in each.pictures.items():
            picture.save(folder / "images" / file, quality=90)  # which PNG does not have
    with (folder / name).open("a", encoding="ascii") as table:
        table.writelines(json.dumps(each.line) + "\n" for each in records)


def trim(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines from a file of JSON lines, those that a killed writer left unfinished among them.

    Args:
        path: the file, which may be missing.
        keep: says of a line whether it stays.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in lines if _stays(line, keep)), encoding="ascii")
    part.replace(path)


def _stays(line: str, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(json.loads(line))
    except ValueError:
        return False
