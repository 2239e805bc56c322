"""Think, draw, think again, draw again: a second round is a longer plan, the reward is of the last image.

python examples/two_rounds.py --steps 20
"""

from dataclasses import replace

from jsonargparse import auto_cli
from lightning.pytorch import Trainer

from lightning_unigrpo import RolloutProgress, UniGRPOCallback, UniGRPOModule
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.callbacks import Experience
from lightning_unigrpo.types import TextSegment


class ShowLast(UniGRPOCallback):
    def on_experience(
        self, trainer: Trainer, module: UniGRPOModule, experience: Experience
    ) -> None:
        self.trajectory = experience.trajectories[0]


def main(steps: int = 20, folder: str = "runs/two_rounds") -> None:
    adapter = DigitsAdapter("two_rounds")  # a base that looks at its drawing
    sampling = replace(adapter.defaults().sampling, plan=("text", "image", "text", "image"))
    last = ShowLast()
    trainer = Trainer(
        max_steps=steps,
        callbacks=[RolloutProgress(), last],
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(UniGRPOModule(adapter, sampling=sampling))
    print(last.trajectory.prompt.text)
    for segment in last.trajectory.segments:  # the whole dialogue, one decision process
        what = (
            adapter.detokenize(segment.tokens) if isinstance(segment, TextSegment) else "an image"
        )
        print(f"  {'sampled' if segment.is_sampled else 'given'}: {what}")


if __name__ == "__main__":
    auto_cli(main)
