"""Draws are keyed; rows, chunks and ranks do not change them; sampling follows the distribution."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import sigma_schedule
from lightning_unigrpo.rollout import Draws, Start, draw_tokens, restrict, rollout
from lightning_unigrpo.types import ImageSegment, Prompt, TextSegment, TokenImageSegment, Trajectory
from tests.toys import ToyFlow, ToyMasked, ToyTokens

TOYS = [ToyFlow, ToyTokens, ToyMasked]
PROMPTS = [Prompt(text=text, id=i) for i, text in enumerate(("a b", "c", "b b a"))]
SAMPLING = Sampling(
    group_size=2,
    max_text_tokens=5,
    num_timesteps=6,
    schedule="steps",
    shift=1.0,
    window_size=2,
    window_range=(0, 4),
    eval_num_timesteps=6,
)


def starts(members: int = 2) -> list[Start]:
    return [Start(p, p.id, m) for p in PROMPTS for m in range(members)]


def draw(adapter: Any, work: list[Start], sampling: Sampling, **kwargs: Any) -> list[Trajectory]:
    adapter.eval()
    return [t for chunk in rollout(adapter, work, sampling, **kwargs) for t in chunk]


def same(a: Trajectory, b: Trajectory, atol: float) -> None:
    assert a.completion == b.completion
    for x, y in zip(a.segments, b.segments, strict=True):
        if isinstance(x, ImageSegment):
            assert isinstance(y, ImageSegment)
            torch.testing.assert_close(x.latent, y.latent, atol=atol, rtol=0)
        else:
            assert not isinstance(y, ImageSegment)
            assert torch.equal(x.tokens, y.tokens)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("toy", TOYS)
def test_chunks_and_placement_do_not_change_what_is_drawn(toy: Any, rounds: int) -> None:
    adapter = toy()
    sampling = replace(SAMPLING, plan=("text", "image") * rounds)
    whole = draw(adapter, starts(), sampling)
    chunked = draw(adapter, starts(), replace(sampling, rows_per_chunk=4))
    elsewhere = draw(adapter, starts()[3:], sampling)  # as another rank would draw them
    for i, trajectory in enumerate(whole):
        same(trajectory, chunked[i], 2e-5)  # batched kernels round differently
        if i >= 3:
            same(trajectory, elsewhere[i - 3], 2e-5)


@pytest.mark.parametrize("toy", TOYS)
def test_global_generators_are_neither_read_nor_moved(toy: Any) -> None:
    adapter = toy()
    torch.manual_seed(1)
    first = draw(adapter, starts(), SAMPLING)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = draw(adapter, starts(), SAMPLING)
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first, second, strict=True):
        same(a, b, 0.0)


def test_members_iterations_and_seeds_differ() -> None:
    keys = [Draws(seed, iteration) for seed in (0, 1) for iteration in (0, 1)]
    values = {
        float(draws.uniforms([start], place, 1))
        for draws in keys
        for start in starts()
        for place in (0, 1)
    }
    assert len(values) == len(keys) * len(starts()) * 2


def test_tokens_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000  # a grid: frequencies are exact to 1e-4
    for temperature in (0.5, 1.0, 2.0):
        tokens, log_prob = draw_tokens(logits.expand(10_000, 4), uniforms, temperature)
        expected = (logits.double() / temperature).softmax(0)
        frequency = torch.bincount(tokens, minlength=4) / 10_000
        torch.testing.assert_close(frequency.double(), expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(log_prob.exp().double(), expected[tokens], atol=1e-6, rtol=1e-5)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(4, 5)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 0.4999, 0.5, 1.0]), 1.0)
    assert tokens.tolist() == [1, 1, 3, 3]  # 1.0: a uniform that rounding pushed to the edge


def test_texts_stop_or_are_cut() -> None:
    found = draw(ToyFlow(), starts(8), SAMPLING)
    texts = [s for t in found for s in t.segments if isinstance(s, TextSegment) and s.is_sampled]
    assert {s.stopped for s in texts} == {True, False}
    for text in texts:
        ends = text.tokens == ToyFlow().stop_token
        assert int(ends.sum()) == int(text.stopped)
        assert bool(ends[-1]) == text.stopped
        assert text.stopped or len(text.tokens) == SAMPLING.max_text_tokens


def test_windows_are_shared_by_a_group_and_move() -> None:
    adapter = ToyFlow()
    seen = set()
    for iteration in range(6):
        found = draw(adapter, starts(3), SAMPLING, iteration=iteration)
        for group in range(len(PROMPTS)):
            windows = {
                s.start
                for t in found
                if t.group == group
                for s in t.segments
                if isinstance(s, ImageSegment)
            }
            assert len(windows) == 1
            seen |= windows
    assert seen == {0, 1, 2}


def test_evaluation_is_an_euler_loop_over_the_velocity() -> None:
    adapter = ToyFlow()
    [got] = draw(adapter, [Start(PROMPTS[0], 0, 0)], SAMPLING, evaluate=True)
    context = [s for s in got.segments if isinstance(s, TextSegment)]
    cache = adapter.prefill([context])
    image = got.segments[-1]
    assert isinstance(image, ImageSegment)
    assert not image.is_sampled
    draws = Draws(0, 0)
    grid = adapter.image_grid(PROMPTS[0])
    x = draws.normals([Start(PROMPTS[0], 0, 0)], 1, 1, (grid[0] * grid[1], adapter.latent_channels))
    sigmas = sigma_schedule(SAMPLING.eval_num_timesteps, shift=1.0, convention="steps")
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = x + (sigma_next - sigma) * adapter.velocity(cache, x, sigma.expand(1), grid)
    torch.testing.assert_close(image.latent, x[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reveal", ["independent", "confident"])
def test_masked_images_score_the_codes_of_their_window(reveal: Any) -> None:
    """All codes are known in the end; a group shares its window; the packed pass says the same."""
    sampling, adapter = (
        replace(SAMPLING, reveal=reveal, window_size=3, window_range=(0, 6)),
        ToyMasked(),
    )
    drawn, later = draw(adapter, starts(), sampling), set()
    for trajectory in drawn:
        image = trajectory.segments[-1]
        assert isinstance(image, TokenImageSegment)
        assert image.window is not None
        assert image.step is not None
        assert image.log_prob is not None
        low, high = image.window
        assert high - low == 3
        assert int(image.tokens.min()) >= 0
        assert int(image.step.max()) < 6
        inside = [s for s in image.step.tolist() if low <= s < high]
        assert image.step[image.scored].tolist() == sorted(inside)
        assert len(image.log_prob) == len(inside)
        later.add((trajectory.group, low, high))
    assert len(later) == len(PROMPTS)
    scores = adapter(drawn)
    for trajectory, found in zip(drawn, scores.image_tokens, strict=True):
        torch.testing.assert_close(found, trajectory.segments[-1].log_prob, atol=1e-5, rtol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (None, 0.7), (4, 0.5), (100, 0.999999)])
def test_restricted_draws_follow_the_renormalised_distribution(
    top_k: int | None, top_p: float
) -> None:
    """Against the definition: the k largest, then the fewest of them that reach p, renormalised."""
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(0)) * 2
    found = restrict(logits, top_k, top_p).softmax(-1)
    for row, got in zip(logits.double().softmax(-1), found, strict=True):
        order = row.argsort(descending=True)[:top_k]
        kept = row[order] / row[order].sum()
        if top_p < 1:
            order = order[: int((kept.cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(row)
        expected[order] = row[order] / row[order].sum()
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)


def test_only_evaluation_is_restricted() -> None:
    """With one token to choose from, evaluation is greedy and training is as before."""
    free, one = SAMPLING, replace(SAMPLING, eval_temperature=1.0, eval_top_k=1)
    for a, b in zip(draw(ToyFlow(), starts(), free), draw(ToyFlow(), starts(), one), strict=True):
        same(a, b, 0)
    greedy = draw(ToyFlow(), starts(), free, evaluate=True)
    for a, b in zip(greedy, draw(ToyFlow(), starts(), one, evaluate=True), strict=True):
        assert a.completion == b.completion


@pytest.mark.parametrize("wrong", [{"eval_top_k": 0}, {"eval_top_p": 0.0}, {"eval_top_p": 1.5}])
def test_restrictions_without_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sampling.{next(iter(wrong))}"):
        replace(SAMPLING, **wrong)


class Watched(ToyTokens):
    """Remembers the logits it was asked for, and whether behind a context without the request."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, torch.Tensor]] = []
        self.bare: list[int] = []

    def guidance(self, contexts: Any) -> Any:
        found = super().guidance(contexts)
        self.bare.append(id(found))
        return found

    def next_image_logits(self, cache: Any, *args: Any) -> Any:
        found = super().next_image_logits(cache, *args)
        self.asked.append((id(cache) in self.bare, found))
        return found


def test_codes_are_guided_in_evaluation_only() -> None:
    """Both policies are asked at every step, and ``u + scale (c - u)`` is what is drawn from."""
    guided = replace(SAMPLING, guidance_scale=3.0)
    adapter = Watched()
    drawn = draw(adapter, starts(1), guided)
    assert not any(bare for bare, _ in adapter.asked)
    for one, other in zip(drawn, draw(ToyTokens(), starts(1), SAMPLING), strict=True):
        same(one, other, atol=0)
    adapter.asked.clear()
    drawn = draw(adapter, starts(1), guided, evaluate=True)
    pairs = zip(adapter.asked[::2], adapter.asked[1::2], strict=True)
    for code, ((first, c), (second, u)) in enumerate(pairs):
        assert (first, second) == (False, True)
        expected = (u + 3 * (c - u)).log_softmax(-1)
        codes = torch.stack([t.segments[-1].tokens[code] for t in drawn])  # type: ignore[union-attr]
        found = torch.stack([t.segments[-1].log_prob[code] for t in drawn])  # type: ignore[union-attr,index]
        torch.testing.assert_close(found, expected.gather(1, codes[:, None])[:, 0])
    assert len(adapter.asked) == 2 * len(drawn[0].segments[-1].tokens)  # type: ignore[union-attr]
