"""Compiled layers: the same numbers, few graphs, few shapes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_unigrpo.adapters.bagel import BagelAdapter
from lightning_unigrpo.adapters.bagel.adapter import GRAIN
from lightning_unigrpo.adapters.bagel.lora import LoRA
from lightning_unigrpo.adapters.common.attention import NextWord
from lightning_unigrpo.distributed import cast_once
from lightning_unigrpo.rollout import sample_text
from lightning_unigrpo.types import Scores, Segment, TextSegment, Trajectory
from tests.test_bagel import (
    ATOL,
    assert_same_gradients,
    assert_scores,
    build,
    captured,
    decode_into,
    given,
    gradients,
    trajectories,
    velocities,
)

# What torch 2.13's own compiler does: the first when it is imported, the second as it traces.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),
]


@pytest.fixture
def compiled() -> tuple[BagelAdapter, CompileCounterWithBackend]:
    """Give an adapter whose graphs are counted and run as they were traced."""
    torch._dynamo.reset()
    adapter, counter = build(compile_layers=True), CompileCounterWithBackend("eager")
    adapter.net.compile_layers(backend=counter)
    return adapter, counter


def sampling_path(adapter: BagelAdapter, rows: list[Trajectory]) -> Scores:
    """Walk two rounds through caches, as a rollout does."""
    texts: list[list[Any]] = [[] for _ in rows]
    images: list[list[Any]] = [[] for _ in rows]
    cache = adapter.prefill([[s for s in row.segments if not s.is_sampled] for row in rows])
    for place in range(0, 4, 2):
        pairs: list[Any] = [
            [s for s in r.segments if s.is_sampled][place : place + 2] for r in rows
        ]
        for b, found in enumerate(decode_into(adapter, cache, [text for text, _ in pairs])):
            texts[b].append(found)
        adapter.extend(cache, [text for text, _ in pairs])
        for b, found in enumerate(velocities(adapter, cache, [image for _, image in pairs])):
            images[b].append(found)
        adapter.extend(cache, [image for _, image in pairs])
    return Scores(
        text=[x for row in texts for x in row], velocity=[x for row in images for x in row]
    )


def test_a_graph_per_half_grad_mode_and_precision(
    compiled: tuple[BagelAdapter, CompileCounterWithBackend], generator: torch.Generator
) -> None:
    """Both experts, all layers, all lengths, all phases share them; nothing falls back to eager."""
    (adapter, counter), plain = compiled, build()
    seen = []
    for _ in range(2):
        rows = trajectories(2, generator)
        with torch.no_grad():
            expected = plain(rows)
            assert_scores(adapter(rows), expected.text, expected.velocity)
        assert_scores(sampling_path(adapter, rows), expected.text, expected.velocity)
        seen.append(counter.frame_count)
        assert_same_gradients(gradients(plain, rows), gradients(adapter, rows))
        seen.append(counter.frame_count)
        adapter.net.zero_grad()  # as a collection begins
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            with cast_once(adapter.net):
                sampling_path(adapter, rows)
            seen.append(counter.frame_count)
            with torch.no_grad():
                adapter(rows)
            seen.append(counter.frame_count)
            gradients(adapter, rows)
            adapter.net.zero_grad()
        seen.append(counter.frame_count)
    # Two halves: without and with gradients; under autocast with weights cast before, or by it.
    assert seen == [2, 4, 6, 8, 10, 10, 10, 10, 10, 10]


def test_lora_and_frozen_parts_are_graphs_of_their_own_and_no_more(
    generator: torch.Generator,
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    adapter, plain = (
        build(compile_layers=c, lora=LoRA(rank=2, experts=("flow",))) for c in (True, False)
    )
    adapter.net.compile_layers(backend=counter)
    for each in (adapter, plain):
        each.materialize()
        with torch.no_grad():
            for parameter in each.param_groups()["flow"]:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    seen = []
    for _ in range(2):
        rows = trajectories(2, generator)
        assert_same_gradients(gradients(plain, rows), gradients(adapter, rows))
        adapter.net.zero_grad()
        expected = plain(rows)
        assert_scores(sampling_path(adapter, rows), expected.text, expected.velocity)
        context = adapter.reference()
        assert context is not None
        with context, torch.no_grad():
            adapter(rows)
        seen.append(counter.frame_count)
    # Two halves x two experts (one has adapters) x (with gradients, without, adapters off); and the
    # first layer's words, which a frozen embedding leaves without a gradient.
    assert seen == [14, 14]


def test_decoding_has_few_shapes(
    compiled: tuple[BagelAdapter, CompileCounterWithBackend],
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 words in rows that end one by one: each shape could be captured as a CUDA graph."""
    shapes: list[tuple[int, ...]] = []
    call: Callable[..., Any] = NextWord.__call__

    def spy(self: NextWord, layer: int, heads: Any, sizes: Any) -> Any:
        if self.cache is cache:
            keys = cache.keys[layer]
            shapes.append((len(heads.query), self.total, len(keys), keys.shape[1]))
        return call(self, layer, heads, sizes)

    monkeypatch.setattr(NextWord, "__call__", spy)
    adapter, _ = compiled
    contexts: list[list[Segment]] = [[given(2 + b, generator)] for b in range(7)]
    ends = [5, 40, 90, 150, 151, 220, 300]
    plain, cache = build(), adapter.prefill(contexts)
    other = plain.prefill(contexts)
    for one in (cache, other):
        one.reserve(302)
    tokens = None
    for step in range(300):
        active = torch.tensor([step < end for end in ends])
        found = adapter.next_logits(cache, tokens, active)
        wanted = plain.next_logits(other, tokens, active)
        torch.testing.assert_close(found[active], wanted[active], atol=ATOL, rtol=0)
        tokens = torch.where(active, wanted.argmax(-1), 0)
    capacity = 3 * GRAIN  # 310 slots
    assert {shape[2:] for shape in shapes} == {(7, capacity)}
    assert {shape[1] for shape in shapes} == {GRAIN, 2 * GRAIN, 3 * GRAIN}
    assert {shape[0] for shape in shapes} == {8, 4, 2}
    assert len(set(shapes)) <= 6


def test_sampled_text_is_the_same(
    compiled: tuple[BagelAdapter, CompileCounterWithBackend], generator: torch.Generator
) -> None:
    contexts: list[list[Segment]] = [[given(2 + b, generator)] for b in range(5)]
    uniforms = torch.rand(5, 30, generator=generator, dtype=torch.float64)
    one, other = (
        sample_text(a, a.prefill(contexts), uniforms, max_tokens=30, temperature=1.0)
        for a in (compiled[0], build())
    )
    for a, b in zip(one, other, strict=True):
        assert isinstance(a, TextSegment)
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.log_prob, b.log_prob, atol=ATOL, rtol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ for a CPU")
def test_inductor(generator: torch.Generator) -> None:
    """The real compiler, both views and the gradients."""
    torch._dynamo.reset()
    adapter, plain, rows = build(compile_layers=True), build(), trajectories(2, generator)
    expected = plain(rows)
    assert_scores(sampling_path(adapter, rows), expected.text, expected.velocity)
    assert_same_gradients(gradients(plain, rows), gradients(adapter, rows))
    assert captured(adapter, lambda: adapter(rows))
