"""The adapter's contract as executable checks, for authors of new adapters.

    print(check_adapter(MyAdapter.tiny(), [Prompt(text="a red cube"), Prompt(text="two cats")]))

A check is a function with a name, a bound and advice. Most compute one thing in two ways and return
how far apart they are: logits and velocities as ``max ||a - b|| / ||b||`` over rows, log-probabilities
in nats. Run them on a small configuration with random weights, in float32 on a CPU: what is wrong
there is wrong everywhere, and all of them take a second.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.testing import (  # noqa: F401 - in running order
    cached,
    network,
    packed,
    policy,
    visibility,
)
from lightning_unigrpo.testing.report import CHECKS, Check, Finding, NoRolloutError, Report, Result
from lightning_unigrpo.testing.subject import Subject
from lightning_unigrpo.types import Prompt

__all__ = ["CHECKS", "Check", "Finding", "Report", "Result", "check_adapter"]


def check_adapter(
    adapter: Adapter,
    prompts: Sequence[Prompt] | None = None,
    *,
    rounds: Sequence[int] = (1, 2),
    atol: float | None = None,
    only: Collection[str] | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Check an adapter against the contract of :class:`lightning_unigrpo.adapter.Adapter`.

    Weights, mode and global generators are left as they were.

    Args:
        adapter: the backbone, best a small one with random weights.
        prompts: two or more of different length; ``None`` takes the adapter's own.
        rounds: how often trajectories think and draw; leave 2 out if drawn images are never seen. Between
            two rounds the user speaks in half of them, where the adapter has a ``turn``.
        atol: bound of all comparisons; ``None`` = by precision of the weights (:data:`report.ATOL`).
        only: names of the checks to run; ``None`` = all of :data:`CHECKS`.
        raise_on_failure: raise, or only return the report.

    Returns:
        The report; ``str(report)`` is a table with advice.

    Raises:
        AssertionError: with that table, when a rule is broken.
        ValueError: when there are no prompts to check with.
    """
    subject = Subject(adapter, _choose_prompts(adapter, prompts), max(rounds), atol)
    report = Report(type(adapter).__name__)
    was_training = adapter.training
    devices = [subject.device] if subject.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for check in (c for c in CHECKS if only is None or c.name in only):
            for number in rounds if check.per_round else [None]:
                adapter.eval()
                subject.rounds = number or max(rounds)
                report.results.append(_run(check, subject, number))
    adapter.train(was_training)
    if raise_on_failure and report.failed:
        raise AssertionError(str(report))
    return report


def _choose_prompts(adapter: Adapter, prompts: Sequence[Prompt] | None) -> list[Prompt]:
    """Return three prompts, short and long; fewer are repeated."""
    if prompts is None:
        defaults = adapter.defaults()
        prompts = [*defaults.train[:50], *defaults.val[:50]] if defaults is not None else []
    if not prompts:
        name = type(adapter).__name__
        raise ValueError(
            f"{name} brings no prompts: call check_adapter(adapter, prompts=[...]), or give --prompts."
        )
    by_length = sorted(prompts, key=lambda prompt: len(prompt.text.split()))
    return [by_length[0], by_length[-1], by_length[len(by_length) // 2]]


def _run(check: Check, subject: Subject, rounds: int | None) -> Result:
    bound = subject.atol if check.bound is None else check.bound
    detail = ""
    value: float | None = math.nan  # of a check that could not be measured: it fails
    try:
        found = check.measure(subject)
        if isinstance(found, Finding):
            value, detail = found
        else:
            value, detail = found, "" if found is not None else "does not apply"
    except NoRolloutError:
        value, detail = None, "needs a rollout"
    except Exception as error:  # whatever an adapter under test raises is a finding
        detail = f"{type(error).__name__}: {error} ({_where(error, subject.adapter)})"
    if value is not None and math.isnan(value):
        detail = detail or "a value that is not finite, or another shape"
    return Result(check=check, rounds=rounds, value=value, bound=bound, detail=detail)


def _where(error: Exception, adapter: Adapter) -> str:
    """Return the place in the adapter's own files that an error came through, else where it arose."""
    classes = [c for c in type(adapter).__mro__ if issubclass(c, Adapter) and c is not Adapter]
    files = {getattr(sys.modules.get(c.__module__), "__file__", None) for c in classes}
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if frame.filename in files][-1:] or frames[-1:]
    return ", ".join(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in last)
