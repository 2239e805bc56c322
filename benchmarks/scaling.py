"""Where the time of an iteration must go, by the number of GPUs: computed bounds, nothing measured.

Bagel-7B-MoT at the paper's settings. Bytes and forwards are those of ``unigrpo estimate``, whose formula
for communication is compared with counted bytes by ``benchmarks/communication.py``. A phase takes at least
what its products take at the peak of the GPU, what its weights and caches take at the peak of its memory,
and what it receives takes at the peak of the links, whichever is longest. Real runs reach less of such
peaks; how much was not measured. Texts are counted at their longest; rewards, the autoencoder, sampling
from 152,064 words, the optimizer and everything the host does are left out.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lightning_unigrpo.adapters.bagel.config import RELEASES, BagelConfig
from lightning_unigrpo.cli.estimate import run as run_estimate
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.estimate import Estimate, Traffic

CONFIGS = Path(__file__).parent.parent / "configs"
PAPER = CONFIGS / "bagel_paper.yaml"
BF16, GIB = 2, 1 << 30
MARKS = 2
"""Rows around a text or an image."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Peaks as their makers state them, per second."""

    flop: float = 989e12
    """H100 SXM, bfloat16, dense."""
    memory: float = 3.35e12
    """H100 SXM, bytes."""
    node_link: float = 450e9
    """NVLink 4, bytes to one GPU."""
    network_link: float = 50e9
    """InfiniBand NDR, bytes through one card; a card for each GPU."""
    per_node: int = 8
    """GPUs."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a phase multiplies and reads, on one GPU."""

    flop: float
    nbytes: float

    def seconds(self, machine: Machine) -> float:
        """Return the least time."""
        return max(self.flop / machine.flop, self.nbytes / machine.memory)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model and of one think-then-draw rollout, texts at their longest."""

    config: BagelConfig
    prompt: int
    """Rows before the reasoning, marks included."""
    text: int
    """Tokens of a reasoning."""
    image: int
    """Latent rows and marks of an image."""
    window: int
    """Noise blocks that are trained."""

    @property
    def expert(self) -> int:
        """Numbers of one expert's matrices, over all layers."""
        c = self.config
        kv = c.num_key_value_heads * c.head_dim
        d, ff = c.hidden_size, c.intermediate_size
        return c.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * ff)

    @property
    def head(self) -> int:
        """Numbers of the head over the vocabulary."""
        return self.config.hidden_size * self.config.vocab_size

    @property
    def context(self) -> int:
        """Rows before the image."""
        return self.prompt + self.text + MARKS

    def attention(self, rows: float, keys: float) -> float:
        """Return the operations of queries against keys and values, over all layers."""
        return 4 * self.config.hidden_size * self.config.num_hidden_layers * rows * keys

    def cache(self, rows: float) -> float:
        """Return the bytes of keys and values of rows."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * BF16 * rows

    def decode_step(self, together: int) -> Work:
        """Return one token of so many rollouts: half of the text is there on average."""
        keys = self.prompt + self.text / 2
        flop = together * (2 * (self.expert + self.head) + self.attention(1, keys))
        return Work(
            flop=flop, nbytes=(self.expert + self.head) * BF16 + self.cache(together * keys)
        )

    def denoise_step(self, together: int) -> Work:
        """Return one velocity of so many rollouts; the marks around an image use the other expert."""
        keys = self.context + self.image
        flop = together * (2 * self.expert * self.image + self.attention(self.image, keys))
        return Work(flop=flop, nbytes=2 * self.expert * BF16 + self.cache(together * keys))

    def forward(self, *, scores_text: bool) -> Work:
        """Return the packed pass of one trajectory."""
        noise = self.window * self.image
        flop = 2 * self.expert * (self.context + noise)
        flop += self.attention(self.context, self.context / 2)  # each word sees those before it
        flop += self.attention(noise, self.context + self.image)
        flop += 2 * self.head * self.text if scores_text else 0
        return Work(flop=flop, nbytes=2 * self.expert * BF16)

    def backward(self) -> Work:
        """Return a forward, its backward, and the forward that checkpointing repeats."""
        once, inner = self.forward(scores_text=True), self.forward(scores_text=False)
        return Work(flop=3 * once.flop + inner.flop, nbytes=4 * once.nbytes)


def paper_sizes(prompt_tokens: int = 64) -> Sizes:
    """Return those of the paper's settings."""
    given = yaml.safe_load(PAPER.read_text(encoding="utf-8"))["model"]
    sampling, adapter = Sampling(**given["sampling"]), given["adapter"]["init_args"]
    config = RELEASES[adapter["source"]]
    height, width = adapter["default_size"]
    system = len(adapter["system_prompt"]) // 4  # as the estimate counts without a tokenizer
    return Sizes(
        config=config,
        prompt=prompt_tokens + system + 2 * MARKS,
        text=sampling.max_text_tokens,
        image=height * width // config.pixels_per_token**2 + MARKS,
        window=sampling.window_size,
    )


def link_seconds(traffic: Traffic, ranks: int, machine: Machine, *, hybrid: bool) -> float:
    """Return the least time that a phase's messages take.

    Inside a node over NVLink. A ring over several nodes enters each node once: NCCL runs as many rings as
    there are cards, so that a node's cards carry it together, and NVLink all of it. Copies of a part, one
    in each node, have a card each.
    """
    cards = machine.per_node * machine.network_link
    ring = (
        machine.node_link if hybrid or ranks <= machine.per_node else min(machine.node_link, cards)
    )
    between = machine.network_link if hybrid else ring
    return traffic.shards / ring + traffic.replicas / between


def bounds(found: Estimate, ranks: int, sizes: Sizes, machine: Machine, *, hybrid: bool) -> Any:
    """Return the least seconds of an iteration's phases: of products and memory, and of links."""
    rows, update = found.rollout_rows, found.optimizer_steps * found.update_forwards
    scored = found.update_rows
    work = {
        "decode": found.decode_steps * sizes.decode_step(rows).seconds(machine),
        "denoise": found.denoise_steps * sizes.denoise_step(rows).seconds(machine),
        "reference": found.reference_forwards
        * scored
        * sizes.forward(scores_text=False).seconds(machine),
        "old policy": found.old_forwards
        * scored
        * sizes.forward(scores_text=True).seconds(machine),
        "update": update * scored * sizes.backward().seconds(machine),
    }
    links = {
        name: link_seconds(each, ranks, machine, hybrid=hybrid)
        for name, each in found.traffic.items()
    }
    # A rollout with whole weights gathers them before it begins; layers of a training pass are gathered
    # while the one before is computed.
    total = work["decode"] + work["denoise"] + links["rollout"] + links["flags"]
    total += sum(max(work[name], links[name]) for name in ("reference", "old policy", "update"))
    return {"work": work, "links": links, "iteration": total}


def look(ranks: int, overlay: str, *more: str) -> Estimate:
    """Run ``unigrpo estimate`` without its printing."""
    arguments = [f"--config={PAPER}", f"--config={CONFIGS / 'overlays' / overlay}.yaml"]
    with contextlib.redirect_stdout(io.StringIO()):
        return run_estimate([*arguments, f"--ranks={ranks}", *more])


def cases() -> list[tuple[str, int, str, list[str]]]:
    """Return title, ranks, overlay and arguments of what is compared."""
    mesh = "--trainer.strategy.init_args.device_mesh=[{},8]"
    sharded = "--model.sampling.rollout_weights=sharded"
    size = "--trainer.strategy.init_args.data_parallel_size={}"
    found = []
    for ranks in (8, 32, 256):
        found.append((f"{ranks} fsdp", ranks, "fsdp", []))
        if ranks == 8:
            found.append(("8 fsdp, sharded rollouts", ranks, "fsdp", [sharded]))
            found.append(("8 fsdp2", ranks, "fsdp2", [size.format(ranks)]))
        else:
            found.append((f"{ranks} hybrid", ranks, "fsdp_hybrid", [mesh.format(ranks // 8)]))
    return found


def compute() -> dict[str, Any]:
    """Return the numbers of every case, by title."""
    machine, sizes = Machine(), paper_sizes()
    record: dict[str, Any] = {}
    for title, ranks, overlay, more in cases():
        found = look(ranks, overlay, *more)
        record[title] = {
            "rollouts": found.decode_steps // sizes.text * found.rollout_rows,
            "GiB drawing": found.rollout / GIB,
            "GiB learning": found.update / GIB,
            "GB received": {
                name: [each.shards / 1e9, each.replicas / 1e9]
                for name, each in found.traffic.items()
            },
            **bounds(found, ranks, sizes, machine, hybrid=overlay == "fsdp_hybrid"),
        }
    return record


SENT = ("rollout", "reference", "old policy", "update")


def page_rows(record: dict[str, Any]) -> list[str]:
    """Return the rows of the tables in docs/scaling.md: memory, seconds, bytes."""
    memory, seconds, sent = [], [], []
    for title, each in record.items():
        work, links = each["work"], each["links"]
        sizes = [f"{each[f'GiB {when}']:.0f} GiB" for when in ("drawing", "learning")]
        memory.append([title, str(each["rollouts"]), *sizes])
        pairs = [f"{work[name]:.1f} ({links[name]:.1f})" for name in SENT[1:]]
        gather = f"{links['rollout'] + links['flags']:.1f}"
        cells = [f"{work['decode']:.1f}", f"{work['denoise']:.1f}", gather, *pairs]
        seconds.append([title, *cells, f"{each['iteration']:.0f}"])
        parts = [each["GB received"][name] for name in SENT]
        across = f"{each['GB received']['update'][1]:,.0f}"
        sent.append([title, *(f"{sum(part):,.0f}" for part in parts), across])
    return [f"| {' | '.join(row)} |" for table in (memory, seconds, sent) for row in table]


def main() -> None:
    """Compute, print, and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = compute()
    report(record)
    print("\nrows of docs/scaling.md", *page_rows(record), sep="\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": asdict(Machine()), **record}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")


def report(record: dict[str, Any]) -> None:
    """Print the seconds."""
    table = Table(title="least seconds of an iteration on one GPU: work (links)")
    for column in ("GPUs", "rollouts", "decode", "denoise", "gather", *SENT[1:], "iteration"):
        table.add_column(column, justify="right")
    for title, each in record.items():
        work, links = each["work"], each["links"]
        pairs = [f"{work[name]:.1f} ({links[name]:.1f})" for name in SENT[1:]]
        gather = f"{links['rollout'] + links['flags']:.1f}"
        cells = [str(each["rollouts"]), f"{work['decode']:.1f}", f"{work['denoise']:.1f}", gather]
        table.add_row(title, *cells, *pairs, f"{each['iteration']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
