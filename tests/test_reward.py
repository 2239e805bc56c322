"""The reward protocol: what is passed, what may come back, what failure costs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lightning_unigrpo.reward import (
    MissingColumnError,
    Reward,
    RewardLengthError,
    RewardRunner,
    combine,
)
from lightning_unigrpo.types import Prompt, Trajectory


def trajectories(num: int = 3, sizes: tuple[int, ...] = (4,)) -> list[Trajectory]:
    return [
        Trajectory(
            prompt=Prompt(text=f"p{i}", id=i, columns={"answer": i}),
            segments=[],
            group=0,
            member=i,
            completion=f"c{i}",
            image=torch.full((3, sizes[i % len(sizes)], 4), i / 10),
        )
        for i in range(num)
    ]


def run(*rewards: Any, chunks: int = 1, num: int = 3) -> tuple[torch.Tensor, dict[str, float]]:
    with RewardRunner(list(rewards)) as runner:
        rows = trajectories(num)
        for part in range(chunks):
            runner.submit(rows[part * num // chunks : (part + 1) * num // chunks])
        return runner.finish()


def test_the_signature_decides_what_is_passed() -> None:
    seen: dict[str, Any] = {}

    def some(images: torch.Tensor, answer: list[int]) -> list[int]:
        seen.update(images=images, answer=answer)
        return answer

    def everything(**columns: Any) -> list[float]:
        seen.update(all=sorted(columns))
        return [0.0] * 3

    matrix, _ = run(some, everything)
    assert seen["images"].shape == (3, 3, 4, 4)
    assert seen["images"].dtype == torch.float32
    assert seen["all"] == ["answer", "completions", "images", "prompts"]
    assert matrix.tolist() == [[0, 0], [1, 0], [2, 0]]


def test_images_of_different_sizes_come_as_a_list() -> None:
    def height(images: list[torch.Tensor]) -> list[float]:
        return [float(image.shape[1]) for image in images]

    with RewardRunner([height]) as runner:
        runner.submit(trajectories(3, sizes=(4, 6)))
        assert runner.finish()[0].flatten().tolist() == [4, 6, 4]


def test_a_missing_column_is_a_mistake_that_stops() -> None:
    def needs(images: Any, caption: Any) -> list[float]:
        return [0.0] * 3

    with pytest.raises(MissingColumnError, match=r"caption.*answer"):
        run(needs)


def test_async_rewards_are_awaited() -> None:
    async def later(answer: list[int]) -> list[int]:
        return [a + 1 for a in answer]

    assert run(later)[0].flatten().tolist() == [1, 2, 3]


def test_none_nan_and_inf_are_not_scorable() -> None:
    def partly(answer: list[int]) -> list[float | None]:
        return [None, float("inf"), 2.0]

    column = run(partly)[0].flatten()
    assert column[:2].isnan().all()
    assert column[2] == 2


def test_details_are_averaged_over_the_collection() -> None:
    def rich(answer: list[int]) -> dict[str, Any]:
        return {"score": answer, "sharpness": [float(a) for a in answer]}

    _, details = run(rich, chunks=3)
    assert details["reward/rich/sharpness"] == 1.0
    assert details["reward/rich/failures"] == 0.0


def test_a_wrong_length_names_reward_and_numbers() -> None:
    def short(answer: list[int]) -> list[float]:
        return [0.0]

    with pytest.raises(RewardLengthError, match=r"'short' returned 1 values for 3"):
        run(short)


def test_a_failure_leaves_its_chunk_unscored_and_is_counted() -> None:
    def fragile(answer: list[int]) -> list[int]:
        if 0 in answer:
            raise ValueError("no service")
        return answer

    with pytest.warns(UserWarning, match="no service"):
        matrix, details = run(fragile, chunks=3)
    assert matrix[0].isnan()
    assert matrix[1:].flatten().tolist() == [1, 2]
    assert details["reward/fragile/failures"] == 1


def test_a_required_reward_stops_the_run() -> None:
    def broken(answer: list[int]) -> list[int]:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        run(Reward(broken, required=True))


def test_a_reward_that_scores_nothing_stops_the_run() -> None:
    def silent(answer: list[int]) -> list[None]:
        return [None] * len(answer)

    with pytest.raises(RuntimeError, match=r"'silent' scored none of 3.*model\.rewards"):
        run(silent)


def test_remote_rewards_run_while_the_next_chunk_is_drawn_and_keep_their_order() -> None:
    gate = threading.Event()

    def slow(answer: list[int]) -> list[int]:
        assert gate.wait(5)
        return answer

    with RewardRunner([Reward(slow, remote=True)], workers=3) as runner:
        for row in trajectories():
            runner.submit([row])  # would block here if it were not remote
        gate.set()
        assert runner.finish()[0].flatten().tolist() == [0, 1, 2]


def test_a_remote_reward_that_hangs_is_given_up() -> None:
    gate = threading.Event()

    def hangs(answer: list[int]) -> list[int]:
        if 0 in answer:
            gate.wait(5)
        return answer

    with RewardRunner([Reward(hangs, remote=True, timeout=0.05)], workers=3) as runner:
        for row in trajectories():
            runner.submit([row])
        with pytest.warns(UserWarning, match="timeout"):
            matrix, details = runner.finish()
        gate.set()
    assert matrix[0].isnan()
    assert details["reward/hangs/failures"] == 1


def test_combination_ignores_what_is_missing_and_what_weighs_nothing() -> None:
    nan = float("nan")
    rewards = torch.tensor([[1.0, 2.0, 5.0], [nan, 2.0, 5.0], [nan, nan, 5.0]])
    got = combine(rewards, torch.tensor([1.0, 0.5, 0.0]))
    assert got[:2].tolist() == [2.0, 1.0]
    assert got[2].isnan()


def test_names_are_unique_and_something_weighs() -> None:
    def one(answer: list[int]) -> list[int]:
        return answer

    with pytest.raises(ValueError, match="not unique"):
        RewardRunner([one, one])
    with pytest.raises(ValueError, match="weight"):
        RewardRunner([Reward(one, weight=0.0)])
