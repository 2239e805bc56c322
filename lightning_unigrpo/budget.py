"""How many trajectories are drawn, and scored, together: from bytes per trajectory and a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_unigrpo.adapter import Adapter, Footprint
from lightning_unigrpo.config import Optim, Sampling, compute_dtype
from lightning_unigrpo.types import IMAGE_MARK, Prompt, TextSegment

GIB = 1 << 30


def rows_within(gib: float | None, nbytes: int, at_most: int | None = None) -> int | None:
    """Return how many rows of so many bytes fit into a budget, at least one.

    ``min(at_most, max(1, floor(gib * 2^30 / nbytes)))``

    Args:
        gib: the budget, GiB, > 0; ``None`` = no budget.
        nbytes: of a row, > 0.
        at_most: another bound, >= 1; ``None`` = none.

    Returns:
        A number of rows; ``None`` = any.

    Example:
        >>> rows_within(1.0, 300 * 2**20), rows_within(1.0, 300 * 2**20, at_most=2)
        (3, 2)
        >>> rows_within(0.1, 300 * 2**20), rows_within(None, 300 * 2**20)
        (1, None)
    """
    fit = None if gib is None else max(1, int(gib * GIB / nbytes))
    return min((bound for bound in (fit, at_most) if bound is not None), default=None)


def too_small(gib: float | None, nbytes: int, key: str) -> str | None:
    """Say that a budget does not hold one row, in words; None when it does.

    Args:
        gib: the budget, GiB; ``None`` = no budget.
        nbytes: of a row.
        key: the setting of the budget.
    """
    if gib is None or nbytes <= gib * GIB:
        return None
    return (
        f"{key} is {gib:g}, but a single trajectory needs {nbytes / GIB:.3g} GiB: they are run one at a "
        f"time, beyond the budget. Raise {key}, or shorten texts and images."
    )


def largest_footprint(
    adapter: Adapter,
    prompts: Iterable[Prompt],
    sampling: Sampling,
    *,
    dtype: torch.dtype,
    evaluate: bool = False,
) -> Footprint:
    """Return the bytes per trajectory that suffice for any chunk of these prompts.

    That of the longest request with the most demanding images: rows of a chunk are padded to each other.
    Where images differ in size the cache counts twice, because a rollout draws the rows of each size from
    a copy.

    Args:
        adapter: with a footprint.
        prompts: at least one; walked through once.
        sampling: plan, lengths, window.
        dtype: of computation.
        evaluate: whether in evaluation.

    Raises:
        NotImplementedError: when the adapter has none.
    """
    longest, bare = 0, {}
    nothing = _num_words(adapter, Prompt(text=""))
    for prompt in prompts:
        # Without pixels: to encode them is expensive, and those of a whole data set would not fit.
        shapes = tuple(pixels.shape for pixels in prompt.images)
        images = tuple(torch.empty(shape, device="meta") for shape in shapes)
        marks = "".join(IMAGE_MARK for _ in images if IMAGE_MARK in prompt.text)
        bare[prompt.size, shapes, marks] = Prompt(text=marks, size=prompt.size, images=images)
        pieces = [replace(prompt, text=words, images=()) for words in prompt.pieces() if words]
        longest = max(longest, sum(_num_words(adapter, piece) - nothing for piece in pieces))
    found = [
        adapter.footprint(
            sampling,
            prompt_tokens=longest,
            dtype=dtype,
            prompt=prompt,
            evaluate=evaluate,
        )
        for prompt in bare.values()
    ]
    copies = 2 if len({adapter.image_grid(prompt) for prompt in bare.values()}) > 1 else 1
    return Footprint(
        cache=copies * max(each.cache for each in found),
        activations=max(each.activations for each in found),
    )


def _num_words(adapter: Adapter, prompt: Prompt) -> int:
    segments = adapter.tokenize(prompt)
    return sum(len(s.tokens) for s in segments if isinstance(s, TextSegment))


class MemoryBudget:
    """Turns ``sampling.cache_gib`` and ``optim.activation_gib`` into rows, the same on all ranks.

    Args:
        adapter: says what a trajectory takes.
        sampling: with the first budget, and ``rows_per_chunk``.
        optim: with the second, and ``micro_batch_size``.
    """

    def __init__(self, adapter: Adapter, sampling: Sampling, optim: Optim) -> None:
        self.adapter, self.sampling, self.optim = adapter, sampling, optim
        self._told: set[tuple[str, bool]] = set()
        self._split: tuple[list[Iterable[Prompt]], Footprint | None] | None = None

    def check(self, precision: str) -> None:
        """Refuse a budget that this adapter cannot count with.

        Raises:
            ValueError: when it has no footprint.
        """
        self._told.clear()
        self.footprint([Prompt(text="")], precision)

    def footprint(
        self, prompts: Iterable[Prompt], precision: str, *, evaluate: bool = False
    ) -> Footprint | None:
        """Return what a trajectory of these prompts takes, at most; None where no budget asks.

        Args:
            prompts: the same on all ranks.
            precision: of the trainer.
            evaluate: whether in evaluation.

        Raises:
            ValueError: when the adapter has no footprint.
        """
        gib = (self.sampling.cache_gib, self.optim.activation_gib)
        if gib == (None, None):
            return None
        dtype = compute_dtype(precision)
        try:
            return largest_footprint(
                self.adapter, prompts, self.sampling, dtype=dtype, evaluate=evaluate
            )
        except NotImplementedError as error:
            keys = (
                ("model.sampling.cache_gib", "model.sampling.rows_per_chunk"),
                ("model.optim.activation_gib", "model.optim.micro_batch_size"),
            )
            given = [pair for pair, budget in zip(keys, gib, strict=True) if budget is not None]
            key, instead = map(" and ".join, zip(*given, strict=True))
            raise ValueError(
                f"{key}: {type(self.adapter).__name__} has no footprint(...) that tells how large a "
                f"trajectory is. Leave it out, and set {instead} instead."
            ) from error

    def drawn(self, foot: Footprint | None, where: str = "drawn together") -> int | None:
        """Return how many rollouts are drawn together; None = all of a rank."""
        gib, most = self.sampling.cache_gib, self.sampling.rows_per_chunk
        return self._fitting("model.sampling.cache_gib", gib, foot and foot.cache, most, where)

    def scored(self, foot: Footprint | None) -> int | None:
        """Return how many trajectories are in a micro-batch; None = all of an update."""
        gib, most = self.optim.activation_gib, self.optim.micro_batch_size
        nbytes = foot and foot.activations
        return self._fitting("model.optim.activation_gib", gib, nbytes, most, "in a forward")

    def drawn_of_split(self, data: list[Iterable[Prompt]], precision: str) -> int | None:
        """Return how many rollouts of an evaluation are drawn together.

        By the longest prompt of the whole split: ranks hold other batches of it, and those that went by
        their own batch would make other numbers of calls.

        Args:
            data: the prompts of the split.
            precision: of the trainer.
        """
        if self.sampling.cache_gib is None:
            return self.sampling.rows_per_chunk
        if self._split is None or self._split[0] != data:  # reading input images takes a while
            foot = self.footprint(chain.from_iterable(data), precision, evaluate=True)
            self._split = data, foot
        return self.drawn(self._split[1], "drawn together in evaluation")

    def _fitting(
        self, key: str, gib: float | None, nbytes: int | None, at_most: int | None, where: str
    ) -> int | None:
        """Count rows, and say once what was found."""
        if gib is None or nbytes is None:
            return at_most
        rows, problem = rows_within(gib, nbytes, at_most), too_small(gib, nbytes, key)
        if (where, problem is None) not in self._told:
            self._told.add((where, problem is None))
            if problem is not None:
                rank_zero_warn(problem)
            else:
                size = nbytes / GIB
                rank_zero_info(f"{key} {gib:g}: {rows} trajectories {where}, {size:.3g} GiB each")
        return rows
