"""The digits task, its images, its reward, and the base models that ship."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_unigrpo.adapters.digits import DigitReward, DigitsAdapter, ReasoningReward
from lightning_unigrpo.adapters.digits.adapter import CHECKPOINTS
from lightning_unigrpo.adapters.digits.classifier import WEIGHTS
from lightning_unigrpo.adapters.digits.evaluate import draw, evaluate, think
from lightning_unigrpo.adapters.digits.images import GRID, patchify, to_rgb, unpatchify
from lightning_unigrpo.adapters.digits.task import (
    HELD_OUT_PHRASINGS,
    NUM_HELD_OUT,
    NUMBERS,
    OPERATORS,
    PHRASINGS,
    Split,
    WordTokenizer,
    all_questions,
    prompts,
    questions,
)
from lightning_unigrpo.types import TextSegment

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


# ---- the task


def calculate(expression: str) -> int:
    """Evaluate ``3+4-2`` through Python's own grammar, not through the task's arithmetic."""
    tree = ast.parse(expression, mode="eval").body

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return int(str(node.value))
        assert isinstance(node, ast.BinOp)
        apply = operator.add if isinstance(node.op, ast.Add) else operator.sub
        return int(apply(value(node.left), value(node.right)))

    return value(tree)


def spoken_as_symbols(text: str) -> str:
    """Read a question back from its words; the words of the phrasing fall away."""
    symbol = {word: str(i) for i, word in enumerate(NUMBERS)}
    symbol |= {word: sign for sign, word in OPERATORS.items()}
    return "".join(symbol[word] for word in text.split() if word in symbol)


@pytest.mark.parametrize("split", SPLITS)
def test_words_reasoning_and_answer_agree(split: Split) -> None:
    for prompt in prompts(split):
        answer, reasoning = prompt.columns["answer"], prompt.columns["reasoning"]
        steps = [step.split("=") for step in reasoning.split(";")]
        assert all(calculate(left) == int(right) for left, right in steps)
        assert all(0 <= int(right) <= 9 for _, right in steps)
        # every step starts from the result of the one before
        assert all(b[0].startswith(a[1]) for a, b in itertools.pairwise(steps))
        assert calculate(spoken_as_symbols(prompt.text)) == answer == int(steps[-1][1])


def test_every_legal_question_is_there_once() -> None:
    # A result r comes about in r + 1 sums and 10 - r differences, 11 ways, for each of ten r: 110 with one
    # step. From r on, 10 - r sums and r + 1 differences stay legal, 11 again: 10 * 11 * 11 with two.
    expected = 110 + 1210
    assert len(all_questions()) == len(set(all_questions())) == expected


def test_held_out_operands_are_in_one_split_only() -> None:
    tuples = {split: {q.operands for q in questions(split)} for split in SPLITS}
    assert not tuples["train"] & tuples["dev"]
    assert not tuples["train"] & tuples["test"]
    assert not tuples["dev"] & tuples["test"]
    assert sum(len(questions(split)) for split in SPLITS) == len(all_questions())
    assert len(questions("dev")) == len(questions("test")) == NUM_HELD_OUT // 2
    assert all(len(q.operands) == 3 for s in ("dev", "test") for q in questions(s))


def test_held_out_phrasings_are_not_trained_on() -> None:
    held_out = [PHRASINGS[i] for i in HELD_OUT_PHRASINGS]

    def used(split: Split) -> set[str]:
        number = "|".join(NUMBERS)
        spoken = rf"({number})( ({'|'.join(OPERATORS.values())}) ({number}))+"
        return {re.sub(spoken, "{}", prompt.text) for prompt in prompts(split)}

    assert used("train") == set(PHRASINGS) - set(held_out)
    assert used("dev") == used("test") == set(PHRASINGS)


def test_prompt_ids_are_unique() -> None:
    ids = [prompt.id for split in SPLITS for prompt in prompts(split)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "08267eda25ff7b75"), ("dev", "ac705ad04f508824"), ("test", "fe8ca9e69f902e8f")],
)
def test_the_splits_are_those_of_the_shipped_models(split: Split, digest: str) -> None:
    # Another split would put test tuples into what the shipped models were trained on, silently.
    rows = "\n".join(f"{prompt.id} {prompt.text}" for prompt in prompts(split))
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == digest


def test_tokens_round_trip() -> None:
    tokenizer = WordTokenizer()
    for split in SPLITS:
        for prompt in prompts(split):
            assert tokenizer.decode(tokenizer.encode(prompt.text)) == prompt.text
            reasoning = prompt.columns["reasoning"]
            ids = tokenizer.encode_reasoning(reasoning)
            assert tokenizer.decode(ids) == reasoning
            assert not set(ids) & set(range(len(tokenizer.marks)))
    assert len(set(tokenizer.vocabulary)) == len(tokenizer.vocabulary)


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(ValueError, match=r"does not know \['twelve'\]"):
        WordTokenizer().encode("what is twelve plus one")


def test_the_longest_reasoning_fits_the_default_limit() -> None:
    defaults = DigitsAdapter(None).defaults()
    assert defaults.sampling is not None
    longest = max(len(p.columns["reasoning"]) for s in SPLITS for p in prompts(s))
    assert longest + 1 <= defaults.sampling.max_text_tokens  # with the stop token


# ---- images


def test_patches_are_exact_and_row_major(generator: torch.Generator) -> None:
    pixels = torch.rand(5, 8, 8, generator=generator) * 2 - 1
    latents = patchify(pixels)
    assert latents.shape == (5, 4, 16)
    assert torch.equal(unpatchify(latents), pixels)
    for token, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        corner = pixels[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(1)
        assert torch.equal(latents[:, token], corner)


def test_latents_decode_to_grey_pixels_in_range(generator: torch.Generator) -> None:
    pixels = torch.rand(2, 8, 8, generator=generator) * 4 - 2  # beyond the range of images
    adapter = DigitsAdapter(None)
    images = adapter.decode(patchify(pixels), GRID)
    assert images.shape == (2, 3, 8, 8)
    torch.testing.assert_close(images[:, 1], ((pixels + 1) / 2).clamp(0, 1))
    assert adapter.image_grid(prompts("dev")[0]) == (2, 2)


def test_real_images_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from lightning_unigrpo.adapters.digits.images import load_digits

    train, held_out = load_digits("train"), load_digits("held_out")
    assert (len(train.labels), len(held_out.labels)) == (1437, 360)
    assert train.pixels.min() == -1
    assert train.pixels.max() == 1
    assert set(held_out.labels.tolist()) == set(range(10))
    assert torch.cdist(held_out.pixels.flatten(1), train.pixels.flatten(1)).min() > 0


# ---- rewards


def test_the_reward_model_knows_unseen_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from lightning_unigrpo.adapters.digits.images import load_digits

    pixels, labels = load_digits("held_out")
    reward = DigitReward()
    assert (reward.model(pixels.unsqueeze(1)).argmax(1) == labels).float().mean() >= 0.98
    given = reward(images=to_rgb(patchify(pixels)), answer=labels.tolist())
    assert given.mean() > 0.95
    wrong = reward(images=to_rgb(patchify(pixels)), answer=((labels + 1) % 10).tolist())
    assert wrong.mean() < 0.02


def test_reward_probabilities_sum_to_one(generator: torch.Generator) -> None:
    images = torch.rand(1, 3, 8, 8, generator=generator).expand(10, -1, -1, -1)
    given = DigitReward()(images=images, answer=list(range(10)), other="ignored")
    assert given.shape == (10,)
    assert float(given.sum()) == pytest.approx(1, abs=1e-5)


def test_reasoning_is_right_only_as_a_whole() -> None:
    found = ReasoningReward()(completions=["1+2=3", "1+2=3;", ""], reasoning=["1+2=3"] * 3)
    assert found == [1.0, 0.0, 0.0]


# ---- the shipped models


@pytest.mark.parametrize("name", [*CHECKPOINTS, "classifier"])
def test_shipped_files_are_small(name: str) -> None:
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 1.5e6


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_metrics_are_reproduced(name: str) -> None:
    recorded = json.loads((WEIGHTS / f"{name}.json").read_text(encoding="utf-8"))
    found = evaluate(DigitsAdapter(name), "dev")
    assert found["greedy_reward"] == pytest.approx(recorded["greedy_reward"], abs=1e-3)
    assert 0.30 <= found["greedy_reward"] <= 0.45
    assert found["stopped"] == 1
    # the drawing follows the reasoning, and without one it is a guess
    assert found["no_reasoning_reward"] < 0.15
    assert found["forced_wrong_draws_written_digit"] > 0.6
    assert found["forced_wrong_draws_answer"] < 0.1


def test_two_bases_are_two_models() -> None:
    first, second = (load_file(WEIGHTS / f"{name}.safetensors") for name in CHECKPOINTS)
    assert not torch.equal(first["vae2llm.weight"], second["vae2llm.weight"])


def test_thinking_and_drawing_are_seeded() -> None:
    adapter, rows = DigitsAdapter().eval(), prompts("dev")[:6]
    texts = think(adapter, rows, temperature=1.0, seed=3)
    again = think(adapter, rows, temperature=1.0, seed=3)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(texts, again, strict=True))
    assert torch.equal(draw(adapter, rows, texts, seed=3), draw(adapter, rows, again, seed=3))
    cut = think(adapter, rows, limit=2)
    assert [len(t.tokens) for t in cut] == [2] * 6
    assert not any(t.stopped for t in cut)
    assert isinstance(cut[0], TextSegment)


# ---- checkpoints that cannot be loaded


def saved(path: Path, changes: dict[str, torch.Tensor | None], **settings: Any) -> Path:
    """Write a model with some tensors replaced (None: left out) and some settings claimed."""
    adapter = DigitsAdapter(None)
    state = {name: value.clone() for name, value in adapter.net.state_dict().items()} | changes
    config = vars(adapter.config) | settings
    kept = {name: value for name, value in state.items() if value is not None}
    save_file(kept, path, metadata={"config": json.dumps(config)})
    return path


@pytest.mark.parametrize("name", ["mine.safetensors", "folder"])
def test_a_saved_model_loads_again(name: str, tmp_path: Path) -> None:
    adapter = DigitsAdapter("base1")
    path = tmp_path / name
    adapter.save_pretrained(path)
    other = DigitsAdapter(path).net.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in adapter.net.state_dict().items())


def test_another_size_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "other.safetensors",
        {"llm2vae.weight": torch.zeros(4, 4), "vae2llm.bias": None, "extra": torch.zeros(1)},
    )
    with pytest.raises(ValueError, match=r"adapter\.checkpoint .*3 tensors differ") as caught:
        DigitsAdapter(path)
    assert "llm2vae.weight: (4, 4) in the file, (16, 64) in the model" in str(caught.value)
    assert "vae2llm.bias: missing in the file, (64,) in the model" in str(caught.value)
    assert "extra: (1,) in the file, missing in the model" in str(caught.value)


def test_settings_that_no_shape_shows_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "other.safetensors", {}, rope_theta=10000.0)
    with pytest.raises(ValueError, match=r"rope_theta: 10000\.0 in the file, 100\.0 in the model"):
        DigitsAdapter(path)


def test_a_file_without_settings_is_taken_at_its_shapes(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    base = DigitsAdapter("base").net.state_dict()
    save_file({k: v.clone() for k, v in base.items()}, path)
    found = DigitsAdapter(path).net.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in base.items())


@pytest.mark.parametrize("content", [b"", b"no safetensors at all" * 9])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter\.checkpoint .*not a safetensors file"):
        DigitsAdapter(path)


def test_a_name_that_is_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.checkpoint is 'base2': neither one of base, "):
        DigitsAdapter("base2")
