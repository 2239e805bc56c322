"""Does a policy learn to write when the only reward is an OCR engine that reads what it drew?

    python -m benchmarks.ocr curve       # what spoiling a drawn word costs
    python -m benchmarks.ocr train       # 3 seeds, from random weights
    python -m benchmarks.ocr figures     # the table and the picture

A prompt asks for a word of three letters. The policy is the toy of the test suite for images of codes: it
thinks in up to five letters, then draws three codes; a code is a letter in Pillow's own font, drawn side
by side on a canvas of 96 x 96 pixels. Nothing tells it which code looks like which letter, or that the
order counts: :class:`~lightning_unigrpo.rewards.OCRReward` reads the canvas, and that is all. A quarter of
the words is never trained on. Equal codes are equal images, so each is read once.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from lightning_unigrpo import Objective, Optim, PromptDataModule, RunReport, Sampling, UniGRPOModule
from lightning_unigrpo.rewards import OCRReward
from lightning_unigrpo.rewards.ocr import quoted
from lightning_unigrpo.types import (
    Grid,
    Prompt,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)
from tests.toys import WORDS, ToyNet, ToyTokens

RESULTS = Path(__file__).parent / "results" / "ocr"
LETTERS = WORDS.upper()
LENGTH, CANVAS, ADVANCE, HEIGHT = 3, 96, 20, 30
"""Letters of a word; pixels of the canvas, from letter to letter, and of the font."""
SEEDS, SHOWN = 3, 8


def picture(word: str, size: int = CANVAS, *, blur: float = 0.0) -> Image.Image:
    """Return a word drawn letter by letter in the middle of a white canvas."""
    scale = size / CANVAS
    image = Image.new("RGB", (size, size), "white")
    font, pen = ImageFont.load_default(HEIGHT * scale), ImageDraw.Draw(image)
    for i, letter in enumerate(word):
        x = size / 2 + (i - (len(word) - 1) / 2) * ADVANCE * scale
        pen.text((x, size / 2), letter, "black", font, anchor="mm")
    return image.filter(ImageFilter.GaussianBlur(blur))


def pixels(image: Image.Image) -> Tensor:
    """Return ``[3, H, W]`` uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@cache
def glyphs(word: str) -> Tensor:
    """Return ``[3, H, W]`` float32 in [0, 1]."""
    return pixels(picture(word)) / 255


class Writer(ToyTokens):
    """Draws words: code n is the n-th letter, of which the network knows nothing.

    Args:
        seed: of the random weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = ToyNet(self.num_in, self.num_out, size=32)

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return the letters that the prompt quotes."""
        ids = [1 + LETTERS.index(letter) for letter in quoted(prompt.text) or ""]
        return [TextSegment(tokens=torch.tensor(ids, dtype=torch.long, device=self.device))]

    def image_grid(self, prompt: Prompt) -> Grid:
        """Return one row of letters."""
        return 1, LENGTH

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Draw codes ``[B, N]``; returns ``[B, 3, H, W]`` in [0, 1]."""
        words = ["".join(LETTERS[code] for code in row) for row in latents.long().tolist()]
        return torch.stack([glyphs(word) for word in words])


class Reader(OCRReward):
    """The reward, reading equal images once."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, str] = {}

    def read(self, image: Tensor) -> str:
        """Return all text in one image ``[3, H, W]`` uint8."""
        key = image.numpy().tobytes()
        if key not in self.known:
            self.known[key] = super().read(image)
        return self.known[key]


def split() -> tuple[list[Prompt], list[Prompt]]:
    """Return prompts to train on, and the quarter that is held out."""
    words = ["".join(letters) for letters in product(LETTERS, repeat=LENGTH)]
    order = np.random.default_rng(0).permutation(len(words)).tolist()
    prompts = [Prompt(text=f'the word "{words[i]}"', id=i) for i in order]
    held_out = len(words) // 4
    return prompts[held_out:], prompts[:held_out]


def train(seed: int, iterations: int, reader: Reader) -> dict[str, Any]:
    """Train one policy from random weights; returns its figures."""
    from lightning.pytorch import Trainer

    trained, held_out = split()
    report = RunReport(num_samples=len(held_out))
    module = UniGRPOModule(
        Writer(seed),
        rewards=[reader],
        sampling=Sampling(group_size=16, max_text_tokens=5, seed=seed),
        objective=Objective(mse_weight=0.0),
        optim=Optim(text_lr=3e-3, flow_lr=3e-3, ppo_epochs=1),
    )
    data = PromptDataModule.from_prompts(trained, test=held_out, prompts_per_iteration=16)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=iterations,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[report],
    )
    begin, calls = time.process_time(), len(reader.known)
    trainer.test(module, data, verbose=False)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    result: dict[str, Any] = {
        "seed": seed,
        "iterations": iterations,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "images_read": len(reader.known) - calls,
        "reward": [round(reward, 4) for _, reward in report.train],
    }
    for name, rows in zip(("before", "after"), report.samples.values(), strict=True):
        rewards = [row.reward for row in rows]
        result[name] = {
            "reward": round(mean(rewards), 4),
            "right": round(mean(float(reward == 1) for reward in rewards), 4),
            "words": [[quoted(row.prompt.text), drawn(row)] for row in rows[:SHOWN]],
        }
    return result


def drawn(row: Trajectory) -> str:
    """Return the letters that a policy drew."""
    codes = row.segments[-1]
    assert isinstance(codes, TokenImageSegment)
    return "".join(LETTERS[code] for code in codes.tokens.tolist())


def keep(name: str, result: dict[str, Any]) -> None:
    """Write one result."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """Read one result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def curve(_: argparse.Namespace) -> None:
    """Measure what the reward says of a word that is drawn ever worse."""
    reward, target = OCRReward(), "HELLO WORLD"
    reward.prepare(torch.device("cpu"))

    def score(image: Image.Image) -> float:
        (found,) = reward([pixels(image)], [f'"{target}"'])
        return round(found or 0.0, 3)

    def line(text: str, size: int) -> Image.Image:
        image = Image.new("RGB", (size, size), "white")
        font = ImageFont.load_default(size / 8)
        ImageDraw.Draw(image).text((size / 2, size / 2), text, "black", font, anchor="mm")
        return image

    begin = time.process_time()
    result: dict[str, Any] = {
        "size": {size: score(line(target, size)) for size in (512, 256, 128, 64, 48, 32)},
        "text": {
            text: score(line(text, 256))
            for text in (target, "HELLO WORL", "HELO WRLD", "HEXXO", "????", "")
        },
        "blur": {
            radius: score(line(target, 512).filter(ImageFilter.GaussianBlur(radius)))
            for radius in (0, 4, 8, 9, 10, 11, 12, 16)
        },
    }
    calls = sum(map(len, result.values()))
    result["cpu_seconds_per_call"] = round((time.process_time() - begin) / calls, 3)
    keep("curve", result)
    print(json.dumps(result, indent=1))


def learn(options: argparse.Namespace) -> None:
    """Train every seed; what one has read, the next need not read again."""
    torch.set_num_threads(1)
    reader = Reader()
    for seed in range(SEEDS):
        result = train(seed, options.iterations, reader)
        keep(f"seed{seed}", result)
        print(seed, result["before"], result["after"], result["cpu_seconds"], flush=True)
    words = [quoted(prompt.text) or "" for prompts in split() for prompt in prompts]
    found = reader.compare([reader.read(pixels(picture(word))) for word in words], words)
    keep("ceiling", {"reward": round(mean(found), 4), "words": len(words)})


def figures(_: argparse.Namespace) -> None:
    """Print the table; draw the rewards over the iterations and what was drawn."""
    from matplotlib.figure import Figure

    results = [load(f"seed{seed}") for seed in range(SEEDS)]
    print(
        "| seed | held-out reward before | after | held-out words right | CPU seconds | images read |"
    )
    print("|---|---|---|---|---|---|")
    for r in results:
        before, after = r["before"], r["after"]
        print(
            f"| {r['seed']} | {before['reward']:.3f} | {after['reward']:.3f} | {after['right']:.3f} | "
            f"{r['cpu_seconds']:.0f} | {r['images_read']} |"
        )
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    for r in results:
        left.plot(range(1, len(r["reward"]) + 1), r["reward"], lw=1, label=f"seed {r['seed']}")
    left.axhline(load("ceiling")["reward"], color="gray", lw=0.8, ls=":", label="all right")
    left.set_xlabel("iteration")
    left.set_ylabel("OCR reward in training")
    left.legend(frameon=False, loc="lower right")
    rows = [results[0][name]["words"] for name in ("before", "after")]
    canvas = np.vstack([np.hstack([np.array(picture(word)) for _, word in row]) for row in rows])
    right.imshow(canvas)
    right.set_xticks([CANVAS * (i + 0.5) for i in range(SHOWN)], [asked for asked, _ in rows[0]])
    right.set_yticks([CANVAS * 0.5, CANVAS * 1.5], ["before", "after"])
    right.set_title("held-out words, seed 0")
    figure.savefig(RESULTS / "learning.png", dpi=110)


def main() -> None:
    """Run the named parts; all of them without a name."""
    parts = {"curve": curve, "train": learn, "figures": figures}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--iterations", type=int, default=120)
    options = parser.parse_args()
    for name in options.parts or parts:
        parts[name](options)


if __name__ == "__main__":
    main()
