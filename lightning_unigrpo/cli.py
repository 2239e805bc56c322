"""The command line: ``unigrpo fit|validate|test|predict|estimate --config configs/digits.yaml``.

``unigrpo consolidate FOLDER`` makes one file of a checkpoint that several ranks wrote;
``unigrpo serve-reward --config serve.yaml`` puts a reward behind HTTP.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.callbacks import IterationCheckpoint, RunReport
from lightning_unigrpo.callbacks.checkpoint import lost_a_rank
from lightning_unigrpo.checkpoint import (
    MANIFEST,
    META,
    accept,
    consolidate,
    find_whole,
    latest_checkpoint,
)
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.estimate import Estimate, Setup, estimate, report
from lightning_unigrpo.module import UniGRPOModule


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
        """Measure the trained model and write the report, unless the run was interrupted."""
        report = self._report()
        checkpoints = [
            c for c in self.trainer.checkpoint_callbacks if isinstance(c, IterationCheckpoint)
        ]
        if report is not None and not any(c.interrupted for c in checkpoints):
            self.trainer.test(self.model, self.datamodule, verbose=False)
            report.write(self.trainer)

    def _report(self) -> RunReport | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, RunReport)), None)


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


def run(args: ArgsType = None) -> UniGRPOCLI:
    """Run the command line and return what it built; ``args`` as in ``sys.argv[1:]``."""
    # https://github.com/Lightning-AI/pytorch-lightning/issues/21326: nothing a user could act on
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning)
    return UniGRPOCLI(
        UniGRPOModule,
        PromptDataModule,
        args=args,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"exit_on_error": False},  # main() prints the error without 60 lines of usage
    )


class EstimateCLI(UniGRPOCLI):
    """Reads the same configurations, and builds sizes instead of weights."""

    def before_instantiate_classes(self) -> None:
        """Put the strategy aside: to build it may need a package or devices that this machine lacks."""
        self.strategy, self.config.trainer.strategy = self.config.trainer.strategy, "auto"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return any trainer: what is asked for may need devices that this machine lacks."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def run_estimate(args: Sequence[str]) -> Estimate:
    """Run ``unigrpo estimate``: the arguments of ``fit``, ``--ranks`` and ``--prompt_tokens``."""
    own = ArgumentParser(prog="unigrpo estimate", add_help=False)
    own.add_argument("--ranks", type=int)
    own.add_argument("--prompt_tokens", type=int, default=64)
    known, rest = own.parse_known_args(args)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)
    token = SIZES_ONLY.set(True)
    try:
        cli = EstimateCLI(
            UniGRPOModule,
            PromptDataModule,
            args=rest,
            run=False,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs={"exit_on_error": False},
        )
        cli.model.adapter.materialize()
    finally:
        SIZES_ONLY.reset(token)
    setup = Setup.read(
        cli.strategy,
        ranks=known.ranks,
        precision=str(cli.config.trainer.precision or "32-true"),
        prompts_per_iteration=cli.config.data.prompts_per_iteration,
        prompt_tokens=known.prompt_tokens,
    )
    found = estimate(cli.model, setup)
    report(found, setup)
    return found


def run_consolidate(args: Sequence[str]) -> Path:
    """Run ``unigrpo consolidate FOLDER [--output FILE]``."""
    parser = ArgumentParser(prog="unigrpo consolidate", description=consolidate.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    known = parser.parse_args(args)
    file = consolidate(known.folder, known.output)
    Console().print(str(file), highlight=False, soft_wrap=True)
    return file


def run_serve(args: Sequence[str]) -> None:
    """Run ``unigrpo serve-reward``: the arguments of :func:`lightning_unigrpo.serve.build`, flat."""
    from lightning_unigrpo import serve

    parser = jsonargparse.ArgumentParser(prog="unigrpo serve-reward", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(serve.build, skip={"limits"}, sub_configs=True)
    limits = parser.add_class_arguments(serve.Limits)
    known = parser.instantiate(parser.parse_args(args)).as_dict()
    known.pop("config")
    settings = serve.Limits(**{name: known.pop(name) for name in limits})
    serve.run(serve.build(**known, limits=settings))


def main() -> None:
    """Run the command line; a mistake of the user's is one screen, not a stack of frames."""
    try:
        if sys.argv[1:2] == ["estimate"]:
            run_estimate(sys.argv[2:])
        elif sys.argv[1:2] == ["consolidate"]:
            run_consolidate(sys.argv[2:])
        elif sys.argv[1:2] == ["serve-reward"]:
            run_serve(sys.argv[2:])
        else:
            run()
    except (ArgumentError, ValueError, OSError, RuntimeError) as error:
        lost = lost_a_rank(error)
        if os.environ.get("UNIGRPO_TRACEBACK") or not (lost or _is_ours(error)):
            raise
        text = "\n".join([str(error), *getattr(error, "__notes__", ())])
        hint = "(UNIGRPO_TRACEBACK=1 shows where it was raised)"
        Console(stderr=True, soft_wrap=True).print(f"error: {text}\n{hint}", markup=False)
        sys.exit(1)


def _is_ours(error: BaseException) -> bool:
    """Whether this package, or the parser on its behalf, raised the error on purpose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.split(".")[0] in {"lightning_unigrpo", "jsonargparse"}


if __name__ == "__main__":
    main()
