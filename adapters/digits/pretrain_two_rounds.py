"""Make the base model of two rounds: draw, look at the drawing, keep it or draw again.

    python -m lightning_unigrpo.adapters.digits.pretrain_two_rounds --out two_rounds.safetensors

The teacher reasons with the errors of :mod:`pretrain` and draws a random digit half of the time. Then it
looks: ``5=5`` says that it sees the 5 that it wanted, ``8;5`` that it sees an 8 and wanted a 5. What it is
satisfied with it draws once more as it is; otherwise it draws anew, with the same hand: a random digit half
of the time. So the second drawing is no better than the first one but where looking makes it so, and what
was drawn is in no other place to be known from. Minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unigrpo.adapters.digits.adapter import DigitsAdapter
from lightning_unigrpo.adapters.digits.pretrain import (
    Lessons,
    Teacher,
    lesson,
    make_checkpoint,
    noisy_image,
    round_to_half,
    take,
)
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory

TEACHER = Teacher(no_reasoning=0.0, random_image=0.5)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the teacher looks at a drawing."""

    misread: float = 0.1
    """Probability that it names a random digit."""
    blur: float = 0.2
    """Standard deviation of the noise on what it looks at, pixels in [-1, 1]: a model's drawings are not
    those of a hand."""


def second_lesson(
    wanted: int, drawn: int, teacher: Teacher, look: Look, rng: np.random.Generator
) -> tuple[str, int | None]:
    """Return what the teacher says of its drawing, and the digit it draws instead; ``None`` = it keeps it.

    Args:
        wanted: the result of the reasoning, right or wrong.
        drawn: the digit that was drawn.
        teacher: how it errs in drawing.
        look: how it errs in looking.
        rng: of the draws.
    """
    seen = int(rng.integers(10)) if rng.random() < look.misread else drawn
    if seen == wanted:
        return f"{seen}={wanted}", None
    again = int(rng.integers(10)) if rng.random() < teacher.random_image else wanted
    return f"{seen};{wanted}", again


class TwoRoundLessons(Lessons):
    """Draws batches of dialogues: reasoning, drawing, what is seen, drawing."""

    look = Look()

    def batch(self, size: int) -> tuple[list[Trajectory], list[Tensor]]:
        """Return trajectories, and the target velocities ``[K, N, C]`` of their images."""
        shape = (size, 2, self.levels, *self.by_digit[0].shape[1:])
        noise = torch.randn(shape, generator=self.generator)
        sigmas = torch.rand(shape[:3], generator=self.generator).clamp_min(1e-3)
        trajectories, targets = [], []
        for i, pick in enumerate(self.rng.integers(len(self.questions), size=size)):
            question = self.questions[pick]
            prompt = Prompt(text=question.words(int(self.rng.integers(9))))
            said, drawn = lesson(question, self.teacher, self.errors, self.rng)
            looked, again = second_lesson(int(said[-1]), drawn, self.teacher, self.look, self.rng)
            first = self._picture(drawn)
            second = first if again is None else self._picture(again)
            images = [
                noisy_image(clean, sigmas[i, n], noise[i, n], self.grid)
                for n, clean in enumerate((first, second))
            ]
            targets += [noise[i, n] - clean for n, clean in enumerate((first, second))]
            self._show(images[0])
            segments: list[Segment] = [*self.adapter.tokenize(prompt)]
            for text, image in zip((said, looked), images, strict=True):
                segments += [self._text(text), image]
            trajectories.append(Trajectory(prompt=prompt, segments=segments, group=0, member=i))
        return trajectories, targets

    def _picture(self, digit: int) -> Tensor:
        images: Tensor = self.by_digit[digit]
        return images[int(self.rng.integers(len(images)))]

    def _show(self, image: ImageSegment) -> None:
        """Let later segments see a blurred image; its own velocities stay those of the clean one."""
        blur = torch.randn(image.latent.shape, generator=self.generator)
        image.latent, image.is_context = image.latent + self.look.blur * blur, True

    def _text(self, characters: str) -> TextSegment:
        tokenizer: Any = self.adapter.tokenizer
        ids = torch.tensor([*tokenizer.encode_reasoning(characters), tokenizer.eos])
        return TextSegment(tokens=ids, log_prob=torch.zeros(len(ids)))


def pretrain_two_rounds(seed: int, steps: int = 1500) -> DigitsAdapter:
    """Return a base model made from scratch, with the float16 weights that are shipped."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = DigitsAdapter(None)
    take(TwoRoundLessons(adapter, TEACHER, seed, seed, levels=2), steps=steps)
    round_to_half(adapter)
    return adapter


def main(args: Sequence[str] | None = None) -> None:
    """Make the base model of two rounds."""
    from lightning_unigrpo.adapters.digits.evaluate import evaluate_rounds

    measure = partial(evaluate_rounds, num_rounds=2, num_seeds=2)
    make_checkpoint(
        pretrain_two_rounds, measure, steps=1500, out="two_rounds.safetensors", args=args
    )


if __name__ == "__main__":
    main()
