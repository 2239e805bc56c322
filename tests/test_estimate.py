"""``unigrpo estimate`` against what a tiny model really takes, and at the release's size."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_unigrpo import Objective, Optim, PromptDataModule, Sampling, UniGRPOModule
from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig, attention
from lightning_unigrpo.adapters.bagel import adapter as bagel
from lightning_unigrpo.adapters.bagel.cache import BagelCache
from lightning_unigrpo.cli import run_estimate
from lightning_unigrpo.config import compute_dtype
from lightning_unigrpo.estimate import Setup, estimate
from lightning_unigrpo.rollout import Start, rollout
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


def build(config: BagelConfig = SIZE, **settings: Any) -> BagelAdapter:
    return BagelAdapter(config, Ids(), default_size=(64, 64), **settings)


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


def kept_for_backward(adapter: BagelAdapter, trajectories: Sequence[Trajectory]) -> int:
    """Return the bytes that autograd holds after a forward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    alive: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)  # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scores = adapter(trajectories)
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    assert scores.text
    return sum(size for pointer, size in found.items() if pointer not in weights)


class Alive(TorchDispatchMode):
    """Adds up what was made and is still held: checkpointing hides the inputs it keeps from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out


def alive_after_forward(adapter: BagelAdapter, trajectories: Sequence[Trajectory]) -> int:
    weights = {p.untyped_storage()._cdata for p in adapter.parameters()}
    with Alive() as mode:
        scores = adapter(trajectories)
        gc.collect()
        made = [m for address, m in mode.made.items() if address not in weights]
        found = sum(size for storage, size in made if not storage.expired())
    assert scores.text
    return found


def precisions(name: str, adapter: BagelAdapter) -> AbstractContextManager[Any]:
    """Return the context of ``trainer.precision`` and give the weights the dtype they have in it."""
    if name == "bf16 base":
        adapter.net.to(torch.bfloat16)
    if name == "32-true":
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def sampling(*plan: Any) -> Sampling:
    return Sampling(
        plan=plan, max_text_tokens=TOKENS, window_size=3, num_timesteps=10, group_size=2
    )


PRECISIONS = ["32-true", "bf16-mixed", "bf16 base"]


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
    trajectories = [longest(adapter, settings) for _ in range(4)]
    with precisions(precision, adapter):
        four, one = (kept_for_backward(adapter, trajectories[:n]) for n in (4, 1))
    dtype = compute_dtype(precision.replace(" ", "-"))
    found = adapter.footprint(settings, prompt_tokens=WORDS, dtype=dtype).activations
    assert found == pytest.approx((four - one) / 3, rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_with_checkpointing(precision: str) -> None:
    """What every layer keeps, and one layer that is run again."""
    settings, found = sampling("text", "image", "text", "image"), {}
    for saving, layers in ((True, 4), (False, 4), (False, 5)):
        size = replace(SIZE, num_hidden_layers=layers)
        adapter = build(size, gradient_checkpointing=saving)
        trajectories = [longest(adapter, settings) for _ in range(3)]
        with precisions(precision, adapter):
            three, one = (alive_after_forward(adapter, trajectories[:n]) for n in (3, 1))
        found[saving, layers] = (three - one) / 2
    saving = build(gradient_checkpointing=True)
    precisions(precision, saving)
    dtype = compute_dtype(precision.replace(" ", "-"))
    counted = saving.footprint(settings, prompt_tokens=WORDS, dtype=dtype).activations
    measured = found[True, 4] + found[False, 5] - found[False, 4]
    assert counted == pytest.approx(measured, rel=0.05)  # four layers: the ends weigh much


class Counted(BagelAdapter):
    """Counts its calls, and the bytes of the caches that are alive in them; writes its texts to the end."""

    def __init__(self, config: BagelConfig = SIZE, tokenizer: Any = None, **settings: Any) -> None:
        super().__init__(config, tokenizer or Ids(), **({"default_size": (64, 64)} | settings))
        self.calls: Counter[str] = Counter()
        self.caches: weakref.WeakSet[BagelCache] = weakref.WeakSet()
        self.rows: list[int] = []
        """Of each call on a cache."""
        self.held = 0
        """Bytes that caches held together, at most."""

    def decode(self, latents: torch.Tensor, grid: Any) -> torch.Tensor:
        if self.vae is not None:
            return super().decode(latents, grid)
        return latents.mean((1, 2)).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def next_logits(self, cache: BagelCache, *args: Any) -> Any:
        self.calls["text"] += 1
        logits = super().next_logits(cache, *args)
        self.watch(cache)
        logits[:, self.stop_token] = -1e4  # texts as long as allowed
        return logits

    def velocity(self, cache: BagelCache, *args: Any) -> Any:
        self.calls["image"] += 1
        found = super().velocity(cache, *args)
        self.watch(cache)
        return found

    def watch(self, cache: BagelCache) -> None:
        self.caches.add(cache)
        self.rows.append(len(cache))
        held = sum(x.nbytes for each in self.caches for x in (*each.keys, *each.values))
        self.held = max(self.held, held)

    def forward(self, *args: Any) -> Any:
        kind = "update" if torch.is_grad_enabled() else "reference"
        self.calls[kind] += 1
        return super().forward(*args)


@pytest.mark.parametrize("grain", [1, 16])
@pytest.mark.parametrize("system_prompt", [None, "5 6 7"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rounds", [1, 2])
def test_cache(
    rounds: int,
    precision: str,
    system_prompt: str | None,
    grain: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a rollout, to the byte."""
    adapter, settings = Counted(system_prompt=system_prompt), sampling(*("text", "image") * rounds)
    monkeypatch.setattr(bagel, "GRAIN", grain)
    adapter.compile_layers = grain > 1  # shapes as when compiled, without the compiler
    prompt = Prompt(text=" ".join(["9"] * WORDS))
    with precisions(precision, adapter):
        list(rollout(adapter, [Start(prompt, 0, member) for member in range(2)], settings))
    dtype = compute_dtype(precision.replace(" ", "-"))
    found = adapter.footprint(settings, prompt_tokens=WORDS, dtype=dtype).cache
    assert adapter.held == 2 * found


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
