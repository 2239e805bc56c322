"""``unigrpo estimate`` against what a tiny model really takes, and at the release's size."""

from __future__ import annotations

import gc
import json
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
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from benchmarks import scaling
from lightning_unigrpo import Objective, Optim, PromptDataModule, Sampling, UniGRPOModule
from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig
from lightning_unigrpo.adapters.bagel import adapter as bagel
from lightning_unigrpo.adapters.common import attention
from lightning_unigrpo.adapters.common.cache import RowCache
from lightning_unigrpo.cli.estimate import run as run_estimate
from lightning_unigrpo.config import compute_dtype
from lightning_unigrpo.distributed import bytes_when_whole, skeleton_of
from lightning_unigrpo.estimate import Setup, Traffic, estimate
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory
from tests import ranks
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
        if kind == "turn":
            segments.append(TextSegment(tokens=torch.randint(10, 200, (sampling.max_turn_tokens,))))
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
        self.caches: weakref.WeakSet[RowCache] = weakref.WeakSet()
        self.rows: list[int] = []
        """Of each call on a cache."""
        self.held = 0
        """Bytes that caches held together, at most."""
        self.gradients: dict[str, set[int]] = {"drawing": set(), "learning": set()}
        """Bytes of them, at calls on a cache and before forwards that learn."""

    def decode(self, latents: torch.Tensor, grid: Any) -> torch.Tensor:
        if self.vae is not None:
            return super().decode(latents, grid)
        return latents.mean((1, 2)).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def next_logits(self, cache: RowCache, *args: Any) -> Any:
        self.calls["text"] += 1
        logits = super().next_logits(cache, *args)
        self.watch(cache)
        logits[:, self.stop_token] = -1e4  # texts as long as allowed
        return logits

    def velocity(self, cache: RowCache, *args: Any) -> Any:
        self.calls["image"] += 1
        found = super().velocity(cache, *args)
        self.watch(cache)
        return found

    def watch(self, cache: RowCache) -> None:
        self.caches.add(cache)
        self.rows.append(len(cache))
        self.note("drawing")
        held = sum(x.nbytes for each in self.caches for x in (*each.keys, *each.values))
        self.held = max(self.held, held)

    def note(self, when: str) -> None:
        found = [p.grad.nbytes for p in self.net.parameters() if p.grad is not None]
        self.gradients[when].add(sum(found))

    def forward(self, *args: Any) -> Any:
        kind = "update" if torch.is_grad_enabled() else "reference"
        if kind == "update":
            self.note("learning")
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


DIALOGUE = ("text", "image", "turn", "text", "image")


@pytest.mark.parametrize("turn", [5, 150], ids=["short", "long"])
def test_a_dialogue(turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a turn of the user: cache to the byte, and activations."""
    adapter, settings = Counted(), replace(sampling(*DIALOGUE), max_turn_tokens=turn)
    starts = [Start(Prompt(text=" ".join(["9"] * WORDS)), 0, member) for member in range(2)]
    words = [" ".join(["8"] * turn)] * 2
    list(rollout(adapter, starts, settings, speaker=lambda *_: words))
    found = adapter.footprint(settings, prompt_tokens=WORDS, dtype=torch.float32)
    assert adapter.held == 2 * found.cache
    for limit in (attention.DENSE_LIMIT, 0):
        monkeypatch.setattr(attention, "DENSE_LIMIT", limit)
        trajectories = [longest(adapter, settings) for _ in range(3)]
        three, one = (kept_for_backward(adapter, trajectories[:n]) for n in (3, 1))
        found = adapter.footprint(settings, prompt_tokens=WORDS, dtype=torch.float32)
        assert found.activations == pytest.approx((three - one) / 2, rel=0.02)


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


def test_no_gradients_while_drawing(tmp_path: Path) -> None:
    """They are freed before a collection, so that its caches have their memory."""
    adapter = Counted()
    module = UniGRPOModule(
        adapter,
        rewards=[lambda images, **_: images.flatten(1).mean(1).tolist()],
        sampling=replace(sampling("text", "image"), group_size=2),
        objective=Objective(truncation_reward=None),
        optim=Optim(ppo_epochs=1, micro_batch_size=1),
    )
    module.guard = replace(module.guard, action="off")
    found = estimate(module, Setup(prompts_per_iteration=1, prompt_tokens=1))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, PromptDataModule.from_prompts([Prompt(text="5")], prompts_per_iteration=1))
    assert module.iteration == 2
    assert adapter.gradients == {"drawing": {0}, "learning": {0, found.memory["gradients"]}}
    parts = ("weights", "moments", "reference", "rollout cache")
    assert found.rollout == sum(found.memory[part] for part in parts)
    assert found.update - found.memory["gradients"] - found.memory["activations"] == (
        found.rollout - found.memory["rollout cache"]
    )


class OnCPU(FSDPStrategy):
    root_device = torch.device("cpu")


class OnCPU2(ModelParallelStrategy):
    root_device = torch.device("cpu")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["fsdp", "ModelParallelStrategy"])
def test_whole_weights_of_a_rollout(name: str, precision: str) -> None:
    """As many bytes as the trainer says it will hold."""
    module = UniGRPOModule(build(), rewards=[len], sampling=sampling("text", "image"))
    found = estimate(module, Setup(ranks=4, strategy=name, precision=precision))
    if name == "fsdp":
        strategy: Any = OnCPU(precision_plugin=FSDPPrecision(precision))
    else:
        strategy = OnCPU2(data_parallel_size=4, tensor_parallel_size=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        expected = bytes_when_whole(skeleton_of(module.adapter.net), strategy)
    assert found.memory["rollout weights"] == expected
    assert found.memory["weights"] == sum(p.nbytes for p in module.adapter.net.parameters()) // 4


# ---- what ranks send each other


def counted(folder: Path, number: int, *cases: str) -> dict[str, Any]:
    ranks.run("benchmarks.communication:rank", number, folder, "digits", *cases)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def agree(result: dict[str, Any]) -> None:
    """Counted and computed are the same: to the byte here, where every size divides by the ranks."""
    assert result["not seen"] == 0
    calls, expected = result["rollout calls"]
    assert calls == expected
    for phase, formula in result["formula"].items():
        found = result["counted"].get(phase, {"calls": 0, "shards": 0, "replicas": 0})
        for part in ("shards", "replicas"):
            assert found[part] == pytest.approx(formula[part], rel=0.01), (phase, part)
        if formula["replicas"] == 0:
            assert found["calls"] == formula["calls"], phase
    rest = [v for k, v in result["counted"].items() if k not in result["formula"]]
    assert sum(each["shards"] + each["replicas"] for each in rest) < 2000  # losses, norms, errors
    if result["rollout weights"]:
        held, expected = result["rollout weights"]
        assert held == expected


@pytest.mark.dist
def test_two_ranks_send_what_is_computed(tmp_path: Path) -> None:
    cases = (
        "ddp",
        "ddp:resident:bf16-mixed",
        "ddp:resident:32-true:text",
        "fsdp:resident:bf16-mixed",
        "fsdp:sharded",
        "fsdp:resident:32-true:flow",
        "fsdp2:resident",
        "fsdp2:sharded:bf16-mixed",
        "fsdp2:sharded:32-true:text",
    )
    found = counted(tmp_path, 2, *cases)
    assert set(found) == set(cases)
    for result in found.values():
        agree(result)
    # A frozen expert is not reduced where weights travel one by one, or where nothing is cut.
    update = {case: each["counted"]["update"] for case, each in found.items()}
    assert update["ddp:resident:32-true:text"]["replicas"] < 0.6 * update["ddp"]["replicas"]


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_in_two_copies_send_what_is_computed(tmp_path: Path) -> None:
    cases = (
        "fsdp:resident",
        "hybrid:resident",
        "hybrid:sharded:bf16-mixed",
        "grad_op:sharded:bf16-mixed",
        "no_shard",
    )
    found = counted(tmp_path, 4, *cases)
    for result in found.values():
        agree(result)
    assert found["hybrid:resident"]["counted"]["update"]["replicas"] > 0
    losses = [found[f"{name}:resident"]["metrics"]["loss"] for name in ("fsdp", "hybrid")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # another order of additions


def test_traffic_by_hand() -> None:
    """One layer of U bytes, a root of R, n ranks, m micro-batches; nothing but the definition."""
    adapter = build(replace(SIZE, num_hidden_layers=1))
    module = UniGRPOModule(
        adapter,
        rewards=[len],
        sampling=replace(sampling("text", "image"), rollout_weights="sharded"),
        optim=Optim(ppo_epochs=2, micro_batch_size=1),
    )
    (unit,) = adapter.shard_units()
    u = sum(p.nbytes for p in unit.parameters())
    r = sum(p.nbytes for p in adapter.net.parameters()) - u
    trained = u + r - adapter.net.latent_pos_embed.pos_embed.nbytes

    def look(**settings: Any) -> dict[str, Traffic]:
        return estimate(module, Setup(prompts_per_iteration=4, **settings)).traffic

    def of(strategy: str, ranks: int, **settings: Any) -> dict[str, Traffic]:
        return look(strategy=strategy, ranks=ranks, settings=settings)

    assert not any(of("fsdp", 1)[phase].shards for phase in of("fsdp", 1))
    m, n = 2, 4  # 4 prompts x 2 rollouts on 4 ranks
    calls = TOKENS + 9 + 2  # words, noise levels, and the prompt and the text read once
    fsdp = of("fsdp", n)
    assert fsdp["rollout"].shards == pytest.approx(3 / 4 * (calls * u + r))
    assert fsdp["flags"] == Traffic(calls + 1, 3 / 4 * 2 * 4 * (calls + 1))
    assert fsdp["reference"].shards == pytest.approx(3 / 4 * (m * u + r))
    assert fsdp["old policy"] == Traffic(0, 0)
    assert fsdp["update"].shards == pytest.approx(3 / 4 * 2 * m * (2 * u + r + u + r))
    assert fsdp["update"].calls == 2 * m * (2 + 1 + 2)
    ddp = of("ddp", n)
    assert ddp["update"].replicas == pytest.approx(2 * 2 * 3 / 4 * trained)
    assert not any(each.shards for phase, each in ddp.items() if phase != "rewards")
    hybrid = of("fsdp", n, sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2))
    assert hybrid["update"].shards == pytest.approx(1 / 2 * 2 * m * (2 * u + r + u + r))
    assert hybrid["update"].replicas == pytest.approx(2 * 1 / 2 * 2 * m * (u + r) / 2)
    whole = of("FSDPStrategy", n, sharding_strategy="NO_SHARD")
    assert whole["update"] == Traffic(2 * m * 2, 0.0, 2 * 3 / 4 * 2 * m * (u + r))
    assert of("deepspeed_stage_3", n) == {}
    rewards = (
        8 * (8 * 3 + 4) + 2 * 8 * n
    )  # group, last round and reward of 8 rollouts, and how many of each rank
    assert fsdp["rewards"] == Traffic(4, 3 / 4 * rewards)


# ---- what is read of a strategy


def test_how_strategies_hold_weights() -> None:
    def of(strategy: str, **settings: Any) -> tuple[str, int, int]:
        setup = Setup(ranks=16, strategy=strategy, settings=settings)
        return setup.kind, setup.shards, setup.stage

    assert of("auto") == of("ddp_find_unused_parameters_true") == ("whole", 1, 0)
    assert of("lightning.pytorch.strategies.FSDPStrategy") == of("fsdp") == ("fsdp", 16, 0)
    hybrid = {"sharding_strategy": "HYBRID_SHARD", "device_mesh": (4, 4)}
    assert of("fsdp", **hybrid) == ("fsdp", 4, 0)
    assert of("fsdp", sharding_strategy="NO_SHARD") == ("fsdp", 1, 0)
    assert of("lightning.pytorch.strategies.ModelParallelStrategy") == ("fsdp2", 16, 0)
    assert of("deepspeed") == of("DeepSpeedStrategy", stage=2) == ("deepspeed", 1, 2)
    assert of("deepspeed_stage_3") == of("DeepSpeedStrategy", stage=3) == ("deepspeed", 16, 3)
    config = {"zero_optimization": {"stage": 1}}
    assert of("DeepSpeedStrategy", config=config, stage=2) == ("deepspeed", 1, 1)


def test_ranks_that_a_strategy_does_not_have_are_refused() -> None:
    for settings, key in (
        ({"device_mesh": (2, 8)}, "device_mesh makes 16"),
        ({"data_parallel_size": 8, "tensor_parallel_size": 1}, "data_parallel_size makes 8"),
    ):
        with pytest.raises(ValueError, match=f"{key} ranks, but --ranks is 4"):
            Setup(ranks=4, settings=settings)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_cuts(stage: int) -> None:
    """Moments, then gradients, then weights; everything in bfloat16 beside parts in float32 (ZeRO)."""
    module = UniGRPOModule(build(), rewards=[len], sampling=sampling("text", "image"))
    net = module.adapter.net
    numel = sum(p.numel() for p in net.parameters())
    trained = numel - net.latent_pos_embed.pos_embed.numel()
    found = estimate(
        module, Setup(ranks=4, strategy=f"deepspeed_stage_{stage}", precision="bf16-mixed")
    ).memory
    assert found["weights"] == 2 * numel // (4 if stage == 3 else 1)
    assert found["gradients"] == 2 * trained // (4 if stage >= 2 else 1)
    assert found["moments"] == 8 * trained // 4
    assert found["master weights"] == 4 * trained // 4


def test_ddp_averages_in_buffers() -> None:
    """DDP's documentation: as views of them, gradients save their own size."""
    module = UniGRPOModule(build(), rewards=[len], sampling=sampling("text", "image"))
    alone = estimate(module, Setup(strategy="ddp"))
    plain = estimate(module, Setup(ranks=2, strategy="ddp"))
    views = estimate(
        module, Setup(ranks=2, strategy="ddp", settings={"gradient_as_bucket_view": True})
    )
    size = alone.memory["gradients"]
    assert alone.memory["buckets"] == 0
    assert plain.memory["gradients"] == plain.memory["buckets"] == views.memory["buckets"] == size
    assert plain.update - views.update == size
    assert plain.rollout == views.rollout  # the buffers stay, gradients do not


# ---- at the release's size


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
    assert found.memory["rollout weights"] == found.parameters * 2
    assert found.rollout == (
        # weights, reference and two moments in float32, an eighth of each; not the gradients
        found.memory["weights"] * 2
        + found.memory["moments"]
        + found.memory["rollout weights"]
        + found.memory["rollout cache"]
        + found.memory["frozen"]
    )
    assert found.traffic["rollout"].shards == pytest.approx(7 / 8 * 4 * found.parameters)
    printed = capsys.readouterr().out
    assert "14,170,164,800 parameters" in printed
    assert "while learning" in printed
    assert "received by a rank in an iteration" in printed


def test_lora_fits_one_gpu() -> None:
    found = run_estimate([f"--config={CONFIGS / 'bagel_lora.yaml'}"])
    assert found.memory["reference"] == 0
    assert found.trainable < 400e6
    assert max(found.rollout, found.update) < 70 * 2**30


# ---- the bounds of benchmarks/scaling.py


def flop(work: Any) -> int:
    """Return the operations of matrix products and attention."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return int(counter.get_total_flops())


def test_operations_of_the_bounds() -> None:
    """Against torch's counter. A few per cent: masked words are multiplied too, and small layers left out."""
    size = replace(SIZE, hidden_size=256, intermediate_size=768)
    adapter, settings, rows = build(size, gradient_checkpointing=True), sampling("text", "image"), 4
    h, w = adapter.image_grid(Prompt(text=""))
    sizes = scaling.Sizes(
        config=size,
        prompt=WORDS + scaling.MARKS,
        text=TOKENS,
        image=h * w + scaling.MARKS,
        window=settings.window_size,
    )
    trajectory = longest(adapter, settings)

    def learn() -> None:
        scores = adapter([trajectory])
        (scores.text[0].sum() + scores.velocity[0].sum()).backward()

    assert flop(learn) == pytest.approx(sizes.backward().flop, rel=0.05)
    with torch.no_grad():
        once = sizes.forward(scores_text=True).flop
        assert flop(lambda: adapter([trajectory])) == pytest.approx(once, rel=0.02)
    words = TextSegment(tokens=torch.randint(5, 200, (WORDS,)))
    cache, active = adapter.prefill([[words]] * rows), torch.ones(rows, dtype=torch.bool)

    def decode() -> None:
        for i in range(TOKENS):
            adapter.next_logits(cache, torch.full((rows,), 7) if i else None, active)

    expected = TOKENS * sizes.decode_step(rows).flop
    assert flop(decode) == pytest.approx(expected, rel=0.01)
    adapter.extend(cache, [TextSegment(tokens=torch.full((TOKENS,), 7))] * rows)
    latents = torch.randn(rows, h * w, adapter.latent_channels)
    denoised = flop(lambda: adapter.velocity(cache, latents, torch.full((rows,), 0.5), (h, w)))
    assert denoised == pytest.approx(sizes.denoise_step(rows).flop, rel=0.01)


def test_bytes_of_the_bounds() -> None:
    """A token of one rollout reads each weight of its expert and of the head once, and the cache."""
    size = replace(SIZE, hidden_size=256, intermediate_size=768)
    net = build(size).net
    layers = net.language_model.model.layers.named_parameters()
    matrices = [p for n, p in layers if "moe_gen" not in n and p.ndim == 2]
    sizes = scaling.Sizes(config=size, prompt=14, text=TOKENS, image=66, window=3)
    read = sum(p.numel() for p in [*matrices, net.language_model.lm_head.weight])
    kept = 2 * size.num_key_value_heads * size.head_dim * size.num_hidden_layers * (14 + TOKENS / 2)
    assert sizes.decode_step(1).nbytes == 2 * (read + kept)


def test_seconds_of_links() -> None:
    machine = scaling.Machine(node_link=400.0, network_link=10.0, per_node=8)
    ring = Traffic(1, 4000.0, 200.0)
    assert scaling.link_seconds(ring, 8, machine, hybrid=False) == 4200 / 400
    assert (
        scaling.link_seconds(ring, 16, machine, hybrid=False) == 4200 / 80
    )  # eight cards together
    assert scaling.link_seconds(ring, 16, machine, hybrid=True) == 4000 / 400 + 200 / 10


@pytest.mark.slow
def test_the_page_has_the_computed_numbers() -> None:
    page = (CONFIGS.parent / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in scaling.page_rows(scaling.compute()) if row not in page] == []
