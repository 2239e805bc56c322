"""Trajectories round by round, as they are recorded and shown: words, images, and how they ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.rollout import decode_images
from lightning_unigrpo.types import (
    ImageSegment,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

Ending: TypeAlias = Literal["plan", "phrase", "user"]
"""Why a trajectory went no further: it was done, a text said ``sampling.stop_phrase``, or the user had
nothing left to say."""


def has_rounds(sampling: Sampling) -> bool:
    """Whether a trajectory may be more than texts, and an image behind them.

    Example:
        >>> has_rounds(Sampling()), has_rounds(Sampling(rounds=2))
        (False, True)
    """
    return "turn" in sampling.kinds or "image" in sampling.kinds[:-1]


def may_end_early(sampling: Sampling) -> bool:
    """Whether trajectories may differ in how many images they have."""
    speaks = sampling.stop_phrase is not None or "turn" in sampling.kinds
    return speaks and sampling.num_images > 0


def split_rounds(trajectory: Trajectory) -> list[list[Segment]]:
    """Return what stands behind the prompt, round by round: an image ends one; the last may lack it."""
    found: list[list[Segment]] = [[]]
    for segment in _behind_prompt(trajectory):
        found[-1].append(segment)
        if not isinstance(segment, TextSegment):
            found.append([])
    return [each for each in found if each]


def words_by_round(trajectory: Trajectory) -> list[dict[str, str]]:
    """Return what was said in each round: ``turn``, by the user, where there is one, and ``reasoning``."""
    found = []
    for segments in split_rounds(trajectory):
        texts = [each for each in segments if isinstance(each, TextSegment)]
        said = [text.words for text in texts if not text.is_sampled]
        thought = "\n".join(text.words for text in texts if text.is_sampled)
        found.append(({"turn": "\n".join(said)} if said else {}) | {"reasoning": thought})
    return found


def ending(trajectory: Trajectory, sampling: Sampling) -> Ending:
    """Return why a trajectory went no further.

    Args:
        trajectory: as it was drawn.
        sampling: that it was drawn with.
    """
    behind = _behind_prompt(trajectory)
    if len(behind) == len(sampling.steps):
        return "plan"
    phrase, last = sampling.stop_phrase, behind[-1] if behind else None
    said_it = phrase is not None and isinstance(last, TextSegment) and phrase in last.words
    # A text of the first round ends nothing, whatever it says.
    return "phrase" if said_it and num_images(trajectory) else "user"


def transcript(trajectory: Trajectory) -> list[str]:
    """Return all words behind the prompt, text by text; those of the user are marked."""
    texts = [s for s in _behind_prompt(trajectory) if isinstance(s, TextSegment)]
    said = [text.words if text.is_sampled else f"[user] {text.words}" for text in texts]
    return said or [trajectory.completion]


def only_images(trajectory: Trajectory, device: torch.device | str) -> Trajectory:
    """Return a trajectory of the images that were drawn and nothing else, with memory of its own."""
    images: list[Segment] = []
    for segment in _behind_prompt(trajectory):
        # copy: a row of a chunk keeps the whole of it.
        if isinstance(segment, ImageSegment):
            latent = segment.latent.detach().to(device, copy=True)
            images.append(ImageSegment(latent=latent, grid=segment.grid))
        elif isinstance(segment, TokenImageSegment):
            tokens = segment.tokens.to(device, copy=True)
            images.append(TokenImageSegment(tokens=tokens, grid=segment.grid))
    return replace(trajectory, segments=images, num_given=0, image=None, rounds=[])


@torch.no_grad()
def with_rounds(adapter: Adapter, trajectory: Trajectory) -> Trajectory:
    """Return a trajectory with every image that it drew in ``rounds``; the one given stays as it is.

    Decoders are frozen and whole on every rank, so a rank may call this alone.

    Args:
        adapter: decodes images of rounds that were not scored; a single one is not decoded again.
        trajectory: on the device of the adapter.
    """
    if trajectory.rounds or num_images(trajectory) < 2:
        return trajectory
    copy = replace(trajectory, rounds=[])
    decode_images(adapter, [copy], every=True)
    return copy


def strip(trajectory: Trajectory) -> Tensor | None:
    """Return the images of ``rounds`` side by side with a white line between them, else the last image.

    Args:
        trajectory: whose images are equally large: its prompt asks for the size.

    Returns:
        ``[3, H, W']`` float32 in [0, 1]; ``None`` = nothing was drawn.
    """
    if len(trajectory.rounds) < 2:
        return trajectory.image
    first, *others = (each.image for each in trajectory.rounds)
    line = torch.ones_like(first[:, :, : max(1, first.shape[2] // 32)])
    return torch.cat([first, *(part for image in others for part in (line, image))], 2)


def num_images(trajectory: Trajectory) -> int:
    """Return how many images were drawn."""
    return sum(map(_is_image, _behind_prompt(trajectory)))


def _behind_prompt(trajectory: Trajectory) -> list[Segment]:
    return trajectory.segments[trajectory.num_given :]


def _is_image(segment: Segment) -> bool:
    return not isinstance(segment, TextSegment)
