"""A checkpoint in the published layout, trained from the command line: full and LoRA, saved, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_unigrpo import UniGRPOModule
from lightning_unigrpo.adapters.bagel import BagelAdapter, load_bagel
from lightning_unigrpo.adapters.bagel.lora import LoRA
from lightning_unigrpo.adapters.common.lora import merged
from lightning_unigrpo.cli import main
from lightning_unigrpo.cli.training import run
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import Prompt
from tests import ranks
from tests.published import SENTENCES, weights, write_checkpoint
from tests.test_bagel_checkpoint import load, outputs

CONFIGS = Path(__file__).parent.parent / "configs"
PROMPTS = [Prompt(text=text, id=i, size=(32, 32)) for i, text in enumerate(SENTENCES[:3])]


def brightness(images: Tensor, **_: Any) -> list[float]:
    """Reward a bright picture."""
    return images.flatten(1).mean(1).tolist()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(config: str, *extra: str, steps: int = 3) -> UniGRPOModule:
    """Run a shipped configuration at the size of the tiny model."""
    model = run(
        [
            "fit",
            f"--config={CONFIGS / config}",
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            f"--trainer.max_steps={steps}",
            "--trainer.default_root_dir=runs",
            "--trainer.enable_model_summary=false",
            "--model.adapter.init_args.source=base",
            "--model.adapter.init_args.default_size=[32,32]",
            "--model.rewards=[tests.test_bagel_training.brightness]",
            "--model.objective.truncation_reward=null",
            "--model.sampling.group_size=3",
            "--model.sampling.max_text_tokens=6",
            "--model.sampling.num_timesteps=8",
            "--data.train=prompts.txt",
            "--data.prompts_per_iteration=2",
            *extra,
        ]
    ).model
    assert isinstance(model, UniGRPOModule)
    return model


def write_outputs(folder: Path, saved: str, dtype: str) -> None:
    """What a process that trained nothing computes."""
    found = outputs(load(Path(saved), dtype=dtype))
    save_file({str(i): x.contiguous() for i, x in enumerate(found)}, folder / "outputs.safetensors")


def outputs_of_a_fresh_process(saved: Path, dtype: str) -> list[Tensor]:
    folder = saved.parent / "fresh"
    ranks.run("tests.test_bagel_training:write_outputs", 1, folder, str(saved), dtype)
    found = load_file(folder / "outputs.safetensors")
    return [found[str(i)] for i in range(len(found))]


@pytest.mark.slow
def test_full_fine_tuning(folder: Path) -> None:
    """The paper's configuration: five updates in bf16-mixed pass the guard; the result loads anywhere."""
    model = fit("bagel_paper.yaml", steps=5)
    adapter, saved = model.adapter, folder / "runs/bagel/pretrained"
    assert isinstance(adapter, BagelAdapter)
    adapter.system_prompt = None  # a setting, not in the files
    assert model.trainer.precision == "bf16-mixed"
    before, after = weights(), load_file(saved / "ema.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("moe_gen" in name for name in moved)
    assert any("layers" in name and "moe_gen" not in name for name in moved)
    assert not any(
        name.startswith(("vit_model", "connector")) or "pos_embed" in name for name in moved
    )
    with torch.inference_mode():
        expected = outputs(adapter.eval())
    for a, b in zip(expected, outputs_of_a_fresh_process(saved, "float32"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("without_page")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora(folder: Path, dtype: str) -> None:
    """Adapters train, the base does not; what is saved has the adapters added in."""
    model = fit(
        "bagel_lora.yaml",
        "--model.adapter.init_args.lora.rank=4",
        "--model.adapter.init_args.vision=true",
        f"--model.adapter.init_args.dtype={dtype}",
        "--model.optim.text_lr=1e-2",
        "--model.optim.flow_lr=1e-2",
    )
    adapter, saved = model.adapter, folder / "runs/bagel_lora/pretrained"
    assert isinstance(adapter, BagelAdapter)
    adapter.system_prompt = None
    trained = {name: p for name, p in adapter.net.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    base = {n: p for n, p in adapter.net.named_parameters() if "base_layer.weight" in n}
    given = weights()
    for name, value in base.items():
        assert torch.equal(value, given[name.replace(".base_layer", "")].to(value.dtype))
    after = load_file(saved / "ema.safetensors")
    assert after.keys() == given.keys()
    with torch.inference_mode():
        expected, reference = outputs(adapter.eval()), outputs(load(folder / "base", dtype=dtype))
    # In bfloat16 the sum of base and adapters is rounded once more.
    atol = 2e-5 if dtype == "float32" else 0.1
    assert max(float((a - b).abs().max()) for a, b in zip(expected, reference, strict=True)) > atol
    for a, b in zip(expected, outputs_of_a_fresh_process(saved, dtype), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=0)
    check_exports(folder, adapter, after, dtype)


def check_exports(
    folder: Path, trained: BagelAdapter, merged: dict[str, Tensor], dtype: str
) -> None:
    """What ``unigrpo export`` makes of the checkpoint: the same files, or factors that peft reads."""
    (config,) = (folder / "runs/bagel_lora").rglob("config.yaml")
    arguments = ["export", f"--config={config}", "--ckpt_path=last"]
    main([*arguments, "--output=whole"])
    whole = load_file("whole/ema.safetensors")
    assert whole.keys() == merged.keys()
    assert all(torch.equal(value, merged[name]) for name, value in whole.items())
    main([*arguments, "--output=factors", "--merge_lora=false"])
    base = load(folder / "base", dtype=dtype)
    network = PeftModel.from_pretrained(base.net, "factors").base_model.model
    assert base.net is network
    with torch.inference_mode():
        for a, b in zip(outputs(trained.eval()), outputs(base.eval()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("experts", "groups"),
    [(("text",), {"text"}), (("flow",), {"flow"}), (("text", "flow"), {"text", "flow"})],
)
def test_lora_on_chosen_experts(folder: Path, experts: tuple[str, ...], groups: set[str]) -> None:
    adapter = load(folder / "base", lora=LoRA(rank=2, experts=experts))
    assert {name for name, found in adapter.param_groups().items() if found} == groups
    count = sum(len(found) for found in adapter.param_groups().values())
    assert count == len(experts) * 2 * 7 * 2  # two layers, seven projections, A and B


def test_the_base_is_the_reference(folder: Path) -> None:
    """Adapters off: the base's numbers to the bit, and what is trained stays so."""
    plain, adapter = load(folder / "base"), load(folder / "base", lora=LoRA(rank=2))
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(adapter), strict=True))
    frozen = adapter.param_groups()["text"][0].requires_grad_(False)
    with torch.no_grad():
        for parameters in adapter.param_groups().values():
            for parameter in parameters:
                parameter.add_(0.1)
    assert not torch.equal(outputs(plain)[0], outputs(adapter)[0])
    context = adapter.reference()
    assert context is not None
    with context:
        assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(adapter), strict=True))
    assert not torch.equal(outputs(plain)[0], outputs(adapter)[0])
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in adapter.net.parameters()) == 2 * 2 * 7 * 2 - 1


def test_contract_with_lora(folder: Path) -> None:
    adapter = load(folder / "base", lora=LoRA(rank=2), gradient_checkpointing=True)
    check_adapter(adapter, prompts=PROMPTS)


def test_lora_settings_are_checked(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"adapter\.lora\.experts is \('image',\); give some of text, flow"
    ):
        LoRA(experts=("image",))
    with pytest.raises(ValueError, match=r"adapter\.lora\.rank is 0"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match=r"adapter\.lora\.projections is \(\)"):
        LoRA(projections=())


def test_some_projections_only(folder: Path) -> None:
    adapter = load(
        folder / "base", lora=LoRA(rank=2, experts=("flow",), projections=("q_proj", "down_proj"))
    )
    names = {n.rsplit(".lora_", 1)[0] for n, p in adapter.net.named_parameters() if p.requires_grad}
    assert {n.split(".", 4)[4] for n in names} == {
        "self_attn.q_proj_moe_gen",
        "mlp_moe_gen.down_proj",
    }


def test_merging_is_the_adapters_formula(folder: Path) -> None:
    """``W + alpha / rank B A`` in float64, from the two factors."""
    adapter = load(folder / "base", lora=LoRA(rank=2, alpha=6.0))
    with torch.no_grad():
        for parameters in adapter.param_groups().values():
            for parameter in parameters:
                parameter.copy_(torch.randn_like(parameter))
    name = "language_model.model.layers.1.self_attn.k_proj_moe_gen"
    state = {n: p.double() for n, p in adapter.net.named_parameters() if n.startswith(name)}
    product = state[f"{name}.lora_B.default.weight"] @ state[f"{name}.lora_A.default.weight"]
    expected = state[f"{name}.base_layer.weight"] + 3.0 * product
    found = merged(adapter.net.state_dict(), LoRA(rank=2, alpha=6.0))[f"{name}.weight"]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)


def test_pickable_under_a_yaml_name(folder: Path) -> None:
    assert isinstance(load_bagel("base", default_size=(32, 32)), BagelAdapter)
