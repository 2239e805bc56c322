"""The paper's tables at the scale of the embedded digits model.

    python benchmarks/digits.py seeds            # configs/digits.yaml, seeds 0 1 2: reward and wall time
    python benchmarks/digits.py ablation         # joint, text only, image only, more SFT; 3 seeds, 2 bases
    python benchmarks/digits.py regularisation   # none, velocity MSE, latent KL
    python benchmarks/digits.py figures          # tables and figures of what was measured

Every run starts from a shipped base checkpoint, trains on training tuples only, and is measured on the
*test* tuples; settings were chosen on the development tuples. Results lie under
``benchmarks/results/digits/``, one JSON per run, with the reward of every iteration.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "digits"
ARMS: dict[str, dict[str, float]] = {
    "joint": {},
    "text_only": {"flow_lr": 0.0, "flow_weight": 0.0, "mse_weight": 0.0},
    "image_only": {"text_lr": 0.0, "text_weight": 0.0},
    "more_sft": {},
}
REGULARISERS: dict[str, dict[str, float]] = {
    "none": {"mse_weight": 0.0},
    "velocity_mse": {},
    # The same mean weight on squared velocity errors as the MSE above, spread as a KL spreads it.
    "latent_kl": {"mse_weight": 0.0, "latent_kl_weight": 0.08},
}
ITERATIONS, LONG = 150, 300


def train(
    base: str, seed: int, iterations: int, changes: dict[str, float], sft: bool = False
) -> dict[str, Any]:
    """Train one model and measure it on the test tuples; runs in a process of its own."""
    import torch
    from lightning.pytorch import Trainer

    from lightning_unigrpo import PromptDataModule, RunReport, UniGRPOModule
    from lightning_unigrpo.adapters.digits import DigitsAdapter
    from lightning_unigrpo.adapters.digits.evaluate import evaluate
    from lightning_unigrpo.adapters.digits.pretrain import teach

    torch.set_num_threads(1)
    adapter = DigitsAdapter(base)
    settings = adapter.defaults()
    begin, cpu = time.monotonic(), time.process_time()
    rewards: list[tuple[int, float]] = []
    if sft:
        # As many samples as the reinforcement learning draws, from the same imperfect teacher.
        teach(
            adapter, seed=100 + seed, steps=iterations * 2, lr=3e-4, errors_of=int(base == "base1")
        )
    else:
        objective, optim = (
            replace(part, **{k: v for k, v in changes.items() if hasattr(part, k)})
            for part in (settings.objective, settings.optim)
        )
        report = RunReport()
        module = UniGRPOModule(
            adapter,
            sampling=replace(settings.sampling, seed=seed),
            objective=objective,
            optim=optim,
        )
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
        ).fit(module, PromptDataModule(prompts_per_iteration=16))
        rewards = report.train
    seconds = {"wall_seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
    return {
        "base": base,
        "seed": seed,
        "iterations": iterations,
        "changes": changes,
        **{k: round(v, 1) for k, v in seconds.items()},
        "test": evaluate(adapter, "test") | images_of(adapter),
        "reward": [round(r, 4) for _, r in rewards],
    }


def images_of(adapter: Any) -> dict[str, float]:
    """Draw the test questions and measure what a classifier does not see of the images."""
    import torch

    from lightning_unigrpo.adapters.digits.evaluate import draw, think
    from lightning_unigrpo.adapters.digits.task import prompts

    rows = prompts("test")
    texts = think(adapter, rows)
    drawn = torch.cat([draw(adapter, rows, texts, seed=s) for s in range(4)])
    return quality_of(drawn, torch.tensor([p.columns["answer"] for p in rows]).repeat(4))


def quality_of(drawn: Tensor, answers: Tensor) -> dict[str, float]:
    """Measure what a classifier does not see: Fréchet distance, diversity, saturation.

    A second classifier (other width, seed and noise) gives agreement and, with its hidden layer, the
    features of the Fréchet distance to the 360 real images that no model was trained on.

    Args:
        drawn: ``[n, 3, 8, 8]`` in [0, 1].
        answers: ``[n]`` int64, the digits that were asked for.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    from lightning_unigrpo.adapters.digits.classifier import train_classifier
    from lightning_unigrpo.adapters.digits.images import load_digits

    class Features(torch.nn.Module):
        num_features = 48

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return judge.features(x[:, :1] * 2 - 1)

    judge = train_classifier(11, width=32, hidden=Features.num_features, noise=0.5)
    pixels, labels = load_digits("held_out")
    real = ((pixels + 1) / 2).unsqueeze(1).expand(-1, 3, -1, -1)
    distance = FrechetInceptionDistance(Features(), normalize=True, input_img_size=(3, 8, 8))
    distance.update(real, real=True)
    distance.update(drawn, real=False)
    seen = judge(drawn[:, :1] * 2 - 1).argmax(1)

    def spread(images: torch.Tensor, digits: torch.Tensor) -> float:
        groups = [images[digits == d, 0] for d in range(10)]
        return float(torch.stack([g.var(0).mean() for g in groups if len(g) > 1]).mean().sqrt())

    return {
        "judge_accuracy": round(float((seen == answers).float().mean()), 4),
        "frechet": round(float(distance.compute()), 3),
        "diversity": round(spread(drawn, seen) / spread(real, labels), 4),
        "saturation": round(float(((drawn < 0.02) | (drawn > 0.98)).float().mean()), 4),
        "saturation_white": round(float((drawn > 0.98).float().mean()), 4),
    }


def measure_base(base: str) -> dict[str, Any]:
    """Measure a shipped checkpoint as it is."""
    import torch

    from lightning_unigrpo.adapters.digits import DigitsAdapter
    from lightning_unigrpo.adapters.digits.evaluate import evaluate

    torch.set_num_threads(1)
    adapter = DigitsAdapter(base)
    return {"base": base, "test": evaluate(adapter, "test") | images_of(adapter)}


def save(name: str, result: dict[str, Any]) -> None:
    """Keep one result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    test = result["test"]
    print(
        name,
        {k: test[k] for k in ("greedy_reward", "frechet", "diversity") if k in test},
        flush=True,
    )


def sweep(jobs: dict[str, tuple[Any, ...]], workers: int) -> None:
    """Run jobs in processes of one thread each; what is already there is not run again."""
    todo = {name: job for name, job in jobs.items() if not (RESULTS / f"{name}.json").exists()}
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        found = {name: pool.submit(*job) for name, job in todo.items()}
        for name, future in found.items():
            save(name, future.result())


def bases(workers: int) -> None:
    """Measure both bases."""
    sweep({f"{base}": (measure_base, base) for base in ("base", "base1")}, workers)


def ablation(workers: int) -> None:
    """Compare the joint objective with its parts."""
    bases(workers)
    sweep(
        {
            f"ablation_{arm}_{base}_seed{seed}": (
                train,
                base,
                seed,
                ITERATIONS,
                changes,
                arm == "more_sft",
            )
            for base in ("base", "base1")
            for seed in range(3)
            for arm, changes in ARMS.items()
        },
        workers,
    )


def regularisation(workers: int) -> None:
    """Compare what keeps the images honest, in a run twice as long."""
    bases(workers)
    sweep(
        {
            f"regularisation_{name}_seed{seed}": (train, "base", seed, LONG, changes)
            for seed in range(2)
            for name, changes in REGULARISERS.items()
        },
        workers,
    )


def seeds(_: int) -> None:
    """Run the shipped configuration through the command line, as a user would."""
    import shutil
    import subprocess
    import sys
    import tempfile

    config = Path(__file__).parent.parent / "configs" / "digits.yaml"
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            command = [
                sys.executable,
                "-m",
                "lightning_unigrpo.cli",
                "fit",
                "--config",
                str(config),
            ]
            arguments = [*command, "--seed_everything", str(seed)]
            subprocess.run(arguments, cwd=folder, check=True)  # noqa: S603 - our own command
            wall = time.monotonic() - begin
            run = Path(folder) / "runs" / "digits" / "version_0"
            shutil.copy(run / "metrics.csv", RESULTS / f"seed{seed}_metrics.csv")
            shutil.copy(run / "config.yaml", RESULTS / f"seed{seed}_config.yaml")
            record = json.loads((run / "report.json").read_text())
            record = {
                "seed": seed,
                "wall_seconds": round(wall, 1),
                "cores": os.cpu_count(),
                **record,
            }
            (RESULTS / f"seed{seed}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
            if seed == 0:
                for picture in ("samples.png", "reward_curve.png"):
                    shutil.copy(run / picture, RESULTS / picture)


def table(pattern: str, keys: list[str]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over the runs of each arm."""
    groups: dict[str, list[dict[str, float]]] = {}
    for path in sorted(RESULTS.glob(pattern)):
        arm = path.stem.split("_", 1)[1].rsplit("_seed", 1)[0]
        for base in ("_base1", "_base"):
            arm = arm.removesuffix(base)
        groups.setdefault(arm, []).append(json.loads(path.read_text())["test"])
    groups["base"] = [
        json.loads((RESULTS / f"{b}.json").read_text())["test"] for b in ("base", "base1")
    ]
    rows = []
    for arm, found in groups.items():
        row: dict[str, Any] = {"arm": arm, "n": len(found)}
        for key in keys:
            values = [test[key] for test in found]
            row[key] = (mean(values), stdev(values) if len(values) > 1 else 0.0)
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """Return a table for docs/results.md."""
    lines = ["| | n | " + " | ".join(k.replace("_", " ") for k in keys) + " |"]
    lines.append("|---" * (len(keys) + 2) + "|")
    for row in rows:
        cells = [f"{row[k][0]:.3f} ± {row[k][1]:.3f}" for k in keys]
        lines.append(f"| {row['arm'].replace('_', ' ')} | {row['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(_: int) -> None:
    """Print the tables of what was measured and draw its figures."""
    from matplotlib.figure import Figure

    parts = [
        "greedy_reward",
        "accuracy",
        "judge_accuracy",
        "greedy_reasoning_accuracy",
        "image_given_right_text",
    ]
    pictures = ["greedy_reward", "judge_accuracy", "frechet", "diversity", "saturation"]
    for name, pattern, keys in (
        ("ablation", "ablation_*.json", parts),
        ("regularisation", "regularisation_*.json", pictures),
    ):
        rows = table(pattern, keys)
        print(f"\n{name}\n\n{markdown(rows, keys)}")
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axis, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
            axis.bar(
                [r["arm"].replace("_", "\n") for r in rows],
                [r[key][0] for r in rows],
                yerr=[r[key][1] for r in rows],
                color="tab:blue",
                alpha=0.8,
            )
            axis.set_title(key.replace("_", " "), fontsize=8)
            axis.tick_params(labelsize=6)
        figure.savefig(RESULTS / f"{name}.png", dpi=120)


def main() -> None:
    """Run the named parts; all of them without a name."""
    parts = {f.__name__: f for f in (seeds, ablation, regularisation, figures)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    args = parser.parse_args()
    for name in args.parts or parts:
        parts[name](args.workers)


if __name__ == "__main__":
    main()
