"""The command line as a user meets it: runs, reports, resumes, explains mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_unigrpo.cli import main, run

CONFIG = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
PROMPTS = (
    '{"prompt": "what is three plus four", "answer": 7, "reasoning": "3+4=7"}\n'
    '{"prompt": "draw two plus one minus one", "answer": 2, "reasoning": "2+1=3;3-1=2"}\n'
    '{"prompt": "draw nine minus one", "answer": 8, "reasoning": "9-1=8"}\n'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*extra: str, steps: int = 4) -> list[str]:
    small = [
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=2",
        "--data.prompts_per_iteration=2",
        "--model.sampling.group_size=2",
        *(f"--data.{split}=p.jsonl" for split in ("train", "val", "test")),
    ]
    return ["fit", "--config", CONFIG, *small, *extra]


def metrics(run_folder: Path) -> dict[float, dict[str, str]]:
    """Read what the CSV logger wrote, by iteration."""
    with (run_folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["iteration"]]
    return {float(row["iteration"]): {k: v for k, v in row.items() if k != "step"} for row in rows}


def version(number: int) -> Path:
    return Path("runs/digits") / f"version_{number}"


def test_fit_reports_and_its_config_reproduces_it(folder: Path) -> None:
    run(fit())
    first = version(0)
    for name in ("report.json", "reward_curve.png", "samples.png", "checkpoints/last.ckpt"):
        assert (first / name).stat().st_size > 0
    report = json.loads((first / "report.json").read_text())
    assert set(report["test"]) == {"base", "trained"}
    assert len(report["train"]) == 4
    assert [iteration for iteration, _ in report["held_out"]] == [2, 4]
    run(["fit", "--config", str(first / "config.yaml")])
    assert metrics(first) == metrics(version(1))


def test_resume_goes_on_to_the_same_numbers(folder: Path) -> None:
    run(fit())
    run(fit(steps=2))
    run(fit(f"--ckpt_path={version(1)}/checkpoints/last.ckpt"))
    whole, part, rest = (metrics(version(i)) for i in range(3))
    assert part | rest == whole
    assert set(rest) == {2.0, 3.0}


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_loses_nothing(folder: Path, times: int) -> None:
    """Once: the iteration is finished and saved. Twice: the last checkpoint holds the one before."""
    run(fit())
    press = [
        "--trainer.callbacks+=tests.interrupts.PressCtrlC",
        "--trainer.callbacks.iteration=1",
        f"--trainer.callbacks.times={times}",
        "--trainer.callbacks+=lightning_unigrpo.callbacks.IterationCheckpoint",
        "--trainer.callbacks.every=1",
        "--trainer.callbacks.dirpath=kept",
    ]
    if times == 1:
        run(fit(*press))
    else:
        with pytest.raises(SystemExit):  # Lightning leaves with code 1 after a KeyboardInterrupt
            run(fit(*press))
    assert not (version(1) / "report.json").exists()
    saved = torch.load("kept/last.ckpt", weights_only=False)
    assert saved["iteration"] == (2 if times == 1 else 1)
    run(fit("--ckpt_path=kept/last.ckpt"))
    whole, rest = metrics(version(0)), metrics(version(2))
    assert rest == {k: v for k, v in whole.items() if k >= saved["iteration"]}


def test_predict_writes_pictures_and_reasoning(folder: Path) -> None:
    run(
        [
            "predict",
            "--config",
            CONFIG,
            "--data.predict=what is three plus four; draw nine minus one",
        ]
    )
    target = Path("runs/digits/predictions")
    rows = [json.loads(line) for line in (target / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["what is three plus four", "draw nine minus one"]
    assert all((target / row["image"]).stat().st_size > 0 for row in rows)


def test_validate_and_test(folder: Path) -> None:
    for command in ("validate", "test"):
        split = {"validate": "val", "test": "test"}[command]
        cli = run([command, "--config", CONFIG, f"--data.{split}=p.jsonl"])
        assert 0 <= float(cli.trainer.callback_metrics[f"{split}/reward"]) <= 1


def short(images: Any) -> list[float]:
    return [0.0]


def all_nan(images: Any) -> list[float]:
    return [float("nan")] * len(images)


MISTAKES = {
    "unknown adapter": (["--model.adapter=NoSuchAdapter"], "model.adapter"),
    "group of one": (["--model.sampling.group_size=1"], "sampling.group_size"),
    "window outside": (["--model.sampling.window_size=12"], "sampling.window_size"),
    "cps beyond 1": (["--model.sampling.sde=cps", "--model.sampling.eta=1.2"], "sampling.eta"),
    "wrong length": (["--model.rewards=[tests.test_cli.short]"], "model.rewards"),
    "all NaN": (["--model.rewards=[tests.test_cli.all_nan]"], "model.rewards"),
    "empty prompts": (["--data.train=empty.txt"], "data.train"),
    "no such file": (["--data.val=nowhere.txt"], "data.val"),
    "too few prompts": (["--data.prompts_per_iteration=9"], "data.prompts_per_iteration"),
    "another size": (["--model.adapter.checkpoint=other.safetensors"], "adapter.checkpoint"),
    "no such checkpoint": (["--model.adapter.checkpoint=nowhere"], "adapter.checkpoint"),
    "not writable": (
        [
            "--trainer.callbacks+=lightning_unigrpo.callbacks.IterationCheckpoint",
            "--trainer.callbacks.dirpath=/proc/nowhere",
        ],
        "dirpath",
    ),
    "unknown word": (["--data.train=words.txt"], "does not know"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_screen_that_names_the_key(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty.txt").touch()
    (folder / "words.txt").write_text("draw a purple elephant\nwhat is love\n")
    save_file({"language_model.lm_head.weight": torch.zeros(3, 3)}, folder / "other.safetensors")
    arguments, key = MISTAKES[name]
    monkeypatch.setattr("sys.argv", ["unigrpo", *fit(*arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    lines = capsys.readouterr().err.split("error: ", 1)[1].splitlines()
    assert key in "\n".join(lines)
    assert len(lines) < 24
    assert "Traceback" not in "\n".join(lines)
