"""The only file that talks to other ranks: reductions, gathers, gradient norms, weights of a rollout.

Every function is the identity on a single process, and every rank must call it equally often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import Tensor, nn


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def reduce_sum(values: Tensor) -> Tensor:
    """Return the elementwise sum over ranks of ``[*]``; one collective."""
    return _reduce(values, dist.ReduceOp.SUM)


def reduce_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks of ``[*]``; one collective."""
    return _reduce(values, dist.ReduceOp.MAX)


def _reduce(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, op=op)
    return values


def reduce_named(sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor]) -> dict[str, float]:
    """Add ``sums`` and maximise ``maxima`` over ranks, two collectives for any number of keys.

    Args:
        sums: scalars; the same keys in the same order on all ranks.
        maxima: scalars, likewise.

    Returns:
        Python floats, the same on all ranks.
    """
    result: dict[str, float] = {}
    for values, reduce in ((sums, reduce_sum), (maxima, reduce_max)):
        if values:
            stacked = torch.stack([value.detach().float() for value in values.values()])
            result |= dict(zip(values, reduce(stacked).tolist(), strict=True))
    return result


def gather_rows(values: Tensor) -> Tensor:
    """Concatenate ``[n_r, ...]`` of all ranks in rank order; ranks may hold different n_r.

    Returns:
        ``[sum n_r, ...]``, the same on all ranks.
    """
    if world_size() == 1:
        return values
    sizes = [torch.zeros((), dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor(len(values), device=values.device))
    longest = max(int(size) for size in sizes)
    padded = values.new_zeros(longest, *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def clip_grad_norms(
    groups: Mapping[str, Sequence[nn.Parameter]], max_norm: float | None
) -> dict[str, float]:
    """Clip the gradient of each parameter group to its own norm.

    ``g <- g * min(1, max_norm / ||g||)``, group by group, so that one expert's gradient never scales
    the other's.

    Args:
        groups: name to parameters.
        max_norm: largest L2 norm; ``None`` only measures.

    Returns:
        The norm of each group before clipping.
    """
    limit = float("inf") if max_norm is None else max_norm
    return {
        name: float(nn.utils.clip_grad_norm_(list(parameters), limit))
        for name, parameters in groups.items()
        if any(p.grad is not None for p in parameters)
    }


def require_one_dtype(strategy: Strategy) -> None:
    """Refuse FSDP for a network of several dtypes, before anything is loaded.

    Raises:
        ValueError: saying what to use instead.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is FSDP, which flattens the weights of a block into one tensor of one dtype, "
            "but the adapter trains float32 LoRA weights on a base of another. Set trainer.strategy to ddp "
            "or to ModelParallelStrategy (FSDP2), or adapter.dtype to float32."
        )


@contextmanager
def rollout_weights(net: nn.Module) -> Iterator[None]:
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
    layers = (module for module in net.modules() if isinstance(module, nn.Linear))
    weights = {p: p.data for layer in layers for p in layer.parameters(recurse=False)}
    try:
        for parameter, value in weights.items():
            parameter.data = value.to(dtype)
        yield
    finally:
        for parameter, value in weights.items():
            parameter.data = value
