"""A Show-o in the published layout, trained from the command line: saved, loaded again, equal."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_unigrpo import UniGRPOModule
from lightning_unigrpo.adapters.showo import ShowOAdapter, load_showo
from lightning_unigrpo.cli.estimate import run as run_estimate
from lightning_unigrpo.cli.training import run
from lightning_unigrpo.guard import OnPolicyError
from lightning_unigrpo.types import Prompt, TextSegment, TokenImageSegment, Trajectory
from tests import ranks
from tests.published import SENTENCES
from tests.published_showo import weights, write_checkpoint

CONFIG = Path(__file__).parent.parent / "configs" / "showo.yaml"


def brightness(images: Tensor, **_: object) -> list[float]:
    """Reward a bright picture."""
    return images.flatten(1).mean(1).tolist()


def load(folder: Path, **settings: Any) -> ShowOAdapter:
    adapter = load_showo(str(folder), **settings)
    adapter.materialize()
    return adapter.eval()


def outputs(adapter: ShowOAdapter) -> list[Tensor]:
    """Return log-probabilities of words and codes, and pixels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, words in enumerate(("a red cube", "two small dogs")):
        prompt = Prompt(text=words, id=i)
        ids = torch.tensor([*adapter.tokenizer.encode(" on a table"), adapter.stop_token])
        text = TextSegment(tokens=ids, log_prob=torch.zeros(len(ids)))
        h, w = adapter.image_grid(prompt)
        codes = torch.randint(adapter.config.codebook_size, (h * w,), generator=generator)
        step = torch.randint(4, (h * w,), generator=generator)
        image = TokenImageSegment(tokens=codes, grid=(h, w), step=step)
        image.log_prob = torch.zeros(h * w)
        segments = [*adapter.tokenize(prompt), text, image]
        rows.append(Trajectory(prompt=prompt, segments=segments, group=0, member=i))
    scores = adapter(rows)
    found = [x.detach() for x in (*scores.text, *scores.image_tokens)]
    return [*found, adapter.decode(codes.unsqueeze(0), (h, w))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_checkpoint(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*extra: str) -> UniGRPOModule:
    """Run the shipped configuration at the size of the tiny model; the guard stops what disagrees."""
    adapter = "--model.adapter.init_args"
    model = run(
        [
            "fit",
            f"--config={CONFIG}",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=4",
            "--trainer.default_root_dir=runs",
            "--trainer.enable_model_summary=false",
            f"{adapter}.source=base",
            f"{adapter}.language=base/language",
            f"{adapter}.vq=base/vq",
            "--model.rewards=[tests.test_showo_training.brightness]",
            "--model.objective.truncation_reward=null",
            "--model.sampling.group_size=3",
            "--model.sampling.max_text_tokens=6",
            "--model.sampling.num_timesteps=6",
            "--model.optim.text_lr=1e-3",
            "--data.train=prompts.txt",
            "--data.prompts_per_iteration=2",
            *extra,
        ]
    ).model
    assert isinstance(model, UniGRPOModule)
    return model


def logged(folder: Path, name: str) -> list[float]:
    """Return every value of a logged quantity."""
    files = (folder / "runs/showo").rglob("metrics.csv")
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    return [float(row[name]) for row in rows if row.get(name)]


def write_outputs(folder: Path, saved: str, vq: str) -> None:
    """What a process that trained nothing computes."""
    found = outputs(load(Path(saved), vq=vq))
    save_file({str(i): x.contiguous() for i, x in enumerate(found)}, folder / "outputs.safetensors")


def outputs_of_a_fresh_process(saved: Path, vq: Path) -> list[Tensor]:
    folder = saved.parent / "fresh"
    ranks.run("tests.test_showo_training:write_outputs", 1, folder, str(saved), str(vq))
    found = load_file(folder / "outputs.safetensors")
    return [found[str(i)] for i in range(len(found))]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["[text,image]", "[text,image,text,image]"])
def test_full_fine_tuning(folder: Path, plan: str) -> None:
    """The shipped settings in bf16-mixed pass the guard; the result loads anywhere, to the bit."""
    model = fit(f"--model.sampling.plan={plan}")
    adapter, saved = model.adapter, folder / "runs/showo/pretrained"
    assert isinstance(adapter, ShowOAdapter)
    assert model.trainer.precision == "bf16-mixed"
    assert model.trainer.global_step == 4
    found = logged(folder, "guard/log_prob")
    assert len(found) == 2
    assert all(0 < x < 0.1 for x in found)  # bfloat16 rounds to 2^-9
    divergence = logged(folder, "image/kl")
    assert len(divergence) == 2
    assert all(0 < x < 1 for x in divergence)  # after the last update of each collection
    before, after = weights(), load_file(saved / "pytorch_model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == set()
    expected = outputs(adapter.eval())
    for a, b in zip(expected, outputs_of_a_fresh_process(saved, folder / "base/vq"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("without_page")
@pytest.mark.slow
@pytest.mark.parametrize("reveal", ["independent", "confident"])
def test_the_guard_is_silent_in_float32_and_sees_another_policy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reveal: str
) -> None:
    """Both reveal rules score the codes they drew; what is shown to the net otherwise is found."""
    exact = ["--trainer.precision=32-true", f"--model.sampling.reveal={reveal}"]
    fit(*exact)
    assert all(0 < x < 2e-5 for x in logged(folder, "guard/log_prob"))
    right = ShowOAdapter.masked_logits
    monkeypatch.setattr(
        ShowOAdapter, "masked_logits", lambda self, *args: 1.001 * right(self, *args)
    )
    with pytest.raises(OnPolicyError, match="log_prob"):
        fit(*exact)


@pytest.mark.usefixtures("without_page")
@pytest.mark.slow
def test_lora(folder: Path) -> None:
    """Adapters train, the base does not; what is saved has them added in."""
    model = fit(
        "--model.adapter.init_args.lora.class_path=lightning_unigrpo.adapters.showo.LoRA",
        "--model.adapter.init_args.lora.init_args.rank=4",
        "--model.optim.text_lr=1e-2",
    )
    adapter, saved = model.adapter, folder / "runs/showo/pretrained"
    assert isinstance(adapter, ShowOAdapter)
    trained = {name: p for name, p in adapter.net.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6 * 2
    assert all(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    base = outputs(load(folder / "base", language="base/language", vq="base/vq"))
    expected, again = outputs(adapter.eval()), outputs(load(saved, vq="base/vq"))
    *scores, pixels = zip(again, expected, base, strict=True)
    for got, want, reference in scores:
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
        assert not torch.allclose(want, reference, atol=1e-3)
    assert torch.equal(pixels[0], pixels[2])
    context = adapter.reference()
    assert context is not None
    with context:
        assert all(torch.equal(a, b) for a, b in zip(outputs(adapter), base, strict=True))


def test_the_shipped_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """No file and no network; it fits one GPU of 80 GB; prompts of 62 tokens have room."""
    found = run_estimate([f"--config={CONFIG}"])
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
    assert found.parameters == 1_448_176_770
    assert found.memory["weights"] == found.memory["reference"] == 4 * found.parameters
    assert max(found.rollout, found.update) < 70 * 2**30
    assert "1,448,176,770 parameters" in capsys.readouterr().out
    sampling = settings["sampling"]
    chunks, rest = divmod(found.decode_steps, sampling["max_text_tokens"])
    assert rest == 0
    assert found.denoise_steps == chunks * sampling["num_timesteps"]
    room = settings["adapter"]["init_args"]["max_prompt_tokens"] - 2 - sampling["max_text_tokens"]
    assert room == 62
    assert sampling["guidance_scale"] == 1.0
