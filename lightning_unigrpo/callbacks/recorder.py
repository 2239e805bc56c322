"""Keep some groups of a run on the disk: what was asked, thought, drawn, and what it was worth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL.Image import Image
from typing_extensions import override

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.reward import convert_images
from lightning_unigrpo.types import Trajectory, sampled

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule

SMALL = 128
"""Images of at most this many pixels a side are kept as PNG, larger ones as JPEG: at 1024 pixels it is
written in 4 ms, WebP in 125, and a thumbnail is made without reading all of it."""


@dataclass
class Record:
    """One group as it is written: a line of JSON, and the images that it names."""

    line: dict[str, Any]
    pictures: dict[str, Image] = field(default_factory=dict)


class RolloutRecorder(UniGRPOCallback):
    """Write some groups of a run into ``rollouts`` in the logger's folder, for ``unigrpo report``.

    ``groups.jsonl`` holds a line per group: iteration, prompt, and for each member reasoning, rewards,
    advantage and the name of its image in ``images``, and of those of earlier rounds where they are
    scored (``objective.round_rewards``). ``samples.jsonl`` holds the first test prompts
    in the same form, under ``base`` before training and ``trained`` after it. The last iteration is
    written too, also of a run that is interrupted.

    The first rank writes, and only what it drew itself: a group that lies on several ranks is written
    in part, with its full size beside it. A full disk costs pictures, never the run. A run that goes on
    in the same folder drops what was recorded from its checkpoint's iteration on, and draws it again.

    Args:
        every: iterations between recorded ones, from the first on.
        groups: of each recorded iteration; whole ones are preferred.
        num_samples: test images kept before, and after training.
    """

    def __init__(self, every: int = 10, groups: int = 2, num_samples: int = 8) -> None:
        if min(every, groups, num_samples) < 1:
            raise ValueError(
                f"RolloutRecorder got every={every}, groups={groups} and num_samples={num_samples}; give "
                "1 or more of each."
            )
        self.every, self.groups, self.num_samples = every, groups, num_samples
        self._pending: list[Record] = []
        self._samples: list[Trajectory] = []
        self._title = "base"
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here, where all ranks are: log_dir asks the first one.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "rollouts"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._title, first = "trained", int(pl_module.iteration)  # type: ignore[arg-type]
        if trainer.is_global_zero:
            self._attempt(
                lambda: trim(self._folder / "groups.jsonl", lambda line: line["iteration"] < first)
            )

    @override
    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        if trainer.is_global_zero:
            self._attempt(lambda: self._take(experience, module.sampling.group_size))
            if experience.iteration % self.every == 0:
                self._flush()

    def _take(self, experience: Experience, size: int) -> None:
        """Hold groups as plain data: any iteration may turn out to be the last."""
        chosen = choose_groups(experience.trajectories, self.groups, size)
        self._pending = [
            record(group, title="train", iteration=experience.iteration, size=size)
            for group in chosen
        ]

    def _flush(self) -> None:
        self._attempt(lambda: write_records(self._folder, "groups.jsonl", self._pending))
        self._pending = []

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._flush()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples = []

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        drawn: list[Trajectory] = outputs["experience"].trajectories
        self._samples += drawn[: self.num_samples - len(self._samples)]

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._attempt(lambda: self._write_samples(int(pl_module.iteration)))  # type: ignore[arg-type]
        self._samples = []

    def _write_samples(self, iteration: int) -> None:
        trim(self._folder / "samples.jsonl", lambda line: line["title"] != self._title)
        groups = choose_groups(self._samples, self.num_samples, 1)
        records = [
            record(group, title=self._title, iteration=iteration, size=len(group))
            for group in groups
        ]
        write_records(self._folder, "samples.jsonl", records)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Let nothing that happens while writing end a run of days."""
        try:
            action()
        except Exception as error:
            if not self._warned:
                rank_zero_warn(
                    f"RolloutRecorder could not write to {self._folder} ({type(error).__name__}: {error}). "
                    "Training goes on; groups that cannot be written will be missing in the report."
                )
            self._warned = True


def choose_groups(
    trajectories: Sequence[Trajectory], count: int, size: int
) -> list[list[Trajectory]]:
    """Return the first groups, whole ones before those of which other ranks hold a part.

    Args:
        trajectories: of this rank, in any order.
        count: at most so many groups.
        size: members of a whole group.
    """
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    return sorted(groups.values(), key=lambda group: len(group) < size)[:count]


def record(group: Sequence[Trajectory], *, title: str, iteration: int, size: int) -> Record:
    """Turn the members of one group into what is written of them.

    Args:
        group: trajectories of one prompt, at least one.
        title: ``train``, ``base`` or ``trained``.
        iteration: the group was drawn in, or the number of them before a test.
        size: members of the whole group, on all ranks.
    """
    prompt, members = group[0].prompt, []
    pictures: dict[str, Image] = {}
    for trajectory in group:
        drawn = {
            f"{title}-{iteration:06d}-{trajectory.group}-{trajectory.member}{place}": image
            for place, image in _images(trajectory).items()
        }
        named = {_file(name, picture): picture for name, picture in drawn.items()}
        pictures |= named
        files = [*named]
        last = files[-1] if files else None
        members.append(_member(trajectory) | {"image": last, "earlier": files[:-1]})
    line = {
        "title": title,
        "iteration": iteration,
        "group": group[0].group,
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "size": size,
        "members": members,
    }
    return Record(line, pictures)


def _images(trajectory: Trajectory) -> dict[str, Image]:
    """Return what was drawn, in order, by what its name ends with: of the last image nothing."""
    if trajectory.image is None:
        return {}
    earlier = [each.image for each in trajectory.rounds[:-1]]
    pictures = convert_images([x.detach().float() for x in (*earlier, trajectory.image)], "pil")
    ends = [*(f"-round{number}" for number in range(1, len(pictures))), ""]
    return dict(zip(ends, pictures, strict=True))


def _file(name: str, picture: Image) -> str:
    return f"{name}.png" if max(picture.size) <= SMALL else f"{name}.jpg"


def _member(trajectory: Trajectory) -> dict[str, Any]:
    segment = next((segment for _, segment in sampled([trajectory])), None)
    return {
        "member": trajectory.member,
        "reasoning": trajectory.completion,
        "rewards": {name: _finite(value) for name, value in trajectory.rewards.items()},
        "reward": _finite(trajectory.reward),
        "advantage": None if segment is None else _finite(segment.advantage),
        "stopped": trajectory.stopped,
        "usable": trajectory.usable,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def write_records(folder: Path, name: str, records: Sequence[Record]) -> None:
    """Append groups to a file of JSON lines, after their images: a line never names one that is missing.

    Args:
        folder: ``rollouts`` of a run; made when it is missing.
        name: of the file in it.
        records: may be empty.
    """
    if not records:
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for each in records:
        for file, picture in each.pictures.items():
            picture.save(folder / "images" / file, quality=90)  # which PNG does not have
    with (folder / name).open("a", encoding="ascii") as table:
        table.writelines(json.dumps(each.line) + "\n" for each in records)


def trim(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines from a file of JSON lines, those that a killed writer left unfinished among them.

    Args:
        path: the file, which may be missing.
        keep: says of a line whether it stays.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    part = path.with_suffix(".part")
    part.write_text("".join(f"{line}\n" for line in lines if _stays(line, keep)), encoding="ascii")
    part.replace(path)


def _stays(line: str, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(json.loads(line))
    except ValueError:
        return False
