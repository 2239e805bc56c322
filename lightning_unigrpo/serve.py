"""Any reward behind HTTP: ``unigrpo serve-reward --config serve.yaml``.

The JSON protocol is that of :class:`~lightning_unigrpo.rewards.http.HTTPReward`. Requests that arrive
together are scored together; what cannot be taken is refused before it is read. A request that was taken is
answered, at shutdown too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import json
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from PIL import Image

from lightning_unigrpo.reward import (
    ImageFormat,
    MissingColumnError,
    Reward,
    convert_images,
    read_scores,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

MIB = 2**20
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
log = logging.getLogger(__name__)

Scores: TypeAlias = list[float | None]
Columns: TypeAlias = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a server takes on."""

    batch_size: int = 16
    """Images per call of the reward."""
    concurrency: int = 1
    """Calls of the reward at the same time."""
    queue_size: int = 256
    """Requests that are read, wait or are scored; more are refused with status 503."""
    batch_wait: float = 0.005
    """Seconds to wait for company after the first request."""
    max_mib: float = 64.0
    """Longest body, MiB; longer ones are refused with status 413."""
    max_megapixels: float = 64.0
    """All images of a request together, decoded; more are refused with status 413."""
    read_timeout: float = 30.0
    """Seconds in which a body must arrive."""
    grace: float = 60.0
    """Seconds that shutdown waits for what was taken."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "batch_wait"):
                raise ValueError(f"serve-reward: {name} is {value}; give more than 0.")


class RefusedError(Exception):
    """A request that is not scored.

    Args:
        status: of HTTP.
        detail: why.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(eq=False)
class Job:
    """One request on its way."""

    columns: Columns
    """As lists; ``images`` are PIL images or None."""
    count: int
    """Rollouts in it."""
    is_gone: Callable[[], Awaitable[bool]]
    """Whether nobody waits for it any more."""
    scores: asyncio.Future[Scores]

    def refuse(self, status: int, detail: str) -> None:
        """Answer without scores."""
        if not self.scores.done():
            self.scores.set_exception(RefusedError(status, detail))


@dataclass(eq=False)
class Batcher:
    """Calls a reward with what has arrived.

    Args:
        reward: to be served.
        limits: see :class:`Limits`.
        device: where ``tensor`` images are put.
    """

    reward: Reward
    limits: Limits
    device: torch.device
    waiting: deque[Job] = field(default_factory=deque)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Prepare the reward, score what is added, and release the reward."""
        self._arrived = asyncio.Event()
        with ThreadPoolExecutor(self.limits.concurrency, "reward") as pool:
            self._pool, loop = pool, asyncio.get_running_loop()
            await loop.run_in_executor(pool, self._call, "prepare", self.device)
            workers = [asyncio.create_task(self._work()) for _ in range(self.limits.concurrency)]
            try:
                yield
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                await loop.run_in_executor(pool, self._call, "release")

    async def score(
        self, columns: Columns, count: int, is_gone: Callable[[], Awaitable[bool]]
    ) -> Scores:
        """Return the scores of one request, None where there is none."""
        job = Job(columns, count, is_gone, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self._arrived.set()
        return await job.scores

    def _call(self, method: str, *arguments: Any) -> None:
        getattr(self.reward.fn, method, lambda *_: None)(*arguments)

    async def _work(self) -> None:
        while True:
            jobs = await self._take()
            for job in jobs:
                if await job.is_gone():  # a client that asks again must not make the queue grow
                    job.refuse(408, "nobody waits for this answer")
            jobs = [job for job in jobs if not job.scores.done()]
            if jobs:
                await self._answer(jobs)

    async def _take(self) -> list[Job]:
        """Return requests that can be scored in one call, or more of one that is larger."""
        while not self.waiting:
            self._arrived.clear()
            await self._arrived.wait()
        await asyncio.sleep(self.limits.batch_wait)
        jobs: list[Job] = []
        rows = 0
        while self.waiting:
            job = self.waiting[0]
            fits = rows + job.count <= self.limits.batch_size
            if jobs and not (fits and job.columns.keys() == jobs[0].columns.keys()):
                break
            jobs.append(self.waiting.popleft())
            rows += job.count
        return jobs

    async def _answer(self, jobs: Sequence[Job]) -> None:
        names = jobs[0].columns
        merged = {name: [value for job in jobs for value in job.columns[name]] for name in names}
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self._pool, self._score, merged)
        except Exception as error:
            if len(jobs) > 1:  # so that one bad request does not cost the others their scores
                for job in jobs:
                    await self._answer([job])
                return
            log.exception("The reward failed.")
            jobs[0].refuse(500, repr(error)[:500])
            return
        for job in jobs:
            if not job.scores.done():
                job.scores.set_result(scores[: job.count])
            scores = scores[job.count :]

    def _score(self, columns: Columns) -> Scores:
        """Score rollouts, ``batch_size`` at a time; on a thread."""
        count, scores = len(columns["prompts"]), []
        size = self.reward.batch_size or self.limits.batch_size
        for first in range(0, count, size):
            part = {name: column[first : first + size] for name, column in columns.items()}
            if "images" in part:
                part["images"] = self._convert(part["images"])
            rows = min(size, count - first)
            values, _ = read_scores(str(self.reward.name), self.reward(**part), rows)
            scores += [value if value == value else None for value in values.tolist()]
        return scores

    def _convert(self, images: list[Image.Image | None]) -> Any:
        if self.reward.image_format == "pil":
            return images
        tensors = [None if image is None else to_tensor(image).to(self.device) for image in images]
        drawn = [tensor for tensor in tensors if tensor is not None]
        same = len(drawn) == len(images) and len({tensor.shape for tensor in drawn}) == 1
        kind = cast(ImageFormat, self.reward.image_format)
        return convert_images(torch.stack(drawn) if same else tensors, kind)


@dataclass(eq=False)
class RewardServer:
    """The three answers of a reward server.

    Args:
        batcher: scores.
        token: that requests for scores must bring, or None.
    """

    batcher: Batcher
    token: str | None = None
    taken: int = 0
    """Requests that are read, wait, or are scored."""

    def app(self) -> Starlette:
        """Return the application."""
        from starlette.applications import Starlette
        from starlette.routing import Route

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            async with self.batcher.running():
                yield

        routes = [
            Route("/health", self.health),
            Route("/compute", self.compute, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def health(self, request: Request) -> Response:
        """Say that the server is up, which it is not before the reward is prepared."""
        from starlette.responses import JSONResponse

        return JSONResponse({"status": "ok", "taken": self.taken})

    async def compute(self, request: Request) -> Response:
        """Answer a request for scores."""
        from starlette.responses import JSONResponse

        try:
            return JSONResponse({"rewards": await self._compute(request)})
        except RefusedError as error:
            headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
            return JSONResponse({"detail": str(error)}, error.status, headers.get(error.status))

    async def _compute(self, request: Request) -> Scores:
        limits = self.batcher.limits
        sent = request.headers.get("authorization", "")
        if self.token and not hmac.compare_digest(sent.encode(), f"Bearer {self.token}".encode()):
            raise RefusedError(401, "the bearer token is missing or wrong")
        if self.taken >= limits.queue_size:
            raise RefusedError(503, f"{self.taken} requests are waiting")
        self.taken += 1
        try:
            body = await self._read(request)
            loop = asyncio.get_running_loop()
            columns, count = await loop.run_in_executor(None, parse, body, limits.max_megapixels)
            self._check(columns)
            return await self.batcher.score(columns, count, request.is_disconnected)
        finally:
            self.taken -= 1

    async def _read(self, request: Request) -> bytes:
        from anyio import fail_after
        from starlette.requests import ClientDisconnect

        limits, body = self.batcher.limits, bytearray()
        most = int(limits.max_mib * MIB)
        too_long = RefusedError(413, f"the body is longer than {limits.max_mib} MiB (max_mib)")
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > most:
            raise too_long
        try:
            with fail_after(limits.read_timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive in {limits.read_timeout} s") from None
        except ClientDisconnect:
            raise RefusedError(408, "the body did not arrive") from None
        return bytes(body)

    def _check(self, columns: Columns) -> None:
        try:
            self.batcher.reward.select(columns)
        except MissingColumnError as error:
            raise RefusedError(422, str(error)) from None


def parse(body: bytes, max_megapixels: float) -> tuple[Columns, int]:
    """Read a request.

    Args:
        body: JSON.
        max_megapixels: of all images together.

    Returns:
        ``prompts``, ``images`` (PIL), ``input_images`` (tensors) and further columns where they were sent,
        as lists of one length; and that length.

    Raises:
        RefusedError: when it is no request, or its images are too large.
    """
    try:
        sent = json.loads(body)
        columns: Columns = {"prompts": sent["prompt"]}
        room = Room(max_megapixels * 1e6)
        if sent.get("image"):
            columns["images"] = [
                None if image is None else room.read(image) for image in sent["image"]
            ]
        if sent.get("condition_images"):
            columns["input_images"] = [
                [to_tensor(room.read(image)) for image in images]
                for images in sent["condition_images"]
            ]
        extra = dict(sent.get("extra") or {})
    except RefusedError:
        raise
    except Exception as error:  # whatever a damaged image makes its reader raise
        raise RefusedError(400, f"this is no request for scores: {error!r}"[:300]) from None
    if sent.get("video") or sent.get("condition_videos"):
        raise RefusedError(400, "videos are not scored here")
    columns |= {name: column for name, column in extra.items() if name not in columns}
    lengths = {n: len(c) if isinstance(c, list) else None for n, c in columns.items()}
    count = lengths["prompts"]
    if not count or set(lengths.values()) != {count}:
        raise RefusedError(400, f"lists of one length are needed, not of {lengths}")
    return columns, count


@dataclass
class Room:
    """Decodes images until there is no room for more."""

    pixels: float

    def read(self, text: str) -> Image.Image:
        """Decode base64 of a PNG, JPEG or WebP.

        Raises:
            RefusedError: when the image is too large.
            ValueError: when it is none.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError("an image is no base64") from error
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        self.pixels -= image.width * image.height  # known before anything is decoded
        if self.pixels < 0:
            raise RefusedError(413, "the images have too many pixels (max_megapixels)")
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image as ``[3, H, W]`` float32 in [0, 1]."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def build(
    reward: Callable[..., Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    token_env: str | None = None,
    limits: Limits | None = None,
) -> Server:
    """Return a server that scores with a reward; ``run()`` serves until SIGINT or SIGTERM.

    Args:
        reward: a callable of the reward protocol.
        host: address to listen at; only this machine can reach the default.
        port: 0 = any free one.
        device: for the reward's model and its images.
        token_env: name of the environment variable that holds a bearer token; ``None`` = anybody may ask.
        limits: batches, queue, sizes; ``None`` = the defaults.

    Raises:
        ValueError: when the server's packages are missing, or the token is.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(
            "serve-reward needs starlette and uvicorn: pip install 'lightning-unigrpo[serve]'."
        ) from error
    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise ValueError(f"token_env names {token_env!r}, which is not set in the environment.")
    if host not in LOOPBACK and token is None:
        log.warning(
            "Everybody who reaches %s can ask for scores; token_env would ask for a token.", host
        )
    limits = limits or Limits()
    wrapped = reward if isinstance(reward, Reward) else Reward(reward)
    server = RewardServer(Batcher(wrapped, limits, torch.device(device)), token)
    config = uvicorn.Config(
        server.app(),
        host=host,
        port=port,
        access_log=False,
        timeout_graceful_shutdown=int(limits.grace),
        backlog=2048,
    )
    return uvicorn.Server(config)


def run(server: Server) -> None:
    """Serve until SIGINT or SIGTERM; what was taken by then is answered first.

    Raises:
        RuntimeError: when the server does not start.
    """
    failed: SystemExit | None = None
    try:
        server.run()
    except KeyboardInterrupt:  # the signal that ended it, once more
        return
    except SystemExit as stop:  # uvicorn has logged the reason; its older versions return
        failed = stop
    if not server.started:
        raise RuntimeError(
            "The reward server did not start: the lines above say why (reward, host, port)."
        ) from failed
