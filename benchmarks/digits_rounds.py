"""Does looking at one's own drawing pay? One round against two, from one base, at equal numbers of images.

    python benchmarks/digits_rounds.py runs      # every arm, seeds 0 1 2
    python benchmarks/digits_rounds.py figures   # the table and the picture of what was measured

All arms begin with the shipped base ``two_rounds``, draw as many images while training, and are measured
on the *test* tuples. *longer* takes one round and twice the iterations, *wider* one round and groups twice
as large, *two_rounds* thinks, draws, looks, draws again under one reward of the last image. The arms
``text_only`` freeze the image expert: what remains is what words can do. Results lie under
``benchmarks/results/digits_rounds/``, one JSON per run.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "digits_rounds"
ITERATIONS, PROMPTS, GROUP, SEEDS, POINTS = 80, 16, 8, 3, 8


class Arm(NamedTuple):
    """How an arm spends its images."""

    label: str
    rounds: int
    iterations: int = ITERATIONS
    group: int = GROUP
    text_only: bool = False


ARMS = {
    "longer": Arm("one round, twice the iterations", 1, iterations=2 * ITERATIONS),
    "wider": Arm("one round, groups twice as large", 1, group=2 * GROUP),
    "two_rounds": Arm("two rounds", 2),
    "longer_text_only": Arm(
        "one round, image expert frozen", 1, iterations=2 * ITERATIONS, text_only=True
    ),
    "two_rounds_text_only": Arm("two rounds, image expert frozen", 2, text_only=True),
}
FROZEN = {"flow_lr": 0.0, "flow_weight": 0.0, "mse_weight": 0.0}
KEYS = {
    "reward_1": "first image",
    "reward": "second image",
    "exchanged_reward": "second, another's shown",
    "reasoning_accuracy": "reasoning right",
    "reading": "reading right",
    "mended": "mended",
    "kept": "kept",
}
"""Columns of the table. An arm of one round was trained for its first image; its second is for comparison."""


def train(name: str, seed: int) -> dict[str, Any]:
    """Train one model and measure it on the test tuples; runs in a process of its own."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightning_unigrpo import PromptDataModule, RunReport, UniGRPOModule
    from lightning_unigrpo.adapters.digits import DigitsAdapter
    from lightning_unigrpo.adapters.digits.evaluate import evaluate_rounds

    torch.set_num_threads(1)
    arm, adapter = ARMS[name], DigitsAdapter("two_rounds")
    images_an_iteration = PROMPTS * arm.group * arm.rounds
    curve: list[dict[str, float]] = []

    class HeldOut(Callback):
        def measure(self, iteration: int) -> None:
            found = evaluate_rounds(adapter, "test", arm.rounds)
            curve.append({"images": iteration * images_an_iteration, **found})

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.measure(0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if pl_module.iteration % (arm.iterations // POINTS) == 0:
                self.measure(pl_module.iteration)

    settings = adapter.defaults()
    changes = FROZEN if arm.text_only else {}
    objective, optim = (
        replace(part, **{k: v for k, v in changes.items() if hasattr(part, k)})
        for part in (settings.objective, settings.optim)
    )
    sampling = replace(
        settings.sampling, seed=seed, group_size=arm.group, plan=("text", "image") * arm.rounds
    )
    report = RunReport()
    begin, cpu = time.monotonic(), time.process_time()
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=arm.iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[report, HeldOut()],
    ).fit(
        UniGRPOModule(adapter, sampling=sampling, objective=objective, optim=optim),
        PromptDataModule(prompts_per_iteration=PROMPTS),
    )
    seconds = {"wall_seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
    return {
        "arm": name,
        "seed": seed,
        "iterations": arm.iterations,
        "images": arm.iterations * images_an_iteration,
        **{k: round(v, 1) for k, v in seconds.items()},
        "curve": curve,
        "reward": [round(r, 4) for _, r in report.train],
        **measure(adapter),
    }


def measure(adapter: Any) -> dict[str, Any]:
    """Return what a model draws in one round and in two, over four draws of the noise, and some dialogues.

    The first round of two is the round of one; so a model of one round is asked for a second one that it
    was never trained for, too.
    """
    from lightning_unigrpo.adapters.digits.evaluate import evaluate_rounds

    found = evaluate_rounds(adapter, "test", 2, num_seeds=4)
    return {"test": found, "samples": samples(adapter)}


def samples(adapter: Any, most: int = 3) -> dict[str, list[dict[str, Any]]]:
    """Return dialogues on the test questions: the first few of each way a second round can go."""
    from lightning_unigrpo.adapters.digits import DigitReward
    from lightning_unigrpo.adapters.digits.evaluate import dialogue
    from lightning_unigrpo.adapters.digits.task import prompts

    rows, judge = prompts("test"), DigitReward()
    rounds = dialogue(adapter, rows, 2)
    answers = [prompt.columns["answer"] for prompt in rows]
    rewards = [judge(images=each.images, answer=answers).tolist() for each in rounds]
    found: dict[str, list[dict[str, Any]]] = {}
    for b, prompt in enumerate(rows):
        was, now = (values[b] > 0.5 for values in rewards)
        kind = {
            (True, True): "kept",
            (False, True): "mended",
            (False, False): "still wrong",
            (True, False): "spoiled",
        }[was, now]
        sample = {
            "prompt": prompt.text,
            "answer": answers[b],
            "texts": [adapter.detokenize(each.texts[b].tokens) for each in rounds],
            "rewards": [round(values[b], 2) for values in rewards],
            "images": [
                [[round(v, 2) for v in line] for line in each.images[b, 0].tolist()]
                for each in rounds
            ],
        }
        found.setdefault(kind, []).append(sample)
    numbers = {kind: len(each) for kind, each in found.items()}
    print(numbers)
    return {kind: each[:most] for kind, each in found.items()}


def base() -> dict[str, Any]:
    """Measure the shipped checkpoint as it is."""
    import torch

    from lightning_unigrpo.adapters.digits import DigitsAdapter

    torch.set_num_threads(1)
    return {"arm": "base", **measure(DigitsAdapter("two_rounds"))}


def runs(workers: int) -> None:
    """Run what is not there yet, in processes of one thread each."""
    jobs: dict[str, tuple[Any, ...]] = {"base": (base,)}
    jobs |= {f"{name}_seed{seed}": (train, name, seed) for seed in range(SEEDS) for name in ARMS}
    RESULTS.mkdir(parents=True, exist_ok=True)
    todo = {name: job for name, job in jobs.items() if not (RESULTS / f"{name}.json").exists()}
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        found = {name: pool.submit(*job) for name, job in todo.items()}
        for name, future in found.items():
            result = future.result()
            (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
            print(name, result.get("wall_seconds"), result["test"], flush=True)


def read(name: str) -> list[dict[str, Any]]:
    """Return the results of an arm, or of the base."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}_seed?.json"))]


def table() -> str:
    """Return mean and standard deviation over the seeds of each arm, for docs/results.md."""
    lines = ["| | n | " + " | ".join(KEYS.values()) + " |"]
    lines.append("|---" * (len(KEYS) + 2) + "|")
    groups = {"base": [json.loads((RESULTS / "base.json").read_text())]}
    groups |= {arm.label: read(name) for name, arm in ARMS.items()}
    for label, found in groups.items():
        cells = []
        for key in KEYS:
            values = [each["test"][key] for each in found if key in each["test"]]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}" if values else "-")
        lines.append(f"| {label} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(_: int) -> None:
    """Print the table and draw the picture."""
    from matplotlib.figure import Figure

    print(table())
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    for axis, text_only in zip(above.subplots(1, 2, sharey=True), (False, True), strict=True):
        curves(axis, text_only)
    strip(below)
    figure.savefig(RESULTS / "rounds.png", dpi=120)


def curves(axis: Any, text_only: bool) -> None:
    """Draw held-out rewards over the images sampled, a thin line a seed."""
    arms = [(name, arm) for name, arm in ARMS.items() if arm.text_only == text_only]
    for color, (name, arm) in zip(("tab:gray", "tab:brown", "tab:blue"), arms, strict=False):
        color = "tab:blue" if arm.rounds == 2 else color
        for key, style in (("reward", "-"), ("reward_1", ":")):
            found = [r["curve"] for r in read(name)]
            if not found or key not in found[0][0]:
                continue
            images = [point["images"] for point in found[0]]
            values = [[point[key] for point in each] for each in found]
            for line in values:
                axis.plot(images, line, style, color=color, lw=0.6, alpha=0.5)
            label = f"{arm.label}, its first image" if key == "reward_1" else arm.label
            average = [mean(each) for each in zip(*values, strict=True)]
            axis.plot(images, average, style, color=color, lw=1.8, label=label)
    axis.set(xlabel="images sampled in training", ylabel="held-out reward", ylim=(0, 1))
    axis.set_title("image expert frozen" if text_only else "joint", fontsize=9)
    axis.legend(fontsize=7, loc="lower right" if not text_only else "upper left")


def strip(figure: Any) -> None:
    """Draw dialogues of the base and of a model after two rounds of training, failures included."""
    wanted = ("kept", "mended", "still wrong", "spoiled")
    sources = {
        "base": json.loads((RESULTS / "base.json").read_text())["samples"],
        "trained": read("two_rounds")[0]["samples"],
    }
    columns = [
        (f"{who}: {kind}", sample)
        for who, found in sources.items()
        for kind in wanted
        for sample in found.get(kind, [])[:1]
    ]
    axes = figure.subplots(2, len(columns))
    for column, (title, sample) in enumerate(columns):
        for row in range(2):
            axis = axes[row, column]
            axis.imshow(sample["images"][row], cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(
                f"{sample['texts'][row]}\nreward {sample['rewards'][row]:.2f}", fontsize=7
            )
        question = sample["prompt"].replace(" plus", "\nplus").replace(" minus", "\nminus")
        axes[0, column].set_title(f"{title}\n{question}", fontsize=7)


def main() -> None:
    """Run the named parts; all of them without a name."""
    parts = {f.__name__: f for f in (runs, figures)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    for name in options.parts or parts:
        parts[name](options.workers)


if __name__ == "__main__":
    main()
