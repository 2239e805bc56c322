"""Samples in the logger's own way: pictures with their reasoning, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_unigrpo.callbacks.figures import sample_grid
from lightning_unigrpo.callbacks.rounds import strip, transcript
from lightning_unigrpo.reward import convert_images
from lightning_unigrpo.types import Trajectory


def log_samples(logger: Logger, key: str, samples: Sequence[Trajectory], step: int) -> None:
    """Hand samples to a logger that can take pictures; others are left alone.

    TensorBoard gets a figure under Images and a table under Text, Weights & Biases captioned images and a
    table, MLflow a picture and a table among the run's artifacts. Images of several rounds
    (``Trajectory.rounds``) lie side by side in one picture.

    Args:
        logger: of Lightning.
        key: under which they are found.
        samples: with images.
        step: of the optimizer.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_figure(key, sample_grid({key: samples}), global_step=step)
        logger.experiment.add_text(f"{key}/table", _markdown(samples), global_step=step)
    elif isinstance(logger, WandbLogger):
        captions = [_caption(sample) for sample in samples]
        # Of a tensor W&B would stretch the contrast.
        logger.log_image(key, _pictures(samples), step=step, caption=captions)
        columns = _columns(samples)
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        logger.log_table(f"{key}/table", columns=list(columns), data=rows, step=step)
    elif isinstance(logger, MLFlowLogger):
        _log_to_mlflow(logger, key, samples, step)


def _log_to_mlflow(
    logger: MLFlowLogger, key: str, samples: Sequence[Trajectory], step: int
) -> None:
    client, run = logger.experiment, logger.run_id
    for number, picture in enumerate(_pictures(samples)):
        client.log_image(run, picture, key=f"{key}/{number}", step=step)
    client.log_table(run, _columns(samples) | {"step": [step] * len(samples)}, f"{key}.json")


def _pictures(samples: Sequence[Trajectory]) -> list[Any]:
    return list(
        convert_images([picture for s in samples if (picture := strip(s)) is not None], "pil")
    )


def _columns(samples: Sequence[Trajectory]) -> dict[str, list[Any]]:
    """Return what a table holds, by column."""
    names = sorted({name for sample in samples for name in sample.rewards})
    return {
        "prompt": [sample.prompt.text for sample in samples],
        "reasoning": ["\n".join(transcript(sample)) for sample in samples],
        "reward": [sample.reward for sample in samples],
        **{f"reward/{name}": [s.rewards.get(name) for s in samples] for name in names},
    }


def _caption(sample: Trajectory) -> str:
    return "\n".join([sample.prompt.text, *transcript(sample), f"reward {sample.reward:.3f}"])


def _markdown(samples: Sequence[Trajectory]) -> str:
    """Return a table as TensorBoard renders it; what a model writes must not end a cell."""
    columns = _columns(samples)
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
