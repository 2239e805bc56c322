"""Judges: what they are asked, and that only a readable answer becomes a score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from scipy.special import expit

from lightning_unigrpo.reward import Reward, RewardRunner, wrap
from lightning_unigrpo.rewards.http import ServiceError
from lightning_unigrpo.rewards.judge import (
    TEMPLATES,
    Checklist,
    JsonScore,
    Judge,
    Reply,
    unified_reward_1_5,
    unified_reward_2,
    yes_no_logprob,
)
from lightning_unigrpo.types import Prompt, Trajectory
from tests.services import Answer, Request, decode, in_turn, say, service

QUICK: dict[str, Any] = {"backoff": 0.001, "wait": 0.0, "timeout": 5.0, "retries": 1}


def chat(text: str | None, top: Mapping[str, float] | None = None, **fields: Any) -> Answer:
    """Answer as an OpenAI-compatible server does."""
    content = [{"top_logprobs": [{"token": t, "logprob": p} for t, p in (top or {}).items()]}]
    logprobs = {"content": content} if top is not None else None
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return say({"object": "chat.completion", "choices": [choice]}, **fields)


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Fine.\nFinal Score: 4", 4 / 5),
        ("Final Score:3.5/5", 3.5 / 5),
        ("Final Score: 1", 0.2),  # the scale does not begin at 0
        ("Final Score: 5.5", None),
        ("Final Score: 45", None),
        ("Final Score: 0", None),
        ("final score 4", None),
        ("", None),
    ],
)
def test_unified_reward_1_5(text: str, score: float | None) -> None:
    assert unified_reward_1_5(Reply(text)) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # (4 + 3 + 5) / 3 = 4, (4 - 1) / 4
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5", 0.75),
        ("Coherence Score (1-5): 2.5", 0.375),
        ("Alignment Score (1-5): 9\nStyle Score (1-5): 0", 0.875),  # the mean is clipped, 4.5
        ("Alignment Score (1-5): 9", 1.0),
        ("Style Score (1-5): 0", 0.0),
        ("Alignment Score: 4", None),
    ],
)
def test_unified_reward_2(text: str, score: float | None) -> None:
    assert unified_reward_2(Reply(text)) == score


@pytest.mark.parametrize("yes", [-0.1, -3.0, -40.0])
@pytest.mark.parametrize("no", [-0.5, -8.0])
def test_yes_against_no_is_the_sigmoid_of_their_difference(yes: float, no: float) -> None:
    first = {"Yes": yes, "No": no, "Maybe": -1.0}
    assert yes_no_logprob(Reply("", first)) == pytest.approx(expit(yes - no), rel=1e-12)


def test_spellings_are_added_and_neither_is_no_answer() -> None:
    first = {"Yes": math.log(0.3), " yes": math.log(0.3), "NO": math.log(0.2), "Yesterday": -0.1}
    assert yes_no_logprob(Reply("", first)) == pytest.approx(0.75)
    assert yes_no_logprob(Reply("", {"No": -0.2})) == 0.0
    assert yes_no_logprob(Reply("Yes", {"The": -0.1})) is None
    assert yes_no_logprob(Reply("Yes")) is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('```json\n{"why": "{", "score": 7.5}\n```', 0.75),
        ('{broken {"other": 1} {"score": 0}', 0.0),
        ('{"score": true}', None),
        ('{"score": "7"}', None),
        ('{"score": 11}', None),
        ('{"score": NaN}', None),
        ("score: 7", None),
        ('{"a":' * 4000, None),
    ],
)
def test_json_scores(text: str, score: float | None) -> None:
    assert JsonScore()(Reply(text)) == score


def test_json_scales() -> None:
    rational = JsonScore(key="rating", low=1, high=4)  # (x - 1) / 3
    assert rational(Reply('{"score": 1, "rating": 3}')) == pytest.approx(2 / 3)
    assert JsonScore(key="correct", high=1)(Reply('{"correct": 1}')) == 1.0
    with pytest.raises(ValueError, match=r"low=2 and high=1.*Judge\.parser"):
        JsonScore(low=2, high=1)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"answers": ["yes", "no", "no", "yes"]}', 0.5),
        ('{"answers": [true, false, true, true]}', 0.75),
        ('{"answers": ["Yes ", "NO", "Yes", "no"]}', 1.0),
        ('{"answers": ["yes", "no", "yes"]}', None),
        ('{"answers": ["yes", "no", "yes", "perhaps"]}', None),
        ('{"answers": "yes"}', None),
        ("yes, no, yes, no", None),
    ],
)
def test_checklists(text: str, score: float | None) -> None:
    row = {"yn_answer_list": ["yes", "no", "yes", "no"]}
    assert Checklist()(Reply(text, row=row)) == score
    assert Checklist()(Reply(text, row={"yn_answer_list": []})) is None


def ask(template: Any, answer: Answer, image: Image.Image, **settings: Any) -> tuple[Any, Request]:
    columns = settings.pop("row", {"prompts": ["a red cube {x}"]})
    with service(in_turn(answer)) as there:
        judge = Judge(f"{there.url}/v1", "some-model", template, **settings, **QUICK)
        got = judge(images=[image], **columns)
    (request,) = there.requests
    return got, request


def test_the_image_stands_before_the_question() -> None:
    top = {"Yes": math.log(0.6), "No": math.log(0.2)}
    got, request = ask("yes_no_logprob", chat("Yes", top), noise(5, 7), settings={"seed": 3})
    assert got["score"] == [pytest.approx(0.75)]
    assert got["parsed"] == [1.0]
    assert request.path == "/v1/chat/completions"
    sent = request.json()
    ((message,),) = (sent.pop("messages"),)
    assert sent == {
        "model": "some-model",
        "temperature": 0.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "seed": 3,
    }
    image, text = message["content"]
    kind, data = image["image_url"]["url"].split(",")
    assert (message["role"], kind, text["type"]) == ("user", "data:image/png;base64", "text")
    assert np.array_equal(decode(data), noise(5, 7))
    assert "a red cube {x}" in text["text"]


def test_version_1_5_sees_512_pixels_and_version_2_what_was_drawn() -> None:
    sizes = []
    for name, text in (
        ("unified_reward_1_5", "Final Score: 4"),
        ("unified_reward_2", "Style Score (1-5): 4"),
    ):
        got, request = ask(name, chat(text), noise(5, 7))
        content = request.json()["messages"][0]["content"]
        sizes.append(decode(content[0]["image_url"]["url"].split(",")[1]).size)
        assert request.json()["max_tokens"] == 512
        assert got["parsed"] == [1.0]
    assert sizes == [(512, 512), (7, 5)]


def test_questions_of_a_checklist_are_numbered() -> None:
    row = {
        "yn_question_list": [["Is it red?", "Is it round?"]],
        "yn_answer_list": [["yes", "no"]],
    }
    answer = chat('{"answers": ["yes", "yes"]}')
    got, request = ask("checklist", answer, noise(2, 2), row=row)
    assert got["score"] == [0.5]
    text = request.json()["messages"][0]["content"][1]["text"]
    assert "1. Is it red?\n2. Is it round?\n" in text
    asked = Reward(Judge("http://host", "m", "checklist")).select(
        {**row, "images": 1, "prompts": 2}
    )
    assert sorted(asked) == ["images", "yn_answer_list", "yn_question_list"]


def test_questions_and_parsers_of_ones_own() -> None:
    def length(reply: Reply) -> float:
        return len(reply.text) / reply.row["answer"]

    def shout(row: Mapping[str, Any]) -> str:
        return str(row["prompt"]).upper()

    row = {"prompts": ["a cube"], "completions": ["thought"], "answer": [2]}
    for template, text in (("{prompt}? {completion}!", "a cube? thought!"), (shout, "A CUBE")):
        columns = ["answer"] if isinstance(template, str) else ["answer", "prompt"]
        got, request = ask(
            template, chat("abc"), noise(2, 2), row=row, parser=length, columns=columns
        )
        assert got["score"] == [1.5]
        assert request.json()["messages"][0]["content"][1]["text"] == text
        assert "logprobs" not in request.json()


def test_a_named_parser_brings_what_its_request_needs() -> None:
    top = {"yes": -0.1}
    got, request = ask("Is {prompt} there?", chat("yes", top), noise(2, 2), parser="yes_no_logprob")
    assert got["score"] == [1.0]
    assert request.json()["top_logprobs"] == 20


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_cannot_be_read_is_not_scored(template: str) -> None:
    row = {"prompts": ["a"], "yn_question_list": [["b?"]], "yn_answer_list": [["yes"]]}
    for answer in (chat("As a language model ..."), chat(None), chat("", {})):
        got, _ = ask(template, answer, noise(2, 2), row=row)
        assert got == {"score": [None], "parsed": [0.0]}


@pytest.mark.parametrize(
    "answer",
    [
        say({"choices": []}),
        say([1]),
        say({"choices": [{"message": None}]}),
        say({"choices": [{"message": {"content": 3}}]}),
        say({"error": {"message": "too long"}}),
        chat("Yes", {"Yes": "much"}),  # type: ignore[dict-item]
    ],
)
def test_what_is_no_chat_completion_is_an_error(answer: Answer) -> None:
    with pytest.raises(ServiceError, match=r"no chat completion|too long"):
        ask("yes_no_logprob", answer, noise(2, 2))


def test_one_lost_answer_costs_one_rollout_and_unread_ones_are_no_failures() -> None:
    rows = [
        Trajectory(
            prompt=Prompt(text=f"p{i}", id=i, columns={}),
            segments=[],
            group=0,
            member=i,
            image=torch.zeros(3, 4, 4),
        )
        for i in range(6)
    ]

    def script(number: int, request: Request) -> Answer:
        text = request.json()["messages"][0]["content"][1]["text"]
        if "p2" in text:
            return Answer(b"context too long", 400)
        return chat("nonsense" if "p4" in text else "Final Score: 3")

    with service(script) as there:
        judge = Reward(Judge(there.url, "m", "unified_reward_1_5", **QUICK), name="judge")
        assert (judge.batch_size, judge.concurrency, judge.remote) == (1, 8, True)
        with RewardRunner([judge]) as runner:
            runner.submit(rows)
            with pytest.warns(UserWarning, match="context too long"):
                matrix, details = runner.finish()
    assert len(there.requests) == 6
    lost = torch.tensor([0, 0, 1, 0, 1, 0]).bool()
    assert torch.equal(matrix[:, 0].isnan(), lost)
    assert matrix[~lost].flatten().tolist() == pytest.approx([0.6] * 4)
    assert details == {"reward/judge/parsed": pytest.approx(0.8), "reward/judge/failures": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"template": "unified"},
            r"Judge.template is 'unified'; give one of \['unified_reward_1_5'",
        ),
        ({"template": "Is {prompt} there?"}, "with a parser a question"),
        ({"parser": "json"}, "Judge.parser is 'json'"),
    ],
)
def test_names_that_are_not_there_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Judge("http://host", "m", **settings)


def test_it_is_named_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(wrap)
    name = "lightning_unigrpo.rewards.judge."
    entries = [
        {
            "class_path": name + "Judge",
            "init_args": {"url": "http://host/v1", "model": "m", **settings},
        }
        for settings in (
            {"template": "unified_reward_2", "retries": 2},
            {
                "template": "Rate {prompt}.",
                "parser": {"class_path": name + "JsonScore", "init_args": {"high": 5}},
            },
            {"template": "{prompt}?", "parser": "checklist"},
        )
    ]
    found = parser.instantiate(parser.parse_object({"rewards": entries})).rewards
    assert found[0].parser is unified_reward_2
    assert found[0].retries == 2
    assert found[1].parser == JsonScore(high=5)
    assert found[2].parser == Checklist()
