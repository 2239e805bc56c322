"""A decoder of ``transformers`` on flat rows computes what it computes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    PhiConfig,
    PhiModel,
    PretrainedConfig,
    Qwen2Config,
    Qwen2Model,
)

from lightning_unigrpo.adapters.common.attention import (
    Block,
    CachedAttention,
    FlexPackedAttention,
    Kind,
    Layout,
    NextWord,
    PackedAttention,
)
from lightning_unigrpo.adapters.common.cache import RowCache
from lightning_unigrpo.adapters.common.decoder import cache_sizes, run_decoder, use_flat_rows
from lightning_unigrpo.adapters.common.rotary import Rotary

SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500.0,
}
FAMILIES = [(LlamaModel, LlamaConfig), (Qwen2Model, Qwen2Config), (PhiModel, PhiConfig)]
LENGTHS = (5, 3)
CPU = torch.device("cpu")


def pair(model: Any, config: type[PretrainedConfig]) -> tuple[Any, Any]:
    """Return a decoder as transformers runs it, and its copy on flat rows."""
    torch.manual_seed(0)
    theirs = model._from_config(config(**SIZES), attn_implementation="eager").eval()
    ours = model(use_flat_rows(config(**SIZES)))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(params=FAMILIES, ids=[model.__name__ for model, _ in FAMILIES])
def decoders(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return pair(*request.param)


@pytest.fixture
def x(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(sum(LENGTHS), SIZES["hidden_size"], generator=generator)


POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def expected_of(theirs: Any, x: torch.Tensor) -> torch.Tensor:
    """Run each sequence alone."""
    parts = [
        theirs(inputs_embeds=part.unsqueeze(0)).last_hidden_state[0] for part in x.split(LENGTHS)
    ]
    return torch.cat(parts)


def causal_layout() -> Layout:
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    return Layout.build([[(Kind.CAUSAL, part.tolist())] for part in rows], CPU)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_sequences(
    decoders: tuple[Any, Any], x: torch.Tensor, generator: torch.Generator, checkpointing: bool
) -> None:
    theirs, ours = decoders
    weight = torch.randn(x.shape, generator=generator)
    expected = expected_of(theirs, x)
    attention = PackedAttention(causal_layout(), len(x))
    found = run_decoder(ours, x, POSITIONS, attention, gradient_checkpointing=checkpointing)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    (weight * expected).sum().backward()
    (weight * found).sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_cached_sequences(decoders: tuple[Any, Any], x: torch.Tensor) -> None:
    """All but the last word of each together, then the last ones, as decoding does."""
    theirs, ours = decoders
    expected = expected_of(theirs, x)
    cache = RowCache(cache_sizes(ours.config), len(LENGTHS), device=CPU, dtype=torch.float32)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    early = torch.tensor([i for i in range(len(x)) if i not in last])
    blocks: list[list[Block]] = [
        [(Kind.CAUSAL, rows.tolist())]
        for rows in torch.arange(len(early)).split([length - 1 for length in LENGTHS])
    ]
    with torch.no_grad():
        layout = Layout.build(blocks, CPU)
        cache.make_room(layout.rows.shape[1])
        found = run_decoder(ours, x[early], POSITIONS[early], CachedAttention(cache, layout))
        torch.testing.assert_close(found, expected[early], atol=1e-6, rtol=1e-5)
        counts = layout.valid.sum(1)
        cache.advance(counts, counts)
        cache.make_room(1)
        plan = NextWord(cache, torch.arange(len(LENGTHS)))
        found = run_decoder(ours, x[last], cache.positions, plan)
    torch.testing.assert_close(found, expected[last], atol=1e-6, rtol=1e-5)


def branches(theirs: Any, x: torch.Tensor, kinds: list[tuple[Kind, list[int]]]) -> torch.Tensor:
    """Run each noise block behind the words alone, with a mask written out by hand."""
    [(_, words), *noise] = kinds
    found = torch.full_like(x, torch.nan)
    for kind, rows in noise:
        both = [*words, *rows]
        mask = torch.ones(len(both), len(both)).tril()
        if kind == Kind.NOISE:
            mask[len(words) :, len(words) :] = 1
        mask = (1 - mask) * torch.finfo(torch.float32).min
        out = theirs(inputs_embeds=x[both].unsqueeze(0), attention_mask=mask[None, None])
        found[both] = out.last_hidden_state[0]
    return found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", ["dense", "by block", "flex", "cached"])
@pytest.mark.parametrize("kind", [Kind.NOISE, Kind.CAUSAL_NOISE])
def test_noise_blocks(decoders: tuple[Any, Any], x: torch.Tensor, kind: Kind, way: str) -> None:
    """Two of them side by side: each sees the words and itself, and nothing sees it."""
    theirs, ours = decoders
    words: list[int] = [0, 1]
    blocks: list[Block] = [(Kind.CAUSAL, words), (kind, [2, 3, 4]), (kind, [5, 6, 7])]
    positions = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4])
    expected = branches(theirs, x, blocks)
    if way == "cached":
        expected = expected[2:5]
        cache = RowCache(cache_sizes(ours.config), 1, device=CPU, dtype=torch.float32)
        cache.reserve(5)
        with torch.no_grad():
            first = Layout.build([blocks[:1]], CPU)
            run_decoder(ours, x[:2], positions[:2], CachedAttention(cache, first))
            cache.advance(torch.tensor([2]), torch.tensor([2]))
            block = Layout.build([[(kind, [0, 1, 2])]], CPU)
            found = run_decoder(ours, x[2:5], positions[2:5], CachedAttention(cache, block))
    else:
        layout = Layout.build([blocks], CPU)
        attention: Any = (
            FlexPackedAttention(layout, len(x))
            if way == "flex"
            else PackedAttention(layout, len(x), dense=way == "dense")
        )
        with torch.no_grad():
            found = run_decoder(ours, x, positions, attention)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_kinds_of_noise_differ(decoders: tuple[Any, Any], x: torch.Tensor) -> None:
    theirs, _ = decoders
    one, other = (
        branches(theirs, x, [(Kind.CAUSAL, [0, 1]), (kind, [2, 3, 4])])[2:4]
        for kind in (Kind.NOISE, Kind.CAUSAL_NOISE)
    )
    assert float((one - other).detach().abs().max()) > 1e-2


def test_the_rotation_is_theirs_to_the_bit(decoders: tuple[Any, Any]) -> None:
    """Phi turns half of a head, the others all of it."""
    theirs, ours = decoders
    x, positions = torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[0, 3, 701, 1 << 20]])
    with torch.device("meta"):
        rotary = Rotary(ours.config).to(torch.bfloat16)
    for got, expected in zip(rotary(x, positions), theirs.rotary_emb(x, positions), strict=True):
        assert torch.equal(got, expected)
        assert got.shape[2] == (4 if isinstance(theirs, PhiModel) else 8)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1 .* give 0"):
        use_flat_rows(LlamaConfig(**SIZES, attention_dropout=0.1))
