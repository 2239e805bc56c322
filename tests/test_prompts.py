"""Generated prompts: the benchmark's own words, nothing of its evaluation; and the files of the peers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_unigrpo.data import read_prompts
from lightning_unigrpo.prompts import (
    MIX,
    NUMBERS,
    geneval_records,
    main,
    ocr_records,
    render,
)
from lightning_unigrpo.rewards.coco import NAMES
from lightning_unigrpo.rewards.geneval import COLORS, TASKS, check_metadata

SHARED = Path(__file__).parents[2] / "shared" / "rewards" / "data"
here = pytest.mark.skipif(
    not (SHARED / "geneval_eval.jsonl").is_file(), reason="the peers' prompt files are not here"
)


def records_of(name: str) -> list[dict[str, Any]]:
    lines = (SHARED / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


@here
@pytest.mark.parametrize("name", ["geneval_eval.jsonl", "geneval_train_sample.jsonl"])
def test_requests_read_as_the_benchmarks_own(name: str) -> None:
    """Every official prompt from its clauses, to the letter."""
    for record in records_of(name):
        assert render(record["tag"], record["include"]) == record["prompt"]


@here
def test_evaluation_prompts_never_come_up() -> None:
    """They would: of 3000 draws of the small tasks, some are the benchmark's."""
    official = [record["prompt"] for record in records_of("geneval_eval.jsonl")]
    mix = {"counting": 1.0}
    free = {r["prompt"] for r in geneval_records(200, mix=mix)}
    assert free & set(official)
    left = {
        r["prompt"] for r in geneval_records(150, mix=mix, exclude=[p.upper() for p in official])
    }
    assert not left & set(official)
    assert len(left) == 150


def test_records_are_what_the_scorer_reads_in_the_mix_that_is_asked_for() -> None:
    records = geneval_records(3000, seed=1)
    assert len({record["prompt"] for record in records}) == 3000
    for record in records:
        check_metadata(record["tag"], record["include"], record.get("exclude"))
        assert {c["class"] for c in record["include"]} <= set(NAMES)
        colored = [c for c in record["include"] if "color" in c]
        assert {c["color"] for c in colored} <= set(COLORS)
        assert "person" not in {c["class"] for c in colored}
        assert len({c["class"] for c in record["include"]}) == len(record["include"])
        assert len({c["color"] for c in colored}) == len(colored)
        if record["tag"] == "counting":
            (clause,), (excluded,) = record["include"], record["exclude"]
            assert clause["count"] in NUMBERS
            assert excluded == {"class": clause["class"], "count": clause["count"] + 1}
    # Tasks of few prompts run out of new ones: the large ones keep their relation.
    counts = Counter(record["tag"] for record in records)
    assert counts["position"] / counts["color_attr"] == pytest.approx(7 / 3, rel=0.15)
    assert set(counts) == set(MIX)
    every = geneval_records(60, mix=dict.fromkeys(TASKS, 1.0))
    assert {record["tag"] for record in every} == set(TASKS)


def test_seeds_and_limits() -> None:
    assert geneval_records(50, seed=3) == geneval_records(50, seed=3)
    assert geneval_records(50, seed=3) != geneval_records(50, seed=4)
    with pytest.raises(ValueError, match=r"Only \d+ of 500 different prompts"):
        geneval_records(500, mix={"single_object": 1.0})
    with pytest.raises(ValueError, match="weights of tasks"):
        geneval_records(5, mix={"colors": 0.0})
    with pytest.raises(ValueError, match="'shapes' is no task"):
        geneval_records(5, mix={"shapes": 1.0})


def test_words_to_write_stand_between_the_first_quotes() -> None:
    """As the peers' OCR reward looks for them."""
    records = ocr_records(400, seed=2)
    assert len({record["prompt"] for record in records}) == 400
    for record in records:
        assert record["prompt"].split('"')[1] == record["text"]
        assert record["prompt"][0].isupper()
    assert len({record["prompt"].split('"')[0] for record in records}) == 12


def test_the_command_writes_what_training_reads(tmp_path: Path, capsys: Any) -> None:
    """And leaves out what other files hold."""
    first = main(["geneval", "--num", "30", "--out", str(tmp_path / "a.jsonl")])
    again = main(
        ["geneval", "--num", "30", "--exclude", str(first), "--out", str(tmp_path / "b.jsonl")]
    )
    prompts, others = read_prompts(first), read_prompts(again)
    assert not {p.text for p in prompts} & {p.text for p in others}
    assert set(prompts[0].columns) >= {"tag", "include"}
    assert "30 prompts" in capsys.readouterr().out


@here
def test_files_of_the_peers_are_read_as_they_are() -> None:
    for name, count, columns in (
        ("geneval_eval.jsonl", 553, {"tag", "include", "exclude"}),
        ("geneval_plus_plus_eval.jsonl", 280, {"tag", "include"}),
        ("ocr_eval.jsonl", 1018, {"text"}),
        ("t2i_r1_sample.jsonl", 200, {"task_type", "nouns", "attr_nouns", "spatial_info"}),
        ("drawbench.txt", 200, set()),
    ):
        prompts = read_prompts(SHARED / name)
        assert len(prompts) == count
        assert set(prompts[0].columns) >= columns


def test_a_column_of_another_name(tmp_path: Path) -> None:
    """TIIF's files have a short and a long description and questions about both."""
    record = {
        "type": "style",
        "short_description": "a cat in ink",
        "long_description": "a cat, sitting, drawn in black ink",
        "yn_question_list": ["Is it a cat?"],
        "yn_answer_list": ["yes"],
    }
    path = tmp_path / "tiif.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (prompt,) = read_prompts(path, column="long_description")
    assert prompt.text == record["long_description"]
    assert prompt.columns["yn_question_list"] == ["Is it a cat?"]
    assert prompt.columns["short_description"] == "a cat in ink"
    with pytest.raises(ValueError, match=r"has no 'prompt' \(or 'text'\).*data\.prompt_column"):
        read_prompts(path)
    with pytest.raises(ValueError, match="has no 'description'"):
        read_prompts(path, column="description")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts as from JSON, nested columns too; a clear message without the package."""
    datasets = pytest.importorskip("datasets")
    records = geneval_records(20, seed=5, mix={"counting": 1.0, "colors": 1.0})
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    one, other = (read_prompts(tmp_path / f"a.{end}") for end in ("parquet", "jsonl"))
    for a, b in zip(one, other, strict=True):
        assert a.text == b.text
        assert a.columns["tag"] == b.columns["tag"]
        # Parquet fills in what a record lacks; the scorer reads None as not asked for.
        clauses = [{k: v for k, v in c.items() if v is not None} for c in a.columns["include"]]
        assert clauses == b.columns["include"]
    (tmp_path / "b.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="is not valid parquet"):
        read_prompts(tmp_path / "b.parquet")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"lightning-unigrpo\[datasets\]"):
        read_prompts(tmp_path / "a.parquet")
