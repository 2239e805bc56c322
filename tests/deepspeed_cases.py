"""What ranks do in :mod:`tests.test_deepspeed`: Lightning's own strategy, on DeepSpeed's CPU engine.

Lightning refuses the strategy on a CPU by a check of its own, and DeepSpeed runs there: that check, a device
without a number and an operator that would be compiled are all that stands between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import nn

from lightning_unigrpo import (
    Guard,
    IterationCheckpoint,
    PromptDataModule,
    ReferenceVelocity,
    UniGRPOCallback,
    distributed,
)
from lightning_unigrpo.adapters.bagel.lora import LoRA
from lightning_unigrpo.callbacks import Experience
from tests import rank_cases
from tests.rank_cases import CASES, Case, Record, Replay, file_of, run, settings_of
from tests.ranks import trainer_of

BUCKET = 100_000
"""Numbers that are sent together; DeepSpeed's own buffers take gigabytes on each rank."""


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on CPU processes.

    Args:
        stage: of ZeRO.
        settings: of Lightning's strategy.
    """

    def __init__(self, stage: int = 2, **settings: Any) -> None:
        buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        super().__init__(stage=stage, process_group_backend="gloo", **(buckets | settings))
        assert self.config is not None
        if "config" not in settings and stage == 3:
            # Weights of less than 100,000 numbers would stay whole on every rank: all that there are here.
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    def setup_environment(self) -> None:
        from deepspeed.ops import __compatible_ops__ as operators

        operators["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
        DDPStrategy.setup_environment(self)  # past the check for CUDA

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)  # the engine wants a number


def let_deepspeed_run_on_cpus() -> None:
    """Make the literal ``strategy="deepspeed_stage_N"`` mean :class:`CPUDeepSpeedStrategy` here."""
    for name in StrategyRegistry.available_strategies():
        if name.startswith("deepspeed"):
            StrategyRegistry[name]["strategy"] = CPUDeepSpeedStrategy


# ---- what is trained

TOY = CASES["flow"]
RATES = {"text_lr": 1e-3, "flow_lr": 3e-3, "warmup_steps": 4}
KNOWN: dict[str, Case] = CASES | {
    "clipped": replace(TOY, optim={"max_grad_norm": 0.02}),  # below the norm of every update
    "in one piece": replace(TOY, optim={"micro_batch_size": None}),
    "adamw": replace(TOY, lr=None, optim=RATES),
}
LARGE = ("bagel", "lora")
"""Trained for one collection; the others for three."""


def iterations_of(key: str) -> int:
    return 1 if key in LARGE else 3


def clip_together(
    groups: Mapping[str, Sequence[nn.Parameter]], max_norm: float | None, net: nn.Module
) -> dict[str, float]:
    """Clip all gradients to one norm, by torch."""
    parameters = [parameter for group in groups.values() for parameter in group]
    norm = nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
    return {"global": float(norm)}


def run_alone(key: str, folder: Path) -> tuple[list[Any], Record]:
    """Train a case in one process; returns the trajectories of all iterations, and the record."""
    with mock.patch.object(distributed, "clip_grad_norms", clip_together):
        module, record = run(KNOWN[key], "single", folder, iterations=iterations_of(key))
    return module.drawn, record


# ---- what ranks do


class Parts(Callback):
    """Counts what a rank holds of policy and reference, as shares of the whole, after an iteration."""

    found: dict[str, float]

    def __init__(self, reference: ReferenceVelocity) -> None:
        self.reference = reference

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        nets = {"policy": pl_module.adapter.net}
        if self.reference._twin:
            nets["reference"] = self.reference._twin[0].net
        self.found = {}
        for name, net in nets.items():
            parameters: list[Any] = list(net.parameters())
            whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
            own = sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor"))
            self.found[f"{name} part"] = own / whole
            self.found[f"{name} whole"] = sum(p.numel() for p in parameters) / whole


def train(folder: Path, *names: str) -> None:
    """Train cases, each ``strategy/case/mode/precision``; given trajectories lie in ``../alone``."""
    let_deepspeed_run_on_cpus()
    root = folder.parent
    for name in names:
        strategy, key, mode, precision = name.split("/")
        reference = ReferenceVelocity(refresh_every=2)
        parts = Parts(reference)
        given = rank_cases.given_of(root, key) if (root / "alone" / f"{key}.pt").exists() else None
        module, record = run(
            KNOWN[key],
            "single",
            root / "bagel",
            reference,
            parts,
            iterations=iterations_of(key) if given else 1,
            mode=mode,
            given=given,
            trainer={"strategy": strategy, "precision": precision},
        )
        optimizer = module.trainer.optimizers[0]
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        torch.save((record, parts.found, rates), file_of(folder, name))


def module_of(case: Case, root: Path, **changes: Any) -> Replay:
    return Replay(case.build(root / "bagel"), **({"lr": case.lr} | settings_of(case) | changes))


def data_of(case: Case) -> PromptDataModule:
    def other(start: int) -> list[Any]:
        return [replace(prompt, id=prompt.id + start) for prompt in case.prompts]

    return PromptDataModule.from_prompts(
        case.prompts, prompts_per_iteration=len(case.prompts), val=other(10), test=other(20)
    )


def again(folder: Path, *strategies: str) -> None:
    """Train twice, test before and after training, and continue from a checkpoint, one module each time."""
    let_deepspeed_run_on_cpus()
    root = folder.parent

    def trainer(strategy: str, updates: int, *callbacks: Callback, **settings: Any) -> Trainer:
        return trainer_of(
            "single", updates, ReferenceVelocity(2), *callbacks, **{"strategy": strategy} | settings
        )

    for strategy in strategies:
        module, data = module_of(TOY, root, guard=Guard(action="warn")), data_of(TOY)
        for _ in range(2):  # the second time without momentum
            trainer(strategy, 2).fit(module, data)
        twice = distributed.whole_state(module.adapter.net)

        module = module_of(TOY, root)
        judge = trainer(strategy, 2, limit_test_batches=1.0, limit_val_batches=1.0)
        before = judge.test(module, data, verbose=False)
        judge.fit(module, data)
        validated = {k: float(v) for k, v in judge.callback_metrics.items() if k.startswith("val")}
        after = judge.test(module, data, verbose=False)

        given = rank_cases.given_of(root, "flow")
        saving = IterationCheckpoint(every=1, dirpath=str(folder / strategy))
        module = module_of(TOY, root, given=given)
        trainer(strategy, 4, saving, enable_checkpointing=True).fit(module, data)
        module = module_of(TOY, root, given=given)
        trainer(strategy, 6).fit(
            module, data, ckpt_path=str(folder / strategy / "last.ckpt"), weights_only=False
        )
        resumed = distributed.whole_state(module.adapter.net)
        found = {"twice": twice, "tests": [before, validated, after], "resumed": resumed}
        torch.save(found, file_of(folder, strategy))


# ---- ranks that differ, and what is refused


class Curious(UniGRPOCallback):
    """Asks a weight for its device on the second rank only, between two passes."""

    def on_experience(self, trainer: Trainer, module: Any, experience: Experience) -> None:
        if distributed.rank() == 1:
            assert module.adapter.net.words.weight.device.type == "cpu"


def config(**changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}} | changes


Settings = tuple[dict[str, Any], dict[str, Any]]
REFUSED: dict[str, Settings] = {
    "optimizer": (config(optimizer={"type": "Adam"}), {}),
    "scheduler": (config(scheduler={"type": "WarmupLR"}), {}),
    "gradient_accumulation_steps": (config(gradient_accumulation_steps=4), {}),
    "pipeline": (config(pipeline={"stages": 2}), {}),
    "gradient_clipping": (config(gradient_clipping=0.5), {}),
    "zero_optimization.stage": ({}, {}),
    "offload_param.device": (
        config(zero_optimization={"stage": 3, "offload_param": {"device": "nvme"}}),
        {},
    ),
    "bf16.enabled": (config(bf16={"enabled": True}), {}),
    "adapter.dtype": (
        config(),
        {"build": lambda folder: rank_cases.bagel(folder, dtype="bfloat16", lora=LoRA(rank=2))},
    ),
}
"""DeepSpeed's config and changes of a case, by what the message has to name."""
ALLOWED: dict[str, dict[str, Any]] = {
    "as Lightning puts it": config(gradient_accumulation_steps=1, gradient_clipping=0.02),
    "moments in the host's memory": config(
        zero_optimization={
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "reduce_bucket_size": BUCKET,
        },
        zero_allow_untested_optimizer=True,
    ),
}


def odd(folder: Path) -> None:
    """Run what makes ranks differ, and configurations that are refused or taken."""
    let_deepspeed_run_on_cpus()
    root, stage_3 = folder.parent, {"strategy": "deepspeed_stage_3"}
    bagel, digits = root / "bagel", CASES["digits"]
    found: dict[str, Any] = {}

    def raised(name: str, case: Case, **settings: Any) -> None:
        found[name] = rank_cases.what_is_raised(case, "single", bagel, **settings)

    long = replace(digits, build=lambda folder: rank_cases.Babbling())
    record = run(
        long,
        "single",
        bagel,
        iterations=1,
        mode="sharded",
        guard=Guard(action="off"),
        trainer=stage_3,
    )[1]
    found["lengths"] = [len(t.segments[1].tokens) for t in record.drawn]  # type: ignore[union-attr]
    breaking = replace(digits, build=lambda folder: rank_cases.Breaking())
    raised("breaks", breaking, mode="sharded", trainer=stage_3)
    record = run(
        TOY, "single", bagel, Curious(), given=rank_cases.given_of(root, "flow"), trainer=stage_3
    )[1]
    torch.save(record, file_of(folder, "curious"))
    texts = {"plan": ("text",), "max_text_tokens": 4}
    some_look = replace(CASES["bagel"], sampling=texts, reward=rank_cases.few_tokens)
    raised("some look", some_look, trainer=stage_3)
    for key, (given, changes) in REFUSED.items():
        case = replace(KNOWN["clipped"], **changes)
        raised(key, case, trainer={"strategy": CPUDeepSpeedStrategy(config=given)})
    for key, given in ALLOWED.items():
        given = given | {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        strategy = CPUDeepSpeedStrategy(config=given)
        record = run(
            KNOWN["clipped"],
            "single",
            bagel,
            given=rank_cases.given_of(root, "clipped"),
            trainer={"strategy": strategy},
        )[1]
        torch.save(record, file_of(folder, key))
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


# ---- where there is a GPU


def on_gpus(folder: Path, *strategies: str) -> None:
    """Train the digits once with each strategy, Lightning's own, in both precisions."""
    devices = int(os.environ["WORLD_SIZE"])
    for strategy in strategies:
        for precision in ("32-true", "bf16-mixed"):
            record = run(
                CASES["digits"],
                "single",
                folder,
                iterations=1,
                trainer={
                    "accelerator": "gpu",
                    "devices": devices,
                    "strategy": strategy,
                    "precision": precision,
                },
            )[1]
            torch.save(record, file_of(folder, f"{strategy}/{precision}"))
