"""What a Show-o is said to need, against measured bytes of a small one; and the release's sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.showo import ShowOAdapter, ShowOConfig
from lightning_unigrpo.adapters.showo.cache import ShowOCache
from lightning_unigrpo.adapters.showo.footprint import _revealed
from lightning_unigrpo.config import Sampling, compute_dtype
from lightning_unigrpo.masked import reveal_steps
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import Prompt, Segment, TextSegment, TokenImageSegment, Trajectory
from tests.test_estimate import alive_after_forward, kept_for_backward, precisions
from tests.test_showo2_golden import Ids

DIALOGUE = ("text", "image", "turn", "text", "image")
WORD, WORDS, TOKENS, CODES = "9 ", 12, 40, 64
PRECISIONS = ["32-true", "bf16-mixed", "bf16 base"]


class Small(ShowOAdapter):
    """Writes its texts to the end, draws without a VQ model, and notes the bytes of its caches."""

    held = 0

    def decode(self, latents: torch.Tensor, grid: Any) -> torch.Tensor:
        return latents.float().mean(1).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def next_logits(self, cache: ShowOCache, *args: Any) -> Any:  # type: ignore[override]
        logits = super().next_logits(cache, *args)
        logits[:, self.stop_token] = -1e4
        self.watch(cache)
        return logits

    def masked_logits(self, cache: ShowOCache, *args: Any) -> Any:  # type: ignore[override]
        found = super().masked_logits(cache, *args)
        self.watch(cache)
        return found

    def watch(self, cache: ShowOCache) -> None:
        beside = [] if cache.beside is None else [*cache.beside.keys, *cache.beside.values]
        held = sum(x.nbytes for x in (*cache.keys, *cache.values, *beside))
        self.held = max(self.held, held)


def build(layers: int = 3, **settings: Any) -> Small:
    language = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    marks = {"bos": 1, "eos": 1, "pad": 300, "begin_image": 301, "end_image": 302, "task": 303}
    config = ShowOConfig(
        language=language, llm_vocab_size=300, codebook_size=256, num_vq_tokens=CODES, **marks
    )
    return Small(config, Ids(), **{"max_prompt_tokens": 128, "share_prefixes": False} | settings)


def sampling(*plan: Any) -> Sampling:
    return Sampling(
        plan=plan, max_text_tokens=TOKENS, window_size=3, num_timesteps=10, group_size=2
    )


def prompt() -> Prompt:
    return Prompt(text=" ".join(["9"] * WORDS))


def longest(adapter: Small, settings: Sampling) -> Trajectory:
    """Return a rollout whose texts are as long as allowed, and whose windows reveal the most codes."""
    segments: list[Segment] = adapter.tokenize(prompt())
    heard = [[9] * WORDS]
    for place, kind in enumerate(settings.plan):
        if kind == "text":
            ids = torch.randint(5, 200, (TOKENS,))
            segments.append(TextSegment(tokens=ids, stopped=False, log_prob=torch.zeros(TOKENS)))
            heard[-1] += ids.tolist()
            continue
        if kind == "turn":
            ids = torch.randint(5, 200, (settings.max_turn_tokens,))
            segments.append(TextSegment(tokens=ids))
            heard[-1] += ids.tolist()
            continue
        revealed = _revealed(CODES, settings)
        step = torch.arange(CODES).clamp(max=3)
        step[:revealed] = torch.arange(revealed) % 3
        step[revealed:] = 3
        image = TokenImageSegment(
            tokens=torch.randint(256, (CODES,)),
            grid=(8, 8),
            prefix=torch.tensor(adapter.prefix(heard)),
            step=step,
            window=(0, 3),
            is_context=place < len(settings.plan) - 1,
        )
        image.log_prob = torch.zeros(revealed)
        segments.append(image)
        heard.append([])
    return Trajectory(prompt=prompt(), segments=segments, group=0, member=0)


def counted(adapter: Small, settings: Sampling, precision: str) -> Any:
    dtype = compute_dtype(precision.replace(" ", "-"))
    return adapter.footprint(settings, prompt_tokens=WORDS, dtype=dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_activations(
    rounds: int, dense: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each trajectory: the copies of weights that autocast makes are there once."""
    if not dense:
        monkeypatch.setattr(attention, "DENSE_LIMIT", 0)
    adapter, settings = build(), sampling(*("text", "image") * rounds)
    trajectories = [longest(adapter, settings) for _ in range(3)]
    with precisions(precision, adapter):  # type: ignore[arg-type]
        three, one = (kept_for_backward(adapter, trajectories[:n]) for n in (3, 1))  # type: ignore[arg-type]
    found = counted(adapter, settings, precision).activations
    assert found == pytest.approx((three - one) / 2, rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_with_checkpointing(precision: str) -> None:
    """What every layer keeps, and one layer that is run again."""
    settings, found = sampling("text", "image", "text", "image"), {}
    for saving, layers in ((True, 3), (False, 3), (False, 4)):
        adapter = build(layers, gradient_checkpointing=saving)
        trajectories = [longest(adapter, settings) for _ in range(2)]
        with precisions(precision, adapter):  # type: ignore[arg-type]
            two, one = (alive_after_forward(adapter, trajectories[:n]) for n in (2, 1))  # type: ignore[arg-type]
        found[saving, layers] = two - one
    adapter = build(gradient_checkpointing=True)
    precisions(precision, adapter)  # type: ignore[arg-type]
    measured = found[True, 3] + found[False, 4] - found[False, 3]
    assert counted(adapter, settings, precision).activations == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rounds", [1, 2])
def test_cache(rounds: int, precision: str) -> None:
    """Of a rollout, to the byte; beside three times the logits of the next word."""
    adapter, settings = build(), sampling(*("text", "image") * rounds)
    with precisions(precision, adapter):  # type: ignore[arg-type]
        list(rollout(adapter, [Start(prompt(), 0, member) for member in range(2)], settings))
    found = counted(adapter, settings, precision).cache - 3 * 4 * 300
    assert adapter.held == 2 * found


@pytest.mark.parametrize("turn", [5, 150], ids=["short", "long"])
def test_a_dialogue(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn of the user: cache to the byte, and activations."""
    adapter = build(max_prompt_tokens=400)
    settings = replace(sampling(*DIALOGUE), max_turn_tokens=turn)
    starts = [Start(prompt(), 0, member) for member in range(2)]
    list(rollout(adapter, starts, settings, speaker=lambda *_: [WORD * turn] * 2))
    found = counted(adapter, settings, "32-true").cache - 3 * 4 * 300
    assert adapter.held == 2 * found
    for limit in (attention.DENSE_LIMIT, 0):
        monkeypatch.setattr(attention, "DENSE_LIMIT", limit)
        trajectories = [longest(adapter, settings) for _ in range(3)]
        three, one = (kept_for_backward(adapter, trajectories[:n]) for n in (3, 1))  # type: ignore[arg-type]
        activations = counted(adapter, settings, "32-true").activations
        assert activations == pytest.approx((three - one) / 2, rel=0.015)


def test_no_window_reveals_more_codes_than_are_counted() -> None:
    """In 2000 images, wherever the window lies; and not many more are counted."""
    settings = sampling("text", "image")
    uniforms = torch.rand(2000, CODES, generator=torch.Generator().manual_seed(0))
    steps, most = reveal_steps(uniforms, 9), 0
    for start in range(3):
        inside = (steps >= start) & (steps < start + 3)
        most = max(most, int(inside.sum(1).max()))
    assert most <= _revealed(CODES, settings) <= 1.25 * most
