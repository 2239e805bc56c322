"""The reward protocol: what is passed, what may come back, what failure costs."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import nn

from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.reward import (
    PATIENCE,
    MissingColumnError,
    Reward,
    RewardLengthError,
    RewardRunner,
    combine,
    gather_columns,
    require_scores,
    wrap,
)
from lightning_unigrpo.rewards import SoftLength, ThinkFormat
from lightning_unigrpo.types import Prompt, TextSegment, Trajectory
from tests.test_module import fit, small
from tests.toys import ToyFlow


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
    assert seen["all"] == ["answer", "completions", "images", "metadata", "num_tokens", "prompts"]
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

    with pytest.raises(RuntimeError, match=r"'broken' failed and is required.*gone") as caught:
        run(Reward(broken, required=True))
    assert isinstance(caught.value.__cause__, KeyError)


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

    with RewardRunner([Reward(slow, remote=True)]) as runner:
        for row in trajectories():
            runner.submit([row])  # would block here if it were not remote
        gate.set()
        assert runner.finish()[0].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(("concurrency", "lost"), [(3, [0]), (1, [0, 1, 2])])
def test_a_remote_reward_that_hangs_is_given_up(concurrency: int, lost: list[int]) -> None:
    begun, gate = threading.Event(), threading.Event()

    def hangs(answer: list[int]) -> list[int]:
        if 0 in answer:
            begun.set()
            gate.wait(5)
        return answer

    reward = Reward(hangs, remote=True, timeout=0.05, concurrency=concurrency)
    with RewardRunner([reward]) as runner:
        for row in trajectories():
            runner.submit([row])
            assert begun.wait(5)
        with pytest.warns(UserWarning, match="timeout"):
            matrix, details = runner.finish(check=False)
        gate.set()
    assert [i for i, value in enumerate(matrix[:, 0].tolist()) if value != value] == lost
    assert details["reward/hangs/failures"] == len(lost)


def test_no_more_calls_run_at_once_than_allowed_and_their_order_is_kept() -> None:
    lock, both = threading.Lock(), threading.Barrier(2)
    running, most = 0, 0

    def service(answer: list[int]) -> list[int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(5)  # passes only when two calls are inside
        with lock:
            running -= 1
        return answer

    matrix, _ = run(Reward(service, batch_size=1, concurrency=2), num=6)
    assert matrix.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert most == 2


def test_what_was_not_begun_is_called_off() -> None:
    begun, gate, called = threading.Event(), threading.Event(), []

    def slow(answer: list[int]) -> list[int]:
        called.append(answer[0])
        begun.set()
        gate.wait(5)
        return answer

    before = set(threading.enumerate())
    with RewardRunner([Reward(slow, remote=True, batch_size=1)]) as runner:
        runner.submit(trajectories(1))
        assert begun.wait(5)
        runner.submit(trajectories(3)[1:])
    started = set(threading.enumerate()) - before
    assert all(thread.daemon for thread in started)  # one that hangs would not keep us from ending
    gate.set()
    for thread in started:
        thread.join(5)
    assert called == [0]


def test_batches_cut_a_chunk() -> None:
    sizes = []

    def some(images: torch.Tensor, answer: list[int]) -> list[int]:
        sizes.append((len(images), len(answer)))
        return answer

    assert run(Reward(some, batch_size=2), num=5)[0].flatten().tolist() == [0, 1, 2, 3, 4]
    assert sizes == [(2, 2), (2, 2), (1, 1)]


def test_images_come_in_the_format_that_is_declared() -> None:
    seen: dict[str, Any] = {}

    class Pil:
        image_format = "pil"

        def __call__(self, images: list[Image.Image]) -> list[float]:
            seen["pil"] = images
            return [0.0] * len(images)

    def raw(images: list[torch.Tensor]) -> list[float]:
        seen["uint8"] = images
        return [0.0] * len(images)

    run(Pil(), Reward(raw, image_format="uint8"))
    assert [image.getpixel((0, 0)) for image in seen["pil"]] == [(0,) * 3, (26,) * 3, (51,) * 3]
    assert seen["pil"][0].size == (4, 4)
    assert [int(image[0, 0, 0]) for image in seen["uint8"]] == [0, 26, 51]
    assert seen["uint8"][0].dtype == torch.uint8
    with pytest.raises(ValueError, match="image_format of 'raw' is 'jpeg'"):
        Reward(raw, image_format="jpeg")  # type: ignore[arg-type]


def test_a_rollout_without_image_keeps_its_place() -> None:
    rows = trajectories(3)
    rows[1].image = None
    columns = gather_columns(rows)
    assert [image is None for image in columns["images"]] == [False, True, False]


def test_sampled_tokens_are_counted_and_input_images_offered() -> None:
    row = trajectories(1)[0]
    given = TextSegment(tokens=torch.arange(9))
    drawn = [TextSegment(tokens=torch.arange(n), log_prob=torch.zeros(n)) for n in (2, 3)]
    row.segments = [given, *drawn]
    row.prompt.images = (torch.zeros(3, 2, 2),)
    columns = gather_columns([row])
    assert columns["num_tokens"] == [5]
    assert columns["input_images"][0][0].shape == (3, 2, 2)


def test_modules_are_asked_by_their_forward_and_run_in_float32_without_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(48, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            value = self.line(images.flatten(1))
            assert value.dtype == torch.float32
            assert not value.requires_grad
            return value

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(Net())[0].shape == (3, 1)


def test_a_required_parameter_beside_kwargs_must_be_there_too() -> None:
    def needs(caption: Any, **columns: Any) -> list[float]:
        return [0.0] * 3

    with RewardRunner([needs]) as runner, pytest.raises(MissingColumnError, match="caption"):
        runner.submit(trajectories())  # at the first chunk, not when all are drawn


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("abc", "no number"),
        ({"sharpness": [1.0] * 3}, "no 'score'"),
        ({"score": [1.0] * 3, "why": ["a", "b", "c"]}, "why.*no number"),
        (0.5, "returned 1 values for 3"),
    ],
)
def test_what_cannot_be_read_is_a_mistake_that_stops(result: Any, message: str) -> None:
    def odd(answer: list[int]) -> Any:
        return result

    with pytest.raises(ValueError, match=message):
        run(odd)


def test_arrays_and_columns_of_numbers_are_read() -> None:
    def array(answer: list[int]) -> Any:
        return {"score": np.arange(3.0), "margin": torch.ones(3, 1), "lines": [None, 2, 4]}

    matrix, details = run(array)
    assert matrix.flatten().tolist() == [0, 1, 2]
    assert details["reward/array/margin"] == 1
    assert details["reward/array/lines"] == 3


def test_only_the_first_failure_is_reported_at_full_length() -> None:
    def broken(answer: list[int]) -> list[int]:
        raise KeyError("gone")

    reward = Reward(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with RewardRunner([reward]) as runner:
                runner.submit(trajectories())
                runner.finish(check=False)
    assert ["Traceback" in str(w.message) for w in caught] == [True, False]
    assert all("gone" in str(w.message) for w in caught)


def test_a_collection_without_scores_is_refused_only_where_they_count() -> None:
    nan = float("nan")
    table = torch.tensor([[nan, 1.0], [nan, nan]])
    require_scores(table, ["logged", "counts"], torch.tensor([0.0, 1.0]))
    with pytest.raises(RuntimeError, match="'logged' scored none of 2"):
        require_scores(table, ["logged", "counts"], torch.tensor([1.0, 1.0]))


def test_a_reward_that_has_scored_is_forgiven_a_few_silent_collections() -> None:
    nothing, something = torch.full((2, 1), torch.nan), torch.tensor([[torch.nan], [1.0]])
    weights, silent = torch.ones(1), dict[str, int]()
    with pytest.raises(RuntimeError, match=r"for all\): there"):
        require_scores(nothing, ["r"], weights, silent)  # it has never scored
    for _ in range(2):  # a score makes good for all silence before
        require_scores(something, ["r"], weights, silent)
        for _ in range(PATIENCE):
            require_scores(nothing, ["r"], weights, silent)
    with pytest.raises(RuntimeError, match=f"{PATIENCE + 1} collections in a row"):
        require_scores(nothing, ["r"], weights, silent)


class Model:
    """Holds something; writes down what happens to it."""

    def __init__(self, name: str, diary: list[str], fails: str = "") -> None:
        self.__name__, self.diary, self.fails = name, diary, fails

    def prepare(self, device: torch.device) -> None:
        self.note(f"prepare {device}")

    def release(self) -> None:
        self.note("release")

    def note(self, what: str) -> None:
        self.diary.append(f"{self.__name__}: {what}")
        if self.fails and self.fails in what:
            raise OSError("no weights")

    def __call__(self, answer: list[int]) -> list[int]:
        self.note("score")
        return answer


def test_rewards_are_prepared_before_a_collection_and_released_after_it() -> None:
    diary: list[str] = []
    with RewardRunner([Model("a", diary), Model("b", diary)], torch.device("meta")) as runner:
        diary.append("draw")
        runner.submit(trajectories())
        runner.finish()
    assert diary == [
        *("a: prepare meta", "b: prepare meta", "draw"),
        *("a: score", "b: score", "a: release", "b: release"),
    ]


def test_a_reward_that_cannot_be_prepared_stops_before_anything_is_drawn() -> None:
    diary: list[str] = []
    rewards = [Model("a", diary), Model("b", diary, fails="prepare"), Model("c", diary)]
    runner = RewardRunner(rewards)
    with pytest.raises(RuntimeError, match=r"'b' cannot be prepared \(model.rewards\): no weights"):
        runner.__enter__()
    assert diary[:2] == ["a: prepare cpu", "b: prepare cpu"]
    assert diary[2:] == ["a: release", "b: release", "c: release"]


def test_ranks_agree_that_rewards_are_prepared_before_they_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stopped alone would leave the others waiting in the rollout."""
    diary: list[str] = []

    def agree(error: Exception | None) -> None:
        diary.append(f"agree on {type(error).__name__}")
        if error is not None:
            raise error

    monkeypatch.setattr("lightning_unigrpo.distributed.agree", agree)
    monkeypatch.setattr(ToyFlow, "tokenize", lambda *_: pytest.fail("drawn"))
    module = UniGRPOModule(
        ToyFlow(), rewards=[Model("a", diary, fails="prepare")], sampling=small()
    )
    with pytest.raises(RuntimeError, match="'a' cannot be prepared"):
        fit(tmp_path, module, 1)
    assert diary == ["a: prepare cpu", "a: release", "agree on RuntimeError"]


def test_a_reward_that_cannot_be_released_costs_no_scores() -> None:
    diary: list[str] = []
    with pytest.warns(UserWarning, match="'a' was not released: .*no weights"):
        matrix, _ = run(Model("a", diary, fails="release"), Model("b", diary))
    assert matrix.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert diary[-1] == "b: release"


def test_rewards_are_released_when_drawing_fails() -> None:
    diary: list[str] = []
    with pytest.raises(KeyError), RewardRunner([Model("a", diary)]):
        raise KeyError
    assert diary == ["a: prepare cpu", "a: release"]


def test_a_callable_may_say_how_it_is_called() -> None:
    class Service:
        batch_size = 2
        concurrency = 3

        def __call__(self, answer: list[int]) -> list[int]:
            return answer

    said, told = Reward(Service()), Reward(Service(), batch_size=5, concurrency=1)
    assert (said.batch_size, said.concurrency, said.remote) == (2, 3, True)
    assert (told.batch_size, told.concurrency, told.remote) == (5, 1, False)
    assert Reward(lambda answer: answer).concurrency == 1
    with pytest.raises(ValueError, match=r"Reward.batch_size of 'Service' is 0"):
        Reward(Service(), batch_size=0)


def test_many_calls_share_few_threads() -> None:
    gate, before = threading.Event(), threading.active_count()

    def slow(answer: list[int]) -> list[int]:
        assert gate.wait(5)
        return answer

    with RewardRunner([Reward(slow, batch_size=1, concurrency=3)]) as runner:
        runner.submit(trajectories(200))
        assert threading.active_count() - before == 3
        gate.set()
        assert runner.finish()[0].flatten().tolist() == list(range(200))


def test_records_of_the_data_set_are_offered_whole() -> None:
    rows = trajectories(2)
    assert gather_columns(rows)["metadata"] == [
        {"prompt": "p0", "answer": 0},
        {"prompt": "p1", "answer": 1},
    ]
    rows[0].prompt = Prompt(text="p", id=0, columns={"metadata": "its own"})
    assert gather_columns(rows[:1])["metadata"] == ["its own"]


def test_waiting_rewards_run_aside() -> None:
    async def later(answer: list[int]) -> list[int]:
        return answer

    class Later:
        async def __call__(self, answer: list[int]) -> list[int]:
            return answer

    class Service:
        is_remote = True

        def __call__(self, answer: list[int]) -> list[int]:
            return answer

    rewards = wrap([later, Later(), Service(), Reward(lambda answer: answer, concurrency=2)])
    assert all(reward.remote for reward in rewards)
    assert not Reward(ThinkFormat()).remote


def test_rewards_are_named_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(wrap)
    read = parser.parse_object(
        {
            "rewards": [
                {"class_path": "lightning_unigrpo.rewards.ThinkFormat"},
                {
                    "class_path": "lightning_unigrpo.reward.Reward",
                    "init_args": {
                        "fn": {
                            "class_path": "lightning_unigrpo.rewards.SoftLength",
                            "init_args": {"max_tokens": 8, "buffer": 4},
                        },
                        "weight": 0.5,
                        "image_format": "pil",
                    },
                },
            ]
        }
    )
    shape, length = wrap(parser.instantiate(read).rewards)
    assert (shape.name, shape.weight) == ("ThinkFormat", 1.0)
    assert (length.name, length.weight, length.image_format) == ("SoftLength", 0.5, "pil")
    assert length(num_tokens=[6]) == [0.5]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>two\ncubes</think> Two cubes.", 1.0),
        ("  <think>two</think>", 1.0),
        ("two cubes", 0.0),
        ("So: <think>two</think>", 0.0),
        ("<think></think>", 0.0),
        ("<think>two", 0.0),
        ("<think>a</think> <think>b</think>", 0.0),
        ("<think>" + "<" * 20000, 0.0),  # in linear time
    ],
)
def test_think_format(text: str, score: float) -> None:
    assert ThinkFormat()(completions=[text]) == [score]


def test_builtin_rewards_refuse_what_they_cannot_use() -> None:
    assert ThinkFormat(r"\d+")(completions=["12", "12a"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="no regular expression"):
        ThinkFormat("(")
    with pytest.raises(ValueError, match="1 <= buffer <= max_tokens"):
        SoftLength(max_tokens=4, buffer=5)


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
