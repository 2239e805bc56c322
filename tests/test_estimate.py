"""``unigrpo estimate`` against what a tiny model really takes, and at the release's size."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_unigrpo import Objective, Optim, PromptDataModule, Sampling, UniGRPOModule
from lightning_unigrpo.adapters.bagel import BagelAdapter, attention
from lightning_unigrpo.cli import run_estimate
from lightning_unigrpo.estimate import Setup, estimate
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory
from tests.published import CONFIG
from tests.test_bagel import Ids

CONFIGS = Path(__file__).parent.parent / "configs"
WORDS, TOKENS = 12, 40
SIZE = replace(
    CONFIG,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    max_latent_size=16,
    vision=None,
    bos=1,
    eos=2,
    start_of_image=3,
    end_of_image=4,
)


def build(**settings: Any) -> BagelAdapter:
    return BagelAdapter(SIZE, Ids(), default_size=(64, 64), **settings)


def longest(adapter: BagelAdapter, sampling: Sampling) -> Trajectory:
    """Return a rollout whose texts are as long as allowed."""
    h, w = adapter.image_grid(Prompt(text=""))
    segments: list[Segment] = [TextSegment(tokens=torch.randint(5, 200, (WORDS,)))]
    for place, kind in enumerate(sampling.plan):
        if kind == "text":
            ids = torch.randint(5, 200, (TOKENS,))
            segments.append(TextSegment(tokens=ids, stopped=False, log_prob=torch.zeros(TOKENS)))
            continue
        states = torch.randn(sampling.window_size + 1, h * w, adapter.latent_channels)
        segments.append(
            ImageSegment(
                latent=states[-1],
                grid=(h, w),
                states=states,
                sigmas=torch.linspace(0.9, 0.3, sampling.window_size + 1),
                is_context=place < len(sampling.plan) - 1,
            )
        )
    return Trajectory(prompt=Prompt(text=""), segments=segments, group=0, member=0)


def kept_for_backward(adapter: BagelAdapter, trajectory: Trajectory) -> int:
    """Return the bytes that autograd holds after a forward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    alive: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)  # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores = adapter([trajectory])
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    assert scores.text
    return sum(size for pointer, size in found.items() if pointer not in weights)


def sampling(*plan: Any) -> Sampling:
    return Sampling(
        plan=plan, max_text_tokens=TOKENS, window_size=3, num_timesteps=10, group_size=2
    )


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
def test_activations(rounds: int, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr(attention, "DENSE_LIMIT", 0)
    adapter, settings = build(), sampling(*("text", "image") * rounds)
    measured = kept_for_backward(adapter, longest(adapter, settings))
    found = adapter.footprint(settings, prompt_tokens=WORDS, dtype=torch.float32).activations
    assert found == pytest.approx(measured, rel=0.15)


def test_activations_with_checkpointing() -> None:
    """What every layer keeps, and one layer that is run again."""
    plain, saving, settings = build(), build(gradient_checkpointing=True), sampling("text", "image")
    trajectory = longest(plain, settings)
    measured = kept_for_backward(saving, trajectory)
    measured += kept_for_backward(plain, trajectory) // SIZE.num_hidden_layers
    found = saving.footprint(settings, prompt_tokens=WORDS, dtype=torch.float32).activations
    assert found == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("rounds", [1, 2])
def test_cache(rounds: int) -> None:
    """Slots to the byte, capacity doublings included."""
    adapter, settings = build(), sampling(*("text", "image") * rounds)
    first, *rest = longest(adapter, settings).segments
    cache = adapter.prefill([[first]])
    for segment in rest:
        if isinstance(segment, TextSegment):
            fed = None
            for token in segment.tokens:
                adapter.next_logits(cache, fed, torch.ones(1, dtype=torch.bool))
                fed = token.unsqueeze(0)
        else:
            assert isinstance(segment, ImageSegment)
            adapter.velocity(cache, segment.latent.unsqueeze(0), torch.ones(1), segment.grid)
        adapter.extend(cache, [segment])
    measured = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert adapter.footprint(settings, prompt_tokens=WORDS, dtype=torch.float32).cache == measured


class Counted(BagelAdapter):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__(SIZE, Ids(), default_size=(64, 64))
        self.calls: Counter[str] = Counter()

    def decode(self, latents: torch.Tensor, grid: Any) -> torch.Tensor:
        return latents.mean((1, 2)).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def next_logits(self, *args: Any) -> Any:
        self.calls["text"] += 1
        logits = super().next_logits(*args)
        logits[:, self.stop_token] = -1e4  # texts as long as allowed
        return logits

    def velocity(self, *args: Any) -> Any:
        self.calls["image"] += 1
        return super().velocity(*args)

    def forward(self, *args: Any) -> Any:
        kind = "update" if torch.is_grad_enabled() else "reference"
        self.calls[kind] += 1
        return super().forward(*args)


def test_forwards_and_bytes_of_an_iteration(tmp_path: Path) -> None:
    adapter = Counted()
    module = UniGRPOModule(
        adapter,
        rewards=[lambda images, **_: images.flatten(1).mean(1).tolist()],
        sampling=replace(sampling("text", "image"), rows_per_chunk=3, group_size=4),
        objective=Objective(old_log_prob="rollout", truncation_reward=None),
        optim=Optim(ppo_epochs=2, updates_per_rollout=2, micro_batch_size=3),
    )
    # The twin shares the counter, and texts of another length would be another policy.
    module.guard = replace(module.guard, action="off")
    found = estimate(module, Setup(prompts_per_iteration=2, prompt_tokens=1))
    prompts = [Prompt(text="5", id=i) for i in range(2)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    data = PromptDataModule.from_prompts(prompts, prompts_per_iteration=2)
    trainer.fit(module, data)
    assert adapter.calls["text"] == found.decode_steps
    assert adapter.calls["image"] == found.denoise_steps
    assert adapter.calls["reference"] == found.reference_forwards
    assert found.optimizer_steps == 4
    assert adapter.calls["update"] == found.optimizer_steps * found.update_forwards
    assert found.memory["weights"] == sum(p.nbytes for p in adapter.net.parameters())
    state = trainer.optimizers[0].state  # of every parameter that had a gradient
    assert found.memory["gradients"] == sum(p.nbytes for p in state)
    moments = [s[name] for s in state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found.memory["moments"] == sum(x.nbytes for x in moments)
    assert found.memory["reference"] == found.memory["weights"]


def test_the_papers_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """No file and no network: 14.6 billion parameters from their sizes."""
    paper = [f"--config={CONFIGS / 'bagel_paper.yaml'}", "--ranks=8", "--trainer.strategy=fsdp"]
    found = run_estimate(paper)
    vae = 83_819_683
    assert found.parameters + found.frozen - vae == 14_607_260_128
    assert found.memory["weights"] == found.parameters * 4 // 8
    assert found.rollout_rows == 24
    assert found.decode_steps == 4 * 1024  # 32 prompts x 24 rollouts on 8 ranks, 24 at a time
    assert found.denoise_steps == 4 * 24
    assert (found.optimizer_steps, found.update_forwards) == (2, 96)
    printed = capsys.readouterr().out
    assert "14,170,164,800 parameters" in printed
    assert "while learning" in printed


def test_lora_fits_one_gpu() -> None:
    found = run_estimate([f"--config={CONFIGS / 'bagel_lora.yaml'}"])
    assert found.memory["reference"] == 0
    assert found.trainable < 400e6
    assert max(found.rollout, found.update) < 70 * 2**30
