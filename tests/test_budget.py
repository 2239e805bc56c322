"""Budgets in bytes: what is allocated stays within them, one row more would not, and no number changes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from lightning_unigrpo import Objective, Optim, PromptDataModule, Sampling, UniGRPOModule
from lightning_unigrpo import budget as budget_file
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.budget import GIB, largest_footprint, rows_within
from lightning_unigrpo.callbacks import RolloutGrouping
from lightning_unigrpo.config import compute_dtype
from lightning_unigrpo.estimate import Setup, estimate, report
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import Prompt, Scores, Trajectory
from tests.published import PIXELS, write_checkpoint
from tests.test_estimate import WORDS, Counted, kept_for_backward, longest, sampling
from tests.test_module import Record, _NoSchedule, fit, flat, small
from tests.test_rollout import same
from tests.toys import ToyFlow

pytestmark = pytest.mark.slow
LONG, SHORT = (Prompt(text=" ".join(["9"] * num), id=num) for num in (WORDS, 2))
TEXT_TO_IMAGE = sampling("text", "image")


# ---- the arithmetic


@given(
    nbytes=st.integers(1, 2**40),
    gib=st.floats(1e-9, 1e3),
    at_most=st.none() | st.integers(1, 100),
)
def test_as_many_rows_as_fit(nbytes: int, gib: float, at_most: int | None) -> None:
    rows = rows_within(gib, nbytes, at_most)
    assert rows is not None
    assert rows >= 1
    assert rows == 1 or rows * nbytes <= gib * GIB * (1 + 1e-12)
    assert rows == at_most or (rows + 1) * nbytes > gib * GIB
    assert rows_within(None, nbytes, at_most) == at_most


@pytest.mark.parametrize("gib", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("settings", "key"), [(Sampling, "sampling.cache_gib"), (Optim, "optim.activation_gib")]
)
def test_a_budget_is_a_positive_number(settings: Any, key: str, gib: float) -> None:
    with pytest.raises(ValueError, match=key):
        settings(**{key.split(".")[1]: gib})


@pytest.mark.parametrize(
    "precision", ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed", 32]
)
def test_dtype_of_a_precision(precision: Any, tmp_path: Path) -> None:
    """That of a product under Lightning's own plugin."""
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    plugin = trainer.precision_plugin
    layer = plugin.convert_module(torch.nn.Linear(2, 2))
    with plugin.forward_context():
        found = layer(plugin.convert_input(torch.ones(1, 2))).dtype
    assert compute_dtype(str(trainer.precision)) == found


# ---- memory while drawing


def run(
    tmp_path: Path,
    adapter: Any,
    settings: Sampling,
    *,
    optim: Optim | None = None,
    prompts: Sequence[Prompt] = (LONG,),
    grouping: RolloutGrouping | None = None,
    precision: Any = "32-true",
    steps: int = 1,
) -> UniGRPOModule:
    """Make one iteration; ``steps`` as many as it has updates."""
    module = UniGRPOModule(
        adapter,
        rewards=[lambda images, **_: images.flatten(1).mean(1).tolist()],
        sampling=settings,
        objective=Objective(old_log_prob="rollout", truncation_reward=None, mse_weight=0.0),
        optim=optim or Optim(ppo_epochs=1),
    )
    module.guard = replace(module.guard, action="off")  # texts are written to the end
    trainer_of(tmp_path, precision, grouping, steps=steps).fit(
        module, PromptDataModule.from_prompts(list(prompts), prompts_per_iteration=len(prompts))
    )
    return module


def trainer_of(
    tmp_path: Path,
    precision: Any = "32-true",
    grouping: RolloutGrouping | None = None,
    *,
    steps: int = 1,
) -> Trainer:
    return Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[grouping] if grouping else None,
    )


def held_alone(prompt: Prompt, settings: Sampling, **kwargs: Any) -> int:
    """Return the bytes that the caches of a single rollout hold, measured."""
    adapter = Counted()
    list(rollout(adapter, [Start(prompt, 0, 0)], settings, **kwargs))
    return adapter.held


@pytest.mark.parametrize("rows", [1, 3, 3.5])
@pytest.mark.parametrize("rounds", [1, 2])
def test_caches_stay_within_the_budget(rounds: int, rows: float, tmp_path: Path) -> None:
    settings = sampling(*("text", "image") * rounds)
    alone = held_alone(LONG, settings)
    budget = rows * alone
    adapter = Counted()
    run(tmp_path, adapter, replace(settings, group_size=4, cache_gib=budget / GIB))
    most = max(adapter.rows)
    assert adapter.held <= budget
    assert adapter.held == most * alone
    assert (most + 1) * alone > budget


def test_caches_in_mixed_precision_take_half(tmp_path: Path) -> None:
    adapter, alone = Counted(), held_alone(LONG, TEXT_TO_IMAGE)
    settings = replace(TEXT_TO_IMAGE, group_size=8, cache_gib=2.5 * alone / GIB)
    run(tmp_path, adapter, settings, precision="bf16-mixed")
    assert max(adapter.rows) == 5
    assert adapter.held == 2.5 * alone


def test_rows_per_chunk_bounds_as_well(tmp_path: Path) -> None:
    for cache, bound, rows in ((3.5, 2, 2), (1.5, 4, 1)):
        gib = cache * held_alone(LONG, TEXT_TO_IMAGE) / GIB
        settings = replace(TEXT_TO_IMAGE, group_size=4, cache_gib=gib, rows_per_chunk=bound)
        adapter = Counted()
        run(tmp_path, adapter, settings)
        assert max(adapter.rows) == rows


class Stopping(Counted):
    """Stops its texts anywhere."""

    def next_logits(self, *args: Any) -> torch.Tensor:
        logits = super().next_logits(*args)
        logits[torch.rand(len(logits)) < 0.1, self.stop_token] = 1e4
        return logits


@pytest.mark.parametrize("rounds", [1, 2])
def test_no_shorter_prompt_or_text_needs_more(rounds: int) -> None:
    """The longest prompt decides for all, so caches must not depend on how they have grown."""
    torch.manual_seed(0)
    settings = sampling(*("text", "image") * rounds)
    prompts = [Prompt(text=" ".join(["9"] * num), id=num) for num in range(1, WORDS + 1)]
    found = largest_footprint(Stopping(), prompts, settings, dtype=torch.float32).cache
    for first in range(0, WORDS, 3):
        adapter = Stopping()
        starts = [Start(p, p.id, member) for p in prompts[first : first + 3] for member in range(2)]
        list(rollout(adapter, starts, settings))
        assert adapter.held <= 6 * found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bagel"))


def published(folder: Path, **settings: Any) -> Counted:
    """Load a tiny checkpoint with a tokenizer, an autoencoder and a tower of its own."""
    settings = {"system_prompt": "think about the layout", "default_size": (32, 32)} | settings
    adapter = Counted.from_pretrained(folder, **settings)
    assert isinstance(adapter, Counted)
    adapter.materialize()
    return adapter


@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(text="a red cube"),
        Prompt(text="a red cube", size=(5 * PIXELS, 3 * PIXELS)),
        Prompt(text="make it blue", images=(torch.rand(3, 50, 70), torch.rand(3, 90, 20))),
        Prompt(text="make it blue", images=(torch.rand(3, 50, 70),), size=(16, 16)),
    ],
    ids=["text", "size", "images", "image and size"],
)
def test_sizes_and_input_images_count(
    prompt: Prompt, rounds: int, vision: bool, folder: Path
) -> None:
    """Caches to the byte; activations a little too large: small images are attended several at a time."""
    adapter, settings = published(folder, vision=vision), sampling(*("text", "image") * rounds)
    (trajectories,) = rollout(adapter, [Start(prompt, 0, member) for member in range(3)], settings)
    found = largest_footprint(adapter, [prompt], settings, dtype=torch.float32)
    assert adapter.held == 3 * found.cache
    adapter.share_prefixes = False
    three, one = (kept_for_backward(adapter, trajectories[:n]) for n in (3, 1))
    assert 0.97 <= found.activations / ((three - one) / 2) <= 1.15


def test_of_several_prompts_the_most_demanding_parts_count(folder: Path) -> None:
    """Rows of a chunk are padded to each other; images of several sizes are drawn from copies."""
    prompts = [
        Prompt(text="three green apples, a small dog beside the red ball", size=(16, 16), id=0),
        Prompt(text="a dog", size=(64, 48), id=1),
        Prompt(text="make it blue", images=(torch.rand(3, 50, 70),), size=(32, 32), id=2),
    ]
    for vision in (True, False):
        adapter = published(folder, vision=vision)
        settings = sampling("text", "image", "text", "image")
        found = largest_footprint(adapter, iter(prompts), settings, dtype=torch.float32)
        list(rollout(adapter, [Start(p, p.id, m) for p in prompts for m in range(2)], settings))
        assert 0.5 * 6 * found.cache < adapter.held <= 6 * found.cache


# ---- memory while learning


class Kept(Counted):
    """Measures what its forwards keep for their backwards."""

    measuring = False

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int, int]] = []
        """Trajectories and bytes of each forward."""

    def forward(self, trajectories: Sequence[Trajectory], *args: Any) -> Scores:
        if torch.is_grad_enabled() and not self.measuring:
            self.measuring = True
            self.kept.append((len(trajectories), kept_for_backward(self, trajectories)))
            self.measuring = False
        return super().forward(trajectories, *args)


@pytest.mark.parametrize("rows", [1.5, 3.5])
@pytest.mark.parametrize("rounds", [1, 2])
def test_activations_stay_within_the_budget(rounds: int, rows: float, tmp_path: Path) -> None:
    settings, adapter = sampling(*("text", "image") * rounds), Kept()
    alone = kept_for_backward(adapter, [longest(adapter, settings)])
    budget, adapter.kept = rows * alone, []
    optim = Optim(ppo_epochs=1, activation_gib=budget / GIB)
    run(tmp_path, adapter, replace(settings, group_size=4), optim=optim)
    assert sum(count for count, _ in adapter.kept) == 4
    assert all(nbytes <= budget for _, nbytes in adapter.kept)
    count, nbytes = max(adapter.kept)
    assert nbytes + alone > budget
    assert count == int(rows)


def test_micro_batch_size_bounds_as_well(tmp_path: Path) -> None:
    adapter = Kept()
    alone = kept_for_backward(adapter, [longest(adapter, TEXT_TO_IMAGE)])
    for budget, bound, rows in ((3.5, 2, 2), (1.5, 4, 1)):
        adapter = Kept()
        optim = Optim(ppo_epochs=1, activation_gib=budget * alone / GIB, micro_batch_size=bound)
        run(tmp_path, adapter, replace(TEXT_TO_IMAGE, group_size=4), optim=optim)
        assert [count for count, _ in adapter.kept] == [rows] * (4 // rows)


# ---- ranks


class Share(RolloutGrouping):
    """Draws what one of two ranks would."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def assign(self, prompts: Any, group_size: int, **_: Any) -> list[Start]:
        return super().assign(prompts, group_size, rank=self.rank, world_size=2)


def test_ranks_make_the_same_calls(tmp_path: Path) -> None:
    """One draws the short prompt, the other the long one, of which fewer would fit."""
    settings = replace(TEXT_TO_IMAGE, group_size=8)
    gib = 3.9 * held_alone(LONG, settings) / GIB
    assert gib * GIB > 4 * held_alone(SHORT, settings)
    foot = largest_footprint(Counted(), [LONG], settings, dtype=torch.float32)
    optim = Optim(ppo_epochs=1, activation_gib=3.9 * foot.activations / GIB)
    calls = []
    for rank in range(2):
        adapter = Counted()
        grouping = Share(rank)
        run(
            tmp_path,
            adapter,
            replace(settings, cache_gib=gib),
            optim=optim,
            prompts=[SHORT, LONG],
            grouping=grouping,
        )
        calls.append(adapter.calls)
        assert max(adapter.rows) == 3
    assert calls[0] == calls[1]


def test_in_evaluation_the_longest_prompt_of_the_split_decides(tmp_path: Path) -> None:
    """Whichever batch a rank holds; with guidance there are more caches."""
    for scale, caches in ((1.0, 1), (3.0, 2)):
        settings = replace(TEXT_TO_IMAGE, guidance_scale=scale, eval_num_timesteps=3)
        alone = held_alone(LONG, settings)
        budget = caches * 3.9 * alone
        adapter = Counted()
        module = UniGRPOModule(
            adapter,
            rewards=[lambda images, **_: images.flatten(1).mean(1).tolist()],
            sampling=replace(settings, cache_gib=budget / GIB),
        )
        val, test = (
            [replace(prompt, id=first + i) for i, prompt in enumerate([SHORT] * 4 + [LONG] * 4)]
            for first in (0, 8)
        )
        data = PromptDataModule.from_prompts(val=val, test=test, eval_batch_size=4)
        data._prompts["predict"] = test
        trainer = trainer_of(tmp_path)
        for evaluate in (trainer.validate, trainer.test, trainer.predict):
            adapter.rows, adapter.calls, adapter.held = [], Counter(), 0
            evaluate(module, data)
            assert max(adapter.rows) == 3
            assert adapter.calls["text"] == 2 * 2 * settings.max_text_tokens  # each batch: 3 + 1
            assert adapter.held <= budget


# ---- the numbers stay


@pytest.mark.parametrize("rounds", [1, 2])
def test_budgets_do_not_change_the_update(rounds: int, tmp_path: Path) -> None:
    """Neither what is drawn nor what is learned from it."""
    found = []
    settings = small(rounds, group_size=8)
    foot = DigitsAdapter().footprint(settings, prompt_tokens=10, dtype=torch.float32)
    for cache, activations in ((None, None), (5.5, None), (None, 3.5), (2.5, 1.5)):
        module = UniGRPOModule(
            DigitsAdapter(),
            sampling=replace(settings, cache_gib=cache and cache * foot.cache / GIB),
            objective=Objective(flow_clip_low=1e-2, flow_clip_high=1e-2, mse_weight=0.01),
            optim=Optim(
                ppo_epochs=1, activation_gib=activations and activations * foot.activations / GIB
            ),
        )
        module.configure_optimizers = lambda m=module: torch.optim.SGD(  # type: ignore[method-assign]
            m.adapter.net.parameters(), lr=1e-2
        )
        module.lr_schedulers = lambda: _NoSchedule()  # type: ignore[method-assign]
        (experience,) = fit(tmp_path, module, 1).experience
        found.append((experience.trajectories, flat(module)))
    (trajectories, weights), *others = found
    assert not torch.equal(weights, flat(UniGRPOModule(DigitsAdapter())))
    for drawn, learned in others:
        for a, b in zip(trajectories, drawn, strict=True):
            same(a, b, 2e-5)  # batched kernels round differently
        torch.testing.assert_close(learned, weights, atol=2e-6, rtol=1e-5)


# ---- what the user is told


@pytest.mark.parametrize(
    ("settings", "optim", "words"),
    [
        ({"cache_gib": 1.0}, {}, ["model.sampling.cache_gib", "model.sampling.rows_per_chunk"]),
        ({}, {"activation_gib": 1.0}, ["model.optim.activation_gib", "optim.micro_batch_size"]),
        (
            {"cache_gib": 1.0},
            {"activation_gib": 1.0},
            ["cache_gib", "rows_per_chunk", "activation_gib", "micro_batch_size", "Watched"],
        ),
    ],
)
def test_an_adapter_without_footprint_is_refused_before_anything_is_drawn(
    settings: dict[str, Any], optim: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    class Watched(ToyFlow):
        def prefill(self, *_: Any) -> Any:
            raise AssertionError("something is drawn")

    module = UniGRPOModule(Watched(), sampling=small(**settings), optim=Optim(**optim))
    with pytest.raises(ValueError, match="has no footprint") as error:
        fit(tmp_path, module, 1, num_sanity_val_steps=1, limit_val_batches=1)
    assert all(word in str(error.value) for word in words)


def test_a_budget_for_less_than_one_warns_once_and_goes_on(tmp_path: Path) -> None:
    adapter = Counted()
    foot = adapter.footprint(TEXT_TO_IMAGE, prompt_tokens=WORDS, dtype=torch.float32)
    settings = replace(TEXT_TO_IMAGE, cache_gib=0.5 * foot.cache / GIB)
    optim = Optim(ppo_epochs=1, activation_gib=0.5 * foot.activations / GIB)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = run(tmp_path, adapter, settings, optim=optim, steps=2)  # two iterations
    assert module.iteration == 2
    said = [str(w.message) for w in caught if "single trajectory" in str(w.message)]
    for key, nbytes in (
        ("model.sampling.cache_gib", foot.cache),
        ("model.optim.activation_gib", foot.activations),
    ):
        (text,) = [text for text in said if text.startswith(key)]
        assert f"needs {nbytes / GIB:.3g} GiB" in text
        assert f"is {0.5 * nbytes / GIB:g}" in text
    assert len(said) == 2
    assert set(adapter.rows) == {1}
    assert adapter.calls["update"] == 2 * TEXT_TO_IMAGE.group_size


def test_the_numbers_are_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(budget_file, "rank_zero_info", said.append)
    settings = small(cache_gib=1.0, rows_per_chunk=3)
    module = UniGRPOModule(
        DigitsAdapter(), sampling=settings, optim=Optim(ppo_epochs=1, activation_gib=1.0)
    )
    record = Record()
    fit(tmp_path, module, 3, record)
    assert len(record.experience) == 3
    assert len(said) == 2
    assert said[0].startswith("model.sampling.cache_gib 1: 3 trajectories drawn together, ")
    assert said[1].startswith("model.optim.activation_gib 1: ")


# ---- and beforehand


@pytest.mark.filterwarnings("ignore:.*a single trajectory needs:UserWarning")
def test_estimate_counts_with_the_same_budgets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(TEXT_TO_IMAGE, group_size=8)
    foot = Counted().footprint(settings, prompt_tokens=WORDS, dtype=torch.float32)
    for cache, activations, rows, batch in ((3.5, 2.5, 3, 2), (0.5, 0.25, 1, 1), (99, 99, 8, 4)):
        gib = cache * foot.cache / GIB
        optim = Optim(
            ppo_epochs=1, updates_per_rollout=2, activation_gib=activations * foot.activations / GIB
        )
        adapter, setup = Counted(), Setup(prompts_per_iteration=1, prompt_tokens=WORDS)
        module = run(tmp_path, adapter, replace(settings, cache_gib=gib), optim=optim, steps=2)
        found = estimate(module, setup)
        assert (found.rollout_rows, found.update_rows) == (rows, batch)
        assert max(adapter.rows) == rows
        assert adapter.calls["text"] == found.decode_steps
        assert adapter.calls["update"] == found.optimizer_steps * found.update_forwards
        assert found.memory["rollout cache"] == adapter.held
        assert found.memory["activations"] == batch * foot.activations
        report(found, setup)
        printed = " ".join(capsys.readouterr().out.split())
        assert f"{rows} rollouts at a time" in printed
        assert f"{batch} trajectories at a time" in printed
        for key, nbytes in (("cache", foot.cache), ("activation", foot.activations)):
            said = f"{key}_gib is" in printed and f"needs {nbytes / GIB:.3g} GiB" in printed
            assert said == (rows == 1)
