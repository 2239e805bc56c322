"""Prompts: what files may hold, the order of training, and a resume that nobody can tell."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor, nn

from lightning_unigrpo import data as data_file
from lightning_unigrpo.data import (
    PromptDataModule,
    PromptDataset,
    PromptSampler,
    load_image,
    read_prompts,
    read_requests,
)
from lightning_unigrpo.types import Prompt


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def numbered(num: int, first: int = 0) -> list[Prompt]:
    return [Prompt(text=f"p{i}", id=i) for i in range(first, first + num)]


def module(num: int, **settings: Any) -> PromptDataModule:
    return PromptDataModule.from_prompts(
        numbered(num), **({"prompts_per_iteration": 2, "seed": 0} | settings)
    )


def texts(batches: Any) -> list[list[str]]:
    return [[prompt.text for prompt in batch] for batch in batches]


# ---- files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeff red cube \r\n\nblue ball\n"),
        ("a.jsonl", '{"prompt": "red cube"}\n\n{"text": "blue ball"}\n'),
        ("a.json", '[{"prompt": "red cube"}, {"text": "blue ball"}]'),
        ("a.csv", "prompt\nred cube\nblue ball\n"),
    ],
)
def test_every_format_gives_the_same_prompts(name: str, content: str, tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path, name, content), first_id=7)
    assert [(p.text, p.id, dict(p.columns)) for p in prompts] == [
        ("red cube", 7, {}),
        ("blue ball", 8, {}),
    ]


def test_other_keys_become_columns_and_all_prompts_have_them(tmp_path: Path) -> None:
    lines = '{"prompt": "one", "text": "left", "answer": 1}\n{"prompt": "two", "tag": ["x"]}'
    one, two = read_prompts(write(tmp_path, "a.jsonl", lines))
    assert one.columns == {"text": "left", "answer": 1, "tag": None}
    assert two.columns == {"text": None, "answer": None, "tag": ["x"]}


def test_line_ends_inside_a_value_stay_there(tmp_path: Path) -> None:
    text = "a sign\u2028with two lines"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    assert read_prompts(write(tmp_path, "a.jsonl", line))[0].text == text
    table = 'prompt,answer\n"a sign\nwith ""two"" lines, wide",4\n'
    (prompt,) = read_prompts(write(tmp_path, "a.csv", table))
    assert (prompt.text, prompt.columns) == ('a sign\nwith "two" lines, wide', {"answer": "4"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\n", "data.val: .*holds no prompts"),
        ("a.json", "", "holds no prompts"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": "x"}\n{"caption": "y"}', r"record 2 of .*\['caption'\]"),
        ("a.jsonl", '{"prompt": "  "}', "record 1 of .* no 'prompt'"),
        ("a.jsonl", '{"prompt": 3}', "no 'prompt'"),
        ("a.jsonl", "{", "not valid JSON"),
        ("a.jsonl", '"red cube"', "an object a line"),
        ("a.json", '{"prompt": "x"}', "a list of objects"),
        ("a.json", "3", "a list of objects"),
        ("a.csv", "prompt\nred, blue\n", "more cells"),
        ("a.md", "red cube", "neither .txt"),
        ("a.jsonl", '{"prompt": "x", "image": 3}', "'image' is a path"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(write(tmp_path, name, content), key="data.val")
    assert str(caught.value).startswith("data.val: ")


def test_a_file_that_is_not_there_is_named_when_the_data_is_built(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.train is .*none\.txt"):
        PromptDataModule(train=str(tmp_path / "none.txt"))


def test_input_images_lie_beside_the_file_and_are_read_when_asked_for(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 4), (255, 0, 51, 255)).save(tmp_path / "in.png")
    lines = [
        {"prompt": "mend it", "image": "in.png"},
        {"prompt": "mix them", "images": ["in.png", "in.png"]},
        {"prompt": "draw"},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    prompts = read_prompts(path)
    assert all(p.images == () for p in prompts)
    data = PromptDataset(prompts)
    assert [len(data[i].images) for i in range(3)] == [1, 2, 0]
    (image,) = data[0].images
    assert image.dtype == torch.float32
    torch.testing.assert_close(image[:, 3, 4], torch.tensor([1.0, 0.0, 0.2]))
    assert image.shape == load_image(tmp_path / "in.png").shape == (3, 4, 5)
    assert prompts[0].images == ()  # nothing is kept
    (tmp_path / "in.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"record 1 of .*input image.*in\.png"):
        read_prompts(path)


def test_requests_come_from_the_command_line_or_a_file(tmp_path: Path) -> None:
    assert [p.text for p in read_requests(" red cube ; a cat; ")] == ["red cube", "a cat"]
    assert len(read_requests("a very " * 1000 + "long request")) == 1
    assert [p.text for p in read_requests("draw the page of notes.txt")] == [
        "draw the page of notes.txt"
    ]
    path = write(tmp_path, "my prompts.txt", "red cube; blue ball")
    assert [p.text for p in read_requests(str(path))] == ["red cube; blue ball"]
    with pytest.raises(ValueError, match=r"data\.predict holds no prompts"):
        read_requests(" ; ")
    with pytest.raises(FileNotFoundError, match=r"data\.predict"):
        read_requests("prompts.jsonl")


def test_ids_of_the_splits_never_meet(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.txt", "one\ntwo\n"))
    data = PromptDataModule(train=path, val=path, test=path)
    ids = [p.id for split in ("train", "val", "test") for p in data.prompts(split)]  # type: ignore[arg-type]
    assert len(set(ids)) == 6


# ---- order


def test_a_pass_is_a_permutation_without_what_fills_no_batch() -> None:
    loader = module(7).train_dataloader()
    passes = [texts(loader) for _ in range(3)]
    assert [len(batches) for batches in passes] == [3, 3, 3] == [len(loader)] * 3
    for batches in passes:
        seen = list(chain.from_iterable(batches))
        assert len(set(seen)) == len(seen) == 6
    assert passes[0] != passes[1] != passes[2]


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    def order(seed: int) -> list[list[str]]:
        torch.manual_seed(len(torch.rand(1)) + seed * 17)  # not looked at
        loader = module(20, seed=seed).train_dataloader()
        return texts(loader) + texts(loader)

    assert order(3) == order(3)
    assert order(3) != order(4)


@pytest.mark.parametrize("served", range(8))
def test_a_loader_continues_in_the_middle_of_a_pass(served: int) -> None:
    whole = module(7).train_dataloader()
    stream = [batch for _ in range(4) for batch in texts(whole)]

    first = module(7).train_dataloader()
    found: list[list[str]] = []
    while len(found) < served:
        for batch in first:
            found += texts([batch])
            if len(found) == served:
                break  # as Lightning does: the generator is left in the middle
    state = json.loads(json.dumps(first.state_dict()))
    assert state == {"position": served}

    second = module(7).train_dataloader()
    second.load_state_dict(state)
    while len(found) < len(stream):
        found += texts(second)
    assert found == stream


def test_too_few_prompts_name_the_setting() -> None:
    with pytest.raises(ValueError, match=r"data\.prompts_per_iteration is 8.* 7 training"):
        module(7, prompts_per_iteration=8).train_dataloader()
    with pytest.raises(ValueError, match=r"data\.eval_batch_size is 0"):
        PromptDataModule(eval_batch_size=0)


@pytest.mark.parametrize("num", [1, 5, 8])
def test_evaluation_neither_repeats_nor_drops_on_any_number_of_ranks(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "world_size", lambda: 3)
    seen: list[str] = []
    for rank in range(3):
        monkeypatch.setattr(data_file, "rank", lambda rank=rank: rank)
        data = PromptDataModule.from_prompts(val=numbered(num), eval_batch_size=2)
        loader = data.val_dataloader()
        batches = texts(loader)
        assert len(batches) == len(loader)
        seen += chain.from_iterable(batches)
    assert sorted(seen) == sorted(p.text for p in numbered(num))


def test_prompts_that_are_missing_or_share_an_id_are_refused() -> None:
    with pytest.raises(ValueError, match="share an id"):
        PromptDataModule.from_prompts([Prompt(text="a"), Prompt(text="b")])
    with pytest.raises(ValueError, match=r"set data\.predict"):
        PromptDataModule().predict_dataloader()


# ---- through Lightning


class Witness(LightningModule):
    """Writes down the prompts of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.checked: list[list[str]] = []

    def training_step(self, batch: list[Prompt], batch_idx: int) -> Tensor:
        assert isinstance(self.trainer.train_dataloader.sampler, PromptSampler)
        self.seen += texts([batch])
        return self.weight**2

    def validation_step(self, batch: list[Prompt], batch_idx: int) -> None:
        self.checked += texts([batch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, ckpt_path: Path | None = None, **settings: Any) -> Witness:
    witness = Witness()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=8,
        max_epochs=-1,
        callbacks=[ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    data = PromptDataModule.from_prompts(
        numbered(7), numbered(3, first=100), prompts_per_iteration=2, eval_batch_size=2, seed=5
    )
    trainer.fit(witness, data, ckpt_path=ckpt_path)
    return witness


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Give eight steps over passes of three batches, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder).seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(
    step: int, whole: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    folder, seen = whole
    assert len(seen) == 8
    resumed = fit(tmp_path, ckpt_path=folder / f"step={step}.ckpt").seen
    assert resumed == seen[step:]


def test_validation_in_the_middle_of_a_pass_changes_nothing(
    whole: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    witness = fit(tmp_path, val_check_interval=2, check_val_every_n_epoch=None)
    assert witness.seen == whole[1]
    assert witness.checked == [["p100", "p101"], ["p102"]] * 4
