"""Validation and test: what is drawn, with which draws, scored by what, and written where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from lightning_unigrpo.callbacks import EvaluationFolder, ReferenceDrift
from lightning_unigrpo.callbacks.rewards import diversity, saturation
from lightning_unigrpo.config import Evaluation, Objective, Sampling
from lightning_unigrpo.data import FIRST_ID, PromptDataModule
from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.rewards import GenEval
from lightning_unigrpo.types import Prompt, TextSegment, Trajectory
from tests.test_configs import CONFIGS, UniGRPOCLI, parse
from tests.toys import ToyFlow, brightness

FIRST = FIRST_ID["test"]
TASKS = ("counting", "colors", "counting", "elsewhere")
PROMPTS = [
    Prompt(text=text, id=FIRST + i, columns={"tag": TASKS[i], "wanted": i, "rest": None})
    for i, text in enumerate(("a b", "c", "d a h", "e f"))
]


class Keep(Callback):
    """Remembers what every evaluation drew."""

    def __init__(self) -> None:
        self.drawn: list[list[Trajectory]] = []

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.drawn.append([])

    def on_test_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.drawn[-1] += outputs["experience"].trajectories


def wanted(wanted: Sequence[int]) -> list[float | None]:
    """Return a known number for each prompt; the second cannot be scored."""
    return [None if i == 1 else float(i) for i in wanted]


def run_tests(
    module: UniGRPOModule, *callbacks: Callback, times: int = 1
) -> tuple[dict[str, float], list[list[Trajectory]]]:
    keep = Keep()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep, *callbacks],
    )
    data = PromptDataModule.from_prompts(test=PROMPTS, eval_batch_size=3)
    found: dict[str, float] = {}
    for _ in range(times):
        found = dict(trainer.test(module, data, verbose=False)[0])
        module.iteration += 7
    return found, keep.drawn


def build(evaluation: Evaluation, **settings: Any) -> UniGRPOModule:
    objective = Objective(truncation_reward=None)
    return UniGRPOModule(
        ToyFlow(), rewards=[brightness], evaluation=evaluation, objective=objective, **settings
    )


def test_several_images_of_a_prompt_have_draws_of_their_own_that_do_not_change() -> None:
    """Three members each; another iteration draws the same images again."""
    module = build(Evaluation(num_images=3))
    found, (first, second) = run_tests(module, times=2)
    assert [(t.prompt.id - FIRST, t.member) for t in first] == [
        (p, m) for p in range(4) for m in range(3)
    ]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.image, b.image)  # type: ignore[arg-type]
    images = torch.stack([t.image for t in first]).view(4, 3, 3, *first[0].image.shape[1:])  # type: ignore[union-attr,arg-type]
    assert not torch.equal(images[:, 0], images[:, 1])
    means = images.mean((2, 3, 4))
    assert found["test/reward"] == pytest.approx(float(means.mean()), rel=1e-5)
    assert found["test/reward/std"] == pytest.approx(float(means.std(correction=0)), rel=1e-4)
    spread = [float(diversity(each)) for each in images]
    assert found["test/image/diversity"] == pytest.approx(sum(spread) / 4, rel=1e-5)
    share = float(((images < 0.02) | (images > 0.98)).float().mean())
    assert found["test/image/saturation"] == pytest.approx(share, abs=1e-6)


def test_diversity_and_saturation_by_hand() -> None:
    """Half of the pixels are 0 or 1 in turn, the others 0.5 and the same."""
    images = torch.full((2, 3, 2, 2), 0.5)
    images[0, :, 0], images[1, :, 0] = 0.0, 1.0
    assert float(diversity(images)) == pytest.approx(0.25)  # 0.5 on half of them
    assert float(saturation(images)) == 0.5
    assert float(saturation(torch.tensor([0.019, 0.021, 0.979, 0.981]))) == 0.5


def test_without_thinking_the_last_image_follows_the_prompt() -> None:
    """No text is drawn, whatever the plan; a single image has no diversity."""
    plan: Any = ("text", "image", "text", "image")
    sampling = replace(ToyFlow().defaults().sampling or Sampling(), plan=plan)
    for thinking in (True, False):
        module = build(Evaluation(thinking=thinking), sampling=sampling)
        found, (drawn,) = run_tests(module)
        kinds = [
            ["text" if isinstance(s, TextSegment) else "image" for s in t.segments[1:]]
            for t in drawn
        ]
        assert kinds == [[*plan] if thinking else ["image"]] * 4
        assert found["test/text_length"] > 0 if thinking else found["test/text_length"] == 0
        assert "test/image/diversity" not in found
        assert "test/reward/std" not in found


def test_other_rewards_than_in_training_and_means_by_task() -> None:
    """GenEval's tasks have means of their own, and the mean of these; what is no task counts among all."""
    module = build(Evaluation(), eval_rewards=[wanted])
    found, _ = run_tests(module)
    assert "test/reward/brightness" not in found
    assert found["test/reward/wanted/failures"] == 1
    assert found["test/reward/wanted"] == pytest.approx((0 + 2 + 3) / 3)
    assert found["test/reward/wanted/counting"] == 1.0
    assert found["test/reward/wanted/overall"] == 1.0
    assert "test/reward/wanted/colors" not in found  # its only prompt could not be scored
    assert [r.name for r in module._rewards] == ["brightness"]  # type: ignore[attr-defined]
    renamed = build(Evaluation(task_column="another"), eval_rewards=[wanted])
    assert "test/reward/wanted/overall" not in run_tests(renamed)[0]


def test_images_are_written_as_geneval_lays_them_out(tmp_path: Path) -> None:
    """One folder a prompt, its record a line; pictures to the byte, the reasoning beside them."""
    module = build(Evaluation(num_images=2))
    _, (drawn,) = run_tests(module, EvaluationFolder(str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:05d}" for i in range(4)]
    for t in drawn:
        place = tmp_path / f"{t.prompt.id - FIRST:05d}"
        (line,) = (place / "metadata.jsonl").read_text().splitlines()
        number = t.prompt.id - FIRST
        assert json.loads(line) == {"tag": TASKS[number], "wanted": number, "prompt": t.prompt.text}
        assert sorted(p.name for p in (place / "samples").glob("*.png")) == [
            "00000.png",
            "00001.png",
        ]
        with Image.open(place / "samples" / f"{t.member:05d}.png") as picture:
            assert picture.mode == "RGB"
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert t.image is not None
        assert torch.equal(pixels, (t.image * 255).round().byte())
        assert (place / "samples" / f"{t.member:05d}.txt").read_text() == t.completion


def test_drift_is_the_distance_to_what_training_began_with() -> None:
    """Nothing before training; then the distance of the images that both networks draw, by hand."""
    module = build(Evaluation(num_images=2))
    drift = ReferenceDrift()
    found, (before,) = run_tests(module, drift)
    assert found["test/image/drift"] == 0
    with torch.no_grad():
        module.adapter.net.image_out.bias += torch.linspace(-1, 1, 4)
    found, (after,) = run_tests(module, drift)
    pairs = zip(before, after, strict=True)
    apart = [float((a.image - b.image).square().mean().sqrt()) for a, b in pairs]  # type: ignore[operator,union-attr]
    assert found["test/image/drift"] == pytest.approx(sum(apart) / len(apart), rel=1e-5)
    assert found["test/image/drift"] > 0.01


def test_the_shipped_evaluation_of_geneval() -> None:
    """On top of any run's configuration: the benchmark's verdict, four images, its layout."""
    file = CONFIGS / "evaluation" / "geneval.yaml"
    found = parse(CONFIGS / "digits.yaml", file, made=UniGRPOCLI)
    module = found.model
    assert module.evaluation.num_images == 4
    (reward,) = module._eval_rewards
    assert isinstance(reward.fn, GenEval)
    assert reward.fn.value == "correct"
    assert not reward.fn.compat
    assert "test/reward/geneval" in module.figures
    assert any(isinstance(c, EvaluationFolder) for c in found.trainer.callbacks)
    assert [r.name for r in module._rewards] != ["geneval"]


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation\.num_images is 0"):
        Evaluation(num_images=0)
