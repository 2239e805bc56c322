"""GenEval's rules: are the objects of a prompt there, as many, in their colours and places?

The scorer knows boxes and masks, not the networks that find them: see :mod:`~.detection`. Two readings of
the same boxes:

* the *official* verdict of the benchmark: right or wrong, where more objects than asked for are right unless
  the prompt excludes them;
* the *partial* score that flow_grpo trains with: the mean over a prompt's demands of how nearly each is met,
  where more objects than asked for count as wrong (``strict``).

Source: GenEval, https://arxiv.org/abs/2310.11513, and https://github.com/djghosh13/geneval; the partial score
of https://github.com/yifan123/reward-server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Scores that an object must exceed; the second where the prompt asks for a number."""
MOST_OBJECTS = 16
"""Of a class, the best ones."""
GAP = 0.1
"""Share of both sizes that an offset must exceed to be one."""


VALUES = ("partial", "strict", "correct")
"""What a rollout's score may be."""


class Detection(NamedTuple):
    """An object that was found."""

    box: tuple[float, float, float, float]
    """``x0, y0, x1, y1`` in pixels."""
    score: float
    """In [0, 1]."""
    mask: Tensor | None = None
    """``[H, W]`` bool, its pixels."""


Detections: TypeAlias = Mapping[str, Sequence[Detection]]
"""By the name of their class, in any order."""
ColorOf: TypeAlias = Callable[[str, Sequence[Detection]], Sequence[str]]
"""Name of a class and objects of it, to a colour for each."""


class Verdict(NamedTuple):
    """What GenEval says of an image."""

    correct: bool
    """The benchmark's verdict."""
    strict: bool
    """Whether every demand was met with no object too many."""
    partial: float
    """Mean over demands; see :func:`partial_score`."""
    reasons: tuple[str, ...]
    """What was wrong, in words."""


def kept(found: Detections, *, tag: str) -> dict[str, list[Detection]]:
    """Return the objects that count: above the threshold, the best first, at most 16 of a class.

    Args:
        found: all of an image.
        tag: of the prompt.

    Example:
        >>> found = {"cat": [Detection((0, 0, 9, 9), 0.5), Detection((0, 0, 9, 9), 0.95)]}
        >>> [len(kept(found, tag=tag)["cat"]) for tag in ("two_object", "counting")]
        [2, 1]
    """
    bound = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    ordered = {
        name: sorted((d for d in each if d.score > bound), key=lambda d: -d.score)[:MOST_OBJECTS]
        for name, each in found.items()
    }
    return {name: each for name, each in ordered.items() if each}


def relations(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float]
) -> set[str]:
    """Return where box ``a`` lies relative to box ``b``: two words on a diagonal, none where they overlap.

    ``offset = centre_a - centre_b``, per axis shrunk towards 0 by ``0.1 (size_a + size_b)``, and divided by
    the length of the offset before it was shrunk; a share beyond 0.5 is a relation.

    Args:
        a: ``x0, y0, x1, y1``.
        b: likewise.

    Example:
        >>> relations((0, 0, 10, 10), (50, 0, 60, 10)), relations((0, 0, 10, 10), (1, 0, 11, 10))
        ({'left of'}, set())
    """
    ax, ay, bx, by = ((x[i] + x[i + 2]) / 2 for x in (a, b) for i in (0, 1))
    offset = (ax - bx, ay - by)
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    shares = []
    for axis, value in enumerate(offset):
        sizes = abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis])
        left = max(abs(value) - GAP * sizes, 0.0)
        shares.append(left if value >= 0 else -left)
    if all(abs(share) < 1e-3 for share in shares):
        return set()
    dx, dy = (share / length for share in shares)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def in_place(
    objects: Sequence[Detection], relation: str, others: Sequence[Detection] | None
) -> bool:
    """Whether every object stands in a relation to every other one; False when those were not found."""
    return others is not None and all(
        relation in relations(a.box, b.box) for a in objects for b in others
    )


def official(
    found: Detections, metadata: Mapping[str, Any], color_of: ColorOf
) -> tuple[bool, list[str]]:
    """Judge an image as the benchmark does.

    Clause by clause of ``include``: the ``count`` best objects of the class; all of them of the ``color``;
    and if so far all is well, each in its ``position`` to each object of an earlier clause. Then no class
    of ``exclude`` with ``count`` objects or more.

    Args:
        found: objects that count, from :func:`kept`.
        metadata: of the prompt, ``include`` and ``exclude``.
        color_of: names colours.

    Returns:
        The verdict, and what was wrong.
    """
    wrong: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        objects = found.get(name, [])[:count]
        problem = None
        if len(objects) < count:
            problem = f"expected {name} >= {count}, found {len(objects)}"
        elif clause.get("color") is not None:
            colors = list(color_of(name, objects))
            if colors.count(clause["color"]) < count:
                problem = f"expected {clause['color']} {name} >= {count}, found {colors}"
        if problem is None and clause.get("position") is not None:
            relation, index = clause["position"]
            if not in_place(objects, relation, matched[index]):
                problem = f"expected {name} {relation} object {index}"
        wrong += [problem] if problem else []
        matched.append(None if problem else objects)
    for clause in metadata.get("exclude") or ():
        name, count = clause["class"], clause["count"]
        if len(found.get(name, [])) >= count:
            wrong.append(f"expected {name} < {count}, found {len(found[name])}")
    return not wrong, wrong


def partial_score(
    found: Detections, metadata: Mapping[str, Any], color_of: ColorOf, *, compat: bool = False
) -> tuple[float, bool]:
    r"""Return how nearly an image is what its prompt asks for, and whether it is exactly that.

    The mean over all demands: of each clause with N objects asked for and n found
    ``max(0, 1 - |N - n| / N)``; of a colour ``max(0, 1 - |N - k| / N)`` with k objects of it; of a position 1
    or 0. Colour and position of a clause whose number is wrong are 0, and so is the position to a clause
    that failed.

    Deviation: flow_grpo's server does not bound the first two below (N = 1, n = 3 is -1), and counts a
    position that was looked at once more with 1, so that a wrong one earns 3/4 of the clauses. ``compat``
    does the same.

    Args:
        found: objects that count, from :func:`kept`.
        metadata: of the prompt; ``exclude`` is not read, because equality is asked for.
        color_of: names colours.
        compat: give flow_grpo's numbers.

    Returns:
        The score, in [0, 1] unless ``compat``, and the strict verdict.
    """
    demands: list[float] = []
    matched: list[Sequence[Detection] | None] = []

    def near(wanted: int, got: int) -> float:
        value = 1 - abs(wanted - got) / wanted
        return value if compat else max(0.0, value)

    for clause in metadata["include"]:
        name, count = clause["class"], clause["count"]
        objects = found.get(name, [])
        color, position = clause.get("color"), clause.get("position")
        demands.append(near(count, len(objects)))
        fits = len(objects) == count
        if not fits:
            missed = (color is not None) + (position is not None)
            demands += [0.0] * (min(missed, 1) if compat else missed)
        elif color is not None:
            right = list(color_of(name, objects)).count(color)
            demands.append(near(count, right))
            fits = right == count
            if not fits and position is not None and not compat:
                demands.append(0.0)
        if fits and position is not None:
            relation, index = position
            fits = in_place(objects, relation, matched[index])
            demands.append(float(fits))
            if compat and matched[index] is not None:
                demands += [] if fits else [1.0]
        matched.append(objects if fits else None)
    score = sum(demands) / len(demands) if demands else 0.0
    return score, all(each is not None for each in matched)


def judge(
    found: Detections, metadata: Mapping[str, Any], color_of: ColorOf, *, compat: bool = False
) -> Verdict:
    """Apply both readings to the objects of an image.

    Args:
        found: all that were found, in any order.
        metadata: of the prompt: ``tag``, ``include`` and, for numbers, ``exclude``.
        color_of: names colours.
        compat: flow_grpo's partial score, see :func:`partial_score`.

    Example:
        >>> cat = Detection((0, 0, 9, 9), 0.95)
        >>> asked = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
        >>> judge({"cat": [cat]}, asked, lambda name, objects: [])
        Verdict(correct=False, strict=False, partial=0.5, reasons=('expected cat >= 2, found 1',))
    """
    objects = kept(found, tag=metadata["tag"])
    correct, wrong = official(objects, metadata, color_of)
    score, strict = partial_score(objects, metadata, color_of, compat=compat)
    return Verdict(correct, strict, score, tuple(wrong))


def check_metadata(tag: Any, include: Any, exclude: Any) -> dict[str, Any]:
    """Return a prompt's demands.

    Raises:
        ValueError: for another form than GenEval's.
    """
    clauses = [*(include or ()), *(exclude or ())]
    if tag not in TASKS or not include or not all(isinstance(c, Mapping) for c in clauses):
        raise ValueError(
            f"GenEval needs the columns tag (one of {', '.join(TASKS)}), include and, for counting, exclude "
            f"(lists of class, count, color, position); a prompt has tag {tag!r}, include {include!r}."
        )
    for number, clause in enumerate(clauses):
        count = clause.get("count")
        position = clause.get("position")
        early = position is None or (len(position) == 2 and 0 <= position[1] < number)
        if "class" not in clause or not isinstance(count, int) or count < 1 or not early:
            raise ValueError(
                f"GenEval: clause {clause!r} needs a class, a count of 1 or more, and a position that "
                "points to an earlier clause."
            )
    return {"tag": tag, "include": include, "exclude": exclude}


@dataclass(eq=False)
class GenEval:
    """A reward: GenEval's score of the images of prompts with its metadata.

    Columns of the prompts: ``tag``, ``include`` and ``exclude``, as in the benchmark's own files.

    Numbers of the benchmark's own detector (mmdet's training of Mask2Former) differ near the thresholds: call
    yours "GenEval (transformers detector)".
    """

    detector: Callable[[Sequence[Tensor]], Sequence[Detections]] | None = None
    """``[3, H, W]`` images in [0, 1] to objects; ``None`` = :class:`~.detection.Mask2FormerDetector`."""
    colors: Callable[[Tensor, str, Sequence[Detection]], Sequence[str]] | None = None
    """An image, the name of a class and objects of it, to their colours; ``None`` =
    :class:`~.detection.CLIPColors`."""
    value: Literal["partial", "strict", "correct"] = "partial"
    """What is learned from; flow_grpo's is ``partial``, the benchmark's ``correct``."""
    compat: bool = False
    """flow_grpo's numbers for ``partial``, see :func:`partial_score`."""

    __name__ = "geneval"
    image_format = "tensor"

    def __post_init__(self) -> None:
        """Refuse a value that there is not, and take the default networks, unread."""
        if self.value not in VALUES:
            raise ValueError(
                f"model.rewards: GenEval.value is {self.value!r}; give one of {VALUES}."
            )
        from lightning_unigrpo.rewards.detection import CLIPColors, Mask2FormerDetector

        self.detector = self.detector or Mask2FormerDetector()
        self.colors = self.colors or CLIPColors()

    def prepare(self, device: torch.device) -> None:
        """Load both networks, and bring them to a device."""
        for part in self._networks():
            part.prepare(device)

    def release(self) -> None:
        """Leave the device between collections."""
        for part in self._networks():
            part.release()

    def _networks(self) -> list[Any]:
        return [part for part in (self.detector, self.colors) if hasattr(part, "prepare")]

    def __call__(
        self,
        images: Sequence[Tensor | None],
        tag: Sequence[str],
        include: Sequence[Any],
        exclude: Sequence[Any] | None = None,
    ) -> dict[str, list[float]]:
        """Score images; None is not scorable.

        Args:
            images: ``[3, H, W]`` in [0, 1].
            tag: of each prompt.
            include: likewise.
            exclude: likewise.

        Returns:
            ``score``, and all three readings beside it: ``partial``, ``strict`` and ``correct``.

        Raises:
            ValueError: for metadata of another form.
        """
        assert self.detector is not None
        rows = zip(tag, include, exclude or [None] * len(tag), strict=True)
        asked = [check_metadata(*row) for row in rows]
        drawn = [image for image in images if image is not None]
        found = iter(self.detector(drawn))
        verdicts = [
            None if image is None else self._judge(image, next(found), metadata)
            for image, metadata in zip(images, asked, strict=True)
        ]
        nan = float("nan")
        return {
            key: [nan if v is None else float(getattr(v, name)) for v in verdicts]
            for key, name in {"score": self.value, **{v: v for v in VALUES}}.items()
        }

    def _judge(self, image: Tensor, found: Detections, metadata: Mapping[str, Any]) -> Verdict:
        colors = self.colors
        assert colors is not None
        known: dict[tuple[str, int], str] = {}

        def color_of(name: str, objects: Sequence[Detection]) -> list[str]:
            # Both readings ask for the same objects: each crop is looked at once.
            new = [d for d in objects if (name, id(d)) not in known]
            for d, color in zip(new, colors(image, name, new) if new else (), strict=True):
                known[name, id(d)] = color
            return [known[name, id(d)] for d in objects]

        return judge(found, metadata, color_of, compat=self.compat)
