"""What a reward is, how it is called, and what happens when it fails.

A reward is any callable that takes keyword lists and returns one number per rollout::

    def reward(*, images, prompts, completions, **columns) -> Sequence[float | None] | Tensor | dict

It receives what its signature names: ``images`` (``[B, 3, H, W]`` float32 in [0, 1], or a list when
sizes differ; see :attr:`Reward.image_format`), ``prompts``, ``completions`` (the reasoning in words),
``num_tokens`` (its length) and the data set's columns, each a list of B. ``None`` or NaN means *not
scorable*: such a rollout takes no part in its group's comparison. So does one whose reward raised; a
silent 0 would look like the worst rollout of the group.

A reward that holds something large or open may have two more methods: ``prepare(device)`` is called before
the first rollout of a collection is drawn, ``release()`` after the last score is in, on the same thread.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, Thread
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_unigrpo.types import Trajectory

ImageFormat: TypeAlias = Literal["tensor", "uint8", "pil"]


@dataclass(eq=False)
class Reward:
    """A callable with its weight and its rules.

    Called without gradients and without autocast, wherever it runs.
    """

    fn: Callable[..., Any]
    """The reward itself: a function (``async`` too), an object that can be called, a module."""
    weight: float = 1.0
    """In the combined reward; 0 = logged only."""
    name: str | None = None
    """In the logs; ``None`` = the callable's own."""
    required: bool = False
    """Whether a failure stops the run instead of leaving rollouts unscored."""
    batch_size: int | None = None
    """Rollouts per call; ``None`` = what the callable says (``batch_size``), else those that were drawn
    together."""
    timeout: float | None = 120.0
    """Seconds without any answer, counted from the end of the rollout, after which what is still out is
    given up; ``None`` waits for ever. Only for rewards that run beside the rollout."""
    concurrency: int | None = None
    """Calls at the same time; more than 1 makes it ``remote``. ``None`` = what the callable says
    (``concurrency``), else 1."""
    remote: bool = False
    """Whether it waits for another machine: then it runs in threads while rollouts go on. True as well
    for ``async`` functions and for callables that say ``is_remote = True``."""
    image_format: ImageFormat | None = None
    """``tensor``: ``[B, 3, H, W]`` float32 in [0, 1]; ``uint8``: a list of ``[3, H, W]`` in 0..255;
    ``pil``: a list of images. ``None`` = what the callable says (``image_format``), else ``tensor``."""
    traced: bool = field(default=False, init=False, repr=False)
    """Whether a failure was already reported at full length."""

    def __post_init__(self) -> None:
        """Refuse what cannot be called, and settle what the callable decides."""
        if not callable(self.fn):
            raise ValueError(
                f"model.rewards: {self.fn!r} is not callable; give a function, or a class with "
                "class_path and init_args."
            )
        self.name = self.name or getattr(self.fn, "__name__", type(self.fn).__name__)
        if self.batch_size is None:
            self.batch_size = getattr(self.fn, "batch_size", None)
        if self.concurrency is None:
            self.concurrency = int(getattr(self.fn, "concurrency", 1))
        for key in ("timeout", "batch_size", "concurrency"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"Reward.{key} of '{self.name}' is {value}; give more than 0.")
        self.image_format = self.image_format or getattr(self.fn, "image_format", "tensor")
        if self.image_format not in get_args(ImageFormat):
            raise ValueError(
                f"Reward.image_format of '{self.name}' is {self.image_format!r}; give one of "
                f"{get_args(ImageFormat)}."
            )
        awaits = any(map(inspect.iscoroutinefunction, (self.fn, type(self.fn).__call__)))
        self.remote = (
            self.remote or self.concurrency > 1 or awaits or getattr(self.fn, "is_remote", False)
        )

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that the callable's signature names.

        Raises:
            MissingColumnError: when it asks for one that is not there.
        """
        return select_columns(self.fn, columns, f"Reward '{self.name}'")

    def __call__(self, **columns: Any) -> Any:
        """Call the reward with what its signature names; coroutines are run to their end."""
        return call_plainly(self.fn, self.select(columns))


def select_columns(fn: Callable[..., Any], columns: Mapping[str, Any], who: str) -> dict[str, Any]:
    """Return the columns that a callable's signature names.

    Args:
        fn: a reward, or what speaks for the user.
        columns: by name.
        who: is told of in an error.

    Raises:
        MissingColumnError: when it asks for one that is not there.
    """
    called = fn.forward if isinstance(fn, nn.Module) else fn
    parameters = inspect.signature(called).parameters.values()
    named = [p for p in parameters if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}]
    missing = [p.name for p in named if p.default is p.empty and p.name not in columns]
    if missing:
        raise MissingColumnError(
            f"{who} asks for {missing}, but the prompts offer {sorted(columns)}: "
            "rename its parameter, or add the column to the prompt file (data.train)."
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(columns)
    return {p.name: columns[p.name] for p in named if p.name in columns}


@torch.no_grad()
def call_plainly(fn: Callable[..., Any], columns: Mapping[str, Any]) -> Any:
    """Call something of the user's without gradients and autocast; coroutines are run to their end."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        result = fn(**columns)
        return asyncio.run(_finish(result)) if inspect.isawaitable(result) else result


class MissingColumnError(ValueError):
    """A reward asks for a column that the prompts do not have: a mistake, not an accident."""


class RewardLengthError(ValueError):
    """A reward returned another number of values than it was given rollouts."""


async def _finish(result: Any) -> Any:
    return await result


def wrap(rewards: Sequence[Callable[..., Any]]) -> list[Reward]:
    """Give every callable its weight and a name of its own.

    Raises:
        ValueError: when two rewards share a name, or every weight is 0.
    """
    wrapped = [r if isinstance(r, Reward) else Reward(r) for r in rewards]
    names = [r.name for r in wrapped]
    if len(set(names)) < len(names):
        raise ValueError(f"model.rewards: the names {names} are not unique; set Reward.name.")
    if not any(r.weight for r in wrapped):
        raise ValueError(
            f"model.rewards: every weight of {names} is 0, so nothing would be learned."
        )
    return wrapped


def reward_names(rewards: Sequence[Callable[..., Any]]) -> list[str]:
    """Return the names under which rewards are logged, in order."""
    return [str(reward.name) for reward in wrap(rewards)]


def combine(rewards: Tensor, weights: Tensor) -> Tensor:
    """Add up rewards by weight, ignoring what could not be scored.

    ``R_i = sum_j w_j r_ij`` over finite ``r_ij`` with ``w_j != 0``; NaN when there is none.

    Args:
        rewards: ``[*, m]`` float32, NaN = not scorable.
        weights: ``[m]`` float32.

    Returns:
        ``[*]`` float32.

    Example:
        >>> combine(torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), torch.tensor([1.0, 0.5]))
        tensor([2., 1.])
    """
    counted = rewards.isfinite() & (weights != 0)
    total = torch.where(counted, rewards * weights, 0.0).sum(-1)
    return torch.where(counted.any(-1), total, torch.nan)


def table_of_rounds(rewards: Tensor, lengths: Sequence[int], num_rounds: int) -> Tensor:
    """Lay rewards of rounds out in a table; who ended early stands as he was in the rounds he did without.

    ``R_ik = r_i,min(k, n_i)``

    Args:
        rewards: ``[sum(lengths), m]`` of any dtype, of each trajectory after each of its rounds.
        lengths: n, of each trajectory, 1 to K.
        num_rounds: K.

    Returns:
        ``[n, K, m]``.

    Example:
        >>> table_of_rounds(torch.tensor([[1.0], [2.0], [5.0]]), [2, 1], 3).squeeze(2)
        tensor([[1., 2., 2.],
                [5., 5., 5.]])
    """
    count = torch.tensor(lengths, dtype=torch.long).unsqueeze(1)
    first = count.cumsum(0) - count
    which = first + torch.minimum(torch.arange(num_rounds), count - 1)
    return rewards[which.to(rewards.device)]


PATIENCE = 3
"""Collections in a row without any score that a reward is forgiven, once it has scored."""


def require_scores(
    rewards: Tensor, names: Sequence[str], weights: Tensor, silent: dict[str, int] | None = None
) -> None:
    """Refuse a collection of which a reward that counts has scored nothing.

    One that has scored before is forgiven :data:`PATIENCE` such collections in a row: a service may be
    out for a while, and rollouts without a score change nothing.

    Args:
        rewards: ``[n, m]`` float32, NaN = not scorable, over all ranks.
        names: of the m rewards.
        weights: ``[m]`` float32.
        silent: kept up to date: for each reward that has scored before, the collections without any score
            since then. ``None`` = nothing is forgiven.

    Raises:
        RuntimeError: naming the reward.
    """
    silent = {} if silent is None else silent
    for name, column, weight in zip(names, rewards.unbind(1), weights.tolist(), strict=True):
        if column.isfinite().any():
            silent[name] = 0
            continue
        if name in silent:
            silent[name] += 1
        if weight and not 0 < silent.get(name, 0) <= PATIENCE:
            raise RuntimeError(
                f"Reward '{name}' scored none of {len(column)} rollouts (NaN, None or an error for all)"
                + (f", {silent[name]} collections in a row" if name in silent else "")
                + ": there is nothing to learn from. Check the reward, its service and model.rewards."
            )


@dataclass
class RewardRunner:
    """Scores a collection chunk by chunk; remote rewards work while the next chunk is drawn.

    Use it as a context: rewards are prepared on entering and released on leaving.

    Args:
        rewards: callables or :class:`Reward`.
        device: of the policy, for rewards that have something to place.
    """

    rewards: Sequence[Callable[..., Any]]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    failures: dict[str, int] = field(default_factory=dict)
    """How many rollouts each reward failed to score, by name."""

    def __post_init__(self) -> None:
        """Wrap the callables."""
        self._rewards = wrap(self.rewards)
        self.names = [str(r.name) for r in self._rewards]
        self.weights = torch.tensor([r.weight for r in self._rewards])
        self._aside = [_Aside(reward.concurrency or 1) for reward in self._rewards]
        self._calls: list[list[tuple[int, Future[Any]]]] = [[] for _ in self._rewards]
        self._details: dict[str, list[Tensor]] = {}
        self._prepared = False

    def __enter__(self) -> Self:
        """Prepare the rewards, unless that was done."""
        if not self._prepared:
            self.prepare()
        return self

    def prepare(self) -> None:
        """Prepare the rewards; a step of its own where ranks must agree before they go on.

        Raises:
            RuntimeError: when one cannot be prepared; the others are released.
        """
        for reward in self._rewards:
            prepare = getattr(reward.fn, "prepare", None)
            try:
                if prepare is not None:
                    prepare(self.device)
            except Exception as error:
                self._release()
                raise RuntimeError(
                    f"Reward '{reward.name}' cannot be prepared (model.rewards): {error}"
                ) from error
        self._prepared = True

    def __exit__(self, *raised: object) -> None:
        """Call off what has not begun; a reward that hangs is not waited for."""
        for calls in self._calls:
            for _, future in calls:
                future.cancel()
        self._release()

    def _release(self) -> None:
        self._prepared = False
        for reward in self._rewards:
            _release(reward)

    def submit(self, trajectories: Sequence[Trajectory]) -> None:
        """Score a finished chunk now, or hand it to threads.

        Raises:
            MissingColumnError: when a reward asks for a column that is not there.
        """
        columns = gather_columns(trajectories)
        images = {"tensor": columns.get("images")}
        for reward, aside, calls in zip(self._rewards, self._aside, self._calls, strict=True):
            chosen = reward.select(columns)
            if "images" in chosen:
                kind = cast(ImageFormat, reward.image_format)
                if kind not in images:
                    images[kind] = convert_images(columns["images"], kind)
                chosen["images"] = images[kind]
            size = reward.batch_size or len(trajectories)
            for first in range(0, len(trajectories), size):
                part = {key: column[first : first + size] for key, column in chosen.items()}
                count = min(size, len(trajectories) - first)
                call = partial(reward, **part)
                calls.append((count, aside.start(call) if reward.remote else _run(Future(), call)))

    def finish(self, *, check: bool = True) -> tuple[Tensor, dict[str, float]]:
        """Wait for what is out and return all rewards.

        Args:
            check: whether a reward that scored nothing is an error (:func:`require_scores`). A rank that
                holds few rollouts may want to ask only when those of all ranks are together.

        Returns:
            ``[n, m]`` float32 with NaN where nothing could be scored, and details for the logs: means of
            what rewards report beside their score, and ``reward/<name>/failures``.

        Raises:
            RuntimeError: when a required reward failed, or one scored not a single rollout.
            ValueError: when what a reward returned cannot be read.
        """
        columns = []
        for reward, calls in zip(self._rewards, self._calls, strict=True):
            _settle([future for _, future in calls], reward.timeout)
            values = [self._value(reward, *call) for call in calls]
            columns.append(torch.cat(values) if values else torch.zeros(0))
        rewards = torch.stack(columns, 1)
        if check:
            require_scores(rewards, self.names, self.weights)
        details = {key: float(torch.cat(parts).nanmean()) for key, parts in self._details.items()}
        details |= {f"reward/{n}/failures": float(self.failures.get(n, 0)) for n in self.names}
        return rewards, details

    def _value(self, reward: Reward, count: int, future: Future[Any]) -> Tensor:
        name = str(reward.name)
        error: BaseException | None
        if future.done() and not future.cancelled():
            error = future.exception()
        else:
            error = TimeoutError(f"no answer within Reward.timeout = {reward.timeout} s")
        if error is None:
            scores, details = read_scores(name, future.result(), count)
            for key, values in details.items():
                self._details.setdefault(f"reward/{name}/{key}", []).append(values)
            return scores
        if reward.required:
            raise RuntimeError(
                f"Reward '{name}' failed and is required (model.rewards): {error!r}"
            ) from error
        trace = f"{error!r}" if reward.traced else "".join(traceback.format_exception(error))
        warnings.warn(
            f"Reward '{name}' failed; {count} rollouts stay unscored.\n{trace}", stacklevel=3
        )
        reward.traced = True
        self.failures[name] = self.failures.get(name, 0) + count
        return torch.full((count,), torch.nan)


def _release(reward: Reward) -> None:
    """Release what a reward holds; the scores are in, and others want to be released too."""
    release = getattr(reward.fn, "release", None)
    try:
        if release is not None:
            release()
    except Exception as error:
        warnings.warn(f"Reward '{reward.name}' was not released: {error!r}", stacklevel=4)


def _run(future: Future[Any], call: Callable[[], Any]) -> Future[Any]:
    """Make a call, unless it was called off, and put what comes of it into its future."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
    return future


class _Aside:
    """Makes calls in the order they came, in threads that do not keep the process from ending.

    Args:
        most: threads at the same time.
    """

    def __init__(self, most: int) -> None:
        self._most, self._running, self._lock = most, 0, Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def start(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._waiting.append((future, call))
            if self._running == self._most:
                return future
            self._running += 1
        Thread(target=self._work, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, call = self._waiting.popleft()
            _run(future, call)


def _settle(futures: Iterable[Future[Any]], timeout: float | None) -> None:
    """Wait until all calls are done, or none of them has ended for ``timeout`` seconds."""
    waiting = {future for future in futures if not future.done()}
    while waiting:
        done, waiting = wait(waiting, timeout, return_when=FIRST_COMPLETED)
        if not done:
            for future in waiting:
                future.cancel()
            return


def read_scores(name: str, value: Any, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Read what a reward returned.

    Args:
        name: of the reward.
        value: numbers or ``None``, one per rollout, or a mapping of ``score`` to them and of details to
            any numbers.
        count: number of rollouts.

    Returns:
        ``[count]`` float32 on the CPU, NaN for what is not finite, and the details likewise.

    Raises:
        RewardLengthError: when there is not one value per rollout.
        ValueError: when a value is no number, or a mapping has no ``score``.
    """
    details = dict(value) if isinstance(value, Mapping) else {"score": value}
    if "score" not in details:
        raise ValueError(
            f"Reward '{name}' returned the keys {sorted(details)}, but no 'score' (model.rewards)."
        )
    numbers = {key: _numbers(f"{name}: {key}", values) for key, values in details.items()}
    scores = numbers.pop("score")
    if len(scores) != count:
        raise RewardLengthError(
            f"Reward '{name}' returned {len(scores)} values for {count} rollouts; it must return one per "
            "image, in order (model.rewards)."
        )
    return scores, numbers


def _numbers(what: str, values: Any) -> Tensor:
    try:
        if not hasattr(values, "dtype"):  # neither a tensor nor an array
            many = values if isinstance(values, Iterable) else [values]
            values = [float("nan") if value is None else float(value) for value in many]
        numbers = torch.as_tensor(values).detach().float().cpu().flatten()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Reward '{what}' holds something that is no number ({error}); return a list of float or "
            "None, or a tensor (model.rewards)."
        ) from error
    return torch.where(numbers.isfinite(), numbers, torch.nan)


def convert_images(images: Tensor | Sequence[Tensor | None], kind: ImageFormat) -> Any:
    """Turn ``[3, H, W]`` images in [0, 1] into what a reward declares; see :class:`Reward`."""
    if kind == "tensor":
        return images
    rounded = [
        None if image is None else (image * 255).round().clamp(0, 255).byte() for image in images
    ]
    if kind == "uint8":
        return rounded
    from PIL import Image

    return [
        None if image is None else Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        for image in rounded
    ]


def gather_columns(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the keyword lists that rewards choose from.

    The data set's columns (None where a prompt lacks one); ``prompts``; ``completions``; ``num_tokens``,
    sampled text tokens; ``images``, None where nothing was drawn; ``input_images``, those of the prompts;
    ``metadata``, the data set's records as dictionaries.
    """
    names = dict.fromkeys(name for t in trajectories for name in t.prompt.columns)
    columns: dict[str, Any] = {
        name: [t.prompt.columns.get(name) for t in trajectories] for name in names
    }
    columns.setdefault(
        "metadata", [{"prompt": t.prompt.text, **t.prompt.columns} for t in trajectories]
    )
    columns["prompts"] = [t.prompt.text for t in trajectories]
    columns["completions"] = [t.completion for t in trajectories]
    columns["num_tokens"] = [sum(len(text.tokens) for text in t.texts) for t in trajectories]
    if any(t.prompt.images for t in trajectories):
        columns["input_images"] = [t.prompt.images for t in trajectories]
    images = [None if t.image is None else t.image.detach().float() for t in trajectories]
    drawn = [image for image in images if image is not None]
    if drawn:
        same = len(drawn) == len(images) and len({image.shape for image in drawn}) == 1
        columns["images"] = torch.stack(drawn) if same else images
    return columns
