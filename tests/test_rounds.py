"""Several images in a trajectory: each is scored, and credit goes to the rounds that earned it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_unigrpo import Objective, UniGRPOModule
from lightning_unigrpo.advantage import gdpo_advantages, group_advantages, round_returns
from lightning_unigrpo.config import Evaluation
from lightning_unigrpo.flow import draw_window
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import (
    Prompt,
    TextSegment,
    Trajectory,
    after_each_round,
    sampled,
    sampled_by_round,
)
from tests.test_module import Record, fit, objective, optim, small, trainer
from tests.toys import ToyFlow, ToyMasked, ToyTokens

nan = math.nan


def test_returns_are_what_is_still_to_come() -> None:
    rewards = torch.tensor([[1.0, 4.0, 2.0], [0.5, nan, 3.0]]).unsqueeze(2)
    found = {
        kind: round_returns(rewards, kind, weights).squeeze(2)
        for kind, weights in (("last", None), ("each", (1, 2, 3)), ("improvement", (1, 2, 3)))
    }
    expected = {
        "last": [[2, 2, 2], [3, 3, 3]],
        "each": [[1 + 8 + 6, 8 + 6, 6], [nan, nan, 9]],
        "improvement": [[1 + 2 * 3 - 3 * 2, 2 * 3 - 3 * 2, -3 * 2], [nan, nan, nan]],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(found[kind], torch.tensor(values).float(), equal_nan=True)


def test_a_round_without_weight_may_be_unknown() -> None:
    rewards = torch.tensor([[[nan], [2.0]]])
    assert round_returns(rewards, "each", (0, 1)).flatten().tolist() == [2, 2]


def test_improvements_add_up_to_the_last_reward() -> None:
    rewards = torch.rand(7, 4, 2, generator=torch.Generator().manual_seed(0))
    improvement = round_returns(rewards, "improvement")
    torch.testing.assert_close(improvement[:, 0], rewards[:, -1])
    torch.testing.assert_close(improvement[:, 2], rewards[:, -1] - rewards[:, 1])


STARTS = [Start(Prompt(text=f"p{i // 2}", id=i // 2), i // 2, i % 2) for i in range(4)]


@pytest.mark.parametrize("toy", [ToyFlow, ToyTokens, ToyMasked])
@pytest.mark.parametrize("evaluate", [False, True])
def test_every_image_is_decoded_as_it_is_alone(toy: Any, evaluate: bool) -> None:
    adapter, sampling = toy().eval(), small(rounds=3)
    (drawn,) = rollout(adapter, STARTS, sampling, evaluate=evaluate, every_image=True)
    (plain,) = rollout(adapter, STARTS, sampling, evaluate=evaluate)
    for trajectory, other in zip(drawn, plain, strict=True):
        assert other.rounds == []
        assert [len(part.segments) for part in after_each_round(other, 3)] == [7]
        assert torch.equal(trajectory.image, other.image)
        parts = after_each_round(trajectory, len(trajectory.rounds))
        assert [len(part.segments) for part in parts] == [3, 5, 7]
        assert parts[-1].completion == trajectory.completion == other.completion
        assert torch.equal(parts[-1].image, trajectory.image)
        for number, part in enumerate(parts, 1):
            image = part.segments[-1]
            codes = image.latent if toy is ToyFlow else image.tokens
            alone = adapter.decode(codes.unsqueeze(0), image.grid)[0]
            torch.testing.assert_close(
                part.image, alone, atol=1e-6, rtol=0
            )  # a batch adds otherwise
            texts = [s for s in part.segments if isinstance(s, TextSegment) and s.is_sampled]
            assert len(texts) == number
            words = [adapter.detokenize(text.tokens) for text in texts]
            assert part.completion == "\n".join(words)


def test_each_image_has_a_window_of_its_own() -> None:
    """The same for a group; that of the first image does not depend on how many follow."""
    sampling = small(rounds=2)
    adapter = ToyFlow().eval()
    found: list[set[int]] = []
    for iteration in range(12):
        (drawn,) = rollout(adapter, STARTS[:2], sampling, iteration=iteration)
        starts = [
            [s.start for _, s in sampled([t]) if not isinstance(s, TextSegment)] for t in drawn
        ]
        assert starts[0] == starts[1]
        expected = draw_window(6, size=2, low=0, high=4, step=iteration).start
        assert starts[0][0] == expected
        found.append(set(starts[0]))
    assert any(len(pair) == 2 for pair in found)


def test_segments_belong_to_the_round_that_their_image_ends() -> None:
    (drawn,) = rollout(ToyFlow().eval(), STARTS[:1], small(plan=("text", "image") * 2 + ("text",)))
    numbers = [number for number, _ in sampled_by_round(drawn[0])]
    assert numbers == [0, 0, 1, 1, 2]  # what follows the last image would be of the next round
    (drawn,) = rollout(ToyFlow().eval(), STARTS[:1], small(plan=("text",)))
    assert [number for number, _ in sampled_by_round(drawn[0])] == [0]


def ink(images: list[Tensor], completions: list[str], **_: Any) -> list[float]:
    """A number that every image has for itself, and words too."""
    return [
        float(i.mean()) + 0.1 * len(c.split()) for i, c in zip(images, completions, strict=True)
    ]


def bright(images: list[Tensor], **_: Any) -> list[float]:
    return [float(image.amax()) for image in images]


def experience_of(tmp_path: Path, rewards: list[Any], **settings: Any) -> Record:
    module = UniGRPOModule(
        ToyFlow(),
        rewards=rewards,
        sampling=small(rounds=2),
        objective=objective(truncation_reward=None, **settings),
        optim=optim(),
    )
    record = fit(tmp_path, module, 1)
    assert isinstance(record, Record)
    return record


def advantages_of(trajectories: list[Trajectory]) -> Tensor:
    """Return ``[n, 2]``, after all segments of a round were seen to have the same."""
    found = []
    for trajectory in trajectories:
        by_round: dict[int, set[float]] = {}
        for number, segment in sampled_by_round(trajectory):
            by_round.setdefault(number, set()).add(segment.advantage)
        assert all(len(values) == 1 for values in by_round.values())
        found.append([by_round[0].pop(), by_round[1].pop()])
    return torch.tensor(found)


@pytest.mark.parametrize("kind", ["last", "each", "improvement"])
@pytest.mark.parametrize("credit", ["trajectory", "round"])
@pytest.mark.parametrize("combined_by", ["sum", "gdpo"])
def test_credit_is_what_comes_in_a_round_and_after_it(
    kind: str, credit: str, combined_by: str, tmp_path: Path
) -> None:
    weights = None if kind == "last" else (0.5, 2.0)
    record = experience_of(
        tmp_path,
        [ink, bright],
        round_rewards=kind,
        round_weights=weights,
        round_credit=credit,
        combine_rewards=combined_by,
    )
    (experience,) = record.experience
    drawn = experience.trajectories
    groups = torch.tensor([t.group for t in drawn])
    parts = [after_each_round(t, 2) for t in drawn]
    assert {len(each) for each in parts} == {1 if kind == "last" else 2}
    scores = torch.tensor(
        [[ink([p.image], [p.completion]) + bright([p.image]) for p in each] for each in parts]
    )  # [n, K, 2]
    last = scores[:, -1]
    if kind == "last":
        returns = [last, last]
    elif kind == "each":
        returns = [0.5 * scores[:, 0] + 2 * last, 2 * last]
    else:
        change = 2 * (last - scores[:, 0])
        returns = [0.5 * scores[:, 0] + change, change]
    if credit == "trajectory":
        returns = [returns[0]] * 2

    def advantage(reward: Tensor) -> Tensor:
        if combined_by == "gdpo":
            return gdpo_advantages(reward, groups, torch.ones(2)).values
        return group_advantages(reward.sum(1), groups).values

    expected = torch.stack([advantage(each) for each in returns], 1)
    torch.testing.assert_close(advantages_of(drawn), expected, atol=2e-3, rtol=1e-3)
    rewards = torch.tensor([t.reward for t in drawn])
    torch.testing.assert_close(rewards, last.sum(1))
    logged = record.metrics[0]
    assert logged["reward"] == pytest.approx(float(rewards.mean()), rel=1e-5)
    rounds = {name for name in logged if name.startswith("reward/round_")}
    assert rounds == (set() if kind == "last" else {"reward/round_1", "reward/round_2"})
    if rounds:
        assert logged["reward/round_1"] == pytest.approx(
            float(scores[:, 0].sum(1).mean()), rel=1e-5
        )


def first_only(images: list[Tensor], completions: list[str], **_: Any) -> list[float]:
    """Worth something for an image behind one text, nothing for one behind two."""
    return [
        0.0 if "\n" in words else float(i.mean())
        for i, words in zip(images, completions, strict=True)
    ]


def test_a_truncated_round_costs_that_round_and_those_after_it(tmp_path: Path) -> None:
    module = UniGRPOModule(
        ToyFlow(),
        rewards=[ink],
        sampling=small(rounds=2, max_text_tokens=2),
        objective=objective(round_rewards="each", truncation_reward=-7.0),
        optim=optim(),
    )
    (experience,) = fit(tmp_path, module, 1).experience
    seen = set()
    for trajectory, raw in zip(experience.trajectories, experience.round_rewards, strict=True):
        parts = after_each_round(trajectory, len(trajectory.rounds))
        seen.add(tuple(part.stopped for part in parts))
        assert trajectory.reward == (pytest.approx(float(raw[1, 0])) if parts[1].stopped else -7)
    assert (True, False) in seen or (False, False) in seen
    assert (False, True) not in seen


def test_a_reward_of_the_first_round_is_lost_in_the_second(tmp_path: Path) -> None:
    """Improvement with credit by round: the second round is blamed for what it took away."""
    record = experience_of(
        tmp_path, [first_only], round_rewards="improvement", round_credit="round"
    )
    (experience,) = record.experience
    first = torch.tensor([float(each[0, 0]) for each in experience.round_rewards])
    found = advantages_of(experience.trajectories)
    assert found[:, 0].abs().max() == 0  # R_1 + (0 - R_1): nothing to compare
    for group in {t.group for t in experience.trajectories}:
        members = [i for i, t in enumerate(experience.trajectories) if t.group == group]
        best = max(members, key=lambda i: float(first[i]))
        assert found[best, 1] == found[members, 1].min() < 0


def test_evaluation_scores_every_round(tmp_path: Path) -> None:
    module = UniGRPOModule(
        ToyFlow(),
        rewards=[ink],
        sampling=small(rounds=2),
        objective=objective(truncation_reward=None),
        optim=optim(),
        evaluation=Evaluation(every_round=True),
    )
    judge = trainer(tmp_path, 1, limit_val_batches=1.0)
    judge.validate(module, verbose=False)
    logged = judge.callback_metrics
    assert float(logged["val/reward/round_2"]) == pytest.approx(float(logged["val/reward"]))
    assert float(logged["val/reward/round_1"]) != float(logged["val/reward"])
    assert "val/reward/round_1/failures" not in logged


def test_weights_must_be_as_many_as_images() -> None:
    with pytest.raises(
        ValueError, match=r"round_weights is \(1, 2, 3\), and sampling.plan draws 2"
    ):
        UniGRPOModule(
            ToyFlow(),
            sampling=small(rounds=2),
            objective=Objective(round_rewards="each", round_weights=(1, 2, 3)),
        )
    with pytest.raises(ValueError, match="leave the weights out"):
        Objective(round_weights=(1, 2))
