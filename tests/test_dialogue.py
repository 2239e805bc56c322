"""Plans with turns of the user and with an end that is chosen: who says what, and what the gradient is of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from lightning_unigrpo import Adapter, IterationCheckpoint, Objective, Sampling, UniGRPOModule
from lightning_unigrpo.advantage import group_advantages
from lightning_unigrpo.config import Evaluation
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.dialogue import Column, Turns
from lightning_unigrpo.loss import Counts, count, trajectory_loss
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import (
    ImageSegment,
    Prompt,
    Scores,
    TextSegment,
    Trajectory,
    after_each_round,
    sampled_by_round,
)
from tests.test_module import fit, objective, optim, small, trainer
from tests.toys import ToyFlow, ToyMasked, ToyTokens

STARTS = [Start(Prompt(text=f"{'abcd'[i // 2]}", id=i // 2), i // 2, i % 2) for i in range(8)]
DIALOGUE = ("text", "image", "turn", "text", "image", "turn", "text", "image")


class Mute(ToyFlow):
    """Was written before there were turns."""

    turn = Adapter.turn


def draw(
    sampling: Sampling, source: Any = None, adapter: Any = None, **more: Any
) -> list[Trajectory]:
    speaker = None if source is None else Turns(source)
    (found,) = rollout((adapter or ToyFlow()).eval(), STARTS, sampling, speaker=speaker, **more)
    return found


def kinds(trajectory: Trajectory) -> list[str]:
    """Name the segments behind the prompt."""
    return [
        "image" if not isinstance(s, TextSegment) else "text" if s.is_sampled else "turn"
        for s in trajectory.segments[trajectory.num_given :]
    ]


# ---- plans


@pytest.mark.parametrize(
    ("plan", "rounds", "expected"),
    [
        ("ti", None, "ti"),
        ("ti", 3, "tititi"),
        ("tiuti", 1, "ti"),
        ("tiuti", 2, "tiuti"),
        ("tiuti", 4, "tiutiutiuti"),
        ("tiui", 3, "tiuiui"),
        ("iti", 3, "ititi"),
        ("tit", None, "tit"),
    ],
)
def test_a_plan_is_cut_or_its_last_round_repeated(
    plan: str, rounds: int | None, expected: str
) -> None:
    names = {"t": "text", "i": "image", "u": "turn"}
    sampling = Sampling(plan=[names[c] for c in plan], rounds=rounds)
    assert list(sampling.kinds) == [names[c] for c in expected]
    assert [step.kind for step in sampling.steps] == list(sampling.kinds)
    ends = [step.round for step in sampling.steps if step.kind == "image"]
    assert ends == list(range(sampling.num_images))
    seen = [step.is_seen for step in sampling.steps if step.kind == "image"]
    last = sampling.kinds[-1] == "image"
    assert seen == [True] * (len(seen) - last) + [False] * last
    assert not any(step.is_seen for step in Sampling(plan=sampling.kinds, look=False).steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": ("turn", "image")}, "the prompt is the first turn"),
        ({"plan": ("image", "turn")}, "behind the last one something must be drawn"),
        ({"plan": ("turn",)}, "one or more of 'text' and 'image'"),
        ({"plan": ("text", "picture")}, "one or more of 'text' and 'image'"),
        ({"rounds": 0}, "give 1 or more"),
        ({"rounds": 2, "plan": ("text", "image", "text")}, "ends with an image"),
        ({"stop_phrase": " "}, "every text says"),
        ({"max_text_tokens": ()}, "one for each round"),
        ({"max_text_tokens": (5, 0)}, "one for each round"),
        ({"max_turn_tokens": 0}, "max_turn_tokens is 0"),
    ],
)
def test_plans_that_cannot_be_drawn_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_each_round_has_a_limit_of_its_own() -> None:
    for trajectory in draw(small(rounds=3, max_text_tokens=(4, 2))):
        limits = [4, 2, 2]
        for text, limit in zip(trajectory.texts, limits, strict=True):
            assert len(text.tokens) <= limit
            assert text.stopped == (int(text.tokens[-1]) == 0)
    longest = [
        max(len(t.texts[k].tokens) for t in draw(small(3, max_text_tokens=(4, 2))))
        for k in range(3)
    ]
    assert longest == [4, 2, 2]


def test_images_that_are_not_looked_at_change_nothing_later() -> None:
    seen, blind = draw(small(2)), draw(small(2, look=False))
    # The second text follows the first one's image or not: the same words until then.
    assert all(
        torch.equal(a.texts[0].tokens, b.texts[0].tokens) for a, b in zip(seen, blind, strict=True)
    )
    assert any(not torch.equal(a.image, b.image) for a, b in zip(seen, blind, strict=True))
    assert not any(s.is_context for t in blind for s in t.segments if isinstance(s, ImageSegment))
    without = [t.segments[:-2] for t in blind]
    adapter = ToyFlow().eval()
    texts = [[s for s in row if isinstance(s, TextSegment)] for row in without]
    active = torch.ones(len(blind), dtype=torch.bool)
    found = [adapter.next_logits(adapter.prefill(rows), None, active) for rows in (without, texts)]
    assert torch.equal(*found)


# ---- turns


def test_turns_are_given_words_in_their_place() -> None:
    heard: list[tuple[int, list[str], Tensor]] = []

    def ask(*, images: Tensor, completions: list[str], turn: int) -> list[str | None]:
        heard.append((turn, completions, images))
        return ["a" if turn == 0 else "b c"] * len(completions)

    phases: list[str] = []
    found = draw(
        small(plan=DIALOGUE), ask, every_image=True, progress=lambda phase, *_: phases.append(phase)
    )
    assert phases.count("turn") == 2
    assert [number for number, _, _ in heard] == [0, 1]
    for place, trajectory in enumerate(found):
        assert kinds(trajectory) == list(DIALOGUE)
        turns = [
            s
            for s in trajectory.segments[trajectory.num_given :]
            if isinstance(s, TextSegment) and not s.is_sampled
        ]
        assert [turn.words for turn in turns] == ["a", "b c"]
        assert [turn.tokens.tolist() for turn in turns] == [[1], [2, 3]]
        for number, words, images in heard:
            assert words[place] == "\n".join(t.words for t in trajectory.texts[: number + 1])
            torch.testing.assert_close(
                images[place], trajectory.rounds[number].image, atol=1e-6, rtol=0
            )
    other = draw(small(plan=DIALOGUE), ["a", "b d"])
    for one, two in zip(found, other, strict=True):
        assert torch.equal(one.texts[1].tokens, two.texts[1].tokens)
        assert not torch.equal(one.image, two.image)


def test_rows_that_have_ended_leave_the_others_as_they_are() -> None:
    """Who is drawn beside whom changes nothing: draws belong to a prompt, a member and a place."""
    whole = draw(small(3))
    ended = draw(small(3, stop_phrase="b"))
    lengths = set()
    for full, short in zip(whole, ended, strict=True):
        n = len(short.segments)
        lengths.add(n)
        for a, b in zip(full.segments, short.segments, strict=False):
            if isinstance(b, TextSegment):
                assert torch.equal(a.tokens, b.tokens)
            else:
                torch.testing.assert_close(a.latent, b.latent, atol=1e-5, rtol=1e-5)
        later = [text.words for text in full.texts[1:]]
        said = [n for n, words in enumerate(later) if "b" in words]
        assert len(short.texts) == 1 + (said[0] + 1 if said else len(later))
        assert (kinds(short)[-1] == "text") == bool(said)
        assert short.image is not None
    assert len(lengths) > 1


def test_a_user_may_end_it() -> None:
    prompts = [Prompt(text="a", id=i, columns={"turns": ["b"] * i}) for i in range(3)]
    starts = [Start(prompt, prompt.id, m) for prompt in prompts for m in range(2)]
    (found,) = rollout(ToyFlow().eval(), starts, small(plan=DIALOGUE), speaker=Turns(Column()))
    assert [kinds(t).count("image") for t in found] == [1, 1, 2, 2, 3, 3]
    assert [kinds(t).count("turn") for t in found] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("toy", [ToyTokens, ToyMasked])
def test_discrete_images_end_alike(toy: Any) -> None:
    found = draw(small(3, stop_phrase="b"), adapter=toy(), every_image=True)
    assert len({len(t.rounds) for t in found}) > 1
    assert all(len(t.rounds) == kinds(t).count("image") for t in found)
    assert all(torch.equal(t.rounds[-1].image, t.image) for t in found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda *, prompts: ["a"], "must return a list with a text, or None, for each"),
        (lambda *, prompts: "a" * len(prompts), "must return a list"),
        (lambda *, prompts: [1] * len(prompts), "must return a list"),
        (lambda *, colour: [], r"model\.turns asks for \['colour'\]"),
        (["a b c d e"], r"takes 5 tokens, more than sampling\.max_turn_tokens 4"),
    ],
)
def test_what_cannot_be_said_is_an_error(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(small(plan=DIALOGUE, max_turn_tokens=4), source)


def test_mistakes_are_found_before_anything_is_drawn(tmp_path: Path) -> None:
    dialogue = small(plan=DIALOGUE, max_turn_tokens=2)
    with pytest.raises(ValueError, match=r"nobody says its turns: give model\.turns"):
        UniGRPOModule(ToyFlow(), sampling=dialogue)
    with pytest.raises(ValueError, match=r"Mute has no turn\(text, behind\)"):
        UniGRPOModule(Mute(), sampling=dialogue, turns=["a"])
    with pytest.raises(ValueError, match=r"model\.turns is \[\]"):
        UniGRPOModule(ToyFlow(), sampling=dialogue, turns=[])
    with pytest.raises(ValueError, match="give a list of texts"):
        UniGRPOModule(ToyFlow(), sampling=dialogue, turns="a")
    module = UniGRPOModule(ToyFlow(), sampling=dialogue, turns=["a b c"])
    with pytest.raises(ValueError, match="takes 3 tokens"):
        fit(tmp_path, module, 1)
    prompts = [Prompt(text="a", id=i, columns={"turns": each}) for i, each in enumerate([["b"], 3])]
    module = UniGRPOModule(ToyFlow(), sampling=dialogue, turns=Column())
    with pytest.raises(ValueError, match="column 'turns' of prompt 'a' holds 3"):
        trainer(tmp_path, 1).fit(module, PromptDataModule.from_prompts(prompts))
    assert module.iteration == 0


class Judge:
    """Speaks, once it was told that a collection begins."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare(self, device: torch.device) -> None:
        self.calls.append("prepare")

    def release(self) -> None:
        self.calls.append("release")

    def __call__(self, *, prompts: list[str]) -> list[str]:
        self.calls.append("speak")
        return ["a"] * len(prompts)


@pytest.mark.parametrize("plan", [DIALOGUE, ("text", "image")])
def test_who_has_no_turn_is_not_woken(plan: tuple[Any, ...], tmp_path: Path) -> None:
    judge = Judge()
    fit(tmp_path, UniGRPOModule(ToyFlow(), sampling=small(plan=plan), turns=judge), 1)
    assert judge.calls == (["prepare", "speak", "speak", "release"] if "turn" in plan else [])


# ---- what the gradient is of


def one_word(logits: Tensor, token: int) -> tuple[TextSegment, Tensor]:
    log_prob = logits.log_softmax(-1)[token].reshape(1)
    return TextSegment(tokens=torch.tensor([token]), log_prob=log_prob.detach()), log_prob


@pytest.mark.parametrize("aggregation", ["sequence_mean", "constant"])
def test_early_ends_leave_the_gradient_that_of_the_expected_reward(aggregation: str) -> None:
    """All pairs of trajectories of a policy that may stop, weighted by their probabilities.

    The mean of the gradients of the loss is ``-grad E[R] / (texts of the plan)``, whatever the others chose.
    """
    first = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.9, -0.2], [0.1, 0.5]], dtype=torch.float64, requires_grad=True)
    third = torch.tensor([-0.6, 0.2], dtype=torch.float64, requires_grad=True)
    policy = (first, second, third)
    stop = 0
    sampling = Sampling(plan=("text", "image") * 3, stop_phrase="stop")

    def paths() -> list[tuple[tuple[int, ...], float]]:
        found = []
        for a, b in itertools.product(range(2), repeat=2):
            ends = [()] if b == stop else [(c,) for c in range(2)]
            found += [((a, b, *end), 0.7 + a - 0.4 * b + sum(end, 0.0) * (1.3 - a)) for end in ends]
        return found

    def drawn(path: tuple[int, ...]) -> tuple[list[TextSegment], list[Tensor]]:
        rows = [first, second[path[0]], third][: len(path)]
        parts = [one_word(row, token) for row, token in zip(rows, path, strict=True)]
        return [text for text, _ in parts], [log_prob for _, log_prob in parts]

    def probability(path: tuple[int, ...]) -> Tensor:
        return torch.cat(drawn(path)[1]).sum().exp()

    expected = sum(probability(path) * reward for path, reward in paths())
    exact = torch.autograd.grad(expected, policy)
    baseline = 0.37
    total = [torch.zeros_like(each) for each in policy]
    for pair in itertools.product(paths(), repeat=2):
        trajectories, scores, weight = [], Scores(), 1.0
        for path, reward in pair:
            texts, log_probs = drawn(path)
            for text in texts:
                text.advantage = reward - baseline
            trajectories.append(
                Trajectory(prompt=Prompt(text=""), segments=[*texts], group=0, member=0)
            )
            scores.text += log_probs
            scores.entropy += [torch.zeros(1)] * len(texts)
            weight *= float(probability(path).detach())
        loss, _ = trajectory_loss(
            scores,
            trajectories,
            objective=Objective(text_aggregation=aggregation, text_constant_length=1),
            sampling=sampling,
            counts=count(trajectories, sampling),
        )
        gradients = torch.autograd.grad(loss, policy, allow_unused=True, materialize_grads=True)
        for place, gradient in enumerate(gradients):
            total[place] += weight * gradient
    for found, truth in zip(total, exact, strict=True):
        torch.testing.assert_close(found, -truth / 3)


def test_means_in_the_logs_are_of_what_was_drawn() -> None:
    images = draw(small(3, stop_phrase="b"))
    found, sampling = count(images, small(3)), small(3)
    assert found.images == 3 * len(images) == found.sequences
    assert found.drawn == sum(kinds(t).count("image") for t in images) < found.images
    scores = ToyFlow()(images)
    for trajectory in images:
        for segment in trajectory.segments:
            if isinstance(segment, ImageSegment) and segment.is_sampled:
                segment.ref_velocity = segment.velocity + 0.5
    _, metrics = trajectory_loss(
        scores, images, objective=objective(), sampling=sampling, counts=found
    )
    errors = [
        (v - s.ref_velocity).square().mean()
        for v, s in zip(
            scores.velocity,
            [s for t in images for s in t.segments if isinstance(s, ImageSegment)],
            strict=True,
        )
    ]
    torch.testing.assert_close(metrics.sums["flow/velocity_mse"], torch.stack(errors).mean())
    assert isinstance(found, Counts)


# ---- credit where rounds are unequal


def ink(images: Sequence[Tensor], **_: Any) -> list[float]:
    return [float(image.mean()) for image in images]


def spoken(completions: list[str], **_: Any) -> list[float]:
    return [0.01 * len(words) for words in completions]


@pytest.mark.parametrize("kind", ["last", "each", "improvement"])
@pytest.mark.parametrize("credit", ["trajectory", "round"])
def test_a_drawing_that_is_kept_counts_on(kind: str, credit: str, tmp_path: Path) -> None:
    weights = None if kind == "last" else (0.5, 2.0, 1.0)
    module = UniGRPOModule(
        ToyFlow(),
        rewards=[ink, spoken],
        sampling=small(3, stop_phrase="b", group_size=8),
        objective=objective(
            truncation_reward=None,
            round_rewards=kind,
            round_weights=weights,
            round_credit=credit,
            round_loss_weights=(1.0, 0.25),
        ),
        optim=optim(),
    )
    record = fit(tmp_path, module, 1)
    (experience,) = record.experience
    drawn = experience.trajectories
    numbers = [len(t.rounds) for t in drawn] if kind != "last" else []
    assert kind == "last" or len(set(numbers)) == 3
    scores, alive = [], []
    for t in drawn:
        parts = after_each_round(t, 3)
        assert parts[-1].segments == t.segments
        values = [ink([p.image])[0] + spoken([p.completion])[0] for p in parts]
        scores.append(values + values[-1:] * (3 - len(values)) if kind != "last" else values * 3)
        alive.append(max(number for number, _ in sampled_by_round(t)))
    table = torch.tensor(scores)  # [n, K]
    if kind == "last":
        returns = table[:, -1:].expand(-1, 3)
    else:
        each = table if kind == "each" else torch.cat([table[:, :1], table.diff(dim=1)], 1)
        returns = (each * torch.tensor(weights)).flip(1).cumsum(1).flip(1)
    if credit == "trajectory":
        returns = returns[:, :1].expand(-1, 3)
    groups = torch.tensor([t.group for t in drawn])
    for k in range(3):
        worth = returns[:, k].clone()
        if credit == "round" and kind != "last":
            worth[torch.tensor(alive) < k] = math.nan
        expected = group_advantages(worth, groups).values * (1.0 if k == 0 else 0.25)
        for i, t in enumerate(drawn):
            for number, segment in sampled_by_round(t):
                if number == k:
                    assert segment.advantage == pytest.approx(float(expected[i]), abs=2e-3)
    rewards = torch.tensor([t.reward for t in drawn])
    torch.testing.assert_close(rewards, table[:, -1])


def test_words_at_the_end_that_are_cut_off_cost_what_follows(tmp_path: Path) -> None:
    module = UniGRPOModule(
        ToyFlow(),
        rewards=[ink],
        sampling=small(2, stop_phrase="g", max_text_tokens=(5, 1), group_size=16),
        objective=objective(round_rewards="each", truncation_reward=-7.0),
        optim=optim(),
    )
    (experience,) = fit(tmp_path, module, 1).experience
    early = [t for t in experience.trajectories if len(t.rounds) == 1]
    assert early
    for t in early:  # its last word was "g", and no stop token
        assert not t.texts[-1].stopped
        assert t.reward == -7
        assert len(after_each_round(t, 2)) == 2


# ---- whole runs


def chatting(**changes: Any) -> UniGRPOModule:
    seed_everything(3)
    sampling = replace(small(plan=DIALOGUE[:5], stop_phrase="b", max_text_tokens=(5, 3)), rounds=3)
    return UniGRPOModule(
        ToyFlow(),
        sampling=sampling,
        turns=["a", "c d"],
        objective=objective(round_rewards="each", round_credit="round"),
        optim=optim(warmup_steps=3),
        **changes,
    )


def test_unequal_dialogues_are_on_policy_and_resume_to_the_bit(tmp_path: Path) -> None:
    whole = chatting()
    record = fit(tmp_path / "a", whole, 4)
    for metrics, experience in zip(record.metrics, record.experience, strict=True):
        assert metrics["guard/velocity"] <= 1e-4
        assert metrics["guard/log_prob"] <= 5e-5
        assert metrics["guard/residual"] <= 1e-4
        assert len({len(t.segments) for t in experience.trajectories}) > 1
    first = fit(tmp_path / "b", chatting(), 2, IterationCheckpoint(every=2))
    resumed = chatting()
    seed_everything(99)  # a resumed process has other global generators
    path = str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    rest = fit(tmp_path / "b", resumed, 4, ckpt_path=path)
    assert record.metrics == first.metrics + rest.metrics
    for a, b in zip(whole.adapter.net.parameters(), resumed.adapter.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_and_chunks_do_not_change_it(tmp_path: Path) -> None:
    found = []
    for rows, size in ((None, None), (3, 2)):
        module = chatting()
        module.budget.sampling = replace(module.sampling, rows_per_chunk=rows)
        module.budget.optim = replace(module.optim, micro_batch_size=size)
        fit(tmp_path / str(size), module, 2)
        found.append(torch.cat([p.detach().flatten() for p in module.adapter.net.parameters()]))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_evaluation_carries_on_what_was_kept(tmp_path: Path) -> None:
    module = chatting(rewards=[ink], evaluation=Evaluation(every_round=True, num_images=4))
    judge = trainer(tmp_path, 1, limit_val_batches=1.0)
    judge.validate(module, verbose=False)
    logged = {k: float(v) for k, v in judge.callback_metrics.items()}
    assert {f"val/reward/round_{k}" for k in (1, 2, 3)} <= logged.keys()
    assert logged["val/reward/round_3"] == pytest.approx(logged["val/reward"])
