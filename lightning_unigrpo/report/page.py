"""A run as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import datetime
import math
import statistics
from pathlib import Path

import jinja2
from markupsafe import Markup

from lightning_unigrpo.report import panels
from lightning_unigrpo.report.charts import Chart
from lightning_unigrpo.report.groups import change, gather_groups, gather_samples, number
from lightning_unigrpo.report.read import Run, Series, find_run, read_run


def write(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run: folder of a run, finished or not; or a folder of runs, which stands for the newest below it
            in which something was trained.
        output: file to write; ``None`` = ``report.html`` in the folder of the run.

    Returns:
        The file.

    Raises:
        ValueError: when ``run`` holds no run, or ``output`` is a folder.
    """
    folder = find_run(Path(run))
    file = Path(output or folder / "report.html")
    if file.is_dir():
        raise ValueError(f"output is {file}, a folder; give the name of a file.")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    # replace: what a model wrote may hold half of a character
    part.write_text(render(read_run(folder)), encoding="utf-8", errors="replace")
    part.replace(file)
    return file


def render(run: Run) -> str:
    """Return the page of a run.

    Args:
        run: as :func:`~lightning_unigrpo.report.read.read_run` reads it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # tojson also escapes what would end a script.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"number": number, "change": change}
    groups, samples = gather_groups(run), gather_samples(run)
    return environment.get_template("page.html.jinja").render(
        run=run,
        name="/".join(run.folder.resolve().parts[-2:]),
        backbone=backbone(run),
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        outcome=outcome(run),
        tests=tests(run),
        rewards=[*map(_figure, panels.rewards(run))],
        policy=[*map(_figure, _policy(run))],
        policy_missing=panels.missing(run, panels.POLICY),
        groups=groups,
        samples=samples,
        picture=None if samples.rows else _picture(run.folder / "samples.png"),
        signs=[*map(_figure, panels.draw(run, panels.SIGNS))],
        signs_missing=panels.missing(run, panels.SIGNS),
        drift=drift(run),
        speed=[*map(_figure, panels.draw(run, panels.SPEED))],
        phases=phases(run),
        table=[(name, summarise(series)) for name, series in run.metrics.items()],
    )


def _policy(run: Run) -> list[Chart]:
    spread = panels.advantages(run.groups)
    return [*panels.draw(run, panels.POLICY), *([spread] if spread else [])]


def _figure(chart: Chart) -> dict[str, str]:
    # matplotlib escapes the words in its drawings.
    return {"title": chart.title, "note": chart.note, "svg": Markup(chart.svg)}  # noqa: S704


def backbone(run: Run) -> str | None:
    """Return the adapter that the configuration names, with its arguments; ``None`` = it is not known."""
    adapter = (run.config.get("model") or {}).get("adapter")
    if not isinstance(adapter, dict):
        return adapter and str(adapter)
    arguments = adapter.get("init_args") or {}
    known = ", ".join(f"{name}={value}" for name, value in arguments.items() if value is not None)
    return f"{str(adapter.get('class_path')).rpartition('.')[2]}({known})"


def outcome(run: Run) -> tuple[str, float, float] | None:
    """Return what a run achieved: on which prompts, before, after; ``None`` = it was not measured twice."""
    base, trained = (run.test.get(title, {}).get("test/reward") for title in ("base", "trained"))
    if base is not None and trained is not None:
        return "held-out test prompts", base, trained
    validated = [*run.metrics.get("val/reward", {}).values()]
    if len(validated) > 1:
        return "validation prompts, first to last validation", validated[0], validated[-1]
    return None


def tests(run: Run) -> list[tuple[str, list[float]]]:
    """Return each metric of the test with its values, NaN where a test lacks it."""
    names = dict.fromkeys(name for values in run.test.values() for name in values)
    return [
        (name.removeprefix("test/"), [values.get(name, math.nan) for values in run.test.values()])
        for name in names
    ]


def drift(run: Run) -> dict[str, float]:
    """Return how far test images are from those of the reference, where that was measured."""
    name = "test/image/drift"
    return {title: values[name] for title, values in run.test.items() if name in values}


def summarise(series: Series) -> dict[str, float]:
    """Return first, last, lowest and highest value of a series, and how many there are.

    Args:
        series: not empty.
    """
    values = [*series.values()]
    known = [value for value in values if math.isfinite(value)] or [math.nan]
    return {
        "first": values[0],
        "last": values[-1],
        "lowest": min(known),
        "highest": max(known),
        "count": len(values),
    }


def phases(run: Run) -> list[tuple[str, float, float]]:
    """Return each phase with its mean seconds per iteration and its share of that, the longest first."""
    means = {
        name.removeprefix("time/"): statistics.fmean(series.values())
        for name, series in run.metrics.items()
        if name.startswith("time/")
    }
    whole = means.get("iteration") or sum(means.values())
    longest = sorted(means.items(), key=lambda item: -item[1])
    return [(name, mean, mean / whole if whole else math.nan) for name, mean in longest]


def _picture(file: Path) -> str | None:
    if not file.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
