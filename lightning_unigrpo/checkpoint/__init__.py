"""What a run that dies leaves behind, and how the next one takes it up."""

from lightning_unigrpo.checkpoint.accept import accept, look_first, notes
from lightning_unigrpo.checkpoint.consolidate import consolidate
from lightning_unigrpo.checkpoint.files import (
    LAST,
    MANIFEST,
    META,
    fault,
    find_whole,
    keep_copy,
    latest_checkpoint,
    part_of,
    publish,
    remove,
    tidy,
)
from lightning_unigrpo.checkpoint.generators import States, get_states, set_states
from lightning_unigrpo.checkpoint.optimizer import by_name
from lightning_unigrpo.checkpoint.origin import ORIGIN, Origin, describe

__all__ = [
    "LAST",
    "MANIFEST",
    "META",
    "ORIGIN",
    "Origin",
    "States",
    "accept",
    "by_name",
    "consolidate",
    "describe",
    "fault",
    "find_whole",
    "get_states",
    "keep_copy",
    "latest_checkpoint",
    "look_first",
    "notes",
    "part_of",
    "publish",
    "remove",
    "set_states",
    "tidy",
]
