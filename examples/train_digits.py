"""Teach the embedded model to think before it draws: `make demo`, in Python.

python examples/train_digits.py --steps 100
"""

from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_unigrpo import IterationCheckpoint, RolloutProgress, RunReport, UniGRPOModule
from lightning_unigrpo.adapters.digits import DigitsAdapter


def main(steps: int = 100, folder: str = "runs/train_digits") -> None:
    module = UniGRPOModule(DigitsAdapter())  # prompts, reward and settings are the adapter's own
    report = RunReport()
    trainer = Trainer(
        max_steps=steps,
        callbacks=[RolloutProgress(), IterationCheckpoint(every=25), report],
        logger=CSVLogger(folder, name=None),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, verbose=False)
    trainer.fit(module)
    trainer.test(module, verbose=False)
    report.write(trainer)


if __name__ == "__main__":
    auto_cli(main)
