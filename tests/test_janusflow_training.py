"""A JanusFlow in the published layout, trained from the command line: saved, loaded again, equal."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_unigrpo import UniGRPOModule
from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.adapters.janusflow import JanusFlowAdapter, load_janusflow
from lightning_unigrpo.cli.training import run
from lightning_unigrpo.guard import OnPolicyError
from lightning_unigrpo.testing import CHECKS, check_adapter
from tests import ranks
from tests.published import SENTENCES
from tests.published_janusflow import weights, write_checkpoint
from tests.test_janusflow import PROMPTS, drawn, load, outputs

CONFIG = Path(__file__).parent.parent / "configs" / "janusflow.yaml"


def brightness(images: Tensor, **_: object) -> list[float]:
    """Reward a bright picture."""
    return images.flatten(1).mean(1).tolist()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*extra: str, steps: int = 2) -> UniGRPOModule:
    """Run the shipped configuration at the size of the tiny model; the guard stops what disagrees."""
    adapter = "--model.adapter.init_args"
    model = run(
        [
            "fit",
            f"--config={CONFIG}",
            "--trainer.accelerator=cpu",
            f"--trainer.max_steps={steps}",
            "--trainer.default_root_dir=runs",
            "--trainer.enable_model_summary=false",
            f"{adapter}.source=base",
            f"{adapter}.vae=base/vae",
            f"{adapter}.default_size=[32,32]",
            "--model.rewards=[tests.test_janusflow_training.brightness]",
            "--model.objective.truncation_reward=null",
            "--model.sampling.group_size=3",
            "--model.sampling.max_text_tokens=6",
            "--model.sampling.num_timesteps=8",
            "--model.optim.text_lr=1e-3",
            "--model.optim.flow_lr=1e-3",
            "--data.train=prompts.txt",
            "--data.prompts_per_iteration=2",
            *extra,
        ]
    ).model
    assert isinstance(model, UniGRPOModule)
    return model


def write_outputs(folder: Path, saved: str, vae: str) -> None:
    """What a process that trained nothing computes."""
    found = outputs(load(saved, vae=vae))
    save_file({str(i): x.contiguous() for i, x in enumerate(found)}, folder / "outputs.safetensors")


def outputs_of_a_fresh_process(saved: Path, vae: Path) -> list[Tensor]:
    folder = saved.parent / "fresh"
    ranks.run("tests.test_janusflow_training:write_outputs", 1, folder, str(saved), str(vae))
    found = load_file(folder / "outputs.safetensors")
    return [found[str(i)] for i in range(len(found))]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["[text,image]", "[text,image,text,image]"])
def test_full_fine_tuning(folder: Path, plan: str) -> None:
    """The shipped settings in bf16-mixed pass the guard; the result loads anywhere, to the bit."""
    model = fit(f"--model.sampling.plan={plan}")
    adapter, saved = model.adapter, folder / "runs/janusflow/pretrained"
    assert isinstance(adapter, JanusFlowAdapter)
    assert model.trainer.precision == "bf16-mixed"
    assert model.trainer.global_step == 2
    logged = [
        row
        for file in (folder / "runs/janusflow").rglob("metrics.csv")
        for row in csv.DictReader(file.read_text().splitlines())
        if row.get("guard/velocity")
    ]
    # In float32 both views differ by 1e-7 (check_adapter); here by rounding to bfloat16 (2^-9).
    assert logged
    assert all(float(row["guard/velocity"]) < 2e-2 for row in logged)
    assert all(float(row["guard/log_prob"]) < 0.1 for row in logged)
    adapter.system_prompt = None  # a setting, not in the files
    before, after = weights(), load_file(saved / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("vision_gen_dec_model") for name in moved)
    assert any(name.startswith("language_model.model.layers") for name in moved)
    assert "language_model.lm_head.weight" in moved
    assert not any("vision_und" in name or "beg_of_und" in name for name in moved)
    expected = outputs(adapter.eval())
    for a, b in zip(expected, outputs_of_a_fresh_process(saved, folder / "base/vae"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["velocity", "next_logits"])
def test_the_guard_sees_another_policy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What makes the silence above worth something."""
    right = getattr(JanusFlowAdapter, method)
    monkeypatch.setattr(JanusFlowAdapter, method, lambda *args: 1.2 * right(*args))
    with pytest.raises(OnPolicyError, match="velocity" if method == "velocity" else "log_prob"):
        fit(
            "--trainer.precision=32-true",
            "--model.guard.velocity=1e-3",
            "--model.guard.log_prob=1e-3",
        )


@pytest.mark.usefixtures("without_page")
@pytest.mark.slow
def test_lora(folder: Path) -> None:
    """Adapters of the Llama train, the base does not; what is saved has them added in."""
    model = fit("--model.adapter.init_args.lora.rank=4", "--model.optim.text_lr=1e-2")
    adapter, saved = model.adapter, folder / "runs/janusflow/pretrained"
    assert isinstance(adapter, JanusFlowAdapter)
    adapter.system_prompt = None
    trained = {name: p for name, p in adapter.net.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all("language_model" in name and "lora_" in name for name in trained)
    assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    assert load_file(saved / "model.safetensors").keys() == weights().keys()
    expected, base = outputs(adapter.eval()), outputs(load(folder / "base"))
    again = outputs(load(saved, vae=folder / "base/vae"))
    for got, want, reference in zip(again, expected, base, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert not torch.allclose(want, reference, atol=1e-3)
    context = adapter.reference()
    assert context is not None
    with context:
        assert all(torch.equal(a, b) for a, b in zip(outputs(adapter), base, strict=True))


def test_contract_with_lora(folder: Path) -> None:
    adapter = load(folder / "base", lora=LowRank(rank=2), gradient_checkpointing=True)
    assert adapter.param_groups()["flow"] == []
    # One check wants weights in both groups.
    check_adapter(adapter, prompts=PROMPTS, only={c.name for c in CHECKS} - {"gradients"})
    scores = adapter([drawn(adapter, PROMPTS[0])])
    for part in (scores.velocity[0], scores.text[0]):
        adapter.zero_grad()
        part.square().sum().backward(retain_graph=True)
        for name, p in adapter.net.named_parameters():
            assert p.requires_grad == ("lora_" in name)
            # The first policy is the base: only B, which is 0, has a gradient.
            if "lora_B" in name:
                assert p.grad is not None
                assert p.grad.abs().sum() > 0, name


def test_pickable_under_a_yaml_name(folder: Path) -> None:
    found = load_janusflow("base", vae="base/vae", default_size=(32, 32))
    assert isinstance(found, JanusFlowAdapter)
