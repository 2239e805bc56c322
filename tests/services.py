"""Loopback services for tests: scripted ones that misbehave, and our own server in a thread."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


@dataclass
class Request:
    """What arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What is sent back; ``cut`` ends the connection without a word, ``drip`` is the pause between bytes."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    delay: float = 0.0
    drip: float | None = None


def say(value: Any, **fields: Any) -> Answer:
    return Answer(json.dumps(value).encode(), **fields)


Script = Callable[[int, Request], Answer]
"""The answer to the n-th POST, counted from 0."""


@dataclass
class Service:
    """A running service."""

    url: str
    requests: list[Request] = field(default_factory=list)


@contextmanager
def service(script: Script, port: int = 0) -> Iterator[Service]:
    """Run a script on this machine until the block ends; GET always answers that all is well."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(say({"status": "ok"}))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = Request("POST", self.path, dict(self.headers), body)
            with lock:
                number = len(running.requests)
                running.requests.append(request)
            self.reply(script(number, request))

        def reply(self, answer: Answer) -> None:
            time.sleep(answer.delay)
            self.close_connection = answer.cut
            if answer.cut:
                return
            try:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                size = len(answer.body) if answer.drip is None else 1
                for first in range(0, len(answer.body), max(1, size)):
                    self.wfile.write(answer.body[first : first + size])
                    time.sleep(answer.drip or 0)
            except OSError:
                self.close_connection = True  # the client has given up

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    server = Server(("127.0.0.1", port), Handler)
    running = Service(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_turn(*answers: Answer) -> Script:
    """Give these answers, and the last one ever after."""
    return lambda number, _: answers[min(number, len(answers) - 1)]


def free_port() -> int:
    """Return a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def decode(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def grey(images: Sequence[Image.Image]) -> list[float]:
    """Return the mean grey level in [0, 1] of each image."""
    return [float(np.asarray(image).mean() / 255) for image in images]


def score_grey(number: int, request: Request) -> Answer:
    """Answer as Flow-Factory's server does, with grey levels."""
    return say({"rewards": grey([decode(text) for text in request.json()["image"]])})


@contextmanager
def served(reward: Any, **settings: Any) -> Iterator[str]:
    """Run our own server in a thread, and give its URL; ``settings`` of ``build`` or of ``Limits``."""
    from lightning_unigrpo.serve import Limits, build

    names = Limits.__dataclass_fields__
    limits = Limits(**{k: v for k, v in settings.items() if k in names})
    rest = {k: v for k, v in settings.items() if k not in names}
    server = build(reward, port=0, limits=limits, **rest)
    server.config.log_level = "critical"
    server.config.configure_logging()
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 10
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.005)
    try:
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15)
