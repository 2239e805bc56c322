"""What a run achieved, on one screen and on one page: a table, a curve, samples before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.figures import reward_curve, sample_grid
from lightning_unigrpo.callbacks.rounds import with_rounds
from lightning_unigrpo.report import write
from lightning_unigrpo.types import Trajectory

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class RunReport(UniGRPOCallback):
    """Compare the model before and after training on the test prompts.

    The command line runs ``test`` before and after ``fit`` when this callback is present; in Python call
    ``trainer.test`` twice. Writes ``report.json``, ``reward_curve.png``, ``samples.png`` and the page
    ``report.html`` into the logger's folder (or ``trainer.default_root_dir``), and prints a table that
    says where they lie.

    Args:
        num_samples: test prompts in the before/after grid.
    """

    def __init__(self, num_samples: int = 8) -> None:
        if num_samples < 1:
            raise ValueError(f"RunReport.num_samples is {num_samples}; give 1 or more.")
        self.num_samples = num_samples
        self.metrics: dict[str, dict[str, float]] = {}
        self.samples: dict[str, list[Trajectory]] = {}
        self.train: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self._title = "base"

    @override
    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        self.train.append((experience.iteration, experience.metrics["reward"]))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and "val/reward" in trainer.callback_metrics:
            iteration = int(pl_module.iteration)  # type: ignore[arg-type]
            self.held_out.append((iteration, float(trainer.callback_metrics["val/reward"])))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._title = "trained"

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.samples[self._title] = []

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
        kept = self.samples[self._title]
        taken = outputs["experience"].trajectories[: self.num_samples - len(kept)]
        adapter = cast("UniGRPOModule", pl_module).adapter
        kept += [with_rounds(adapter, trajectory) for trajectory in taken]

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
        self.metrics[self._title] = values

    def write(self, trainer: Trainer) -> Path:
        """Write the files and print the table, on the first rank; return the folder. For all ranks."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the first rank
        if not trainer.is_global_zero:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        record = {"test": self.metrics, "train": self.train, "held_out": self.held_out}
        (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        reward_curve(self.train, self.held_out).savefig(folder / "reward_curve.png", dpi=120)
        sample_grid(self.samples).savefig(folder / "samples.png", dpi=120)
        console = Console()
        console.print(self.table())
        write_page(folder)
        names = ("reward_curve.png", "samples.png", "report.json", "report.html")
        for name in (name for name in names if (folder / name).exists()):
            console.print(f"{folder / name}", highlight=False, soft_wrap=True)
        return folder

    def table(self) -> Table:
        """Return the test metrics as a table, one column before and one after."""
        table = Table(title="held-out test prompts")
        table.add_column("metric")
        for title in self.metrics:
            table.add_column(title, justify="right")
        for key in next(iter(self.metrics.values()), {}):
            row = [f"{values.get(key, float('nan')):.3f}" for values in self.metrics.values()]
            table.add_row(key.removeprefix("test/"), *row)
        return table

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "held_out": self.held_out}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.held_out = list(state_dict["train"]), list(state_dict["held_out"])


def write_page(folder: Path) -> None:
    """Make ``report.html`` of a run's folder; what goes wrong is said, and stops nothing."""
    try:
        write(folder)
    except Exception as error:  # the run is over and saved: what went wrong here costs a page
        rank_zero_warn(
            f"report.html could not be made ({type(error).__name__}: {error}). unigrpo report {folder} "
            "tries again."
        )
