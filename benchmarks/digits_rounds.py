"""Does looking at one's own drawing pay? One round against two, from one base, at equal numbers of images.

    python -m benchmarks.digits_rounds search    # every setting, seed 0, on the development tuples
    python -m benchmarks.digits_rounds runs      # the arms of the table, seeds 0 1 2, on the test tuples
    python -m benchmarks.digits_rounds figures   # the tables and the picture of what was measured

All arms begin with the shipped base ``two_rounds`` and draw as many images while training. One round thinks
and draws; two rounds think, draw, look and draw again. Results lie under
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
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.digits.task import Split

RESULTS = Path(__file__).parent / "results" / "digits_rounds"
IMAGES, PROMPTS, GROUP, SEEDS, POINTS = 20_480, 8, 8, 3, 8


class Arm(NamedTuple):
    """How an arm spends its images; what is not said is as in configs/digits.yaml."""

    label: str
    rounds: int
    lr: float = 3e-4
    mse_weight: float = 0.004

    @property
    def images(self) -> int:
        """Images of an iteration."""
        return PROMPTS * GROUP * self.rounds

    @property
    def iterations(self) -> int:
        """As many as the images allow."""
        return IMAGES // self.images


ARMS = {
    "one_round": Arm("one round", 1),
    "two_rounds": Arm("two rounds", 2),
    "one_round_free": Arm("one round, γ = 0", 1, mse_weight=0.0),
    "two_rounds_free": Arm("two rounds, γ = 0", 2, mse_weight=0.0),
}
"""Of the table."""
SEARCH = {
    "one_round": ARMS["one_round"],
    "one_round_lr": Arm("one round, learning rates doubled", 1, lr=6e-4),
    "one_round_free": ARMS["one_round_free"],
    "two_rounds": ARMS["two_rounds"],
}
"""What was tried on the development tuples."""
KEYS = {
    "reward_1": "first image",
    "reward": "second image",
    "exchanged_reward": "second, another's shown",
    "reasoning_accuracy": "reasoning right",
    "legible": "sketch right",
    "reading": "reading right",
    "mended": "mended",
    "kept": "kept",
}
"""Columns of the table. An arm of one round was trained for its first image; its second is for comparison."""
QUALITY = {
    "judge_accuracy": "judge accuracy",
    "frechet": "Fréchet distance",
    "diversity": "diversity",
}
"""Columns of the other table."""


def train(name: str, seed: int, split: Split) -> dict[str, Any]:
    """Train one model and measure it on held-out tuples; runs in a process of its own."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightning_unigrpo import PromptDataModule, UniGRPOModule
    from lightning_unigrpo.adapters.digits import DigitsAdapter
    from lightning_unigrpo.adapters.digits.evaluate import evaluate_rounds

    torch.set_num_threads(1)
    arm, adapter = (SEARCH | ARMS)[name], DigitsAdapter("two_rounds")
    curve: list[dict[str, float]] = []

    class HeldOut(Callback):
        def measure(self, iteration: int) -> None:
            found = evaluate_rounds(adapter, split, arm.rounds)
            curve.append({"images": iteration * arm.images, **found})

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.measure(0)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if pl_module.iteration % (arm.iterations // POINTS) == 0:
                self.measure(pl_module.iteration)

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
        callbacks=[HeldOut()],
    ).fit(
        UniGRPOModule(adapter, **settings(adapter, arm, seed)),
        PromptDataModule(prompts_per_iteration=PROMPTS),
    )
    seconds = {"wall_seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu}
    return {
        "arm": name,
        "settings": {k: v for k, v in arm._asdict().items() if k != "label"},
        "seed": seed,
        "iterations": arm.iterations,
        **{k: round(v, 1) for k, v in seconds.items()},
        "curve": curve,
        **measure(adapter, split),
    }


def settings(adapter: Any, arm: Arm, seed: int) -> dict[str, Any]:
    """Return the settings of an arm, for the module."""
    default = adapter.defaults()
    return {
        "sampling": replace(
            default.sampling, seed=seed, group_size=GROUP, plan=("text", "image") * arm.rounds
        ),
        "objective": replace(default.objective, mse_weight=arm.mse_weight),
        "optim": replace(default.optim, text_lr=arm.lr, flow_lr=arm.lr),
    }


def measure(adapter: Any, split: Split) -> dict[str, Any]:
    """Return what a model draws in one round and in two, over four draws of the noise, and some dialogues.

    The first round of two is the round of one; so a model of one round is asked for a second one that it
    was never trained for, too.
    """
    from lightning_unigrpo.adapters.digits.evaluate import evaluate_rounds
    from lightning_unigrpo.adapters.digits.pretrain_two_rounds import reader

    reads = reader()
    found = evaluate_rounds(adapter, split, 2, num_seeds=4, reader=reads)
    return {split: found, "quality": quality(adapter, split), **samples(adapter, split, reads)}


def quality(adapter: Any, split: Split) -> list[dict[str, float]]:
    """Return what the reward does not see of each round's images."""
    import torch

    from benchmarks.digits import quality_of
    from lightning_unigrpo.adapters.digits.evaluate import dialogue
    from lightning_unigrpo.adapters.digits.task import prompts

    rows = prompts(split)
    drawn = [dialogue(adapter, rows, 2, seed=seed) for seed in range(4)]
    answers = torch.tensor([p.columns["answer"] for p in rows]).repeat(len(drawn))
    found = []
    for number in range(2):
        each = quality_of(torch.cat([rounds[number].images for rounds in drawn]), answers)
        found.append({key: each[key] for key in QUALITY})
    return found


def samples(adapter: Any, split: Split, reads: Any, most: int = 3) -> dict[str, Any]:
    """Return how second images come out, why they fail, and the first few dialogues of each way."""
    from lightning_unigrpo.adapters.digits import DigitReward
    from lightning_unigrpo.adapters.digits.evaluate import dialogue
    from lightning_unigrpo.adapters.digits.task import prompts

    rows, judge = prompts(split), DigitReward()
    rounds = dialogue(adapter, rows, 2)
    answers = [prompt.columns["answer"] for prompt in rows]
    rewards = [judge(images=each.images, answer=answers).tolist() for each in rounds]
    first = reads(rounds[0].images).tolist()
    found: dict[str, list[dict[str, Any]]] = {}
    for b, prompt in enumerate(rows):
        texts = [adapter.detokenize(each.texts[b].tokens) for each in rounds]
        if rewards[1][b] > 0.5:
            kind = "right"
        elif texts[0] != prompt.columns["reasoning"]:
            kind = "wrong reasoning"
        elif first[b] != answers[b]:
            kind = "another digit sketched"
        else:
            kind = "spoiled"
        sample = {
            "prompt": prompt.text,
            "answer": answers[b],
            "texts": texts,
            "rewards": [round(values[b], 2) for values in rewards],
            "images": [
                [[round(v, 2) for v in line] for line in each.images[b, 0].tolist()]
                for each in rounds
            ],
        }
        found.setdefault(kind, []).append(sample)
    return {
        "outcomes": {kind: len(each) for kind, each in found.items()},
        "samples": {kind: each[:most] for kind, each in found.items()},
    }


def base() -> dict[str, Any]:
    """Measure the shipped checkpoint as it is."""
    import torch

    from lightning_unigrpo.adapters.digits import DigitsAdapter

    torch.set_num_threads(1)
    return {"arm": "base", **measure(DigitsAdapter("two_rounds"), "test")}


def search(workers: int) -> None:
    """Try every setting once, on the development tuples."""
    run({f"search/{name}": (train, name, 0, "dev") for name in SEARCH}, workers)


def runs(workers: int) -> None:
    """Measure the base and the arms of the table on the test tuples."""
    jobs: dict[str, tuple[Any, ...]] = {"base": (base,)}
    for seed in range(SEEDS):
        jobs |= {f"{name}_seed{seed}": (train, name, seed, "test") for name in ARMS}
    run(jobs, workers)


def run(jobs: dict[str, tuple[Any, ...]], workers: int) -> None:
    """Do what is not done yet, in processes of one thread each."""
    (RESULTS / "search").mkdir(parents=True, exist_ok=True)
    todo = {name: job for name, job in jobs.items() if not (RESULTS / f"{name}.json").exists()}
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        found = {name: pool.submit(*job) for name, job in todo.items()}
        for name, future in found.items():
            result = future.result()
            (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
            print(name, result.get("wall_seconds"), flush=True)


def of(name: str) -> list[dict[str, Any]]:
    """Return the results of an arm on the test tuples, or of the base."""
    paths = [RESULTS / "base.json"] if name == "base" else RESULTS.glob(f"{name}_seed?.json")
    return [json.loads(path.read_text()) for path in sorted(paths)]


def labels() -> dict[str, str]:
    """Return what the rows of the tables are called."""
    return {"base": "base"} | {name: arm.label for name, arm in ARMS.items()}


def cell(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table() -> str:
    """Return what each round draws, for docs/results.md."""
    lines = ["| | n | " + " | ".join(KEYS.values()) + " |", "|---" * (len(KEYS) + 2) + "|"]
    for name, label in labels().items():
        values = [[r["test"][key] for r in of(name) if key in r["test"]] for key in KEYS]
        cells = [cell(each) if each else "-" for each in values]
        lines.append(f"| {label} | {len(of(name))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quality_table() -> str:
    """Return what the reward does not see, of the images that an arm was trained for."""
    lines = [
        "| | image | " + " | ".join(QUALITY.values()) + " |",
        "|---" * (len(QUALITY) + 2) + "|",
    ]
    for name, label in labels().items():
        for number in (1, 2) if name == "base" else (ARMS[name].rounds,):
            values = [[r["quality"][number - 1][key] for r in of(name)] for key in QUALITY]
            lines.append(f"| {label} | {number} | " + " | ".join(map(cell, values)) + " |")
    return "\n".join(lines)


def search_table() -> str:
    """Return what every setting came to on the development tuples."""
    lines = ["| | first image | second image |", "|---|---|---|"]
    for name, arm in SEARCH.items():
        path = RESULTS / "search" / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())["dev"]
            lines.append(f"| {arm.label} | {found['reward_1']:.3f} | {found['reward']:.3f} |")
    return "\n".join(lines)


def figures(_: int) -> None:
    """Print the tables and draw the picture."""
    from matplotlib.figure import Figure

    print(search_table(), table(), quality_table(), sep="\n\n")
    for name in labels():
        print(name, *(each["outcomes"] for each in of(name)))
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    for axis, free in zip(above.subplots(1, 2, sharey=True), (False, True), strict=True):
        curves(axis, free)
    strip(below)
    figure.savefig(RESULTS / "rounds.png", dpi=120)


def curves(axis: Any, free: bool) -> None:
    """Draw held-out rewards over the images sampled, a thin line a seed."""
    arms = {name: arm for name, arm in ARMS.items() if (arm.mse_weight == 0) == free}
    for color, (name, arm) in zip(("tab:gray", "tab:blue"), arms.items(), strict=True):
        for key, style in (("reward", "-"), ("reward_1", ":")):
            found = [r["curve"] for r in of(name)]
            if key not in found[0][0]:
                continue
            images = [point["images"] for point in found[0]]
            values = [[point[key] for point in each] for each in found]
            for line in values:
                axis.plot(images, line, style, color=color, lw=0.6, alpha=0.5)
            label = f"{arm.label}, its first image" if key == "reward_1" else arm.label
            average = [mean(each) for each in zip(*values, strict=True)]
            axis.plot(images, average, style, color=color, lw=1.8, label=label)
    axis.set(xlabel="images sampled in training", ylabel="held-out reward", ylim=(0, 1))
    axis.set_title("without the velocity MSE" if free else "with the velocity MSE", fontsize=9)
    axis.legend(fontsize=7, loc="center right")


def strip(figure: Any) -> None:
    """Draw dialogues of the base and of trained models, failures included."""
    kinds = ("right", "wrong reasoning", "another digit sketched", "spoiled")
    sources = {"base": kinds, "two_rounds": kinds, "one_round": kinds[:1]}
    columns = [
        (f"{labels()[name]}: {kind}", sample)
        for name, wanted in sources.items()
        for kind in wanted
        for sample in of(name)[0]["samples"].get(kind, [])[:1]
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
    parts = {f.__name__: f for f in (search, runs, figures)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[])
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    for name in options.parts or parts:
        parts[name](options.workers)


if __name__ == "__main__":
    main()
