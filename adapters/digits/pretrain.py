"""Make the imperfect base model: supervised learning from a teacher that errs on purpose.

    python -m lightning_unigrpo.adapters.digits.pretrain --seed 0 --out base.safetensors

The teacher prefers a wrong result for some facts, slips, skips its reasoning, and labels some images at
random. So the base model answers a third of the questions, knows that the drawing follows the reasoning,
and leaves something for reinforcement learning to select. Independent of the trainer; minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_unigrpo.adapters.digits.adapter import DigitsAdapter
from lightning_unigrpo.adapters.digits.images import load_digits
from lightning_unigrpo.adapters.digits.task import Question, WordTokenizer, apply, questions
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """How the teacher errs; probabilities."""

    biased_facts: float = 0.35
    """Share of elementary facts with a preferred wrong result, one off."""
    bias: float = 0.6
    """How often such a fact comes out wrong."""
    slip: float = 0.05
    """Any result is replaced by a random digit."""
    no_reasoning: float = 0.1
    """The reasoning is left out, and the image is of a random digit."""
    random_image: float = 0.2
    """The image is of a random digit although the reasoning is there."""


def preferred_errors(teacher: Teacher, rng: np.random.Generator) -> dict[tuple[int, str, int], int]:
    """Draw which facts the teacher tends to get wrong, and how."""
    facts = [
        (a, op, b) for a in range(10) for op in "+-" for b in range(10) if 0 <= apply(a, op, b) <= 9
    ]
    wrong = {}
    for fact in facts:
        if rng.random() < teacher.biased_facts:
            true = apply(*fact)
            wrong[fact] = 1 if true == 0 else 8 if true == 9 else true + int(rng.choice([-1, 1]))
    return wrong


def lesson(
    question: Question,
    teacher: Teacher,
    errors: dict[tuple[int, str, int], int],
    rng: np.random.Generator,
) -> tuple[str, int]:
    """Return the teacher's reasoning and the digit of the teacher's drawing."""
    if rng.random() < teacher.no_reasoning:
        return "", int(rng.integers(10))
    value, steps = question.operands[0], []
    for op, b in zip(question.operators, question.operands[1:], strict=True):
        result = apply(value, op, b)
        if (value, op, b) in errors and rng.random() < teacher.bias:
            result = errors[value, op, b]
        if rng.random() < teacher.slip or not 0 <= result <= 9:
            result = int(rng.integers(10))
        steps.append(f"{value}{op}{b}={result}")
        value = result
    drawn = int(rng.integers(10)) if rng.random() < teacher.random_image else value
    return ";".join(steps), drawn


class Student(Protocol):
    """What lessons need of an adapter beside the contract."""

    tokenizer: WordTokenizer

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn ``[n, 8, 8]`` pixels in [-1, 1] into latents ``[n, N, C]``, or codes ``[n, N]``."""


def noisy_image(clean: Tensor, sigmas: Tensor, noise: Tensor, grid: Grid) -> ImageSegment:
    """Return an image at independent noise levels, to be scored like the steps of a window.

    Args:
        clean: ``[N, C]``.
        sigmas: ``[K]`` in (0, 1).
        noise: ``[K, N, C]``.
        grid: ``(h, w)``.
    """
    levels = sigmas.view(-1, 1, 1)
    states = (1 - levels) * clean + levels * noise
    return ImageSegment(
        latent=clean,
        grid=grid,
        states=torch.cat([states, clean.unsqueeze(0)]),
        sigmas=torch.cat([sigmas, sigmas.new_zeros(1)]),
    )


def partly_masked(codes: Tensor, grid: Grid, generator: torch.Generator) -> TokenImageSegment:
    """Return an image whose masked codes are to be scored in one step, behind those that are known.

    A share ``cos(pi u / 2)`` of the codes is masked, ``u`` uniform; at least one.

    Source: Show-o, https://arxiv.org/abs/2408.12528, its training.

    Args:
        codes: ``[N]`` int64.
        grid: ``(h, w)``.
        generator: of the draws.
    """
    share = math.cos(math.pi / 2 * float(torch.rand((), generator=generator)))
    count = max(1, round(share * len(codes)))
    masked = torch.randperm(len(codes), generator=generator)[:count]
    step = torch.zeros_like(codes).scatter(0, masked, 1)
    return TokenImageSegment(tokens=codes, grid=grid, step=step, window=(1, 2))


class Lessons:
    """Draws batches of what the teacher says and draws."""

    def __init__(
        self, adapter: Any, teacher: Teacher, seed: int, errors_of: int, levels: int = 4
    ) -> None:
        self.adapter: Any = adapter
        self.teacher, self.levels, self.grid = teacher, levels, adapter.image_grid(Prompt(text=""))
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.errors = preferred_errors(teacher, np.random.default_rng((errors_of, 1)))
        self.questions = questions("train")
        pixels, labels = load_digits("train")
        self.by_digit = [adapter.encode(pixels[labels == digit]) for digit in range(10)]

    def codes(self, clean: Tensor) -> TokenImageSegment:
        """Return an image of codes to be scored: all of them, or those that a draw leaves masked."""
        image = TokenImageSegment(tokens=clean, grid=self.grid)
        if self.adapter.image_policy == "masked":
            image = partly_masked(clean, self.grid, self.generator)
        image.log_prob = torch.zeros(len(image.scored))
        return image

    def batch(self, size: int) -> tuple[list[Trajectory], list[Tensor]]:
        """Return trajectories, and of continuous images the target velocities ``[K, N, C]`` each."""
        tokenizer, noise, sigmas = self.adapter.tokenizer, None, None
        if self.adapter.image_policy == "flow":
            shape = (size, self.levels, *self.by_digit[0].shape[1:])
            noise = torch.randn(shape, generator=self.generator)
            sigmas = torch.rand(size, self.levels, generator=self.generator).clamp_min(1e-3)
        trajectories, targets = [], []
        for i, pick in enumerate(self.rng.integers(len(self.questions), size=size)):
            question = self.questions[pick]
            said, drawn = lesson(question, self.teacher, self.errors, self.rng)
            ids = torch.tensor([*tokenizer.encode_reasoning(said), tokenizer.eos])
            prompt = Prompt(text=question.words(int(self.rng.integers(9))))
            images = self.by_digit[drawn]
            clean = images[int(self.rng.integers(len(images)))]
            image: ImageSegment | TokenImageSegment
            if noise is None or sigmas is None:
                image = self.codes(clean)
            else:
                image = noisy_image(clean, sigmas[i], noise[i], self.grid)
                targets.append(noise[i] - clean)
            text = TextSegment(tokens=ids, log_prob=torch.zeros(len(ids)))
            segments = [*self.adapter.tokenize(prompt), text, image]
            trajectories.append(Trajectory(prompt=prompt, segments=segments, group=0, member=i))
        return trajectories, targets


def teach(
    adapter: Any,
    *,
    seed: int,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-3,
    teacher: Teacher | None = None,
    errors_of: int | None = None,
    levels: int = 4,
) -> None:
    """Train in place on cross entropy of the reasoning, plus that of codes or squared error of the velocity.

    Args:
        adapter: the model, a :class:`Student`.
        seed: of lessons and noise.
        steps: optimizer steps, with a short warm-up and cosine decay.
        batch_size: lessons per step.
        lr: peak learning rate.
        teacher: how it errs.
        errors_of: seed of the teacher's preferred errors; ``None`` = ``seed``.
        levels: noise levels per continuous image.
    """
    errors_of = seed if errors_of is None else errors_of
    lessons = Lessons(adapter, teacher or Teacher(), seed, errors_of, levels)
    take(lessons, steps=steps, batch_size=batch_size, lr=lr)


def take(lessons: Lessons, *, steps: int, batch_size: int = 64, lr: float = 2e-3) -> None:
    """Train the adapter of some lessons in place, as :func:`teach` says."""
    adapter = lessons.adapter
    optimizer = torch.optim.AdamW(
        [p for p in adapter.net.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.98)
    )
    ramp = min(50, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / ramp) * (0.02 + 0.98 * math.cos(math.pi / 2 * s / steps)),
    )
    adapter.train()
    for step in range(steps):
        trajectories, targets = lessons.batch(batch_size)
        scores = adapter(trajectories)
        text = -torch.cat(scores.text).mean()
        if targets:
            image = (torch.cat(scores.velocity) - torch.cat(targets)).square().mean()
        else:
            image = -torch.cat(scores.image_tokens).mean()
        optimizer.zero_grad()
        (text + image).backward()
        torch.nn.utils.clip_grad_norm_(adapter.net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info(
                "step %d  text %.3f  image %.3f", step, float(text.detach()), float(image.detach())
            )
    adapter.eval()


def pretrain(seed: int, steps: int = 1000) -> DigitsAdapter:
    """Return a base model made from scratch, with the float16 weights that are shipped."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapter = DigitsAdapter(None)
    teach(adapter, seed=seed, steps=steps)
    round_to_half(adapter)
    return adapter


def round_to_half(adapter: DigitsAdapter) -> None:
    """Leave the weights that a float16 file holds."""
    for parameter in adapter.net.parameters():
        parameter.data = parameter.data.half().float()


def make_checkpoint(
    make: Callable[[int, int], DigitsAdapter],
    measure: Callable[..., dict[str, float]],
    *,
    steps: int,
    out: str,
    args: Sequence[str] | None,
) -> None:
    """Make one checkpoint and its metrics, as a command line says.

    Args:
        make: called with a seed and a number of steps.
        measure: called with the adapter and a split.
        steps: where the command line gives none.
        out: likewise, the file.
        args: of the command line; ``None`` = those of the process.
    """
    parser = argparse.ArgumentParser(description=(make.__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    options = parser.parse_args(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begin = time.process_time()
    adapter = make(options.seed, options.steps)
    seconds = time.process_time() - begin
    options.out.parent.mkdir(parents=True, exist_ok=True)
    adapter.save_pretrained(options.out)
    metrics = measure(adapter, options.split) | {"cpu_seconds": round(seconds, 1)}
    options.out.with_suffix(".json").write_text(
        json.dumps(metrics, indent=1) + "\n", encoding="utf-8"
    )
    log.info("%s", json.dumps(metrics, indent=1))


def main(args: Sequence[str] | None = None) -> None:
    """Make the base model."""
    from lightning_unigrpo.adapters.digits.evaluate import evaluate

    make_checkpoint(pretrain, evaluate, steps=1000, out="base.safetensors", args=args)


if __name__ == "__main__":
    main()
