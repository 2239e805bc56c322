"""What a collection was worth, and the numbers and pictures that expose a hacked reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_unigrpo import distributed
from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.loggers import log_samples
from lightning_unigrpo.callbacks.rounds import may_end_early, num_images, with_rounds
from lightning_unigrpo.types import Trajectory

if TYPE_CHECKING:
    from lightning_unigrpo.module import UniGRPOModule


class RewardLogger(UniGRPOCallback):
    """Log every reward, the state of the texts and of the images, and samples.

    Where trajectories may end early, ``image/rounds`` is the mean number of their images.
    A second classifier does not see a collapse; diversity inside a group and the share of saturated
    pixels do, so both are logged beside the rewards. All scalars of a step share one reduction.

    Args:
        images_every: iterations between samples (:func:`~lightning_unigrpo.callbacks.loggers.log_samples`);
            0 = none.
        num_images: how many.
    """

    def __init__(self, images_every: int = 50, num_images: int = 8) -> None:
        if images_every < 0 or num_images < 1:
            raise ValueError(
                f"RewardLogger got images_every={images_every} and num_images={num_images}; give 0 or "
                "more, and 1 or more."
            )
        self.images_every = images_every
        self.num_images = num_images

    @override
    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        trajectories = experience.trajectories
        sums, counts = reward_sums(experience)
        each = text_sums(trajectories)
        if may_end_early(module.sampling):
            drawn = sum(map(num_images, trajectories))
            each["image/rounds"] = torch.tensor(float(drawn))
        sums |= each
        counts |= dict.fromkeys(each, torch.tensor(float(len(trajectories))))
        pictures = image_sums(trajectories)
        sums |= pictures
        counts |= dict.fromkeys(pictures, torch.tensor(1.0))
        device = module.device
        totals = distributed.reduce_named({k: v.to(device) for k, v in sums.items()}, {})
        over = distributed.reduce_named({k: v.to(device) for k, v in counts.items()}, {})
        experience.metrics |= {k: totals[k] / over[k] if over[k] else float("nan") for k in totals}
        # Every rank counts failures under the same names; other details may differ, so they stay local.
        failures = {
            k: torch.tensor(float(v), device=device)
            for k, v in experience.details.items()
            if k.endswith("/failures")
        }
        experience.metrics |= experience.details | distributed.reduce_named(failures, {})
        if self.images_every and experience.iteration % self.images_every == 0:
            self._log_images(trainer, module, trajectories)

    @rank_zero_only
    def _log_images(
        self, trainer: Trainer, module: UniGRPOModule, trajectories: Sequence[Trajectory]
    ) -> None:
        drawn = [t for t in trajectories if t.image is not None][: self.num_images]
        if drawn and trainer.loggers:
            drawn = [with_rounds(module.adapter, t) for t in drawn]
            for logger in trainer.loggers:
                log_samples(logger, "samples", drawn, trainer.global_step)


def reward_sums(experience: Experience) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return sums over this rank's finite rewards and how many they are, per reward."""
    sums, counts = {}, {}
    for name, column in zip(experience.reward_names, experience.rewards.unbind(1), strict=True):
        known = column.isfinite()
        sums[f"reward/{name}"] = column[known].sum()
        counts[f"reward/{name}"] = known.sum().float()
    return sums, counts


def text_sums(trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """Return the sums over trajectories of text length (tokens) and of texts that stopped."""
    lengths = [sum(len(text.tokens) for text in t.texts) for t in trajectories]
    return {
        "text/length": torch.tensor(float(sum(lengths))),
        "text/stopped": torch.tensor(float(sum(t.stopped for t in trajectories))),
    }


def diversity(images: Tensor) -> Tensor:
    """Return the standard deviation of a pixel over ``[n, 3, H, W]`` images of one prompt, mean over pixels.

    A classifier as reward does not see a collapse to one picture per prompt; this does.
    """
    return images.float().std(0, correction=0).mean()


def saturation(images: Tensor) -> Tensor:
    """Return the share of pixel values within 0.02 of black or white, of ``[*]`` values in [0, 1]."""
    return ((images < 0.02) | (images > 0.98)).float().mean()


def image_sums(trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """Return diversity inside groups and saturation of the images of this rank; empty when there are none."""
    groups: dict[tuple[int, torch.Size], list[Tensor]] = {}
    for t in trajectories:
        if t.image is not None:
            groups.setdefault((t.group, t.image.shape), []).append(t.image.float())
    if not groups:
        return {}
    stacks = [torch.stack(images) for images in groups.values()]
    return {
        "image/diversity": torch.stack([diversity(stack) for stack in stacks]).mean(),
        "image/saturation": torch.stack([saturation(stack) for stack in stacks]).mean(),
    }
