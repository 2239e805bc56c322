"""``unigrpo estimate``: what a configuration needs, before anything is loaded or downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_unigrpo.budget import rows_within, too_small
from lightning_unigrpo.config import compute_dtype, num_steps
from lightning_unigrpo.module import UniGRPOModule

UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20))
SHARDING = ("fsdp", "modelparallel", "deepspeed_stage_3")
"""What in a strategy's name says that each rank holds a part of the weights."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is not in the module."""

    ranks: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    prompts_per_iteration: int = 32
    prompt_tokens: int = 64
    """Words of a request."""

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and moments are cut into."""
        name = self.strategy.lower().rsplit(".", 1)[-1]
        return self.ranks if any(part in name for part in SHARDING) else 1

    @property
    def compute(self) -> torch.dtype:
        """The dtype of matrix products."""
        return compute_dtype(self.precision)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Numbers of one rank; memory in bytes."""

    parameters: int
    """Of the network, over all ranks."""
    trainable: int
    """Of these, in training."""
    frozen: int
    """Parameters outside the network (autoencoder, vision tower)."""
    memory: dict[str, int]
    """By what holds it."""
    rollout_rows: int
    """Trajectories that are drawn together."""
    update_rows: int
    """Trajectories of one forward while learning."""
    too_small: list[str]
    """What a budget does not hold, in words."""
    decode_steps: int
    """Text forwards of an iteration, at the longest."""
    denoise_steps: int
    """Image forwards of an iteration."""
    reference_forwards: int
    old_forwards: int
    """Forwards that recompute the old policy, in reduced precision."""
    update_forwards: int
    """Forwards (each with its backward) of one optimizer step."""
    optimizer_steps: int
    """Of an iteration."""

    @property
    def resident(self) -> int:
        """Bytes that are always held."""
        return sum(
            self.memory[name] for name in ("weights", "gradients", "moments", "reference", "frozen")
        )

    @property
    def rollout(self) -> int:
        """Bytes while trajectories are drawn."""
        return self.resident + self.memory["rollout weights"] + self.memory["rollout cache"]

    @property
    def update(self) -> int:
        """Bytes while a micro-batch is scored."""
        return self.resident + self.memory["activations"]


def nbytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the size of parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def estimate(module: UniGRPOModule, setup: Setup) -> Estimate:
    """Estimate one rank's share of a run.

    Args:
        module: its adapter may be on the meta device.
        setup: ranks, strategy, precision, prompts.

    Raises:
        NotImplementedError: when the adapter does not say how large its caches and activations are.
    """
    adapter, sampling, optim = module.adapter, module.sampling, module.optim
    lr = {"text": optim.text_lr, "flow": optim.flow_lr}
    trained = [p for name, group in adapter.param_groups().items() for p in group if lr[name] > 0]
    weights = [*adapter.net.parameters()]
    linear = [
        p
        for child in adapter.net.modules()
        if isinstance(child, nn.Linear)
        for p in child.parameters(recurse=False)
    ]
    needs_twin = module.objective.needs_reference and adapter.reference() is None
    foot = adapter.footprint(sampling, prompt_tokens=setup.prompt_tokens, dtype=setup.compute)
    rows = -(-setup.prompts_per_iteration * sampling.group_size // setup.ranks)
    together = min(
        rows, rows_within(sampling.cache_gib, foot.cache, sampling.rows_per_chunk) or rows
    )
    chunks = -(-rows // together)
    per_step = -(-rows // optim.updates_per_rollout)
    fit = rows_within(optim.activation_gib, foot.activations, optim.micro_batch_size)
    batch = min(per_step, fit or per_step)
    missing = (
        too_small(sampling.cache_gib, foot.cache, "model.sampling.cache_gib"),
        too_small(optim.activation_gib, foot.activations, "model.optim.activation_gib"),
    )
    frozen = [p for child in adapter.frozen_modules() for p in child.parameters()]
    mixed = "mixed" in setup.precision
    cast = [p for p in linear if mixed and p.dtype != setup.compute]
    size = torch.finfo(setup.compute).bits // 8
    calls = num_steps(sampling.num_timesteps, sampling.schedule)
    passes = -(-rows // batch)
    needs_old = module.objective.old_log_prob == "recompute" or (
        module.objective.old_log_prob == "auto" and setup.compute != torch.float32
    )
    return Estimate(
        parameters=sum(p.numel() for p in weights),
        trainable=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in frozen),
        memory={
            "weights": nbytes(weights) // setup.shards,
            "gradients": nbytes(trained) // setup.shards,
            "moments": 2 * nbytes(trained) // setup.shards,
            "reference": nbytes(weights) // setup.shards if needs_twin else 0,
            "frozen": nbytes(frozen),
            "rollout weights": sum(p.numel() for p in cast) * size,
            "rollout cache": together * foot.cache,
            "activations": batch * foot.activations,
        },
        rollout_rows=together,
        update_rows=batch,
        too_small=[text for text in missing if text],
        decode_steps=chunks * sampling.plan.count("text") * sampling.max_text_tokens,
        denoise_steps=chunks * sampling.plan.count("image") * calls,
        reference_forwards=passes if module.objective.needs_reference else 0,
        old_forwards=passes if needs_old else 0,
        update_forwards=-(-per_step // batch),
        optimizer_steps=optim.ppo_epochs * optim.updates_per_rollout,
    )


def report(found: Estimate, setup: Setup) -> None:
    """Print an estimate."""
    table = Table(title=f"one of {setup.ranks} ranks, {setup.strategy}, {setup.precision}")
    largest = max(found.rollout, found.update)
    name, unit = next((pair for pair in UNITS if largest >= pair[1]), UNITS[-1])
    table.add_column("memory")
    table.add_column(name, justify="right")
    for name, size in found.memory.items():
        table.add_row(name, f"{size / unit:.2f}")
    table.add_section()
    table.add_row("while drawing", f"{found.rollout / unit:.2f}")
    table.add_row("while learning", f"{found.update / unit:.2f}")
    console = Console()
    console.print(
        f"{found.parameters:,} parameters in the network, {found.trainable:,} of them trained; "
        f"{found.frozen:,} frozen beside it"
    )
    console.print(table)
    console.print(
        f"an iteration: {found.rollout_rows} rollouts at a time, {found.decode_steps:,} text and "
        f"{found.denoise_steps:,} image forwards, {found.reference_forwards:,} of the reference, "
        f"{found.old_forwards:,} for the old policy; {found.optimizer_steps} optimizer steps of "
        f"{found.update_forwards:,} forwards and backwards each, {found.update_rows} trajectories at a time"
    )
    for text in found.too_small:
        console.print(text)
    console.print(
        "Without the allocator's slack, gathered shards, copies of weights while learning in a mixed "
        "precision, and reward models. Texts are counted at their longest, requests at "
        f"{setup.prompt_tokens} words, without input images."
    )
