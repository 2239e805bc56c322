"""Reductions and gathers over ranks; the identity on a single process.

Every rank must call each function equally often, and in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def device() -> torch.device:
    """Return where collectives want their tensors."""
    if world_size() > 1 and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def reduce_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the elementwise sum over ranks of ``[*]``; one collective."""
    return _reduce(values, dist.ReduceOp.SUM, group)


def reduce_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks of ``[*]``; one collective."""
    return _reduce(values, dist.ReduceOp.MAX, None)


def _reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, op=op, group=group)
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


def gather_objects(value: object) -> list[object]:
    """Return what each rank gives, in rank order; for small things, they are pickled."""
    if world_size() == 1:
        return [value]
    found: list[object] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def agree(error: Exception | None) -> None:
    """Raise on every rank when any has an error: one that went on alone would wait for the others.

    Args:
        error: of this rank; ``None`` = it is well.

    Raises:
        Exception: this rank's own error, or a ``RuntimeError`` with the first rank's that has one.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"Rank {number} failed, so all stop: {message}")
