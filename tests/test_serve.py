"""The reward server: batches, bounds, refusals, and that what was taken is answered."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_unigrpo.reward import Reward
from lightning_unigrpo.rewards import HTTPReward, JPEGIncompressibility
from lightning_unigrpo.rewards.http import ServiceError, png
from lightning_unigrpo.serve import Limits, build, run, to_tensor
from tests.services import decode, free_port, served

ONCE: dict[str, Any] = {"retries": 0, "wait": 0.0, "timeout": 10.0}


def noise(seed: int, height: int = 4, width: int = 4) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Send a request by hand."""
    address = url.removeprefix("http://").split("/")[0]
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("POST", "/compute", body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), json.loads(answer.read())
    finally:
        connection.close()


class Gate:
    """A reward that waits to be let through, and remembers its batches."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> list[float]:
        self.batches.append(list(prompts))
        self.begun.set()
        assert self.open.wait(10)
        if "bad" in prompts:
            raise ValueError("bad prompt")
        return [float(len(prompt)) for prompt in prompts]


def taken(url: str, number: int) -> None:
    """Wait until so many requests are taken."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.request("GET", "/health")
        health = json.loads(connection.getresponse().read())
        connection.close()
        assert health["status"] == "ok"
        if health["taken"] == number:
            return
        time.sleep(0.005)
    raise AssertionError(f"{health} instead of {number}")


def test_it_scores_as_a_call_does() -> None:
    images = [noise(i) for i in range(5)]
    answers = [3, 1, 4, 1, 5]

    def mixed(images: torch.Tensor, answer: list[int], input_images: Any) -> dict[str, Any]:
        assert images.dtype == torch.float32
        seen = [float(given[0].mean()) for given in input_images]
        score = images.mean((1, 2, 3)) + torch.tensor(answer) + torch.tensor(seen)
        return {"score": score.where(score < 5, torch.nan), "detail": answer}

    extra = torch.full((3, 2, 2), 51 / 255)
    stack = torch.stack([to_tensor(image) for image in images])
    called = mixed(stack, answers, [(extra,)] * 5)["score"]
    with served(mixed, batch_size=2) as url:  # a request larger than a batch is cut
        reward = HTTPReward(url, columns=["answer"], **ONCE)
        got = reward(prompts=["p"] * 5, images=images, answer=answers, input_images=[(extra,)] * 5)
    assert got[4] is None
    assert got[:4] == pytest.approx(called[:4].tolist(), abs=1e-6)


@pytest.mark.parametrize("kind", ["pil", "uint8", "tensor"])
def test_rewards_get_the_images_they_declare(kind: Any) -> None:
    """Of several sizes: then tensors come as a list."""
    seen: list[Any] = []

    def reward(images: Any) -> list[float]:
        seen.extend(images)
        return [1.0] * len(images)

    images = [noise(0), noise(1, 6, 5)]
    with served(Reward(reward, image_format=kind)) as url:
        assert HTTPReward(url, **ONCE)(prompts=["a", "b"], images=images) == [1.0, 1.0]
    for image, got in zip(images, seen, strict=True):
        expected = np.asarray(image)
        if kind == "pil":
            assert np.array_equal(got, expected)
        else:
            scale = 255 if kind == "tensor" else 1
            assert np.array_equal((got * scale).round().byte().permute(1, 2, 0), expected)


def test_a_built_in_reward_scores_the_same_behind_it() -> None:
    images = [noise(i, 32, 32) for i in range(3)]
    local = JPEGIncompressibility()
    given = images if local.image_format == "pil" else torch.stack([to_tensor(i) for i in images])
    with served(JPEGIncompressibility()) as url:
        far = HTTPReward(url, **ONCE)(prompts=["a"] * 3, images=images)
    assert far == pytest.approx(torch.as_tensor(local(images=given)).tolist(), abs=1e-6)


def test_requests_that_wait_are_scored_together_and_one_bad_one_costs_no_other() -> None:
    gate = Gate()
    words = ["a", "bb", "bad", "dddd"]
    with served(gate, batch_size=4) as url, ThreadPoolExecutor(5) as pool:
        first = pool.submit(HTTPReward(url, **ONCE), prompts=["first"])
        assert gate.begun.wait(10)
        rest = []
        for number, word in enumerate(words, 2):
            rest.append(pool.submit(HTTPReward(url, **ONCE), prompts=[word]))
            taken(url, number)
        gate.open.set()
        assert first.result() == [5.0]
        assert [rest[i].result() for i in (0, 1, 3)] == [[1.0], [2.0], [4.0]]
        with pytest.raises(ServiceError, match=r"status 500: .*bad prompt"):
            rest[2].result()
    assert gate.batches == [["first"], words, *([word] for word in words)]


def test_a_request_that_fits_a_batch_is_not_cut() -> None:
    gate = Gate()
    with served(gate, batch_size=2) as url, ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(HTTPReward(url, **ONCE), prompts=["first"])]
        assert gate.begun.wait(10)
        for number, words in enumerate((["a"], ["bb", "c"]), 2):
            jobs.append(pool.submit(HTTPReward(url, **ONCE), prompts=words))
            taken(url, number)
        gate.open.set()
        assert [job.result() for job in jobs] == [[5.0], [1.0], [2.0, 1.0]]
    assert gate.batches == [["first"], ["a"], ["bb", "c"]]


def test_requests_of_other_columns_are_scored_apart() -> None:
    gate, calls = Gate(), []

    def reward(prompts: list[str], answer: list[int] | None = None) -> list[float]:
        calls.append(answer)
        return gate(prompts)

    with served(reward) as url, ThreadPoolExecutor(3) as pool:
        first = pool.submit(HTTPReward(url, **ONCE), prompts=["a"])
        assert gate.begun.wait(10)
        second = pool.submit(HTTPReward(url, **ONCE), prompts=["bb"])
        taken(url, 2)
        third = pool.submit(HTTPReward(url, columns=["answer"], **ONCE), prompts=["c"], answer=[7])
        taken(url, 3)
        gate.open.set()
        assert [job.result() for job in (first, second, third)] == [[1.0], [2.0], [1.0]]
    assert calls == [None, None, [7]]


def test_more_than_the_queue_holds_is_told_to_come_again() -> None:
    gate = Gate()
    with served(gate, queue_size=2) as url, ThreadPoolExecutor(3) as pool:
        held = [pool.submit(HTTPReward(url, **ONCE), prompts=["a"]) for _ in range(2)]
        taken(url, 2)
        status, headers, answer = post(url, b'{"prompt": ["a"]}')
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer == {"detail": "2 requests are waiting"}
        late = HTTPReward(url, retries=5, backoff=0.01, wait=0.0)
        waiting = pool.submit(late, prompts=["late"])
        gate.open.set()
        assert [job.result() for job in held] == [[1.0], [1.0]]
        assert waiting.result() == [4.0]  # it asked again


def test_requests_whose_client_has_gone_are_not_scored() -> None:
    gate = Gate()
    with served(gate) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(HTTPReward(url, **ONCE), prompts=["first"])
        assert gate.begun.wait(10)
        with pytest.raises(ServiceError, match="ReadTimeout"):
            HTTPReward(url, **{**ONCE, "timeout": 0.1})(prompts=["gone"])
        taken(url, 2)
        time.sleep(0.05)  # until the server has seen that the connection is closed
        gate.open.set()
        assert first.result() == [5.0]
        taken(url, 0)
    assert gate.batches == [["first"]]


def bomb() -> str:
    file = io.BytesIO()
    Image.new("L", (2000, 1000)).save(file, "PNG")  # 2 megapixels in 2 kB
    return base64.b64encode(file.getvalue()).decode()


ONE, WIDE = png(noise(0)), png(Image.new("RGB", (400, 300)))
REFUSED = {
    "not JSON": (b"{", 400, "no request for scores"),
    "a list": (b"[1]", 400, "no request for scores"),
    "deep": (b"[" * 5000, 400, "RecursionError|no request"),
    "no prompts": (b'{"prompt": []}', 400, "lists of one length"),
    "prompts in one": (b'{"prompt": "abc", "image": null}', 400, "lists of one length"),
    "too few images": ({"prompt": ["a", "b"], "image": [ONE]}, 400, "'images': 1"),
    "too few values": ({"prompt": ["a", "b"], "extra": {"answer": [1]}}, 400, "'answer': 1"),
    "a value": ({"prompt": ["a"], "extra": {"answer": 1}}, 400, "'answer': None"),
    "video": ({"prompt": ["a"], "video": [[ONE]]}, 400, "videos"),
    "no base64": ({"prompt": ["a"], "image": ["%%%%"]}, 400, "no base64"),
    "no image": ({"prompt": ["a"], "image": ["AAAA"]}, 400, "UnidentifiedImage"),
    "half an image": ({"prompt": ["a"], "image": [ONE[:80]]}, 400, "no request for scores"),
    "bomb": ({"prompt": ["a"], "image": [bomb()]}, 413, "too many pixels"),
    "many images": ({"prompt": ["a"] * 9, "image": [WIDE] * 9}, 413, "too many pixels"),
    "long": ({"prompt": ["a" * 600_000]}, 413, "longer than 0.5 MiB"),
    "column": ({"prompt": ["a"], "image": [ONE]}, 422, "answer"),
}


@pytest.fixture(scope="module")
def strict() -> Any:
    """Run a server with small limits whose reward asks for a column."""

    def reward(prompts: Any, images: Any, answer: Any) -> list[float]:
        return [1.0] * len(prompts)

    with served(reward, max_mib=0.5, max_megapixels=1.0, read_timeout=0.2) as url:
        yield url
        good = {"prompt": ["a"], "image": [ONE], "extra": {"answer": [1]}}
        assert post(url, json.dumps(good).encode())[2] == {"rewards": [1.0]}  # still at work
        taken(url, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused(name: str, strict: str) -> None:
    body, status, detail = REFUSED[name]
    got, _, answer = post(strict, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert got == status
    assert any(part in answer["detail"] for part in detail.split("|"))


def test_a_body_without_a_length_is_counted_as_it_comes(strict: str) -> None:
    connection = http.client.HTTPConnection(strict.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/compute")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        for _ in range(64):
            connection.send(b"%x\r\n" % 65536 + b" " * 65536 + b"\r\n")
            sent += 65536
        connection.send(b"0\r\n\r\n")
    except OSError:
        assert sent > 2**19
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_does_not_come_gives_its_place_back(strict: str) -> None:
    host, port = strict.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as held:
        held.sendall(b"POST /compute HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        taken(strict, 1)
        begun = time.monotonic()
        assert held.recv(4096).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 3
    taken(strict, 0)


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES_TOKEN", "s3cret")

    def reward(prompts: list[str]) -> list[float]:
        return [1.0] * len(prompts)

    with served(reward, token_env="SCORES_TOKEN") as url:
        for header in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
            status, headers, answer = post(url, b'{"prompt": ["a"]}', **header)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
            assert "s3cret" not in str(answer)
        assert HTTPReward(url, token_env="SCORES_TOKEN", **ONCE)(prompts=["a"]) == [1.0]
        open_to_all = HTTPReward(url, **{**ONCE, "wait": 1.0})
        open_to_all.prepare()  # health needs no token
        open_to_all.release()
    monkeypatch.delenv("SCORES_TOKEN")
    with pytest.raises(ValueError, match="token_env names 'SCORES_TOKEN', which is not set"):
        build(reward, token_env="SCORES_TOKEN")


def test_it_listens_to_this_machine_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    def reward(prompts: list[str]) -> list[float]:
        return [1.0]

    assert build(reward).config.host == "127.0.0.1"
    assert not caplog.records
    build(reward, host="0.0.0.0")
    assert "Everybody who reaches 0.0.0.0" in caplog.text


def test_the_reward_is_prepared_before_and_released_after() -> None:
    calls: list[Any] = []

    class Model:
        def prepare(self, device: torch.device) -> None:
            calls.append(device)

        def release(self) -> None:
            calls.append("released")

        async def __call__(self, prompts: list[str]) -> list[float]:
            calls.append(prompts)
            return [1.0]

    with served(Model()) as url:
        assert HTTPReward(url, **ONCE)(prompts=["a"]) == [1.0]
    assert calls == [torch.device("cpu"), ["a"], "released"]


def test_a_reward_that_cannot_be_prepared_is_no_server() -> None:
    class Model:
        def prepare(self, device: torch.device) -> None:
            raise OSError("no weights")

        def __call__(self, prompts: list[str]) -> list[float]:
            return [1.0]

    server = build(Model(), port=0)
    server.config.log_level = "critical"
    server.config.configure_logging()
    with pytest.raises(RuntimeError, match="did not start"):
        run(server)


@pytest.mark.parametrize("key", ["batch_size", "queue_size", "max_mib"])
def test_limits_are_checked(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is 0; give more than 0"):
        Limits(**{key: 0})


class Slow:
    """Scores after a while, for the test of a server's end."""

    def __call__(self, prompts: list[str], images: Any) -> list[float]:
        Path("begun").touch()
        time.sleep(0.5)
        return [float(image.mean()) for image in images]


@pytest.mark.slow
def test_the_command_line_serves_and_ends_without_losing_what_it_took(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "serve.yaml").write_text(
        "reward:\n  class_path: lightning_unigrpo.Reward\n  init_args:\n"
        "    fn: {class_path: tests.test_serve.Slow}\n"
        f"port: {port}\nbatch_size: 2\nqueue_size: 99\n"
    )
    code = (
        "import sys; from lightning_unigrpo import cli\n"
        "assert not {'starlette', 'uvicorn'} & set(sys.modules)\n"
        "sys.argv[1:] = ['serve-reward', '--config', 'serve.yaml', '--port', sys.argv[1]]\n"
        "cli.main()"
    )
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(port)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    images = [noise(i) for i in range(6)]
    try:
        with ThreadPoolExecutor(6) as pool:
            reward = HTTPReward(f"http://127.0.0.1:{port}", retries=0, wait=60.0)
            reward.prepare()
            jobs = [pool.submit(reward, prompts=["a"], images=[image]) for image in images]
            taken(reward.url, 6)
            process.send_signal(signal.SIGTERM)  # two are scored, four wait
            far = [job.result()[0] for job in jobs]
        assert far == pytest.approx([float(to_tensor(decode(png(i))).mean()) for i in images])
        with pytest.raises(ServiceError, match="ConnectError"):
            HTTPReward(reward.url, **ONCE)(prompts=["late"], images=images[:1])
        reward.release()
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in {0, -signal.SIGTERM}
    assert f"Uvicorn running on http://127.0.0.1:{port}" in told
    assert "Traceback" not in told
