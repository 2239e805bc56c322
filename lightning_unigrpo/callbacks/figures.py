"""Pictures of a run: what was drawn with which reasoning, and how the reward rose."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_unigrpo.callbacks.rounds import strip, transcript
from lightning_unigrpo.types import Trajectory


def sample_grid(rows: Mapping[str, Sequence[Trajectory]], *, width: int = 26) -> Figure:
    """Draw samples row by row, each with its prompt above and its reasoning and reward below.

    Images of several rounds (``Trajectory.rounds``) lie side by side.

    Args:
        rows: title of a row ("base", "trained") to its trajectories; rows may differ in length.
        width: characters per caption line.

    Returns:
        A figure; the caller saves it or hands it to a logger.
    """
    # A box stands for a letter that the font lacks; saying so for each would bury the run's own lines.
    warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
    columns = max(len(samples) for samples in rows.values())
    widest = max(_count(sample) for samples in rows.values() for sample in samples)
    size = (2.1 * columns * widest, (2.4 + 0.5 * widest) * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_frame_on(False)
    for line, (title, samples) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(title, fontsize=11, fontweight="bold")
        for axis, sample in zip(line, samples, strict=False):
            _draw(axis, sample, width, widest)
    return figure


def _draw(axis: object, sample: Trajectory, width: int, widest: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    picture = strip(sample)
    if picture is not None:
        axis.imshow(picture.detach().float().cpu().permute(1, 2, 0).numpy(), vmin=0, vmax=1)
        middle, room = (picture.shape[2] - 1) / 2, widest * picture.shape[2] / _count(sample)
        axis.set_xlim(middle - room / 2, middle + room / 2)  # images of all samples equally large
    axis.set_title(_wrap(sample.prompt.text, widest * width), fontsize=7)
    said = [_wrap(text, widest * width) for text in transcript(sample)]
    reasoning = "\n".join(filter(None, said)) or "(no reasoning)"
    reward = "" if np.isnan(sample.reward) else f"\nreward {sample.reward:.2f}"
    axis.set_xlabel(reasoning + reward, fontsize=7, family="monospace")


def _count(sample: Trajectory) -> int:
    return len(sample.rounds) or 1


def _wrap(text: str, width: int) -> str:
    # matplotlib reads $ as mathematics; a model may well write one.
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    lines = textwrap.wrap(text, width, max_lines=4, placeholder=" …")
    return "\n".join(lines).replace("$", r"\$")


def reward_curve(
    train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]
) -> Figure:
    """Draw the reward of training rollouts and of held-out evaluation against the iteration."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    if train:
        axis.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.6, label="training rollouts")
    if held_out:
        axis.plot(
            *zip(*held_out, strict=True),
            color="tab:orange",
            marker="o",
            label="held-out prompts, greedy",
        )
    axis.set_xlabel("iteration"), axis.set_ylabel("reward")
    axis.grid(alpha=0.3)
    if train or held_out:
        axis.legend()
    return figure
