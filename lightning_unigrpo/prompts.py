"""Make prompt files: GenEval-style requests with their metadata, and requests to write words.

    python -m lightning_unigrpo.prompts geneval --num 5000 --exclude geneval_eval.jsonl --out train.jsonl
    python -m lightning_unigrpo.prompts ocr --num 1000 --out ocr.jsonl

The same seed gives the same file. Prompts of ``--exclude`` files are left out, so that an evaluation on them
stays one of requests that were never trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_unigrpo.data import read_prompts
from lightning_unigrpo.rewards.coco import NAMES
from lightning_unigrpo.rewards.geneval import COLORS

MIX = {"position": 0.7, "counting": 0.5, "color_attr": 0.3, "colors": 0.1, "two_object": 0.1}
"""How often each task comes up, relative to each other: flow_grpo's training mix."""
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
PATIENCE = 200
"""Draws without a new prompt after which there are taken to be no more."""

SCENES = (
    "a wooden shop sign that reads {}",
    "a chalkboard with {} written in large letters",
    "a neon light above a bar that spells {}",
    "a birthday cake with {} in icing",
    "a coffee mug printed with {}",
    "a city poster that says {}",
    "a T-shirt with {} across the chest",
    "a book cover whose title is {}",
    "a road sign that says {}",
    "a banner over a stage with the words {}",
    "a sticker on a laptop that reads {}",
    "a stone carved with {}",
)
FIRST = (
    "open,fresh,quiet,golden,happy,north,early,second,bright,little,grand,silver,wild,last,free,green,winter,"
    "slow,honest,blue"
)
SECOND = (
    "bakery,garden,river,market,station,harbour,music,coffee,summer,library,mountain,letters,kitchen,travel,"
    "evening,games,school,forest,bicycle,theatre"
)


def article(words: str) -> str:
    """Put "a" or "an" before words, by their first letter.

    Example:
        >>> article("orange cup"), article("cup")
        ('an orange cup', 'a cup')
    """
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """Return the plural by the benchmark's rule, which knows no exceptions.

    Example:
        >>> plural("mouse"), plural("bus")
        ('mouses', 'buses')
    """
    return name + ("es" if name.endswith("s") else "s")


def render(tag: str, include: Sequence[Mapping[str, Any]]) -> str:
    """Return the request in words for a GenEval record.

    Source: GenEval, https://github.com/djghosh13/geneval, ``prompts/create_prompts.py``, facts alone.

    Args:
        tag: the task.
        include: its clauses.

    Example:
        >>> render("counting", [{"class": "bus", "count": 3}])
        'a photo of three buses'
    """
    things = [article(" ".join(filter(None, (c.get("color"), c["class"])))) for c in include]
    if tag == "counting":
        (clause,) = include
        return f"a photo of {NUMBERS[clause['count']]} {plural(clause['class'])}"
    if tag == "position":
        relation, other = include[1]["position"]
        return f"a photo of {things[1]} {relation} {things[other]}"
    return f"a photo of {' and '.join(things)}"


def draw_record(tag: str, rng: np.random.Generator) -> dict[str, Any]:
    """Draw one GenEval record of a task.

    Colours are never asked of a person; two colours of one prompt differ, and so do two classes.

    Raises:
        ValueError: for an unknown task.
    """

    def names(count: int, *, colored: bool = False) -> list[str]:
        known = [name for name in NAMES if not (colored and name == "person")]
        return [known[i] for i in rng.choice(len(known), count, replace=False)]

    def colors(count: int) -> list[str]:
        return [COLORS[i] for i in rng.choice(len(COLORS), count, replace=False)]

    exclude = None
    if tag in ("single_object", "two_object"):
        include = [{"class": n, "count": 1} for n in names(1 if tag == "single_object" else 2)]
    elif tag == "counting":
        (name,), count = names(1), int(rng.integers(2, 5))
        include = [{"class": name, "count": count}]
        exclude = [{"class": name, "count": count + 1}]
    elif tag in ("colors", "color_attr"):
        count = 1 if tag == "colors" else 2
        pairs = zip(names(count, colored=True), colors(count), strict=True)
        include = [{"class": name, "count": 1, "color": color} for name, color in pairs]
    elif tag == "position":
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        first, second = names(2)
        include = [
            {"class": first, "count": 1},
            {"class": second, "count": 1, "position": [relation, 0]},
        ]
    else:
        raise ValueError(f"{tag!r} is no task of GenEval.")
    record = {"tag": tag, "include": include, "prompt": render(tag, include)}
    return record | ({"exclude": exclude} if exclude else {})


def geneval_records(
    num: int,
    *,
    seed: int = 0,
    exclude: Collection[str] = (),
    mix: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Draw GenEval-style records, each prompt once.

    Args:
        num: how many.
        seed: of the draws.
        exclude: prompts that must not come up, in any case of letters.
        mix: task to how often it comes up; ``None`` = flow_grpo's.

    Raises:
        ValueError: when there are not so many, or for a mix of nothing.
    """
    mix = MIX if mix is None else mix
    if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise ValueError(
            f"mix is {dict(mix)}; give weights of tasks, 0 or more, one of them above."
        )
    rng, weights = np.random.default_rng(seed), np.array([*mix.values()])

    def draws() -> Iterator[dict[str, Any]]:
        while True:
            yield draw_record([*mix][int(rng.choice(len(mix), p=weights / weights.sum()))], rng)

    return _distinct(draws(), num, exclude)


def ocr_records(num: int, *, seed: int = 0, exclude: Collection[str] = ()) -> list[dict[str, Any]]:
    """Draw requests for pictures with words in them; ``text`` is what an OCR reward looks for.

    Args:
        num: how many.
        seed: of the draws.
        exclude: prompts that must not come up.

    Raises:
        ValueError: when there are not so many.
    """
    rng = np.random.default_rng(seed)
    first, second = FIRST.split(","), SECOND.split(",")

    def draws() -> Iterator[dict[str, Any]]:
        while True:
            words = [first[rng.integers(len(first))], second[rng.integers(len(second))]]
            if rng.random() < 0.3:
                words.append(str(rng.integers(10, 2100)))
            text = " ".join(words).title()
            scene = SCENES[int(rng.integers(len(SCENES)))].format(f'"{text}"')
            yield {"prompt": scene[0].upper() + scene[1:], "text": text}

    return _distinct(draws(), num, exclude)


def _distinct(
    draws: Iterator[dict[str, Any]], num: int, exclude: Collection[str]
) -> list[dict[str, Any]]:
    known = {prompt.casefold() for prompt in exclude}
    found: list[dict[str, Any]] = []
    misses = 0
    while len(found) < num:
        record = next(draws)
        if record["prompt"].casefold() in known:
            misses += 1
            if misses > PATIENCE:
                raise ValueError(
                    f"Only {len(found)} of {num} different prompts came up; ask for fewer."
                )
            continue
        misses = 0
        known.add(record["prompt"].casefold())
        found.append(record)
    return found


def main(args: Sequence[str] | None = None) -> Path:
    """Write a file of prompts; returns its path."""
    parser = argparse.ArgumentParser(prog="python -m lightning_unigrpo.prompts")
    parser.add_argument("kind", choices=["geneval", "ocr"])
    parser.add_argument("--num", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--exclude", type=Path, nargs="*", default=[], help="files of prompts to leave out"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(args)
    left_out = [p.text for path in given.exclude for p in read_prompts(path, key="--exclude")]
    make = geneval_records if given.kind == "geneval" else ocr_records
    records = make(given.num, seed=given.seed, exclude=left_out)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(records)} prompts")  # noqa: T201
    return Path(given.out)


if __name__ == "__main__":
    main()
