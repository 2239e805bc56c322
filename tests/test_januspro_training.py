"""Janus-Pro from the command line: shipped configurations train a tiny checkpoint, saved and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from lightning_unigrpo import UniGRPOModule
from lightning_unigrpo.adapters.januspro import JanusProAdapter
from lightning_unigrpo.cli.estimate import run as run_estimate
from lightning_unigrpo.cli.training import run
from tests.januspro import model, write_checkpoint
from tests.published import SENTENCES
from tests.test_januspro_checkpoint import load, outputs, outputs_of_transformers, same

CONFIGS = Path(__file__).parent.parent / "configs"


def brightness(images: Tensor, **_: Any) -> list[float]:
    """Reward a bright picture."""
    return images.flatten(1).mean(1).tolist()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(config: str, *extra: str, steps: int = 2) -> UniGRPOModule:
    """Run a shipped configuration at the size of the tiny model; the guard stops it where it must."""
    found = run(
        [
            "fit",
            f"--config={CONFIGS / config}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            f"--trainer.max_steps={steps}",
            "--trainer.default_root_dir=runs",
            "--trainer.enable_model_summary=false",
            "--model.adapter.init_args.source=base",
            "--model.rewards=[tests.test_januspro_training.brightness]",
            "--model.objective.truncation_reward=null",
            "--model.sampling.group_size=3",
            "--model.sampling.max_text_tokens=6",
            "--data.train=prompts.txt",
            "--data.prompts_per_iteration=2",
            *extra,
        ]
    ).model
    assert isinstance(found, UniGRPOModule)
    return found


def moved(saved: Path) -> set[str]:
    before, after = model().state_dict(), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.slow
def test_full_fine_tuning(folder: Path) -> None:
    """Two collections of two updates each; what is written is what was trained, in transformers too."""
    found = fit("januspro.yaml", "--trainer.precision=32-true", steps=4)
    adapter, saved = found.adapter, folder / "runs/januspro/pretrained"
    assert isinstance(adapter, JanusProAdapter)
    changed = moved(saved)
    assert {name.split(".")[1] for name in changed} == {
        "language_model",
        "weight",  # of lm_head
        "generation_embeddings",
        "generation_aligner",
        "generation_head",
    }
    adapter.system_prompt = None  # a setting, not in the files
    expected, again = outputs(adapter.eval()), load(saved)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(again), strict=True))
    theirs = JanusForConditionalGeneration.from_pretrained(saved).eval()
    same(expected, outputs_of_transformers(theirs, again))


@pytest.mark.slow
def test_t2i_r1(folder: Path) -> None:
    """In bf16-mixed, as it is shipped: only the Llama and its head move, and the tower is copied."""
    found = fit("januspro_t2ir1.yaml")
    assert found.trainer.precision == "bf16-mixed"
    assert found.trainer.global_step == 2
    changed = moved(folder / "runs/januspro_t2ir1/pretrained")
    assert {name.split(".")[1] for name in changed} == {"language_model", "weight"}
    metrics = found.trainer.callback_metrics
    assert float(metrics["text/kl"]) >= 0
    assert float(metrics["image/kl"]) >= 0


@pytest.mark.slow
def test_lora_over_two_rounds(folder: Path) -> None:
    """Think, draw, look, think, draw; the base is the reference."""
    found = fit(
        "januspro.yaml",
        "--model.adapter.init_args.lora.rank=2",
        "--model.adapter.init_args.dtype=bfloat16",
        "--model.sampling.plan=[text,image,text,image]",
        "--model.optim.text_lr=1e-2",
    )
    adapter = found.adapter
    assert isinstance(adapter, JanusProAdapter)
    trained = {name: p for name, p in adapter.net.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    changed = moved(folder / "runs/januspro/pretrained")
    assert {name.split(".")[1] for name in changed} == {"language_model"} | rounded()


def rounded() -> set[str]:
    """Return parts with weights that bfloat16 cannot hold: the frozen base was read in it."""
    return {
        name.split(".")[1]
        for name, value in model().state_dict().items()
        if not name.startswith(("model.vision_model", "model.aligner", "model.vqmodel"))
        and not torch.equal(value, value.bfloat16().float())
    }


@pytest.mark.parametrize(
    ("name", "overlays", "ranks", "parameters"),
    [("januspro", (), 1, 1_694_769_152), ("januspro_t2ir1", ("fsdp",), 8, 7_011_221_504)],
)
def test_shipped_configurations_fit(
    name: str, overlays: tuple[str, ...], ranks: int, parameters: int
) -> None:
    """From sizes alone, without a file and without a network, on GPUs of 80 GB."""
    files = [CONFIGS / f"{name}.yaml", *(CONFIGS / "overlays" / f"{o}.yaml" for o in overlays)]
    found = run_estimate([*(f"--config={file}" for file in files), f"--ranks={ranks}"])
    assert found.parameters == parameters
    assert max(found.rollout, found.update) < 75 * 2**30
    settings = yaml.safe_load(files[0].read_text(encoding="utf-8"))["model"]["sampling"]
    chunks, rest = divmod(found.decode_steps, settings["max_text_tokens"])
    assert rest == 0
    assert found.denoise_steps == chunks * 24 * 24  # a code after the other


def test_training_is_never_guided() -> None:
    for name in ("januspro", "januspro_t2ir1"):
        found = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
        assert found["sampling"]["guidance_scale"] == 1.0
        assert found["sampling"]["temperature"] == 1.0
        assert found["optim"]["ppo_epochs"] == 2
