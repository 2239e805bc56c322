"""The weights that a rollout computes with: cast once, gathered once, or gathered by all ranks in step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, Protocol, TypeAlias

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn

from lightning_unigrpo.distributed import zero
from lightning_unigrpo.distributed.collectives import device, rank, reduce_max
from lightning_unigrpo.distributed.sharding import clean, kind_of, let_go, whole_parameters

Mode: TypeAlias = Literal["resident", "sharded"]


class HasNet(Protocol):
    """Anything that reaches the network by this name."""

    net: nn.Module


class CanIdle(zero.HasUnits, Protocol):
    """An adapter."""

    def idle(self) -> None:
        """Call ``net`` once, for nothing."""


def skeleton_of(net: nn.Module) -> nn.Module:
    """Return a copy of a network without memory for its weights, to be filled by :func:`resident`."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in net.parameters()
    }
    return copy.deepcopy(net, memo)


def compute_dtype(strategy: Strategy, kind: str) -> torch.dtype | None:
    """Return the dtype that matrix products run in; ``None`` = that of the weights.

    Args:
        strategy: FSDP and DeepSpeed cast all weights themselves.
        kind: of device, for autocast.
    """
    if isinstance(strategy, FSDPStrategy):
        precision = strategy.mixed_precision_config
        return precision.param_dtype if precision is not None else None
    if kind_of(strategy) == "deepspeed":
        return zero.dtype_of(strategy)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def is_cast(module: nn.Module, strategy: Strategy) -> bool:
    """Whether a module's weights are cast: FSDP and DeepSpeed cast all, autocast those of linear layers."""
    return kind_of(strategy) in ("fsdp", "deepspeed") or isinstance(module, nn.Linear)


@contextmanager
def cast_once(net: nn.Module) -> Iterator[None]:
    """Keep linear layers in the compute dtype while autocast is on: cast once, not at every token.

    The numbers are those of autocast, to the bit: it casts the same weights, but in every call, because
    its cache must be off where an optimizer steps inside the context. Without autocast nothing happens.

    Args:
        net: whose weights nobody changes inside the context; they are back afterwards.
    """
    kind = next((p.device.type for p in net.parameters()), "cpu")
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    places = [
        (layer, leaf, parameter)
        for layer in net.modules()
        if isinstance(layer, nn.Linear)
        for leaf, parameter in layer.named_parameters(recurse=False)
    ]
    # Other parameters, not other data: data of another dtype makes autograd forget what DDP hooked to it.
    cast = {p: nn.Parameter(p.detach().to(dtype), requires_grad=False) for _, _, p in places}
    try:
        for layer, leaf, parameter in places:
            setattr(layer, leaf, cast[parameter])
        yield
    finally:
        for layer, leaf, parameter in places:
            setattr(layer, leaf, parameter)


@contextmanager
def resident(holder: HasNet, skeleton: nn.Module, strategy: Strategy) -> Iterator[float]:
    """Gather the weights once, in the compute dtype, and free them afterwards.

    Gives the seconds that took.

    Inside, a rank calls the network as often as it likes. The casts are those of the training forward, so
    both are the same policy.

    Args:
        holder: its ``net`` is replaced meanwhile.
        skeleton: from :func:`skeleton_of`, before the network was sharded.
        strategy: that sharded it.
    """
    sharded, begin = holder.net, time.perf_counter()
    holder.net = _gathered(sharded, skeleton, strategy)
    if strategy.root_device.type == "cuda":
        torch.cuda.synchronize(strategy.root_device)
    seconds = time.perf_counter() - begin
    try:
        yield seconds
    finally:
        holder.net = sharded


def _gathered(net: nn.Module, skeleton: nn.Module, strategy: Strategy) -> nn.Module:
    whole = copy.deepcopy(skeleton)
    where = strategy.root_device
    dtype = compute_dtype(strategy, where.type)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in whole.modules():  # a weight that two modules share stands in both
        for leaf, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, leaf))
    for name, value in whole_parameters(net):
        parameter = whole.get_parameter(name)
        owners = places[id(parameter)]
        to = dtype if dtype is not None and is_cast(owners[0][0], strategy) else value.dtype
        filled = nn.Parameter(value.to(where, to, copy=True), requires_grad=False)
        for module, leaf in owners:
            setattr(module, leaf, filled)
    for name, buffer in net.named_buffers():
        path, _, leaf = clean(name).rpartition(".")
        setattr(whole.get_submodule(path), leaf, buffer)
    return whole.train(net.training)


@contextmanager
def unit_by_unit(holder: CanIdle, skeleton: nn.Module, strategy: Strategy) -> Iterator[None]:
    """Gather the weights at every call, all ranks in step (:func:`lockstep`).

    Args:
        holder: an adapter.
        skeleton: from :func:`skeleton_of`, before the network was sharded.
        strategy: that sharded it.
    """
    is_cut = kind_of(strategy) == "deepspeed"
    with (
        zero.unhooked(holder, skeleton) if is_cut else nullcontext(),
        lockstep(holder.net, holder.idle),
    ):
        yield


class RankLostError(BaseException):
    """A rank failed while all were gathering weights: it can neither go on nor wait, so it ends.

    No ``Exception``: whoever handles those would call the other ranks, and they are waiting for weights.
    """


@contextmanager
def lockstep(net: nn.Module, idle: Callable[[], object]) -> Iterator[None]:
    """Let a rank that is done go on calling the network until all are: each call gathers weights.

    Ranks may call it for different things and differently often inside, texts of other lengths, images of
    other sizes, an error between two calls: every call is announced, and whoever has none left joins in.

    Args:
        net: sharded.
        idle: calls it once, for nothing.

    Raises:
        RankLostError: for an error inside a call. The other ranks are then ended by what started them.
    """
    is_idle = is_inside = False
    flags = {busy: torch.tensor(float(busy), device=device()) for busy in (True, False)}

    def enter(*_: object) -> None:
        nonlocal is_inside
        if not is_idle:
            reduce_max(flags[True])
        is_inside = True

    def leave(*_: object) -> None:
        nonlocal is_inside
        is_inside = False

    # Before and after the hooks of the strategy, which gather.
    handles = [
        net.register_forward_pre_hook(enter, prepend=True),
        net.register_forward_hook(leave),
    ]
    try:
        yield
    except Exception as error:
        if is_inside:
            raise RankLostError(f"Rank {rank()} failed inside the network: {error!r}") from error
        raise
    finally:
        is_idle = True
        if not is_inside:
            with torch.no_grad():
                while bool(reduce_max(flags[False])):
                    idle()
            let_go(net)
        for handle in handles:
            handle.remove()


def choose(mode: Mode | Literal["auto"], skeleton: nn.Module, strategy: Strategy) -> Mode:
    """Decide how a rollout gets at sharded weights, the same on all ranks.

    ``auto``: resident where the weights leave a fifth of the device's memory on every rank.

    Args:
        mode: as set.
        skeleton: of the network.
        strategy: that shards it.
    """
    if mode != "auto":
        return mode
    if strategy.root_device.type != "cuda":
        return "resident"
    free, total = torch.cuda.mem_get_info(strategy.root_device)
    lacks = bytes_when_whole(skeleton, strategy) > free - total / 5
    return (
        "sharded" if bool(reduce_max(torch.tensor(float(lacks), device=device()))) else "resident"
    )


def bytes_when_whole(skeleton: nn.Module, strategy: Strategy) -> int:
    """Return what :func:`resident` will hold."""
    dtype = compute_dtype(strategy, strategy.root_device.type)
    return sum(
        p.numel() * (dtype if dtype and is_cast(module, strategy) else p.dtype).itemsize
        for module in skeleton.modules()
        for p in module.parameters(recurse=False)
    )
