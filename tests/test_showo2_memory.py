"""What a Show-o2 is said to need, against measured bytes of a small one; and the release's sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.showo2 import ShowO2Adapter, ShowO2Config
from lightning_unigrpo.adapters.showo2.cache import ShowO2Cache
from lightning_unigrpo.cli.estimate import run as run_estimate
from lightning_unigrpo.config import Sampling, compute_dtype
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory
from tests.published_showo2 import CONFIG, LANGUAGE
from tests.test_estimate import alive_after_forward, kept_for_backward, precisions
from tests.test_showo2_golden import Ids

CONFIGS = Path(__file__).parent.parent / "configs"
WORDS, TOKENS = 12, 40
DIALOGUE = ("text", "image", "turn", "text", "image")
WORD = "9 "
PRECISIONS = ["32-true", "bf16-mixed", "bf16 base"]


class Spelled(Ids):
    """Words of a template count as one id a letter group; anything that is no number is 5."""

    def encode(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else 5 for word in text.split()]


class Small(ShowO2Adapter):
    """Writes its texts to the end, draws without an autoencoder, and notes the bytes of its cache."""

    held = 0

    def decode(self, latents: torch.Tensor, grid: Any) -> torch.Tensor:
        return latents.mean((1, 2)).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def next_logits(self, cache: ShowO2Cache, *args: Any) -> Any:  # type: ignore[override]
        logits = super().next_logits(cache, *args)
        logits[:, self.stop_token] = -1e4
        self.watch(cache)
        return logits

    def velocity(self, cache: ShowO2Cache, *args: Any) -> Any:  # type: ignore[override]
        found = super().velocity(cache, *args)
        self.watch(cache)
        return found

    def watch(self, cache: ShowO2Cache) -> None:
        self.held = max(self.held, sum(x.nbytes for x in (*cache.keys, *cache.values)))


def build(layers: int = 3, flow: int = 3, semantic: int = 3, **settings: Any) -> Small:
    found = json.loads(json.dumps(CONFIG)) | {"hidden_size": 128, "clip_latent_dim": 96}
    found["num_diffusion_layers"] = flow
    found["siglip_vision_config"] |= {
        "hidden_size": 96,
        "intermediate_size": 224,
        "num_hidden_layers": semantic + 1,
    }
    found["diffusion_head_config"] |= {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
    }
    language = LANGUAGE | {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": layers,
    }
    marks = {"bos": 0, "eos": 1, "begin_of_image": 2, "end_of_image": 3}
    config = ShowO2Config.from_upstream(found, language, marks)
    return Small(
        config, Spelled(), **{"default_size": (128, 128), "share_prefixes": False} | settings
    )


def sampling(*plan: Any) -> Sampling:
    return Sampling(
        plan=plan, max_text_tokens=TOKENS, window_size=3, num_timesteps=10, group_size=2
    )


def prompt() -> Prompt:
    return Prompt(text=" ".join(["9"] * WORDS))


def longest(adapter: Small, settings: Sampling) -> Trajectory:
    """Return a rollout whose texts are as long as allowed."""
    h, w = adapter.image_grid(prompt())
    segments: list[Segment] = adapter.tokenize(prompt())
    for place, kind in enumerate(settings.plan):
        if kind == "text":
            ids = torch.randint(5, 200, (TOKENS,))
            segments.append(TextSegment(tokens=ids, stopped=False, log_prob=torch.zeros(TOKENS)))
            continue
        if kind == "turn":
            segments.append(TextSegment(tokens=torch.randint(10, 200, (settings.max_turn_tokens,))))
            continue
        states = torch.randn(settings.window_size + 1, h * w, adapter.latent_channels)
        levels = torch.linspace(0.9, 0.3, settings.window_size + 1)
        image = ImageSegment(
            latent=states[-1],
            grid=(h, w),
            states=states,
            sigmas=levels,
            is_context=place < len(settings.plan) - 1,
        )
        segments.append(image)
    return Trajectory(prompt=prompt(), segments=segments, group=0, member=0)


def counted(adapter: Small, settings: Sampling, precision: str) -> Any:
    dtype = compute_dtype(precision.replace(" ", "-"))
    request, empty = (adapter.tokenize(p)[0].tokens for p in (prompt(), Prompt(text="")))  # type: ignore[union-attr]
    return adapter.footprint(settings, prompt_tokens=len(request) - len(empty), dtype=dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rounds", [1, 2, 3])
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
    assert found == pytest.approx((three - one) / 2, rel=0.015)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_with_checkpointing(precision: str) -> None:
    """What every layer keeps, and one layer of the flow stack that is run again."""
    settings, found = sampling("text", "image", "text", "image"), {}
    for saving, flow in ((True, 3), (False, 3), (False, 4)):
        adapter = build(flow=flow, gradient_checkpointing=saving)
        trajectories = [longest(adapter, settings) for _ in range(2)]
        with precisions(precision, adapter):  # type: ignore[arg-type]
            two, one = (alive_after_forward(adapter, trajectories[:n]) for n in (2, 1))  # type: ignore[arg-type]
        found[saving, flow] = two - one
    saving = build(gradient_checkpointing=True)
    precisions(precision, saving)  # type: ignore[arg-type]
    measured = found[True, 3] + found[False, 4] - found[False, 3]
    assert counted(saving, settings, precision).activations == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("system_prompt", [None, "5 6 7"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_cache(rounds: int, precision: str, system_prompt: str | None) -> None:
    """Of a rollout, to the byte; beside three times the logits of the next word."""
    adapter, settings = build(system_prompt=system_prompt), sampling(*("text", "image") * rounds)
    with precisions(precision, adapter):  # type: ignore[arg-type]
        list(rollout(adapter, [Start(prompt(), 0, member) for member in range(2)], settings))
    vocabulary = adapter.config.qwen().vocab_size
    found = counted(adapter, settings, precision).cache - 3 * 4 * vocabulary
    assert adapter.held == 2 * found


@pytest.mark.parametrize("turn", [5, 150], ids=["short", "long"])
def test_a_dialogue(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn of the user: cache to the byte, and activations."""
    adapter, settings = build(share_prefixes=False), sampling(*DIALOGUE)
    said = adapter.turn(WORD * turn, longest(adapter, settings).segments[2])
    settings = replace(settings, max_turn_tokens=len(said.tokens))
    starts = [Start(prompt(), 0, member) for member in range(2)]
    list(rollout(adapter, starts, settings, speaker=lambda *_: [WORD * turn] * 2))
    found = counted(adapter, settings, "32-true").cache - 3 * 4 * adapter.config.qwen().vocab_size
    assert adapter.held == 2 * found
    for limit in (attention.DENSE_LIMIT, 0):
        monkeypatch.setattr(attention, "DENSE_LIMIT", limit)
        trajectories = [longest(adapter, settings) for _ in range(3)]
        three, one = (kept_for_backward(adapter, trajectories[:n]) for n in (3, 1))  # type: ignore[arg-type]
        activations = counted(adapter, settings, "32-true").activations
        assert activations == pytest.approx((three - one) / 2, rel=0.015)


def test_the_shipped_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """No file and no network; it fits one GPU of 80 GB."""
    found = run_estimate([f"--config={CONFIGS / 'showo2.yaml'}"])
    assert found.parameters == 2_830_777_056
    assert found.frozen == 126_892_531
    assert found.memory["weights"] == found.memory["reference"] == 4 * found.parameters
    assert max(found.rollout, found.update) < 70 * 2**30
    assert "2,830,777,056 parameters" in capsys.readouterr().out
