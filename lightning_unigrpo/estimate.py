"""``unigrpo estimate``: what a configuration needs, before anything is loaded or downloaded.

Memory of one rank, forwards of an iteration, and what a rank receives from others meanwhile. The last is
compared with counted bytes by ``benchmarks/communication.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_unigrpo.budget import rows_within, too_small
from lightning_unigrpo.config import compute_dtype
from lightning_unigrpo.module import UniGRPOModule

UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20))
LINK_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
"""Decimal, as bandwidths are."""
SHARDED = ("weights", "gradients", "moments", "reference")
"""What FSDP cuts into parts, and may keep on the host."""
FLAG = 4
"""Bytes that ranks exchange before every network call of a sharded rollout."""
BUCKETS = (1 << 20, 25 << 20)
"""Bytes of DDP's first bucket of gradients, and of the others."""

Kind: TypeAlias = Literal["whole", "fsdp", "fsdp2", "deepspeed"]
KINDS: tuple[tuple[str, Kind], ...] = (
    ("fsdp", "fsdp"),
    ("modelparallel", "fsdp2"),
    ("deepspeed", "deepspeed"),
)
"""What in a strategy's name says how it holds the weights."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is not in the module."""

    ranks: int = 1
    strategy: str = "auto"
    """Name or class path."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the strategy's class."""
    precision: str = "32-true"
    prompts_per_iteration: int = 32
    prompt_tokens: int = 64
    """Words of a request."""

    def __post_init__(self) -> None:
        """Refuse a number of ranks that the strategy would refuse.

        Raises:
            ValueError: naming the key.
        """
        key, expected = mesh_of(self.settings)
        if key and expected != self.ranks:
            raise ValueError(
                f"trainer.strategy.init_args.{key} makes {expected} ranks, but --ranks is {self.ranks}; "
                "they must be the same number."
            )

    @classmethod
    def read(cls, strategy: Any, *, ranks: int | None, **others: Any) -> Setup:
        """Read what a configuration has as ``trainer.strategy``.

        Args:
            strategy: a name, or a namespace with ``class_path`` and ``init_args``.
            ranks: ``None`` takes the number that the strategy names, else 1.
            others: the other fields.
        """
        if isinstance(strategy, str):
            return cls(strategy=strategy, ranks=ranks or 1, **others)
        arguments = vars(strategy.get("init_args") or {})
        settings = {key: value for key, value in arguments.items() if value is not None}
        ranks = ranks or mesh_of(settings)[1]
        return cls(strategy=strategy.class_path, settings=settings, ranks=ranks, **others)

    @property
    def kind(self) -> Kind:
        """How the strategy holds the weights."""
        name = self.strategy.lower().rsplit(".", 1)[-1]
        return next((kind for part, kind in KINDS if part in name), "whole")

    @property
    def stage(self) -> int:
        """Of DeepSpeed: from 1 on moments are cut into parts, from 2 on gradients, from 3 on weights."""
        if self.kind != "deepspeed":
            return 0
        given = self.settings.get("config") or {}
        given = given.get("zero_optimization", {}) if isinstance(given, dict) else {}
        named = self.strategy.lower().partition("stage_")[2][:1]
        return int(named or given.get("stage", self.settings.get("stage", 2)))

    @property
    def sharding(self) -> str:
        """FSDP's sharding strategy, which may be given by name."""
        given = self.settings.get("sharding_strategy", "FULL_SHARD")
        return str(getattr(given, "name", given)).upper()

    @property
    def shards(self) -> int:
        """Parts that weights are cut into; ``ranks / shards`` ranks hold the same part."""
        if self.kind == "fsdp2" or self.stage == 3:
            return self.ranks
        if self.kind != "fsdp" or self.sharding == "NO_SHARD":
            return 1
        if "HYBRID" in self.sharding:
            return int(self.settings.get("device_mesh", (1, self.ranks))[1])
        return self.ranks

    @property
    def compute(self) -> torch.dtype:
        """The dtype of matrix products."""
        return compute_dtype(self.precision)

    @property
    def casts(self) -> bool:
        """Whether products are in another dtype than the weights may be."""
        return self.precision not in {"32-true", "64-true"}


def mesh_of(settings: Mapping[str, Any]) -> tuple[str, int]:
    """Return the argument that fixes the number of ranks, and the number; ``("", 1)`` without one."""
    if settings.get("device_mesh"):
        return "device_mesh", prod(settings["device_mesh"])
    sizes = [settings.get(f"{name}_parallel_size", "auto") for name in ("data", "tensor")]
    return ("", 1) if "auto" in sizes else ("data_parallel_size", prod(sizes))


class Traffic(NamedTuple):
    """What one rank receives in an iteration, and sends: collectives run as rings."""

    calls: int
    """Collectives; about, under DDP, whose buckets take whole gradients."""
    shards: float
    """Bytes from the ranks that hold the other parts of the same weights."""
    replicas: float = 0.0
    """Bytes from the ranks that hold the same part (all others under DDP)."""


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
    on_host: frozenset[str]
    """What of it lies in the memory of the host, where FSDP offloads."""
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
    context_steps: int
    """Forwards that read the prompt, and what was drawn, into caches; a system prompt or an input image is
    one more each."""
    reference_forwards: int
    old_forwards: int
    """Forwards that recompute the old policy, in reduced precision."""
    update_forwards: int
    """Forwards (each with its backward) of one optimizer step."""
    optimizer_steps: int
    """Of an iteration."""
    traffic: dict[str, Traffic]
    """By phase of an iteration; empty where it is not known (DeepSpeed)."""

    @property
    def rollout(self) -> int:
        """Bytes on the device while trajectories are drawn; gradients are freed before."""
        return self._held(but={"gradients", "activations"})

    @property
    def update(self) -> int:
        """Bytes on the device while a micro-batch is scored."""
        return self._held(but={"rollout weights", "rollout cache"})

    def _held(self, *, but: set[str]) -> int:
        return sum(size for name, size in self.memory.items() if name not in self.on_host | but)


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
    calls = module.adapter.image_calls(sampling)
    passes = -(-rows // batch)
    needs_old = module.objective.old_log_prob == "recompute" or (
        module.objective.old_log_prob == "auto" and setup.compute != torch.float32
    )
    forwards = {
        "decode_steps": chunks * sum(s.max_tokens for s in sampling.steps if s.kind == "text"),
        "denoise_steps": chunks * sampling.num_images * calls,
        "context_steps": chunks * len(sampling.kinds),
        "reference_forwards": passes
        if module.objective.needs_reference(module.adapter.image_policy)
        else 0,
        "old_forwards": passes if needs_old else 0,
        "update_forwards": -(-per_step // batch),
        "optimizer_steps": optim.ppo_epochs * optim.updates_per_rollout,
    }
    net = Network.of(module, setup)
    return Estimate(
        parameters=sum(p.numel() for p in net.weights),
        trainable=sum(p.numel() for p in net.trained),
        frozen=sum(p.numel() for p in frozen),
        memory={
            **net.memory(),
            "frozen": nbytes(frozen),
            "rollout cache": together * foot.cache,
            "activations": batch * foot.activations,
        },
        on_host=frozenset(SHARDED if setup.settings.get("cpu_offload") else ()),
        rollout_rows=together,
        update_rows=batch,
        too_small=[text for text in missing if text],
        **forwards,
        traffic=net.traffic(forwards, rewards=_rewards_bytes(module, setup)),
    )


def _rewards_bytes(module: UniGRPOModule, setup: Setup) -> int:
    """Return what is gathered of all rollouts.

    Group, last round and rewards of each round in float64, rewards of the last in float32; each rank's count.
    """
    rollouts = setup.prompts_per_iteration * module.sampling.group_size
    rewards = len(module._rewards)
    rounds = 1 if module.objective.round_rewards == "last" else module.sampling.num_images
    return rollouts * (8 * (2 + rounds * rewards) + 4 * rewards) + 2 * 8 * setup.ranks


@dataclass(frozen=True, kw_only=True)
class Network:
    """The weights, as a strategy holds and moves them."""

    setup: Setup
    units: list[list[nn.Parameter]]
    """What is gathered together, and freed after its forward."""
    root: list[nn.Parameter]
    """The rest: gathered by the first forward, and kept until a backward ends."""
    trained: list[nn.Parameter]
    linear: set[nn.Parameter]
    """Weights that autocast casts."""
    needs_twin: bool
    """Whether the reference is a copy."""
    rollout_weights: str
    """``sharded``, or gathered once per collection."""

    @classmethod
    def of(cls, module: UniGRPOModule, setup: Setup) -> Network:
        """Look at a module's network, before it is sharded."""
        adapter, optim = module.adapter, module.optim
        lr = {"text": optim.text_lr, "flow": optim.flow_lr}
        units = [list(unit.parameters()) for unit in adapter.shard_units()]
        inside = {p for unit in units for p in unit}
        idle = set(adapter.unreached(module.sampling.kinds))
        groups = adapter.param_groups()
        return cls(
            setup=setup,
            units=units,
            root=[p for p in adapter.net.parameters() if p not in inside],
            trained=[p for n, group in groups.items() if lr[n] > 0 for p in group if p not in idle],
            linear={
                p
                for child in adapter.net.modules()
                if isinstance(child, nn.Linear)
                for p in child.parameters(recurse=False)
            },
            needs_twin=module.objective.needs_reference(adapter.image_policy)
            and adapter.reference() is None,
            rollout_weights=module.sampling.rollout_weights,
        )

    @property
    def weights(self) -> list[nn.Parameter]:
        """All parameters."""
        return [*(p for unit in self.units for p in unit), *self.root]

    # ---- memory

    def memory(self) -> dict[str, int]:
        """Return the bytes that a rank holds of the weights and of what belongs to them."""
        setup = self.setup
        held, trained = nbytes(self.weights), nbytes(self.trained)
        cut = [setup.shards] * 3
        if setup.kind == "deepspeed":
            cut = [setup.ranks if setup.stage >= least else 1 for least in (3, 2, 1)]
        # DDP averages gradients in buffers of their size, which hold them too if it is told so.
        buckets = trained if setup.kind == "whole" and setup.ranks > 1 else 0
        views = buckets and setup.settings.get("gradient_as_bucket_view")
        low = 1.0  # what DeepSpeed keeps in the compute dtype beside its parts in float32
        if setup.kind == "deepspeed" and "mixed" in setup.precision:
            low = self._computed(self.weights) / held
        return {
            "weights": int(held * low) // cut[0],
            "master weights": trained // cut[2] if low < 1 else 0,
            "gradients": 0 if views else int(trained * low) // cut[1],
            "buckets": buckets,
            "moments": 2 * trained // cut[2],
            "reference": int(held * low) // cut[0] * self.needs_twin,
            "rollout weights": self._rollout_weights(),
        }

    def _computed(self, parameters: Iterable[nn.Parameter]) -> int:
        """Return the bytes of weights in the dtype of the products that they are in."""
        all_cast = self.setup.kind in ("fsdp", "deepspeed")  # autocast leaves all but linear layers
        size = torch.finfo(self.setup.compute).bits // 8
        return sum(
            p.numel()
            * (size if self.setup.casts and (all_cast or p in self.linear) else p.element_size())
            for p in parameters
        )

    def _rollout_weights(self) -> int:
        """Return what a rollout holds beside the weights at rest."""
        setup = self.setup
        if setup.shards == 1:  # what is in the compute dtype already is used as it is
            if setup.kind == "deepspeed" or "mixed" not in setup.precision:
                return 0
            return self._computed(p for p in self.linear if p.dtype != setup.compute)
        if self.rollout_weights == "sharded":
            return self.gathered
        return self._computed(self.weights)

    @property
    def gathered(self) -> int:
        """Bytes of what is whole inside a forward: the root, and one unit; under ``SHARD_GRAD_OP`` all."""
        units = [self._moved(unit) for unit in self.units] or [0]
        all_stay = self.setup.sharding == "SHARD_GRAD_OP"
        return self._moved(self.root) + (sum(units) if all_stay else max(units))

    # ---- communication

    def _moved(self, parameters: Iterable[nn.Parameter], *, computed: bool = True) -> int:
        """Return the bytes of weights as they are gathered.

        FSDP flattens a unit and casts it; FSDP2 moves each weight as it is, cut along its first axis.

        Args:
            parameters: of one unit.
            computed: in the compute dtype, as a forward of FSDP does.
        """
        shards, found = self.setup.shards, list(parameters)
        if self.setup.kind == "fsdp":
            size = self._computed(found[:1]) / found[0].numel() if computed and found else 4
            if not computed and found:
                size = found[0].element_size()
            return int(size * _padded(sum(p.numel() for p in found), shards))
        if self.setup.kind == "deepspeed":
            return self._computed(found)
        return sum(
            _padded(len(p), shards) * (p.numel() // len(p)) * p.element_size() for p in found
        )

    def _reduced(self, unit: list[nn.Parameter]) -> int:
        """Return the bytes of gradients that a backward of a unit adds up over ranks."""
        trained = set(self.trained)
        if self.setup.kind == "fsdp":  # flattened, so all of it or nothing
            return self._moved(unit) if trained.intersection(unit) else 0
        return self._moved(p for p in unit if p in trained)

    def traffic(self, forwards: Mapping[str, int], *, rewards: int = 0) -> dict[str, Traffic]:
        r"""Return what a rank receives in each phase of an iteration.

        Of ``S`` bytes over ``k`` ranks: ``(k - 1) / k S`` when gathered or reduced to parts,
        ``2 (k - 1) / k S`` when reduced for all. With ``U`` the bytes of all units, ``R`` of the root, ``G``
        of gradients, ``s`` shards, ``r`` replicas:

        * rollout, resident: ``U + R`` once, in the weights' own dtype; sharded: ``R`` once, ``U`` for every
          network call, and a flag before each;
        * reference and old policy: ``U`` for every forward, ``R`` once;
        * update: for every forward and backward ``2 U + R`` gathered and ``G`` reduced to parts, each part
          then added up over the replicas. The first needs no ``R`` that an earlier forward of the same
          weights has left;
        * ``SHARD_GRAD_OP``: units stay gathered as the root does, ``U = 0`` and ``R`` is all;
        * DDP: gradients once per optimizer step, reduced for all ranks.

        Args:
            forwards: the fields of :class:`Estimate` that count forwards.
            rewards: bytes that are gathered of all ranks.

        Returns:
            By phase; empty for DeepSpeed, which was not measured.
        """
        setup = self.setup
        if setup.kind == "deepspeed":
            return {}
        ring = _ring(setup.ranks)
        found = {
            "rollout": Traffic(0, 0.0),
            "flags": Traffic(0, 0.0),
            "rewards": Traffic(4 if ring else 0, rewards * ring),
            "reference": Traffic(0, 0.0),
            "old policy": Traffic(0, 0.0),
            "update": Traffic(0, 0.0),
        }
        steps, passes = forwards["optimizer_steps"], forwards["update_forwards"]
        if setup.kind == "whole":
            size = nbytes(self.trained)
            buckets = 1 + -(-max(0, size - BUCKETS[0]) // BUCKETS[1]) if ring else 0
            return found | {"update": Traffic(steps * buckets, 0.0, steps * 2 * size * ring)}
        calls = sum(forwards[f"{name}_steps"] for name in ("decode", "denoise", "context"))
        if self.rollout_weights != "sharded":
            found["rollout"] = self._once()
        else:
            found["rollout"] = self._gathered(calls, 1)
            found["flags"] = Traffic(calls + 1, 2 * ring * FLAG * (calls + 1))
        left = False  # whether an earlier forward of the policy has left what stays
        for name, key in (("reference", "reference_forwards"), ("old policy", "old_forwards")):
            if forwards[key]:
                of_twin = name == "reference" and self.needs_twin
                found[name] = self._gathered(forwards[key], int(of_twin or not left))
                left = left or not of_twin
        found["update"] = self._update(steps * passes, left=left)
        return found

    def _once(self) -> Traffic:
        """Return what gathering all weights in their own dtype takes: FSDP by unit, FSDP2 by weight."""
        parts, ring = [*self.units, self.root], _ring(self.setup.shards)
        if not ring:
            return Traffic(0, 0.0)
        size = ring * sum(self._moved(part, computed=False) for part in parts)
        return Traffic(len(parts) if self.setup.kind == "fsdp" else len(self.weights), size)

    def _gathered(self, going: int, staying: int) -> Traffic:
        """Return what gathering takes.

        Args:
            going: how often what is freed after a forward: the units.
            staying: how often what stays until a backward ends: the root, and under ``SHARD_GRAD_OP`` all.
        """
        units, ring = list(map(self._moved, self.units)), _ring(self.setup.shards)
        if not ring:
            return Traffic(0, 0.0)
        times = staying if self.setup.sharding == "SHARD_GRAD_OP" else going
        size = ring * (times * sum(units) + staying * self._moved(self.root))
        return Traffic(times * len(units) + staying, size)

    def _update(self, backwards: int, *, left: bool) -> Traffic:
        gathered = self._gathered(2 * backwards, backwards - left)
        reduced = [size for size in map(self._reduced, [*self.units, self.root]) if size]
        shards, replicas = self.setup.shards, self.setup.ranks // self.setup.shards
        size, inside, across = sum(reduced) * backwards, _ring(shards), _ring(replicas)
        return Traffic(
            gathered.calls + len(reduced) * backwards * (bool(inside) + bool(across)),
            gathered.shards + inside * size,
            2 * across * size / shards,
        )


def _ring(ranks: int) -> float:
    """Return the part of a message that each rank receives when all gather it."""
    return (ranks - 1) / ranks


def _padded(number: int, parts: int) -> int:
    return -(-number // parts) * parts


def report(found: Estimate, setup: Setup) -> None:
    """Print an estimate."""
    title = f"one of {setup.ranks} ranks, {setup.strategy.rsplit('.', 1)[-1]}, {setup.precision}"
    table = Table(title=title)
    name, unit = _unit(UNITS, max(found.rollout, found.update))
    table.add_column("memory")
    table.add_column(name, justify="right")
    for name, size in found.memory.items():
        if size:
            where = " (host)" if name in found.on_host else ""
            table.add_row(name + where, f"{size / unit:.2f}")
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
    if setup.ranks > 1:
        report_traffic(console, found, setup)
    for text in found.too_small:
        console.print(text)
    console.print(
        "Without the allocator's slack, gathered shards, copies of weights while learning in a mixed "
        "precision, and reward models. Texts are counted at their longest, requests at "
        f"{setup.prompt_tokens} words, without input images."
    )


def report_traffic(console: Console, found: Estimate, setup: Setup) -> None:
    """Print what a rank receives from others in an iteration."""
    if not found.traffic:
        console.print("What DeepSpeed's ranks exchange was not measured and is not estimated.")
        return
    name, unit = _unit(LINK_UNITS, max(t.shards + t.replicas for t in found.traffic.values()))
    table = Table(title="received by a rank in an iteration")
    table.add_column("phase")
    table.add_column("collectives", justify="right")
    table.add_column(f"{name} of shards", justify="right")
    table.add_column(f"{name} of replicas", justify="right")
    for phase, (calls, shards, replicas) in found.traffic.items():
        if calls:
            table.add_row(phase, f"{calls:,}", f"{shards / unit:,.2f}", f"{replicas / unit:,.2f}")
    console.print(table)


def _unit(units: tuple[tuple[str, int], ...], largest: float) -> tuple[str, int]:
    return next((pair for pair in units if largest >= pair[1]), units[-1])
