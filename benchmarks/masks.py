"""Draw who sees whom in the packed pass of a dialogue, from the layout that an adapter really makes.

    python -m benchmarks.masks --out docs/images/masks.png

The digits model thinks, draws, is told something, thinks and draws again; its packed pass is laid out as for
learning, and the mask that attention gets is painted, block by block.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_unigrpo.adapters.bagel.packing import Packer
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.dialogue import Turns
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory

PLAN = ("text", "image", "turn", "text", "image")


class Blocks(NamedTuple):
    """The rows of a packed pass, in order."""

    names: list[str]
    """Of each block."""
    sizes: list[int]
    """Rows of each block."""
    visible: Tensor
    """``[L, L]`` bool, which row (first axis) sees which (second)."""

    def sees(self, one: int, other: int) -> Tensor:
        """Return the part of the mask in which a block looks at another."""
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        rows, columns = (slice(ends[n] - self.sizes[n], ends[n]) for n in (one, other))
        return self.visible[rows, columns]


def dialogue() -> tuple[DigitsAdapter, Trajectory]:
    """Return the digits model, and a trajectory of two rounds with a turn of the user."""
    adapter = DigitsAdapter("two_rounds").eval()
    settings = adapter.defaults().sampling
    assert settings is not None
    sampling = replace(settings, plan=PLAN, window_size=2, max_text_tokens=8, seed=0)
    starts = [Start(Prompt(text="what is three plus four"), 0, 0)]
    ((found,),) = rollout(adapter, starts, sampling, speaker=Turns(["please draw"]))
    return adapter, found


def blocks_of(adapter: DigitsAdapter, trajectory: Trajectory) -> Blocks:
    """Lay a trajectory out as :meth:`Adapter.forward` does."""
    packer = Packer(config=adapter.config, device=adapter.device)
    packer.sample()
    position, names, number = 0, [], 1
    for segment in trajectory.segments:
        position = adapter._pack(packer, segment, position, slice(None))
        names += names_of(segment, number, is_first=not names)
        number += isinstance(segment, ImageSegment)
    _, layout = packer.finish()
    sizes = [len(rows) for _, rows in layout.samples[0]]
    return Blocks(names, sizes, layout.visible()[0])


def names_of(segment: Segment, number: int, *, is_first: bool) -> list[str]:
    """Return the names of the blocks of a segment."""
    if isinstance(segment, TextSegment):
        if segment.is_sampled:
            return [f"text {number}"]
        return ["prompt" if is_first else "turn"]
    assert isinstance(segment, ImageSegment)
    assert segment.states is not None
    copies = [f"noisy {number}, step {k}" for k in range(1, len(segment.states))]
    return copies + ([f"clean image {number}"] if segment.is_context else [])


def draw(blocks: Blocks, file: Path) -> None:
    """Paint the mask: rows look at columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    axis = figure.subplots()
    axis.imshow(blocks.visible, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    ends = torch.tensor([0, *blocks.sizes]).cumsum(0).tolist()
    for end in ends:
        axis.axhline(end - 0.5, color="0.6", lw=0.6)
        axis.axvline(end - 0.5, color="0.6", lw=0.6)
    middles = [(a + b - 1) / 2 for a, b in pairwise(ends)]
    axis.set_xticks(middles, blocks.names, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(middles, blocks.names, fontsize=8)
    axis.tick_params(length=0)
    axis.set_title("rows look at columns", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/masks.png"))
    options = parser.parse_args()
    blocks = blocks_of(*dialogue())
    draw(blocks, options.out)
    print(dict(zip(blocks.names, blocks.sizes, strict=True)))


if __name__ == "__main__":
    main()
