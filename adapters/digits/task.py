"""Arithmetic in words: the questions, the reasoning that answers them, and who may see which.

A question is ``a op b`` or ``a op b op c`` with plus and minus, every operand and every intermediate
result in 0..9, phrased in words. The reasoning is ``3+4=7;7-2=5``, one token per character; the answer is
a digit to draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np

from lightning_unigrpo.types import Prompt

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPERATORS = {"+": "plus", "-": "minus"}
PHRASINGS = (
    "what is {}",
    "draw {}",
    "compute {}",
    "show me {}",
    "please draw {}",
    "how much is {}",
    "the result of {}",
    "write {} as a digit",
    "i want {}",
    "what is {} please",
    "draw the result of {}",
    "please compute {}",
)
HELD_OUT_PHRASINGS = (9, 10, 11)
"""Phrasings of no training prompt; held-out prompts use all twelve."""
NUM_HELD_OUT = 240
"""Two-step operand tuples that neither pretraining nor reinforcement learning ever sees."""

Split = Literal["train", "dev", "test"]
FIRST_ID = {"train": 0, "dev": 1_000_000, "test": 2_000_000}
"""Prompt ids of the splits never meet: they key the random draws."""


@dataclass(frozen=True)
class Question:
    """Operands and operators: ``3 + 4 - 2`` is ``((3, 4, 2), ("+", "-"))``."""

    operands: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def facts(self) -> tuple[tuple[int, str, int], ...]:
        """The elementary steps (left, operator, right), with true intermediate results."""
        value, steps = self.operands[0], []
        for op, b in zip(self.operators, self.operands[1:], strict=True):
            steps.append((value, op, b))
            value = apply(value, op, b)
        return tuple(steps)

    @property
    def answer(self) -> int:
        """The digit to draw."""
        return apply(*self.facts[-1])

    @property
    def reasoning(self) -> str:
        """The steps written out, e.g. ``3+4=7;7-2=5``."""
        return ";".join(f"{a}{op}{b}={apply(a, op, b)}" for a, op, b in self.facts)

    def words(self, phrasing: int) -> str:
        """Return the question in words."""
        spoken = NUMBERS[self.operands[0]]
        for op, b in zip(self.operators, self.operands[1:], strict=True):
            spoken += f" {OPERATORS[op]} {NUMBERS[b]}"
        return PHRASINGS[phrasing].format(spoken)


def apply(a: int, op: str, b: int) -> int:
    """Return ``a + b`` or ``a - b``."""
    return a + b if op == "+" else a - b


@lru_cache
def all_questions() -> tuple[Question, ...]:
    """Return every question whose intermediate results stay in 0..9."""
    found = []
    for size in (2, 3):
        for operands in product(range(10), repeat=size):
            for operators in product("+-", repeat=size - 1):
                value, legal = operands[0], True
                for op, b in zip(operators, operands[1:], strict=True):
                    value = apply(value, op, b)
                    legal &= 0 <= value <= 9
                if legal:
                    found.append(Question(operands, operators))
    return tuple(found)


@lru_cache
def questions(split: Split) -> tuple[Question, ...]:
    """Return the questions of a split; held-out *operand tuples* appear in one split only.

    A held-out tuple takes all its operators with it: ``(3, 4, 2)`` is in ``dev`` or ``test`` with every
    sign, or in ``train``.
    """
    everything = all_questions()
    tuples = sorted({q.operands for q in everything if len(q.operands) == 3})
    order = np.random.default_rng(20260323).permutation(len(tuples))
    held_out: list[Question] = []
    for i in order:
        if len(held_out) >= NUM_HELD_OUT:
            break
        held_out += [q for q in everything if q.operands == tuples[i]]
    cut = next(
        i
        for i in range(NUM_HELD_OUT // 2, len(held_out))
        if held_out[i].operands != held_out[i - 1].operands
    )
    if split == "train":
        return tuple(q for q in everything if q not in set(held_out))
    return tuple(held_out[:cut] if split == "dev" else held_out[cut:])


@lru_cache
def prompts(split: Split) -> tuple[Prompt, ...]:
    """Return the prompts of a split: one phrasing per question when held out, three in training."""
    rng = np.random.default_rng(7)
    seen = [i for i in range(len(PHRASINGS)) if i not in HELD_OUT_PHRASINGS]
    rows: list[tuple[Question, int]] = []
    for i, question in enumerate(questions(split)):
        if split == "train":
            rows += [(question, p) for p in rng.choice(seen, 3, replace=False).tolist()]
        else:
            rows.append((question, i % len(PHRASINGS)))
    return tuple(
        Prompt(
            text=question.words(phrasing),
            id=FIRST_ID[split] + i,
            columns={"answer": question.answer, "reasoning": question.reasoning},
        )
        for i, (question, phrasing) in enumerate(rows)
    )


class WordTokenizer:
    """Words of the questions, characters of the reasoning, and the marks of the layout."""

    marks = ("<bos>", "<eos>", "<start_of_image>", "<end_of_image>")
    characters = tuple("0123456789+-=;")

    def __init__(self) -> None:
        words = {word for phrasing in PHRASINGS for word in phrasing.split() if word != "{}"}
        words |= {*NUMBERS, *OPERATORS.values()}
        self.vocabulary = (*self.marks, *self.characters, *sorted(words))
        self.ids = {token: i for i, token in enumerate(self.vocabulary)}
        self.bos, self.eos, self.start_of_image, self.end_of_image = range(4)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a question in words.

        Raises:
            ValueError: for a word the model does not know.
        """
        words = text.lower().split()
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise ValueError(
                f"The digits model does not know {unknown} in {text!r}. It knows numbers in words "
                f"({', '.join(NUMBERS)}), {' and '.join(OPERATORS.values())}, and the words of its "
                f"phrasings: {', '.join(PHRASINGS)}."
            )
        return [self.ids[word] for word in words]

    def encode_reasoning(self, text: str) -> list[int]:
        """Return the ids of a reasoning, character by character."""
        return [self.ids[character] for character in text]

    def decode(self, ids: list[int]) -> str:
        """Return reasoning without spaces, words with them."""
        tokens = [self.vocabulary[i] for i in ids]
        glue = "" if all(len(token) == 1 for token in tokens) else " "
        return glue.join(tokens)
