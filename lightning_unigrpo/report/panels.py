"""Which metrics are drawn together, and what a reader should look for in them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_unigrpo.report.charts import Chart, lines
from lightning_unigrpo.report.read import Run, Series
from lightning_unigrpo.report.rollouts import Group


class Panel(NamedTuple):
    """A chart of metrics by name."""

    title: str
    note: str
    names: tuple[str, ...]
    """A name that ends in ``/`` stands for all that begin with it."""
    logarithmic: bool = False


POLICY = (
    Panel(
        "On-policy guard",
        "Differences between rollout and training before the first update, which should stay at rounding: "
        "about 1e-6 in float32, 1e-2 in bfloat16. A rise says that the two compute different policies.",
        ("guard/",),
        logarithmic=True,
    ),
    Panel(
        "Clip fraction",
        "Share of tokens and denoising steps at the clip. Zero is right with one update per collection; "
        "values near 1 say that most of the batch no longer teaches anything.",
        ("text/clip_fraction", "flow/clip_fraction", "image/clip_fraction"),
    ),
    Panel(
        "Largest log ratio",
        "How far any action moved within one collection. A climb over many iterations announces collapse: "
        "lower the learning rate.",
        ("text/log_ratio_max", "flow/log_ratio_max", "image/log_ratio_max"),
        logarithmic=True,
    ),
    Panel(
        "Mean ratio of words and codes",
        "Of the new policy to the one that drew. It should stay near 1.",
        ("text/ratio_mean", "image/ratio_mean"),
    ),
    Panel(
        "Mean log ratio of the flow",
        "It should stay near 0; one that leans to a side moves the clip to that side.",
        ("flow/log_ratio_mean",),
    ),
    Panel(
        "Distance from the reference",
        "The penalties on leaving the reference. A steady rise is learning; a steep one, with a reward that "
        "jumps, is often a reward being gamed.",
        ("flow/velocity_mse", "flow/latent_kl", "text/kl", "image/kl"),
        logarithmic=True,
    ),
    Panel(
        "Gradient norms",
        "Before clipping, for each expert. Single peaks are harmless under clipping, a rising level is not.",
        ("grad_norm/",),
    ),
    Panel(
        "Entropy of the words",
        "In nats per token. Near zero the members of a group think alike and have nothing to compare.",
        ("text/entropy",),
    ),
    Panel(
        "Loss",
        "Falls and rises with the advantages of each batch; it says little about progress.",
        ("loss",),
    ),
)
SIGNS = (
    Panel(
        "Diversity of images",
        "Spread of the images inside a group. A fall towards zero while the reward rises says that one "
        "picture is drawn for everything.",
        ("image/diversity", "val/image/diversity"),
    ),
    Panel(
        "Saturation",
        "Share of pixel values at black or white. A steady rise says that the reward likes contrast more "
        "than content.",
        ("image/saturation", "val/image/saturation"),
    ),
    Panel(
        "Length of the reasoning",
        "In tokens. Growing to the limit, or shrinking to nothing, says that the words have become a means "
        "to the reward.",
        ("text/length", "val/text_length"),
    ),
    Panel(
        "Reasoning that stopped",
        "Share of texts that ended by themselves. Below 1 the limit cuts them: raise "
        "sampling.max_text_tokens, or set objective.truncation_reward.",
        ("text/stopped", "val/stopped"),
    ),
    Panel(
        "Unscored rollouts",
        "Share without a reward. It should be zero; otherwise look at the failures of each reward.",
        ("reward/unscored",),
    ),
    Panel(
        "Spread of rewards inside groups",
        "Standard deviation, and the share of groups without any. Without spread there is no gradient: the "
        "prompts are too easy, too hard, or every member draws the same.",
        ("reward/group_std", "reward/masked_groups"),
    ),
)
SPEED = (
    Panel(
        "Seconds per iteration",
        "On the first rank, by phase. A phase that grows while the others stay has a cause of its own: "
        "longer texts, a slow reward service.",
        ("time/",),
    ),
    Panel("Throughput", "Rollouts of all ranks per second.", ("throughput/",)),
    Panel("Peak memory", "In GiB, on the first rank.", ("memory/",)),
)


def draw(run: Run, panels: Sequence[Panel]) -> list[Chart]:
    """Draw the panels of which something was logged.

    Args:
        run: with its metrics.
        panels: in the order of the page.
    """
    charts = (
        lines(p.title, p.note, select(run.metrics, p.names), logarithmic=p.logarithmic)
        for p in panels
    )
    return [chart for chart in charts if chart]


def missing(run: Run, panels: Sequence[Panel]) -> list[str]:
    """Return the titles of panels of which nothing was logged."""
    return [panel.title for panel in panels if not select(run.metrics, panel.names)]


def select(metrics: Mapping[str, Series], names: Sequence[str]) -> dict[str, Series]:
    """Return the metrics that are named, or whose folder is."""
    return {
        name: series
        for each in names
        for name, series in metrics.items()
        if name == each or (each.endswith("/") and name.startswith(each))
    }


def rewards(run: Run) -> list[Chart]:
    """Draw the combined reward, each component, and the tasks of the validation."""
    metrics = run.metrics
    panels = [Panel("Reward", "Weighted sum of all components.", ("reward", "val/reward"))]
    panels += [
        Panel(f"Reward: {name}", "", (f"reward/{name}", f"val/reward/{name}"))
        for name in components(metrics)
    ]
    panels += [
        Panel(
            f"{kind} by round",
            "Combined, of each round's image; who ended early counts with what was drawn. Later ones should "
            "lie above earlier ones: else a round costs time and brings nothing.",
            by_round(metrics, prefix),
        )
        for kind, prefix in (("Reward", ""), ("Validation", "val/"))
    ]
    panels.append(
        Panel(
            "Images of a trajectory",
            "Mean. It falls where the policy, or the user, is content earlier; one that falls while the "
            "reward does not rise says that the policy stops for no good reason.",
            ("image/rounds",),
        )
    )
    known = {name for panel in panels for name in panel.names} | {"val/reward/std"}
    tasks = [n for n in metrics if n.startswith("val/reward/") and n.count("/") == 2]
    tasks = [name for name in tasks if name not in known]
    panels.append(Panel("Validation by task", "Of the combined reward.", tuple(tasks)))
    return draw(run, panels)


def by_round(metrics: Mapping[str, Series], prefix: str) -> tuple[str, ...]:
    """Return the names of the rewards of each round, in their order, where there are several."""
    found = [name for name in metrics if re.fullmatch(rf"{prefix}reward/round_\d+", name)]
    return tuple(sorted(found, key=lambda name: int(name.rpartition("_")[2])))


def components(metrics: Mapping[str, Series]) -> list[str]:
    """Return the names of rewards: those that count failures."""
    found = (
        name.removeprefix("val/").removeprefix("reward/").removesuffix("/failures")
        for name in metrics
        if name.startswith(("reward/", "val/reward/")) and name.endswith("/failures")
    )
    return [*dict.fromkeys(found)]


def advantages(groups: Sequence[Group]) -> Chart | None:
    """Draw how far the advantages of recorded rollouts reach."""
    by_iteration: dict[int, list[float]] = {}
    for group in groups:
        known = [m.advantage for m in group.members if m.advantage is not None]
        by_iteration.setdefault(group.iteration, []).extend(known)
    spread = {iteration: values for iteration, values in by_iteration.items() if values}
    return lines(
        "Advantages of recorded groups",
        "Lowest, highest and standard deviation. All zero means groups whose members were worth the same.",
        {
            "lowest": {iteration: min(values) for iteration, values in spread.items()},
            "highest": {iteration: max(values) for iteration, values in spread.items()},
            "standard deviation": {i: statistics.pstdev(values) for i, values in spread.items()},
        },
    )
