"""What stands beside Lightning's commands: generate, export, check-adapter, doctor; plugins; settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.cli import COMMANDS, from_environment, main
from lightning_unigrpo.cli import doctor as doctor_module
from lightning_unigrpo.cli.training import run
from lightning_unigrpo.environment import NAME, Package, packages
from tests.test_cli import CONFIG, fit, folder, screen, version

__all__ = ["folder"]

HEAVY = {"torch", "lightning", "transformers", "diffusers", "matplotlib"}


def python(code: str, *arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["fitt"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom lightning_unigrpo.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print('heavy:', *({HEAVY} & set(sys.modules)))"
    )
    said = python(code, *words)
    assert said.stdout.splitlines()[-1] == "heavy:"
    if words in ([], ["--help"]):
        assert all(f"  {name} " in said.stdout for name in COMMANDS)


def test_an_unknown_command_names_its_like(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["reprot"])
    assert stop.value.code == 2
    assert "there is no command 'reprot'; did you mean 'report'?" in capsys.readouterr().err


# ---- settings


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return the configuration that a command line stands for."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code in (None, 0)
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


def test_interpolation_reaches_across_files_and_flags(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", "mine")
    overlay = {
        "data": {"prompts_per_iteration": "${model.sampling.group_size}"},
        "trainer": {"default_root_dir": "${oc.env:WHERE}/runs"},
        "model": {"sampling": {"max_text_tokens": "${model.sampling.group_size}"}},
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    files = ["--config", CONFIG, "--config", "overlay.yaml"]
    found = parsed(capsys, *files, "--model.sampling.group_size=6")
    assert found["data"]["prompts_per_iteration"] == 6
    assert found["model"]["sampling"]["max_text_tokens"] == 6
    assert found["trainer"]["default_root_dir"] == "mine/runs"
    assert (
        found["model"]["sampling"]["eta"] == 0.7
    )  # of the first file, which the second leaves alone


def test_one_file_refers_to_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = yaml.safe_load(Path(CONFIG).read_text())
    whole["data"]["prompts_per_iteration"] = "${model.sampling.group_size}"
    (folder / "one.yaml").write_text(yaml.safe_dump(whole))
    assert parsed(capsys, "--config", "one.yaml")["data"]["prompts_per_iteration"] == 8


def test_variables_are_arguments_that_files_and_flags_override(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIGRPO_FIT__MODEL__OBJECTIVE__TEXT_KL_WEIGHT", "0.25")  # in no file
    monkeypatch.setenv("UNIGRPO_FIT__MODEL__SAMPLING__GROUP_SIZE", "12")  # 8 in the file
    monkeypatch.setenv("UNIGRPO_TEST__DATA__SEED", "7")  # of another command
    found = parsed(capsys, "--config", CONFIG)
    assert found["model"]["objective"]["text_kl_weight"] == 0.25
    assert (
        found["model"]["objective"]["mse_weight"] == 0.004
    )  # the file's: nothing is lost beside it
    assert found["model"]["sampling"]["group_size"] == 8
    assert found["data"]["seed"] is None


def test_a_variable_of_no_setting_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNIGRPO_FIT__MODEL__SAMPLING__GROUPSIZE", "12")
    assert "groupsize" in screen(["fit", "--config", CONFIG], capsys, monkeypatch)


def test_variables_with_values_of_every_form() -> None:
    given = {"UNIGRPO_FIT__DATA__TRAIN": "a b.txt", "UNIGRPO_FIT__X": "", "UNIGRPO_TRACEBACK": "1"}
    assert list(from_environment("fit", given)) == ["--data.train=a b.txt", "--x="]


def test_comments_are_the_docstrings() -> None:
    """In a process of its own: what was read of docstrings is kept, and only help reads those of fields."""
    code = "import sys; from lightning_unigrpo.cli import main; main(sys.argv[1:])"
    said = python(code, "fit", "--config", CONFIG, "--print_config=comments")
    lines = said.stdout.splitlines()
    place = next(i for i, line in enumerate(lines) if line.strip() == "group_size: 8")
    assert "G, rollouts per prompt (paper: 24)" in lines[place - 1]


PLUGIN = '''
from lightning_unigrpo import UniGRPOCallback
from lightning_unigrpo.adapters.digits import DigitsAdapter

class MyAdapter(DigitsAdapter):
    pass

class Ink:
    """Rewards ink."""
    def __init__(self, strength: float = 1.0):
        self.strength = strength
    def __call__(self, images, **columns):
        return [self.strength * float(image.mean()) for image in images]

class Diary(UniGRPOCallback):
    def on_experience(self, trainer, module, experience):
        print("diary:", type(module.adapter).__name__, experience.reward_names)
'''


@pytest.mark.slow
def test_a_package_of_its_own_plugs_in(folder: Path) -> None:
    """Adapter, reward and callback come from a package that is installed in another environment."""
    source = folder / "source"
    (source / "my_plugin").mkdir(parents=True)
    (source / "my_plugin" / "__init__.py").write_text(PLUGIN)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "my-plugin"\nversion = "1"\n'
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    install = [
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(site),
        str(source),
    ]
    pip = [sys.executable, "-m", "pip", "install", "-q", *install]
    subprocess.run(pip, check=True, capture_output=True)
    here = [path for path in sys.path if path.endswith("site-packages")]
    root = str(Path(__file__).parent.parent)
    (site / "ours.pth").write_text("\n".join([*here, root]))
    diary = "--trainer.callbacks+=my_plugin.Diary"
    mine = ["--model.adapter=my_plugin.MyAdapter", "--model.rewards+=my_plugin.Ink"]
    command = [
        str(folder / "env/bin/python"),
        "-m",
        "lightning_unigrpo.cli",
        *fit(*mine, diary, steps=1),
    ]
    done = subprocess.run(
        [*command, "--model.rewards.strength=0.5"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "diary: MyAdapter ('Ink',)" in done.stdout
    saved = yaml.safe_load((version(0) / "config.yaml").read_text())
    assert saved["model"]["rewards"][0]["init_args"] == {"strength": 0.5}


# ---- commands


def pictures(place: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(place.glob("*.png"))}


def generate(*arguments: str, output: str) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    main(["generate", *arguments, "--config", CONFIG, "--output", output])
    place = Path(output)
    lines = (place / "predictions.jsonl").read_text().splitlines()
    return pictures(place), [json.loads(line) for line in lines]


def test_generate_draws_what_the_seed_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["what is three plus four; or five", "draw nine minus one"]
    first, records = generate(asked[1], "--num_images=2", "--seed=1", output="a")
    assert set(first) == {"0_0.png", "0_1.png"}
    assert not np.array_equal(first["0_0.png"], first["0_1.png"])
    assert [record["image"] for record in records] == ["0_0.png", "0_1.png"]
    assert all(record["prompt"] == asked[1] and record["reasoning"] for record in records)
    assert "a/0_1.png" in capsys.readouterr().out
    again, _ = generate(asked[1], "--num_images=2", "--seed=1", output="b")
    other, _ = generate(asked[1], "--num_images=2", "--seed=2", "--scale=4", output="c")
    for name, picture in first.items():
        assert np.array_equal(picture, again[name])
        assert other[name].shape == (32, 32, 3)
        assert not np.array_equal(picture, other[name][::4, ::4])


def test_generate_without_thinking_and_from_a_file(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "predictions.1.jsonl").write_text("{}\n")  # of two ranks, earlier
    drawn, records = generate("p.jsonl", "--thinking=false", output="a")
    assert [record["reasoning"] for record in records] == [""] * 3
    assert set(drawn) == {"0.png", "1.png", "2.png"}
    assert not (folder / "a" / "predictions.1.jsonl").exists()


def test_generate_wants_prompts_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = screen(["generate", "--config", CONFIG, "draw one"], capsys, monkeypatch)
    assert "put them first" in text


@pytest.mark.usefixtures("without_page")
def test_export_writes_the_weights_of_the_checkpoint(folder: Path) -> None:
    run(fit(steps=1))
    kept = json.loads((version(0) / "environment.json").read_text())
    assert kept["torch"] == torch.__version__
    assert kept["cores"] == str(len(os.sched_getaffinity(0)))
    config = ["--config", str(version(0) / "config.yaml")]
    main(["export", *config, "--ckpt_path=last", "--output=model"])
    last = version(0) / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)["state_dict"]
    written = load_file("model/model.safetensors")
    base = DigitsAdapter().net.state_dict()
    assert written.keys() == base.keys()
    assert any(not torch.equal(value, base[name].half()) for name, value in written.items())
    for name, value in written.items():
        assert torch.equal(value, state[f"adapter.net.{name}"].half())
    fresh = DigitsAdapter("model").net.state_dict()
    assert all(torch.equal(value.half(), written[name]) for name, value in fresh.items())


EXPORTS = {
    "no LoRA to leave apart": (["--ckpt_path=last", "--merge_lora=false"], "trained without LoRA"),
    "no checkpoint yet": (["--ckpt_path=last"], "no checkpoint was written yet"),
    "no such checkpoint": (["--ckpt_path=nowhere.ckpt"], "there is no such file or folder"),
    "of somebody else": (["--ckpt_path=foreign.ckpt"], "no run of UniGRPOModule wrote it"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export_refuses_before_it_reads_weights(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"state_dict": {}}, "foreign.ckpt")
    monkeypatch.setattr(DigitsAdapter, "materialize", lambda _: pytest.fail("too late"))
    arguments, message = EXPORTS[name]
    text = screen(["export", "--config", CONFIG, "--output=x", *arguments], capsys, monkeypatch)
    assert message in text
    assert not Path("x").exists()


class Forgetful(DigitsAdapter):
    """Ignores what it was asked."""

    def next_logits(self, cache: Any) -> torch.Tensor:
        return super().next_logits(cache).roll(1, -1)


def test_check_adapter_ends_with_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    name = "lightning_unigrpo.adapters.digits.DigitsAdapter"
    main(["check-adapter", name, "--adapter.checkpoint=base1", "--rounds=[1]"])
    said = capsys.readouterr().out
    assert "DigitsAdapter: " in said
    assert "FAIL" not in said
    with pytest.raises(SystemExit) as stop:
        main(["check-adapter", f"{__name__}.Forgetful", '--prompts=["draw one"]'])
    assert stop.value.code == 1
    assert "FAIL" in capsys.readouterr().out


def test_doctor_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [
        Package("torch", ">=2.6", "2.13.0", None),
        Package("lightning", ">=2.6.1,<3", "2.5.0", None),
        Package("peft", ">=0.20", None, "lora"),
        Package("scipy", ">=1.15", "1.17.0", "geneval"),
    ]
    monkeypatch.setattr(doctor_module, "packages", lambda: iter(known))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json", "--offline"])
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)
    states = {
        line["what"]: (line["state"], line["says"]) for line in found["packages"] + found["extras"]
    }
    assert states == {
        "torch": ("ok", "2.13.0"),
        "lightning": ("missing", "2.5.0, but >=2.6.1,<3 is needed"),
        "lora": ("none", f'pip install "{NAME}[lora]" (lacks peft)'),
        "geneval": ("ok", "scipy 1.17.0"),
    }


def test_doctor_knows_this_environment(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--offline"])
    said = capsys.readouterr().out
    assert "ModelParallelStrategy (FSDP2)" in said
    assert torch.__version__ in said
    extras = {package.extra for package in packages()} - {None}
    assert {"lora", "ocr", "serve", "geneval"} <= extras
    assert not extras & {"dev", "docs"}


def test_a_hub_that_does_not_answer_is_no_error() -> None:
    line = doctor_module.reach("http://127.0.0.1:9", timeout=0.5)
    assert line.state == "none"
    assert "http://127.0.0.1:9 does not answer" in line.says
