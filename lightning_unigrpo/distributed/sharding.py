"""How Lightning's strategies hold a network: in one piece, or a part on each rank.

FSDP and FSDP2 shard the network below the adapter, unit by unit, and leave the LightningModule alone: as
the root of FSDP its training step would run inside the root's own forward, where no backward may begin.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_unigrpo.distributed import zero
from lightning_unigrpo.distributed.collectives import rank, reduce_sum, world_size
from lightning_unigrpo.distributed.zero import Fill

Kind: TypeAlias = Literal["whole", "fsdp", "fsdp2", "deepspeed"]
WRAPPED = "_fsdp_wrapped_module."


def kind_of(strategy: Strategy) -> Kind:
    """Return how a strategy holds the weights."""
    if isinstance(strategy, FSDPStrategy):
        return "fsdp"
    if isinstance(strategy, ModelParallelStrategy):
        return "fsdp2"
    return "deepspeed" if isinstance(strategy, DeepSpeedStrategy) else "whole"


def is_sharded(strategy: Strategy) -> bool:
    """Whether a rank may hold a part of each weight."""
    return kind_of(strategy) in ("fsdp", "fsdp2") or zero.stage_of(strategy) == 3


def check_strategy(strategy: Strategy, net: nn.Module) -> None:
    """Refuse what cannot work, before anything is loaded.

    Raises:
        ValueError: saying what to use instead.
    """
    if kind_of(strategy) == "fsdp":
        dtypes = {p.dtype for p in net.parameters()}
        if len(dtypes) > 1:
            raise ValueError(
                "trainer.strategy is FSDP, which flattens the weights of a block into one tensor of one "
                f"dtype, but the adapter's network has {' and '.join(sorted(map(str, dtypes)))} (LoRA on a "
                "bfloat16 base). Set trainer.strategy to ddp or to ModelParallelStrategy (FSDP2), or "
                "adapter.dtype to float32."
            )
        if cast(FSDPStrategy, strategy).kwargs.get("use_orig_params") is False:
            raise ValueError(
                "FSDPStrategy.use_orig_params is False, which hides which weights belong to the text and "
                "which to the flow group; leave it out."
            )
        if cast(FSDPStrategy, strategy)._activation_checkpointing_kwargs:
            raise ValueError(
                "FSDPStrategy.activation_checkpointing_policy wraps modules behind the adapter's back; set "
                "adapter.gradient_checkpointing instead."
            )
    if kind_of(strategy) == "fsdp2":
        mesh = cast(ModelParallelStrategy, strategy).device_mesh
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"ModelParallelStrategy has tensor_parallel_size {mesh['tensor_parallel'].size()}, and the "
                "adapter has no plan for that. Give ModelParallelStrategy data_parallel_size: <number of "
                "ranks> and tensor_parallel_size: 1 ('auto' means tensor parallelism on one node)."
            )
    if kind_of(strategy) == "deepspeed":
        zero.check(strategy, net)


def shard(net: nn.Module, units: Sequence[nn.Module], strategy: Strategy, fill: Fill) -> nn.Module:
    """Give each rank its part of the network; no rank ever holds more than one unit whole.

    Weights that differ between ranks become those of rank 0.

    Args:
        net: may be on the meta device.
        units: submodules that are gathered one at a time. A user's ``auto_wrap_policy`` replaces them.
        strategy: FSDP, FSDP2, DeepSpeed stage 3; any other leaves the network as it is.
        fill: reads the weights of a unit.

    Returns:
        The network to call from now on.
    """
    if kind_of(strategy) == "deepspeed":
        zero.convert(net, strategy)
    if not is_sharded(strategy):
        return net
    if kind_of(strategy) == "deepspeed":
        return zero.shard(net, units, strategy, fill)
    names = {id(module): name for name, module in net.named_modules()}
    policy = _policy(strategy)
    parts = []
    for unit in () if policy is not None else units:
        name = names[id(unit)]
        fill(unit, f"{name}.")
        _from_rank_0(unit, but=[])
        parts.append(_wrap(unit, strategy, None))
        net.set_submodule(name, parts[-1])
    fill(net, "")
    _from_rank_0(net, but=parts)
    return _wrap(net, strategy, policy)


_POLICIES: WeakKeyDictionary[Strategy, Any] = WeakKeyDictionary()
"""The users' policies. They are taken from strategies, for Lightning would say that they are ignored."""


def _policy(strategy: Strategy) -> Any | None:
    """Return a user's ``auto_wrap_policy``; a reference is wrapped after the policy it is of, and alike."""
    given = getattr(strategy, "kwargs", {}).pop("auto_wrap_policy", None)
    if given is not None:
        _POLICIES[strategy] = given
    return _POLICIES.get(strategy)


def _wrap(module: nn.Module, strategy: Strategy, policy: Any | None) -> nn.Module:
    if kind_of(strategy) == "fsdp2":
        mesh = cast(ModelParallelStrategy, strategy).device_mesh["data_parallel"]
        return cast(nn.Module, fully_shard(module, mesh=mesh))
    precision = cast(FSDPStrategy, strategy).mixed_precision_config
    if precision is not None:
        # Noise levels and latents stay float32, and so do tables of angles: the network casts them itself.
        precision = replace(precision, cast_root_forward_inputs=False, buffer_dtype=torch.float32)
    wrapped: nn.Module = wrap(module, mixed_precision=precision, auto_wrap_policy=policy)
    return wrapped


def _from_rank_0(module: nn.Module, *, but: Sequence[nn.Module]) -> None:
    """Make parameters and buffers those of rank 0, except those of some parts."""
    if world_size() == 1:
        return
    done = {id(t) for part in but for t in (*part.parameters(), *part.buffers())}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in done:
            dist.broadcast(tensor.detach(), 0)


def no_sync(strategy: Strategy) -> AbstractContextManager[None]:
    """Return a context whose backward leaves gradients to be reduced by a later one.

    Under DDP, that is: where weights are sharded, whole gradients would stay in memory until then.
    """
    if isinstance(strategy, DDPStrategy):
        return strategy.block_backward_sync()
    return nullcontext()


def accumulate(strategy: Strategy, *, is_last: bool) -> AbstractContextManager[None]:
    """Return the context for one of the backwards of an optimizer step.

    Args:
        strategy: any.
        is_last: whether the step follows.
    """
    if kind_of(strategy) == "deepspeed":
        return zero.accumulate(strategy, is_last=is_last)
    return nullcontext() if is_last else no_sync(strategy)


def clean(name: str) -> str:
    """Return a parameter's name without what FSDP puts into it."""
    return name.replace(WRAPPED, "")


@torch.no_grad()
def whole_parameters(
    net: nn.Module, names: Container[str] | None = None, *, writeback: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters in one piece, unit by unit; every rank must take them all.

    Each is valid until the next is asked for.

    Args:
        net: sharded or not.
        names: of those that are wanted, without what FSDP puts into them; ``None`` = all.
        writeback: where weights are sharded, whether what is written into them is kept.
    """

    def wanted(name: str) -> bool:
        return names is None or name in names

    if zero.is_cut(net):
        yield from zero.parameters(net, names, writeback=writeback)
        return
    units = [m for m in net.modules() if isinstance(m, FullyShardedDataParallel)]
    if not units:
        for name, parameter in net.named_parameters():
            if wanted(name):
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                yield name, whole
        return
    paths = {id(module): name for name, module in net.named_modules()}
    units[0].check_is_root()  # before any unit is gathered, which would take itself for the root
    for unit in units:
        inner = {
            id(p) for m in unit.modules() if m in units and m is not unit for p in m.parameters()
        }
        own = {
            clean(f"{paths[id(unit)]}.{name}").lstrip("."): name
            for name, p in unit.named_parameters()
            if id(p) not in inner
        }
        if any(map(wanted, own)):
            with FullyShardedDataParallel.summon_full_params(
                unit, recurse=False, writeback=writeback
            ):
                for name, inside in own.items():
                    if wanted(name):
                        yield name, unit.get_parameter(inside)


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    """Return all parameters on the CPU of rank 0, and nothing elsewhere; every rank must call it."""
    found = {}
    for name, value in whole_parameters(net):
        if rank() == 0:
            found[name] = value.detach().to("cpu", copy=True)
    return found


@torch.no_grad()
def load_whole(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write whole parameters into a network, each rank its part."""
    for name, parameter in net.named_parameters():
        if isinstance(parameter, DTensor):
            value = state[name].to(parameter.device)
            parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    if not any(isinstance(p, DTensor) for p in net.parameters()):
        for name, whole in whole_parameters(net, writeback=True):
            if rank() == 0 or not zero.is_cut(
                net
            ):  # rank 0's count, and its part of a checkpoint holds them
                whole.copy_(state[name])


def let_go(net: nn.Module) -> None:
    """Free what a forward without a backward leaves gathered, which is the root.

    It would fill memory, and be read again in place of parts that have changed meanwhile.
    """
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle  # FSDP has no public name for this
            if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
                handle.reshard(True)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy one network's weights into another that is sharded in the same way; no rank needs another."""
    if zero.is_cut(source):
        zero.copy_weights(source, target)
        return
    let_go(source)
    let_go(target)
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.copy_(new)


def fill_from(net: nn.Module) -> Fill:
    """Return what fills a skeleton with the weights of a network, unit by unit."""

    def fill(part: nn.Module, prefix: str) -> None:
        lacking = {prefix + name: name for name, p in part.named_parameters() if p.is_meta}
        for name, value in whole_parameters(net, lacking):
            path, _, leaf = lacking[name].rpartition(".")
            filled = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            setattr(part.get_submodule(path), leaf, filled)

    return fill


def clip_grad_norms(
    groups: Mapping[str, Sequence[nn.Parameter]], max_norm: float | None, net: nn.Module
) -> dict[str, float]:
    """Clip the gradient of each parameter group to its own norm.

    ``g <- g * min(1, max_norm / ||g||)``, group by group, so that one expert's gradient never scales
    the other's. Where ranks hold parts, squares are added up over them: one collective for all groups.

    Args:
        groups: name to parameters.
        max_norm: largest L2 norm; ``None`` only measures.
        net: the network they belong to.

    Returns:
        The norm of each group before clipping, the same on all ranks.
    """
    local = {
        name: [_part(p.grad) for p in group if p.grad is not None] for name, group in groups.items()
    }
    local = {name: [g for g in gradients if g.numel()] for name, gradients in local.items()}
    some = next((p for group in groups.values() for p in group), None)
    if some is None:
        return {}
    zero = torch.zeros((), device=some.device)
    squares = torch.stack(
        [sum((g.float().square().sum() for g in gradients), zero) for gradients in local.values()]
    )
    group = _shard_group(net)
    norms = (squares if group is None else reduce_sum(squares, group)).sqrt()
    if max_norm is not None:
        for gradients, norm in zip(local.values(), norms, strict=True):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))
    return dict(zip(local, norms.tolist(), strict=True))


def _part(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _shard_group(net: nn.Module) -> Any | None:
    """Return the ranks over which a gradient's parts are spread; None = each rank has all of it."""
    if isinstance(net, FullyShardedDataParallel):
        from torch.distributed.fsdp import ShardingStrategy

        return None if net.sharding_strategy == ShardingStrategy.NO_SHARD else net.process_group
    some = next(net.parameters())
    return some.device_mesh.get_group() if isinstance(some, DTensor) else None
