"""The command line: ``unigrpo fit|validate|test|predict|estimate --config configs/digits.yaml``."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI
from rich.console import Console

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.callbacks import IterationCheckpoint, RunReport
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.estimate import Estimate, Setup, estimate, report
from lightning_unigrpo.module import UniGRPOModule


class UniGRPOCLI(LightningCLI):
    """LightningCLI that tests the model before and after ``fit`` when a :class:`RunReport` is there."""

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
            if self.trainer.is_global_zero:
                report.write(self.trainer)

    def _report(self) -> RunReport | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, RunReport)), None)


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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return any trainer: what is asked for may need devices that this machine lacks."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def run_estimate(args: Sequence[str]) -> Estimate:
    """Run ``unigrpo estimate``: the arguments of ``fit``, ``--ranks`` and ``--prompt_tokens``."""
    own = ArgumentParser(prog="unigrpo estimate", add_help=False)
    own.add_argument("--ranks", type=int, default=1)
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
    trainer, strategy = cli.config.trainer, cli.config.trainer.strategy
    setup = Setup(
        ranks=known.ranks,
        strategy=strategy if isinstance(strategy, str) else strategy.class_path,
        precision=str(trainer.precision or "32-true"),
        prompts_per_iteration=cli.config.data.prompts_per_iteration,
        prompt_tokens=known.prompt_tokens,
    )
    found = estimate(cli.model, setup)
    report(found, setup)
    return found


def main() -> None:
    """Run the command line; a mistake of the user's is one screen, not a stack of frames."""
    try:
        if sys.argv[1:2] == ["estimate"]:
            run_estimate(sys.argv[2:])
        else:
            run()
    except (ArgumentError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("UNIGRPO_TRACEBACK") or not _is_ours(error):
            raise
        hint = "(UNIGRPO_TRACEBACK=1 shows where it was raised)"
        Console(stderr=True, soft_wrap=True).print(f"error: {error}\n{hint}", markup=False)
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
