"""``unigrpo estimate``: what a configuration needs, without its weights."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.cli.training import SettingsCLI, build
from lightning_unigrpo.estimate import Estimate, Setup, estimate, report


def run(arguments: Sequence[str]) -> Estimate:
    """Run ``unigrpo estimate``: the arguments of ``fit``, ``--ranks`` and ``--prompt_tokens``."""
    own = ArgumentParser(prog="unigrpo estimate", add_help=False)
    own.add_argument("--ranks", type=int)
    own.add_argument("--prompt_tokens", type=int, default=64)
    known, rest = own.parse_known_args(arguments)
    token = SIZES_ONLY.set(True)
    try:
        cli = build(SettingsCLI, rest, run=False, save_config_callback=None)
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
