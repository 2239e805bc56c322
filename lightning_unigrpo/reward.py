"""What a reward is, how it is called, and what happens when it fails.

A reward is any callable that takes keyword lists and returns one number per rollout::

    def reward(*, images, prompts, completions, **columns) -> Sequence[float | None] | Tensor | dict

It receives what its signature names: ``images`` (``[B, 3, H, W]`` float32 in [0, 1], or a list when
sizes differ), ``prompts``, ``completions`` (the reasoning in words) and the data set's columns, each a
list of B. ``None`` or NaN means *not scorable*: such a rollout takes no part in its group's comparison.
So does one whose reward raised; a silent 0 would look like the worst rollout of the group.
"""

from __future__ import annotations

import asyncio
import inspect
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_unigrpo.types import Trajectory


@dataclass(eq=False)
class Reward:
    """A callable with its weight and its rules."""

    fn: Callable[..., Any]
    """The reward itself."""
    weight: float = 1.0
    """In the combined reward; 0 = logged only."""
    name: str | None = None
    """In the logs; ``None`` = the callable's own."""
    required: bool = False
    """Whether a failure stops the run instead of leaving rollouts unscored."""
    remote: bool = False
    """Whether it waits for another machine: then it runs in a thread while rollouts go on."""
    timeout: float = 120.0
    """Seconds to wait for a remote reward, counted from the end of the rollout."""

    def __post_init__(self) -> None:
        """Refuse what cannot be called, and settle the name."""
        if not callable(self.fn):
            raise ValueError(
                f"model.rewards: {self.fn!r} is not callable; give a function, or a class with "
                "class_path and init_args."
            )
        if self.timeout <= 0:
            raise ValueError(f"Reward.timeout is {self.timeout}; give seconds, more than 0.")
        self.name = self.name or getattr(self.fn, "__name__", type(self.fn).__name__)

    def __call__(self, **columns: Any) -> Any:
        """Call the reward with what its signature names; coroutines are run to their end."""
        parameters = inspect.signature(self.fn).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            missing = [p.name for p in parameters if p.default is p.empty and p.name not in columns]
            if missing:
                raise MissingColumnError(
                    f"Reward '{self.name}' asks for {missing}, but the prompts offer {sorted(columns)}: "
                    "rename its parameter, or add the column to the prompt file (data.train)."
                )
            columns = {p.name: columns[p.name] for p in parameters if p.name in columns}
        result = self.fn(**columns)
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
        rewards: ``[n, m]`` float32, NaN = not scorable.
        weights: ``[m]`` float32.

    Returns:
        ``[n]`` float32.

    Example:
        >>> combine(torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), torch.tensor([1.0, 0.5]))
        tensor([2., 1.])
    """
    counted = rewards.isfinite() & (weights != 0)
    total = torch.where(counted, rewards * weights, 0.0).sum(1)
    return torch.where(counted.any(1), total, torch.nan)


@dataclass
class RewardRunner:
    """Scores a collection chunk by chunk; remote rewards work while the next chunk is drawn.

    Args:
        rewards: callables or :class:`Reward`.
        workers: threads for remote rewards.
    """

    rewards: Sequence[Callable[..., Any]]
    workers: int = 4
    failures: dict[str, int] = field(default_factory=dict)
    """How many rollouts each reward failed to score, by name."""

    def __post_init__(self) -> None:
        """Wrap the callables."""
        self._rewards = wrap(self.rewards)
        self.names = [str(r.name) for r in self._rewards]
        self.weights = torch.tensor([r.weight for r in self._rewards])
        self._pending: list[list[tuple[int, Future[Any] | _Outcome]]] = []
        self._details: dict[str, list[float]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the threads; a reward that hangs is not waited for."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, trajectories: Sequence[Trajectory]) -> None:
        """Score a finished chunk now, or hand it to a thread."""
        columns = gather_columns(trajectories)
        row: list[tuple[int, Future[Any] | _Outcome]] = []
        for reward in self._rewards:
            if reward.remote:
                self._pool = self._pool or ThreadPoolExecutor(self.workers)
                row.append((len(trajectories), self._pool.submit(reward, **columns)))
            else:
                row.append((len(trajectories), _attempt(reward, columns)))
        self._pending.append(row)

    def finish(self) -> tuple[Tensor, dict[str, float]]:
        """Wait for what is out and return all rewards.

        Returns:
            ``[n, m]`` float32 with NaN where nothing could be scored, and details for the logs: means of
            what rewards report beside their score, and ``reward/<name>/failures``.

        Raises:
            RuntimeError: when a required reward failed, or one scored not a single rollout.
        """
        columns = [
            torch.cat([self._value(reward, *row[j]) for row in self._pending])
            for j, reward in enumerate(self._rewards)
        ]
        for reward, column in zip(self._rewards, columns, strict=True):
            if reward.weight and not column.isfinite().any():
                raise RuntimeError(
                    f"Reward '{reward.name}' scored none of {len(column)} rollouts (NaN, None or an error "
                    "for all): there is nothing to learn from. Check the reward, its service and "
                    "model.rewards."
                )
        details = {key: sum(values) / len(values) for key, values in self._details.items()}
        details |= {f"reward/{n}/failures": float(self.failures.get(n, 0)) for n in self.names}
        return torch.stack(columns, 1), details

    def _value(self, reward: Reward, count: int, outcome: Future[Any] | _Outcome) -> Tensor:
        name = str(reward.name)
        if isinstance(outcome, Future):
            outcome = _await(outcome, reward)
        if outcome.error is None:
            return self._read(name, outcome.value, count)
        if reward.required or isinstance(outcome.error, MissingColumnError):
            raise outcome.error
        if name not in self.failures:
            warnings.warn(
                f"Reward '{name}' failed; {count} rollouts stay unscored.\n{outcome.trace}",
                stacklevel=3,
            )
        self.failures[name] = self.failures.get(name, 0) + count
        return torch.full((count,), torch.nan)

    def _read(self, name: str, value: Any, count: int) -> Tensor:
        """Turn what a reward returned into ``[count]`` float32, NaN for what it left out."""
        if isinstance(value, Mapping):
            for key, detail in value.items():
                if key != "score":
                    numbers = torch.as_tensor(detail, dtype=torch.float32).flatten().tolist()
                    self._details.setdefault(f"reward/{name}/{key}", []).extend(numbers)
            value = value["score"]
        if not isinstance(value, Tensor):
            value = torch.tensor([float("nan") if v is None else float(v) for v in value])
        scores = value.detach().float().cpu().flatten()
        if len(scores) != count:
            raise RewardLengthError(
                f"Reward '{name}' returned {len(scores)} values for {count} rollouts; it must return one "
                "per image, in order (model.rewards)."
            )
        return torch.where(scores.isfinite(), scores, torch.nan)


@dataclass
class _Outcome:
    """What a call gave: a value or an error with its trace."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""


def _attempt(reward: Reward, columns: Mapping[str, Any]) -> _Outcome:
    try:
        return _Outcome(reward(**columns))
    except Exception as error:
        return _Outcome(error=error, trace=traceback.format_exc(limit=-3))


def _await(future: Future[Any], reward: Reward) -> _Outcome:
    try:
        return _Outcome(future.result(timeout=reward.timeout))
    except FutureTimeout:
        error = TimeoutError(f"no answer within Reward.timeout = {reward.timeout} s")
        return _Outcome(error=error, trace=str(error))
    except Exception as error:
        return _Outcome(error=error, trace=traceback.format_exc(limit=-3))


def gather_columns(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the keyword lists that rewards choose from.

    A column that only some prompts have holds None for the others.
    """
    images = [t.image for t in trajectories if t.image is not None]
    same = len({image.shape for image in images}) == 1 and len(images) == len(trajectories)
    names = dict.fromkeys(name for t in trajectories for name in t.prompt.columns)
    columns: dict[str, Any] = {
        name: [t.prompt.columns.get(name) for t in trajectories] for name in names
    }
    columns["prompts"] = [t.prompt.text for t in trajectories]
    columns["completions"] = [t.completion for t in trajectories]
    if images:
        columns["images"] = (
            torch.stack(images).detach().float() if same else [i.detach() for i in images]
        )
    return columns
