"""Keep some groups of a run on the disk: what was asked, thought, drawn, and what it was worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.records import (
    Record,
    record,
    trim,
    worth_by_round,
    write_records,
)
from lightning_unigrpo.types import Trajectory

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class RolloutRecorder(UniGRPOCallback):
    """Write some groups of a run into ``rollouts`` in the logger's folder, for ``unigrpo report``.

    ``groups.jsonl`` holds a line per group: iteration, prompt, the names of its input images in ``images``,
    and for each member reasoning, rewards, advantage and the name of its last image. Where a plan has more
    than texts and an image, a member has ``rounds`` as well: of each the user's ``turn`` where there was
    one, ``reasoning``, ``image``, ``reward`` where it was scored (``objective.round_rewards``) and
    ``advantage``; and ``ended`` says why there are no more: ``plan``, ``phrase`` or ``user``.
    ``samples.jsonl`` holds the first test prompts in the same form, under ``base`` before training and
    ``trained`` after it. The last iteration is written too, also of a run that is interrupted.

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
        self._worth: dict[tuple[int, int], list[float]] = {}
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
            self._attempt(lambda: self._take(experience, module))
            if experience.iteration % self.every == 0:
                self._flush(module)

    def _take(self, experience: Experience, module: UniGRPOModule) -> None:
        """Hold groups as plain data: any iteration may turn out to be the last."""
        size, worth = module.sampling.group_size, worth_by_round(experience, module.objective)
        self._pending = [
            record(
                group,
                title="train",
                iteration=experience.iteration,
                size=size,
                sampling=module.sampling,
                worth=worth,
            )
            for group in choose_groups(experience.trajectories, self.groups, size)
        ]

    def _flush(self, module: LightningModule) -> None:
        self._write("groups.jsonl", self._pending, cast("UniGRPOModule", module))
        self._pending = []

    def _write(self, name: str, records: Sequence[Record], module: UniGRPOModule) -> None:
        for each in records:
            self._attempt(partial(each.finish, module.adapter, module.device))
        self._attempt(lambda: write_records(self._folder, name, records))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._flush(pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._samples, self._worth = [], {}

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
        experience: Experience = outputs["experience"]
        taken = experience.trajectories[: self.num_samples - len(self._samples)]
        if trainer.is_global_zero and taken:
            self._samples += taken
            objective = cast("UniGRPOModule", pl_module).objective
            self._attempt(lambda: self._worth.update(worth_by_round(experience, objective)))

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._attempt(lambda: self._write_samples(cast("UniGRPOModule", pl_module)))
        self._samples, self._worth = [], {}

    def _write_samples(self, module: UniGRPOModule) -> None:
        trim(self._folder / "samples.jsonl", lambda line: line["title"] != self._title)
        records = [
            record(
                group,
                title=self._title,
                iteration=module.iteration,
                size=len(group),
                sampling=module.eval_sampling,
                worth=self._worth,
            )
            for group in choose_groups(self._samples, self.num_samples, 1)
        ]
        self._write("samples.jsonl", records, module)

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
