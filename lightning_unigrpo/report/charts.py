"""Lines over iterations as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from lightning_unigrpo.report.read import Series, finite, is_held_out

MAX_BINS = 300
"""Longer series are drawn by the lowest and highest value of each of so many parts, so that peaks stay."""
COLOURS = 6
INK = "#010203"
"""Stands for the colour of the text; :data:`PALETTE` for those of lines."""
PALETTE = tuple(f"#0102{10 + i}" for i in range(COLOURS))
STYLE: dict[Any, Any] = {  # matplotlib's own type lists every key
    "svg.fonttype": "none",
    "text.parse_math": False,  # a reward may have a dollar in its name
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Chart:
    """A figure, and what a reader should look for in it."""

    title: str
    note: str
    svg: str


def lines(
    title: str, note: str, series: Mapping[str, Series], *, logarithmic: bool = False
) -> Chart | None:
    """Draw series against the iteration; held-out ones with markers.

    Args:
        title: names the figure.
        note: one or two sentences on what to look for.
        series: label to values.
        logarithmic: draw values on a logarithmic axis, without those that are zero.

    Returns:
        ``None`` where there is nothing to draw.
    """
    drawn = {label: points for label, each in series.items() if (points := [*finite(each)])}
    if not drawn:
        return None
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        # The reader's browser draws the letters, with fonts of its own.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axis = figure.subplots()
        for i, (label, points) in enumerate(drawn.items()):
            _draw(axis, label, points, PALETTE[i % COLOURS])
        _scale(axis, [y for points in drawn.values() for _, y in points], logarithmic)
        axis.set_xlabel("iteration")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid()
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=10
        )
        return Chart(title, note, _svg(figure, title))


def _draw(axis: Axes, label: str, points: Sequence[tuple[int, float]], colour: str) -> None:
    short = len(points) <= MAX_BINS // 10
    marker = "o" if is_held_out(label) or short else None
    x, y = zip(*thin(points), strict=True)
    axis.plot(x, y, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.4)


def _scale(axis: Axes, values: Sequence[float], logarithmic: bool) -> None:
    low, high = min(values), max(values)
    if logarithmic and high > 0:
        axis.set_yscale("log", nonpositive="mask")
        # The usual one writes its powers in the mathematics that is off.
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    elif 0 < high - low < 1e-5 * abs(high):  # rounding around a constant, not a curve
        axis.set_ylim(low - 1e-3 * abs(high), high + 1e-3 * abs(high))


def thin(points: Sequence[tuple[int, float]], bins: int = MAX_BINS) -> list[tuple[int, float]]:
    """Keep the lowest and the highest value of each part of a long series, in order.

    Args:
        points: any number of them.
        bins: parts; at most twice as many points are returned.

    Example:
        >>> thin([(0, 1.0), (1, 5.0), (2, 0.0), (3, 2.0), (4, 2.5), (5, 2.0)], bins=2)
        [(1, 5.0), (2, 0.0), (3, 2.0), (4, 2.5)]
    """
    if len(points) <= 2 * bins:
        return [*points]
    edges = [round(i * len(points) / bins) for i in range(bins + 1)]
    kept: list[tuple[int, float]] = []
    for low, high in itertools.pairwise(edges):
        part = points[low:high]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _svg(figure: Figure, title: str) -> str:
    """Return a figure as an element: no prolog, no identifiers that another one has, colours of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.S
    )
    used = set(re.findall(r"#([\w.:-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    for i, colour in enumerate(PALETTE):
        text = text.replace(colour, f"var(--line-{i})")
    text = text.replace(INK, "currentColor")
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
