"""Checks of who sees whom in a packed pass: one segment is changed, everything else must stay to the bit.

The shapes are the same before and after, so that rounding is too: the bound is 0. What is changed is the
trajectory in which the user speaks, beside another of its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_unigrpo.testing.report import Finding, rule
from lightning_unigrpo.testing.subject import Subject, short_list
from lightning_unigrpo.types import (
    ImageSegment,
    Scores,
    Segment,
    TextSegment,
    Trajectory,
)

Place: TypeAlias = tuple[int, int, int]
"""Trajectory, segment, and step of a window (0 of texts and codes)."""


@rule(
    "what later segments hold changes no score before them",
    mend="no row sees one behind it; positions and padding follow from lengths alone",
    bound=0,
    per_round=True,
)
def later_rounds(s: Subject) -> Finding:
    """Scores that change when everything from some segment on is replaced, its length kept."""
    wrong: list[str] = []
    trajectory, before = s.trajectories[1], scored(s)
    first = trajectory.segments
    for start in range(trajectory.num_given + 1, len(first)):
        found = changed(before, scored(s, [*first[:start], *s.others(first, start)]))
        leaks = (place for place in found if place[0] or place[1] < start)
        wrong += named(leaks, f"segments from {start} on")
    return Finding(len(wrong), short_list(wrong))


@rule(
    "a noisy state gives the velocity of its step, and nothing else sees it",
    mend="hide each copy from the others, from later segments, and from other trajectories",
    bound=0,
    per_round=True,
)
def noisy_copies(s: Subject) -> Finding | None:
    """Velocities that do not follow a state of the window, and other scores that do."""
    if not s.is_flow:
        return None
    wrong: list[str] = []
    first, before = s.trajectories[1].segments, scored(s)
    for number, image in enumerate(first):
        if not isinstance(image, ImageSegment) or image.states is None:
            continue
        for step in range(len(image.states)):
            states = image.states.clone()
            states[step] += 1
            segments = exchanged(first, number, replace(image, states=states))
            found = changed(before, scored(s, segments))
            # The last state is an action: the network never reads it.
            own = {(0, number, step)} if step + 1 < len(states) else set()
            wrong += named(found ^ own, f"state {step} of segment {number}")
    return Finding(len(wrong), short_list(wrong))


@rule(
    "a drawn image that is looked at is seen by the next round, and by nothing before it",
    mend="pack the clean image, or its views, behind its noisy copies, which see themselves only",
    bound=0,
)
def clean_image(s: Subject) -> Finding | None:
    """Rounds that do not follow the image before them, and earlier scores that do."""
    if s.rounds < 2:
        return None
    wrong: list[str] = []
    first, before = s.trajectories[1].segments, scored(s)
    for number in actions(first):
        image = first[number]
        if isinstance(image, TextSegment) or not image.is_context:
            continue
        other = exchanged(first, number, s.other_image(first, number))
        found = changed(before, scored(s, other))
        later = [n for n in actions(first) if n > number]
        if not any(not b and n in later[:2] for b, n, _ in found):
            wrong.append(f"segment {number}: the next round is the same")
        # Of codes the image's own scores follow: they are what was drawn.
        own = number + s.is_flow
        leaks = (place for place in found if place[0] or place[1] < own)
        wrong += named(leaks, f"segment {number}")
    return Finding(len(wrong), short_list(wrong))


def actions(segments: Sequence[Segment]) -> list[int]:
    """Return where the sampled segments stand."""
    return [number for number, segment in enumerate(segments) if segment.is_sampled]


def exchanged(segments: Sequence[Segment], number: int, segment: Segment) -> list[Segment]:
    """Return segments of which one is another."""
    return [*segments[:number], segment, *segments[number + 1 :]]


def scored(s: Subject, segments: Sequence[Segment] | None = None) -> dict[Place, Tensor]:
    """Score two trajectories of one prompt, the one that is changed with other segments."""
    second, first = s.trajectories[:2]
    if segments is not None:
        first = replace(first, segments=[*segments])
    return dict(by_place([first, second], s.adapter([first, second])))


def changed(before: dict[Place, Tensor], after: dict[Place, Tensor]) -> set[Place]:
    """Return where two scores of the same places differ by a bit or more."""
    return {place for place, value in before.items() if not torch.equal(value, after[place])}


def by_place(trajectories: Sequence[Trajectory], scores: Scores) -> Iterator[tuple[Place, Tensor]]:
    """Walk what scores say of each step of each sampled segment."""
    texts = zip(scores.text, scores.entropy, strict=True)
    velocities, codes = iter(scores.velocity), iter(scores.image_tokens)
    for b, trajectory in enumerate(trajectories):
        for number in actions(trajectory.segments):
            segment = trajectory.segments[number]
            if isinstance(segment, TextSegment):
                yield (b, number, 0), torch.stack(next(texts))
            elif isinstance(segment, ImageSegment):
                for step, velocity in enumerate(next(velocities)):
                    yield (b, number, step), velocity
            else:
                yield (b, number, 0), next(codes)


def named(places: Iterable[Place], what: str) -> list[str]:
    """Say of which places something is wrong."""
    return [f"{what}: trajectory {b} segment {n} step {k}" for b, n, k in sorted(places)]
