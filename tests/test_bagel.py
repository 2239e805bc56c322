"""Bagel's two views of one policy: what the packed pass and the cached path must agree on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_unigrpo.adapter import token_log_probs
from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig
from lightning_unigrpo.adapters.bagel.guidance import Guidance
from lightning_unigrpo.adapters.bagel.packing import Packer, position_ids
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.cache import RowCache
from lightning_unigrpo.distributed import cast_once
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    Trajectory,
)

ATOL = 2e-5  # float32 sums in another order, through two layers
BOS, EOS, START, END = 36, 37, 38, 39
CONFIG = BagelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=100.0,
    z_channels=1,
    latent_patch_size=2,
    latent_downsample=2,
    max_latent_size=4,
    bos=BOS,
    eos=EOS,
    start_of_image=START,
    end_of_image=END,
)
C = CONFIG.latent_channels
NUM_STEPS = 3


class Ids:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def build(**settings: Any) -> BagelAdapter:
    """Return an adapter none of whose weights is neutral: norms and biases matter, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = BagelAdapter(CONFIG, Ids(), default_size=(8, 8), **settings)
        with torch.no_grad():
            for name, parameter in adapter.net.named_parameters():
                if parameter.ndim == 1:
                    centre = 0.0 if name.endswith("bias") else 1.0
                    parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
                elif "proj" in name:
                    parameter.mul_(3)  # attention far from uniform: a wrong key shows
    return adapter.eval()


@pytest.fixture(scope="module")
def adapter() -> BagelAdapter:
    return build()


def given(num: int, generator: torch.Generator) -> TextSegment:
    return TextSegment(tokens=torch.randint(0, BOS, (num,), generator=generator))


def written(num: int, generator: torch.Generator, *, stopped: bool = True) -> TextSegment:
    """Return a sampled text of ``num`` tokens, its stop token included."""
    tokens = torch.randint(0, BOS, (num,), generator=generator)
    if stopped:
        tokens[-1] = EOS
    return TextSegment(tokens=tokens, stopped=stopped, log_prob=torch.zeros(num))


def drawn(grid: Grid, generator: torch.Generator, *, is_context: bool) -> ImageSegment:
    num = grid[0] * grid[1]
    states = torch.randn(NUM_STEPS + 1, num, C, generator=generator)
    return ImageSegment(
        latent=torch.randn(num, C, generator=generator),
        grid=grid,
        is_context=is_context,
        states=states,
        sigmas=torch.linspace(0.9, 0.3, NUM_STEPS + 1),
    )


def trajectories(rounds: int, generator: torch.Generator) -> list[Trajectory]:
    """Return three rollouts: other lengths, other grids, one cut off, one with an input image."""
    found = []
    grids: list[Grid] = [(2, 2), (1, 3), (3, 2)]
    for b, grid in enumerate(grids):
        segments: list[Segment] = [given(2 + 3 * b, generator)]
        if b == 2:
            picture = torch.randn(4, C, generator=generator)
            segments.append(ImageSegment(latent=picture, grid=(2, 2), is_context=True))
        for number in range(rounds):
            segments.append(written(4 - b + number, generator, stopped=b != 1))
            segments.append(drawn(grid, generator, is_context=number + 1 < rounds))
        found.append(Trajectory(prompt=Prompt(text=""), segments=segments, group=0, member=b))
    return found


def decode_into(
    adapter: BagelAdapter, cache: RowCache, texts: Sequence[TextSegment]
) -> list[Tensor]:
    """Feed texts as a rollout does (the last token is never fed); return log-probabilities."""
    lengths = torch.tensor([len(text.tokens) for text in texts])
    table = torch.nn.utils.rnn.pad_sequence([text.tokens for text in texts], batch_first=True)
    logits = adapter.next_logits(cache, None, lengths > 0)
    found = [token_log_probs(logits, table[:, 0])[0]]
    for i in range(1, table.shape[1]):
        logits = adapter.next_logits(cache, table[:, i - 1], lengths > i)
        found.append(token_log_probs(logits, table[:, i])[0])
    return [row[:n] for row, n in zip(torch.stack(found, 1), lengths.tolist(), strict=True)]


def velocities(
    adapter: BagelAdapter, cache: RowCache, images: Sequence[ImageSegment]
) -> list[Tensor]:
    """Ask for every window step's velocity, row by row (the grids differ)."""
    found = []
    for b, image in enumerate(images):
        assert image.states is not None
        assert image.sigmas is not None
        row = cache.select(torch.tensor([b]))
        steps = zip(image.states[:-1], image.sigmas[:-1], strict=True)
        found.append(
            torch.cat([adapter.velocity(row, x[None], s[None], image.grid) for x, s in steps])
        )
    return found


def visible(cache: RowCache) -> list[list[Tensor]]:
    """Return what each row remembers, per layer, copied."""
    lengths = cache.lengths.tolist()
    parts = [*cache.keys, *cache.values]
    return [[x[b, :n].clone() for x in parts] for b, n in enumerate(lengths)]


def assert_same_cache(one: RowCache, other: RowCache, *, atol: float) -> None:
    assert torch.equal(one.lengths, other.lengths)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.open, other.open)
    for a, b in zip(visible(one), visible(other), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=0)


def assert_scores(found: Scores, text: Sequence[Tensor], velocity: Sequence[Tensor]) -> None:
    for pairs in (zip(found.text, text, strict=True), zip(found.velocity, velocity, strict=True)):
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=ATOL, rtol=0)


# ---- one policy, two views


@pytest.mark.parametrize("rounds", [1, 2])
def test_cached_equals_packed(
    adapter: BagelAdapter, generator: torch.Generator, rounds: int
) -> None:
    rows = trajectories(rounds, generator)
    prefix = [[s for s in row.segments if not s.is_sampled] for row in rows]
    plans = [[s for s in row.segments if s.is_sampled] for row in rows]
    cache = adapter.prefill(prefix)
    text: list[list[Tensor]] = [[] for _ in rows]
    velocity: list[list[Tensor]] = [[] for _ in rows]
    for place in range(0, 2 * rounds, 2):
        texts: Any = [plan[place] for plan in plans]
        images: Any = [plan[place + 1] for plan in plans]
        for b, part in enumerate(decode_into(adapter, cache, texts)):
            text[b].append(part)
        adapter.extend(cache, texts)
        for b, part in enumerate(velocities(adapter, cache, images)):
            velocity[b].append(part)
        adapter.extend(cache, images)
    with torch.no_grad():
        assert_scores(adapter(rows), [*chain(*text)], [*chain(*velocity)])


def test_a_batch_of_velocities_is_its_rows(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """Rows with other lengths, other counters and other noise levels, one of them empty."""
    rows = [row.segments[: 2 + b] for b, row in enumerate(trajectories(1, generator))]
    cache = adapter.prefill([*rows, []])
    x, sigma = torch.randn(4, 6, C, generator=generator), torch.tensor([0.9, 0.5, 0.2, 1.0])
    together = adapter.velocity(cache, x, sigma, (2, 3))
    for b, row in enumerate([*rows, []]):
        alone = adapter.velocity(adapter.prefill([row]), x[b : b + 1], sigma[b : b + 1], (2, 3))
        torch.testing.assert_close(together[b : b + 1], alone, atol=ATOL, rtol=0)


def test_trajectories_without_text_or_image(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """Whatever is missing, the others are scored as they are alone."""
    both = trajectories(1, generator)[0]
    kept = [both.segments[:2], both.segments[:1] + both.segments[2:], both.segments[:1], []]
    rows = [Trajectory(prompt=both.prompt, segments=s, group=0, member=0) for s in kept]
    with torch.no_grad():
        whole = adapter([both, *rows])
        parts = [adapter([both]), *(adapter([row]) for row in rows[:3])]
    assert (len(whole.text), len(whole.entropy), len(whole.velocity)) == (2, 2, 2)
    assert_scores(
        whole, [t for part in parts for t in part.text], [v for p in parts for v in p.velocity]
    )


def test_steps_are_scored_apart(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """The copies of one image are blind to each other, so chunks of a window give the same."""
    rows = trajectories(2, generator)
    with torch.no_grad():
        whole = adapter(rows)
        chunks = [adapter(rows, slice(0, 1)), adapter(rows, slice(1, None))]
    joined = [torch.cat(pair) for pair in zip(*(chunk.velocity for chunk in chunks), strict=True)]
    for chunk in chunks:
        assert_scores(whole, chunk.text, joined)


def test_log_probs_are_tempered_text_by_text(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """Against logits of the cached path; one batch may hold several temperatures."""
    rows = trajectories(1, generator)
    for row, temperature in zip(rows, (0.5, 1.0, 2.0), strict=True):
        text = row.segments[-2]
        assert isinstance(text, TextSegment)
        text.temperature = temperature
    with torch.no_grad():
        scores = adapter(rows)
    for row, found, entropy in zip(rows, scores.text, scores.entropy, strict=True):
        text = row.segments[-2]
        assert isinstance(text, TextSegment)
        cache, active = adapter.prefill([row.segments[:-2]]), torch.tensor([True])
        fed = [None, *text.tokens[:-1, None]]
        logits = torch.cat([adapter.next_logits(cache, token, active) for token in fed])
        expected = token_log_probs(logits, text.tokens, temperature=text.temperature)
        torch.testing.assert_close((found, entropy), expected, atol=ATOL, rtol=0)


# ---- marks, positions, visibility


def sees(query: tuple[int, str, int], key: tuple[int, str, int]) -> bool:
    """The rule in words: (place, kind, block); earlier or own image, but no foreign noise."""
    if key[2] == query[2]:
        return query[1] != "text" or key[0] <= query[0]
    return key[2] < query[2] and key[1] != "noise"


def captured(adapter: BagelAdapter, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the rows and the attention of one call of the network."""
    calls: list[Any] = []
    handle = adapter.net.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        run()
    handle.remove()
    (call,) = calls
    return call[0], call[1]


def test_layout_of_two_rounds(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """Ids, RoPE positions and visibility of a whole trajectory, written down by hand.

    prompt 0-3, reasoning 4-7, copies at 8, clean copy at 8, reasoning 9-12, copies at 13.
    """
    first, second = (drawn((1, 2), generator, is_context=c) for c in (True, False))
    texts = [written(3, generator), written(3, generator, stopped=False)]
    prompt = given(2, generator)
    row = Trajectory(
        prompt=Prompt(text=""),
        segments=[prompt, texts[0], first, texts[1], second],
        group=0,
        member=0,
    )
    pack, packed = captured(adapter, lambda: adapter([row]))

    expected: list[tuple[str, list[Any], list[int]]] = [
        ("text", [BOS, *prompt.tokens.tolist(), EOS], [0, 1, 2, 3]),
        ("text", [BOS, *texts[0].tokens.tolist()], [4, 5, 6, 7]),
        *[("noise", [START, 0.0, 0.0, END], [8] * 4)] * NUM_STEPS,
        ("clean", [START, 0.0, 0.0, END], [8] * 4),
        ("text", [BOS, *texts[1].tokens.tolist(), EOS], [9, 10, 11, 12, 13]),
        *[("noise", [START, 0.0, 0.0, END], [14] * 4)] * NUM_STEPS,
    ]
    flat = packed.layout.rows[0].tolist()
    num_und = len(pack.positions)
    ids = [pack.token_ids[r].item() if r < num_und else 0.0 for r in flat]
    positions = torch.cat([pack.positions, pack.latent_positions])[flat].tolist()
    assert ids == [i for _, block, _ in expected for i in block]
    assert positions == [p for _, _, where in expected for p in where]

    places = [(kind, block) for block, (kind, ids, _) in enumerate(expected) for _ in ids]
    labelled = [(i, kind, block) for i, (kind, block) in enumerate(places)]
    rule = torch.tensor([[sees(query, key) for key in labelled] for query in labelled])
    assert torch.equal(packed.layout.visible()[0], rule)
    sigmas = torch.cat([first.sigmas[:-1], torch.zeros(1), second.sigmas[:-1]])  # type: ignore[index]
    assert torch.equal(pack.sigma[pack.image_of], sigmas.repeat_interleave(2))
    assert pack.latent_ids.tolist() == [0, 1] * 7


def test_noise_is_invisible_to_what_follows(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """Neither values nor gradients of a later round know the states of an earlier one."""
    row = trajectories(2, generator)[0]
    first = row.segments[2]
    assert isinstance(first, ImageSegment)
    assert first.states is not None
    first.states.requires_grad_()
    before = adapter([row])
    (before.text[1].sum() + before.velocity[1].sum()).backward()
    assert first.states.grad is not None
    assert not first.states.grad.any()
    first.states = torch.randn(first.states.shape, generator=generator)
    with torch.no_grad():
        after = adapter([row])
    torch.testing.assert_close(after.text[1], before.text[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(after.velocity[1], before.velocity[1], atol=1e-6, rtol=0)
    assert not torch.allclose(after.velocity[0], before.velocity[0], atol=1e-2)


def test_counter_after_noise_and_after_a_clean_copy(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """An image takes many slots and one position; one that is not looked at takes nothing."""
    cache = adapter.prefill([[given(3, generator)], [given(1, generator)]])
    assert cache.positions.tolist() == cache.lengths.tolist() == [5, 3]
    adapter.velocity(cache, torch.randn(2, 4, C), torch.ones(2), (2, 2))
    adapter.extend(cache, [drawn((2, 2), generator, is_context=False) for _ in range(2)])
    assert cache.positions.tolist() == cache.lengths.tolist() == [5, 3]
    adapter.extend(cache, [drawn((2, 2), generator, is_context=c) for c in (True, False)])
    assert cache.positions.tolist() == [6, 3]
    assert cache.lengths.tolist() == [11, 3]


# ---- the cache


def test_extend_equals_prefill(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """Rows of one call may be of different kinds and sizes, and may add nothing."""
    start = [[given(3, generator)], [], [given(1, generator)], [given(6, generator)]]
    added: list[list[Segment]] = [
        [given(4, generator), drawn((1, 3), generator, is_context=True)],
        [drawn((2, 2), generator, is_context=True), given(0, generator)],
        [drawn((2, 2), generator, is_context=False), drawn((3, 2), generator, is_context=True)],
        [written(2, generator, stopped=False), given(5, generator)],
    ]
    cache = adapter.prefill(start)
    for place in zip(*added, strict=True):
        adapter.extend(cache, place)
    whole = adapter.prefill([[*a, *b] for a, b in zip(start, added, strict=True)])
    assert_same_cache(cache, whole, atol=ATOL)


def test_decoded_text_is_completed_not_repeated(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """Stopped, cut off, and stopped at once; a second text in the same row starts anew."""
    texts = [
        written(5, generator),
        written(3, generator, stopped=False),
        written(1, generator),
    ]
    again = [written(n, generator) for n in (1, 4, 2)]
    start = [[given(2 + b, generator)] for b in range(3)]
    cache = adapter.prefill(start)
    for part in (texts, again):
        decode_into(adapter, cache, part)
        assert cache.open.tolist() == [len(text.tokens) for text in part]
        adapter.extend(cache, part)
        assert cache.open.tolist() == [0, 0, 0]
    whole = adapter.prefill([[*c, a, b] for c, a, b in zip(start, texts, again, strict=True)])
    assert_same_cache(cache, whole, atol=ATOL)


def test_inactive_rows_are_untouched(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """To the bit, and while the capacity grows under them."""
    cache = adapter.prefill([[given(n, generator)] for n in (7, 2, 4)])
    adapter.next_logits(cache, None, torch.ones(3, dtype=torch.bool))
    capacity = cache.keys[0].shape[1]
    before, lengths = visible(cache), cache.lengths.clone()
    positions, opened = cache.positions.clone(), cache.open.tolist()
    active = torch.tensor([False, True, False])
    for _ in range(capacity):
        logits = adapter.next_logits(cache, torch.tensor([1, 2, 3]), active)
        assert logits.isfinite().all()
    assert cache.keys[0].shape[1] > capacity
    after = visible(cache)
    for b in (0, 2):
        assert all(torch.equal(x, y) for x, y in zip(before[b], after[b], strict=True))
        assert (cache.lengths[b], cache.positions[b]) == (lengths[b], positions[b])
        assert cache.open[b] == opened[b]
    assert cache.lengths[1] == lengths[1] + capacity


@pytest.mark.parametrize("num_rows", [0, 2])
def test_calls_without_a_live_row(
    adapter: BagelAdapter, generator: torch.Generator, num_rows: int
) -> None:
    """A rank whose rows have all finished still calls the network: sharded ranks move in lockstep."""
    cache = adapter.prefill([[given(3, generator)] for _ in range(num_rows)])
    before = visible(cache)
    calls: list[int] = []
    handles = [
        u.register_forward_pre_hook(lambda *_: calls.append(1)) for u in adapter.shard_units()
    ]
    idle, tokens = torch.zeros(num_rows, dtype=torch.bool), torch.zeros(num_rows, dtype=torch.long)
    for fed in (None, tokens):
        logits = adapter.next_logits(cache, fed, idle)
        assert logits.shape == (num_rows, CONFIG.vocab_size)
        assert logits.isfinite().all()
    for handle in handles:
        handle.remove()
    assert len(calls) == 2 * CONFIG.num_hidden_layers
    for a, b in zip(before, visible(cache), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    nothing = torch.randn(num_rows, 4, C)
    found = adapter.velocity(cache, nothing, torch.ones(num_rows), (2, 2))
    assert found.shape == nothing.shape


def test_nothing_to_score(adapter: BagelAdapter) -> None:
    scores = adapter([])
    assert scores.text == scores.velocity == []


def test_velocity_leaves_the_cache_alone(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """Its keys go behind each row's length; they change neither memory nor the next answer."""
    contexts = [[given(n, generator)] for n in (6, 1)]
    cache = adapter.prefill(contexts)
    before, positions = visible(cache), cache.positions.clone()
    x, sigma = torch.randn(2, 6, C, generator=generator), torch.tensor([0.8, 0.3])
    first = adapter.velocity(cache, x, sigma, (3, 2))
    adapter.velocity(cache, 9 * x, sigma, (3, 2))
    assert torch.equal(adapter.velocity(cache, x, sigma, (3, 2)), first)
    for a, b in zip(before, visible(cache), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert torch.equal(cache.positions, positions)
    active = torch.ones(2, dtype=torch.bool)
    fresh = adapter.next_logits(adapter.prefill(contexts), None, active)
    torch.testing.assert_close(adapter.next_logits(cache, None, active), fresh, atol=1e-6, rtol=0)


def test_velocity_follows_its_context(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """What is kept between denoising steps is that of this grid, these rows, this moment."""
    contexts: list[list[Segment]] = [[given(6, generator)], [given(1, generator)]]
    x, sigma = torch.randn(2, 6, C, generator=generator), torch.tensor([0.8, 0.3])
    cache = adapter.prefill(contexts)

    def check(used: RowCache, rows: Sequence[Sequence[Segment]], grid: Grid) -> None:
        fresh = adapter.velocity(adapter.prefill(rows), x, sigma, grid)
        found = adapter.velocity(used, x, sigma, grid)
        torch.testing.assert_close(found, fresh, atol=ATOL, rtol=0)

    for grid in ((3, 2), (2, 3)):
        check(cache, contexts, grid)
    check(cache.select(torch.tensor([1, 0])), contexts[::-1], (3, 2))
    check(cache.expand([0, 2]), [contexts[1]] * 2, (3, 2))
    more = [written(2, generator), drawn((2, 2), generator, is_context=True)]
    adapter.extend(cache, more)
    longer = [[*row, segment] for row, segment in zip(contexts, more, strict=True)]
    check(cache, longer, (3, 2))
    opened = written(1, generator)
    decode_into(adapter, cache, [opened, opened])
    adapter.extend(cache, [opened, opened])
    check(cache, [[*row, opened] for row in longer], (3, 2))


def test_select_and_expand_copy(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """Also in the middle of a text; what happens to a copy does not happen to the original."""
    contexts = [[given(n, generator)] for n in (2, 5, 1)]
    cache = adapter.prefill(contexts)
    adapter.next_logits(cache, None, torch.tensor([True, False, True]))
    before = visible(cache)
    chosen = cache.select(torch.tensor([2, 0, 0]))
    assert (len(chosen), chosen.open.tolist()) == (3, [1, 1, 1])
    for a, b in zip(visible(chosen), [before[2], before[0], before[0]], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    expanded = cache.expand([1, 0, 2])
    assert torch.equal(expanded.lengths, cache.lengths[[0, 2, 2]])
    assert torch.equal(expanded.positions, cache.positions[[0, 2, 2]])
    adapter.next_logits(chosen, torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool))
    adapter.velocity(expanded, torch.randn(3, 4, C), torch.ones(3), (2, 2))
    for a, b in zip(before, visible(cache), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert cache.open.tolist() == [1, 0, 1]


def test_a_dropped_cache_is_freed_at_once(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """Not when the collector happens to run: it knows nothing of a full device."""
    gc.collect()
    gc.disable()
    try:
        cache = adapter.prefill([[given(3, generator)]])
        adapter.velocity(cache, torch.randn(1, 4, C), torch.ones(1), (2, 2))
        left = weakref.ref(cache)
        del cache
        assert left() is None
    finally:
        gc.enable()


def test_reserved_room_is_exact_and_never_moved(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    """As many slots as a text may take, and the same memory until it ends."""
    cache = adapter.prefill([[given(n, generator)] for n in (2, 6)])
    cache.reserve(22)
    place = [x.data_ptr() for x in (*cache.keys, *cache.values)]
    assert cache.keys[0].shape[1] == 8 + 22
    texts = [written(20, generator, stopped=False), written(3, generator)]
    decode_into(adapter, cache, texts)
    adapter.extend(cache, texts)
    assert [x.data_ptr() for x in (*cache.keys, *cache.values)] == place
    assert cache.lengths.tolist() == [4 + 22, 8 + 4]  # with both marks; with the mark that opens
    assert cache.longest == 26


def test_capacity_doubles(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """A text of n tokens moves the cache about log2(n) times, not n times."""
    cache, active = adapter.prefill([[given(2, generator)]]), torch.ones(1, dtype=torch.bool)
    capacities = set()
    for _ in range(60):
        adapter.next_logits(cache, torch.tensor([1]), active)
        capacities.add(cache.keys[0].shape[1])
    assert len(capacities) <= 5


def test_sampling_builds_no_graph(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """Whatever mode the caller is in."""
    with torch.enable_grad():
        cache = adapter.prefill([[given(3, generator)]])
        logits = adapter.next_logits(cache, None, torch.ones(1, dtype=torch.bool))
        adapter.extend(cache, [written(1, generator)])
        velocity = adapter.velocity(cache, torch.randn(1, 4, C), torch.ones(1), (2, 2))
    assert not logits.requires_grad
    assert not velocity.requires_grad
    assert not any(x.requires_grad for x in [*cache.keys, *cache.values])


# ---- gradients


def gradients(
    adapter: BagelAdapter, rows: Sequence[Trajectory], *, text: float = 1.0, image: float = 1.0
) -> dict[str, Tensor]:
    """Return the gradient of a weighted sum, zeros where nothing arrives."""
    scores = adapter(rows)
    adapter.net.zero_grad()
    parts = [text * x.sum() for x in scores.text] + [
        image * (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in scores.velocity
    ]
    torch.stack(parts).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in adapter.net.named_parameters()
        if p.requires_grad
    }


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, a in one.items():
        # Relative to each weight: sums of a few hundred rows in another order.
        atol = 1e-5 * max(1.0, float(a.abs().max()))
        torch.testing.assert_close(
            other[name], a, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def block_wise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every packed pass run without a mask."""
    monkeypatch.setattr(attention, "DENSE_LIMIT", 0)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_executors_agree(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, rounds: int, detach: bool
) -> None:
    """Values and gradients, with a mask and block by block."""
    adapter = build(detach_context=detach)
    rows = trajectories(rounds, generator)
    dense, expected = adapter(rows), gradients(adapter, rows)
    monkeypatch.setattr(attention, "DENSE_LIMIT", 0)
    _, used = captured(adapter, lambda: adapter(rows))
    assert not used.dense
    assert_scores(adapter(rows), dense.text, dense.velocity)
    assert_same_gradients(expected, gradients(adapter, rows))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rounds", [1, 2])
def test_flex_attention_sees_the_same(generator: torch.Generator, rounds: int) -> None:
    """Values on a CPU, where torch runs it unfused; equal beginnings shared, and padding beside them."""
    rows, flex = [*trajectories(rounds, generator), *alike(generator)], build(attention="flex")
    with torch.no_grad():
        expected = build()(rows)
        _, used = captured(flex, lambda: flex(rows))
        assert isinstance(used, attention.FlexPackedAttention)
        assert_scores(flex(rows), expected.text, expected.velocity)
    with pytest.raises(ValueError, match=r"adapter\.attention is 'flex', .* on a CPU"):
        flex(rows)
    with pytest.raises(ValueError, match=r"adapter\.detach_context"):
        build(attention="flex", detach_context=True)


@pytest.mark.gpu
def test_flex_attention_on_a_gpu(generator: torch.Generator) -> None:
    """Values and gradients."""
    rows = trajectories(2, generator)
    for row in rows:
        for segment in row.segments:
            for name, value in vars(segment).items():
                if isinstance(value, Tensor):
                    setattr(segment, name, value.cuda())
    plain, flex = build().cuda(), build(attention="flex").cuda()
    expected = plain(rows)
    assert_scores(flex(rows), expected.text, expected.velocity)
    assert_same_gradients(gradients(plain, rows), gradients(flex, rows))


@pytest.mark.parametrize("tile", [0, 12, 20])
def test_small_noise_blocks_attend_together(
    adapter: BagelAdapter, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    """One by one, two and one, or several of one size but not of another: the same numbers."""
    rows = trajectories(2, generator)
    expected, packed = captured(adapter, lambda: adapter(rows))[1], adapter(rows)
    assert len(expected.noise.samples) == 2 * len(rows)  # all the copies of an image
    monkeypatch.setattr(attention, "TILE", tile)
    _, used = captured(adapter, lambda: adapter(rows))
    sizes = [sum(len(rows) for _, rows in blocks) for blocks in used.noise.samples]
    assert len(sizes) > 2 * len(rows)
    assert max(sizes) <= max(tile, 8)
    assert_scores(adapter(rows), packed.text, packed.velocity)


def alike(generator: torch.Generator) -> list[Trajectory]:
    """Return five rollouts that have more or less of their beginning in common.

    Of one request: 0 and 1 reason with the same words; 2 has these words too, but was cut off before
    its stop token; 3 reasons otherwise. 4 is another request with the reasoning of 0.
    """
    prompt, other, reason = given(4, generator), given(3, generator), written(4, generator)
    cut = TextSegment(tokens=reason.tokens[:-1], stopped=False, log_prob=torch.zeros(3))
    picture = ImageSegment(
        latent=torch.randn(4, C, generator=generator), grid=(2, 2), is_context=True
    )
    second = written(3, generator)
    found = []
    for begin, text in (
        (prompt, reason),
        (prompt, reason),
        (prompt, cut),
        (prompt, None),
        (other, reason),
    ):
        segments: list[Segment] = [
            TextSegment(tokens=begin.tokens.clone()),
            picture,
            written(2, generator) if text is None else text,
            drawn((1, 2), generator, is_context=True),
            second,
            drawn((2, 2), generator, is_context=False),
        ]
        found.append(Trajectory(prompt=Prompt(text=""), segments=segments, group=0, member=0))
    return found


@pytest.mark.parametrize("path", ["dense", "block_wise"])
@pytest.mark.parametrize("detach", [False, True])
def test_equal_beginnings_are_packed_once(
    generator: torch.Generator, path: str, detach: bool, request: pytest.FixtureRequest
) -> None:
    """Fewer rows, the same values and gradients; behind images of their own nothing is shared."""
    if path == "block_wise":
        request.getfixturevalue(path)
    sharing, plain = (build(detach_context=detach, share_prefixes=s) for s in (True, False))
    rows = alike(generator)
    few, many = (captured(a, lambda a=a: a(rows))[0] for a in (sharing, plain))
    # The prompt (6 rows) and the marks of the picture (2) three times, the reasoning (5) twice.
    assert len(many.token_ids) - len(few.token_ids) == 3 * (6 + 2) + 2 * 5
    assert len(many.latents) - len(few.latents) == 3 * 4
    expected = plain(rows)
    assert_scores(sharing(rows), expected.text, expected.velocity)
    assert_same_gradients(gradients(plain, rows), gradients(sharing, rows))


def words_of(adapter: BagelAdapter, grads: dict[str, Tensor]) -> Tensor:
    """Return the gradient of the embeddings of words: marks of images are the block's own."""
    return grads["language_model.model.embed_tokens.weight"][: adapter.config.start_of_image]


KEYS_AND_VALUES = [
    f"language_model.model.layers.0.self_attn.{part}_proj.weight" for part in ("k", "v")
]


def test_image_loss_reaches_the_reasoning(
    adapter: BagelAdapter, generator: torch.Generator
) -> None:
    grads = gradients(adapter, trajectories(1, generator), text=0.0)
    assert words_of(adapter, grads).abs().sum() > 0
    assert all(grads[name].abs().sum() > 0 for name in KEYS_AND_VALUES)


@pytest.mark.parametrize("path", ["dense", "block_wise"])
def test_detach_context_cuts_the_image_loss_only(
    generator: torch.Generator, path: str, request: pytest.FixtureRequest
) -> None:
    """Values and the text's gradient stay; nothing of the image loss arrives at a context row."""
    if path == "block_wise":
        request.getfixturevalue(path)
    whole, cut = build(), build(detach_context=True)
    rows = trajectories(2, generator)
    expected = whole(rows)
    assert_scores(cut(rows), expected.text, expected.velocity)
    assert_same_gradients(gradients(whole, rows, image=0.0), gradients(cut, rows, image=0.0))

    looked_at = rows[0].segments[2]
    assert isinstance(looked_at, ImageSegment)
    assert words_of(whole, gradients(whole, rows, text=0.0)).abs().sum() > 0
    looked_at.latent.requires_grad_()
    grads = gradients(cut, rows, text=0.0)
    assert not words_of(cut, grads).any()
    assert looked_at.latent.grad is not None
    assert not looked_at.latent.grad.any()
    flow = [g for name, g in grads.items() if "q_proj_moe_gen" in name or "vae2llm" in name]
    assert all(g.abs().sum() > 0 for g in flow)


def test_checkpointing_changes_no_gradient(generator: torch.Generator) -> None:
    """Each layer runs twice where a graph is built, once elsewhere."""
    plain, saving = build(), build(gradient_checkpointing=True)
    rows = trajectories(2, generator)
    calls: list[int] = []
    for layer in saving.shard_units():
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same_gradients(gradients(plain, rows), gradients(saving, rows))
    assert len(calls) == 2 * CONFIG.num_hidden_layers
    with torch.no_grad():
        saving(rows)
    assert len(calls) == 3 * CONFIG.num_hidden_layers


# ---- precision


def test_bf16_autocast(adapter: BagelAdapter, generator: torch.Generator) -> None:
    """Float32 leaves the adapter; the cache holds the compute dtype; both views stay close."""
    rows = trajectories(1, generator)
    wide = adapter(rows)
    with torch.autocast("cpu", torch.bfloat16):
        scores = adapter(rows)
        texts: Any = [row.segments[-2] for row in rows]
        images: Any = [row.segments[-1] for row in rows]
        cache = adapter.prefill([row.segments[:-2] for row in rows])
        text = decode_into(adapter, cache, texts)
        adapter.extend(cache, texts)
        velocity = velocities(adapter, cache, images)
        sum(x.sum() for x in [*scores.text, *scores.velocity]).backward()  # type: ignore[union-attr]
    adapter.net.zero_grad()
    assert {x.dtype for x in [*scores.text, *scores.velocity, *text, *velocity]} == {torch.float32}
    assert {x.dtype for x in [*cache.keys, *cache.values]} == {torch.bfloat16}
    for found in ([*text, *velocity], [*wide.text, *wide.velocity]):
        for a, b in zip([*scores.text, *scores.velocity], found, strict=True):
            # 8 bits of mantissa through two layers with weights three times their usual size
            assert (a - b).norm() < 0.1 * b.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Published weights are bfloat16; latents and noise levels stay float32."""
    adapter, rows = build(), trajectories(1, generator)
    expected = adapter(rows)
    adapter.to(dtype)
    scores = adapter(rows)
    images: Any = [row.segments[-1] for row in rows]
    cache = adapter.prefill([row.segments[:-1] for row in rows])
    bound = 0.1 if dtype is torch.bfloat16 else 1e-4
    found = [*scores.text, *scores.velocity, *velocities(adapter, cache, images)]
    wanted = [*expected.text, *expected.velocity, *expected.velocity]
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < bound * b.norm()


# ---- what others ask of the adapter


def test_param_groups_split_by_expert(adapter: BagelAdapter) -> None:
    """Disjoint and complete; bridges belong to the flow."""
    names = {id(p): name for name, p in adapter.net.named_parameters()}
    groups = {k: {names[id(p)] for p in group} for k, group in adapter.param_groups().items()}
    trainable = {name for name, p in adapter.net.named_parameters() if p.requires_grad}
    assert groups["text"] | groups["flow"] == trainable
    assert not groups["text"] & groups["flow"]
    bridges = ("vae2llm", "llm2vae", "time_embedder")
    assert groups["flow"] == {n for n in trainable if "moe_gen" in n or n.startswith(bridges)}
    assert "latent_pos_embed.pos_embed" not in trainable


def test_bridges_can_be_frozen() -> None:
    adapter = build(freeze=("vae2llm", "llm2vae", "time_embedder"))
    frozen = {n.split(".")[0] for n, p in adapter.net.named_parameters() if not p.requires_grad}
    assert frozen == {"vae2llm", "llm2vae", "time_embedder", "latent_pos_embed"}
    assert all(p.requires_grad for group in adapter.param_groups().values() for p in group)


def test_parts_are_frozen_by_name() -> None:
    adapter = build(freeze=("embed_tokens", "lm_head", "layers.0."))
    names = {n for n, p in adapter.net.named_parameters() if not p.requires_grad}
    assert {n for n in names if "layers" in n} == {
        n for n, _ in adapter.net.named_parameters() if "layers.0." in n
    }
    assert {n for n in names if "layers" not in n} == {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "latent_pos_embed.pos_embed",
    }
    with pytest.raises(
        ValueError, match=r"adapter\.freeze has 'vision', which is part of no .* embed_tokens"
    ):
        build(freeze=("vision",))


def test_shard_units_are_the_layers(adapter: BagelAdapter) -> None:
    assert len(adapter.shard_units()) == CONFIG.num_hidden_layers
    assert {id(m) for m in adapter.shard_units()} <= {id(m) for m in adapter.net.modules()}


def test_words_and_sizes(adapter: BagelAdapter) -> None:
    (segment,) = adapter.tokenize(Prompt(text="4 5"))
    assert isinstance(segment, TextSegment)
    assert segment.tokens.tolist() == [4, 5]
    assert not segment.is_sampled
    assert adapter.detokenize(torch.tensor([4, 5, EOS])) == "4 5"
    assert adapter.detokenize(torch.tensor([4, 5])) == "4 5"
    assert adapter.image_grid(Prompt(text="")) == (2, 2)
    assert adapter.image_grid(Prompt(text="", size=(4, 12))) == (1, 3)
    with pytest.raises(ValueError, match="multiples of 4 pixels"):
        adapter.image_grid(Prompt(text="", size=(6, 8)))
    assert position_ids((2, 3), 4).tolist() == [0, 1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match="does not fit"):
        position_ids((5, 1), 4)


def test_packer_numbers_latents_behind_words(generator: torch.Generator) -> None:
    """Experts work on slices: understanding rows first, whatever the order of blocks."""
    packer = Packer(config=CONFIG, device=torch.device("cpu"))
    for _ in range(2):
        packer.sample()
        packer.clean(ImageSegment(latent=torch.zeros(2, C), grid=(1, 2)), 0)
        packer.text([1, 2], 1)
    pack, layout = packer.finish()
    assert layout.rows.tolist() == [[0, 8, 9, 1, 2, 3], [4, 10, 11, 5, 6, 7]]
    assert pack.token_ids.tolist() == [START, END, 1, 2] * 2


@pytest.mark.parametrize("autocast", [True, False])
def test_weights_cast_once_for_a_rollout(generator: torch.Generator, autocast: bool) -> None:
    """Bit-equal to autocast's own casts, and undone, also when the rollout fails."""
    adapter = build()
    before = {name: p.clone() for name, p in adapter.net.named_parameters()}
    contexts = [[given(n, generator)] for n in (3, 5)]
    x, sigma = torch.randn(2, 4, C, generator=generator), torch.tensor([0.7, 0.7])
    active = torch.ones(2, dtype=torch.bool)

    def draw() -> tuple[Tensor, Tensor]:
        cache = adapter.prefill(contexts)
        return adapter.next_logits(cache, None, active), adapter.velocity(cache, x, sigma, (2, 2))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        expected = draw()
        with cast_once(adapter.net):
            kept = adapter.net.language_model.lm_head.weight
            assert kept.dtype == (torch.bfloat16 if autocast else torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(draw(), expected, strict=True))
        with pytest.raises(KeyError), cast_once(adapter.net):
            raise KeyError
    for name, p in adapter.net.named_parameters():
        assert torch.equal(p, before[name])


def test_guidance_interval_leaves_its_lower_end_out(generator: torch.Generator) -> None:
    """``low < sigma <= high``, both to the bit."""
    adapter = build(guide=Guidance(interval=(0.25, 0.75)))
    contexts: list[list[Segment]] = [[given(3, generator)]]
    cache, twin = adapter.prefill(contexts), adapter.guidance(contexts)
    x = torch.randn(1, 4, C, generator=generator)
    for sigma, acts in ((0.25, False), (0.2500001, True), (0.75, True), (0.7500001, False)):
        level = torch.tensor([sigma])
        plain = adapter.velocity(cache, x, level, (2, 2))
        found = adapter.guided_velocity(cache, twin, x, level, (2, 2), scale=4.0)
        assert torch.equal(found, plain) is not acts
