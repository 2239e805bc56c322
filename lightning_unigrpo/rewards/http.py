"""Rewards that another process computes: retries, bounds and secrets, and the JSON protocol."""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from random import Random
from threading import Event
from typing import Any, ClassVar
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor
from typing_extensions import Self

from lightning_unigrpo.reward import convert_images

try:  # huggingface_hub 2 brings httpx2, 1 brings httpx: one interface under two names
    import httpx2 as httpx
except ImportError:  # pragma: no cover
    import httpx  # type: ignore[no-redef]

MIB = 2**20
AGAIN = {408, 429}
"""Statuses that may pass, beside those from 500 on."""
LONGEST_WAIT = 30.0
"""Seconds between two attempts, whatever the service asks for."""


class ServiceError(RuntimeError):
    """A service refused, or gave an answer that cannot be used: its rollouts stay unscored."""


class Connection:
    """Open connections to one service; used by several threads at once.

    Args:
        reward: says where to and how patiently.
    """

    def __init__(self, reward: RemoteReward) -> None:
        self.reward = reward
        self._closed = Event()
        # Its own: the global generator belongs to the run's draws.
        self._jitter = Random()  # noqa: S311
        self._token = reward.read_token()
        headers = {"Accept-Encoding": "identity"}  # what is counted is what arrives
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self._http = httpx.Client(
            headers=headers,
            timeout=reward.timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close what is open; calls that still wait for an answer or a next attempt end with an error."""
        self._closed.set()
        self._http.close()

    def send(self, method: str, path: str, body: bytes = b"", kind: str = "") -> bytes:
        """Ask until there is an answer, or too often.

        Raises:
            ServiceError: when the service refuses, or gives no answer in all attempts.
        """
        attempts = self.reward.retries + 1
        for attempt in range(attempts):
            try:
                return self._attempt(method, path, body, kind)
            except _TryAgainError as error:
                why, asked = str(error), error.wait
            pause = self.reward.backoff * 2**attempt * self._jitter.uniform(0.5, 1)
            if attempt + 1 < attempts and self._closed.wait(min(max(pause, asked), LONGEST_WAIT)):
                why = "the collection ended"
                break
        raise ServiceError(f"{self.reward.url}{path}: {why} (attempt {attempt + 1} of {attempts})")

    def _attempt(self, method: str, path: str, body: bytes, kind: str) -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        end = time.monotonic() + self.reward.timeout
        answer = bytearray()
        try:
            with self._http.stream(
                method, self.reward.url + path, content=body, headers=headers
            ) as got:
                for part in got.iter_raw():
                    answer += part
                    if len(answer) > self.reward.max_bytes:
                        raise ServiceError(
                            f"{self.reward.url}{path}: the answer is longer than max_bytes = "
                            f"{self.reward.max_bytes}"
                        )
                    # httpx bounds the silence between two parts, not their sum.
                    if time.monotonic() > end:
                        raise _TryAgainError(f"no whole answer within {self.reward.timeout} s")
        except httpx.TransportError as error:
            raise _TryAgainError(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:
            if self._closed.is_set():  # httpx says that the client is closed
                raise ServiceError(f"{self.reward.url}{path}: the collection ended") from error
            raise
        status = got.status_code
        if status == 200:
            return bytes(answer)
        why = f"status {status}: {self._excerpt(answer)}"
        if status in AGAIN or status >= 500:
            raise _TryAgainError(why, _seconds(got.headers.get("Retry-After")))
        raise ServiceError(f"{self.reward.url}{path}: {why}")

    def _excerpt(self, answer: bytearray) -> str:
        """Return the beginning of an answer, without the token that a service may echo."""
        text = answer.decode("utf-8", "replace")
        return (text.replace(self._token, "***") if self._token else text)[:300]


class _TryAgainError(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


def _seconds(text: str | None) -> float:
    """Read ``Retry-After``; a date counts as nothing asked for."""
    return float(text) if text is not None and text.isdigit() else 0.0


class RemoteReward:
    """What all rewards over the network have in common.

    Connection errors, timeouts and the statuses 408, 429 and 5xx are tried again after ``backoff``,
    twice ``backoff``, ... seconds (each times a random number in [0.5, 1], at least what ``Retry-After``
    asks for, at most 30); any other status is an error at once, redirections too, so that a token goes
    nowhere else. Each failed call costs its rollouts their score and nothing more.

    Args:
        url: where the service is, ``http`` or ``https``.
        timeout: seconds per attempt, until the whole answer is there.
        retries: attempts after the first.
        backoff: seconds before the second attempt.
        max_bytes: longest answer that is read.
        token_env: name of the environment variable that holds a bearer token; ``None`` = no token.
        wait: seconds in which the service must answer before the first rollout is drawn; 0 = no check.

    Raises:
        ValueError: for a URL or a number that cannot be used.
    """

    is_remote = True
    image_format = "pil"
    health: ClassVar[str] = "/health"
    """What is asked whether the service is up."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_bytes: int = 16 * MIB,
        token_env: str | None = None,
        wait: float = 60.0,
    ) -> None:
        self.url = check_url(url, type(self).__name__)
        numbers = {"timeout": timeout, "max_bytes": max_bytes}
        at_least_0 = {"retries": retries, "backoff": backoff, "wait": wait}
        wrong = [k for k, v in numbers.items() if v <= 0]
        wrong += [k for k, v in at_least_0.items() if v < 0]
        if wrong:
            raise ValueError(
                f"{type(self).__name__} got {wrong[0]}={(numbers | at_least_0)[wrong[0]]}; timeout and "
                "max_bytes must be more than 0, retries, backoff and wait 0 or more (model.rewards)."
            )
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.max_bytes, self.token_env, self.wait = max_bytes, token_env, wait
        self._connection: Connection | None = None
        self._answered = wait == 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave connections behind when copied or sent to another process."""
        return {**self.__dict__, "_connection": None}

    def prepare(self, device: object = None) -> None:
        """Open connections for a collection; the first time, see whether the service is there.

        Raises:
            ServiceError: when it does not answer within ``wait`` seconds.
            ValueError: when the token is not in the environment.
        """
        self.release()
        self._connection = Connection(self)
        if not self._answered:
            self._await_answer(self._connection)
            self._answered = True

    def release(self) -> None:
        """Close the connections; calls that are still out end with an error."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def send(self, path: str, body: bytes, kind: str) -> bytes:
        """Post a body of a media type and return the answer's; see :meth:`Connection.send`."""
        held = self._connection
        with nullcontext(held) if held is not None else Connection(self) as connection:
            return connection.send("POST", path, body, kind)

    def read_token(self) -> str | None:
        """Return the token.

        Raises:
            ValueError: when the variable is not set, or holds what no header can.
        """
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "")
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError(
                f"{type(self).__name__}.token_env names {self.token_env!r}, which is not set in the "
                "environment, or holds other characters than a token may have (model.rewards)."
            )
        return token

    def _await_answer(self, connection: Connection) -> None:
        end = time.monotonic() + self.wait
        pause = 0.1
        while True:
            try:
                connection._attempt("GET", self.health, b"", "")
                return
            except ServiceError as error:
                if "status 401" in str(error) or "status 403" in str(error):
                    raise
                return  # a service without this path is up all the same
            except _TryAgainError as error:
                if time.monotonic() + pause > end:
                    raise ServiceError(
                        f"{self.url} does not answer ({error}): start the service, or change url or "
                        f"wait = {self.wait} of {type(self).__name__} (model.rewards)."
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def check_url(url: str, who: str) -> str:
    """Return a URL without its last slash.

    Raises:
        ValueError: when it is none, or holds a secret that would end up in logs and configurations.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(
            f"{who}.url is {url!r}; give one such as http://127.0.0.1:8000 (model.rewards)."
        )
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"{who}.url for {parts.hostname} holds a user, a password or a query; put a token into an "
            "environment variable and its name into token_env (model.rewards)."
        )
    return url.rstrip("/")


def offer(target: object, names: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Let an object be asked for these columns, as a function with such a signature would be."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = {name: inspect.Parameter(name, kind) for name in names}
    parameters |= {
        n: inspect.Parameter(n, kind, default=None) for n in optional if n not in parameters
    }
    target.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]


def png(image: Image.Image) -> str:
    """Return an image as base64 of a PNG, quickly rather than small."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def read_json(answer: bytes) -> Any:
    """Read an answer.

    Raises:
        ServiceError: when it is no JSON, or JSON that says ``error``.
    """
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"the answer is no JSON: {answer[:80]!r}") from error
    if isinstance(value, Mapping) and value.get("error"):
        raise ServiceError(f"the service says: {str(value['error'])[:300]}")
    return value


def read_numbers(values: Any, count: int) -> list[float | None]:
    """Check what a service sent as scores, one per rollout.

    Raises:
        ServiceError: when it is no list of ``count`` numbers or nulls.
    """
    if not isinstance(values, list | tuple):
        raise ServiceError(f"the scores are no list, but {str(values)[:80]!r}")
    if len(values) != count:
        raise ServiceError(f"{len(values)} scores came for {count} rollouts")
    odd = [v for v in values if isinstance(v, bool) or not isinstance(v, int | float | None)]
    if odd:
        raise ServiceError(f"a score is no number, but {str(odd[0])[:80]!r}")
    try:
        return [None if value is None else float(value) for value in values]
    except OverflowError as error:
        raise ServiceError("a score is too large for a number") from error


class HTTPReward(RemoteReward):
    """Asks a reward server: ``unigrpo serve-reward``, or one of Flow-Factory's.

    ``POST /compute`` of ``{"prompt": [...], "image": [base64 PNG], "condition_images": [[base64 PNG]],
    "extra": {column: [...]}}``, answered by ``{"rewards": [number or null]}``; ``GET /health``.

    Source: Flow-Factory, https://github.com/X-GenGroup/Flow-Factory (``reward_server``); ``extra`` and
    null are ours.

    Args:
        url: without ``/compute``.
        columns: what is sent beside prompts and images, each a column of the data set, ``completions``
            or ``num_tokens``.
        **service: see :class:`RemoteReward`.

    Example:
        >>> reward = HTTPReward("http://127.0.0.1:8000", columns=["answer"], retries=2)
        >>> (reward.url, reward.retries)
        ('http://127.0.0.1:8000', 2)
    """

    def __init__(self, url: str, *, columns: Sequence[str] = (), **service: Any) -> None:
        super().__init__(url, **service)
        self.columns = tuple(columns)
        offer(self, ("prompts", *self.columns), optional=("images", "input_images"))

    def __call__(
        self,
        *,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None] | None = None,
        input_images: Sequence[Sequence[Tensor]] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Score rollouts; those without an image are not sent where others have one, and stay unscored.

        Raises:
            ServiceError: when the service refuses, cannot be reached, or answers nonsense.
        """
        drawn = [image is not None for image in images or ()]
        sent = [i for i in range(len(prompts)) if not any(drawn) or drawn[i]]
        pictures = [image for image in images or () if image is not None]
        body = {
            "prompt": [prompts[i] for i in sent],
            "image": [png(image) for image in pictures] or None,
            "video": None,
            "condition_images": None
            if input_images is None
            else [[*map(png, convert_images(input_images[i], "pil"))] for i in sent],
            "condition_videos": None,
            "extra": {name: [column[i] for i in sent] for name, column in columns.items()},
        }
        answer = read_json(self.send("/compute", json.dumps(body).encode(), "application/json"))
        if not isinstance(answer, Mapping) or "rewards" not in answer:
            raise ServiceError(f"the answer holds no 'rewards': {str(answer)[:80]!r}")
        scores: list[float | None] = [None] * len(prompts)
        for i, score in zip(sent, read_numbers(answer["rewards"], len(sent)), strict=True):
            scores[i] = score
        return scores
