"""What a Janus-Pro is said to need, against measured bytes of a small one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import JanusConfig

from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.adapters.januspro import JanusProAdapter, Marks
from lightning_unigrpo.adapters.januspro.network import JanusVision
from lightning_unigrpo.config import Sampling, compute_dtype
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import Prompt, Segment, TextSegment, TokenImageSegment, Trajectory
from tests.test_estimate import alive_after_forward, kept_for_backward, precisions
from tests.test_januspro import Letters

pytestmark = pytest.mark.slow
WORDS, TOKENS, VOCABULARY = 12, 40, 300
DIALOGUE = ("text", "image", "turn", "text", "image")
WORD = "9"
PRECISIONS = ["32-true", "bf16-mixed", "bf16 base"]
MARKS = Marks(bos=0, eos=1, pad=2, begin_image=4, end_image=5)
PROMPT = Prompt(text="9" * WORDS)


class Small(JanusProAdapter):
    """Writes its texts to the end, draws without a VQ model, and notes the bytes of its cache."""

    held = 0

    def decode(self, latents: torch.Tensor, grid: Any) -> torch.Tensor:
        return latents.float().mean(1).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def next_logits(self, cache: DecoderCache, *args: Any) -> Any:  # type: ignore[override]
        logits = super().next_logits(cache, *args)
        logits[:, self.stop_token] = -1e4
        self.watch(cache)
        return logits

    def next_image_logits(self, cache: DecoderCache, *args: Any) -> Any:  # type: ignore[override]
        found = super().next_image_logits(cache, *args)
        self.watch(cache)
        return found

    def watch(self, cache: DecoderCache) -> None:
        self.held = max(self.held, sum(x.nbytes for x in (*cache.keys, *cache.values)))


def build(layers: int = 4, **settings: Any) -> Small:
    hidden = 128
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 384,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "projection_dim": hidden,
            "num_image_tokens": 64,
        },
        vq_config={
            "num_embeddings": 500,
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
        },
        tie_word_embeddings=False,
    )
    return Small(config, Letters(), marks=MARKS, vision=JanusVision(config), **settings)


def sampling(*plan: Any) -> Sampling:
    return Sampling(plan=plan, max_text_tokens=TOKENS, group_size=2)


def longest(adapter: Small, settings: Sampling) -> Trajectory:
    """Return a rollout whose texts are as long as allowed."""
    h, w = adapter.image_grid(PROMPT)
    segments: list[Segment] = adapter.tokenize(PROMPT)
    for place, kind in enumerate(settings.plan):
        if kind == "text":
            ids = torch.randint(10, 200, (TOKENS,))
            segments.append(TextSegment(tokens=ids, stopped=False, log_prob=torch.zeros(TOKENS)))
            continue
        if kind == "turn":
            segments.append(TextSegment(tokens=torch.randint(10, 200, (settings.max_turn_tokens,))))
            continue
        image = TokenImageSegment(
            tokens=torch.randint(500, (h * w,)),
            grid=(h, w),
            log_prob=torch.zeros(h * w),
            is_context=place < len(settings.plan) - 1,
        )
        turn_follows = settings.plan[place + 1 : place + 2] == ("turn",)
        seen = image.is_context
        segments.append(adapter.look(image, turn_follows=turn_follows) if seen else image)
    return Trajectory(prompt=PROMPT, segments=segments, group=0, member=0)


def counted(adapter: Small, settings: Sampling, precision: str, **more: Any) -> Any:
    dtype = compute_dtype(precision.replace(" ", "-"))
    return adapter.footprint(settings, prompt_tokens=WORDS, dtype=dtype, **more)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_activations(
    rounds: int, dense: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each trajectory: the copies of weights that autocast makes are there once."""
    if not dense:
        monkeypatch.setattr(attention, "DENSE_LIMIT", 0)
    # What is shared would be counted once.
    adapter = build(share_prefixes=False)
    settings = sampling(*("text", "image") * rounds)
    trajectories = [longest(adapter, settings) for _ in range(4)]
    with precisions(precision, adapter):  # type: ignore[arg-type]
        four, one = (kept_for_backward(adapter, trajectories[:n]) for n in (4, 1))  # type: ignore[arg-type]
    found = counted(adapter, settings, precision).activations
    assert found == pytest.approx((four - one) / 3, rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_with_checkpointing(precision: str) -> None:
    """What every layer keeps, and one layer that is run again."""
    settings, found = sampling("text", "image", "text", "image"), {}
    for saving, layers in ((True, 4), (False, 4), (False, 5)):
        adapter = build(layers, gradient_checkpointing=saving, share_prefixes=False)
        trajectories = [longest(adapter, settings) for _ in range(3)]
        with precisions(precision, adapter):  # type: ignore[arg-type]
            three, one = (alive_after_forward(adapter, trajectories[:n]) for n in (3, 1))  # type: ignore[arg-type]
        found[saving, layers] = (three - one) / 2
    saving = build(gradient_checkpointing=True)
    precisions(precision, saving)  # type: ignore[arg-type]
    measured = found[True, 4] + found[False, 5] - found[False, 4]
    assert counted(saving, settings, precision).activations == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("system_prompt", [None, "think"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "plan", [("text",), ("image",), ("text", "image"), ("text", "image") * 2], ids="-".join
)
def test_cache(plan: tuple[str, ...], precision: str, system_prompt: str | None) -> None:
    """Of a rollout, to the byte; beside three times the logits of the next word."""
    adapter, settings = build(system_prompt=system_prompt), sampling(*plan)
    with precisions(precision, adapter):  # type: ignore[arg-type]
        list(rollout(adapter, [Start(PROMPT, 0, member) for member in range(2)], settings))
    found = counted(adapter, settings, precision).cache
    assert adapter.held == 2 * (found - 3 * 4 * VOCABULARY)
    guided = Sampling(plan=settings.plan, max_text_tokens=TOKENS, guidance_scale=5.0)
    assert counted(adapter, guided, precision, evaluate=True).cache == 2 * found


@pytest.mark.parametrize("turn", [5, 150], ids=["short", "long"])
def test_a_dialogue(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn of the user: cache to the byte, and activations."""
    adapter, settings = build(share_prefixes=False), sampling(*DIALOGUE)
    said = adapter.turn(WORD * turn, longest(adapter, settings).segments[2])
    settings = replace(settings, max_turn_tokens=len(said.tokens))
    starts = [Start(PROMPT, 0, member) for member in range(2)]
    list(rollout(adapter, starts, settings, speaker=lambda *_: [WORD * turn] * 2))
    found = counted(adapter, settings, "32-true").cache - 3 * 4 * VOCABULARY
    assert adapter.held == 2 * found
    for limit in (attention.DENSE_LIMIT, 0):
        monkeypatch.setattr(attention, "DENSE_LIMIT", limit)
        trajectories = [longest(adapter, settings) for _ in range(3)]
        three, one = (kept_for_backward(adapter, trajectories[:n]) for n in (3, 1))  # type: ignore[arg-type]
        activations = counted(adapter, settings, "32-true").activations
        assert activations == pytest.approx((three - one) / 2, rel=0.02)
