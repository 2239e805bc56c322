"""What ranks do in :mod:`tests.test_distributed`, and what the single process does in comparison.

A rank calls the functions at the end with a folder and words, and writes there what the test compares. A
process takes five seconds to start, so that each goes through many runs.
"""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import functools
import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecision
from torch.distributed.tensor import DTensor

from lightning_unigrpo import (
    Adapter,
    Guard,
    IterationCheckpoint,
    Objective,
    Optim,
    Prompt,
    PromptDataModule,
    ReferenceVelocity,
    Reward,
    Sampling,
    Trajectory,
    UniGRPOModule,
    distributed,
)
from lightning_unigrpo.adapters.bagel import BagelAdapter
from lightning_unigrpo.adapters.bagel.lora import LoRA
from lightning_unigrpo.adapters.bagel.network import MLP
from lightning_unigrpo.adapters.digits import DigitReward, DigitsAdapter
from lightning_unigrpo.callbacks import Experience, UniGRPOCallback
from tests.families import CodeDigits, FlowDigits, MaskedDigits
from tests.materialize import Watch, now
from tests.published import SENTENCES
from tests.ranks import CPUFSDPStrategy, trainer_of
from tests.toys import ToyFlow, ToyMasked, ToyTokens, brightness, share_of_a

# ---- what is trained

EPOCHS = 2
LIMIT = 60
"""Seconds after which a run hangs: its process says where, and ends."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run that has to be the same on any number of ranks."""

    build: Callable[[Path], Adapter]
    """Makes the adapter; it is given the folder of a published checkpoint."""
    prompts: Sequence[Prompt]
    """Of every iteration."""
    reward: Callable[..., Any]
    turns: list[str] | None = None
    lr: float | None = 0.05
    """Of gradient descent, in both groups; ``None`` = AdamW."""
    sampling: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    """Changes of what :func:`settings_of` says."""
    iterations: int = 3


def settings_of(case: Case, **sampling: Any) -> dict[str, Any]:
    """Return settings of a module: small, and 12 rollouts, which can be dealt to 2, 3 and 4 ranks."""
    drawn = {
        "group_size": 4,
        "max_text_tokens": 12,
        "temperature": 1.5,  # lengths differ inside a group as well
        "num_timesteps": 5,
        "schedule": "steps",
        "shift": 1.0,
        "eta": 0.7,
        "window_size": 2,
        "window_range": (0, 4),
        "eval_num_timesteps": 4,
        "seed": 3,
    }
    objective = {
        # Longer texts count more: the loss is not 0 while the policy has not moved, and counts matter.
        "text_aggregation": "token_mean",
        "flow_clip_low": 1e-2,
        "flow_clip_high": 1e-2,
        "mse_weight": 0.1,
        "truncation_reward": None,
    }
    optim = {
        "text_lr": 1e-3,
        "flow_lr": 1e-3,
        "ppo_epochs": EPOCHS,
        "max_grad_norm": None,
        "micro_batch_size": 2,
    }
    return {
        "rewards": [case.reward],
        "turns": case.turns,
        "guard": Guard(action="warn"),  # the test says more
        "sampling": Sampling(**(drawn | case.sampling | sampling)),
        "objective": Objective(**(objective | case.objective)),
        "optim": Optim(**(optim | case.optim)),
    }


judge = functools.cache(DigitReward)


def digit_unless_sum(
    *, images: Tensor, answer: Sequence[int], prompts: Sequence[str], **_: Any
) -> list[float]:
    """Reward the right digit, and all pictures of "what is one plus one" alike: that group is masked."""
    values = judge()(images=images, answer=answer).tolist()
    pairs = zip(prompts, values, strict=True)
    return [0.5 if "one plus one" in text else value for text, value in pairs]


def few_tokens(*, num_tokens: Sequence[int], **_: Any) -> list[float]:
    """Reward short texts."""
    return [1.0 / count for count in num_tokens]


def bright(*, images: Any, **_: Any) -> list[float]:
    """Reward bright pictures, of any sizes."""
    return [float(image.mean()) for image in images]


def words_and_light(*, images: Tensor, completions: Sequence[str], **_: Any) -> list[float]:
    """Reward bright pictures and the word "a"."""
    light = brightness(images=images).tolist()
    return [a + b for a, b in zip(light, share_of_a(completions=completions), strict=True)]


def question(number: int, text: str, answer: int) -> Prompt:
    """Return a prompt of the digits."""
    return Prompt(text=text, id=number, columns={"answer": answer})


QUESTIONS = [
    question(0, "what is three plus four", 7),
    question(1, "what is one plus one", 2),
    question(2, "draw nine minus four plus two", 7),
]
HELD_OUT = [
    question(10 + i, f"what is {word} plus one", i + 1)
    for i, word in enumerate(("zero", "one", "two", "three", "four"))
]
"""Five: with two in a batch, the second of two ranks has nobody in its last one."""


def picture(seed: int, height: int, width: int) -> Tensor:
    """Return an input image."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


PICTURES = [
    Prompt(text=SENTENCES[0], id=0, size=(32, 32)),
    Prompt(text=SENTENCES[1], id=1, size=(24, 40), images=(picture(1, 40, 24),)),
    Prompt(text="red", id=2, size=(32, 16), images=(picture(2, 16, 16), picture(3, 24, 32))),
]
"""Their sizes and the number of input images differ: ranks make different calls."""
WORDS = [Prompt(text=text, id=i) for i, text in enumerate(("a b", "c", "d a h"))]


def digits(folder: Path) -> Adapter:
    return DigitsAdapter()


def bagel(folder: Path, **settings: Any) -> Adapter:
    return BagelAdapter.from_pretrained(folder, default_size=(32, 32), **settings)


def seeded(build: Callable[[], Adapter]) -> Adapter:
    """Return an adapter whose random weights are the same on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def bagel_lora(folder: Path) -> Adapter:
    return bagel(folder, lora=LoRA(rank=4))


DIGITS = {"build": digits, "prompts": QUESTIONS, "reward": digit_unless_sum}
SEEN = {
    "prompts": PICTURES,
    "reward": bright,
    "sampling": {"plan": ("text", "image", "text", "image"), "max_text_tokens": 4},
}
TOY = {"prompts": WORDS, "reward": words_and_light, "lr": 0.1}
CASES = {
    # 4 rollouts a prompt: whole groups on 3 ranks, cut groups on 2 and 4.
    "digits": Case(**DIGITS, iterations=4),  # the last one is what checkpoints are continued with
    # All in one group, which lies on all ranks.
    "one group": Case(**(DIGITS | {"prompts": QUESTIONS[:1]}), sampling={"group_size": 12}),
    # Rounds of unequal number, on one rank and between ranks: who says "3=3" keeps its drawing.
    "dialogue": Case(
        **(DIGITS | {"build": lambda folder: DigitsAdapter("two_rounds")}),
        sampling={
            "plan": ("text", "image", "turn", "text", "image"),
            "rounds": 3,
            "max_text_tokens": (12, 4),
            "stop_phrase": "=",
        },
        turns=["please draw"],
        objective={"text_aggregation": "sequence_mean", "text_kl_weight": 0.05},
        lr=0.005,  # the KL's gradient is steep
    ),
    "images": Case(**DIGITS, sampling={"plan": ("image",)}),
    "texts": Case(**(DIGITS | {"reward": few_tokens}), sampling={"plan": ("text",)}),
    "clipped": Case(
        **DIGITS,
        optim={"max_grad_norm": 0.02},  # below the norm of each group in every update
        lr=0.2,
        objective={"mse_weight": 0.0, "latent_kl_weight": 0.1},
    ),
    "adamw": Case(**DIGITS, lr=None),
    "bagel": Case(build=bagel, **SEEN),
    "lora": Case(build=bagel_lora, **SEEN),
    # One decoder for words and images, of transformers.
    "janusflow": Case(**(DIGITS | {"build": lambda folder: seeded(FlowDigits)})),
    "januspro": Case(**(DIGITS | {"build": lambda folder: seeded(CodeDigits)})),
    "showo": Case(**(DIGITS | {"build": lambda folder: seeded(MaskedDigits)})),
    "flow": Case(build=lambda folder: ToyFlow(), **TOY),
    "tokens": Case(build=lambda folder: ToyTokens(), **TOY),
    "masked": Case(build=lambda folder: ToyMasked(), **TOY),
}


# ---- one run


class Record(NamedTuple):
    """What a run leaves behind, on one rank."""

    drawn: list[Trajectory]
    """Of the first iteration, with all that the update read."""
    metrics: list[dict[str, float]]
    """Of every update."""
    before: dict[str, Tensor]
    """Whole weights at the beginning; on rank 0."""
    after: dict[str, Tensor]
    """At the end."""


class Replay(UniGRPOModule):
    """Climbs by gradient descent, from the second iteration on with given trajectories.

    AdamW divides by gradients that are rounding; and where a rounding changes one token, nothing that follows
    can be compared.

    Args:
        adapter: the backbone.
        lr: of both groups; ``None`` = AdamW.
        given: trajectories of each iteration, of all ranks; ``None`` draws and remembers them.
        settings: of :class:`UniGRPOModule`.
    """

    first: list[Trajectory]
    """Those of the first iteration, as they are after its updates."""

    def __init__(
        self,
        adapter: Adapter,
        *,
        lr: float | None = None,
        given: list[list[Trajectory]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(adapter, **settings)
        self.descent, self.given = lr, given
        self.drawn: list[list[Trajectory]] = []
        self.told: list[dict[str, float]] = []

    def configure_optimizers(self) -> Any:
        if self.descent is None:
            return super().configure_optimizers()
        groups = [{"params": p, "name": name} for name, p in self._trainable().items()]
        # With momentum, because Lightning cannot load an optimizer without any state.
        optimizer = torch.optim.SGD(groups, lr=self.descent, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

    def _experience(self, starts: Any, rows: int | None, *, evaluate: bool) -> Experience:
        if self.given is None or evaluate or self.iteration == 0:
            found = super()._experience(starts, rows, evaluate=evaluate)
            if not evaluate:
                self.drawn.append(copy.deepcopy(found.trajectories))
            return found
        known = {(t.group, t.member): t for t in self.given[self.iteration]}
        trajectories = [copy.deepcopy(known[start.group, start.member]) for start in starts]
        names = tuple(str(reward.name) for reward in self._rewards)
        return Experience(
            trajectories=trajectories,
            iteration=self.iteration,
            rewards=torch.tensor([[t.rewards[name] for name in names] for t in trajectories]),
            reward_names=names,
            reward_weights=torch.tensor([reward.weight for reward in self._rewards]),
        )

    def update(self, minibatch: list[Trajectory], experience: Experience) -> None:
        super().update(minibatch, experience)
        self.told.append(dict(experience.metrics))
        if self.iteration == 0:
            self.first = experience.trajectories


class Looking(UniGRPOCallback):
    """A user's callback that asks the policy for something, before the reference is refreshed."""

    @torch.no_grad()
    def on_rollout_end(self, trainer: Trainer, module: Any, experience: Experience) -> None:
        module.adapter(experience.trajectories[:1])


class Weights(Callback):
    """Keeps the whole weights from before the first iteration."""

    before: dict[str, Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = distributed.whole_state(pl_module.adapter.net)


def trainer_for(name: str, steps: int, *callbacks: Callback, **settings: Any) -> Trainer:
    """Return a trainer; ``ddp`` and ``fsdp`` are the user's literal strings."""
    if name in ("ddp", "fsdp"):
        settings = {"strategy": name} | settings
    return trainer_of(name, steps, *callbacks, **settings)


def run(
    case: Case,
    strategy: str,
    folder: Path,
    *callbacks: Callback,
    iterations: int | None = None,
    trainer: dict[str, Any] | None = None,
    splits: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    mode: str = "auto",
    **changes: Any,
) -> tuple[Replay, Record]:
    """Train a case.

    Args:
        case: what is trained.
        strategy: by name.
        folder: of the published checkpoint.
        callbacks: more of them.
        iterations: how often to draw; ``None`` = as the case says.
        trainer: settings of the trainer.
        splits: of the prompts, beside those for training.
        ckpt_path: to continue from.
        mode: of the rollout's weights.
        changes: of the module's arguments.
    """
    settings = {"lr": case.lr} | settings_of(case, rollout_weights=mode) | changes
    module = Replay(case.build(folder), **settings)
    weights, steps = Weights(), (iterations or case.iterations) * module.optim.ppo_epochs
    if not any(isinstance(c, ReferenceVelocity) for c in callbacks):
        callbacks += (ReferenceVelocity(refresh_every=2),)
    made = trainer_for(strategy, steps, weights, *callbacks, **(trainer or {}))
    data = PromptDataModule.from_prompts(
        case.prompts, prompts_per_iteration=len(case.prompts), **(splits or {})
    )
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        made.fit(module, data, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert mode in ("auto", module.rollout_mode)
    after = distributed.whole_state(module.adapter.net)
    return module, Record(getattr(module, "first", []), module.told, weights.before, after)


def clip_by_torch(
    groups: dict[str, list[nn.Parameter]], max_norm: float | None, net: nn.Module
) -> dict[str, float]:
    """Clip as torch does, whole gradients in one process."""
    bound = float("inf") if max_norm is None else max_norm
    return {
        name: float(nn.utils.clip_grad_norm_(parameters, bound))
        for name, parameters in groups.items()
    }


def run_alone(case: Case, folder: Path) -> tuple[list[list[Trajectory]], Record]:
    """Train a case in this process alone; returns the trajectories of all iterations, and the record."""
    with mock.patch.object(distributed, "clip_grad_norms", clip_by_torch):
        module, record = run(case, "single", folder)
    return module.drawn, record


def given_of(root: Path, key: str) -> list[list[Trajectory]]:
    """Return the trajectories that the single process drew."""
    found: list[list[Trajectory]] = torch.load(root / "alone" / f"{key}.pt", weights_only=False)[0]
    return found


def local_bytes(net: nn.Module) -> int:
    """Return what this rank holds of the weights."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in net.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


# ---- what ranks do


def several(folder: Path, *parts: str) -> None:
    """Call functions, each in a folder of its own: ``function`` or ``function=word,word``."""
    for part in parts:
        name, _, words = part.partition("=")
        target = folder / name
        target.mkdir(exist_ok=True)
        globals()[name](target, *filter(None, words.split(",")))
        (target / "done").touch()


KEPT = "iteration=3.ckpt"


def equal(folder: Path, *names: str) -> None:
    """Train cases, each named ``strategy/case/mode``, or ``strategy/case/mode/checkpoint`` to continue one.

    The digits save a checkpoint before their last iteration.
    """
    root = root_of(folder)
    for name in names:
        strategy, key, mode, *checkpoint = name.split("/")
        saver = IterationCheckpoint(every=3, keep=3, dirpath=str(folder / strategy))
        save = key == "digits" and not checkpoint
        record = run(
            CASES[key],
            strategy,
            root / "bagel",
            *([Looking(), saver] if save else []),
            trainer={"enable_checkpointing": save},
            mode=mode,
            given=given_of(root, key),
            ckpt_path=root / "2" / "equal" / checkpoint[0] / KEPT if checkpoint else None,
        )[1]
        torch.save(record, file_of(folder, name))


def root_of(folder: Path) -> Path:
    """Return where the checkpoints and the single process's runs are."""
    return folder.parent.parent


def file_of(folder: Path, name: str, rank: int | None = None) -> Path:
    """Return where a run leaves its record."""
    rank = distributed.rank() if rank is None else rank
    return folder / f"{name.replace('/', '-')}-{rank}.pt"


def held(net: nn.Module, units: Sequence[nn.Module]) -> dict[str, Any]:
    """Return how a network is sharded: bytes of this rank, and which modules are gathered by themselves."""

    def is_unit(module: nn.Module) -> bool:
        if isinstance(module, FullyShardedDataParallel):
            return bool(module._has_params)
        return isinstance(module, FSDPModule) and bool(module._get_fsdp_state()._fsdp_param_group)

    found = {distributed.clean(name): m for name, m in net.named_modules() if is_unit(m)}
    wrapped = [m for m in found.values() if isinstance(m, FullyShardedDataParallel)]
    return {
        "bytes": local_bytes(net),
        "is_gathered": not all(isinstance(p, DTensor) for p in net.parameters())
        if not wrapped
        else not all(module._handle.needs_unshard() for module in wrapped),
        "units": [is_unit(unit) for unit in units],
        "all": sorted(found),
    }


class Few(DigitsAdapter):
    """Brings small groups, so that the literal line is done soon."""

    def defaults(self) -> Any:
        found = super().defaults()
        return replace(found, sampling=replace(found.sampling, group_size=2))


def wrapping(folder: Path) -> None:
    """Shard by the user's literal line, by FSDP2, and by a policy of the user's; refuse what cannot work."""
    root, found = root_of(folder), {}
    adapter, settings = Few(), {"logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    found["total"] = local_bytes(adapter.net)
    trainer = Trainer(
        strategy="fsdp", accelerator="cpu", devices=2, max_steps=1, **settings, **quiet
    )
    trainer.fit(UniGRPOModule(adapter))
    found["literal"] = held(adapter.net, adapter.shard_units())
    found["outside"] = isinstance(trainer.strategy.model, FullyShardedDataParallel)
    trainer.save_checkpoint(folder / "literal.ckpt")
    for name, strategy in (
        ("fsdp", None),
        ("fsdp2", None),
        ("policy", CPUFSDPStrategy(auto_wrap_policy={MLP})),
    ):
        reference = ReferenceVelocity(refresh_every=2)
        module, record = run(
            CASES["digits"],
            "fsdp" if strategy else name,
            root / "bagel",
            reference,
            given=given_of(root, "digits"),
            iterations=3 if strategy else 1,
            trainer={"strategy": strategy} if strategy else None,
        )
        (twin,) = reference._twin
        found[name] = held(module.adapter.net, module.adapter.shard_units())
        found[f"{name} twin"] = held(twin.net, twin.shard_units())
        torch.save(record, file_of(folder, name))
    found["refused"] = refused(root / "bagel")
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


def refused(checkpoint: Path) -> dict[str, str]:
    """Return what is said to settings that cannot work."""
    bfloat16 = BagelAdapter.from_pretrained(checkpoint, lora=LoRA(rank=2), dtype="bfloat16")
    found = {}
    for name, strategy, adapter in (
        ("activation", CPUFSDPStrategy(activation_checkpointing_policy={MLP}), DigitsAdapter()),
        ("orig_params", CPUFSDPStrategy(use_orig_params=False), DigitsAdapter()),
        (
            "tensor",
            ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
            DigitsAdapter(),
        ),
        ("auto", ModelParallelStrategy(), DigitsAdapter()),
        ("dtypes", CPUFSDPStrategy(), bfloat16),
    ):
        case = replace(CASES["digits"], build=lambda folder, adapter=adapter: adapter)
        found[name] = what_is_raised(case, "fsdp", checkpoint, trainer={"strategy": strategy})
    found["loaded"] = str(not bfloat16.net.vae2llm.weight.is_meta)
    return found


def what_is_raised(case: Case, strategy: str, folder: Path, **settings: Any) -> str:
    """Return the error of a run in words."""
    try:
        run(case, strategy, folder, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---- rollouts


BFLOAT16 = MixedPrecision(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.bfloat16
)


def rollouts(folder: Path) -> None:
    """Draw with whole and with sharded weights, in both precisions."""
    root = root_of(folder)
    for strategy in ("fsdp", "fsdp2"):
        for key, precision in (
            ("digits", "32-true"),
            ("digits", "bf16-mixed"),
            ("bagel", "bf16-mixed"),
        ):
            for mode in ("resident", "sharded"):
                settings: dict[str, Any] = {"precision": precision}
                if strategy == "fsdp" and precision == "bf16-mixed":
                    settings["strategy"] = CPUFSDPStrategy(mixed_precision=BFLOAT16)
                _, record = run(
                    CASES[key], strategy, root / "bagel", iterations=1, mode=mode, trainer=settings
                )
                name = f"{strategy}/{key}/{precision}/{mode}"
                torch.save(record._replace(before={}, after={}), file_of(folder, name))


def reduced(folder: Path) -> None:
    """Train copies in bf16-mixed, all weights and LoRA's."""
    for key in ("digits", "lora"):
        module, record = run(
            CASES[key],
            "ddp",
            root_of(folder) / "bagel",
            iterations=2,
            trainer={"precision": "bf16-mixed"},
        )
        own = module.adapter.net.state_dict()
        torch.save(record._replace(drawn=[], after=own), file_of(folder, key))


class Babbling(DigitsAdapter):
    """Never stops on the first rank."""

    def next_logits(self, *args: Any) -> Tensor:
        logits = super().next_logits(*args)
        if distributed.rank() == 0:
            logits[:, self.stop_token] = -math.inf
        return logits


class Breaking(DigitsAdapter):
    """Fails on the second rank, in the middle of an image."""

    calls = 0

    def velocity(self, *args: Any) -> Tensor:
        self.calls += 1
        if distributed.rank() == 1 and self.calls == 3:
            raise MemoryError("no ink left")
        return super().velocity(*args)


def dark_on_the_second_rank(**columns: Any) -> list[float]:
    """Score on the first rank only."""
    if distributed.rank() == 1:
        raise ConnectionError("nobody answers")
    return digit_unless_sum(**columns)


class MissingOnTheSecondRank:
    """A reward whose model only the first rank finds."""

    def prepare(self, device: torch.device) -> None:
        if distributed.rank() == 1:
            raise FileNotFoundError("no weights here")

    def __call__(self, **columns: Any) -> list[float]:
        return digit_unless_sum(**columns)


def odd(folder: Path) -> None:
    """Run what makes ranks differ: lengths, errors, failures of a reward, batches of an evaluation."""
    root, digits_case = root_of(folder), CASES["digits"]
    found: dict[str, Any] = {}
    for strategy in ("fsdp", "fsdp2"):
        _, record = run(
            replace(digits_case, build=lambda folder: Babbling()),
            strategy,
            root / "bagel",
            iterations=1,
            mode="sharded",
            guard=Guard(action="off"),  # the trained policy may stop
        )
        found[f"lengths {strategy}"] = [len(t.segments[1].tokens) for t in record.drawn]
        found[f"metrics {strategy}"] = record.metrics
    for strategy, mode in (
        ("ddp", "auto"),
        ("fsdp", "sharded"),
        ("fsdp2", "sharded"),
        ("fsdp2", "resident"),
    ):
        for name, case in (
            ("rollout", replace(digits_case, build=lambda folder: Breaking())),
            ("reward", replace(digits_case, reward=Reward(dark_on_the_second_rank, required=True))),
            ("prepare", replace(digits_case, reward=Reward(MissingOnTheSecondRank()))),
        ):
            found[f"{name} {strategy} {mode}"] = what_is_raised(
                case, strategy, root / "bagel", mode=mode
            )
        _, record = run(
            replace(digits_case, reward=Reward(dark_on_the_second_rank)),
            strategy,
            root / "bagel",
            iterations=2,
            mode=mode,
        )
        found[f"unscored {strategy} {mode}"] = {
            "rewards": [t.reward for t in record.drawn],
            "usable": [t.usable for t in record.drawn],
            "metrics": record.metrics,
        }
        found[f"evaluation {strategy} {mode}"] = evaluated(strategy, root, mode)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(found))


def evaluated(strategy: str, root: Path, mode: str = "auto") -> dict[str, float]:
    """Return the validation after two iterations; five prompts, two at a time on each rank."""
    module, _ = run(
        CASES["digits"],
        strategy,
        root / "bagel",
        iterations=2,
        mode=mode,
        given=given_of(root, "digits"),
        trainer={"limit_val_batches": 1.0},
        splits={"val": HELD_OUT, "eval_batch_size": 2},
    )
    found = module.trainer.callback_metrics
    return {name: float(value) for name, value in found.items() if name.startswith("val/")}


# ---- memory


def memory(folder: Path) -> None:
    """Measure what a rank holds at most while a checkpoint of 80 MB is read and sharded."""
    for strategy in ("fsdp", "fsdp2"):
        measured(strategy, root_of(folder) / "bagel")  # imports what is imported when first needed
        found = measured(strategy, root_of(folder) / "large")
        (folder / f"{strategy}-{distributed.rank()}.json").write_text(json.dumps(found))


def measured(strategy: str, checkpoint: Path) -> dict[str, int]:
    """Return bytes: at the peak, kept, and of the parts of the network."""
    adapter = BagelAdapter.from_pretrained(checkpoint, default_size=(32, 32))
    sizes = {id(p): p.numel() * p.element_size() for p in adapter.net.parameters()}
    units = [sum(sizes[id(p)] for p in u.parameters()) for u in adapter.shard_units()]
    model = Measured(
        adapter,
        rewards=[bright],
        objective=Objective(mse_weight=0.0),  # without a reference, which would be a second network
    )
    trainer_for(strategy, 0).fit(model, train_dataloaders=[])
    frozen = [p for m in adapter.frozen_modules() for p in m.parameters()]
    return {
        "peak": model.peak,
        "kept": local_bytes(adapter.net),
        "total": sum(sizes.values()),
        "frozen": sum(p.numel() * p.element_size() for p in frozen),
        "unit": max(*units, sum(sizes.values()) - sum(units)),
    }


M_MMAP_THRESHOLD = -3
"""Of ``mallopt``: larger blocks come straight from the system."""


class Measured(UniGRPOModule):
    """Watches the memory of configure_model."""

    peak: int

    def configure_model(self) -> None:
        gc.collect()
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is given back at once,
        libc.malloc_trim(0)  # and what was free before: only what is in use counts
        before, watch = now(), Watch()
        watch.start()
        super().configure_model()
        watch.running = False
        watch.join()
        self.peak = watch.peak - before
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)


def crash(folder: Path, strategy: str) -> None:
    """Fail on the second rank inside a layer, while the others gather that layer's weights."""
    adapter, calls = DigitsAdapter(), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if distributed.rank() == 1 and len(calls) == 3:
            raise MemoryError("no ink left")

    adapter.net.language_model.model.layers[1].mlp_moe_gen.register_forward_pre_hook(fail)
    case = replace(CASES["digits"], build=lambda folder: adapter)
    run(case, strategy, root_of(folder) / "bagel", mode="sharded")
