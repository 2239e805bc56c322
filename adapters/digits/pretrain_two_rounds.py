"""Make the base model of two rounds: sketch, look at the sketch, finish it or sketch again.

    python -m lightning_unigrpo.adapters.digits.pretrain_two_rounds --out two_rounds.safetensors

The teacher reasons with the errors of :mod:`pretrain` and has a poor hand: what it draws from nothing is out
of focus, and in three of ten cases of a random digit. Then it looks: ``5=5`` says that it sees the 5 that it
wanted, ``8;5`` that it sees an 8 and wanted a 5. What it is satisfied with it finishes: the same drawing,
sharp. Otherwise it sketches anew, with the same hand. So it draws well only over a drawing that it has seen,
and what was drawn is in no other place to be known from. Minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unigrpo.adapters.digits.adapter import DigitsAdapter
from lightning_unigrpo.adapters.digits.images import load_digits
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

TEACHER = Teacher(no_reasoning=0.0, random_image=0.3)
FOCUS = 1.3
"""Standard deviation, in pixels, of the Gaussian that a sketch is blurred with: the reward finds 22 % of the
real digits in it, a classifier made for it 95 %."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the teacher looks at a drawing."""

    misread: float = 0.1
    """Probability that it names a random digit."""
    wishful: float = 0.4
    """Probability that it sees what it wanted, whatever is there."""
    noise: float = 0.2
    """Standard deviation of the noise on what it looks at, pixels in [-1, 1]: a model's drawings are not
    those of a hand."""


def sketched(pixels: Tensor) -> Tensor:
    """Return ``[n, 8, 8]`` pixels in [-1, 1] out of focus, on a black ground."""
    reach = torch.arange(-4, 5).float()
    kernel = torch.exp(-(reach**2) / 2 / FOCUS**2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    white = nn.functional.pad((pixels + 1).unsqueeze(1), (4, 4, 4, 4))
    white = nn.functional.conv2d(nn.functional.conv2d(white, kernel), kernel.mT)
    return white.squeeze(1) - 1


def reader() -> Callable[[Tensor], Any]:
    """Return what names the digits of sharp drawings and of sketches: trees on the real ones; seconds."""
    from sklearn.ensemble import ExtraTreesClassifier

    pixels, labels = load_digits("train")
    shown = torch.cat([pixels, sketched(pixels)])
    shown = shown + 0.15 * torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))
    trees = ExtraTreesClassifier(200, random_state=0)
    trees.fit(shown.flatten(1).numpy(), labels.repeat(2).numpy())
    return lambda images: trees.predict((images[:, 0] * 2 - 1).flatten(1).numpy())


def second_lesson(
    wanted: int, drawn: int, teacher: Teacher, look: Look, rng: np.random.Generator
) -> tuple[str, int | None]:
    """Return what the teacher says of its sketch, and the digit it sketches anew; ``None`` = it finishes it.

    Args:
        wanted: the result of the reasoning, right or wrong.
        drawn: the digit that was drawn.
        teacher: how it errs in drawing.
        look: how it errs in looking.
        rng: of the draws.
    """
    seen = int(rng.integers(10)) if rng.random() < look.misread else drawn
    if rng.random() < look.wishful:
        seen = wanted
    if seen == wanted:
        return f"{seen}={wanted}", None
    again = int(rng.integers(10)) if rng.random() < teacher.random_image else wanted
    return f"{seen};{wanted}", again


class TwoRoundLessons(Lessons):
    """Draws batches of dialogues: reasoning, sketch, what is seen, drawing."""

    look = Look()

    def __init__(self, adapter: Any, teacher: Teacher, seed: int) -> None:
        super().__init__(adapter, teacher, seed, seed, levels=2)
        pixels, labels = load_digits("train")
        self.sketches = [adapter.encode(sketched(pixels[labels == digit])) for digit in range(10)]

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
            first, finished = self._drawings(drawn)
            second = finished if again is None else self._drawings(again)[0]
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

    def _drawings(self, digit: int) -> tuple[Tensor, Tensor]:
        """Return one drawing of a digit, as a sketch and finished."""
        finished = self.by_digit[digit]
        pick = int(self.rng.integers(len(finished)))
        return self.sketches[digit][pick], finished[pick]

    def _show(self, image: ImageSegment) -> None:
        """Let later segments see a noisy image; its own velocities stay those of the clean one."""
        noise = torch.randn(image.latent.shape, generator=self.generator)
        image.latent, image.is_context = image.latent + self.look.noise * noise, True

    def _text(self, characters: str) -> TextSegment:
        tokenizer: Any = self.adapter.tokenizer
        ids = torch.tensor([*tokenizer.encode_reasoning(characters), tokenizer.eos])
        return TextSegment(tokens=ids, log_prob=torch.zeros(len(ids)))


def pretrain_two_rounds(seed: int, steps: int = 1500) -> DigitsAdapter:
    """Return a base model made from scratch, with the float16 weights that are shipped."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = DigitsAdapter(None)
    take(TwoRoundLessons(adapter, TEACHER, seed), steps=steps)
    round_to_half(adapter)
    return adapter


def main(args: Sequence[str] | None = None) -> None:
    """Make the base model of two rounds."""
    from lightning_unigrpo.adapters.digits.evaluate import evaluate_rounds

    measure = partial(evaluate_rounds, num_rounds=2, num_seeds=2, reader=reader())
    make_checkpoint(
        pretrain_two_rounds, measure, steps=1500, out="two_rounds.safetensors", args=args
    )


if __name__ == "__main__":
    main()
