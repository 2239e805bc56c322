"""Kill ranks of a run at random moments, go on from the last checkpoint, and compare with a run in one go.

Two processes train the digits model over gloo and write a checkpoint after every iteration. One of them,
chosen at random, ends by SIGKILL at a random moment inside a chosen phase (rollout, reward, update,
checkpoint). The script measures how long the other takes to end, reads what it says, and starts both again
from :func:`lightning_unigrpo.latest_checkpoint`. At the end every iteration that was ever run must have given
the numbers of the uninterrupted run, bit for bit; so must the weights of every checkpoint that was loaded.
Last, a rank is stopped (SIGSTOP) instead of killed: nobody closes its connections, so the other waits for the
timeout of the process group.

    python -m benchmarks.reliability --kills 20 --out benchmarks/results/reliability.json

Launcher, model and diaries are those of the tests (``tests/ranks.py``, ``tests/resume_cases.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console

from lightning_unigrpo import (
    IterationCheckpoint,
    UniGRPOCallback,
    UniGRPOModule,
    latest_checkpoint,
)
from lightning_unigrpo.checkpoint import fault
from tests.ranks import Ranks
from tests.resume_cases import differences, fit, read_diary

PHASES = ("checkpoint", "rollout", "update", "reward")
PHASE_OF = {"text": "rollout", "denoise": "rollout", "reward": "reward", "update": "update"}
LAYOUTS = ("ddp", "fsdp sharded", "fsdp2 distributed")
PATIENCE = 20.0
"""Timeout of the process group in :func:`tests.resume_cases.trainer`, seconds."""
SAYS = "does not reach another rank"


# ---- in a rank


class Death(UniGRPOCallback):
    """Announces the phases of a rank, and ends it inside one of them.

    Args:
        folder: where the phase that a rank is in stands, and how long each took.
        plan: ``rank``, ``iteration``, ``phase``, ``moment`` (as a share of its usual length), ``signal``;
            empty = nobody dies.
        lengths: usual seconds of each phase.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], lengths: dict[str, float]) -> None:
        self.rank = int(os.environ["RANK"])
        self.sign = (folder / f"phase-{self.rank}").open("w")
        self.plan = plan if plan.get("rank") == self.rank else {}
        self.lengths, self.spent = lengths, dict.fromkeys(PHASES, 0.0)
        self.phase, self.since = "", time.perf_counter()
        self.folder = folder

    def enter(self, phase: str, iteration: int) -> None:
        if phase == self.phase:
            return
        now = time.perf_counter()
        if self.phase in self.spent:
            self.spent[self.phase] += now - self.since
        self.phase, self.since = phase, now
        self.sign.seek(0)
        self.sign.write(f"{iteration:6d} {phase:12s}")
        self.sign.flush()
        if (iteration, phase) == (self.plan.get("iteration"), self.plan.get("phase")):
            delay = self.plan["moment"] * self.lengths[phase]
            self.plan = {**self.plan, "phase": None}
            Timer(delay, os.kill, (os.getpid(), self.plan["signal"])).start()

    def on_phase(
        self, trainer: Trainer, module: UniGRPOModule, phase: str, done: int, total: int
    ) -> None:
        if trainer.training:
            self.enter(PHASE_OF.get(phase, phase), module.iteration)

    def on_train_batch_start(self, trainer: Trainer, module: UniGRPOModule, *_: Any) -> None:  # type: ignore[override]
        self.enter("rollout", module.iteration)

    def on_train_end(self, trainer: Trainer, module: UniGRPOModule) -> None:  # type: ignore[override]
        self.enter("end", module.iteration)
        lengths = {name: spent / module.iteration for name, spent in self.spent.items()}
        (self.folder / f"lengths-{self.rank}.json").write_text(json.dumps(lengths))


class Announced(IterationCheckpoint):
    """Says when it writes."""

    def __init__(self, death: Death, **settings: Any) -> None:
        super().__init__(**settings)
        self.death = death

    def _save(self, trainer: Trainer, module: Any, iteration: int) -> None:
        self.death.enter("checkpoint", iteration - 1)
        super()._save(trainer, module, iteration)
        self.death.enter("between", iteration)


def train(folder: Path, layout: str, run: str, steps: str, plan: str, lengths: str) -> None:
    """Train from the last checkpoint on; what each rank calls."""
    death = Death(folder, json.loads(plan), json.loads(lengths))
    kept = folder / ("whole" if run == "whole" else "checkpoints")
    saving = Announced(death, every=1, dirpath=str(kept))
    path = latest_checkpoint(kept)
    seed = (
        3 if path is None else int.from_bytes(os.urandom(2), "big")
    )  # a checkpoint brings its own
    fit(folder, layout, run, int(steps), death, saving, ckpt_path=path, seed=seed, draws=True)


# ---- the script


@dataclass
class Kill:
    """One death and what came of it."""

    phase: str
    rank: int
    iteration: int
    moment: float
    died_in: str = ""
    """The phase that the rank had last announced."""
    survivor_s: float = 0.0
    """From the death to the end of the other process."""
    says: str = ""
    """The last error of the other process."""
    is_clear: bool = False
    """Whether that names the lost rank and the checkpoint to go on from."""
    left: str = ""
    """What a half-written checkpoint left behind."""
    resumed_from: int = 0
    """Iteration of the checkpoint that the next start found."""
    resumed_path: str = ""


@dataclass
class Outcome:
    """All deaths under one layout of checkpoints."""

    layout: str
    iterations: int
    kills: list[Kill] = field(default_factory=list)
    stopped_survivor_s: float | None = None
    iterations_run: int = 0
    """With those that were run again."""
    loads: int = 0
    differences: list[str] = field(default_factory=list)
    torn_loads: list[str] = field(default_factory=list)


class Experiment:
    """Runs under one layout.

    Args:
        layout: of checkpoints, one of :data:`tests.resume_cases.LAYOUTS`.
        folder: for everything that they write.
        iterations: of the uninterrupted run.
        seed: of the moments.
    """

    def __init__(self, layout: str, folder: Path, iterations: int, seed: int) -> None:
        self.layout, self.folder, self.iterations = layout, folder, iterations
        self.draw = random.Random(seed)  # noqa: S311
        self.outcome = Outcome(layout, iterations)
        self.lengths = dict.fromkeys(PHASES, 0.0)

    def start(self, run: str, plan: dict[str, Any]) -> Ranks:
        words = (self.layout, run, str(self.iterations), json.dumps(plan), json.dumps(self.lengths))
        return Ranks("benchmarks.reliability:train", 2, self.folder, *words)

    def uninterrupted(self) -> None:
        ranks = self.start("whole", {})
        assert ranks.wait(600) == [0, 0], ranks.output()
        self.lengths = json.loads((self.folder / "lengths-0.json").read_text())

    def kill(self, phase: str, *, how: signal.Signals = signal.SIGKILL) -> Kill:
        """Let a rank die one or two iterations after where the run stands, and wait for the other."""
        at = self._stands_at() + self.draw.randint(0, 1)
        death = Kill(phase, self.draw.randint(0, 1), at, self.draw.uniform(0, 0.8))
        ranks = self.start("broken", {**asdict(death), "signal": int(how)})
        victim, survivor = ranks.processes[death.rank], ranks.processes[1 - death.rank]
        died = self._wait_for_death(ranks, death.rank, how)
        try:
            survivor.wait(3 * PATIENCE)
            death.survivor_s = round(time.perf_counter() - died, 2)
        finally:
            ranks.kill()
        assert victim.returncode == -signal.SIGKILL, ranks.output()
        death.died_in = (self.folder / f"phase-{death.rank}").read_text().split()[-1]
        log = ranks.logs[1 - death.rank].read_text(errors="replace")
        errors = [line for line in log.splitlines() if "Error" in line]
        death.says = errors[-1].split("] ", 1)[-1][:160] if errors else ""
        death.is_clear = survivor.returncode != 0 and SAYS in log
        half = [p for p in (self.folder / "checkpoints").glob("*.ckpt.*") if p.exists()]
        death.left = ", ".join(p.name + (" (torn)" if fault(p) else "") for p in half)
        path = latest_checkpoint(self.folder / "checkpoints")
        death.resumed_from, death.resumed_path = self._stands_at(), path.name if path else ""
        return death

    def _wait_for_death(self, ranks: Ranks, rank: int, how: signal.Signals) -> float:
        deadline = time.perf_counter() + 120
        while time.perf_counter() < deadline:
            if how == signal.SIGKILL and ranks.processes[rank].poll() is not None:
                return time.perf_counter()
            state = Path(f"/proc/{ranks.processes[rank].pid}/stat").read_text().rsplit(")", 1)[1]
            if how == signal.SIGSTOP and state.split()[0] == "T":
                return time.perf_counter()
            time.sleep(0.01)
        ranks.kill()
        raise AssertionError(f"nobody died:\n{ranks.output()}")

    def _stands_at(self) -> int:
        path = latest_checkpoint(self.folder / "checkpoints")
        if path is None:
            return 0
        if path.is_dir():
            return int(json.loads((path / "manifest.json").read_text())["iteration"])
        return int(torch.load(path, mmap=True)["iteration"])

    def finish(self) -> None:
        ranks = self.start("broken", {})
        assert ranks.wait(600) == [0, 0], ranks.output()

    def compare(self) -> None:
        """Hold every iteration and every loaded checkpoint against the uninterrupted run."""
        for rank in (0, 1):
            whole = read_diary(self.folder / f"{self.layout}-whole-{rank}.jsonl")
            known = {line["iteration"]: line for line in whole}
            broken = self.folder / f"{self.layout}-broken-{rank}.jsonl"
            run = read_diary(broken)
            same = [known[line["iteration"]] for line in run]
            self.outcome.differences += differences(same, run)
            self.outcome.iterations_run = max(self.outcome.iterations_run, len(run))
            assert {line["iteration"] for line in run} == known.keys()
            begins = [line for line in read_diary(broken, "begins") if line["iteration"]]
            self.outcome.loads = max(self.outcome.loads, len(begins))
            self.outcome.torn_loads += [
                f"rank {rank}, iteration {line['iteration']}: {line['weights']}"
                for line in begins
                if line["weights"] != known[line["iteration"]]["weights"]
            ]


def measure(layout: str, folder: Path, *, kills: int, seed: int = 0, stop: bool = True) -> Outcome:
    """Run one layout through all its deaths.

    Args:
        layout: of checkpoints.
        folder: empty.
        kills: how many; phases take turns.
        seed: of the moments.
        stop: whether a rank is also stopped, which takes the whole timeout.
    """
    console = Console()
    experiment = Experiment(layout, folder, 2 * kills + 4, seed)
    experiment.uninterrupted()
    for number in range(kills):
        death = experiment.kill(PHASES[number % len(PHASES)])
        experiment.outcome.kills.append(death)
        console.print(f"{layout} {number + 1}/{kills}", asdict(death), soft_wrap=True)
    if stop:
        stopped = experiment.kill("update", how=signal.SIGSTOP)
        experiment.outcome.stopped_survivor_s = stopped.survivor_s
        console.print(f"{layout} stopped", asdict(stopped), soft_wrap=True)
    experiment.finish()
    experiment.compare()
    return experiment.outcome


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return what the page shows."""
    seconds = [kill.survivor_s for kill in outcome.kills]
    return {
        "layout": outcome.layout,
        "kills": len(outcome.kills),
        "died_in": dict(Counter(kill.died_in for kill in outcome.kills)),
        "survivor_s": {"median": statistics.median(seconds), "largest": max(seconds)},
        "stopped_survivor_s": outcome.stopped_survivor_s,
        "timeout_s": PATIENCE,
        "clear_errors": sum(kill.is_clear for kill in outcome.kills),
        "half_checkpoints_left": sum(bool(kill.left) for kill in outcome.kills),
        "iterations": outcome.iterations,
        "iterations_run": outcome.iterations_run,
        "differences": len(outcome.differences),
        "loads": outcome.loads,
        "torn_loads": len(outcome.torn_loads),
    }


def main() -> None:
    """Measure all layouts and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="*", default=LAYOUTS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    outcomes = []
    for layout in given.layouts:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(measure(layout, Path(folder), kills=given.kills, seed=given.seed))
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    record = {
        "machine": {**machine, "torch": str(torch.__version__)},
        "summary": [*map(summary, outcomes)],
        "layouts": [*map(asdict, outcomes)],
    }
    Console().print(record["summary"], soft_wrap=True)
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
