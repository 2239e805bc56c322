"""What a digits model can do, part by part: reasoning, drawing, and whether one causes the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_unigrpo.adapter import Adapter, Cache
from lightning_unigrpo.adapters.digits.classifier import DigitReward
from lightning_unigrpo.adapters.digits.task import Split, prompts
from lightning_unigrpo.flow import ode_step, sigma_schedule
from lightning_unigrpo.masked import reveal_steps
from lightning_unigrpo.types import Grid, ImageSegment, Prompt, Segment, TextSegment

LIMIT = 12
"""Tokens of a text, the stop token included."""


def think(
    adapter: Adapter,
    rows: Sequence[Prompt],
    *,
    temperature: float = 0.0,
    limit: int = LIMIT,
    seed: int = 0,
) -> list[TextSegment]:
    """Decode one reasoning per prompt: greedy, or tempered draws from a seeded generator."""
    contexts = [adapter.tokenize(prompt) for prompt in rows]
    return write(adapter, contexts, temperature=temperature, limit=limit, seed=seed)


@torch.no_grad()
def write(
    adapter: Adapter,
    contexts: Sequence[Sequence[Segment]],
    *,
    temperature: float = 0.0,
    limit: int = LIMIT,
    seed: int = 0,
) -> list[TextSegment]:
    """Decode one text behind each context, as :func:`think` does."""
    cache = adapter.prefill(contexts)
    generator = torch.Generator().manual_seed(seed)
    active, fed = torch.ones(len(contexts), dtype=torch.bool), None
    tokens: list[list[int]] = [[] for _ in contexts]
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
    generator, grid = torch.Generator().manual_seed(seed), adapter.image_grid(rows[0])
    cache = adapter.prefill(contexts)
    if adapter.image_policy != "flow":
        return adapter.decode(draw_codes(adapter, cache, grid, generator, num_steps), grid)
    return adapter.decode(draw_latents(adapter, cache, grid, generator, num_steps), grid)


def draw_latents(
    adapter: Adapter, cache: Cache, grid: Grid, generator: torch.Generator, num_steps: int = 10
) -> Tensor:
    """Return latents ``[B, N, C]`` at the end of the ODE."""
    shape = (len(cache), grid[0] * grid[1], adapter.latent_channels)
    x = torch.randn(shape, generator=generator)
    sigmas = sigma_schedule(num_steps, shift=1.0, convention="steps")
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = ode_step(adapter.velocity(cache, x, sigma.expand(len(x)), grid), x, sigma, sigma_next)
    return x


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


class Turn(NamedTuple):
    """What was said and drawn in one round."""

    texts: list[TextSegment]
    latents: Tensor
    """``[B, 4, 16]``."""
    images: Tensor
    """``[B, 3, 8, 8]`` in [0, 1]."""


@torch.no_grad()
def dialogue(
    adapter: Adapter,
    rows: Sequence[Prompt],
    num_rounds: int,
    *,
    seed: int = 0,
    exchange: bool = False,
) -> list[Turn]:
    """Think and draw, round after round, each behind all that came before: greedy text, the ODE.

    Args:
        adapter: that draws by a flow.
        rows: B questions.
        num_rounds: of a text and an image each.
        seed: of the noise images begin with; another in each round.
        exchange: show every row the drawing of the row before it instead of its own.

    Returns:
        ``num_rounds`` rounds.
    """
    grid, rounds = adapter.image_grid(rows[0]), list[Turn]()
    contexts = [list(adapter.tokenize(prompt)) for prompt in rows]
    for number in range(num_rounds):
        texts = write(adapter, contexts)
        for context, text in zip(contexts, texts, strict=True):
            context.append(text)
        generator = torch.Generator().manual_seed(1000 * number + seed)
        latents = draw_latents(adapter, adapter.prefill(contexts), grid, generator)
        rounds.append(Turn(texts, latents, adapter.decode(latents, grid)))
        shown = latents.roll(1, 0) if exchange else latents
        for context, latent in zip(contexts, shown, strict=True):
            image = ImageSegment(latent=latent, grid=grid, is_context=True)
            context.append(adapter.look(image))
    return rounds


Reader = Callable[[Tensor], Sequence[int]]
"""Says which digits are in images ``[B, 3, 8, 8]``."""


def evaluate_rounds(
    adapter: Any,
    split: Split,
    num_rounds: int,
    *,
    num_seeds: int = 1,
    reader: Reader | None = None,
) -> dict[str, float]:
    """Measure what each round draws on the held-out questions, and what the second makes of the first.

    Args:
        adapter: with a :class:`WordTokenizer`, that draws by a flow.
        split: of the questions.
        num_rounds: 1 or 2.
        num_seeds: of the noise; figures are means over them.
        reader: of first images that the reward is no judge of, such as sketches; ``None`` = no reading is
            judged.

    Returns:
        ``reward_1`` and ``accuracy_1`` of the first image, ``reward`` and ``accuracy`` of the last one (0
        where a text is cut off), accuracy of the first reasoning; of two rounds also how often a wrong first
        image is followed by a right one (``mended``) and a right one by a right one (``kept``), where there
        were any; ``reward`` where every row is shown another row's drawing (``exchanged_reward``); with a
        reader also how often the first image is of the right digit, however badly drawn (``legible``), and
        how often the second text names the digit that is there, of one's own drawing (``reading``) and of
        another's (``exchanged_reading``).
    """
    adapter.eval()
    rows = prompts(split)
    found = [_of_rounds(adapter, rows, num_rounds, seed, reader) for seed in range(num_seeds)]
    values = {name: [f[name] for f in found if name in f] for each in found for name in each}
    return {name: round(sum(each) / len(each), 4) for name, each in values.items()}


def _of_rounds(
    adapter: Any, rows: Sequence[Prompt], num_rounds: int, seed: int, reader: Reader | None
) -> dict[str, float]:
    judge, answers = DigitReward(), torch.tensor([p.columns["answer"] for p in rows])
    rounds = dialogue(adapter, rows, num_rounds, seed=seed)

    def reward(rounds: Sequence[Turn]) -> float:
        given = judge(images=rounds[-1].images, answer=answers.tolist())
        return float((given * _stopped(rounds)).mean())

    results = dict[str, float]()
    digits = [judge.model(each.images[:, :1] * 2 - 1).argmax(1) for each in rounds]
    right = [(d == answers) * _stopped(rounds[: n + 1]) for n, d in enumerate(digits)]
    for n, name in enumerate(("_1", "") if num_rounds > 1 else ("",)):
        results[f"reward{name}"] = reward(rounds[: n + 1])
        results[f"accuracy{name}"] = float(right[n].mean())
    said = [adapter.detokenize(t.tokens) for t in rounds[0].texts]
    thought = [s == p.columns["reasoning"] for s, p in zip(said, rows, strict=True)]
    results["reasoning_accuracy"] = float(sum(thought)) / len(rows)
    results["stopped"] = float(_stopped(rounds).mean())
    if num_rounds > 1:
        first, second = right
        for name, before in (("mended", 0), ("kept", 1)):
            if len(after := second[first == before]):
                results[name] = float(after.mean())
        others = dialogue(adapter, rows, num_rounds, seed=seed, exchange=True)
        results["exchanged_reward"] = reward(others)
        if reader is not None:
            there = torch.as_tensor(reader(rounds[0].images))
            results["legible"] = float((there == answers).float().mean())
            results["reading"] = _reading(adapter, rounds[1].texts, there)
            results["exchanged_reading"] = _reading(adapter, others[1].texts, there.roll(1))
    return results


def _stopped(rounds: Sequence[Turn]) -> Tensor:
    """Return ``[B]``, 1 where every text so far ended with its stop token."""
    found = [[float(text.stopped) for text in each.texts] for each in rounds]
    return torch.tensor(found).amin(0)


def _reading(adapter: Any, texts: Sequence[TextSegment], digits: Tensor) -> float:
    """Return how often a text begins with the digit that is there."""
    said = [adapter.detokenize(t.tokens)[:1] for t in texts]
    right = [s == str(d) for s, d in zip(said, digits.tolist(), strict=True)]
    return float(sum(right)) / len(right)
