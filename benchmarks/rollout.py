"""How fast a rollout is: all rows together through a cache, against two slower ways.

In one process, in turn, at two sizes (random weights; speed does not depend on them):

* ``batched``: this project's path: all rows decode and denoise together, contexts are cached;
* ``one by one``: the same path, a row at a time;
* ``recomputed``: all rows together, but every token and every denoising step reads its whole context again;
* ``compiled``: ``batched`` with compiled layers, where ``--compiled`` asks for it (minutes of compiling).

Recomputed text is measured at evenly spread lengths and averaged: 300 tokens of it would take minutes.
A whole rollout is its text and 24 denoising steps at these rates. Beside them stands the floor: the bytes
of weights and cache that a step must read at the bandwidth that a matrix-vector product reaches here, or its
products at the speed that a large one reaches; the slower one.

    python benchmarks/rollout.py --repeats 3 --out benchmarks/results/rollout.json
    python benchmarks/rollout.py --model showo2 --text-tokens 200 --out benchmarks/results/rollout_showo2.json
    python benchmarks/rollout.py --device cuda --dtype bfloat16 --compiled

Show-o2 runs a flow stack of half as many layers behind its decoder; compiled layers and the floor are
Bagel's only.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig
from lightning_unigrpo.adapters.showo2 import ShowO2Adapter
from lightning_unigrpo.adapters.showo2.config import FlowConfig, SemanticConfig, ShowO2Config
from lightning_unigrpo.types import Prompt, TextSegment

PROMPT_TOKENS, PROBES, STEPS, WHOLE = 20, 8, 3, 24
WAYS = ("batched", "one by one", "recomputed")
MARKS = 2


@dataclass(frozen=True)
class Size:
    """What is measured: a model, and a rollout."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    side: int
    """Latent pixels per side; a token has 2 x 2."""
    text_tokens: int
    rows: int = 8


SIZES = (
    Size("tiny", 64, 192, 3, 4, 4, side=8, text_tokens=24),
    Size("mid", 512, 1408, 8, 8, 2, side=32, text_tokens=300),
)


class Nothing:
    """Prompts are ids here."""

    def encode(self, text: str) -> list[int]:
        """Return none."""
        return []

    def decode(self, ids: list[int]) -> str:
        """Return none."""
        return ""


def build(size: Size, *, compiled: bool) -> BagelAdapter:
    """Return a model of a size with random weights."""
    config = BagelConfig(
        vocab_size=4096,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_latent_size=size.side // 2,
        bos=0,
        eos=1,
        start_of_image=2,
        end_of_image=3,
    )
    pixels = (8 * size.side, 8 * size.side)
    made = BagelAdapter(config, Nothing(), compile_layers=compiled, default_size=pixels)
    return made.eval()


class Machine:
    """How fast a device reads and multiplies, measured; and the least time that some work takes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        side = 8192 if device.type == "cuda" else 4096  # 64 MB in float32: more than a cache
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        vector, other = matrix[0].clone(), matrix[: side // 4].T.contiguous()
        self.bytes_per_s = matrix.nbytes / self.fastest(lambda: matrix @ vector)
        self.flop_per_s = 2 * side * other.numel() / self.fastest(lambda: matrix @ other)

    def fastest(self, work: Callable[[], object]) -> float:
        """Return the least seconds of a few runs."""
        return min(self.timed(work) for _ in range(6))

    def timed(self, work: Callable[[], object]) -> float:
        """Return seconds: of the process on a CPU, of the wall clock behind a GPU."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._wait()
        begin = clock()
        work()
        self._wait()
        return clock() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def floor(self, num_bytes: float, flop: float) -> float:
        """Return the seconds below which some work cannot come."""
        return max(num_bytes / self.bytes_per_s, flop / self.flop_per_s)


class Rollout:
    """Fixed prompts, reasonings and noise, and the three ways to run them."""

    build: Callable[..., Any] = staticmethod(build)

    def __init__(self, size: Size, machine: Machine, *, compiled: bool) -> None:
        self.size, self.machine, device = size, machine, machine.device
        self.device, self.timed = device, machine.timed
        torch.manual_seed(0)
        self.eager: Any = self.build(size, compiled=False).to(device, machine.dtype)
        self.ways = [*WAYS]
        if compiled:
            self.ways.append("compiled")
            self.compiled: Any = self.build(size, compiled=True).to(device, machine.dtype)
        self.adapter = self.eager
        shape = (size.rows, PROMPT_TOKENS + size.text_tokens)
        ids = torch.randint(4, 4096, shape, device=device)
        self.prompts = [[TextSegment(tokens=row[:PROMPT_TOKENS])] for row in ids]
        self.words = ids[:, PROMPT_TOKENS:]
        self.grid = self.eager.image_grid(Prompt(text=""))
        num = self.grid[0] * self.grid[1]
        self.noise = torch.randn(
            size.rows, num, self.adapter.latent_channels, generator=torch.Generator().manual_seed(0)
        ).to(device)

    # ---- text: seconds per token of one row

    def decode(self, rows: slice) -> None:
        """Decode the reasoning of some rows through a cache."""
        words = self.words[rows]
        cache = self.adapter.prefill(self.prompts[rows])
        cache.reserve(self.size.text_tokens + MARKS)
        active = torch.ones(len(words), dtype=torch.bool, device=self.device)
        tokens = None
        for i in range(self.size.text_tokens):
            self.adapter.next_logits(cache, tokens, active).argmax(-1)
            tokens = words[:, i]

    def reread(self, length: int) -> None:
        """Find the next token of all rows from nothing but ids."""
        rows = range(self.size.rows)
        cache = self.adapter.prefill(self.prompts)
        packer = self.adapter._packer()
        for b in rows:
            packer.sample()
            ids = [self.adapter.config.bos, *self.words[b, :length].tolist()]
            packer.text(ids, int(cache.positions[b]), last=True)
        self.adapter._append(cache, packer)[0].argmax(-1)

    def text(self) -> dict[str, float]:
        """Return tokens per second of the three ways."""
        size, num = self.size, self.size.rows * self.size.text_tokens
        whole = slice(None)
        probes = (
            torch.linspace(0, size.text_tokens - 1, min(PROBES, size.text_tokens)).long().tolist()
        )
        seconds = {
            "batched": self.timed(lambda: self.decode(whole)),
            "one by one": self.timed(
                lambda: [self.decode(slice(b, b + 1)) for b in range(size.rows)]
            ),
            "recomputed": self.timed(lambda: [self.reread(n) for n in probes])
            / len(probes)
            * size.text_tokens,
        }
        if "compiled" in self.ways:
            self.adapter = self.compiled
            seconds["compiled"] = self.timed(lambda: self.decode(whole))
            self.adapter = self.eager
        return {way: num / value for way, value in seconds.items()}

    def text_floor(self) -> float:
        """Return the tokens per second that reading and multiplying alone would allow."""
        size, net = self.size, self.adapter.net
        model, width = net.language_model.model, torch.finfo(self.machine.dtype).bits // 8
        understanding = [p for n, p in model.layers.named_parameters() if "moe_gen" not in n]
        weights = sum(p.numel() for p in [*understanding, *net.language_model.lm_head.parameters()])
        slots = size.rows * (PROMPT_TOKENS + MARKS + size.text_tokens / 2)
        cache = slots * self._numbers_per_slot()
        seconds = self.machine.floor((weights + cache) * width, 2 * weights * size.rows)
        return size.rows / seconds

    def _numbers_per_slot(self) -> int:
        config = self.adapter.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

    # ---- images: denoising steps of one row per second

    def contexts(self) -> list[list[TextSegment]]:
        """Return prompts with their reasonings."""
        return [
            [*prompt, TextSegment(tokens=words)]
            for prompt, words in zip(self.prompts, self.words, strict=True)
        ]

    def denoise(self, rows: slice, noise: Tensor, *, again: bool) -> None:
        """Run some denoising steps behind contexts that are read once, or again for each step."""
        contexts = self.contexts()[rows]
        sigma = torch.full((len(contexts),), 0.5, device=self.device)
        x, cache = noise[rows], self.cached[rows.start or 0] if not again else None
        for _ in range(STEPS):
            if again:
                cache = self.adapter.prefill(contexts)
            x = x - 0.1 * self.adapter.velocity(cache, x, sigma, self.grid)

    def images(self) -> dict[str, float]:
        """Return steps per second; reading a context once is the text's business."""
        rows, whole = range(self.size.rows), slice(None)
        self.cached = {0: self.adapter.prefill(self.contexts())}
        seconds = {
            "batched": self.timed(lambda: self.denoise(whole, self.noise, again=False)),
            "recomputed": self.timed(lambda: self.denoise(whole, self.noise, again=True)),
        }
        self.cached = {b: self.adapter.prefill(self.contexts()[b : b + 1]) for b in rows}
        seconds["one by one"] = self.timed(
            lambda: [self.denoise(slice(b, b + 1), self.noise, again=False) for b in rows]
        )
        if "compiled" in self.ways:
            self.adapter = self.compiled
            self.cached = {0: self.adapter.prefill(self.contexts())}
            seconds["compiled"] = self.timed(lambda: self.denoise(whole, self.noise, again=False))
            self.adapter = self.eager
        return {way: self.size.rows * STEPS / seconds[way] for way in self.ways}

    def image_floor(self) -> float:
        """Return the denoising steps per second that reading and multiplying alone would allow."""
        size, net, config = self.size, self.adapter.net, self.adapter.config
        width = torch.finfo(self.machine.dtype).bits // 8
        layers = net.language_model.model.layers.named_parameters()
        weights = sum(p.numel() for n, p in layers if "moe_gen" in n)
        rows = size.rows * self.grid[0] * self.grid[1]
        slots = PROMPT_TOKENS + size.text_tokens + 2 * MARKS + self.grid[0] * self.grid[1] + MARKS
        attention = 4 * rows * slots * config.hidden_size * config.num_hidden_layers
        cache = size.rows * slots * self._numbers_per_slot()
        seconds = self.machine.floor((weights + cache) * width, 2 * weights * rows + attention)
        return size.rows / seconds


def build_two_stacks(size: Size, *, compiled: bool) -> ShowO2Adapter:
    """Return a Show-o2 of a size with random weights.

    Raises:
        ValueError: when compiled layers are asked for.
    """
    if compiled:
        raise ValueError("--compiled goes with --model bagel only.")
    language = {
        "vocab_size": 4096,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "tie_word_embeddings": False,
    }
    flow = FlowConfig(
        width=size.hidden_size,
        layers=size.num_layers // 2,
        heads=size.num_heads,
        key_heads=size.num_kv_heads,
        head_dim=size.hidden_size // size.num_heads,
        mlp_width=size.intermediate_size,
    )
    semantic = SemanticConfig(
        width=size.hidden_size, layers=2, heads=size.num_heads, mlp_width=size.intermediate_size
    )
    config = ShowO2Config(
        language=language,
        semantic=semantic,
        flow=flow,
        bos=0,
        eos=1,
        begin_of_image=2,
        end_of_image=3,
    )
    pixels = (8 * size.side, 8 * size.side)
    return ShowO2Adapter(config, Nothing(), default_size=pixels).eval()


class TwoStacks(Rollout):
    """The same of Show-o2; both stacks remember the context."""

    build = staticmethod(build_two_stacks)

    def reread(self, length: int) -> None:
        """Find the next token of all rows from nothing but ids."""
        texts = [TextSegment(tokens=words[:length]) for words in self.words]
        contexts = [[*p, text] for p, text in zip(self.prompts, texts, strict=True)]
        self.adapter.prefill(contexts).logits.argmax(-1)


MODELS = {"bagel": Rollout, "showo2": TwoStacks}


def main() -> None:
    """Measure both sizes and print rates and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="bagel")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, help="of the mid size, 300 by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    machine = Machine(device, getattr(torch, args.dtype))
    record: dict[str, object] = {}
    tiny, mid = SIZES
    for size in (tiny, replace(mid, text_tokens=args.text_tokens or mid.text_tokens)):
        rollout = MODELS[args.model](size, machine, compiled=args.compiled)
        runs = [(rollout.text(), rollout.images()) for _ in range(args.repeats + 1)][1:]
        found = {
            part: {way: median(run[i][way] for run in runs) for way in rollout.ways}
            for i, part in enumerate(("tokens/s", "steps/s"))
        }
        if args.model == "bagel":
            found["tokens/s"]["floor"] = rollout.text_floor()
            found["steps/s"]["floor"] = rollout.image_floor()
        words, steps = found.values()
        seconds = {way: size.text_tokens / words[way] + WHOLE / steps[way] for way in words}
        found["rollouts/s"] = {way: 1 / value for way, value in seconds.items()}
        record[size.name] = {"size": asdict(size), **found}
        report(size, found)
    if args.out is not None:
        here = {
            "processor": processor(device),
            "torch": torch.__version__,
            "dtype": args.dtype,
            "GB/s": machine.bytes_per_s / 1e9,
            "GFLOP/s": machine.flop_per_s / 1e9,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": here, **record}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")


def processor(device: torch.device) -> str:
    """Return the name of what was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def report(size: Size, found: dict[str, dict[str, float]]) -> None:
    """Print the rates of one size, and batched against the others."""
    tokens = (size.side // 2) ** 2
    title = f"{size.name}: {size.rows} rows, {size.text_tokens} text tokens, {tokens} latent tokens"
    table = Table(title=title)
    ways = list(found["tokens/s"])
    for column in ("", *ways, *(f"batched / {way}" for way in ways[1:])):
        table.add_column(column, justify="right")
    for part, rates in found.items():
        ratios = [f"{rates['batched'] / rates[way]:.2f}" for way in ways[1:]]
        table.add_row(part, *(f"{rates[way]:.4g}" for way in ways), *ratios)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
