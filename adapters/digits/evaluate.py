"""What a digits model can do, part by part: reasoning, drawing, and whether one causes the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_unigrpo.adapter import Adapter, Cache
from lightning_unigrpo.adapters.digits.classifier import DigitReward
from lightning_unigrpo.adapters.digits.task import Split, prompts
from lightning_unigrpo.flow import ode_step, sigma_schedule
from lightning_unigrpo.masked import reveal_steps
from lightning_unigrpo.types import Grid, Prompt, Segment, TextSegment


@torch.no_grad()
def think(
    adapter: Adapter,
    rows: Sequence[Prompt],
    *,
    temperature: float = 0.0,
    limit: int = 12,
    seed: int = 0,
) -> list[TextSegment]:
    """Decode one reasoning per prompt: greedy, or tempered draws from a seeded generator."""
    cache = adapter.prefill([adapter.tokenize(prompt) for prompt in rows])
    generator = torch.Generator().manual_seed(seed)
    active, fed = torch.ones(len(rows), dtype=torch.bool), None
    tokens: list[list[int]] = [[] for _ in rows]
    for _ in range(limit):
        logits = adapter.next_logits(cache, fed, active)
        fed = (
            torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)
            if temperature
            else logits.argmax(1)
        )
        for b in active.nonzero().squeeze(1).tolist():
            tokens[b].append(int(fed[b]))
        active = active & (fed != adapter.stop_token)
        if not active.any():
            break
    return [
        TextSegment(
            tokens=torch.tensor(ids, dtype=torch.long), stopped=ids[-1] == adapter.stop_token
        )
        for ids in tokens
    ]


@torch.no_grad()
def draw(
    adapter: Adapter,
    rows: Sequence[Prompt],
    texts: Sequence[TextSegment],
    *,
    seed: int = 0,
    num_steps: int = 10,
) -> Tensor:
    """Return images ``[B, 3, 8, 8]`` after the given reasonings: by the ODE, or code after code."""
    contexts: list[list[Segment]] = [
        [*adapter.tokenize(prompt), text] for prompt, text in zip(rows, texts, strict=True)
    ]
    cache = adapter.prefill(contexts)
    generator, grid = torch.Generator().manual_seed(seed), adapter.image_grid(rows[0])
    num = grid[0] * grid[1]
    if adapter.image_policy != "flow":
        return adapter.decode(draw_codes(adapter, cache, grid, generator, num_steps), grid)
    x = torch.randn(len(rows), num, adapter.latent_channels, generator=generator)
    sigmas = sigma_schedule(num_steps, shift=1.0, convention="steps")
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = ode_step(adapter.velocity(cache, x, sigma.expand(len(x)), grid), x, sigma, sigma_next)
    return adapter.decode(x, grid)


def draw_codes(
    adapter: Adapter, cache: Cache, grid: Grid, generator: torch.Generator, num_steps: int
) -> Tensor:
    """Return codes ``[B, N]``, drawn one after the other, or unmasked in so many steps."""
    codes = torch.full((len(cache), grid[0] * grid[1]), -1)
    if adapter.image_policy == "tokens":
        for step in range(codes.shape[1]):
            logits = adapter.next_image_logits(cache, codes, step, grid)
            codes[:, step] = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        return codes
    planned = reveal_steps(torch.rand(codes.shape, generator=generator), num_steps)
    for step in range(num_steps):
        where = planned == step
        if where.any():
            logits = adapter.masked_logits(cache, codes, where, grid)
            codes[where] = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return codes


def written(adapter: Any, texts: Sequence[str]) -> list[TextSegment]:
    """Return closed reasonings with the given characters."""
    encode = adapter.tokenizer.encode_reasoning
    return [TextSegment(tokens=torch.tensor([*encode(t), adapter.stop_token])) for t in texts]


def evaluate(adapter: Any, split: Split, *, seed: int = 0) -> dict[str, float]:
    """Measure a model on the held-out questions of a split.

    Args:
        adapter: with a :class:`WordTokenizer`.
        split: of the questions.
        seed: of draws.

    Returns:
        Greedy and sampled reward (probability of the right digit, 0 for truncated reasoning), accuracy
        of the reasoning, of images whose own reasoning was right, and of images after forced reasoning:
        the right one, none at all, and one that ends in a wrong digit.
    """
    adapter.eval()
    rows = prompts(split)
    answers = torch.tensor([p.columns["answer"] for p in rows])
    judge = DigitReward()

    def probability(images: Tensor, digits: Tensor) -> Tensor:
        return judge(images=images, answer=digits.tolist())

    def accuracy(images: Tensor, digits: Tensor) -> Tensor:
        drawn: Tensor = judge.model(images[:, :1] * 2 - 1).argmax(1)
        return (drawn == digits).float()

    def mean(values: Tensor) -> float:
        return round(float(values.mean()), 4)

    results: dict[str, float] = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        texts = think(adapter, rows, temperature=temperature, seed=seed)
        images = draw(adapter, rows, texts, seed=seed)
        stopped = torch.tensor([float(t.stopped) for t in texts])
        right = torch.tensor(
            [
                adapter.detokenize(t.tokens) == p.columns["reasoning"]
                for t, p in zip(texts, rows, strict=True)
            ]
        )
        results[f"{name}_reward"] = mean(probability(images, answers) * stopped)
        results[f"{name}_reasoning_accuracy"] = mean(right.float())
        if name == "greedy":
            results["accuracy"] = mean(accuracy(images, answers) * stopped)
            results["image_given_right_text"] = mean(accuracy(images, answers)[right])
            results["stopped"] = mean(stopped)
    truth = [p.columns["reasoning"] for p in rows]
    other = (
        answers + torch.randint(1, 10, answers.shape, generator=torch.Generator().manual_seed(seed))
    ) % 10
    wrong = [t[:-1] + str(d) for t, d in zip(truth, other.tolist(), strict=True)]
    forced = {
        "right": draw(adapter, rows, written(adapter, truth), seed=seed),
        "none": draw(adapter, rows, written(adapter, [""] * len(rows)), seed=seed),
        "wrong": draw(adapter, rows, written(adapter, wrong), seed=seed),
    }
    results["forced_right_accuracy"] = mean(accuracy(forced["right"], answers))
    results["no_reasoning_accuracy"] = mean(accuracy(forced["none"], answers))
    results["no_reasoning_reward"] = mean(probability(forced["none"], answers))
    results["forced_wrong_draws_written_digit"] = mean(accuracy(forced["wrong"], other))
    results["forced_wrong_draws_answer"] = mean(accuracy(forced["wrong"], answers))
    return results
