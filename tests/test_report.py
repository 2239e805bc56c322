"""The page about a run, and what is recorded for it: equal to what was logged, whatever is missing."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lightning_unigrpo import (
    Objective,
    Prompt,
    PromptDataModule,
    RunReport,
    Sampling,
    Trajectory,
    UniGRPOModule,
)
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.callbacks import IterationCheckpoint, RolloutRecorder, rounds
from lightning_unigrpo.callbacks.recorder import choose_groups
from lightning_unigrpo.callbacks.records import record, write_records
from lightning_unigrpo.callbacks.report import write_page
from lightning_unigrpo.report import panels, thumbnails, write
from lightning_unigrpo.report.groups import WORDS, gather_groups, room_for_words, thin
from lightning_unigrpo.report.read import align, find_run, read_run
from lightning_unigrpo.report.rollouts import Group, Member
from lightning_unigrpo.report.thumbnails import make
from lightning_unigrpo.rollout import decode_images
from lightning_unigrpo.types import ImageSegment, TextSegment
from tests.interrupts import PressCtrlC
from tests.runs import fill, group
from tests.test_module import Record

SIZE = 3


def train(
    folder: Path,
    *callbacks: Callback,
    steps: int = 4,
    logger: Any = False,
    sampling: dict[str, Any] | None = None,
    objective: Objective | None = None,
    turns: Any = None,
    chosen: Sequence[int] = range(6),
    **changes: Any,
) -> Trainer:
    """Run a few small iterations of the digits task."""
    adapter = DigitsAdapter()
    settings = Sampling(
        group_size=SIZE, max_text_tokens=12, num_timesteps=3, schedule="steps", shift=1.0, eta=0.7,
        window_size=2, window_range=(0, 2), eval_num_timesteps=3, **(sampling or {}),
    )  # fmt: skip
    module = UniGRPOModule(adapter, sampling=settings, objective=objective, turns=turns)
    prompts = adapter.defaults()
    train = [prompts.train[i] for i in chosen]
    data = PromptDataModule.from_prompts(train, prompts.val[:4], prompts.test[:4])
    data.prompts_per_iteration = 2
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=logger,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, IterationCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    report = next((c for c in callbacks if isinstance(c, RunReport)), None)
    if report is not None:
        trainer.test(module, data, verbose=False)
    trainer.fit(module, data, **changes)
    if report is not None:
        trainer.test(module, data, verbose=False)
        report.write(trainer)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """Give a finished run, and what its callbacks saw."""
    root, record = tmp_path_factory.mktemp("runs"), Record()
    loggers = [CSVLogger(root, name=None), TensorBoardLogger(root, name="events")]
    recorder = RolloutRecorder(every=2, groups=1, num_samples=2)
    train(root, record, recorder, RunReport(num_samples=2), logger=loggers)
    return root / "version_0", record


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_recorded_is_what_was_drawn(run: tuple[Path, Record]) -> None:
    folder, record = run
    recorded = lines(folder / "rollouts" / "groups.jsonl")
    assert [line["iteration"] for line in recorded] == [0, 2, 3]  # the last one, too
    for line in recorded:
        drawn = [t for t in record.experience[line["iteration"]].trajectories if t.group == 0]
        assert line["prompt"] == drawn[0].prompt.text
        assert line["size"] == len(line["members"]) == len(drawn) == SIZE
        for member, trajectory in zip(line["members"], drawn, strict=True):
            assert member["reasoning"] == trajectory.completion
            assert member["rewards"] == trajectory.rewards
            assert member["reward"] == trajectory.reward
            assert member["advantage"] == trajectory.segments[-1].advantage
            with Image.open(folder / "rollouts" / "images" / member["image"]) as image:
                pixels = np.asarray(image)
            assert trajectory.image is not None
            exact = 255 * trajectory.image.permute(1, 2, 0).numpy()
            assert np.abs(pixels - exact).max() <= 0.5 + 1e-4  # rounded, nothing lost


DIALOGUE = {"plan": ("text", "image", "turn", "text", "image"), "stop_phrase": "-", "seed": 0}
ENDS = (100, 200)
"""Prompts whose first groups end in all three ways."""


def edits(completions: list[str], turn: int) -> list[str | None]:
    """Be content with what ends in 1, 3 or 5."""
    return [None if words[-1:] in "135" else "please draw nine" for words in completions]


class Dialogues(NamedTuple):
    """A run with turns and early ends."""

    kind: str
    folder: Path
    record: Record
    decoded: list[Trajectory]
    """What the callbacks decoded."""


@pytest.fixture(scope="module", params=["last", "each"])
def dialogues(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Dialogues:
    found = Dialogues(request.param, tmp_path_factory.mktemp("dialogues"), Record(), [])

    def decode(adapter: Any, trajectories: list[Trajectory], *, every: bool) -> None:
        found.decoded.extend(trajectories)
        decode_images(adapter, trajectories, every=every)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "decode_images", decode)
        train(
            found.folder,
            found.record,
            RolloutRecorder(every=10, groups=2),
            steps=3,
            sampling=DIALOGUE,
            objective=Objective(
                round_rewards=found.kind,
                round_credit="round" if found.kind == "each" else "trajectory",
                truncation_reward=None,
            ),
            turns=edits,
            chosen=ENDS,
        )
    return found


def pixels_of(file: Path | str) -> np.ndarray:
    """Read an image: a file, or what a page holds."""
    source = io.BytesIO(base64.b64decode(file.partition(",")[2])) if isinstance(file, str) else file
    with Image.open(source) as image:
        return np.asarray(image)


def test_rounds_are_recorded_and_shown_as_they_were_drawn(dialogues: Dialogues) -> None:
    adapter, endings, own_advantages = DigitsAdapter(None), set(), False
    rows = gather_groups(read_run(dialogues.folder)).rows
    recorded = lines(dialogues.folder / "rollouts" / "groups.jsonl")
    assert [line["iteration"] for line in recorded] == [0, 0, 2, 2]
    for line, row in zip(recorded, rows, strict=True):
        experience = dialogues.record.experience[line["iteration"]]
        here = [i for i, t in enumerate(experience.trajectories) if t.group == line["group"]]
        for i, member, on_page in zip(here, line["members"], row["members"], strict=True):
            drawn = experience.trajectories[i]
            behind = drawn.segments[drawn.num_given :]
            texts = [s for s in behind if isinstance(s, TextSegment)]
            images = [s for s in behind if not isinstance(s, TextSegment)]
            told = [[each.get("turn"), each["reasoning"]] for each in member["rounds"]]
            assert [x for pair in told for x in pair if x is not None] == [t.words for t in texts]
            assert [turn for turn, _ in told] == [None, "please draw nine"][: len(told)]
            assert [[each["turn"], each["reasoning"]] for each in on_page["rounds"]] == told
            # text, image: the user is content. A turn and a text: the phrase. And an image: the plan.
            assert member["ended"] == {2: "user", 4: "phrase", 5: "plan"}[len(behind)]
            endings.add(member["ended"])
            names = [each["image"] for each in member["rounds"]]
            assert [name is None for name in names] == [False, member["ended"] == "phrase"][
                : len(told)
            ]
            assert names[len(images) - 1] == member["image"]
            for name, shown, image in zip(names, on_page["rounds"], images, strict=False):
                exact = adapter.decode(image.latent.unsqueeze(0), image.grid)[0]
                exact = (255 * exact).round().byte().permute(1, 2, 0).numpy()
                file = dialogues.folder / "rollouts" / "images" / name
                assert np.array_equal(pixels_of(file), exact)
                assert np.array_equal(pixels_of(shown["image"]), exact)
            if dialogues.kind == "each":
                known = experience.round_rewards[
                    i, : len(told), 0
                ].tolist()  # the other one weighs 0
                assert [each["reward"] for each in member["rounds"]] == known
            else:
                assert [each["reward"] for each in member["rounds"]] == [None] * len(told)
            learned = [s.advantage for s in texts if s.is_sampled]
            assert [each["advantage"] for each in member["rounds"]] == learned
            differ = len({*learned}) > 1
            assert [each["advantage"] for each in on_page["rounds"]] == [
                f"{each:+.2f}" if differ else None for each in learned
            ]
            own_advantages |= differ
    assert own_advantages == (dialogues.kind == "each")
    assert endings == {"plan", "phrase", "user"}


def test_images_of_rounds_are_decoded_only_where_they_are_written(dialogues: Dialogues) -> None:
    every = [e.trajectories for e in dialogues.record.experience]
    several = [[t for t in drawn if rounds.num_images(t) > 1] for drawn in every]
    if dialogues.kind == "each":
        assert dialogues.decoded == []
        assert all(t.rounds for drawn in every for t in drawn)
        return
    assert several[1]
    assert len(dialogues.decoded) == len(several[0] + several[2])
    seen = several[0][0].image
    assert len(rounds.with_rounds(DigitsAdapter(None), several[0][0]).rounds) == 2
    assert several[0][0].image is seen
    assert all(t.rounds == [] for drawn in every for t in drawn)  # scoring looks at them


def test_the_number_of_images_is_logged_where_it_varies(
    dialogues: Dialogues, run: tuple[Path, Record]
) -> None:
    for metrics, experience in zip(
        dialogues.record.metrics, dialogues.record.experience, strict=True
    ):
        counts = [
            sum(isinstance(s, ImageSegment) for s in t.segments) for t in experience.trajectories
        ]
        assert metrics["image/rounds"] == pytest.approx(np.mean(counts))
    assert "image/rounds" not in run[1].metrics[0]


@pytest.mark.parametrize(
    ("plan", "words", "expected"),
    [
        ("text image turn text image", ["done", "", None], "user"),  # a first text ends nothing
        ("text turn text image", ["done"], "user"),
        ("text image text turn text image", ["a", "", "b"], "user"),
        ("text image text turn text image", ["a", "", "done"], "phrase"),
        ("text image text", ["a", "", "done"], "plan"),
    ],
)
def test_how_a_trajectory_ended(plan: str, words: list[str | None], expected: str) -> None:
    text = {"tokens": torch.zeros(1, dtype=torch.long), "log_prob": torch.zeros(1)}
    segments = [
        TextSegment(words=said or "", **text)
        if kind == "text"
        else ImageSegment(latent=torch.zeros(1, 1), grid=(1, 1))
        for kind, said in zip(plan.split(), words, strict=False)
    ]
    drawn = Trajectory(prompt=Prompt(text="draw"), segments=segments, group=0, member=0)
    sampling = Sampling(plan=tuple(plan.split()), stop_phrase="done")
    assert rounds.ending(drawn, sampling) == expected


def test_input_images_are_kept_once_for_a_group(tmp_path: Path) -> None:
    given = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = Prompt(text="larger", images=(given[0], given[1]))
    drawn = [
        Trajectory(
            prompt=prompt, segments=[], group=4, member=m, image=torch.full((3, 8, 8), m / 2)
        )
        for m in range(2)
    ]
    made = record(drawn, title="train", iteration=3, size=2, sampling=Sampling(), worth={})
    made.finish(DigitsAdapter(None), torch.device("cpu"))
    write_records(tmp_path / "rollouts", "groups.jsonl", [made])
    assert len([*(tmp_path / "rollouts" / "images").iterdir()]) == 4
    (line,) = lines(tmp_path / "rollouts" / "groups.jsonl")
    assert all("rounds" not in member for member in line["members"])  # a single round, as ever
    (row,) = gather_groups(read_run(tmp_path)).rows
    for uri, pixels in zip(row["inputs"], given, strict=True):
        exact = (255 * pixels).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels_of(uri), exact)
    assert [int(pixels_of(m["image"]).max()) for m in row["members"]] == [0, 128]


def test_rewards_by_round_and_the_number_of_images_are_drawn(tmp_path: Path) -> None:
    names = [
        "reward/round_1",
        "reward/round_2",
        "reward/round_10",
        "val/reward/round_1",
        "image/rounds",
    ]
    text = ",".join(["epoch,step", *names]) + "\n0,0,0.1,0.2,0.3,0.4,1.5\n"
    (tmp_path / "metrics.csv").write_text(text)
    charts = {chart.title: chart.svg for chart in panels.rewards(read_run(tmp_path))}
    assert [*charts] == ["Reward by round", "Validation by round", "Images of a trajectory"]
    found = re.findall(r"reward/round_\d+", charts["Reward by round"])
    assert [*dict.fromkeys(found)] == names[:3]


def test_test_samples_are_recorded_before_and_after(run: tuple[Path, Record]) -> None:
    recorded = lines(run[0] / "rollouts" / "samples.jsonl")
    assert [line["title"] for line in recorded] == ["base", "base", "trained", "trained"]
    assert [line["iteration"] for line in recorded] == [0, 0, 4, 4]
    assert recorded[0]["prompt_id"] == recorded[2]["prompt_id"]


def test_numbers_of_the_page_are_those_of_the_table(run: tuple[Path, Record]) -> None:
    folder, _ = run
    html = (folder / "report.html").read_text()
    table = html[html.index('<table id="metrics">') :]
    with (folder / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    names = rows[0].keys() - {"epoch", "step"}
    assert len(names) > 30
    for name in names:
        values = [float(row[name]) for row in rows if row[name]]
        row = re.search(f"<tr><td>{name}</td>(.*)</tr>", table)
        assert row is not None
        shown = [*map(float, re.findall('data value="([^"]+)"', row[1]))]
        assert shown == [values[0], values[-1], min(values), max(values)]
        assert f"<td>{len(values)}</td>" in row[1]


def test_test_metrics_are_those_of_the_report(run: tuple[Path, Record]) -> None:
    html = (run[0] / "report.html").read_text()
    test = json.loads((run[0] / "report.json").read_text())["test"]
    table = html[html.index('<table id="test">') :]
    for name, base in test["base"].items():
        row = re.search(f"<tr><td>{name.removeprefix('test/')}</td>(.*)</tr>", table)
        assert row is not None
        shown = [*map(float, re.findall('data value="([^"]+)"', row[1]))]
        assert shown == [base, test["trained"][name]]


def test_events_give_the_table_of_the_csv(run: tuple[Path, Record], tmp_path: Path) -> None:
    folder, _ = run
    shutil.copytree(folder.parent / "events" / "version_0", tmp_path / "alone")
    table, events = read_run(folder), read_run(tmp_path / "alone")
    assert (table.source, events.source) == ("metrics.csv", "TensorBoard")
    assert table.metrics.keys() == events.metrics.keys()
    for name, series in table.metrics.items():  # events hold float32
        assert events.metrics[name] == pytest.approx(series, rel=1e-6, nan_ok=True), name
    assert events.test == {
        title: pytest.approx(values, rel=1e-6) for title, values in table.test.items()
    }


def test_validation_stands_behind_the_iterations_it_followed(run: tuple[Path, Record]) -> None:
    metrics, held_out = read_run(run[0]).metrics, json.loads((run[0] / "report.json").read_text())
    assert [*metrics["val/reward"]] == [2, 4] == [x for x, _ in held_out["held_out"]]
    assert [*metrics["reward"]] == [0, 1, 2, 3]


def test_steps_of_a_trainer_that_began_later_become_iterations() -> None:
    points = [(0, "iteration", 7.0), (0, "reward", 1.0), (0, "val/reward", 2.0), (0, "reward", 3.0)]
    assert align(points) == {"iteration": {7: 7.0}, "reward": {7: 3.0}, "val/reward": {8: 2.0}}


def test_a_run_that_goes_on_in_its_folder_has_no_group_twice(tmp_path: Path) -> None:
    def go(steps: int, **changes: Any) -> list[dict[str, Any]]:
        save = IterationCheckpoint(every=2, dirpath=str(tmp_path / "saved"))
        train(tmp_path, RolloutRecorder(every=1, groups=2), save, steps=steps, **changes)
        return lines(tmp_path / "rollouts" / "groups.jsonl")

    first = go(2)
    shutil.copy(tmp_path / "saved" / "last.ckpt", tmp_path / "two.ckpt")
    whole = go(4, ckpt_path=tmp_path / "two.ckpt")
    with (tmp_path / "rollouts" / "groups.jsonl").open("a") as file:
        file.write('{"title": "train", "iteration": 1')  # of a writer that was killed
    again = go(4, ckpt_path=tmp_path / "two.ckpt")
    assert first == whole[:4]
    assert again == whole
    assert [line["iteration"] for line in again] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_interrupted_run_keeps_its_last_iteration(tmp_path: Path) -> None:
    recorder = RolloutRecorder(every=10)
    with pytest.raises(SystemExit):  # Lightning leaves with code 1 after a KeyboardInterrupt
        train(tmp_path, recorder, PressCtrlC(2, times=2), IterationCheckpoint())
    found = lines(tmp_path / "rollouts" / "groups.jsonl")
    assert [line["iteration"] for line in found] == [0, 0, 1, 1]
    assert "interrupted or still running" in write(tmp_path).read_text()


def test_a_full_disk_costs_pictures_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.warns(UserWarning, match="No space left on device") as warned:
        trainer = train(tmp_path, RolloutRecorder(every=1))
    assert trainer.global_step == 4
    assert len([w for w in warned if "RolloutRecorder" in str(w.message)]) == 1


def test_whole_groups_come_before_those_that_other_ranks_share() -> None:
    rank = [
        Trajectory(prompt=Prompt(text="draw"), segments=[], group=g, member=m)
        for g, m in [(0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    ]
    chosen = choose_groups(rank, 2, 3)
    assert [(each[0].group, len(each)) for each in chosen] == [(1, 3), (0, 1)]


def test_half_written_files_are_read_as_far_as_they_go(
    run: tuple[Path, Record], tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(run[0], folder)
    (folder / "report.json").write_text('{"test": {"ba')
    (folder / "config.yaml").write_text("model: {adapter: [")
    table = folder / "metrics.csv"
    text = table.read_text()
    table.write_text(text[: text.rindex(".") + 2])  # a number that is cut reads as another number
    groups = folder / "rollouts" / "groups.jsonl"
    groups.write_text(groups.read_text()[:-40])
    next((folder / "rollouts" / "images").glob("train-000000-*")).write_bytes(b"RIFF")
    whole, torn = read_run(run[0]), read_run(folder)
    assert torn.broken == 2
    assert [g.iteration for g in torn.groups] == [0, 2]
    assert torn.metrics["reward"] == whole.metrics["reward"]
    html = write(folder).read_text()
    assert "1 images are missing" in html
    assert "2 lines" in html


MISSING = {
    "metrics.csv": (
        "No groups were recorded",
        "No test samples were recorded",
        "There is no config.yaml",
        "There is no environment.json",
        "no report.json was written",
    ),
    "rollouts": (
        "No test or validation was logged",
        "No reward was logged",
        "No validation was logged",
        "No test was made",
        "No timings were logged",
        "No metrics were logged",
    ),
    "report.json": ("Nothing about the policy was logged", "No groups were recorded"),
}


@pytest.mark.parametrize("left", MISSING)
def test_what_is_missing_is_said(run: tuple[Path, Record], tmp_path: Path, left: str) -> None:
    source = run[0] / left
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / left)
    html, whole = write(tmp_path).read_text(), (run[0] / "report.html").read_text()
    for told in MISSING[left]:
        assert told in html
    for told in ("No groups were recorded", "No reward was logged", "No test was made"):
        assert told not in whole


def test_a_folder_of_runs_stands_for_the_newest_that_trained(
    run: tuple[Path, Record], tmp_path: Path
) -> None:
    shutil.copytree(run[0].parent, tmp_path / "runs")
    later = tmp_path / "runs" / "version_1"
    later.mkdir()
    (later / "metrics.csv").write_text("epoch,step,test/reward\n0,0,0.5\n")
    assert find_run(tmp_path) == tmp_path / "runs" / "version_0"
    assert find_run(later) == later


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run.*trainer\.logger"):
        write(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        write(tmp_path / "metrics.csv")
    with pytest.raises(ValueError, match="output is"):
        write(fill(tmp_path, [group(0)]), tmp_path)
    with pytest.raises(ValueError, match="every=0"):
        RolloutRecorder(every=0)


def test_a_page_that_cannot_be_made_does_not_end_a_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds no run.*unigrpo report"):
        write_page(tmp_path)


def test_the_report_needs_no_torch() -> None:
    code = (
        "import sys, lightning_unigrpo.report; "
        "print({'torch', 'lightning', 'transformers'} & sys.modules.keys())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"


def test_thumbnails_fit_and_are_as_large_as_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randint(0, 256, (12, 256, 256, 3), generator=torch.Generator().manual_seed(0))
    files = [tmp_path / f"{i}.png" for i in range(len(noise))]
    for file, pixels in zip(files, noise, strict=True):
        Image.fromarray(pixels.byte().numpy()).save(file)
    sizes = {}
    for budget in (10**7, 10**5, 10**4):
        found = make([*files, tmp_path / "none.png"], budget)
        assert sum(len(uri) for uri in found.uris if uri) <= budget
        assert found.uris[-1] is None
        sizes[budget] = found.side
    assert sizes[10**7] == 256 > sizes[10**5] > sizes[10**4]
    monkeypatch.setattr(thumbnails, "SAMPLE", 1)
    Image.new("RGB", (256, 256)).save(files[0])  # a sample that says nothing about the others
    assert sum(len(uri) for uri in make(files, 10**5).uris if uri) <= 10**5


def test_long_runs_keep_their_first_and_last_group_and_short_words() -> None:
    one = Member(
        member=0, reasoning="", rewards={}, reward=None, advantage=None, stopped=True, usable=True, image=None
    )  # fmt: skip
    pair = (one, one)
    groups = [
        Group(title="train", iteration=i, prompt="", prompt_id=0, size=2, members=pair)
        for i in range(100)
    ]
    kept = thin(groups, 50)
    assert len(kept) == 25
    assert (kept[0].iteration, kept[-1].iteration) == (0, 99)
    assert thin(groups, 200) is groups
    texts = ["<&>" * 2000, "字" * 5000, "a"] * 500
    limit = room_for_words(texts)
    assert limit is not None
    cut = [json.dumps(t[:limit], ensure_ascii=False).replace("<", r"\u003c") for t in texts]
    assert WORDS / 4 < sum(len(t.encode()) for t in cut) < WORDS
    assert room_for_words(texts[:3]) is None
