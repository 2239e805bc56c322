"""What ranks send each other in an iteration, counted, against the formula of ``unigrpo estimate``.

Real training over gloo, 2 and 4 processes on this machine: DDP, FSDP, FSDP2, and FSDP's hybrid sharding
with two copies; rollouts with whole and with sharded weights. Which bytes are sent does not depend on the
machine. Times would, and are not measured.

Every collective becomes an operator of torch's dispatcher (``c10d::``, or ``_c10d_functional::`` from
DTensor) before it reaches gloo or NCCL, whoever asks for it: Python, FSDP's hooks, or the C++ reducer of
DDP, which patched functions of ``torch.distributed`` would not see. A ``TorchDispatchMode`` counts them
there, as torch's own ``CommDebugMode`` does, which has no bytes. Nothing is missed: process groups number
their collectives, and the numbers must agree. An operator that is not known ends the run.

What a rank receives of a message is that of a ring, as NCCL runs them where bandwidth counts. Beside it
stands what the loopback device carried meanwhile, per rank, against what gloo should send (its reduction to
parts is one for all ranks, so that counts twice). Other programs use that device too; alone it is in

    unshare -rn sh -c "ip link set lo up; python -m benchmarks.communication"

    python -m benchmarks.communication --out benchmarks/results/communication.json

What follows for large models is computed by ``benchmarks/scaling.py``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_unigrpo import Guard, Objective, Optim, Prompt, PromptDataModule, UniGRPOModule
from lightning_unigrpo import distributed as talk
from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig, BagelNet
from lightning_unigrpo.adapters.bagel.network import MLP
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.distributed import sharding, weights
from lightning_unigrpo.estimate import Setup, Traffic, estimate
from tests.ranks import CPUFSDPStrategy, strategy_of, trainer_of
from tests.ranks import run as run_ranks

PROMPTS, GROUP = 2, 4
NAMES = {"fsdp2": "ModelParallelStrategy"}
"""As ``unigrpo estimate`` calls them, where it does not."""
KINDS = {"hybrid": "HYBRID_SHARD", "grad_op": "SHARD_GRAD_OP", "no_shard": "NO_SHARD"}
"""FSDP's other ways to shard."""


# ---- counting


class Message(NamedTuple):
    """One collective of this rank."""

    phase: str
    group: str
    received: float
    """Bytes, as a ring."""
    wire: float
    """Bytes, as gloo's algorithms: a reduction to parts is one for all ranks."""


C10D = {
    "allreduce_": (0, 1, 2),
    "allreduce_coalesced_": (0, 1, 2),
    "allgather_": (0, 2, 1),
    "_allgather_base_": (0, 2, 1),
    "allgather_into_tensor_coalesced_": (0, 2, 1),
    "_reduce_scatter_base_": (1, 2, 1),
    "reduce_scatter_": (1, 2, 1),
    "reduce_scatter_tensor_coalesced_": (1, 2, 1),
    "broadcast_": (0, 1, 1),
    "barrier": (0, 1, 0),
}
"""Which argument is the whole message, which the group; how many times a rank receives the others' parts."""
FUNCTIONAL = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 2}
LOCAL = {"wait_tensor", "_wrap_tensor_autograd"}


class Meter(TorchDispatchMode):
    """Counts collectives by the phase they are made in."""

    def __init__(self) -> None:
        super().__init__()
        self.phases = ["other"]
        self.messages: list[Message] = []
        self.wire = 0
        """Bytes on the loopback device."""
        self.unseen = 0
        """Collectives that the process groups have numbered, and this has not counted."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            whole, where, times = C10D[name]
            group = dist.ProcessGroup.unbox(args[where])
            self._add(name, group, _nbytes(args[whole]) if times else 0, times)
        elif func.namespace == "_c10d_functional" and name not in LOCAL:
            group = dist.distributed_c10d._resolve_process_group(args[-1])
            parts = group.size() if name.startswith("all_gather") else 1
            self._add(name, group, _nbytes(args[0]) * parts, FUNCTIONAL[name])
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, group: dist.ProcessGroup, size: int, times: int) -> None:
        received = times * size * (group.size() - 1) / group.size()
        wire = received * (2 if "reduce_scatter" in name else 1)
        self.messages.append(Message(self.phases[-1], group.group_name, received, wire))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what follows under a name."""
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def inside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is counted under a name."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return counted

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Count one iteration, and forget the one before: the first makes what later ones keep."""
        self.messages.clear()
        dist.barrier()
        begin, before = _loopback(), _numbered()
        with self:
            yield
        self.unseen = _numbered() - before - len(self.messages)
        dist.barrier()
        self.wire = _loopback() - begin

    def traffic(self, replicas: str | None, *, whole: bool) -> dict[str, Traffic]:
        """Return what was counted, by phase.

        Args:
            replicas: name of the group that copies of a part form.
            whole: whether no weights are sharded, so that all ranks are replicas.
        """
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        for phase, group, received, _ in self.messages:
            across = group == replicas or (whole and phase == "update")
            found[phase][0] += 1
            found[phase][2 if across else 1] += received
        return {phase: Traffic(int(n), a, b) for phase, (n, a, b) in found.items()}


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_nbytes, value))


def _numbered() -> int:
    """Return how many collectives all groups of this rank have made."""
    groups = dist.distributed_c10d._world.pg_map
    return sum(int(group._get_sequence_number_for_group()) for group in groups)


def _loopback() -> int:
    """Return the bytes that processes of this machine have sent each other; 0 where Linux does not say."""
    devices = Path("/proc/net/dev")
    lines = devices.read_text().splitlines() if devices.is_file() else []
    return next((int(line.split()[9]) for line in lines if line.split()[0] == "lo:"), 0)


class Watched(UniGRPOModule):
    """Says which phase it is in."""

    meter: Meter

    def training_step(self, batch: list[Prompt], batch_idx: int) -> None:
        with self.meter.iteration(), self._patched():
            super().training_step(batch, batch_idx)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """Tell what this package exchanges from what strategies do."""
        inside = self.meter.inside
        with (
            mock.patch.object(talk, "agree", inside("scalars", talk.agree)),
            mock.patch.object(talk, "reduce_sum", inside("scalars", talk.reduce_sum)),
            mock.patch.object(talk, "reduce_named", inside("scalars", talk.reduce_named)),
            mock.patch.object(talk, "gather_rows", inside("rewards", talk.gather_rows)),
            mock.patch.object(sharding, "reduce_sum", inside("scalars", sharding.reduce_sum)),
            mock.patch.object(weights, "reduce_max", inside("flags", weights.reduce_max)),
        ):
            yield

    def _experience(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.phase("rollout"):
            return super()._experience(*args, **kwargs)

    def _call(self, hook: str, experience: Any) -> None:
        with self.meter.phase("reference" if hook == "on_rollout_end" else "other"):
            super()._call(hook, experience)

    def recompute_old(self, experience: Any) -> None:
        with self.meter.phase("old policy"):
            super().recompute_old(experience)

    def update(self, *args: Any) -> None:
        with self.meter.phase("update"):
            super().update(*args)


# ---- what is trained


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run, written as words between colons on a command line."""

    strategy: str
    rollout_weights: str = "resident"
    precision: str = "32-true"
    frozen: str = ""
    """``text`` or ``flow``: the expert that is not trained."""

    @classmethod
    def read(cls, text: str) -> Case:
        """Read the fields in order."""
        return cls(**dict(zip(cls.__dataclass_fields__, text.split(":"), strict=False)))

    @property
    def name(self) -> str:
        """What :meth:`read` reads."""
        return ":".join(str(value) for value in asdict(self).values()).rstrip(":")


class Endless:
    """An adapter that writes its texts to the end, so that estimate and run make the same calls."""

    def next_logits(self, cache: Any, tokens: Tensor | None, active: Tensor) -> Tensor:
        logits: Tensor = super().next_logits(cache, tokens, active)  # type: ignore[misc]
        logits[:, self.stop_token] = -1e4  # type: ignore[attr-defined]
        return logits


class EndlessDigits(Endless, DigitsAdapter):
    """The embedded model."""


class EndlessBagel(Endless, BagelAdapter):
    """Random weights; pictures of one colour."""

    def decode(self, latents: Tensor, grid: Any) -> Tensor:
        return latents.mean((1, 2)).sigmoid().view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


@dataclass(frozen=True)
class Model:
    """An adapter, and how it is sampled."""

    build: Callable[[], BagelAdapter]
    sampling: Sampling = field(
        default_factory=lambda: Sampling(
            group_size=GROUP,
            max_text_tokens=8,
            num_timesteps=6,
            window_size=2,
            rows_per_chunk=2,
        )
    )


class Nothing:
    """Prompts are empty here."""

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: list[int]) -> str:
        return ""


def small() -> BagelAdapter:
    """Return 8 layers of half the width of benchmarks/rollout.py's ``mid``: 12 million numbers."""
    config = BagelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_latent_size=4,
        bos=0,
        eos=1,
        start_of_image=2,
        end_of_image=3,
    )
    return EndlessBagel(config, Nothing(), default_size=(64, 64), gradient_checkpointing=True)


MODELS = {"digits": Model(EndlessDigits), "bagel": Model(small)}


class HybridStrategy(CPUFSDPStrategy):
    """Two copies of the weights; Lightning makes the mesh of a pair of numbers on CUDA only."""

    def setup_environment(self) -> None:
        shape = self.kwargs.pop("device_mesh")
        super().setup_environment()
        self.kwargs["device_mesh"] = init_device_mesh("cpu", shape)


def settings_of(case: Case, ranks: int) -> dict[str, Any]:
    """Return the arguments of FSDP's class."""
    if case.strategy not in KINDS:
        return {}
    mesh = {"device_mesh": (2, ranks // 2)} if case.strategy == "hybrid" else {}
    return {"sharding_strategy": KINDS[case.strategy], **mesh}


def strategy_for(case: Case, ranks: int) -> Strategy | str:
    if case.strategy not in KINDS:
        return strategy_of(case.strategy, ranks)
    made = HybridStrategy if case.strategy == "hybrid" else CPUFSDPStrategy
    return made(process_group_backend="gloo", **settings_of(case, ranks))


def brightness(*, images: Tensor, **_: Any) -> list[float]:
    return images.flatten(1).mean(1).tolist()


class Watch:
    """Counts the network calls of a rollout, and the weights that it holds in the middle of a layer."""

    def __init__(self, module: Watched) -> None:
        self.module, self.calls, self.held = module, 0, 0
        self.handle = register_module_forward_pre_hook(self._before)

    def _before(self, called: nn.Module, args: Any) -> None:
        if "rollout" not in self.module.meter.phases:
            return
        if isinstance(called, BagelNet):
            self.calls += 1
        if isinstance(called, MLP):
            self.held = max(self.held, gathered_bytes(self.module.adapter.net))


def gathered_bytes(net: nn.Module) -> int:
    """Return the bytes of weights that are whole at this moment; torch has no public names for this."""
    if not any(isinstance(m, FullyShardedDataParallel | FSDPModule) for m in net.modules()):
        return sum(p.nbytes for p in net.parameters())
    found = 0
    for module in net.modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            flat: Any = module._handle.flat_param
            found += flat._full_param_padded.untyped_storage().nbytes()
        elif isinstance(module, FSDPModule):
            for each in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                if each.sharded_state.name == "UNSHARDED":
                    found += each._unsharded_param.untyped_storage().nbytes()
    return found


def setup_of(case: Case, ranks: int) -> Setup:
    """Return what ``unigrpo estimate`` would be told."""
    return Setup(
        ranks=ranks,
        strategy="fsdp" if case.strategy in KINDS else NAMES.get(case.strategy, case.strategy),
        settings=settings_of(case, ranks),
        precision=case.precision,
        prompts_per_iteration=PROMPTS,
        prompt_tokens=1,
    )


def measure(folder: Path, model: Model, case: Case, ranks: int) -> dict[str, Any]:
    """Train two iterations, count the second, and estimate it."""
    torch.manual_seed(0)
    rates = {"text_lr": 1e-4, "flow_lr": 1e-4} | ({f"{case.frozen}_lr": 0.0} if case.frozen else {})
    module = Watched(
        model.build(),
        rewards=[brightness],
        sampling=replace(model.sampling, rollout_weights=case.rollout_weights),
        objective=Objective(truncation_reward=None),
        optim=Optim(**rates, ppo_epochs=2, micro_batch_size=1),
        guard=Guard(action="off"),  # texts without end are another policy
    )
    module.meter = Meter()
    expected = estimate(module, setup_of(case, ranks))
    trainer = trainer_of(
        "single",
        2 * module.optim.ppo_epochs,
        strategy=strategy_for(case, ranks),
        precision=case.precision,
        default_root_dir=folder,
    )
    watch = Watch(module)
    prompts = [Prompt(text="", id=i) for i in range(PROMPTS)]
    trainer.fit(module, PromptDataModule.from_prompts(prompts, prompts_per_iteration=PROMPTS))
    watch.handle.remove()
    replicas = None
    if case.strategy == "hybrid":
        replicas = trainer.strategy.kwargs["device_mesh"].get_group(0).group_name
    is_whole = case.strategy in ("ddp", "no_shard")
    counted = module.meter.traffic(replicas, whole=is_whole)
    names = ("decode_steps", "denoise_steps", "context_steps")
    return {
        "counted": {name: found._asdict() for name, found in counted.items()},
        "formula": {name: found._asdict() for name, found in expected.traffic.items()},
        "rollout calls": [watch.calls / 2, sum(getattr(expected, name) for name in names)],
        "rollout weights": None if is_whole else [watch.held, expected.memory["rollout weights"]],
        "wire": [module.meter.wire / ranks, sum(each.wire for each in module.meter.messages)],
        "not seen": module.meter.unseen,
        "metrics": {
            name: float(trainer.callback_metrics[name])
            for name in ("loss", "grad_norm/text", "grad_norm/flow")
            if name in trainer.callback_metrics
        },
    }


def rank(folder: Path, model: str, *cases: str) -> None:
    """What each process does; the first one writes."""
    ranks = int(os.environ["WORLD_SIZE"])
    found = {}
    for text in cases:
        found[text] = measure(folder, MODELS[model], Case.read(text), ranks)
        gc.collect()  # a trainer and its module hold each other
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def cases_for(model: str, ranks: int) -> list[Case]:
    """Return what is compared on a number of ranks; the larger model in float32 only, for time."""
    ways = [("ddp", "resident")]
    ways += [(s, w) for s in ("fsdp", "fsdp2") for w in ("resident", "sharded")]
    ways += [("hybrid", w) for w in ("resident", "sharded") if ranks > 2]
    found = [Case(strategy=s, rollout_weights=w) for s, w in ways]
    return found + [replace(c, precision="bf16-mixed") for c in found if model == "digits"]


def run(folder: Path, model: str, ranks: int, cases: list[Case], timeout: float = 600) -> Any:
    """Start the processes, and return what they found, by case."""
    names = [case.name for case in cases]
    run_ranks("benchmarks.communication:rank", ranks, folder, model, *names, timeout=timeout)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


# ---- the report


def report(title: str, found: dict[str, Any]) -> None:
    """Print counted and computed bytes of one model and number of ranks."""
    table = Table(title=title)
    for column in ("case", "phase", "calls", "formula", "kB received", "formula", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "phase") else "right")
    for case, result in found.items():
        for phase in result["counted"]:
            counted, formula = result["counted"][phase], result["formula"].get(phase)
            size, computed = (
                each and each["shards"] + each["replicas"] for each in (counted, formula)
            )
            row = [case, phase, f"{counted['calls']:,}"]
            if formula is None:
                table.add_row(*row, "", f"{size / 1e3:,.2f}", "", "")
                continue
            ratio = f"{size / computed:.4f}" if computed else ""
            row += [f"{formula['calls']:,}", f"{size / 1e3:,.2f}", f"{computed / 1e3:,.2f}"]
            table.add_row(*row, ratio)
        wire, due = result["wire"]
        row = [f"{each / 1e3:,.2f}" for each in (wire, due)]
        table.add_row(case, "wire", "", "", *row, f"{wire / due:.4f}")
        table.add_section()
    Console(width=120).print(table)


def main() -> None:
    """Count on 2 and 4 ranks, compare, and keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for ranks in args.ranks:
                found = run(Path(folder) / f"{model}{ranks}", model, ranks, cases_for(model, ranks))
                report(f"{model}, {ranks} ranks, bytes of one rank in one iteration", found)
                record[f"{model}, {ranks} ranks"] = found
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
