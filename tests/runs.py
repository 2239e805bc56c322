"""Folders of runs that never ran, for the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def group(iteration: int, *, prompt: str = "draw", size: int = 1, **member: Any) -> dict[str, Any]:
    """Return the line of a group whose members differ in nothing but their number."""
    usual = {
        "reasoning": "because",
        "rewards": {"judge": 0.5},
        "reward": 0.5,
        "advantage": 0.25,
        "stopped": True,
        "usable": True,
        "image": None,
    }
    return {
        "title": "train",
        "iteration": iteration,
        "group": 0,
        "prompt_id": 0,
        "prompt": prompt,
        "size": size,
        "members": [usual | member | {"member": i} for i in range(size)],
    }


def fill(folder: Path, groups: Sequence[dict[str, Any]], name: str = "groups.jsonl") -> Path:
    """Write groups where a recorder does, and return the folder."""
    (folder / "rollouts" / "images").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(each) + "\n" for each in groups)
    (folder / "rollouts" / name).write_text(text)
    return folder
