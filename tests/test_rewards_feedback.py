"""A judge that speaks for the user, on loopback servers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_unigrpo.dialogue import Turns
from lightning_unigrpo.rewards.feedback import Feedback
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import Prompt, TextSegment, Trajectory
from tests.services import Answer, Request, decode, say, service
from tests.test_dialogue import DIALOGUE, kinds
from tests.test_module import small
from tests.test_rewards_judge import QUICK, chat
from tests.toys import ToyFlow


def standing(text: str, image: Tensor) -> Trajectory:
    return Trajectory(prompt=Prompt(text=text), segments=[], group=0, member=0, image=image)


ROWS = [standing(text, torch.full((3, 4, 4), i / 4)) for i, text in enumerate(("red", "blue", "x"))]


def asked(request: Request) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.body)
    return found


def test_what_it_finds_wrong_is_said_and_content_ends() -> None:
    def answer(number: int, request: Request) -> Answer:
        content = asked(request)["messages"][0]["content"]
        question = content[1]["text"]
        level = decode(content[0]["image_url"]["url"].split(",")[1]).getpixel((0, 0))[0]
        if "red" in question:
            return chat(f"  make it\n brighter than {level} ")
        return chat("DONE." if "blue" in question else "one two three four")

    with service(answer) as running:
        source = Feedback(f"{running.url}/v1", "m", max_words=3, settings={"seed": 5}, **QUICK)
        turns = Turns(source)
        assert turns.needs_images
        turns.prepare(torch.device("cpu"))
        assert turns(ROWS, 0) == ["make it brighter", None, "one two three"]
        turns.close()


@pytest.mark.parametrize("broken", [say("no"), chat(""), chat(None)])
def test_a_judge_that_fails_costs_its_words_only(broken: Answer) -> None:
    def answer(number: int, request: Request) -> Answer:
        return broken if "blue" in str(asked(request)) else chat("larger")

    fails = b"choices" not in broken.body
    with service(answer) as running:
        turns = Turns(Feedback(f"{running.url}/v1", "m", fallback="again", **QUICK))
        if fails:
            with pytest.warns(UserWarning, match="did not answer for 1 of 3 drawings"):
                found = turns(ROWS, 0)
        else:
            found = turns(ROWS, 0)
    assert found == ["larger", "again", "larger"]


def test_it_is_asked_about_the_drawing_as_it_stands() -> None:
    seen: list[bytes] = []

    def answer(number: int, request: Request) -> Answer:
        seen.append(request.body)
        return chat("a" if len(seen) <= 2 else "DONE")

    starts = [Start(Prompt(text="a b"), 0, member) for member in range(2)]
    with service(answer) as running:
        source = Feedback(f"{running.url}/v1", "m", **QUICK)
        (found,) = rollout(ToyFlow().eval(), starts, small(plan=DIALOGUE), speaker=Turns(source))
    assert len(seen) == 4 == len(set(seen))
    for trajectory in found:
        assert kinds(trajectory) == ["text", "image", "turn", "text", "image"]
        turn = trajectory.segments[3]
        assert isinstance(turn, TextSegment)
        assert turn.words == "a"


def test_what_it_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="max_words=0"):
        Feedback("http://127.0.0.1:1/v1", "m", max_words=0)
    with pytest.raises(ValueError, match="fallback=' '"):
        Feedback("http://127.0.0.1:1/v1", "m", fallback=" ")
