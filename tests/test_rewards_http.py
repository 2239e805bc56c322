"""Rewards over the network: what is sent, and that no fault of a service becomes a score or a stop."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.reward import PATIENCE, Reward, RewardRunner, wrap
from lightning_unigrpo.rewards.http import HTTPReward, ServiceError
from lightning_unigrpo.rewards.pickled import PickledReward, load_plain
from lightning_unigrpo.types import Prompt, Trajectory
from tests.services import (
    Answer,
    Request,
    Script,
    decode,
    free_port,
    grey,
    in_turn,
    say,
    score_grey,
    served,
    service,
)
from tests.test_module import fit, objective, optim, small
from tests.toys import ToyFlow, brightness

QUICK = {"backoff": 0.001, "wait": 0.0, "timeout": 5.0}
FINE = {"rewards": [0.5]}


def picture(level: int = 128, size: int = 4) -> Image.Image:
    return Image.new("RGB", (size, size), (level, 0, 255 - level))


def rows(num: int) -> list[Trajectory]:
    return [
        Trajectory(
            prompt=Prompt(text=f"p{i}", id=i, columns={"answer": i}),
            segments=[],
            group=0,
            member=i,
            completion=f"c{i}",
            image=torch.full((3, 4, 4), i / num),
        )
        for i in range(num)
    ]


def test_the_request_is_flow_factorys() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    with service(in_turn(say({"rewards": [0.25, None]}))) as there:
        reward = HTTPReward(there.url + "/", columns=["answer", "completions"], **QUICK)
        got = reward(
            prompts=["a", "b"],
            images=[picture(), noise],
            input_images=[(torch.full((3, 2, 2), 0.2),), ()],
            answer=[1, {"x": [2]}],
            completions=["c", "d"],
        )
    assert got == [0.25, None]
    (request,) = there.requests
    sent = request.json()
    assert (request.path, request.headers["Content-Type"]) == ("/compute", "application/json")
    # What reward_server/example_server.py of Flow-Factory reads, by name.
    assert sorted(sent) == [
        "condition_images",
        "condition_videos",
        "extra",
        "image",
        "prompt",
        "video",
    ]
    assert sent["prompt"] == ["a", "b"]
    assert np.array_equal(decode(sent["image"][1]), noise)
    assert [len(images) for images in sent["condition_images"]] == [1, 0]
    assert decode(sent["condition_images"][0][0]).getpixel((0, 0)) == (51, 51, 51)
    assert sent["extra"] == {"answer": [1, {"x": [2]}], "completions": ["c", "d"]}
    assert sent["video"] is None


def test_rollouts_without_an_image_are_not_sent_where_others_have_one() -> None:
    with service(score_grey) as there:
        reward = HTTPReward(there.url, **QUICK)
        assert reward(prompts=["a", "b"], images=[None, picture(255)]) == [None, 1 / 3]
    assert there.requests[0].json()["prompt"] == ["b"]
    with service(in_turn(say({"rewards": [1, 2]}))) as there:  # text alone
        assert HTTPReward(there.url, **QUICK)(prompts=["a", "b"]) == [1.0, 2.0]
    assert there.requests[0].json()["image"] is None


PASSING = {
    "503 then fine": (in_turn(Answer(b"busy", 503), Answer(b"", 429), say(FINE)), 3),
    "500, 408, then fine": (in_turn(Answer(b"", 500), Answer(b"", 408), say(FINE)), 3),
    "cut off then fine": (in_turn(Answer(cut=True), say(FINE)), 2),
    "slow then fine": (in_turn(say(FINE, delay=0.4), say(FINE)), 2),
    "drips then fine": (in_turn(say(FINE, drip=0.1), say(FINE)), 2),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str) -> None:
    script, asked = PASSING[name]
    with service(script) as there:
        reward = HTTPReward(there.url, **{**QUICK, "timeout": 0.3})
        assert reward(prompts=["a"], images=[picture()]) == [0.5]
    assert len(there.requests) == asked


FINAL = {
    "400": (Answer(b"no such column", 400), "status 400: no such column", 1),
    "401": (Answer(b"", 401), "status 401", 1),
    "elsewhere": (Answer(b"", 307, {"Location": "/else"}), "status 307", 1),
    "always 502": (Answer(b"bad gateway", 502), r"status 502: bad gateway \(attempt 3 of 3\)", 3),
    "no JSON": (Answer(b"<html>"), "no JSON: b'<html>'", 1),
    "deep": (Answer(b"[" * 4000), "no JSON", 1),
    "error": (say({"error": "out of memory", "rewards": [1]}), "out of memory", 1),
    "no rewards": (say([0.5]), "no 'rewards'", 1),
    "too many": (say({"rewards": [1, 2]}), "2 scores came for 1", 1),
    "a number": (say({"rewards": 1.0}), "no list", 1),
    "words": (say({"rewards": ["1.0"]}), "no number, but '1.0'", 1),
    "truth": (say({"rewards": [True]}), "no number, but 'True'", 1),
    "huge": (say({"rewards": [10**400]}), "too large", 1),
    "endless": (Answer(b" " * 5000), "longer than max_bytes = 4096", 1),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_will_not_pass_is_an_error(name: str) -> None:
    answer, message, asked = FINAL[name]
    with service(in_turn(answer)) as there:
        reward = HTTPReward(there.url, max_bytes=4096, retries=2, **QUICK)
        with pytest.raises(ServiceError, match=message):
            reward(prompts=["a"], images=[picture()])
    assert len(there.requests) == asked


def test_retry_after_is_waited_for_and_the_runs_generator_left_alone() -> None:
    before = random.getstate()
    script = in_turn(Answer(b"", 503, {"Retry-After": "1"}), say(FINE))
    begun = time.monotonic()
    with service(script) as there:
        HTTPReward(there.url, **QUICK)(prompts=["a"], images=[picture()])
    assert time.monotonic() - begun >= 1
    assert random.getstate() == before


def faults(bad: int, fault: Script) -> Script:
    """Score grey levels, but meet requests with an image of this place in :func:`rows` with a fault."""

    def script(number: int, request: Request) -> Answer:
        if request.json()["extra"]["answer"] == [bad]:
            return fault(number, request)
        return score_grey(number, request)

    return script


FAULTS = {
    "garbage": in_turn(Answer(b"\x00\xff")),
    "wrong length": in_turn(say({"rewards": []})),
    "slow": in_turn(say(FINE, delay=0.3)),
    "cut": in_turn(Answer(cut=True)),
    "500": in_turn(Answer(b"", 500)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_rollouts_their_score_and_no_others(name: str) -> None:
    with service(faults(2, FAULTS[name])) as there:
        remote = HTTPReward(there.url, columns=["answer"], retries=1, **{**QUICK, "timeout": 0.15})
        with RewardRunner([Reward(remote, batch_size=1, concurrency=5, name="r")]) as runner:
            for row in rows(5):
                runner.submit([row])
            with pytest.warns(UserWarning, match="1 rollouts stay unscored"):
                matrix, details = runner.finish()
    assert [i for i, value in enumerate(matrix[:, 0].tolist()) if value != value] == [2]
    expected = torch.tensor([0.0, 51, 102, 153, 204]) / 255  # eight bits a channel
    torch.testing.assert_close(
        matrix[:, 0], expected.where(expected != 102 / 255, torch.nan), equal_nan=True
    )
    assert details["reward/r/failures"] == 1


def test_a_required_reward_raises() -> None:
    remote = HTTPReward(f"http://127.0.0.1:{free_port()}", retries=0, **QUICK)
    with RewardRunner([Reward(remote, required=True)]) as runner:
        runner.submit(rows(2))
        with pytest.raises(RuntimeError, match=r"is required.*ConnectError"):
            runner.finish()


def train(tmp_path: Path, rewards: list[Any], steps: int) -> tuple[UniGRPOModule, Any]:
    module = UniGRPOModule(
        ToyFlow(),
        rewards=rewards,
        sampling=small(rows_per_chunk=2),
        objective=objective(truncation_reward=None),
        optim=optim(),
    )
    return module, fit(tmp_path, module, steps)


def test_training_goes_on_when_a_service_dies_and_comes_back(tmp_path: Path) -> None:
    """Two prompts of four rollouts, two a request: four requests an iteration, of which it loses five."""
    port = free_port()

    def script(number: int, request: Request) -> Answer:
        if (
            6 <= number < 11
        ):  # the last two of the second iteration, one of the third, retries and all
            return Answer(cut=True)
        return score_grey(number, request)

    remote = HTTPReward(f"http://127.0.0.1:{port}", retries=0, **QUICK)
    with service(script, port) as there, pytest.warns(UserWarning, match="stay unscored"):
        _, record = train(tmp_path, [Reward(remote, name="far")], 4)
    assert len(there.requests) == 16
    assert [m["reward/far/failures"] for m in record.metrics] == [0, 4, 6, 0]
    assert [m["reward/unscored"] for m in record.metrics] == [0, 0.5, 0.75, 0]
    for experience in record.experience:
        images = torch.stack([t.image for t in experience.trajectories]).mul(255).round() / 255
        found = experience.rewards[:, 0]
        torch.testing.assert_close(
            found, brightness(images=images).where(~found.isnan(), torch.nan), equal_nan=True
        )
    # The second group of the second iteration and the first of the third have no score at all.
    for iteration, group in ((1, slice(4, 8)), (2, slice(0, 4))):
        lost = record.experience[iteration].trajectories[group]
        assert not any(t.usable for t in lost)
        assert {s.advantage for t in lost for s in t.segments if s.is_sampled} == {0.0}
    assert any(t.usable for t in record.experience[3].trajectories)


def test_an_outage_changes_no_weights_and_stops_the_run_when_it_lasts(tmp_path: Path) -> None:
    """The service answers one collection, and is gone."""
    with service(lambda n, r: score_grey(n, r) if n < 4 else Answer(cut=True)) as there:
        remote = Reward(HTTPReward(there.url, retries=0, **QUICK), name="far")
        with (
            pytest.warns(UserWarning, match="stay unscored"),
            pytest.raises(
                RuntimeError, match=r"'far' scored none of 8 rollouts .*, 4 collections in a row"
            ),
        ):
            train(tmp_path, [remote], 9)
    assert len(there.requests) == 4 * (1 + PATIENCE + 1)


def test_a_service_that_never_answered_stops_the_first_collection(tmp_path: Path) -> None:
    remote = HTTPReward(f"http://127.0.0.1:{free_port()}", retries=0, **QUICK)
    with (
        pytest.warns(UserWarning, match="ConnectError"),
        pytest.raises(
            RuntimeError,
            match=r"scored none of 8 rollouts \(NaN, None or an error for all\): there",
        ),
    ):
        train(tmp_path, [brightness, remote], 1)


def test_a_service_that_is_not_there_is_named_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ToyFlow, "tokenize", lambda *_: pytest.fail("drawn"))
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        RuntimeError, match=f"{url} does not answer .*start the service, or change url"
    ):
        train(tmp_path, [HTTPReward(url, wait=0.2)], 1)


def test_a_service_that_starts_late_is_waited_for() -> None:
    port = free_port()
    remote = HTTPReward(f"http://127.0.0.1:{port}", wait=5.0)
    waiting = threading.Thread(target=remote.prepare)
    waiting.start()
    time.sleep(0.15)
    with service(score_grey, port):
        waiting.join(5)
        assert remote(prompts=["a"], images=[picture(0)]) == [1 / 3]
        remote.release()


def test_a_call_that_hangs_ends_with_its_collection() -> None:
    """Such a thread would otherwise sleep through retries of the next collections."""
    with service(in_turn(Answer(b"", 503))) as there:
        remote = HTTPReward(there.url, retries=9, wait=0.0, backoff=60.0)
        before = set(threading.enumerate())
        with RewardRunner([Reward(remote, timeout=0.05)]) as runner:
            runner.submit(rows(1))
            (aside,) = (
                t for t in set(threading.enumerate()) - before if t.name.endswith("(_work)")
            )
            with pytest.warns(UserWarning, match="no answer within"):
                runner.finish(check=False)
        aside.join(5)
        assert not aside.is_alive()
    assert len(there.requests) == 1


def test_a_token_is_sent_and_appears_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES_TOKEN", "s3cret")

    def echo(number: int, request: Request) -> Answer:
        return Answer(request.headers["Authorization"].encode(), 403)

    with service(echo) as there:
        reward = HTTPReward(there.url, token_env="SCORES_TOKEN", **QUICK)
        with RewardRunner([reward]) as runner:
            runner.submit(rows(1))
            with pytest.warns(UserWarning, match="403") as warned:
                runner.finish(check=False)
    assert there.requests[0].headers["Authorization"] == "Bearer s3cret"
    told = "".join(str(w.message) for w in warned)
    assert "Bearer ***" in told
    for text in (told, repr(vars(reward)), str(pickle.dumps(reward))):
        assert "s3cret" not in text
    monkeypatch.delenv("SCORES_TOKEN")
    with pytest.raises(
        ValueError, match=r"HTTPReward.token_env names 'SCORES_TOKEN', which is not set"
    ):
        reward(prompts=["a"])


def test_copies_leave_connections_behind() -> None:
    with service(score_grey) as there:
        reward = HTTPReward(there.url, **QUICK)
        reward.prepare()
        twin = copy.deepcopy(reward)
        reward.release()
        assert twin(prompts=["a"], images=[picture(0)]) == [1 / 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host"}, r"HTTPReward.url is 'ftp://host'; give one such as http://"),
        ({"url": "http://"}, "HTTPReward.url"),
        ({"url": "http://me:word@host"}, "holds a user, a password"),
        ({"url": "http://host/?key=1"}, "token_env"),
        ({"timeout": 0}, "timeout=0"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        HTTPReward(**{"url": "http://host", **settings})
    assert "word" not in str(caught.value).replace("password", "")


def test_it_is_named_in_yaml_with_all_its_settings() -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(wrap)
    entry = {
        "class_path": "lightning_unigrpo.rewards.http.HTTPReward",
        "init_args": {"url": "http://host:1", "columns": ["answer"], "retries": 7},
    }
    (reward,) = wrap(parser.instantiate(parser.parse_object({"rewards": [entry]})).rewards)
    assert (reward.fn.retries, reward.remote, reward.image_format) == (7, True, "pil")
    assert sorted(reward.select({"prompts": 1, "answer": 2, "other": 3})) == ["answer", "prompts"]


def test_a_thousand_requests_at_once_lose_nothing() -> None:
    """More than the queue holds: the rest is told to come again."""

    def shade(images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3))

    with served(shade, batch_size=64, queue_size=500) as url:
        remote = HTTPReward(url, retries=9, timeout=20.0)
        with RewardRunner([Reward(remote, batch_size=1, concurrency=1000, name="r")]) as runner:
            runner.submit(rows(1000))
            matrix, details = runner.finish()
    torch.testing.assert_close(matrix[:, 0], (torch.arange(1000.0) / 1000 * 255).round() / 255)
    assert details["reward/r/failures"] == 0


# ---- pickle


def test_pickled_services_are_asked_with_jpegs_and_read_as_data() -> None:
    def script(number: int, request: Request) -> Answer:
        body = pickle.loads(request.body)
        images = [Image.open(io.BytesIO(data)) for data in body["images"]]
        assert all(image.format == "JPEG" for image in images)
        assert body["meta_datas"] == [{"prompt": "a", "tag": "x"}]
        assert body["only_strict"] is True
        return Answer(pickle.dumps({"scores": grey(images), "strict_rewards": {"x": {1, 2}}}))

    with service(script) as there:
        reward = PickledReward(
            there.url,
            fields={"meta_datas": "metadata"},
            constants={"only_strict": True},
            **QUICK,
        )
        metadata = [{"prompt": "z"}, {"prompt": "a", "tag": "x"}]
        missing, found = reward(images=[None, picture(100)], metadata=metadata)
    assert missing is None
    assert found == pytest.approx(1 / 3, abs=0.01)  # JPEG loses a little
    assert there.requests[0].path == "/"
    assert sorted(Reward(reward).select({"metadata": 1, "images": 2, "x": 3})) == [
        "images",
        "metadata",
    ]


class Runs:
    """Pickles to a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_not_carried_out(protocol: int, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    evil = pickle.dumps({"scores": Runs(os.mkdir, str(sign))}, protocol)
    pickle.loads(evil)
    assert sign.exists()  # it is evil
    sign.rmdir()
    with service(in_turn(Answer(evil))) as there:
        reward = PickledReward(there.url, fields={}, **QUICK)
        with pytest.raises(ServiceError, match=r"more than plain data in it \(\w*GLOBAL at byte"):
            reward(images=[picture()])
    assert not sign.exists()


DAMAGED = {
    "class": pickle.dumps(np.float64(1.0)),
    "ordinary class": pickle.dumps(Prompt(text="a", id=1)),
    "builtin": b"c__builtin__\neval\n(V1+1\ntR.",
    "instance": b"(ios\nsystem\n.",
    "persistent": b"Pfile\n.",
    "extension": b"\x82\x01.",
    "build": b"}}b.",
    "reduce": b"]))R.",
    "bytearray of 2^62": b"\x96" + (2**62).to_bytes(8, "little") + b".",
    "text that ends early": b"X\xff\xff\xff\x7fab.",
    "cut": pickle.dumps({"scores": [1.0]})[:-3],
    "empty": b"",
    "nothing on the stack": b".",
    "another place": b"h\x05.",
    "JSON": b'{"scores": [1]}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_anything_but_plain_data_is_refused(name: str) -> None:
    with pytest.raises(ServiceError, match="pickle"):
        load_plain(DAMAGED[name])


def test_a_place_that_would_take_all_memory_is_not_made() -> None:
    with pytest.raises(ServiceError, match=r"LONG_BINPUT at byte 1"):
        load_plain(b"]r\xff\xff\xff\x7f.")


def test_the_second_lock_holds_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    monkeypatch.setattr("lightning_unigrpo.rewards.pickled.pickletools.genops", lambda _: [])
    with pytest.raises(ServiceError, match="no pickle of plain data"):
        load_plain(pickle.dumps(Runs(os.mkdir, str(sign))))
    assert not sign.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back_as_it_was(protocol: int) -> None:
    again = ["a", 1.5]
    data = {"s": [1, -(2**70), 0.1, True, None, "é\n"], "t": ((), (1,), again, again), "d": {1: {}}}
    assert load_plain(pickle.dumps(data, protocol)) == data
    if protocol >= 4:  # sets have instructions of their own from here on
        assert load_plain(pickle.dumps({1, 2}, protocol)) == {1, 2}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"error": "no GPU"}, "no GPU"),
        ([1.0], "no 'scores'"),
        ({"scores": [1.0, 2.0]}, "2 scores came for 1"),
        ({"scores": {"a": 1}}, "no list"),
    ],
)
def test_pickled_answers_are_checked(value: Any, message: str) -> None:
    with service(in_turn(Answer(pickle.dumps(value)))) as there:
        reward = PickledReward(there.url, fields={}, **QUICK)
        with pytest.raises(ServiceError, match=message):
            reward(images=[picture()])
