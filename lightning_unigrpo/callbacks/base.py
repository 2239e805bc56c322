"""The hooks that UniGRPO adds to Lightning's, in the order in which a collection calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_unigrpo.types import Trajectory

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


@dataclass(kw_only=True, eq=False)
class Experience:
    """The trajectories of one collection on this rank, and what is known about them so far."""

    trajectories: list[Trajectory]
    iteration: int
    rewards: Tensor
    """``[n, m]`` float32, one column per reward, NaN = not scorable."""
    round_rewards: Tensor | None = None
    """``[n, K, m]``, of the image of each round, where more than the last is scored."""
    reward_names: tuple[str, ...]
    reward_weights: Tensor
    """``[m]`` float32."""
    details: dict[str, float] = field(default_factory=dict)
    """What rewards report beside their score, and their failures; on this rank."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Logged once at the end of the iteration, the same on all ranks."""


class UniGRPOCallback(Callback):
    """A Lightning callback that may also act inside a collection.

    Each hook is one phase; phases follow each other for *all* callbacks, so a callback never depends
    on its place in the list.
    """

    def on_phase(
        self, trainer: Trainer, module: UniGRPOModule, phase: str, done: int, total: int
    ) -> None:
        """Called while something long runs: text, denoise, turn, reward, reference, update."""

    def on_configure_model(self, trainer: Trainer, module: UniGRPOModule) -> None:
        """Called when the weights are read, before a checkpoint or a strategy touches them."""

    def on_rollout_end(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        """Called with sampled trajectories and their rewards: fill in what else the loss needs."""

    def on_rewards(self, trainer: Trainer, module: UniGRPOModule, experience: Experience) -> None:
        """Called next: turn rewards into advantages."""

    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        """Called when an experience is complete, before the first update: look, log, do not change."""
