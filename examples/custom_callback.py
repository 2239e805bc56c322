"""A callback of one's own: keep the best picture of every iteration, stop when the task is solved.

python examples/custom_callback.py --steps 60
"""

from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from matplotlib.image import imsave

from lightning_unigrpo import RolloutProgress, UniGRPOCallback, UniGRPOModule
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.callbacks import Experience


class KeepBest(UniGRPOCallback):
    """Beside Lightning's hooks there are those of a collection; on_experience is the last of them."""

    def __init__(self, folder: str, enough: float) -> None:
        self.folder, self.enough = Path(folder), enough

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        best = max(experience.trajectories, key=lambda trajectory: trajectory.reward)
        if trainer.is_global_zero:
            pixels = best.image.permute(1, 2, 0).numpy()
            imsave(self.folder / f"{experience.iteration:04d}.png", pixels)
        experience.metrics["best"] = best.reward  # logged with the iteration
        if experience.metrics["reward"] >= self.enough:  # the same number on all ranks, so all stop
            trainer.should_stop = True


def main(steps: int = 60, folder: str = "runs/custom_callback", enough: float = 0.95) -> None:
    trainer = Trainer(
        max_steps=steps,
        callbacks=[RolloutProgress(), KeepBest(f"{folder}/best", enough)],
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(UniGRPOModule(DigitsAdapter()))
    print(
        f"reward {float(trainer.callback_metrics['reward']):.3f} after {trainer.global_step} steps"
    )


if __name__ == "__main__":
    auto_cli(main)
