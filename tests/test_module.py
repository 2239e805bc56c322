"""The training step on the toy policies: it is the algorithm, it learns, it resumes bit-equal."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy

from lightning_unigrpo import (
    Guard,
    IterationCheckpoint,
    Objective,
    OnPolicyError,
    Optim,
    Prompt,
    PromptDataModule,
    RolloutGrouping,
    Sampling,
    UniGRPOModule,
)
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.callbacks import Experience, UniGRPOCallback
from lightning_unigrpo.module import warn_if_rounded_away
from tests.test_adapters import Faulty, Shifted, ShiftedImage, Stale, WrongMarks
from tests.toys import ToyFlow, ToyMasked, ToyTokens

TOYS = [ToyFlow, ToyTokens, ToyMasked]
ROUNDS = [1, 2]


def small(rounds: int = 1, **changes: Any) -> Sampling:
    settings = {
        "group_size": 4,
        "plan": ("text", "image") * rounds,
        "max_text_tokens": 5,
        "num_timesteps": 6,
        "schedule": "steps",
        "shift": 1.0,
        "eta": 0.7,
        "window_size": 2,
        "window_range": (0, 4),
        "eval_num_timesteps": 6,
    }
    return Sampling(**(settings | changes))


def objective(**changes: Any) -> Objective:
    return Objective(
        **({"flow_clip_low": 1e-2, "flow_clip_high": 1e-2, "mse_weight": 0.01} | changes)
    )


def optim(**changes: Any) -> Optim:
    return Optim(**({"text_lr": 1e-2, "flow_lr": 1e-2, "ppo_epochs": 1} | changes))


class Record(UniGRPOCallback):
    """Keeps the metrics and the experience of every iteration."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.experience: list[Experience] = []

    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        self.experience.append(experience)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.metrics.append(dict(self.experience[-1].metrics))


def trainer(tmp_path: Path, steps: int, *callbacks: Callback, **changes: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, IterationCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": tmp_path,
        "callbacks": list(callbacks),
    }
    return Trainer(**(settings | changes))


def fit(
    tmp_path: Path, module: UniGRPOModule, steps: int, *callbacks: Callback, **changes: Any
) -> Record:
    record = Record()
    ckpt_path = changes.pop("ckpt_path", None)
    data = PromptDataModule(prompts_per_iteration=2)
    trainer(tmp_path, steps, record, *callbacks, **changes).fit(module, data, ckpt_path=ckpt_path)
    return record


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("toy", TOYS)
def test_first_update_is_on_policy(toy: Any, rounds: int, tmp_path: Path) -> None:
    module = UniGRPOModule(toy(), sampling=small(rounds), objective=objective(), optim=optim())
    record = fit(tmp_path, module, 2)
    for metrics in record.metrics:
        assert metrics["guard/velocity"] <= 1e-4
        assert metrics["guard/log_prob"] <= 5e-5
        assert metrics["guard/residual"] <= 1e-4
        assert metrics["text/ratio_mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("toy", TOYS)
def test_reward_rises(toy: Any, rounds: int, tmp_path: Path) -> None:
    module = UniGRPOModule(
        toy(),
        sampling=small(rounds, group_size=16),
        objective=objective(mse_weight=0.0),
        optim=optim(),
    )
    record = fit(tmp_path, module, 40)
    rewards = [m["reward"] for m in record.metrics]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_reference_equals_the_policy_before_the_first_update(tmp_path: Path) -> None:
    module = UniGRPOModule(
        ToyFlow(), sampling=small(), objective=objective(text_kl_weight=0.1), optim=optim()
    )
    first, second = fit(tmp_path, module, 2).metrics
    assert first["flow/velocity_mse"] <= 1e-10
    assert abs(first["text/kl"]) <= 1e-9
    assert second["flow/velocity_mse"] > 1e-7  # the reference stayed where it was
    assert second["text/kl"] > 1e-9


class Watched(ToyFlow):
    """Remembers how many texts and images a frozen network was asked to score."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def forward(self, *args: Any) -> Any:
        scores = super().forward(*args)
        if not next(self.net.parameters()).requires_grad:
            self.asked.append((len(scores.text), len(scores.velocity)))
        return scores


@pytest.mark.parametrize("text_kl_weight", [0.0, 0.1])
def test_reference_scores_texts_only_for_a_text_kl(tmp_path: Path, text_kl_weight: float) -> None:
    """A head over 150,000 words is a large part of the pass."""
    adapter = Watched()
    kl = objective(text_kl_weight=text_kl_weight)
    record = fit(tmp_path, UniGRPOModule(adapter, sampling=small(), objective=kl, optim=optim()), 1)
    assert adapter.asked == [(8 if text_kl_weight else 0, 8)]
    texts = [t.segments[1] for t in record.experience[0].trajectories]
    assert all((s.ref_log_prob is not None) == bool(text_kl_weight) for s in texts)  # type: ignore[union-attr]


def test_micro_batches_do_not_change_the_update(tmp_path: Path) -> None:
    weights = []
    for size in (None, 3):
        module = UniGRPOModule(
            ToyFlow(), sampling=small(), objective=objective(), optim=optim(micro_batch_size=size)
        )
        module.configure_optimizers = lambda m=module: torch.optim.SGD(  # type: ignore[method-assign]
            m.adapter.net.parameters(), lr=1.0
        )
        module.lr_schedulers = lambda: _NoSchedule()  # type: ignore[method-assign]
        fit(tmp_path, module, 1)
        weights.append(torch.cat([p.detach().flatten() for p in module.adapter.net.parameters()]))
    # SGD, because AdamW turns rounding of a zero gradient into a step of size lr.
    torch.testing.assert_close(weights[0], weights[1], atol=2e-6, rtol=1e-5)


class _NoSchedule:
    def step(self) -> None:
        pass


def test_disjoint_updates_and_passes_count_as_optimizer_steps(tmp_path: Path) -> None:
    settings = optim(ppo_epochs=2, updates_per_rollout=2)
    module = UniGRPOModule(ToyFlow(), sampling=small(), objective=objective(), optim=settings)
    record = fit(tmp_path, module, 8)
    assert len(record.metrics) == 2
    trajectories = record.experience[0].trajectories
    parts = [[id(t) for t in part] for part in module.minibatches(record.experience[0])]
    assert len(parts) == 4
    for epoch in (parts[:2], parts[2:]):
        assert sorted(functools.reduce(operator.iadd, epoch, [])) == sorted(
            id(t) for t in trajectories
        )


def test_zero_learning_rate_freezes_the_group(tmp_path: Path) -> None:
    module = UniGRPOModule(
        ToyFlow(), sampling=small(), objective=objective(), optim=optim(text_lr=0.0)
    )
    before = copy.deepcopy(module.adapter.param_groups())
    fit(tmp_path, module, 2)
    after = module.adapter.param_groups()
    assert all(torch.equal(a, b) for a, b in zip(before["text"], after["text"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before["flow"], after["flow"], strict=True))


def test_without_any_reward_images_are_scored_by_clip(tmp_path: Path) -> None:
    adapter = type("Mute", (ToyFlow,), {"defaults": lambda self: None})()
    with pytest.warns(UserWarning, match=r"Mute brings no reward.*CLIPScore.*model\.rewards"):
        module = UniGRPOModule(adapter)
    prompts = PromptDataModule.from_prompts([Prompt(text="a b")], prompts_per_iteration=1)
    assert "val/reward/CLIPScore" in module.figures  # without a network: only a run reads it
    with pytest.raises(RuntimeError, match=r"CLIPScore\.source is 'openai/clip-vit-large-patch14'"):
        trainer(tmp_path, 1).fit(module, prompts)
    assert module.iteration == 0


def test_a_user_grouping_replaces_the_default(tmp_path: Path) -> None:
    class Mine(RolloutGrouping):
        pass

    module = UniGRPOModule(ToyFlow(), sampling=small(), objective=objective(), optim=optim())
    built = trainer(tmp_path, 1, Mine())
    built.fit(module, PromptDataModule(prompts_per_iteration=2))
    found = [c for c in built.callbacks if isinstance(c, RolloutGrouping)]  # type: ignore[attr-defined]
    assert [type(c) for c in found] == [Mine]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_resume_continues_to_the_same_numbers(rounds: int, tmp_path: Path) -> None:
    def build() -> UniGRPOModule:
        seed_everything(3)
        return UniGRPOModule(
            ToyFlow(), sampling=small(rounds), objective=objective(), optim=optim(warmup_steps=3)
        )

    whole = fit(tmp_path / "a", build(), 5)
    first = fit(tmp_path / "b", build(), 3, IterationCheckpoint(every=3))
    seed_everything(99)  # a resumed process has other global generators
    rest = fit(
        tmp_path / "b", build(), 5, ckpt_path=str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    )
    for a, b in zip(whole.metrics, first.metrics + rest.metrics, strict=True):
        assert a == b  # bit for bit


class BrokenVelocity(ToyFlow):
    """Samples with a velocity 1 % too large."""

    def velocity(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().velocity(*args, **kwargs) * 1.01


def test_the_guard_stops_before_the_update(tmp_path: Path) -> None:
    module = UniGRPOModule(BrokenVelocity(), sampling=small(), objective=objective(), optim=optim())
    before = copy.deepcopy(module.adapter.net.state_dict())
    with pytest.raises(OnPolicyError, match=r"guard\.velocity"):
        fit(tmp_path, module, 1)
    for name, value in module.adapter.net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("base", [ToyFlow, DigitsAdapter])
@pytest.mark.parametrize(
    ("fault", "figure"),
    [
        (Shifted, "log_prob"),
        (ShiftedImage, "velocity"),
        (WrongMarks, "velocity"),
        (Stale, "velocity"),
        (Faulty, "velocity"),
    ],
)
def test_broken_adapters_are_stopped(fault: Any, figure: str, base: Any, tmp_path: Path) -> None:
    adapter = type("Broken", (fault, base), {})()
    module = UniGRPOModule(adapter, sampling=small(), objective=objective(), optim=optim())
    with pytest.raises(OnPolicyError, match=rf"model\.guard\.{figure}"):
        fit(tmp_path, module, 1)


def test_the_guard_may_warn_or_be_off(tmp_path: Path) -> None:
    for action in ("warn", "off"):
        module = UniGRPOModule(
            BrokenVelocity(),
            sampling=small(),
            objective=objective(),
            optim=optim(),
            guard=Guard(action=action),
        )
        if action == "warn":
            with pytest.warns(UserWarning, match="not the same policy"):
                fit(tmp_path, module, 1)
        else:
            assert "guard/velocity" not in fit(tmp_path, module, 1).metrics[0]


@pytest.mark.parametrize("toy", TOYS)
def test_bf16_recomputes_the_old_policy_and_logs_the_mismatch(toy: Any, tmp_path: Path) -> None:
    module = UniGRPOModule(toy(), sampling=small(), objective=objective(), optim=optim())
    metrics = fit(tmp_path, module, 2, precision="bf16-mixed").metrics[0]
    assert 0 < metrics["guard/log_prob"] < 1
    assert metrics["text/log_ratio_max"] <= 5e-5  # recomputed by the training path itself


@pytest.mark.parametrize("kind", ["layer", "number"])
def test_dropout_is_refused(kind: str) -> None:
    """Attention of ``transformers`` keeps its rate as a number, which no layer shows."""
    adapter = ToyFlow()
    if kind == "layer":
        adapter.net.drop = torch.nn.Dropout(0.1)
    else:
        next(adapter.net.children()).attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"adapter\.net\..* is 0\.1: with dropout"):
        UniGRPOModule(adapter)


def test_csv_logger_holds_every_iteration(tmp_path: Path) -> None:
    module = UniGRPOModule(ToyFlow(), sampling=small(), objective=objective(), optim=optim())
    fit(tmp_path, module, 3, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert len(lines) == 4
    assert {"reward", "guard/velocity", "flow/velocity_mse", "text/entropy"} <= set(
        lines[0].split(",")
    )


# Lightning says this of every module with configure_model; nothing is sharded here.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
def test_lightnings_own_ema_averages_the_policy(tmp_path: Path) -> None:
    """After every step: average = 0.5 average + 0.5 weights; at the end the average is the model."""

    class Steps(UniGRPOCallback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            self.weights.append(flat(pl_module))

    steps = Steps()
    module = UniGRPOModule(ToyFlow(), sampling=small(), objective=objective(), optim=optim())
    start = flat(module)
    fit(tmp_path, module, 2, steps, EMAWeightAveraging(decay=0.5))
    # torch's averaged model copies the weights at its first update.
    expected = 0.5 * steps.weights[0] + 0.5 * steps.weights[1]
    assert not torch.equal(start, expected)
    torch.testing.assert_close(flat(module), expected, atol=1e-6, rtol=0)


def flat(module: UniGRPOModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.adapter.net.parameters()])


@pytest.mark.parametrize(("rate", "warns"), [(1e-6, True), (1e-2, False)])
def test_a_rate_that_bfloat16_rounds_away_is_warned_of(
    tmp_path: Path, rate: float, warns: bool
) -> None:
    """The share that the warning names is the share that AdamW leaves as it was."""
    weight = torch.nn.Parameter(torch.randn(4000).bfloat16())
    before, optimizer = (
        weight.detach().clone(),
        torch.optim.AdamW([weight], lr=rate, weight_decay=0),
    )
    weight.grad = -torch.ones_like(weight)
    optimizer.step()
    stuck = float((weight == before).float().mean())
    assert (stuck > 0.5) is warns
    expected = (
        pytest.warns(UserWarning, match=rf"{stuck:.0%} of the weights in group 'text' are torch.bf")
        if warns
        else contextlib.nullcontext()
    )
    with expected:
        warn_if_rounded_away("text", [torch.nn.Parameter(before)], rate)
    warn_if_rounded_away("text", [torch.nn.Parameter(before.float())], rate)  # float32: nothing


def test_weights_in_bfloat16_warn_as_training_begins(tmp_path: Path) -> None:
    module = UniGRPOModule(ToyFlow(), optim=optim(text_lr=1e-6, flow_lr=1e-6))
    module.adapter.to(torch.bfloat16)
    run = trainer(tmp_path, 1, precision="bf16-true")
    module.trainer = run
    with pytest.warns(UserWarning, match="they will not train"):
        module.configure_optimizers()


class AnyDevice(FSDPStrategy):
    """Lightning refuses the class itself on a CPU, by its exact type."""


def test_fsdp_is_refused_for_two_dtypes_before_anything_is_read(tmp_path: Path) -> None:
    module = UniGRPOModule(ToyFlow())
    next(module.adapter.net.parameters()).data = next(module.adapter.net.parameters()).data.half()
    module.adapter.materialize = lambda: pytest.fail("weights were read")  # type: ignore[method-assign]
    module.trainer = trainer(tmp_path, 1, strategy=AnyDevice())
    with pytest.raises(ValueError, match=r"FSDP2\), or adapter\.dtype to float32"):
        module.configure_model()
