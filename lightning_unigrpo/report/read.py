"""A run's folder as plain data: metrics, groups, settings; whatever is missing stays empty."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lightning_unigrpo.report.rollouts import Group, read_groups

Series: TypeAlias = dict[int, float]
"""Iteration to value, ascending. Training values stand at the iteration that logged them, from 0 on;
those of validation and test at the number of iterations made before."""
Point: TypeAlias = tuple[int, str, float]
"""Step, name and value, as a logger wrote them."""

TABLE, EVENTS, SUMMARY = "metrics.csv", "events.out.tfevents.*", "report.json"
GROUPS, SAMPLES = Path("rollouts", "groups.jsonl"), Path("rollouts", "samples.jsonl")
NO_METRICS = {"epoch", "step", "hp_metric"}
"""What loggers write beside metrics."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a folder says about a run."""

    folder: Path
    source: str | None
    """Where the metrics come from; ``None`` = nowhere."""
    metrics: Mapping[str, Series]
    test: Mapping[str, Mapping[str, float]]
    """``base`` and ``trained`` to the metrics of the test."""
    groups: tuple[Group, ...]
    """Of training, by iteration."""
    samples: Mapping[str, tuple[Group, ...]]
    """``base`` and ``trained`` to groups of test prompts."""
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, str]
    finished: bool
    """Whether the report at the end of a run was written."""
    broken: int
    """Lines that could not be read, as of a writer that was killed."""

    @property
    def iterations(self) -> int:
        """How many iterations are known to have been made."""
        drawn = [group.iteration for group in self.groups]
        trained = [max(series) for name, series in self.metrics.items() if not is_held_out(name)]
        return 1 + max([*drawn, *trained], default=-1)


@dataclass
class _Lines:
    """Points read from a table, and how many lines were none."""

    points: list[Point] = field(default_factory=list)
    broken: int = 0


def is_held_out(name: str) -> bool:
    """Whether a metric was measured on held-out prompts."""
    return name.startswith(("val/", "test/"))


def find_run(path: Path) -> Path:
    """Return the folder of a run: the one given, or the newest below it in which something was trained.

    Args:
        path: of a run, or of a folder of runs.

    Raises:
        ValueError: when there is no run.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give the folder of a run, or one that holds runs.")
    own = (TABLE, SUMMARY, str(GROUPS))
    if any(next(path.glob(pattern), None) for pattern in (*own, EVENTS)):
        return path
    # A run with two loggers leaves events in a folder of their own: they count where nothing else is.
    places = [*_newest_first(path, own), *_newest_first(path, (EVENTS,))]
    if not places:
        raise ValueError(
            f"{path} holds no run: neither {TABLE}, {EVENTS}, {SUMMARY} nor {GROUPS} lies in it or below. "
            "Give the folder that trainer.logger writes to."
        )
    trained = (place for place in places if read_run(place).iterations)
    return next(trained, places[0])


def _newest_first(path: Path, patterns: tuple[str, ...]) -> list[Path]:
    changed: dict[Path, float] = {}
    for pattern in patterns:
        depth = len(Path(pattern).parts)
        for file in path.rglob(pattern):
            folder = file.parents[depth - 1]
            changed[folder] = max(changed.get(folder, 0.0), file.stat().st_mtime)
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def read_run(folder: Path) -> Run:
    """Read everything that a run left.

    Args:
        folder: as :func:`find_run` returns it.
    """
    source, lines = _read_points(folder)
    metrics = align(lines.points)
    summary = _read_json(folder / SUMMARY)
    for name, key in (("reward", "train"), ("val/reward", "held_out")):
        if name not in metrics and summary.get(key):  # a run without a logger
            metrics[name] = dict(summary[key])
            source = source or SUMMARY
    groups, lost = _read_groups(folder / GROUPS)
    samples, lost_too = _read_groups(folder / SAMPLES)
    text = _read_text(folder / "config.yaml")
    return Run(
        folder=folder,
        source=source,
        metrics=metrics,
        test=summary.get("test") or _tests(lines.points),
        groups=tuple(sorted(groups, key=lambda group: group.iteration)),
        samples={
            title: tuple(group for group in samples if group.title == title)
            for title in dict.fromkeys(group.title for group in samples)
        },
        config=_read_config(text),
        config_text=text,
        environment={str(k): str(v) for k, v in _read_json(folder / "environment.json").items()},
        finished=bool(summary),
        broken=lines.broken + lost + lost_too,
    )


def _read_points(folder: Path) -> tuple[str | None, _Lines]:
    if (folder / TABLE).is_file():
        return TABLE, read_csv(folder / TABLE)
    if next(folder.glob(EVENTS), None):
        return "TensorBoard", _Lines(read_events(folder))
    return None, _Lines()


def read_csv(path: Path) -> _Lines:
    """Read what ``CSVLogger`` wrote; a line that a killed writer left unfinished is counted, not read.

    Args:
        path: of ``metrics.csv``.
    """
    found = _Lines()
    header, *rows = _read_text(path).replace("\0", "").split("\n") or [""]
    if rows and rows[-1]:  # without its end a number may be cut in the middle
        found.broken += 1
    names = next(csv.reader([header]), [])
    for values in csv.reader(rows[:-1]):
        try:
            row = dict(zip(names, values, strict=True))
            step = int(float(row.pop("step")))
            numbers = {k: float(v) for k, v in row.items() if v and k not in NO_METRICS}
        except (KeyError, ValueError):
            found.broken += bool(values)
            continue
        found.points += [(step, name, value) for name, value in numbers.items()]
    return found


def read_events(folder: Path) -> list[Point]:
    """Read the scalars that ``TensorBoardLogger`` wrote, in the order of time.

    Args:
        folder: with event files.
    """
    # Half a second that runs with a table need not wait for.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = [
        (event.wall_time, event.step, name, float(event.value))
        for name in events.Tags()["scalars"]
        if name not in NO_METRICS
        for event in events.Scalars(name)
    ]
    return [(step, name, value) for _, step, name, value in sorted(found)]


def align(points: list[Point]) -> dict[str, Series]:
    """Return every metric against the iteration; of what was logged twice, as after a crash, the last.

    Lightning counts steps of the logger as we count iterations, but from where the trainer began, and
    logs a validation at the step of the iteration that it follows.

    Args:
        points: in the order of time.
    """
    shift = next((int(value) - step for step, name, value in points if name == "iteration"), 0)
    table: dict[str, Series] = {}
    for step, name, value in points:
        table.setdefault(name, {})[step + shift + name.startswith("val/")] = value
    return {name: dict(sorted(table[name].items())) for name in sorted(table)}


def _tests(points: list[Point]) -> dict[str, dict[str, float]]:
    """Return the first and the last test as ``base`` and ``trained``, for runs without a summary."""
    found: dict[str, dict[str, float]] = {}
    for step, name, value in points:
        if name.startswith("test/"):
            found.setdefault("trained" if step else "base", {})[name] = value
    return found


def _read_groups(path: Path) -> tuple[list[Group], int]:
    return read_groups(_read_text(path).splitlines(), path.parent / "images")


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_config(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def finite(series: Mapping[int, float]) -> Iterator[tuple[int, float]]:
    """Yield the points of a series that have a number."""
    return ((x, y) for x, y in series.items() if math.isfinite(y))
