"""Groups in the form in which the page shows them, within what one page can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.utils import htmlsafe_json_dumps

from lightning_unigrpo.report.read import Run
from lightning_unigrpo.report.rollouts import Group, Member
from lightning_unigrpo.report.thumbnails import Thumbnails, make

IMAGES, SAMPLE_IMAGES, WORDS = 12_000_000, 1_500_000, 3_000_000
"""Bytes for images of groups, those of test prompts, and words: with charts and the rest a page
stays below 20 MB, which browsers open at once and mail still carries."""
ENDINGS = {"phrase": "ended with its stop phrase", "user": "ended by the user"}
"""What is said of a rollout that has fewer rounds than it might."""
MAX_MEMBERS = 10_000
"""More recorded rollouts are thinned evenly: below the smallest thumbnails nothing can be seen."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Groups in the form in which the page's script reads them, and what was left out."""

    rows: list[dict[str, Any]]
    thumbnails: Thumbnails
    thinned: bool = False
    has_turns: bool = False
    """Whether the user speaks in between."""
    shortened: int | None = None
    """Characters to which prompts and reasoning were cut; ``None`` = they were not."""


def gather_groups(run: Run) -> Shown:
    """Return the groups of training, within what a page can hold."""
    chosen = thin(run.groups)
    texts = [text for group in chosen for member in group.members for text in member.words]
    limit = room_for_words(texts + [group.prompt for group in chosen])
    found = make([image for group in chosen for image in group.images], IMAGES)
    uris = iter(found.uris)
    rows = [_row(group, uris, limit) for group in chosen]
    rounds = (each for group in chosen for member in group.members for each in member.rounds)
    return Shown(
        rows=rows,
        thumbnails=found,
        thinned=len(chosen) < len(run.groups),
        has_turns=any(each.turn for each in rounds),
        shortened=limit,
    )


def gather_samples(run: Run) -> Shown:
    """Return the test prompts, with a member for each time they were drawn."""
    by_prompt: dict[int, list[tuple[str, Group]]] = {}
    for title, groups in run.samples.items():
        for group in groups:
            by_prompt.setdefault(group.prompt_id, []).append((title, group))
    images: list[Path] = []
    for each in by_prompt.values():
        images += each[0][1].input_images
        images += [image for _, group in each for m in group.members for image in m.images]
    found = make(images, SAMPLE_IMAGES)
    uris = iter(found.uris)
    rows = [
        {
            "prompt": each[0][1].prompt,
            "inputs": [next(uris) for _ in each[0][1].input_images],
            "members": [
                {"title": title, **_entry(m, uris, None)} for title, g in each for m in g.members
            ],
        }
        for each in by_prompt.values()
    ]
    return Shown(rows=rows, thumbnails=found)


def thin(groups: Sequence[Group], most: int = MAX_MEMBERS) -> Sequence[Group]:
    """Return evenly spaced groups, the first and the last too, with about ``most`` images or members."""
    total = sum(max(len(group.members), len(group.images)) for group in groups)
    if total <= most:
        return groups
    keep = max(2, len(groups) * most // total)
    return [groups[round(i * (len(groups) - 1) / (keep - 1))] for i in range(keep)]


def room_for_words(texts: Sequence[str]) -> int | None:
    """Return how many characters of each text a page can hold; ``None`` = all."""
    size = sum(
        len(htmlsafe_json_dumps(text, ensure_ascii=False).encode(errors="replace"))
        for text in texts
    )
    letters = sum(map(len, texts))
    return None if size <= WORDS else max(1, WORDS * letters // (size * len(texts)))


def _row(group: Group, uris: Iterator[str | None], limit: int | None) -> dict[str, Any]:
    return {
        "iteration": group.iteration,
        "prompt": _cut(group.prompt, limit),
        "size": group.size,
        "inputs": [next(uris) for _ in group.input_images],
        "members": [_entry(member, uris, limit) for member in group.members],
    }


def _entry(member: Member, uris: Iterator[str | None], limit: int | None) -> dict[str, Any]:
    return {
        "member": member.member,
        "reasoning": "" if member.rounds else _cut(member.reasoning, limit),
        "rewards": {name: number(value, 3) for name, value in member.rewards.items()},
        "reward": number(member.reward, 3),
        "advantage": _signed(member.advantage),
        "stopped": member.stopped,
        "usable": member.usable,
        "drawn": member.image is not None,
        "image": next(uris) if member.image and not member.rounds else None,
        "ended": ENDINGS.get(member.ended or ""),
        "rounds": _rounds(member, uris, limit),
    }


def _rounds(member: Member, uris: Iterator[str | None], limit: int | None) -> list[dict[str, Any]]:
    differ = len({each.advantage for each in member.rounds} - {None}) > 1
    return [
        {
            "turn": each.turn and _cut(each.turn, limit),
            "reasoning": _cut(each.reasoning, limit),
            "drawn": each.image is not None,
            "image": next(uris) if each.image else None,
            "reward": None if each.reward is None else number(each.reward, 3),
            "advantage": _signed(each.advantage) if differ else None,
        }
        for each in member.rounds
    ]


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.2f}"


def _cut(text: str, limit: int | None) -> str:
    return text if limit is None or len(text) <= limit else f"{text[:limit]}…"


def number(value: float | None, digits: int = 4) -> str:
    """Return a value as it is read, with so many significant digits.

    Example:
        >>> number(0.35465106), number(150.0), number(1.43e-06, 2), number(None)
        ('0.3547', '150', '1.4e-06', '–')
    """
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}g}"


def change(value: float) -> str:
    """Return a difference with its sign."""
    return "–" if math.isnan(value) else f"{value:+.4g}"
