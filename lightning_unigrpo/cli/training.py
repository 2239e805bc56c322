"""``unigrpo fit|validate|test|predict``: Lightning's command line for :class:`UniGRPOModule`."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
from jsonargparse import SUPPRESS, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_unigrpo.callbacks import IterationCheckpoint, RunReport
from lightning_unigrpo.callbacks.report import write_page
from lightning_unigrpo.checkpoint import MANIFEST, META, accept, find_whole, latest_checkpoint
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.environment import describe
from lightning_unigrpo.module import UniGRPOModule

CLI = TypeVar("CLI", bound="UniGRPOCLI")


class UniGRPOCLI(LightningCLI):
    """LightningCLI that tests the model before and after ``fit`` when a :class:`RunReport` is there."""

    def _parse_ckpt_path(self) -> None:
        """Name the checkpoint; Lightning would read all of it here, for settings that ours does not hold."""
        command = self.config.get("subcommand")
        asked = self.config[command].get("ckpt_path") if command else None
        if asked:
            found = find_checkpoint(str(asked), self.config[command].trainer)
            if found is None and command != "fit":
                raise ValueError(f"ckpt_path is {asked}, and no checkpoint was written yet.")
            self.config[command]["ckpt_path"] = found and str(found)

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint that does not fit, before the weights of the model are read."""
        path = self.subcommand and self._get(self.config_init, "ckpt_path")
        if path and "://" not in str(path):
            self.model.trainer = self.trainer
            accept(
                find_whole(Path(path)),
                self.model.origin(),
                fitting=self.subcommand == "fit",
                weights_only=self._get(self.config_init, "weights_only"),
            )

    def before_fit(self) -> None:
        """Measure the base model on the test prompts."""
        if self._report() is not None:
            self.trainer.test(self.model, self.datamodule, verbose=False)

    def after_fit(self) -> None:
        """Make the page about the run, after the test that a :class:`RunReport` asks for."""
        report, folder = self._report(), self.trainer.log_dir  # asks the first rank
        checkpoints = [
            c for c in self.trainer.checkpoint_callbacks if isinstance(c, IterationCheckpoint)
        ]
        if report is not None and not any(c.interrupted for c in checkpoints):
            self.trainer.test(self.model, self.datamodule, verbose=False)
            report.write(self.trainer)
        elif self.trainer.loggers and folder is not None and self.trainer.is_global_zero:
            write_page(Path(folder))
            rank_zero_info(f"The run as a page: {Path(folder) / 'report.html'}")

    def _report(self) -> RunReport | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, RunReport)), None)


class SettingsCLI(UniGRPOCLI):
    """Reads the configurations of ``fit``, that of a finished run too, and runs nothing."""

    strategy: Any
    """What ``trainer.strategy`` asks for."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take what a run's own config.yaml holds beside trainer, model and data."""
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", type=str | bool | None, help=SUPPRESS)

    @override
    def before_instantiate_classes(self) -> None:
        """Put the strategy aside: to build it may need a package or devices that this machine lacks."""
        self.strategy, self.config.trainer.strategy = self.config.trainer.strategy, "auto"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return any trainer: what is asked for may need devices that this machine lacks."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    @override
    def after_instantiate_classes(self) -> None:
        self.model.trainer = self.trainer


def find_checkpoint(asked: str, trainer: Namespace) -> Path | str | None:
    """Return the checkpoint that a command line asks for.

    Args:
        asked: a path; or a folder of runs, which stands for the newest whole checkpoint in it; or
            ``last``, for the newest of this configuration.
        trainer: the configuration's part, which says where its runs are.

    Returns:
        A path; None where ``last`` finds nothing, so that a run begins.

    Raises:
        ValueError: when a folder holds none.
    """
    if asked == "last":
        folders = run_folders(trainer)
        found = latest_checkpoint(*folders)
        told = found or f"none yet in {' and '.join(folders)}, so this run begins"
        rank_zero_info(f"ckpt_path last: {told}")
        return found
    path = Path(asked)
    if not path.is_dir() or (path / META).is_file() or (path / MANIFEST).is_file():
        return asked
    found = latest_checkpoint(path)
    if found is None:
        raise ValueError(f"ckpt_path is {asked}, a folder without a whole checkpoint in it.")
    return found


def run_folders(trainer: Namespace) -> list[str]:
    """Return where a configuration's runs put their checkpoints."""
    places = [trainer.get("default_root_dir") or "lightning_logs"]
    for key in ("callbacks", "logger"):
        given = trainer.get(key)
        for entry in given if isinstance(given, list) else [given]:
            arguments = entry.get("init_args", {}) if isinstance(entry, Namespace) else {}
            places += [arguments[name] for name in ("dirpath", "save_dir") if arguments.get(name)]
    return list(dict.fromkeys(map(str, places)))


class SaveRun(SaveConfigCallback):
    """Save, beside the configuration, what the run ran on: ``environment.json``."""

    folder: str | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = trainer.log_dir  # asks the first rank, so all of them ask
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write; Lightning calls it on the first rank only."""
        if self.folder is not None:
            text = json.dumps(describe(), indent=1)
            (Path(self.folder) / "environment.json").write_text(text + "\n", encoding="utf-8")


def asks_for_help(args: ArgsType) -> bool:
    """Whether a command line prints what settings do.

    Example:
        >>> asks_for_help(["fit", "--model.sampling.help"]), asks_for_help(["fit", "--print_config"])
        (True, False)
    """
    words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
    return any(
        re.fullmatch(r"-h|--(.+\.)?help|--print_config=.*comments.*", word) for word in words
    )


def build(cli: type[CLI], args: ArgsType = None, **settings: Any) -> CLI:
    """Return a command line that was run, with the settings that all of ours share.

    Args:
        cli: the class.
        args: as in ``sys.argv[1:]``.
        settings: of the class, beside those.
    """
    # https://github.com/Lightning-AI/pytorch-lightning/issues/21326: nothing a user could act on
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
    # The fields of settings are documented below each, which takes a second to read; ${a.b} is rooted at the
    # file, not at a command.
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=asks_for_help(args),
        omegaconf_absolute_to_relative_paths=True,
    )
    return cli(
        UniGRPOModule,
        PromptDataModule,
        args=args,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        # Our own main() prints the error without 60 lines of usage.
        parser_kwargs={"exit_on_error": False, "parser_mode": "omegaconf+"},
        **settings,
    )


def run(args: ArgsType = None, cli: type[UniGRPOCLI] = UniGRPOCLI, **settings: Any) -> UniGRPOCLI:
    """Run the command line and return what it built.

    Args:
        args: as in ``sys.argv[1:]``.
        cli: the class.
        settings: of the class, beside those of all.
    """
    return build(
        cli,
        args,
        save_config_callback=SaveRun,
        save_config_kwargs={"overwrite": True},
        **settings,
    )
