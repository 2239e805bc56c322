"""Do the other backbones learn? Tiny Janus and Show-o models on the arithmetic of the digits model.

    python -m benchmarks.families base           # base models, made from scratch by a seeded teacher
    python -m benchmarks.families ablation       # joint, text only, image only; 3 seeds each
    python -m benchmarks.families figures        # the table and the picture

The task, the imperfect teacher and the reward are those of the digits model (``benchmarks/digits.py``); the
networks are the published architectures at 0.1 to 0.3 million parameters. JanusFlow and Show-o2 draw 8 x 8
pixels as their latent, Janus-Pro and Show-o sixteen codes of 2 x 2 pixels. Bases are not shipped: they take
one to four minutes each.
Every run trains on training tuples only and is measured on the *test* tuples; settings were chosen on the
development tuples.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightning_unigrpo import Objective, Optim, PromptDataModule, Reward, RunReport, Sampling
from lightning_unigrpo.adapters.digits import DigitReward
from lightning_unigrpo.adapters.digits.evaluate import evaluate
from lightning_unigrpo.adapters.digits.pretrain import teach
from lightning_unigrpo.adapters.digits.task import prompts
from lightning_unigrpo.module import UniGRPOModule
from tests.families import CodeDigits, FlowDigits, MaskedDigits, TwoStackDigits

RESULTS = Path(__file__).parent / "results" / "families"


@dataclass(frozen=True)
class Family:
    """A backbone, and how its base is taught."""

    build: Callable[[], Any]
    steps: int
    """Of the teacher: until a third of the questions is answered."""


FAMILIES = {
    "janusflow": Family(FlowDigits, 1500),
    "januspro": Family(CodeDigits, 1000),
    "showo2": Family(TwoStackDigits, 1200),
    "showo": Family(MaskedDigits, 1500),
}
ARMS: dict[str, dict[str, float]] = {
    "joint": {},
    "text_only": {"flow_weight": 0.0, "mse_weight": 0.0, "image_token_kl_weight": 0.0},
    "image_only": {"text_weight": 0.0},
}
"""Of the objective: words and images share the decoder, so no expert can be frozen."""
SEEDS = 3


def settings_of(adapter: Any) -> dict[str, Any]:
    """Return what a family is trained with."""
    common = {"group_size": 8, "max_text_tokens": 12}
    if adapter.image_policy != "flow":
        masked = {
            "num_timesteps": 10,
            "schedule": "steps",
            "window_size": 5,
            "window_range": (0, 10),
        }
        return {
            "sampling": Sampling(**common, **(masked if adapter.image_policy == "masked" else {})),
            "objective": Objective(mse_weight=0.0, image_token_kl_weight=0.01),
            "optim": Optim(text_lr=3e-4, flow_lr=3e-4, ppo_epochs=1),
        }
    return {
        "sampling": Sampling(
            **common,
            num_timesteps=10,
            schedule="steps",
            shift=1.0,
            eta=0.7,
            window_size=5,
            window_range=(0, 5),
            eval_num_timesteps=10,
        ),
        "objective": Objective(flow_clip_low=1e-3, flow_clip_high=1e-3, mse_weight=0.004),
        "optim": Optim(text_lr=3e-4, flow_lr=3e-4, ppo_epochs=1),
    }


def base_file(family: str) -> Path:
    """Return where a base model is kept; it is not part of the repository."""
    return RESULTS / "bases" / f"{family}.safetensors"


def make_base(family: str) -> dict[str, Any]:
    """Teach a model from scratch, and measure it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    known, begin = FAMILIES[family], time.process_time()
    adapter = known.build()
    teach(adapter, seed=0, steps=known.steps, levels=2)
    seconds = time.process_time() - begin
    base_file(family).parent.mkdir(parents=True, exist_ok=True)
    save_file(adapter.net.state_dict(), base_file(family))
    return {
        "family": family,
        "parameters": sum(p.numel() for p in adapter.net.parameters()),
        "steps": known.steps,
        "cpu_seconds": round(seconds, 1),
        "dev": evaluate(adapter, "dev"),
        "test": evaluate(adapter, "test"),
    }


def train(family: str, arm: str, seed: int, iterations: int, split: str = "test") -> dict[str, Any]:
    """Train one model from its base and measure it; runs in a process of its own."""
    from lightning.pytorch import Trainer

    torch.set_num_threads(1)
    adapter = FAMILIES[family].build()
    adapter.net.load_state_dict(load_file(base_file(family)))
    settings = settings_of(adapter)
    objective, sampling = settings["objective"], settings["sampling"]
    module = UniGRPOModule(
        adapter,
        rewards=[Reward(DigitReward(), name="digit")],
        sampling=replace(sampling, seed=seed),
        objective=replace(objective, **ARMS[arm]),
        optim=settings["optim"],
    )
    report, begin = RunReport(), time.process_time()
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[report],
    ).fit(module, PromptDataModule.from_prompts(prompts("train"), prompts_per_iteration=16))
    return {
        "family": family,
        "arm": arm,
        "seed": seed,
        "iterations": iterations,
        "cpu_seconds": round(time.process_time() - begin, 1),
        split: evaluate(adapter, split),  # type: ignore[arg-type]
        "reward": [round(r, 4) for _, r in report.train],
    }


def keep(name: str, result: dict[str, Any]) -> None:
    """Write one result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(name, result["test"], flush=True)


def base(options: argparse.Namespace) -> None:
    """Make the base models; what is already there is not made again."""
    with pool(options) as workers:
        lacking = [family for family in FAMILIES if not base_file(family).exists()]
        jobs = {family: workers.submit(make_base, family) for family in lacking}
        for family, job in jobs.items():
            keep(f"{family}_base", job.result())


def ablation(options: argparse.Namespace) -> None:
    """Train every arm; what is already there is not run again."""
    with pool(options) as workers:
        jobs = {
            f"{family}_{arm}_seed{seed}": (family, arm, seed, options.iterations)
            for family in FAMILIES
            for arm in ARMS
            for seed in range(SEEDS)
        }
        todo = {
            name: workers.submit(train, *job)
            for name, job in jobs.items()
            if not (RESULTS / f"{name}.json").exists()
        }
        for name, job in todo.items():
            keep(name, job.result())


def pool(options: argparse.Namespace) -> ProcessPoolExecutor:
    """Return processes of one thread each."""
    return ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    )


KEYS = (
    "greedy_reward",
    "greedy_reasoning_accuracy",
    "image_given_right_text",
    "no_reasoning_reward",
)


def table() -> dict[str, dict[str, dict[str, tuple[float, float, int]]]]:
    """Return mean, standard deviation and number of runs: family, arm, figure."""
    found: dict[str, dict[str, dict[str, tuple[float, float, int]]]] = {}
    for family in FAMILIES:
        for arm in ("base", *ARMS):
            files = sorted(RESULTS.glob(f"{family}_{arm}*.json"))
            runs = [json.loads(file.read_text())["test"] for file in files]
            values = {key: [run[key] for run in runs] for key in KEYS}
            found.setdefault(family, {})[arm] = {
                key: (mean(v), stdev(v) if len(v) > 1 else 0.0, len(v)) for key, v in values.items()
            }
    return found


def markdown() -> list[str]:
    """Return the rows of the table in docs/results.md."""
    rows = []
    for family, arms in table().items():
        for arm, cells in arms.items():
            texts = [f"{m:.3f} ± {s:.3f}" if n > 1 else f"{m:.3f}" for m, s, n in cells.values()]
            number = next(iter(cells.values()))[2]
            rows.append(f"| {family} | {arm.replace('_', ' ')} | {number} | {' | '.join(texts)} |")
    return rows


def figures(_: argparse.Namespace) -> None:
    """Print the table and draw the rewards over the iterations."""
    from matplotlib.figure import Figure

    print("\n".join(markdown()))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, family in zip(figure.subplots(1, len(FAMILIES), sharey=True), FAMILIES, strict=True):
        for arm, colour in zip(ARMS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            for file in sorted(RESULTS.glob(f"{family}_{arm}_seed*.json")):
                rewards = torch.tensor(json.loads(file.read_text())["reward"])
                smooth = rewards.unfold(0, 10, 1).mean(1)
                label = arm.replace("_", " ") if file.stem.endswith("seed0") else None
                axis.plot(range(10, len(rewards) + 1), smooth, color=colour, lw=1, label=label)
        axis.set_title(family)
        axis.set_xlabel("iteration")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.axes[0].set_ylabel("reward in training, mean of 10")
    figure.savefig(RESULTS / "ablation.png", dpi=120)


def main() -> None:
    """Run the named parts; all of them without a name."""
    parts = {f.__name__: f for f in (base, ablation, figures)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    options = parser.parse_args()
    for name in options.parts or parts:
        parts[name](options)


if __name__ == "__main__":
    main()
