"""What a checkpoint says about the run that wrote it, and what follows for the run that reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from torch import nn

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.config import Objective, Optim, Sampling

Origin: TypeAlias = dict[str, Any]
"""Texts, numbers, lists and dictionaries only: it stands in a file of tensors, or in a manifest."""
ORIGIN = "unigrpo"
"""The key under which a checkpoint in one file holds it."""
NO_MATTER = {
    "rows_per_chunk",
    "cache_gib",
    "rollout_weights",
    "micro_batch_size",
    "activation_gib",
    *(f"eval_{name}" for name in ("num_timesteps", "temperature", "top_k", "top_p")),
    "guidance_scale",
}
"""Settings without effect on training."""
RESTORED = {"text_lr", "flow_lr", "betas", "warmup_steps"}
"""Settings that come back with the state of the optimizer."""


def describe(
    adapter: Adapter, net: nn.Module, sampling: Sampling, objective: Objective, optim: Optim
) -> Origin:
    """Return what has to be the same in the run that goes on, or be told when it is not.

    Args:
        adapter: the policy.
        net: its network in one piece, perhaps without memory.
        sampling: settings.
        objective: likewise.
        optim: likewise.
    """
    settings: dict[str, Any] = {"sampling": sampling, "objective": objective, "optim": optim}
    found = {
        "adapter": type(adapter).__name__,
        "parameters": {name: list(p.shape) for name, p in net.named_parameters()},
        "trained": [name for name, p in net.named_parameters() if p.requires_grad],
        "settings": {part: asdict(values) for part, values in settings.items()},
    }
    restored: Origin = json.loads(json.dumps(found))  # as it will be read: lists for tuples
    return restored


def refusals(theirs: Origin, ours: Origin, *, fitting: bool) -> Iterator[str]:
    """Yield why a checkpoint does not fit this run.

    Args:
        theirs: of the checkpoint.
        ours: of this run.
        fitting: whether training goes on, with the optimizer's state.
    """
    if theirs["adapter"] != ours["adapter"]:
        yield f"it is of the adapter {theirs['adapter']}, and model.adapter is {ours['adapter']}"
    saved, own = theirs["parameters"], ours["parameters"]
    wrong = [
        f"{name}: {_shape(saved, name)} in the checkpoint, {_shape(own, name)} in the model"
        for name in sorted(saved.keys() | own.keys())
        if saved.get(name) != own.get(name)
    ]
    if wrong:
        yield f"its network is another one:\n{_some(wrong)}"
    elif fitting:
        before, now = set(theirs["trained"]), set(ours["trained"])
        other = [f"{name}: was trained, is frozen" for name in sorted(before - now)]
        other += [f"{name}: was frozen, is trained" for name in sorted(now - before)]
        if other:
            yield (
                f"the state of its optimizer is for other weights:\n{_some(other)}\nSet "
                "model.sampling.plan, model.optim.text_lr, model.optim.flow_lr and what model.adapter "
                "freezes as they were, or begin a new run from the weights alone"
            )


def _shape(parameters: Mapping[str, list[int]], name: str) -> str:
    return str(parameters.get(name, "missing"))


def _some(lines: Sequence[str]) -> str:
    more = [f"  and {len(lines) - 6} more"] if len(lines) > 6 else []
    return "\n".join([*(f"  {line}" for line in lines[:6]), *more])


def changes(theirs: Origin, ours: Origin) -> list[str]:
    """Return the settings that differ, with both values, where they matter for what is trained."""
    return [
        f"model.{part}.{key}: {theirs['settings'][part][key]} -> {value}"
        + (" (the checkpoint's stays)" if key in RESTORED else "")
        for part, settings in ours["settings"].items()
        for key, value in settings.items()
        if key not in NO_MATTER and theirs["settings"].get(part, {}).get(key, value) != value
    ]
