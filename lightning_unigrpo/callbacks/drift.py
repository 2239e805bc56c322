"""How far the images of a test went from those that training began with."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.reference import beside
from lightning_unigrpo.metrics import ScoreMetric
from lightning_unigrpo.rollout import Start, rollout

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class ReferenceDrift(UniGRPOCallback):
    """Draw every test image again with the reference policy, and log ``test/image/drift``.

    ``drift = sqrt(mean((x - x_ref)^2))`` over pixels in [0, 1], mean over images. Both policies draw from the
    same random numbers, each behind its own reasoning: a reward that rises while all images change alike is
    worth a look. A test takes twice as long.

    The reference is the policy with its LoRA off where there is one, otherwise a copy of the weights that the
    run begins with (before a checkpoint is loaded), which takes their memory once more.

    Raises:
        ValueError: where weights are sharded.
    """

    def __init__(self) -> None:
        self._twin: list[Adapter] = []  # a list: a bare module would be registered by owners
        self._metric = ScoreMetric()

    @override
    def on_configure_model(self, trainer: Trainer, module: UniGRPOModule) -> None:
        if module.skeleton:
            raise ValueError(
                "trainer.callbacks has a ReferenceDrift, which draws with a second network, but the strategy "
                "shards weights: leave it out, or test with trainer.strategy ddp or on one GPU."
            )
        adapter = module.adapter
        if adapter.reference() is not None or self._twin:
            return
        twin = beside(adapter)
        twin.net = copy.deepcopy(adapter.net).requires_grad_(False).eval()
        self._twin = [twin]

    @override
    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        module: UniGRPOModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        experience: Experience = outputs["experience"]
        drawn = [t for t in experience.trajectories if t.image is not None]
        starts = [Start(t.prompt, t.group, t.member) for t in drawn]
        policy, context = module.adapter, module.adapter.reference()
        for twin in self._twin:
            policy = twin
            twin.net.to(module.device)
        with context or nullcontext():
            chunks = rollout(
                policy,
                starts,
                module.eval_sampling,
                evaluate=True,
                speaker=module.turns,
                progress=module.progress,
            )
            others = list(chain.from_iterable(chunks))
        pairs = zip(drawn, others, strict=True)
        found = [distance(t.image, other.image) for t, other in pairs if t.image is not None]
        self._metric.to(module.device).update(torch.tensor(found))

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("test/image/drift", self._metric.compute()["mean"])
        self._metric.reset()


def distance(image: Tensor, other: Tensor | None) -> float:
    """Return the root mean square difference of two images; NaN for images of two sizes."""
    if other is None or image.shape != other.shape:
        return float("nan")
    return float((image.float() - other.float()).square().mean().sqrt())
