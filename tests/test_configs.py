"""Every configuration parses, alone and with every overlay, and is what its comments say."""

from __future__ import annotations

import csv
import datetime
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_unigrpo import PromptDataModule, UniGRPOModule
from lightning_unigrpo.cli import training
from lightning_unigrpo.cli.estimate import run as run_estimate
from lightning_unigrpo.cli.training import UniGRPOCLI
from lightning_unigrpo.estimate import Estimate
from tests import ranks

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
NEED_CUDA = {"fsdp", "fsdp_hybrid", "fsdp_offload", "deepspeed_2", "deepspeed_3"}
"""Whose strategy refuses a CPU."""
RANKS = {"fsdp_hybrid": 16}
"""That an overlay fixes; 8 otherwise."""


class ParseOnly(UniGRPOCLI):
    """Builds nothing."""

    def instantiate_classes(self) -> None:
        """Leave it at the configuration."""


def parse(*files: Path, made: type[UniGRPOCLI] = ParseOnly, more: tuple[str, ...] = ()) -> Any:
    return made(
        UniGRPOModule,
        PromptDataModule,
        args=[*(f"--config={file}" for file in files), *more],
        run=False,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
    )


def named(name: str) -> Path:
    return CONFIGS / "overlays" / f"{name}.yaml"


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return the values of nested mappings by their keys."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, each in tree.items() for k, v in leaves(each, (*path, key)).items()}


def stems(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_there_are_overlays() -> None:
    """What docs/scaling.md names."""
    assert set(stems(OVERLAYS)) == NEED_CUDA | {"ddp", "fsdp2", "lora"}
    page = (CONFIGS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert {Path(name).stem for name in re.findall(r"overlays/(\w+)\.yaml", page)} == set(
        stems(OVERLAYS)
    )


@pytest.mark.parametrize("file", RUNS, ids=stems(RUNS))
def test_a_run_parses(file: Path) -> None:
    found = parse(file).config
    assert found.model.adapter.class_path
    assert found.trainer.max_steps > 0


@pytest.mark.parametrize("base", ["digits", "bagel_lora", "bagel_paper"])
@pytest.mark.parametrize("overlay", OVERLAYS, ids=stems(OVERLAYS))
def test_an_overlay_changes_what_it_names_and_nothing_else(base: str, overlay: Path) -> None:
    file = CONFIGS / f"{base}.yaml"
    if (base, overlay.stem) == ("digits", "lora"):  # that adapter has no LoRA
        with pytest.raises(Exception, match="lora"):
            parse(file, overlay)
        return
    before, after = (leaves(parse(*files).config.as_dict()) for files in ((file,), (file, overlay)))
    asked = leaves(yaml.safe_load(overlay.read_text(encoding="utf-8")))
    for path, value in asked.items():
        if path[-1] == "timeout":
            assert after[path] == datetime.timedelta(hours=1)
            continue
        found = getattr(after[path], "name", after[path])  # of an enum
        assert (list(found) if isinstance(found, tuple) else found) == value, path
    heads = {path[:2] for path in asked} | {("config",)}
    kept = {k: v for k, v in before.items() if k[:2] not in heads and k[0] != "config"}
    assert {k: after[k] for k in kept} == kept


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_what_a_cpu_can_run_becomes_a_trainer(name: str) -> None:
    strategy = parse(CONFIGS / "digits.yaml", named(name), made=UniGRPOCLI).trainer.strategy
    assert isinstance(strategy, {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy}[name])
    assert strategy._timeout == datetime.timedelta(hours=1)


@pytest.mark.parametrize("name", ["fsdp", "fsdp_hybrid", "fsdp_offload"])
def test_fsdp_is_built_as_written(name: str) -> None:
    """By its own class, which knows what goes together; only the trainer would look for GPUs."""
    given = yaml.safe_load(named(name).read_text(encoding="utf-8"))["trainer"]["strategy"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=FSDPStrategy)
    strategy = parser.instantiate_classes(parser.parse_object({"strategy": given})).strategy
    assert strategy.sharding_strategy.name == given["init_args"]["sharding_strategy"]
    assert strategy._state_dict_type == "sharded"
    assert strategy.kwargs.get("device_mesh") == ((2, 8) if name == "fsdp_hybrid" else None)
    assert (strategy.cpu_offload.offload_params) == (name == "fsdp_offload")
    with pytest.raises((ValueError, RuntimeError), match="requires a GPU accelerator"):
        Trainer(accelerator="cpu", strategy=strategy)


def test_deepspeed_clips_as_the_module_says() -> None:
    """It takes model.optim.max_grad_norm; a norm of its own would be refused beside that."""
    for name, stage in (("deepspeed_2", 2), ("deepspeed_3", 3)):
        found = parse(CONFIGS / "bagel_paper.yaml", named(name)).config
        assert found.trainer.strategy.init_args.stage == stage
        assert found.trainer.strategy.init_args.config is None
        assert found.model.optim.max_grad_norm == 1.0


def estimated(capsys: pytest.CaptureFixture[str], *arguments: str) -> Estimate:
    found = run_estimate(arguments)
    assert "while learning" in capsys.readouterr().out
    return found


@pytest.mark.parametrize("overlay", OVERLAYS, ids=stems(OVERLAYS))
def test_estimates(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With or without DeepSpeed, with or without GPUs."""
    files = [f"--config={CONFIGS / 'bagel_paper.yaml'}", f"--config={overlay}"]
    found = estimated(capsys, *files, f"--ranks={RANKS.get(overlay.stem, 8)}")
    whole = found.parameters * (2 if overlay.stem in ("lora", "deepspeed_2", "deepspeed_3") else 4)
    parts = 1 if overlay.stem in ("ddp", "lora", "deepspeed_2") else 8
    # LoRA's own weights are float32.
    assert found.memory["weights"] == pytest.approx(whole / parts, rel=0.05)
    assert bool(found.on_host) == (overlay.stem == "fsdp_offload")
    assert bool(found.traffic) == ("deepspeed" not in overlay.stem)


@pytest.mark.parametrize("kind", ["NO_SHARD", "SHARD_GRAD_OP"])
def test_other_ways_to_shard_are_read(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They arrive as members of an enum."""
    files = [f"--config={CONFIGS / 'bagel_paper.yaml'}", f"--config={named('fsdp')}", "--ranks=8"]
    full = estimated(capsys, *files)
    found = estimated(capsys, *files, f"--trainer.strategy.init_args.sharding_strategy={kind}")
    if kind == "NO_SHARD":
        assert found.memory["weights"] == pytest.approx(8 * full.memory["weights"], rel=1e-6)
        assert found.traffic["update"].shards == 0 < found.traffic["update"].replicas
    else:  # whole from the first forward on
        assert found.memory == full.memory
        assert found.traffic["update"].shards < 0.7 * full.traffic["update"].shards


def test_an_overlay_says_how_many_ranks_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    paper = f"--config={CONFIGS / 'bagel_paper.yaml'}"
    for name, number in (("fsdp_hybrid", 16), ("fsdp2", 8)):
        found = estimated(capsys, paper, f"--config={named(name)}")
        assert found.decode_steps * found.rollout_rows == 32 * 24 * 1024 / number
        with pytest.raises(ValueError, match="--ranks is 4"):
            run_estimate([paper, f"--config={named(name)}", "--ranks=4"])


# ---- on two ranks

SMALL = """
trainer:
  max_steps: 4
  limit_val_batches: 0
  callbacks: null
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: ., name: null, version: found}
data: {prompts_per_iteration: 2}
model:
  sampling: {group_size: 4}
  optim: {ppo_epochs: 2, micro_batch_size: 1}
"""


def fit(folder: Path, overlay: str, *more: str) -> None:
    """Train the embedded model as the command line does; ranks begin in the folder."""
    small = folder / "small.yaml"
    files = [CONFIGS / "digits.yaml", *([named(overlay)] if overlay else []), small]
    devices = f"--trainer.devices={os.environ['WORLD_SIZE']}"
    with mock.patch.object(training, "write_page"):  # which takes longer than the run
        training.run(["fit", *(f"--config={file}" for file in files), devices, *more])


def numbers(folder: Path) -> list[dict[str, float]]:
    with (folder / "found" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("reward", "loss", "grad_norm/text", "grad_norm/flow", "flow/velocity_mse")
    return [{key: float(row[key]) for key in keys} for row in rows]


@pytest.mark.dist
@pytest.mark.slow
def test_overlays_train_as_one_process(tmp_path: Path) -> None:
    """FSDP by the class that names the CPU, which Lightning's does not; its arguments are the overlay's."""
    more = {
        "ddp": (),
        "fsdp": ("--trainer.strategy.class_path=tests.ranks.CPUFSDPStrategy",),
        "fsdp2": ("--trainer.strategy.init_args.data_parallel_size=2",),
    }
    for overlay in ("", *more):
        folder = tmp_path / (overlay or "single")
        folder.mkdir()
        (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
        number = 2 if overlay else 1
        ranks.run("tests.test_configs:fit", number, folder, overlay, *more.get(overlay, ()))
    expected = numbers(tmp_path / "single")
    assert len(expected) == 2
    for overlay in more:
        for one, other in zip(numbers(tmp_path / overlay), expected, strict=True):
            # float32 sums in another order; AdamW divides by the root of small squares
            assert one == pytest.approx(other, rel=2e-3, abs=1e-6), overlay
    config = (tmp_path / "fsdp" / "found" / "config.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(config)["trainer"]["strategy"]
    assert given["class_path"] == "tests.ranks.CPUFSDPStrategy"
    assert given["init_args"]["state_dict_type"] == "sharded"
