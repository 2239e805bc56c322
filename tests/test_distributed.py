"""Two to four processes: each strategy trains as one process does, and ranks that differ do not hang."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from lightning_unigrpo.guard import FLOAT32, REDUCED
from lightning_unigrpo.types import ImageSegment, Trajectory
from tests import rank_cases
from tests.published import CONFIG, write_checkpoint
from tests.rank_cases import CASES, EPOCHS, LIMIT, Record, file_of, run_alone
from tests.ranks import Ranks, run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RUNS = {
    2: [
        "ddp/digits/auto",
        "fsdp/digits/sharded",
        "fsdp2/digits/resident",
        "fsdp/one group/resident",
        "ddp/dialogue/auto",
        "fsdp/dialogue/resident",
        "fsdp2/dialogue/sharded",
        "ddp/images/auto",
        "fsdp/images/sharded",
        "fsdp2/images/resident",
        "ddp/texts/auto",
        "fsdp/texts/resident",
        "fsdp2/texts/sharded",
        "ddp/clipped/auto",
        "fsdp/clipped/resident",
        "fsdp2/clipped/resident",
        "ddp/lora/auto",
        "fsdp2/lora/sharded",
        "fsdp/bagel/sharded",
        "ddp/flow/auto",
        "fsdp/tokens/sharded",
        "fsdp2/masked/sharded",
        "ddp/janusflow/auto",
        "fsdp/janusflow/sharded",
        "ddp/januspro/auto",
        "fsdp2/januspro/resident",
        "ddp/showo/auto",
        "fsdp/showo/resident",
        "fsdp2/showo/sharded",
        "fsdp/adamw/resident",
    ],
    3: ["ddp/digits/auto", "ddp/one group/auto", "fsdp2/one group/sharded"],
    4: [
        "ddp/digits/auto",
        "fsdp/digits/resident",
        "fsdp2/one group/resident",
        # Checkpoints of two ranks: the same strategy, and another.
        "fsdp/digits/auto/fsdp",
        "fsdp2/digits/auto/fsdp2",
        "ddp/digits/auto/fsdp",
    ],
}
"""What is trained on how many ranks: ``strategy/case/mode`` of :mod:`tests.rank_cases`."""
PAIRS = [(world, name) for world, names in RUNS.items() for name in names]
FRESH = [(world, name) for world, name in PAIRS if name.count("/") == 2]
RESUMED = [(world, name) for world, name in PAIRS if name.count("/") == 3]


PARTS = {
    2: [
        *(["memory"] if sys.platform == "linux" else []),
        f"equal={','.join(RUNS[2])}",
        "wrapping",
        "rollouts",
        "reduced",
        "odd",
    ],
    3: [f"equal={','.join(RUNS[3])}"],
    4: [f"equal={','.join(RUNS[4])}"],
}
"""Functions of :mod:`tests.rank_cases`, by number of ranks."""
Launch = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each case in this process, and keep what ranks need: checkpoints, and what was drawn."""
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoint(folder / "bagel")
    large = replace(CONFIG, hidden_size=256, intermediate_size=1024, num_hidden_layers=10)
    write_checkpoint(folder / "large", config=large)
    (folder / "alone").mkdir()
    for key, case in CASES.items():
        torch.save(run_alone(case, folder / "bagel"), folder / "alone" / f"{key}.pt")
    return folder


@pytest.fixture(scope="module")
def launch(root: Path) -> Launch:
    """Give a function that runs all parts of some ranks, once, and returns the folder of one."""
    problems: dict[int, AssertionError] = {}

    def start(world: int, part: str) -> Path:
        folder = root / str(world)
        if not folder.exists():
            if world == 4:
                start(2, "equal")  # whose checkpoints are continued
            try:
                run("tests.rank_cases:several", world, folder, *PARTS[world], timeout=300)
            except AssertionError as error:
                problems[world] = error
        if not (folder / part / "done").exists():
            raise problems[world]
        return folder / part

    return start


def alone(root: Path, key: str) -> Record:
    found: Record = torch.load(root / "alone" / f"{key}.pt", weights_only=False)[1]
    return found


def records(launch: Launch, world: int, name: str) -> list[Record]:
    """Return what each rank of a run left."""
    folder = launch(world, "equal")
    return [torch.load(file_of(folder, name, rank), weights_only=False) for rank in range(world)]


def by_member(drawn: list[Trajectory]) -> dict[tuple[int, int], Trajectory]:
    return {(t.group, t.member): t for t in drawn}


def far(a: Tensor | None, b: Tensor | None) -> float:
    """Return the largest difference; NaN when only one is there."""
    if a is None or b is None:
        return 0.0 if a is b else math.nan
    if a.shape != b.shape:
        return math.nan
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the L2 distance of two networks."""
    assert one.keys() == other.keys()
    return math.sqrt(sum(float((one[k] - other[k]).double().square().sum()) for k in one))


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """Return what an update computed."""
    names = ("loss", "grad_norm", "flow", "text/kl", "text/ratio", "image/ratio", "reward")
    return {
        key: value
        for key, value in metrics.items()
        if key.startswith(names)
        and not key.endswith("/failures")  # counted where rewards are called
    }


# ---- one process or many


@pytest.mark.parametrize(("world", "name"), FRESH)
def test_ranks_draw_what_one_process_draws(
    world: int, name: str, root: Path, launch: Launch
) -> None:
    """The same noise and windows to the bit, the same tokens, and float32 rounding of the rest."""
    expected = by_member(alone(root, name.split("/")[1]).drawn)
    parts = [by_member(record.drawn) for record in records(launch, world, name)]
    assert {len(part) for part in parts} == {len(expected) // world}
    found = {member: trajectory for part in parts for member, trajectory in part.items()}
    assert found.keys() == expected.keys()
    for member, one in expected.items():
        other = found[member]
        assert other.reward == pytest.approx(one.reward, abs=1e-5)
        assert other.usable == one.usable
        for a, b in zip(one.segments, other.segments, strict=True):
            assert type(a) is type(b)
            if isinstance(a, ImageSegment):
                assert far(a.noise, b.noise) == 0
                assert a.start == b.start
                assert far(a.latent, b.latent) < 1e-5
                assert far(a.ref_velocity, b.ref_velocity) < 2e-5
            else:
                assert torch.equal(a.tokens, b.tokens)
                assert far(a.log_prob, b.log_prob) < 2e-5
                assert far(a.ref_log_prob, b.ref_log_prob) < 2e-5
            # The spread of a group's rewards, which divides, may be a hundredth of them.
            assert b.advantage == pytest.approx(a.advantage, abs=1e-4)


@pytest.mark.parametrize(("world", "name"), FRESH)
def test_ranks_train_as_one_process(world: int, name: str, root: Path, launch: Launch) -> None:
    """Six updates: losses, gradient norms as torch measures them on whole gradients, and weights."""
    key = name.split("/")[1]
    expected, found = alone(root, key), records(launch, world, name)
    assert len(expected.metrics) == CASES[key].iterations * EPOCHS >= 6
    for record in found[1:]:
        assert record.metrics == found[0].metrics  # reduced, so the same on all ranks
    assert moved(found[0].before, expected.before) == 0
    for number, (one, other) in enumerate(zip(expected.metrics, found[0].metrics, strict=True)):
        # A step begins where the last one ended: roundings add up, most under LoRA's steep first steps.
        rel = 1e-5 if number == 0 else 1e-3
        assert figures(other) == pytest.approx(figures(one), rel=rel, abs=2e-6), number
    distance = moved(found[0].after, expected.after) / moved(expected.before, expected.after)
    if key == "adamw":  # it divides rounding by rounding where gradients vanish: told, not asserted
        print(f"AdamW, {name} on {world} ranks: weights {distance:.1e} of the way apart")  # noqa: T201
    else:
        assert distance < 2e-4


def test_the_cases_are_not_trivial(root: Path, launch: Launch) -> None:
    """Ragged texts, masked groups, clipping of both groups, several sizes, a reference that lags behind."""
    digits, clipped = alone(root, "digits"), alone(root, "clipped")
    lengths = [
        {len(t.segments[1].tokens) for t in record.drawn}  # type: ignore[union-attr]
        for record in records(launch, 2, "ddp/digits/auto")
    ]
    assert max(lengths[0]) > max(lengths[1])
    assert len(lengths[1]) > 1
    usable = {t.group: t.usable for t in digits.drawn}
    assert set(usable.values()) == {True, False}
    assert abs(digits.metrics[0]["loss"]) > 0.01
    assert all(m["grad_norm/flow"] > 0.02 and m["grad_norm/text"] > 0.02 for m in clipped.metrics)
    lags = [m["flow/velocity_mse"] for m in digits.metrics]
    assert lags[2 * EPOCHS] == 0  # refreshed for the third collection
    assert min(lags[2 * EPOCHS - 1], lags[3 * EPOCHS]) > 1e-4
    for key in CASES:
        record = alone(root, key)
        assert moved(record.before, record.after) > 0.01, key
    assert len({t.group for t in alone(root, "one group").drawn}) == 1
    one, other = (
        [len(t.segments) for t in record.drawn]
        for record in records(launch, 2, "fsdp2/dialogue/sharded")
    )
    assert len(set(one)) > 1
    assert one != other  # in step, micro-batch by micro-batch
    sizes = {t.segments[-1].latent.shape for t in alone(root, "lora").drawn}  # type: ignore[union-attr]
    assert len(sizes) == 3


# ---- the strategy's wrapping


@pytest.fixture(scope="module")
def wrapped(launch: Launch) -> list[dict[str, Any]]:
    folder = launch(2, "wrapping")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


LAYERS = [f"language_model.model.layers.{i}" for i in range(3)]


@pytest.mark.parametrize("name", ["literal", "fsdp", "fsdp twin", "fsdp2", "fsdp2 twin"])
def test_every_layer_is_a_unit_of_its_own(name: str, wrapped: list[dict[str, Any]]) -> None:
    """Each rank holds half of the policy, half of its reference, and nothing is left gathered."""
    for found in wrapped:
        assert found[name]["units"] == [True] * 3
        assert found[name]["all"] == ["", *LAYERS]
        assert found[name]["bytes"] == pytest.approx(found["total"] / 2, rel=0.01)
        assert not found[name]["is_gathered"]
    assert sum(found[name]["bytes"] for found in wrapped) >= wrapped[0]["total"]


def test_lightning_leaves_the_module_alone(wrapped: list[dict[str, Any]]) -> None:
    assert [found["outside"] for found in wrapped] == [False, False]


def test_a_policy_of_the_user_is_followed(
    root: Path, launch: Launch, wrapped: list[dict[str, Any]]
) -> None:
    """For the policy and for its reference, and it trains the same."""
    parts = [f"{layer}.{part}" for layer in LAYERS for part in ("mlp", "mlp_moe_gen")]
    for found in wrapped:
        for name in ("policy", "policy twin"):
            assert found[name]["all"] == ["", *parts]
            assert found[name]["bytes"] == pytest.approx(found["total"] / 2, rel=0.01)
    folder = launch(2, "wrapping")
    record = torch.load(file_of(folder, "policy", 0), weights_only=False)
    expected = alone(root, "digits").metrics[: 3 * EPOCHS]
    for one, other in zip(expected, record.metrics, strict=True):
        assert figures(other) == pytest.approx(figures(one), rel=1e-3, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("activation", "activation_checkpointing_policy .* set adapter.gradient_checkpointing"),
        ("orig_params", "use_orig_params is False"),
        ("tensor", "tensor_parallel_size 2, .* tensor_parallel_size: 1"),
        ("auto", "tensor_parallel_size 2, .* tensor_parallel_size: 1"),
        ("dtypes", r"torch\.bfloat16 and torch\.float32 .* trainer.strategy to ddp"),
    ],
)
def test_what_cannot_work_is_refused(name: str, words: str, wrapped: list[dict[str, Any]]) -> None:
    for found in wrapped:
        assert found["refused"][name].startswith("ValueError: ")
        with pytest.raises(ValueError, match=words):
            raise ValueError(found["refused"][name])
        assert found["refused"]["loaded"] == "False"


# ---- the reference


@pytest.mark.parametrize(("world", "name"), FRESH)
def test_the_reference_is_the_policy_before_the_first_update(
    world: int, name: str, launch: Launch
) -> None:
    [first, *_] = records(launch, world, name)[0].metrics
    known = [
        first[key] for key in ("flow/velocity_mse", "flow/latent_kl", "text/kl") if key in first
    ]
    has_velocities = name.split("/")[1] not in {"texts", "tokens", "masked", "januspro", "showo"}
    assert bool(known) == has_velocities
    assert all(abs(value) < 1e-10 for value in known)


def test_a_checkpoint_holds_no_reference(launch: Launch, wrapped: list[dict[str, Any]]) -> None:
    """Weights and AdamW's two moments, and next to nothing else."""
    path = launch(2, "wrapping") / "literal.ckpt"
    saved = torch.load(path, weights_only=False)
    weights = {k: v for k, v in saved["state_dict"].items() if k.startswith("adapter")}
    assert sum(v.numel() * v.element_size() for v in weights.values()) == wrapped[0]["total"]
    assert not saved["callbacks"].get("ReferenceVelocity")
    assert saved["rollout_mode"] == "resident"
    assert saved["rollout_cost"]["bytes"] == wrapped[0]["total"]
    assert 0 < saved["rollout_cost"]["seconds"] < LIMIT
    assert path.stat().st_size < 3.3 * wrapped[0]["total"]


def test_a_checkpoint_of_parts_holds_no_reference(
    launch: Launch, wrapped: list[dict[str, Any]]
) -> None:
    reader = FileSystemReader(launch(2, "equal") / "fsdp2" / rank_cases.KEPT)
    found = reader.read_metadata().state_dict_metadata
    weights = [v for k, v in found.items() if k.startswith("state_dict.adapter")]
    assert sum(4 * v.size.numel() for v in weights) == wrapped[0]["total"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("world", "name"), RESUMED)
def test_a_refreshed_reference_is_restored_to_other_ranks(
    world: int, name: str, root: Path, launch: Launch
) -> None:
    """Two ranks saved after the third iteration; the fourth compares with the snapshot of the third."""
    expected, found = alone(root, "digits"), records(launch, world, name)[0]
    for one, other in zip(expected.metrics[-EPOCHS:], found.metrics, strict=True):
        assert figures(other) == pytest.approx(figures(one), rel=1e-3, abs=2e-6)
        assert one["flow/velocity_mse"] > 1e-4
    assert moved(found.after, expected.after) / moved(expected.before, expected.after) < 2e-4


# ---- the weights of a rollout


def tensors(drawn: list[Trajectory]) -> list[Tensor]:
    """Return every number of some trajectories."""
    found = []
    for trajectory in drawn:
        found.append(torch.tensor([trajectory.reward]))
        for segment in trajectory.segments:
            found += [value for value in vars(segment).values() if isinstance(value, Tensor)]
            found += getattr(segment, "views", {}).values()
    return found


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize(
    ("key", "precision"),
    [("digits", "32-true"), ("digits", "bf16-mixed"), ("bagel", "bf16-mixed")],
)
def test_whole_and_sharded_weights_draw_the_same(
    key: str, precision: str, strategy: str, launch: Launch
) -> None:
    """To the bit, so the guard finds the same; also where ranks draw other sizes and see other images."""
    folder, bounds = launch(2, "rollouts"), FLOAT32 if precision == "32-true" else REDUCED
    for rank in range(2):
        one, other = (
            torch.load(
                file_of(folder, f"{strategy}/{key}/{precision}/{mode}", rank), weights_only=False
            )
            for mode in ("resident", "sharded")
        )
        pairs = zip(tensors(one.drawn), tensors(other.drawn), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        for name, bound in bounds.items():
            value = one.metrics[0][f"guard/{name}"]
            assert value == other.metrics[0][f"guard/{name}"]
            assert 0 < value < bound
            # bfloat16 was computed in: it is coarser than float32 by four decades.
            assert (value > 1e-4) == (precision == "bf16-mixed")


@pytest.mark.parametrize("key", ["digits", "lora"])
def test_copies_stay_equal_in_reduced_precision(key: str, launch: Launch) -> None:
    """DDP reduces all gradients although the rollout computed with cast weights."""
    folder = launch(2, "reduced")
    one, other = (torch.load(file_of(folder, key, rank), weights_only=False) for rank in range(2))
    assert one.metrics == other.metrics
    assert moved(one.before, one.after) > 1e-3
    assert moved(one.after, other.after) == 0


# ---- ranks that differ


@pytest.fixture(scope="module")
def odd(launch: Launch) -> list[dict[str, Any]]:
    folder = launch(2, "odd")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


NO_REWARD = (
    "RuntimeError: Reward 'dark_on_the_second_rank' failed and is required (model.rewards): "
    "ConnectionError('nobody answers')"
)
NO_WEIGHTS = (
    "RuntimeError: Reward 'MissingOnTheSecondRank' cannot be prepared (model.rewards): "
    "no weights here"
)
MODES = ["ddp auto", "fsdp sharded", "fsdp2 sharded", "fsdp2 resident"]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_ranks_whose_texts_end_wait_in_step(strategy: str, odd: list[dict[str, Any]]) -> None:
    long, short = (found[f"lengths {strategy}"] for found in odd)
    assert set(long) == {12}  # the limit: the first rank never stops
    assert max(short) < 12
    assert odd[0][f"metrics {strategy}"] == odd[1][f"metrics {strategy}"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("place", "cause"),
    [("rollout", "MemoryError: no ink left"), ("reward", NO_REWARD), ("prepare", NO_WEIGHTS)],
)
def test_an_error_on_one_rank_stops_all(
    place: str, cause: str, mode: str, odd: list[dict[str, Any]]
) -> None:
    assert odd[0][f"{place} {mode}"] == f"RuntimeError: Rank 1 failed, so all stop: {cause}"
    assert odd[1][f"{place} {mode}"] == cause


def test_an_error_inside_the_network_ends_its_rank(root: Path) -> None:
    """The others wait for weights and hear nothing; what started the ranks ends them."""
    ranks = Ranks("tests.rank_cases:several", 2, root / "crash", "crash=fsdp")
    assert all(code != 0 for code in ranks.wait(60))
    said = ranks.logs[1].read_text()
    assert "RankLostError: Rank 1 failed inside the network: MemoryError('no ink left')" in said


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_that_fails_on_one_rank_is_nan_there(mode: str, odd: list[dict[str, Any]]) -> None:
    """Its rollouts take no part, those of the other rank train on."""
    first, second = (found[f"unscored {mode}"] for found in odd)
    assert all(map(math.isnan, second["rewards"]))
    assert not any(second["usable"])
    assert all(map(math.isfinite, first["rewards"]))
    assert any(first["usable"])
    assert len(first["metrics"]) == 2 * EPOCHS
    for one, other in zip(first["metrics"], second["metrics"], strict=True):
        assert one == other
        assert one["reward/unscored"] == 0.5
        assert one["reward/dark_on_the_second_rank/failures"] == 6
        assert all(math.isfinite(value) for value in figures(one).values())
        assert one["grad_norm/text"] > 0


@pytest.fixture(scope="module")
def evaluation(root: Path) -> dict[str, float]:
    return rank_cases.evaluated("single", root)


@pytest.mark.parametrize("mode", MODES)
def test_validation_in_uneven_batches(
    mode: str, evaluation: dict[str, float], odd: list[dict[str, Any]]
) -> None:
    """Five prompts in batches of two: the second rank has nobody in its last, and the means are of all."""
    expected = evaluation
    assert expected["val/text_length"] > 0
    for found in odd:
        assert found[f"evaluation {mode}"] == pytest.approx(expected, rel=1e-5)


# ---- memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets glibc's allocator")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_rank_reads_a_checkpoint_unit_by_unit(strategy: str, launch: Launch) -> None:
    """Of 80 MB: half of it, the autoencoder, and one layer while it is cut.

    Measured: 56 MB under FSDP and 49 MB under FSDP2, of which 40 are the rank's own, 4 the autoencoder; a
    layer has 8, which FSDP holds a second time while it makes one tensor of it.
    """
    folder = launch(2, "memory")
    for rank in range(2):
        found = json.loads((folder / f"{strategy}-{rank}.json").read_text())
        assert found["kept"] == pytest.approx(found["total"] / 2, rel=0.01)
        allowed = found["kept"] + found["frozen"] + 2 * found["unit"]
        assert found["kept"] < found["peak"] <= allowed < 0.8 * found["total"]
