"""Recorded groups as plain data: what each member was told, thought and drew, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a rollout that has several."""

    turn: str | None
    """What the user said; ``None`` = nothing."""
    reasoning: str
    image: Path | None
    """``None`` of words behind the last image."""
    reward: float | None
    """Combined; ``None`` = not scored."""
    advantage: float | None


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rollout of a group."""

    member: int
    reasoning: str
    rewards: Mapping[str, float | None]
    """By name; ``None`` = not scorable."""
    reward: float | None
    """Combined."""
    advantage: float | None
    stopped: bool
    usable: bool
    image: Path | None
    """The last one that it drew."""
    rounds: tuple[Round, ...] = ()
    """Where a rollout may be more than reasoning and an image."""
    ended: str | None = None
    """Why there are no more of them: ``plan``, ``phrase`` or ``user``; ``None`` = that was not recorded."""

    @property
    def images(self) -> tuple[Path, ...]:
        """All of them, in the order of drawing."""
        drawn = (each.image for each in self.rounds) if self.rounds else (self.image,)
        return tuple(image for image in drawn if image is not None)

    @property
    def words(self) -> tuple[str, ...]:
        """Every text, of the user and of the policy."""
        if not self.rounds:
            return (self.reasoning,)
        return tuple(text for each in self.rounds for text in (each.turn, each.reasoning) if text)


@dataclass(frozen=True, kw_only=True)
class Group:
    """What was drawn for one prompt at one time."""

    title: str
    """``train``, or ``base`` and ``trained`` of test prompts."""
    iteration: int
    prompt: str
    prompt_id: int
    size: int
    """Members drawn on all ranks; those recorded may be fewer."""
    members: tuple[Member, ...]
    input_images: tuple[Path, ...] = ()
    """Those that the prompt came with."""

    @property
    def images(self) -> tuple[Path, ...]:
        """All of them, in the order in which the page shows them."""
        return (*self.input_images, *(image for member in self.members for image in member.images))


def read_groups(lines: Sequence[str], images: Path) -> tuple[list[Group], int]:
    """Read recorded groups, and how many lines were none.

    Args:
        lines: of a file that ``RolloutRecorder`` wrote.
        images: folder of those that they name.
    """
    found = [group for line in lines if (group := _group(line, images))]
    return found, len(lines) - len(found)


def _group(line: str, images: Path) -> Group | None:
    try:
        record = json.loads(line)
        return Group(
            title=str(record["title"]),
            iteration=int(record["iteration"]),
            prompt=str(record["prompt"]),
            prompt_id=int(record["prompt_id"]),
            size=int(record["size"]),
            members=tuple(_member(each, images) for each in record["members"]),
            input_images=tuple(_image(name, images) for name in record.get("input_images", ())),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _member(record: dict[str, Any], images: Path) -> Member:
    rounds = record.get("rounds", ())
    if record.get("earlier"):  # images of rounds as they were recorded first, without their words
        first = [{"reasoning": "", "image": name} for name in record["earlier"]]
        rounds = [*first, {"reasoning": record["reasoning"], "image": record["image"]}]
    return Member(
        member=int(record["member"]),
        reasoning=str(record["reasoning"]),
        rewards={str(name): _number(value) for name, value in dict(record["rewards"]).items()},
        reward=_number(record["reward"]),
        advantage=_number(record["advantage"]),
        stopped=bool(record["stopped"]),
        usable=bool(record["usable"]),
        image=_image(record["image"], images) if record["image"] else None,
        rounds=tuple(_round(each, images) for each in rounds),
        ended=str(record["ended"]) if record.get("ended") else None,
    )


def _round(record: dict[str, Any], images: Path) -> Round:
    return Round(
        turn=None if record.get("turn") is None else str(record["turn"]),
        reasoning=str(record["reasoning"]),
        image=_image(record["image"], images) if record["image"] else None,
        reward=_number(record.get("reward")),
        advantage=_number(record.get("advantage")),
    )


def _image(name: str, images: Path) -> Path:
    return images / Path(name).name  # alone: a line that was tampered with leads nowhere else


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
