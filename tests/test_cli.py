"""The command line as a user meets it: runs, reports, resumes, explains mistakes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from safetensors.torch import save_file

from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.cli import main
from lightning_unigrpo.cli.training import find_checkpoint, run
from lightning_unigrpo.timing import COSTS

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
    return {float(row["iteration"]): {k: v for k, v in row.items() if same(k)} for row in rows}


def same(name: str) -> bool:
    """Whether two runs that are the same log the same under a name."""
    return name != "step" and not name.startswith(COSTS)


def version(number: int) -> Path:
    return Path("runs/digits") / f"version_{number}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run in one go, which others are compared with."""
    place = tmp_path_factory.mktemp("whole")
    (place / "p.jsonl").write_text(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run(fit())
    return place / version(0)


def test_fit_reports_and_its_config_reproduces_it(whole: Path, folder: Path) -> None:
    for name in ("report.json", "reward_curve.png", "samples.png", "checkpoints/last.ckpt"):
        assert (whole / name).stat().st_size > 0
    report = json.loads((whole / "report.json").read_text())
    assert set(report["test"]) == {"base", "trained"}
    assert len(report["train"]) == 4
    assert [iteration for iteration, _ in report["held_out"]] == [2, 4]
    run(["fit", "--config", str(whole / "config.yaml")])
    assert metrics(whole) == metrics(version(0))


@pytest.mark.usefixtures("without_page")
def test_resume_goes_on_to_the_same_numbers(whole: Path, folder: Path) -> None:
    """The same line starts a run and goes on with it, as after a restart by a scheduler."""
    saved = [f"--trainer.default_root_dir={folder}/mine", "--ckpt_path=last"]
    logger = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: mine, name: null}}"
    run(fit(*saved, logger, steps=2))
    run(fit(*saved, logger))
    part, rest = (metrics(Path("mine") / f"version_{number}") for number in (0, 1))
    assert part | rest == metrics(whole)
    assert set(rest) == {2.0, 3.0}


@pytest.mark.usefixtures("without_page")
def test_a_folder_of_runs_stands_for_its_newest_checkpoint(folder: Path) -> None:
    run(fit(steps=1))
    cli = run(["predict", "--config", CONFIG, "--data.predict=draw one", "--ckpt_path=runs"])
    last = version(0) / "checkpoints" / "last.ckpt"
    assert cli.trainer.ckpt_path == str(last)
    assert find_checkpoint(str(last), Namespace()) == str(last)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_loses_nothing(whole: Path, folder: Path, times: int) -> None:
    """Once: the iteration is finished and saved. Twice: the last checkpoint holds the one before."""
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
    assert not (version(0) / "report.json").exists()
    assert (version(0) / "report.html").exists() == (times == 1)
    saved = torch.load("kept/last.ckpt", weights_only=False)
    assert saved["iteration"] == (2 if times == 1 else 1)
    run(fit("--ckpt_path=kept/last.ckpt"))
    expected, rest = metrics(whole), metrics(version(1))
    assert rest == {k: v for k, v in expected.items() if k >= saved["iteration"]}


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
    "torn checkpoint": (["--ckpt_path=torn.ckpt"], "torn.ckpt is refused: it is torn"),
    "foreign checkpoint": (["--ckpt_path=foreign.ckpt"], "no run of UniGRPOModule wrote it"),
    "no checkpoint": (["--ckpt_path=nowhere.ckpt"], "there is no such file or folder"),
    "empty folder": (["--ckpt_path=empty"], "a folder without a whole checkpoint in it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_screen_that_names_the_key(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty.txt").touch()
    (folder / "empty").mkdir()
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    (folder / "torn.ckpt").write_bytes((folder / "foreign.ckpt").read_bytes()[:-9])
    (folder / "words.txt").write_text("draw a purple elephant\nwhat is love\n")
    save_file({"language_model.lm_head.weight": torch.zeros(3, 3)}, folder / "other.safetensors")
    arguments, key = MISTAKES[name]
    if (
        "--ckpt_path" in arguments[0]
    ):  # refused before any weights are read, and before anything is tested
        monkeypatch.setattr(DigitsAdapter, "materialize", lambda _: pytest.fail("too late"))
    assert key in screen(fit(*arguments), capsys, monkeypatch)


def screen(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Return what the command line says when it ends with an error."""
    monkeypatch.setattr("sys.argv", ["unigrpo", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    lines = capsys.readouterr().err.split("error: ", 1)[1].splitlines()
    assert len(lines) < 24
    assert "Traceback" not in "\n".join(lines)
    return "\n".join(lines)


def test_a_lost_rank_is_one_screen_that_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:59594.")
    error.__notes__ = ["Rank 0 of 2 does not reach another rank", "Go on"]  # type: ignore[attr-defined]

    def lost(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr("lightning_unigrpo.cli.training.run", lost)
    text = screen(["fit"], capsys, monkeypatch)
    assert text.startswith("[pair.cc:553] Connection closed by peer")  # the original, not hidden
    assert "Rank 0 of 2 does not reach another rank\nGo on" in text


def test_only_a_folder_with_a_checkpoint_becomes_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = screen(["consolidate", str(folder)], capsys, monkeypatch)
    assert "is no folder with a checkpoint: it has no meta.pt" in text
