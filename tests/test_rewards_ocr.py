"""OCR for real: drawn words are read, and the reward falls as they are spoilt.

The engine is rapidocr with the models of its wheel; it is made once for this file.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from lightning_unigrpo.reward import MissingColumnError, Reward, RewardRunner
from lightning_unigrpo.rewards import OCRReward
from lightning_unigrpo.types import Prompt, Trajectory

WORD = "HELLO WORLD"


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    pytest.importorskip("rapidocr")
    reward = OCRReward()
    reward.prepare(torch.device("cpu"))
    return reward


def draw(text: str, size: int = 256, *, color: Any = "black", blur: float = 0) -> Tensor:
    """Return ``[3, size, size]`` uint8 with a line of Pillow's own font in the middle."""
    image = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size / 8)
    ImageDraw.Draw(image).text((size / 2, size / 2), text, color, font, anchor="mm")
    image = image.filter(ImageFilter.GaussianBlur(blur))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def prompts(*targets: str) -> list[str]:
    return [f'a sign that says "{target}", on a wall' for target in targets]


def rows(images: Sequence[Tensor | None], texts: Sequence[str], **columns: Any) -> list[Trajectory]:
    return [
        Trajectory(
            prompt=Prompt(text=text, columns={k: v[i] for k, v in columns.items()}),
            segments=[],
            group=0,
            member=i,
            image=None if image is None else image / 255,
        )
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]


# ---- reading


@pytest.mark.parametrize("size", [512, 256, 128, 64])
def test_drawn_words_are_read(reward: OCRReward, size: int) -> None:
    assert reward([draw(WORD, size)], prompts("Hello World")) == [1.0]


@pytest.mark.parametrize(
    ("drawn", "score"),
    [
        ("HELLO WORL", 0.9),  # one of ten letters is missing
        ("HELO WRLD", 0.8),
        ("HEXXO", 0.3),  # he, o and the l of world: HE[LL→XX]O[WORLD→] is 7 edits
        ("", 0.0),
    ],
)
def test_spoilt_words_earn_less(reward: OCRReward, drawn: str, score: float) -> None:
    (found,) = reward([draw(drawn)], prompts(WORD))
    assert found == pytest.approx(score)


def test_blur_takes_the_reward_away_by_degrees(reward: OCRReward) -> None:
    """Letters are 64 pixels high: a blur of 4 costs nothing, 9.5 some letters, 20 leaves a stain."""
    images = [draw(WORD, 512, blur=blur) for blur in (0, 4, 9.5, 20)]
    none, little, much, all_ = reward(images, prompts(*[WORD] * 4))
    assert none == little == 1.0
    assert much is not None
    assert 0.2 < much < 1.0  # 0.6 to 0.8 between 9 and 10.5; beyond, no text is found at all
    assert all_ == 0.0


def test_colors_come_in_their_order(reward: OCRReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine takes blue first: what it is handed is compared with Pillow's own channels."""
    seen: list[Any] = []

    class Engine:
        txts = ("HELLO",)

        def __call__(self, image: Any, **flags: bool) -> Engine:
            seen.append((image, flags))
            return self

    monkeypatch.setattr(reward, "_idle", [Engine()])
    image = draw("HELLO", 64, color=(255, 0, 40))
    assert reward([image], prompts("hello")) == [1.0]
    (given, flags), pixels = seen[0], Image.fromarray(image.permute(1, 2, 0).numpy())
    blue, green, red = (np.array(pixels.getchannel(name)) for name in "BGR")
    assert np.array_equal(given, np.stack([blue, green, red], 2))
    assert flags == {"use_det": True, "use_cls": True, "use_rec": True}


def test_what_one_call_left_out_does_not_stay_out(reward: OCRReward) -> None:
    """rapidocr remembers the flags of the call before."""
    (engine,) = reward._idle
    bare = engine(np.full((48, 64, 3), 255, np.uint8), use_det=False, use_cls=False, use_rec=True)
    assert not hasattr(bare, "boxes") or bare.boxes is None
    assert reward([draw(WORD)], prompts(WORD)) == [1.0]
    assert len(reward._idle) == 1


# ---- the formula, by hand


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("Hello World", "HELLO  world\n", 1.0),  # neither case nor white space
        ("so: helloworld!", "Hello World", 1.0),  # inside of more
        ("hexxo", "hello", 0.6),  # two of five
        ("", "hello", 0.0),
        ("completely different text", "hi", 0.0),  # more edits than letters: 0, not less
        ("", "", 1.0),
        ("x", "", 0.0),
        ("ünï", "üni", 2 / 3),
    ],
)
def test_the_reward_is_one_minus_the_share_of_edits(read: str, target: str, score: float) -> None:
    assert OCRReward().compare([read], [target]) == pytest.approx([score])


def levenshtein(a: str, b: str) -> int:
    """Return the edit distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1,
        levenshtein(a, b[1:]) + 1,
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edits_are_counted_in_characters() -> None:
    pairs = [("kitten", "sitting"), ("ab", "ba"), ("abcd", "xbd"), ("aaa", "bb")]
    expected = [1 - min(levenshtein(a, b), len(b)) / len(b) for a, b in pairs]
    assert OCRReward().compare(*zip(*pairs, strict=True)) == pytest.approx(expected)


# ---- targets, rows without one


class Reader(OCRReward):
    """Reads what the brightness of the first pixel says, without an engine."""

    def read(self, image: Tensor) -> str:
        return chr(int(image[0, 0, 0]))


def gray(letter: str) -> Tensor:
    return torch.full((3, 4, 4), ord(letter), dtype=torch.uint8)


def score(fn: OCRReward, *given: Any, **columns: Any) -> list[float]:
    with RewardRunner([Reward(fn, name="ocr")]) as runner:
        runner._rewards[0].fn.prepare = lambda device: None
        runner.submit(rows(*given, **columns))
        return runner.finish(check=False)[0][:, 0].tolist()


def test_rows_without_target_or_image_are_not_scorable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "prepare", lambda *_: None)
    images = [gray("a"), gray("a"), None, gray("b"), gray("b")]
    texts = ['say "a"', "say a", 'say "a"', 'say "a" or "b"', 'say "a']
    found = score(Reader(), images, texts)
    assert [value if value == value else None for value in found] == [1, None, None, 0, None]


def test_the_target_may_be_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "prepare", lambda *_: None)
    images, texts = [gray("a"), gray("b"), gray("c")], ['say "x"'] * 3
    found = score(Reader(column="text"), images, texts, text=["a", "a", None])
    assert found[:2] == [1.0, 0.0]
    assert found[2] != found[2]
    with pytest.raises(MissingColumnError, match=r"asks for \['text'\]"):
        score(Reader(column="text"), images, texts)


# ---- engines


def test_each_thread_has_an_engine_while_it_reads() -> None:
    """Two calls that wait for each other inside their engines; a third reuses one of them."""
    both, made, users = threading.Barrier(2), [], []

    class Engine:
        txts = ("a",)

        def __call__(self, image: Any, **flags: bool) -> Engine:
            users.append(self)
            both.wait(5)
            return self

    class Counting(OCRReward):
        def _engine(self) -> Engine:
            made.append(Engine())
            return made[-1]

    reward = Counting()
    with RewardRunner([Reward(reward, concurrency=2, batch_size=1)]) as runner:
        runner.submit(rows([gray("a")] * 4, ['"a"'] * 4))
        assert runner.finish()[0].flatten().tolist() == [1.0] * 4
    assert len(made) == 2
    assert len(users) == 4
    assert set(map(id, users)) == set(map(id, made))


def test_an_engine_that_fails_is_used_again(reward: OCRReward) -> None:
    (engine,) = reward._idle
    with pytest.raises(Exception, match=r"."):
        reward.read(torch.zeros(3, 0, 0, dtype=torch.uint8))
    assert reward._idle == [engine]


def test_engines_stay_in_their_process(reward: OCRReward) -> None:
    assert len(pickle.dumps(reward)) < 2000
    assert copy.deepcopy(reward)._idle == []
    assert len(reward._idle) == 1


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_unigrpo.rewards.ocr.find_spec", lambda n: None if n == missing else real(n)
    )
    with pytest.raises(
        ModuleNotFoundError, match=rf"OCRReward needs {missing}; .*lightning-unigrpo\[ocr\]"
    ):
        OCRReward().prepare(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"OCRReward\.threads is 0; give 1"):
        OCRReward(threads=0)
