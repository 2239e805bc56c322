"""What rewards over the network cost: time beside the rollout, and rollouts when the service fails.

    python -m benchmarks.rewards --out benchmarks/results/rewards.json

Overlap: the digits model draws a collection in chunks, and each chunk is scored over HTTP by a server in
another process that takes 200 ms, as soon as it is drawn. The same collection with a reward that costs
nothing is the measure; the same network reward called in line is the control. Rounds are interleaved.

Faults: a toy policy is trained while its reward service fails in one way at random requests. Every score that
did arrive is compared with the one computed here. Last, 1,000 requests arrive at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lightning_unigrpo import PromptDataModule, UniGRPOModule
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.reward import Reward, RewardRunner, wrap
from lightning_unigrpo.rewards import HTTPReward
from tests.services import Answer, Request, Script, free_port, say, score_grey, served, service
from tests.test_module import fit, objective, optim, small
from tests.test_rewards_http import rows
from tests.toys import ToyFlow, brightness

SECONDS = 0.2
"""That the network reward takes."""
PROMPTS, GROUP, CHUNKS, TIMESTEPS = 64, 8, 8, 40
BOUND = 1.15


# ---- overlap


def free(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


class Late:
    """The same, after a while."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(SECONDS)
        return free(images)


class InLine(HTTPReward):
    """The control: the rollout waits for each answer."""

    is_remote = False


def serve(port: int) -> None:
    from lightning_unigrpo.serve import Limits, build

    torch.set_num_threads(1)
    server = build(Late(), port=port, limits=Limits(batch_size=PROMPTS * GROUP, batch_wait=0.0))
    server.config.log_level = "critical"
    server.config.configure_logging()
    server.run()


class Timed(UniGRPOModule):
    """Collects with each reward in turn, and learns nothing.

    Args:
        adapter: the policy.
        ways: name to reward.
        settings: of :class:`UniGRPOModule`.
    """

    def __init__(self, adapter: Any, ways: dict[str, Any], **settings: Any) -> None:
        super().__init__(adapter, rewards=[free], **settings)
        self.ways = {way: wrap([reward]) for way, reward in ways.items()}
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.chunks: list[float] = []
        self.order = random.Random(0)  # noqa: S311
        self.scores: dict[str, torch.Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        ways = list(self.ways)
        self.order.shuffle(ways)
        for way in ways:
            self._rewards, self.ends = self.ways[way], [time.perf_counter()]
            begun = time.perf_counter()
            experience = self.collect(batch)
            self.seconds[way].append(time.perf_counter() - begun)
            self.scores[way] = experience.rewards
            if way == "free":
                self.chunks += [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        self.iteration += 1

    def progress(self, phase: str, done: int, total: int) -> None:
        if phase == "reward":
            self.ends.append(time.perf_counter())


def overlap(rounds: int) -> dict[str, Any]:
    """Time collections; the first round warms up."""
    port = free_port()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,))
    server.start()
    url = f"http://127.0.0.1:{port}"
    ways = {
        "free": free,
        "beside": Reward(HTTPReward(url), name="beside"),
        "in line": Reward(InLine(url), name="in line"),
    }
    sampling = Sampling(
        group_size=GROUP,
        max_text_tokens=12,
        num_timesteps=TIMESTEPS,
        schedule="steps",
        shift=1.0,
        eta=0.7,
        window_size=5,
        window_range=(0, 5),
        rows_per_chunk=PROMPTS * GROUP // CHUNKS,
    )
    module = Timed(DigitsAdapter(), ways, sampling=sampling)
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = Trainer(
                accelerator="cpu",
                max_steps=-1,
                max_epochs=1,
                limit_train_batches=rounds + 1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                default_root_dir=folder,
            )
            trainer.fit(module, PromptDataModule(prompts_per_iteration=PROMPTS))
        finally:
            server.terminate()
            server.join()
    for way in ("beside", "in line"):  # eight bits a channel
        torch.testing.assert_close(module.scores[way], module.scores["free"], atol=1 / 255, rtol=0)
    seconds = {way: median(times[1:]) for way, times in module.seconds.items()}
    chunks = module.chunks[CHUNKS:]
    return {
        "rollouts": PROMPTS * GROUP,
        "chunks": CHUNKS,
        "chunk_s": {"least": min(chunks), "median": median(chunks)},
        "reward_s": SECONDS,
        "rounds": rounds,
        "seconds": seconds,
        "ratio": {way: seconds[way] / seconds["free"] for way in ("beside", "in line")},
        "bound": BOUND,
    }


# ---- faults

STEPS, RETRIES, TIMEOUT = 20, 2, 0.25
REQUESTS = 4
"""Of an iteration: two prompts of four rollouts, two a request."""


def at_random(share: float, fault: Callable[[Request], Answer], seed: int = 0) -> Script:
    """Answer a share of all requests by a fault; what is asked again is drawn again."""
    draw = random.Random(seed)  # noqa: S311

    def script(number: int, request: Request) -> Answer:
        return fault(request) if draw.random() < share else score_grey(number, request)

    return script


def between(first: int, last: int) -> Script:
    """Give no answer to these requests."""

    def script(number: int, request: Request) -> Answer:
        return Answer(cut=True) if first <= number < last else score_grey(number, request)

    return script


GONE = (1 + RETRIES) * REQUESTS * 2
"""Requests, tries included, of two iterations in which nothing is answered."""
FAULTS: dict[str, Script] = {
    "slower than the timeout, 40 %": at_random(0.4, lambda _: say({"rewards": [0, 0]}, delay=0.4)),
    "status 503, 40 %": at_random(0.4, lambda _: Answer(b"", 503)),
    "garbage, 20 %": at_random(0.2, lambda _: Answer(b"\x00<html>")),
    "a score too few, 20 %": at_random(0.2, lambda _: say({"rewards": [0.0]})),
    "status 400, 20 %": at_random(0.2, lambda _: Answer(b"", 400)),
    "connection cut, 40 %": at_random(0.4, lambda _: Answer(cut=True)),
    "dead for two iterations": between(5 * REQUESTS, 5 * REQUESTS + GONE),
    "dies in the middle of one, back in the next": between(
        5 * REQUESTS + 2, 5 * REQUESTS + 2 + (1 + RETRIES) * 3
    ),
}


def train(script: Script) -> dict[str, Any]:
    """Train under a fault and count."""
    begun = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        there = stack.enter_context(service(script))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        far = HTTPReward(there.url, retries=RETRIES, backoff=0.01, timeout=TIMEOUT, wait=0.0)
        module = UniGRPOModule(
            ToyFlow(),
            rewards=[Reward(far, name="far")],
            sampling=small(rows_per_chunk=2),
            objective=objective(truncation_reward=None),
            optim=optim(),
        )
        record = fit(folder, module, STEPS)
    seconds = time.perf_counter() - begun
    unscored = wrong = silent = advantages = 0
    for experience in record.experience:
        found = experience.rewards[:, 0]
        images = torch.stack([t.image for t in experience.trajectories if t.image is not None])
        known, true = found.isfinite(), brightness(images=images.mul(255).round() / 255)
        unscored += int((~known).sum())
        wrong += int((known & ((found - true).abs() > 1e-5)).sum())
        for t in experience.trajectories:
            mates = [m.rewards["far"] for m in experience.trajectories if m.group == t.group]
            if sum(score == score for score in mates) < 2:
                silent += 1
                advantages += sum(bool(s.advantage) for s in t.segments if s.is_sampled)
    return {
        "iterations": len(record.metrics),
        "rollouts": STEPS * REQUESTS * 2,
        "requests": len(there.requests),
        "unscored": unscored,
        "failures": int(sum(m["reward/far/failures"] for m in record.metrics)),
        "wrong_scores": wrong,
        "masked": silent,
        "masked_advantages_not_0": advantages,
        "weights_finite": all(bool(p.isfinite().all()) for p in module.parameters()),
        "seconds": seconds,
    }


def crowd(number: int = 1000, queue: int = 256) -> dict[str, Any]:
    """Let a thousand threads ask a server whose queue holds a quarter of them."""
    with served(free, batch_size=64, queue_size=queue) as url:
        far = Reward(
            HTTPReward(url, retries=12, timeout=30.0), batch_size=1, concurrency=number, name="far"
        )
        begun = time.perf_counter()
        with RewardRunner([far]) as runner:
            runner.submit(rows(number))
            matrix, _ = runner.finish()
        seconds = time.perf_counter() - begun
    expected = (torch.arange(float(number)) / number * 255).round() / 255
    wrong = int(((matrix[:, 0] - expected).abs() > 1e-5).sum())
    return {
        "requests": number,
        "queue": queue,
        "unscored": int(matrix.isnan().sum()),
        "wrong_scores": wrong,
        "seconds": seconds,
    }


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    console, part = Console(width=140), found["overlap"]
    table = Table(
        title=f"{part['rollouts']} rollouts in {part['chunks']} chunks of "
        f"{part['chunk_s']['median']:.2f} s (least {part['chunk_s']['least']:.2f} s), reward {SECONDS} s"
    )
    for column in ("reward", "collection, s", "to free"):
        table.add_column(column, justify="right")
    for way, seconds in part["seconds"].items():
        table.add_row(way, f"{seconds:.2f}", f"{part['ratio'].get(way, 1):.3f}")
    console.print(table)
    keys = ("iterations", "rollouts", "requests", "unscored", "failures", "wrong_scores", "masked")
    table = Table("fault", *keys)
    for name, row in found["faults"].items():
        table.add_row(name, *(str(row[key]) for key in keys))
    console.print(table, found["crowd"])


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    known = parser.parse_args(args)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "overlap": overlap(known.rounds),
        "faults": {name: train(script) for name, script in FAULTS.items()},
        "crowd": crowd(),
    }
    show(found)
    if known.out is not None:
        known.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found["overlap"]["ratio"]["beside"] <= BOUND, "the network reward holds up the rollout"


if __name__ == "__main__":
    main()
