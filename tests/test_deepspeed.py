"""DeepSpeed's stages train as one process does: Lightning's strategy on two processes and the CPU engine."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_unigrpo import distributed
from lightning_unigrpo.distributed import zero
from lightning_unigrpo.guard import FLOAT32, REDUCED
from lightning_unigrpo.types import ImageSegment, Trajectory
from tests import deepspeed_cases as cases
from tests.published import write_checkpoint
from tests.rank_cases import Record, file_of
from tests.ranks import run

if find_spec("deepspeed") is None:
    pytest.skip('needs pip install "lightning-unigrpo[deepspeed]"', allow_module_level=True)

WORLD = 2
EXACT = [
    "deepspeed_stage_1/flow/auto/32-true",
    "deepspeed_stage_2/flow/auto/32-true",
    "deepspeed_stage_3/flow/resident/32-true",
    "deepspeed_stage_3/flow/sharded/32-true",
    "deepspeed_stage_1/clipped/auto/32-true",
    "deepspeed_stage_2/clipped/auto/32-true",
    "deepspeed_stage_3/clipped/resident/32-true",
    "deepspeed_stage_2/dialogue/auto/32-true",
    "deepspeed_stage_2/lora/auto/32-true",
    "deepspeed_stage_3/lora/sharded/32-true",
    "deepspeed_stage_3/bagel/resident/32-true",
]
"""What is compared with one process: ``strategy/case/mode/precision``."""
ROUNDED = [
    f"deepspeed_stage_{stage}/{case}/auto/bf16-mixed"
    for stage in (1, 2, 3)
    for case in ("flow", "in one piece")
]
RATES = ["deepspeed_stage_2/adamw/auto/32-true", "deepspeed_stage_3/adamw/auto/32-true"]
ALONE = sorted({name.split("/")[1] for name in EXACT})
AGAIN = ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"]
Launch = Callable[..., Path]


def on_ranks(test: Any) -> Any:
    """Mark a test that starts processes."""
    return pytest.mark.dist(pytest.mark.slow(test))


def needs_gpu(test: Any) -> Any:
    """Mark a test that runs where there is a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(pytest.mark.slow(skip(test)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each case in this process, and keep what ranks need: a checkpoint, and what was drawn."""
    folder = tmp_path_factory.mktemp("deepspeed")
    write_checkpoint(folder / "bagel")
    (folder / "alone").mkdir()
    for key in ALONE:
        torch.save(cases.run_alone(key, folder / "bagel"), folder / "alone" / f"{key}.pt")
    return folder


@pytest.fixture(scope="module")
def launch(root: Path) -> Launch:
    """Run a function of :mod:`tests.deepspeed_cases` on two ranks, once; returns its folder."""
    failed: dict[str, AssertionError | None] = {}

    def start(target: str, *words: str) -> Path:
        if target not in failed:
            failed[target] = None
            try:
                run(f"tests.deepspeed_cases:{target}", WORLD, root / target, *words, timeout=400)
            except AssertionError as error:
                failed[target] = error
        problem = failed[target]
        if problem is not None:
            raise problem
        return root / target

    return start


Left = tuple[Record, dict[str, float], dict[str, float]]


def left_by(launch: Launch, name: str) -> list[Left]:
    """Return what each rank of a run left: its record, its parts of the weights, the learning rates."""
    folder = launch("train", *EXACT, *ROUNDED, *RATES)
    return [torch.load(file_of(folder, name, rank), weights_only=False) for rank in range(WORLD)]


def alone(root: Path, key: str) -> Record:
    found: Record = torch.load(root / "alone" / f"{key}.pt", weights_only=False)[1]
    return found


def far(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the L2 distance of two networks."""
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[k].float() - other[k]).square().sum()) for k in one))


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """Return what an update computed."""
    names = ("loss", "grad_norm", "flow", "text/kl", "text/ratio", "image/ratio", "reward")
    return {
        key: value
        for key, value in metrics.items()
        if key.startswith(names) and not key.endswith("/failures")  # told where rewards are called
    }


def by_member(records: list[Record]) -> dict[tuple[int, int], Trajectory]:
    return {(t.group, t.member): t for record in records for t in record.drawn}


@pytest.mark.parametrize("name", EXACT)
@on_ranks
def test_micro_batches_add_up_to_what_one_process_computes(
    name: str, root: Path, launch: Launch
) -> None:
    """Updates by gradient descent: losses, the norm of all gradients as torch measures it, weights."""
    key = name.split("/")[1]
    expected, found = alone(root, key), [record for record, *_ in left_by(launch, name)]
    assert len(expected.metrics) == 2 * cases.iterations_of(key)
    assert found[1].metrics == found[0].metrics  # reduced, so the same on all ranks
    assert far(found[0].before, expected.before) == 0
    for number, (one, other) in enumerate(zip(expected.metrics, found[0].metrics, strict=True)):
        rel = 1e-5 if number == 0 else 1e-3  # a step begins where the last one ended
        assert figures(other) == pytest.approx(figures(one), rel=rel, abs=2e-6), number
    way = far(expected.before, expected.after)
    assert way > 1e-3
    # 3e-7 of the way is float32; the last micro-batch alone would end half the way from there.
    assert far(found[0].after, expected.after) < 2e-5 * way


@pytest.mark.parametrize("name", EXACT)
@on_ranks
def test_ranks_draw_what_one_process_draws(name: str, root: Path, launch: Launch) -> None:
    """The same tokens and noise, whether weights are whole, gathered once, or unit by unit."""
    expected = by_member([alone(root, name.split("/")[1])])
    found = by_member([record for record, *_ in left_by(launch, name)])
    assert found.keys() == expected.keys()
    for member, one in expected.items():
        for a, b in zip(one.segments, found[member].segments, strict=True):
            if isinstance(a, ImageSegment):
                assert a.noise is None or torch.equal(a.noise, b.noise)
                torch.testing.assert_close(b.latent, a.latent, atol=1e-5, rtol=0)
            else:
                assert torch.equal(a.tokens, b.tokens)


@on_ranks
def test_whole_and_sharded_weights_draw_the_same_bits(launch: Launch) -> None:
    resident, sharded = (
        by_member([record for record, *_ in left_by(launch, name)]) for name in EXACT[2:4]
    )
    for member, one in resident.items():
        _, text, image = one.segments
        _, same_text, same_image = sharded[member].segments
        assert torch.equal(text.log_prob, same_text.log_prob)
        assert torch.equal(image.latent, same_image.latent)
        assert torch.equal(image.velocity, same_image.velocity)


@pytest.mark.parametrize("name", EXACT + ROUNDED)
@on_ranks
def test_rollout_training_and_reference_are_one_policy(name: str, launch: Launch) -> None:
    first = left_by(launch, name)[0][0].metrics[0]
    bounds = FLOAT32 if name.endswith("32-true") else REDUCED
    for figure, bound in bounds.items():
        assert first[f"guard/{figure}"] < bound
    assert first["flow/velocity_mse"] == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
@on_ranks
def test_clipping_scales_all_gradients_by_one_norm(stage: int, root: Path, launch: Launch) -> None:
    """Unclipped, the same trajectories end elsewhere; torch's clip is in the test of the updates."""
    name = next(n for n in EXACT if n.startswith(f"deepspeed_stage_{stage}/clipped"))
    record = left_by(launch, name)[0][0]
    norms = [metrics["grad_norm/global"] for metrics in record.metrics]
    assert min(norms) > 0.02
    assert not record.metrics[0].keys() & {"grad_norm/text", "grad_norm/flow"}
    longest = 0.1 * 0.02 / (1 - 0.5)  # learning rate, bound, momentum
    assert far(record.before, record.after) < len(norms) * longest
    free = alone(root, "flow")
    assert far(free.before, free.after) > len(norms) * longest


@pytest.mark.parametrize("stage", [1, 2, 3])
@on_ranks
def test_micro_batches_add_up_in_bfloat16(stage: int, launch: Launch) -> None:
    """DeepSpeed adds up in other buffers then; a lost or doubled one is off by a third and more."""
    parts, whole = (
        left_by(launch, f"deepspeed_stage_{stage}/{case}/auto/bf16-mixed")[0][0].metrics[:2]
        for case in ("flow", "in one piece")
    )
    for one, other in zip(parts, whole, strict=True):
        assert one["grad_norm/global"] == pytest.approx(other["grad_norm/global"], rel=5e-3)


@pytest.mark.parametrize("name", [n for n in EXACT + ROUNDED if "stage_3" in n])
@on_ranks
def test_a_rank_holds_its_part_of_policy_and_reference(name: str, launch: Launch) -> None:
    for _, parts, _ in left_by(launch, name):
        assert parts["policy part"] == pytest.approx(1 / WORLD, rel=0.01)
        assert parts["policy whole"] < 0.01
        if "lora" not in name:
            assert parts["reference part"] == pytest.approx(1 / WORLD, rel=0.01)
            assert parts["reference whole"] == 0


@pytest.mark.parametrize("name", RATES)
@on_ranks
def test_each_group_keeps_its_rate_and_its_warm_up(name: str, launch: Launch) -> None:
    """AdamW's first steps move a weight by the learning rate at most: a quarter, then a half of it."""
    record, _, rates = left_by(launch, name)[0]
    assert rates == pytest.approx({"text": 0.75e-3, "flow": 2.25e-3})
    for group, bound in (("text", 0.75e-3), ("flow", 2.25e-3)):
        moved = max(
            float((record.after[k] - record.before[k]).abs().max())
            for k in record.after
            if ("flow" in k or "image" in k) == (group == "flow")
        )
        assert 0.9 * bound < moved < 1.01 * bound


@pytest.fixture(scope="module")
def runs(root: Path, launch: Launch) -> dict[str, Any]:
    folder = launch("again", *AGAIN)
    return {n: torch.load(file_of(folder, n, 0), weights_only=False) for n in AGAIN}


@pytest.mark.parametrize("name", AGAIN[1:])
@on_ranks
def test_a_second_fit_starts_with_an_engine_of_its_own(name: str, runs: dict[str, Any]) -> None:
    assert far(runs[name]["twice"], runs["ddp"]["twice"]) < 1e-6


@pytest.mark.parametrize("name", AGAIN[1:])
@on_ranks
def test_tests_before_and_after_training_agree(name: str, runs: dict[str, Any]) -> None:
    for one, other in zip(runs[name]["tests"], runs["ddp"]["tests"], strict=True):
        one, other = (x[0] if isinstance(x, list) else x for x in (one, other))
        assert one == pytest.approx(other, abs=1e-5)
        assert len(one) > 2


@pytest.mark.parametrize("name", AGAIN[1:])
@on_ranks
def test_a_checkpoint_continues_to_the_same_weights(
    name: str, root: Path, runs: dict[str, Any]
) -> None:
    expected = alone(root, "flow")
    way = far(expected.before, expected.after)
    assert far(runs[name]["resumed"], expected.after) < 2e-5 * way


@pytest.fixture(scope="module")
def told(launch: Launch) -> list[dict[str, Any]]:
    folder = launch("odd")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@on_ranks
def test_ranks_may_draw_texts_of_other_lengths(told: list[dict[str, Any]]) -> None:
    assert set(told[0]["lengths"]) == {12}
    assert max(told[1]["lengths"]) < 12


@on_ranks
def test_an_error_on_one_rank_ends_all(told: list[dict[str, Any]]) -> None:
    assert told[1]["breaks"] == "MemoryError: no ink left"
    assert "Rank 1 failed, so all stop: MemoryError: no ink left" in told[0]["breaks"]


@on_ranks
def test_looking_at_a_weight_calls_no_other_rank(root: Path, launch: Launch) -> None:
    record: Record = torch.load(file_of(launch("odd"), "curious", 0), weights_only=False)
    expected = alone(root, "flow")
    assert far(record.after, expected.after) < 2e-5 * far(expected.before, expected.after)


@on_ranks
def test_passes_that_would_wait_for_each_other_are_refused(told: list[dict[str, Any]]) -> None:
    for messages in told:
        assert messages["some look"].startswith("ValueError: trainer.strategy is DeepSpeed's")
        assert "ImageSegment and TextSegment, TextSegment" in messages["some look"]


@pytest.mark.parametrize("key", cases.REFUSED)
@on_ranks
def test_a_config_that_would_train_something_else_is_refused(
    key: str, told: list[dict[str, Any]]
) -> None:
    for messages in told:
        assert messages[key].startswith("ValueError: trainer.strategy")
        assert key in messages[key]


@pytest.mark.parametrize("key", cases.ALLOWED)
@on_ranks
def test_other_configs_train_the_same(key: str, root: Path, launch: Launch) -> None:
    record: Record = torch.load(file_of(launch("odd"), key, 0), weights_only=False)
    expected = alone(root, "clipped")
    assert far(record.after, expected.after) < 2e-5 * far(expected.before, expected.after)


@pytest.mark.parametrize(
    ("module", "fault"), [(None, "none is"), (ModuleType("old"), "an older one is")]
)
def test_a_package_that_is_missing_or_old_is_named_with_its_extra(
    module: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module is not None:
        module.ZeROOptimizer = object
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.base_optimizer", module)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    wanted = rf'deepspeed >= 0.18.5, and {fault} .*pip install "lightning-unigrpo\[deepspeed\]"'
    with pytest.raises(ValueError, match=wanted):
        zero.require()


def test_other_strategies_have_no_engine() -> None:
    from lightning.pytorch.strategies import DDPStrategy

    assert zero.stage_of(DDPStrategy()) == 0
    assert distributed.engine_norms(DDPStrategy()) == {}


# ---- where there is a GPU

NAMED = ("deepspeed_stage_2", "deepspeed_stage_3")
"""Lightning's strategies as users name them; one rank for each of two GPUs, if there are two."""


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Record]:
    folder = tmp_path_factory.mktemp("gpus")
    world = min(WORLD, torch.cuda.device_count())
    run("tests.deepspeed_cases:on_gpus", 1, folder / "alone", "auto", timeout=600)
    run("tests.deepspeed_cases:on_gpus", world, folder / "many", *NAMED, timeout=600)

    def load(strategy: str, precision: str) -> Record:
        place = folder / ("alone" if strategy == "auto" else "many")
        record: Record = torch.load(
            file_of(place, f"{strategy}/{precision}", 0), weights_only=False
        )
        return record

    return load


@needs_gpu
@pytest.mark.parametrize("strategy", NAMED)
def test_two_updates_on_gpus_equal_those_of_one(
    strategy: str, on_gpus: Callable[[str, str], Record]
) -> None:
    expected, record = on_gpus("auto", "32-true"), on_gpus(strategy, "32-true")
    way = far(expected.before, expected.after)
    assert far(record.after, expected.after) < 1e-2 * way  # sums in another order, and momentum


@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", NAMED)
def test_rollout_training_and_reference_are_one_policy_on_gpus(
    strategy: str, precision: str, on_gpus: Callable[[str, str], Record]
) -> None:
    first = on_gpus(strategy, precision).metrics[0]
    for figure, bound in (FLOAT32 if precision == "32-true" else REDUCED).items():
        assert first[f"guard/{figure}"] < bound
    assert first["flow/velocity_mse"] == pytest.approx(0, abs=1e-9)
    assert first["grad_norm/global"] > 0
