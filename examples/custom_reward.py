"""Rewards of one's own: a function, one that cannot always judge, one that waits for a service.

python examples/custom_reward.py --steps 20
"""

import asyncio
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_unigrpo import Reward, RolloutProgress, UniGRPOModule
from lightning_unigrpo.adapters.digits import DigitReward, DigitsAdapter


def ink(images: list[Tensor], **_: Any) -> list[float]:
    """A number per image, `[3, H, W]` in [0, 1]; columns that are not named land in `_`."""
    return [float(image.mean()) for image in images]


def equations(completions: list[str], answer: list[int], **_: Any) -> list[float | None]:
    """Columns of the data (`answer`) come by their name. None = cannot be judged, which is no zero."""
    return [
        float(text.endswith(f"={number}")) if "=" in text else None
        for text, number in zip(completions, answer, strict=True)
    ]


async def service(prompts: list[str], **_: Any) -> list[float]:
    """Waits beside the rollout: while this sleeps, the next images are drawn."""
    await asyncio.sleep(0.05)
    return [1.0 - len(prompt) / 100 for prompt in prompts]


def main(steps: int = 20, folder: str = "runs/custom_reward") -> None:
    rewards = [
        Reward(DigitReward(), name="digit"),
        Reward(ink, weight=-0.2),  # less ink is better
        Reward(equations, weight=0.5),
        Reward(service, weight=0.0, timeout=2.0),  # weight 0: only logged
    ]
    module = UniGRPOModule(DigitsAdapter(), rewards=rewards)
    trainer = Trainer(
        max_steps=steps,
        callbacks=[RolloutProgress()],
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    for name in ("reward", "reward/digit", "reward/ink", "reward/equations/failures"):
        print(f"{name:<28}{float(trainer.callback_metrics[name]):.3f}")


if __name__ == "__main__":
    auto_cli(main)
