"""The frozen policy that keeps the images honest: its velocities on the states that were visited."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_unigrpo import distributed
from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.types import (
    ImageSegment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    as_given,
    sampled,
)

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class ReferenceVelocity(UniGRPOCallback):
    """Store the reference policy's velocities (and text log-probabilities) on the sampled segments.

    Computed once per collection by the same packed pass as the policy's own, the reference's weights
    for the text context too, so that no update runs a reference forward. The reference is the policy
    with its LoRA off where the adapter offers that, otherwise a frozen copy of ``adapter.net`` taken
    before training, held outside the module tree and left out of checkpoints. Skipped when every
    weight that needs it is 0.

    Args:
        refresh_every: take a new snapshot every so many collections; ``None`` keeps the first. A
            refreshed snapshot is written into checkpoints, because nothing else can restore it.
    """

    def __init__(self, refresh_every: int | None = None) -> None:
        if refresh_every is not None and refresh_every < 1:
            raise ValueError(
                f"ReferenceVelocity.refresh_every is {refresh_every}; give 1 or more, or leave it out."
            )
        self.refresh_every = refresh_every
        self._twin: list[
            Adapter
        ] = []  # a list: a bare Module attribute would be registered by owners
        self._restored: dict[str, Any] | None = None

    @override
    def on_configure_model(self, trainer: Trainer, module: UniGRPOModule) -> None:
        """Take the snapshot: the weights are there, and a checkpoint has not yet replaced them."""
        adapter = module.adapter
        is_needed = module.objective.needs_reference(adapter.image_policy)
        if trainer.state.fn == TrainerFn.FITTING and is_needed and adapter.reference() is None:
            self._snapshot(trainer, module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_fit_start: sharded strategies read the checkpoint after that.
        for twin in self._twin:
            if self._restored is not None:
                distributed.load_whole(twin.net, self._restored)
            if not pl_module.skeleton:  # what is sharded is where it belongs
                twin.net.to(pl_module.device)
        self._restored = None

    def _snapshot(self, trainer: Trainer, module: UniGRPOModule) -> None:
        """Freeze a copy of the network, sharded alike, behind an adapter that shares everything else."""
        adapter = module.adapter
        twin = beside(adapter)
        if module.skeleton:
            twin.net = copy.deepcopy(module.skeleton[0]).requires_grad_(False)
            twin.net = distributed.shard(
                twin.net, twin.shard_units(), trainer.strategy, distributed.fill_from(adapter.net)
            )
        else:
            twin.net = copy.deepcopy(adapter.net)
        twin.net.requires_grad_(False).eval()
        self._twin = [twin]

    @override
    def on_rollout_end(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        if not module.objective.needs_reference(module.adapter.image_policy):
            return
        due = (
            self.refresh_every
            and experience.iteration
            and not experience.iteration % self.refresh_every
        )
        if due and self._twin:
            distributed.copy_weights(module.adapter.net, self._twin[0].net)
        policy, context = self._reference(module.adapter)
        objective = module.objective
        images = objective.needs_image_reference(module.adapter.image_policy)
        texts = objective.needs_ref_log_prob
        with torch.no_grad(), context:
            for done, batch in enumerate(module.micro_batches(experience.trajectories)):
                if not texts:
                    batch = [_texts_given(trajectory) for trajectory in batch]
                scores = policy(batch, slice(None) if images else slice(0, 0))
                text, velocity, codes = map(
                    iter, (scores.text, scores.velocity, scores.image_tokens)
                )
                for _, segment in sampled(batch):
                    if isinstance(segment, TextSegment):
                        segment.ref_log_prob = next(text)
                    elif isinstance(segment, ImageSegment):
                        segment.ref_velocity = next(velocity) if images else None
                    elif isinstance(segment, TokenImageSegment):
                        segment.ref_log_prob = next(codes) if images else None
                module.progress(
                    "reference", done + 1, module.num_micro_batches(experience.trajectories)
                )
        for twin in self._twin:
            distributed.let_go(twin.net)

    def _reference(self, adapter: Adapter) -> tuple[Adapter, AbstractContextManager[None]]:
        context = adapter.reference()
        if context is not None:
            return adapter, context
        return self._twin[0], nullcontext()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.refresh_every is None or not self._twin:
            return {}
        return {"net": distributed.whole_state(self._twin[0].net)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("net")


def beside(adapter: Adapter) -> Adapter:
    """Return an adapter that shares everything with another, to be given a network of its own."""
    twin = copy.copy(adapter)
    twin._modules = dict(adapter._modules)
    # DeepSpeed puts hooks on the policy's adapter, which are none of the reference's.
    twin.__dict__ |= {k: type(v)() for k, v in vars(adapter).items() if k.endswith("_hooks")}
    return twin


def _texts_given(trajectory: Trajectory) -> Trajectory:
    """Spare the head over the vocabulary, whose result nobody would read."""
    segments = [as_given(s) if isinstance(s, TextSegment) else s for s in trajectory.segments]
    return replace(trajectory, segments=segments)
