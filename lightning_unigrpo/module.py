"""UniGRPO as a LightningModule: one training step is one iteration of reinforcement learning.

Manual optimization, so that the step reads like the algorithm and checkpoints fall between
iterations. In consequence Lightning's ``gradient_clip_val`` and ``accumulate_grad_batches`` are
replaced by ``optim.max_grad_norm`` and ``optim.micro_batch_size``, and ``trainer.global_step`` counts
optimizer steps (``ppo_epochs * updates_per_rollout`` per iteration).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import Self, override

from lightning_unigrpo import distributed
from lightning_unigrpo.adapter import Adapter, dropout_rates, has_turns
from lightning_unigrpo.budget import GIB, MemoryBudget
from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.grouping import RolloutGrouping
from lightning_unigrpo.callbacks.reference import ReferenceVelocity
from lightning_unigrpo.callbacks.rewards import RewardLogger
from lightning_unigrpo.checkpoint import (
    ORIGIN,
    Origin,
    States,
    accept,
    by_name,
    describe,
    find_whole,
    get_states,
    look_first,
    notes,
    set_states,
)
from lightning_unigrpo.config import Evaluation, Guard, Objective, Optim, Sampling
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.dialogue import Turns
from lightning_unigrpo.evaluation import Figures, drawn_by
from lightning_unigrpo.guard import Mismatch, OnPolicyError, beyond_bounds
from lightning_unigrpo.loss import Counts, Metrics, Transitions, by_shape, count, trajectory_loss
from lightning_unigrpo.reward import RewardRunner, reward_names, table_of_rounds, wrap
from lightning_unigrpo.rewards import CLIPScore
from lightning_unigrpo.rollout import Start, rollout, said
from lightning_unigrpo.timing import PhaseClock, peak_memory
from lightning_unigrpo.types import (
    Defaults,
    Prompt,
    Scores,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    after_each_round,
    sampled,
)


class UniGRPOModule(LightningModule):
    """Train a unified model to think before it draws.

    ``J = J_text + λ J_flow − γ MSE(v_θ, v_ref)``, one terminal reward, group-relative advantages for
    both halves.

    Source: UniGRPO, https://arxiv.org/abs/2603.23500.

    Args:
        adapter: the backbone.
        rewards: callables of the reward protocol (:mod:`lightning_unigrpo.reward`); ``None`` takes the
            adapter's own, else :class:`~lightning_unigrpo.rewards.CLIPScore`, whose model is read when
            the first collection begins.
        prompts: training prompts when ``fit`` is given no datamodule; ``None`` takes the adapter's own.
        sampling: how rollouts are drawn; ``None`` takes the adapter's defaults, else the paper's.
        objective: what is maximised; likewise.
        optim: how; likewise.
        guard: bounds of the on-policy check.
        evaluation: what validation and test draw.
        eval_rewards: what they score with; ``None`` = with the rewards of training.
        turns: what the user says where ``sampling.plan`` has a ``turn``: texts, turn by turn, or a callable
            (:mod:`lightning_unigrpo.dialogue`).
    """

    automatic_optimization: bool

    def __init__(
        self,
        adapter: Adapter,
        rewards: list[Callable[..., Any]] | None = None,
        prompts: list[Prompt] | None = None,
        sampling: Sampling | None = None,
        objective: Objective | None = None,
        optim: Optim | None = None,
        guard: Guard | None = None,
        evaluation: Evaluation | None = None,
        eval_rewards: list[Callable[..., Any]] | None = None,
        turns: list[str] | Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.adapter = adapter
        defaults = adapter.defaults()
        self.sampling = _seeded(sampling or (defaults and defaults.sampling) or Sampling())
        self.objective = objective or (defaults and defaults.objective) or Objective()
        self.optim = optim or (defaults and defaults.optim) or Optim()
        self.guard = guard or Guard()
        self.iteration = 0
        self._rewards = self._choose_rewards(rewards, defaults)
        self._eval_rewards: list[Callable[..., Any]] = (
            [*wrap(eval_rewards)] if eval_rewards else self._rewards
        )
        self._prompts = prompts
        self.clock = PhaseClock()
        self._guarded = True  # nothing sampled yet that could be compared
        self._is_configured = False
        self._generators: States | None = None
        # A list: a bare Module would be registered.
        self.skeleton: list[nn.Module] = []
        self.rollout_mode: distributed.Mode | None = None
        self.rollout_cost: dict[str, float] = {}
        """``bytes`` of whole weights on each rank, and the ``seconds`` in which they were first gathered."""
        self.budget = MemoryBudget(adapter, self.sampling, self.optim)
        self._micro_batch_size = self.optim.micro_batch_size
        self.evaluation = evaluation or Evaluation()
        rounds = self.eval_sampling.num_images
        self.figures = Figures(reward_names(self._eval_rewards), self.evaluation, rounds)
        self.turns = None if turns is None else Turns(turns)
        self._fitting: set[str] = set()
        self._refuse_dropout()
        self._refuse_round_weights()
        self._refuse_silence()

    def _choose_rewards(
        self, rewards: Sequence[Callable[..., Any]] | None, defaults: Defaults | None
    ) -> list[Callable[..., Any]]:
        if rewards:
            return list(wrap(rewards))
        if defaults is not None:
            return list(wrap(defaults.rewards))
        rank_zero_warn(
            f"{type(self.adapter).__name__} brings no reward of its own, so images are scored by CLIPScore "
            "against their prompts. Pass rewards=[...] (YAML: model.rewards) to choose; docs/rewards.md "
            "lists what there is."
        )
        return list(wrap([CLIPScore()]))

    def _refuse_dropout(self) -> None:
        for name, rate in dropout_rates(self.adapter.net).items():
            raise ValueError(
                f"adapter.net.{name} is {rate}: with dropout, rollout and training would be two policies. "
                "Build the backbone (and its LoRA) with dropout 0."
            )

    def _refuse_round_weights(self) -> None:
        weights, rounds = self.objective.round_weights, self.sampling.num_images
        if weights is not None and len(weights) != rounds:
            raise ValueError(
                f"objective.round_weights is {weights}, and sampling.plan draws {rounds} images: give a "
                "weight for each."
            )

    def _refuse_silence(self) -> None:
        if "turn" not in self.sampling.kinds:
            return
        if self.turns is None:
            raise ValueError(
                f"sampling.plan is {self.sampling.plan}, but nobody says its turns: give model.turns (a list "
                "of texts, or a callable), or leave 'turn' out of the plan."
            )
        if not has_turns(self.adapter):
            raise ValueError(
                f"sampling.plan is {self.sampling.plan}, but {type(self.adapter).__name__} has no turn(text, "
                "behind): its layout has no place for what a user says in between. Leave 'turn' out."
            )

    def require_room(self, prompt: Prompt) -> None:
        """Raise when rollouts of a prompt may not fit, before anything is drawn.

        Raises:
            ValueError: saying how long what may be, and which setting to change.
        """
        self.adapter.require_room(prompt, self.sampling)
        speaker = self._speaker(self.sampling)
        for words in () if speaker is None else speaker.known(prompt):
            if words not in self._fitting:  # most say the same to every prompt
                said(self.adapter, words, TextSegment(tokens=torch.zeros(0)), self.sampling)
                self._fitting.add(words)

    def _speaker(self, sampling: Sampling) -> Turns | None:
        """Return what speaks for the user, where a plan lets him."""
        return self.turns if "turn" in sampling.kinds else None

    def _refuse_averaging(self) -> None:
        """Lightning's callback calls :meth:`configure_model` where no strategy shards, so none would."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        averaging = any(isinstance(c, WeightAveraging) for c in callbacks)
        if averaging and distributed.kind_of(self.trainer.strategy) != "whole":
            raise ValueError(
                "trainer.callbacks has a WeightAveraging (EMAWeightAveraging), which Lightning does not "
                "support where weights are sharded. Leave it out, or set trainer.strategy to ddp."
            )

    # ---- set-up

    @override
    def cpu(self) -> Self:
        """Stay where weights were never read: Lightning moves after an error, and its own would hide it."""
        return self if any(p.is_meta for p in self.parameters()) else super().cpu()

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Offer the three callbacks unless the user passed their own."""
        own: list[Callback] = [RolloutGrouping(), ReferenceVelocity(), RewardLogger()]
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in own if not any(isinstance(user, type(c)) for user in given)]

    @override
    def setup(self, stage: str) -> None:
        """Have checkpoints looked at before they are loaded: Lightning names their path nowhere earlier."""
        distributed.settle(self.trainer.strategy, self.optim.max_grad_norm)
        look_first(self.trainer.strategy, self.accept_checkpoint)

    @override
    def configure_model(self) -> None:
        """Read the weights, freeze what is not trained, and give each rank its part, once."""
        strategy, adapter = self.trainer.strategy, self.adapter
        if not self._is_configured:
            distributed.check_strategy(strategy, adapter.net)
            self._refuse_averaging()
            self._freeze()
            if distributed.is_sharded(strategy):
                self.skeleton = [distributed.skeleton_of(adapter.net)]
            adapter.net = distributed.shard(
                adapter.net, adapter.shard_units(), strategy, adapter.fill
            )
            adapter.materialize()
            self._is_configured = True
        for module in adapter.frozen_modules():  # no strategy moves what is not registered
            module.to(strategy.root_device).eval().requires_grad_(False)
        for callback in self._callbacks():
            callback.on_configure_model(self.trainer, self)

    def _freeze(self) -> None:
        groups = self.adapter.param_groups()
        idle = [p for name, group in groups.items() if not self._learning_rate(name) for p in group]
        for parameter in (*idle, *self.adapter.unreached(self.sampling.kinds)):
            parameter.requires_grad_(False)

    def _learning_rate(self, group: str) -> float:
        return self.optim.text_lr if group == "text" else self.optim.flow_lr

    def _trainable(self) -> dict[str, list[nn.Parameter]]:
        groups = self.adapter.param_groups()
        live = {name: [p for p in group if p.requires_grad] for name, group in groups.items()}
        return {name: parameters for name, parameters in live.items() if parameters}

    @override
    def on_fit_start(self) -> None:
        """Refuse a budget that this adapter cannot count with, before anything is drawn."""
        self.budget.check(str(self.trainer.precision))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = self._trainable()
        if not groups:
            raise ValueError(
                f"Nothing of {type(self.adapter).__name__} would be trained: its groups are "
                f"{ {n: len(group) for n, group in self.adapter.param_groups().items()} } with "
                f"model.optim.text_lr {self.optim.text_lr} and flow_lr {self.optim.flow_lr}."
            )
        for name, parameters in groups.items():
            if (
                distributed.kind_of(self.trainer.strategy) != "deepspeed"
            ):  # it steps in float32 copies
                warn_if_rounded_away(name, parameters, self._learning_rate(name))
        optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "lr": self._learning_rate(name), "name": name}
                for name, parameters in groups.items()
            ],
            betas=self.optim.betas,
            weight_decay=0.0,  # a decayed expert would drift without a reward ever asking for it
        )
        ramp = max(1, self.optim.warmup_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / ramp))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ---- one iteration

    @override
    def training_step(self, batch: list[Prompt], batch_idx: int) -> None:
        """Collect, then climb: the whole algorithm."""
        self.clock.start()
        if self._generators is not None:  # a resumed run does not draw what was drawn in between
            set_states(self._generators, self.device)
        experience = self.collect(batch)
        self.recompute_old(experience)
        for minibatch in self.minibatches(experience):
            self.update(minibatch, experience)
        self._log(experience)
        self.iteration += 1
        self._generators = get_states(self.device)

    def collect(self, prompts: Sequence[Prompt]) -> Experience:
        """Draw this rank's rollouts, score them, and turn rewards into advantages."""
        grouping = next(c for c in self._callbacks() if isinstance(c, RolloutGrouping))
        starts = grouping.assign(
            prompts,
            self.sampling.group_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        # Of all prompts, not only this rank's: ranks make the same calls.
        foot = self.budget.footprint(prompts, str(self.trainer.precision))
        rows, self._micro_batch_size = self.budget.drawn(foot), self.budget.scored(foot)
        self.adapter.eval()
        self.adapter.net.zero_grad(set_to_none=True)  # the caches need the memory
        experience = self._experience(starts, rows, evaluate=False)
        self._call("on_rollout_end", experience)
        self.adapter.train()
        self._call("on_rewards", experience)
        self._call("on_experience", experience)
        self._guarded = self.guard.action == "off"
        return experience

    def _experience(
        self, starts: Sequence[Start], rows: int | None, *, evaluate: bool
    ) -> Experience:
        trajectories: list[Trajectory] = []
        error: Exception | None = None
        rewards = self._eval_rewards if evaluate else self._rewards
        sampling = self.eval_sampling if evaluate else self.sampling
        sampling = replace(sampling, rows_per_chunk=rows)
        every_image = self._scores_every_image(evaluate=evaluate)
        rounds = max(1, sampling.num_images) if every_image else 1
        lengths: list[int] = []
        runner, speaker = RewardRunner(rewards, self.device), self._speaker(sampling)
        try:
            runner.prepare()
            if speaker is not None:
                speaker.prepare(self.device)
        except Exception as raised:  # a model or a service that only this rank misses
            error = raised
        distributed.agree(error)  # the rollout may call the others
        try:
            with runner, nullcontext() if speaker is None else closing(speaker):
                with self._rollout_weights():
                    for chunk in rollout(
                        self.adapter,
                        starts,
                        sampling,
                        # The same draws in every evaluation: curves then show the policy alone.
                        iteration=0 if evaluate else self.iteration,
                        evaluate=evaluate,
                        every_image=rounds > 1,
                        speaker=speaker,
                        progress=self.progress,
                    ):
                        trajectories += chunk
                        self.progress("reward", len(trajectories), len(starts))
                        parts = [after_each_round(t, rounds) for t in chunk]
                        lengths += map(len, parts)
                        runner.submit([part for each in parts for part in each])
                matrix, details = runner.finish(check=False)  # grouping asks over all ranks
        except Exception as raised:  # whatever a backbone or a required reward raises
            error = raised
        distributed.agree(error)
        by_round = table_of_rounds(matrix, lengths, rounds)
        matrix = by_round[:, -1]
        for trajectory, row in zip(trajectories, matrix.tolist(), strict=True):
            trajectory.rewards = dict(zip(runner.names, row, strict=True))
        return Experience(
            trajectories=trajectories,
            iteration=self.iteration,
            rewards=matrix.to(self.device),
            round_rewards=by_round.to(self.device) if rounds > 1 else None,
            reward_names=tuple(runner.names),
            reward_weights=runner.weights.to(self.device),
            details=details,
        )

    def _scores_every_image(self, *, evaluate: bool) -> bool:
        if evaluate:
            return self.evaluation.every_round
        return self.objective.round_rewards != "last"

    @contextmanager
    def _rollout_weights(self) -> Iterator[None]:
        """Let ``adapter.net`` be called for one token at a time."""
        if not self.skeleton:
            with distributed.cast_once(self.adapter.net):
                yield
            return
        strategy, (skeleton,) = self.trainer.strategy, self.skeleton
        if self.rollout_mode is None:
            self.rollout_mode = distributed.choose(
                self.sampling.rollout_weights, skeleton, strategy
            )
        if not self.rollout_cost:
            size = distributed.bytes_when_whole(skeleton, strategy)
            self.rollout_cost["bytes"] = size
            rank_zero_info(
                f"model.sampling.rollout_weights: {self.rollout_mode} (whole they take {size / GIB:.3g} "
                "GiB on each rank)"
            )
        if self.rollout_mode == "sharded":
            with distributed.unit_by_unit(self.adapter, skeleton, strategy):
                yield
            return
        with distributed.resident(self.adapter, skeleton, strategy) as seconds:
            if "seconds" not in self.rollout_cost:
                self.rollout_cost["seconds"] = seconds
                rank_zero_info(f"Whole weights were gathered in {seconds:.2g} s.")
            yield

    @torch.no_grad()
    def recompute_old(self, experience: Experience) -> None:
        """Replace the rollout's policy terms by the training path's, when precision asks for it.

        Cached decoding in bf16 is a slightly different policy from the packed pass. The old values then
        come from the packed pass, ``noise = (x_next - mean_old) / std``, and the mismatch is still
        measured.
        """
        choice = self.objective.old_log_prob
        if choice == "rollout" or (choice == "auto" and self._is_exact()):
            return
        mismatches = []
        for batch in self.micro_batches(experience.trajectories):
            scores = self.adapter(batch)
            mismatches.append(Mismatch.measure(scores, batch, self.sampling))
            self._adopt(scores, batch)
        self._check(mismatches, experience)

    def _adopt(self, scores: Scores, trajectories: Sequence[Trajectory]) -> None:
        text, codes = iter(scores.text), iter(scores.image_tokens)
        for _, segment in sampled(trajectories):
            if isinstance(segment, TextSegment):
                segment.log_prob = next(text)
            elif isinstance(segment, TokenImageSegment):
                segment.log_prob = next(codes)
        for images, velocity in by_shape(trajectories, scores.velocity):
            steps = Transitions.stack(images)
            mean, std = steps.moments(velocity, self.sampling)
            noise = (steps.x_next - mean) / std
            for image, v, e in zip(images, velocity, noise, strict=True):
                image.velocity, image.noise = v, e

    def minibatches(self, experience: Experience) -> Iterator[list[Trajectory]]:
        """Yield the parts of a collection that make one optimizer step each.

        ``ppo_epochs`` passes over ``updates_per_rollout`` disjoint parts, shuffled by (seed, iteration,
        pass). Ranks hold equally many trajectories, so they make equally many steps.
        """
        trajectories, parts = experience.trajectories, self.optim.updates_per_rollout
        if parts > len(trajectories):
            raise ValueError(
                f"model.optim.updates_per_rollout is {parts}, but a rank draws only "
                f"{len(trajectories)} trajectories; lower it, or raise data.prompts_per_iteration."
            )
        for epoch in range(self.optim.ppo_epochs):
            key = (self.sampling.seed or 0, experience.iteration, epoch)
            order = np.random.default_rng(key).permutation(len(trajectories))
            for part in np.array_split(order, parts):
                yield [trajectories[i] for i in sorted(part)]

    def micro_batches(self, trajectories: list[Trajectory]) -> Iterator[list[Trajectory]]:
        """Cut trajectories into forwards of what ``optim.micro_batch_size`` and ``activation_gib`` allow."""
        size = self._micro_batch_size or len(trajectories)
        for first in range(0, len(trajectories), size):
            batch = trajectories[first : first + size]
            distributed.require_alike(self.trainer.strategy, batch)
            yield batch

    def num_micro_batches(self, trajectories: list[Trajectory]) -> int:
        """Return how many forwards :meth:`micro_batches` makes of them."""
        return -(-len(trajectories) // (self._micro_batch_size or len(trajectories)))

    def update(self, minibatch: list[Trajectory], experience: Experience) -> None:
        """Make one optimizer step on a part of the experience."""
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        counts = self._global(count(minibatch, self.sampling))
        steps = slice(None) if self._needs_images() else slice(0, 0)
        metrics, mismatches = Metrics.empty(), []
        optimizer.zero_grad(set_to_none=True)
        for done, batch in enumerate(self.micro_batches(minibatch)):
            scores = self.adapter(batch, steps)
            if not self._guarded:
                mismatches.append(Mismatch.measure(scores, batch, self.sampling))
            loss, found = trajectory_loss(
                scores,
                batch,
                objective=self.objective,
                sampling=self.sampling,
                counts=counts,
            )
            is_last = done + 1 == self.num_micro_batches(minibatch)
            with distributed.accumulate(self.trainer.strategy, is_last=is_last):
                # Data-parallel strategies average gradients over ranks; our counts are already global.
                self.manual_backward(loss * distributed.world_size())
            metrics.add(found)
            self.progress("update", done + 1, self.num_micro_batches(minibatch))
        self._check(mismatches, experience)
        has_engine = distributed.kind_of(self.trainer.strategy) == "deepspeed"
        norms = distributed.clip_grad_norms(
            {} if has_engine else self._trainable(), self.optim.max_grad_norm, self.adapter.net
        )
        optimizer.step()
        norms |= distributed.engine_norms(self.trainer.strategy)
        cast(Any, self.lr_schedulers()).step()
        self.clock.tick("update")
        experience.metrics |= distributed.reduce_named(metrics.sums, metrics.maxima)
        experience.metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}

    def _needs_images(self) -> bool:
        """Whether steps of images are scored: also with weight 0 while the flow group trains.

        Every backward of every rank must reach the same parameters, or data-parallel ranks wait.
        """
        kind = self.adapter.image_policy
        return (
            self.objective.image_weight(kind) > 0
            or self.objective.needs_image_reference(kind)
            or "flow" in self._trainable()
        )

    def _global(self, counts: Counts) -> Counts:
        return Counts(*distributed.reduce_sum(torch.tensor(counts, device=self.device)).tolist())

    def _check(self, mismatches: Sequence[Mismatch], experience: Experience) -> None:
        """Log the guard's figures, and stop before the optimizer follows another policy."""
        if self._guarded:
            return
        self._guarded = True
        figures = distributed.reduce_named({}, Mismatch.largest(mismatches).named())
        experience.metrics |= figures
        problem = beyond_bounds(figures, self.guard, exact=self._is_exact())
        if problem and self.guard.action == "raise":
            raise OnPolicyError(problem)
        if problem:
            warnings.warn(problem, stacklevel=2)

    def _is_exact(self) -> bool:
        """Whether the run computes in float32 or better."""
        return str(self.trainer.precision) in {"32-true", "64-true"}

    # ---- evaluation

    @property
    def eval_sampling(self) -> Sampling:
        """What validation and test draw, and how."""
        return drawn_by(self.sampling, self.evaluation)

    def _rows_of(self, stage: str) -> int | None:
        loaders = getattr(self.trainer, f"{stage}_dataloaders")
        data = [each.dataset for each in (loaders if isinstance(loaders, list) else [loaders])]
        return self.budget.drawn_of_split(data, str(self.trainer.precision))

    @override
    def validation_step(self, batch: list[Prompt], batch_idx: int) -> dict[str, Experience]:
        return {"experience": self._evaluate(batch, "val")}

    @override
    def test_step(self, batch: list[Prompt], batch_idx: int) -> dict[str, Experience]:
        return {"experience": self._evaluate(batch, "test")}

    def _evaluate(self, prompts: Sequence[Prompt], stage: str) -> Experience:
        """Draw the trajectories of some prompts (greedy text, ODE, guidance if asked for) and score them."""
        starts = self._evaluation_starts(prompts)
        experience = self._experience(starts, self._rows_of(stage), evaluate=True)
        rewards = self.figures.add(stage, experience, self.objective)
        for trajectory, reward in zip(experience.trajectories, rewards.tolist(), strict=True):
            trajectory.reward = reward
        return experience

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.figures.finish("val"))

    @override
    def on_test_epoch_end(self) -> None:
        self.log_dict(self.figures.finish("test"))

    @override
    def predict_step(self, batch: list[Prompt], batch_idx: int) -> list[Trajectory]:
        """Return the trajectories of some prompts, unscored: a user's prompt has no label."""
        sampling = replace(self.eval_sampling, rows_per_chunk=self._rows_of("predict"))
        starts = self._evaluation_starts(batch)
        speaker = self._speaker(sampling)
        if speaker is not None:
            speaker.prepare(self.device)
        with nullcontext() if speaker is None else closing(speaker), self._rollout_weights():
            chunks = rollout(
                self.adapter,
                starts,
                sampling,
                evaluate=True,
                every_image=True,
                speaker=speaker,
                progress=self.progress,
            )
            return [trajectory for chunk in chunks for trajectory in chunk]

    def _evaluation_starts(self, prompts: Sequence[Prompt]) -> list[Start]:
        members = range(self.evaluation.num_images)
        return [Start(prompt, prompt.id, member) for prompt in prompts for member in members]

    # ---- prompts, when the user brings no datamodule

    @override
    def train_dataloader(self) -> DataLoader[Prompt | None]:
        return self._own_data("fit").train_dataloader()

    @override
    def val_dataloader(self) -> DataLoader[Prompt | None] | list[Any]:
        return self._own_data("validate").val_dataloader()

    @override
    def test_dataloader(self) -> DataLoader[Prompt | None]:
        return self._own_data("test").test_dataloader()

    def _own_data(self, stage: str) -> PromptDataModule:
        data = PromptDataModule.from_prompts(self._prompts or ())
        data.trainer = self.trainer
        data.setup(stage)
        return data

    # ---- what callbacks and checkpoints are told

    def _callbacks(self) -> list[UniGRPOCallback]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if isinstance(c, UniGRPOCallback)]

    def _call(self, hook: str, experience: Experience) -> None:
        for callback in self._callbacks():
            getattr(callback, hook)(self.trainer, self, experience)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Tell whoever displays it how far a phase of the collection is."""
        self.clock.tick(phase)
        for callback in self._callbacks():
            callback.on_phase(self.trainer, self, phase, done, total)

    def _log(self, experience: Experience) -> None:
        values = {"iteration": float(self.iteration), **experience.metrics}
        self.log_dict(
            {key: value for key, value in values.items() if key != "reward"},
            on_step=True,
            on_epoch=False,
        )
        self.log("reward", values["reward"], on_step=True, on_epoch=False, prog_bar=True)
        # Ranks wait for each other in every phase, so the first one's seconds are everybody's.
        rollouts = len(experience.trajectories) * distributed.world_size()
        costs = self.clock.figures(rollouts) | peak_memory(self.device)
        self.log_dict(costs, on_step=True, on_epoch=False, rank_zero_only=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["iteration"] = self.iteration
        checkpoint["rollout_mode"] = self.rollout_mode
        checkpoint["rollout_cost"] = self.rollout_cost
        checkpoint["generators"] = distributed.gather_objects(self._generators)
        checkpoint[ORIGIN] = self.origin()
        if distributed.kind_of(self.trainer.strategy) == "whole":
            names = {parameter: name for name, parameter in self.named_parameters()}
            optimizers = self.trainer.optimizers
            states = checkpoint.get("optimizer_states", [])
            checkpoint["optimizer_states"] = [*map(partial(by_name, names), optimizers, states)]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.iteration = checkpoint.get("iteration", 0)
        if self.sampling.rollout_weights == "auto":
            self.rollout_mode = checkpoint.get("rollout_mode")
        states = checkpoint.get("generators", [])
        if len(states) == distributed.world_size():
            self._generators = states[distributed.rank()]

    def origin(self) -> Origin:
        """Return what a checkpoint says of this run."""
        if not self._is_configured:
            self._freeze()
        net = self.skeleton[0] if self.skeleton else self.adapter.net
        return {
            **describe(self.adapter, net, self.sampling, self.objective, self.optim),
            "iteration": self.iteration,
            "strategy": distributed.kind_of(self.trainer.strategy),
            "world_size": self.trainer.world_size,
            "torch": str(torch.__version__),
        }

    def accept_checkpoint(self, path: str | Path, weights_only: bool | None = None) -> Path:
        """Return the checkpoint to load: ``path``, or the one before where it was never put in place.

        Raises:
            ValueError: when it is torn or of another policy, on every rank.
        """
        asked = Path(self.trainer.strategy.broadcast(path))
        found, fitting = find_whole(asked), self.trainer.state.fn == TrainerFn.FITTING
        error: Exception | None = None
        try:
            theirs = accept(found, self.origin(), fitting=fitting, weights_only=weights_only)
        except ValueError as raised:
            error = raised
        distributed.agree(error)
        if found != asked:
            rank_zero_warn(
                f"{asked} is not there: its writer was ended between two renames. The checkpoint before "
                f"it is loaded, {found}, of iteration {theirs['iteration']}."
            )
        for note in notes(theirs, self.origin()) if fitting else ():
            rank_zero_warn(note)
        return found


def _seeded(sampling: Sampling) -> Sampling:
    """Fill an open seed with that of ``seed_everything``, so that one number reproduces a run."""
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=int(os.environ.get("PL_GLOBAL_SEED", "0")))


@torch.no_grad()
def warn_if_rounded_away(name: str, parameters: Sequence[nn.Parameter], step: float) -> None:
    """Warn when most weights of a reduced precision stay as they are after a step.

    AdamW moves each weight by about its learning rate; bfloat16 has 8 significant bits, so
    ``w + 1e-6 == w`` from ``|w| = 5e-4`` on.

    Args:
        name: of the parameter group.
        parameters: its weights; the first 65,536 numbers of each are looked at.
        step: learning rate.
    """
    stuck = total = 0
    for parameter in parameters:
        if torch.finfo(parameter.dtype).bits < 32:
            part = parameter.detach().flatten()[: 1 << 16]
            stuck += int(((part.float() + step).to(part.dtype) == part).sum())
            total += len(part)
    if stuck > total / 2:
        warnings.warn(
            f"{stuck / total:.0%} of the weights in group {name!r} are {parameters[0].dtype} and too large "
            f"to change by optim.{name}_lr = {step:g}: they will not train. Keep float32 weights "
            "(adapter.dtype: float32, trainer.precision: bf16-mixed), or raise the rate.",
            stacklevel=2,
        )
