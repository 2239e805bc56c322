"""The contract between a unified backbone and everything else: one policy, two views of it.

Sampling walks through caches (:meth:`Adapter.prefill`, :meth:`Adapter.next_logits`,
:meth:`Adapter.velocity`); learning goes through one packed, teacher-forced pass
(:meth:`Adapter.forward`). Both must be the same policy: ``testing.check_adapter`` says where they are
not. Backbones never see rewards, advantages or strategies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_unigrpo.config import Sampling, num_steps
from lightning_unigrpo.types import (
    Defaults,
    Grid,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    Trajectory,
)

ImagePolicy: TypeAlias = Literal["flow", "tokens", "masked"]
C = TypeVar("C", bound="Cache")


class Cache(ABC):
    """What a backbone remembers of ``B`` prefixes; everything but the row operations is private."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows B."""

    @abstractmethod
    def select(self: C, rows: Tensor) -> C:
        """Return a new cache with the rows ``[n]`` (int64, any order, repeats allowed)."""

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many more tokens in every row, where that saves moving; nothing by default."""
        return

    def expand(self, counts: Sequence[int]) -> Self:
        """Return a new cache in which row b stands ``counts[b]`` times, in order."""
        repeats = torch.as_tensor(counts)
        return self.select(torch.arange(len(self)).repeat_interleave(repeats))


class Footprint(NamedTuple):
    """Bytes per trajectory."""

    cache: int
    """Keys and values of a rollout, when they are most."""
    activations: int
    """What a forward keeps for its backward."""


SIZES_ONLY: ContextVar[bool] = ContextVar("SIZES_ONLY", default=False)
"""Set while ``unigrpo estimate`` builds an adapter: it needs sizes, and no files that can do without."""


class Adapter(nn.Module, ABC):
    """A unified backbone seen as one policy over text and images.

    Sigma convention everywhere: 1 = noise, 0 = data; velocity = dx/dsigma = noise - data. Adapters
    convert from whatever their backbone uses. Every trainable weight is reached through a call of
    ``self.net`` (sharding strategies wrap that module and nothing else); frozen parts live outside it
    and are listed by :meth:`frozen_modules`.

    Text is opened, decoded and closed by the adapter: marks that the layout forces (the begin mark of
    a text, the stop token of a text that ran into its limit, begin and end of an image) are fed by
    :meth:`next_logits` and :meth:`extend` and are never actions of the policy. A given text may be a
    request, or an answer that was sampled in an earlier round: an answer ends with the stop token or has
    ``stopped=False``, which tells the two apart where the layout opens and closes answers only.
    """

    net: nn.Module
    """The trainable network, the unit that strategies wrap."""
    stop_token: int
    """Id that ends a sampled text; it is itself an action."""
    latent_channels: int = 0
    """C of the latent tokens (continuous images)."""
    image_policy: ClassVar[ImagePolicy] = "flow"
    """How images are drawn: continuous latents by a flow, or discrete codes, one after the other
    (``tokens``) or several at a step, each seen by the rest from then on (``masked``)."""

    # ---- from the user's request to given segments, and back to words and pixels

    @abstractmethod
    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return the given segments of a prompt: template, system text, input images."""

    @abstractmethod
    def detokenize(self, tokens: Tensor) -> str:
        """Return the words of ``[L]`` token ids, the stop token left out."""

    @abstractmethod
    def image_grid(self, prompt: Prompt) -> Grid:
        """Return the latent grid ``(h, w)`` of the image this prompt asks for."""

    @abstractmethod
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Turn clean latents ``[B, N, C]`` (or codes ``[B, N]``) into ``[B, 3, H, W]`` in [0, 1].

        One rank may call it alone: it must not call ``net``.
        """

    def look(self, image: Any, *, turn_follows: bool = False) -> Any:
        """Return a drawn image, of codes or latents, as later segments will see it, with its ``views``.

        The same by default.

        Args:
            image: with ``is_context``.
            turn_follows: whether the user speaks next (:meth:`turn`). Where the layout shows a picture in a
                turn of the user, that one is then left open.
        """
        return image

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return what the user says in the middle of a dialogue, with the layout's marks around it.

        Args:
            text: in words.
            behind: the segment before it: an answer, or an image that :meth:`look` left in an open turn.
        """
        raise TypeError(
            f"{type(self).__name__} has no turn(text, behind): leave 'turn' out of sampling.plan, or let the "
            "adapter say how its layout opens and closes what a user says."
        )

    # ---- sampling, without gradients, through a cache

    @abstractmethod
    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> Cache:
        """Read B ragged contexts of any interleaving into a new cache; an empty context is legal."""

    @abstractmethod
    def extend(self, cache: Cache, segments: Sequence[Segment]) -> None:
        """Append one segment to each of the B rows, in place; equal to :meth:`prefill` of the longer lists.

        A text that was just decoded into this cache by :meth:`next_logits` is completed, not repeated:
        only what is missing of it (its last token, a forced stop mark) is fed. An image that is not
        ``is_context`` adds nothing: no later segment sees it.
        """

    @abstractmethod
    def next_logits(self, cache: Cache, tokens: Tensor | None, active: Tensor) -> Tensor:
        """Feed one token per row and return the logits of the next.

        Args:
            cache: of B rows; rows with ``active`` False are left exactly as they were.
            tokens: ``[B]`` int64, the tokens just sampled; ``None`` opens a new text in the active rows.
            active: ``[B]`` bool.

        Returns:
            ``[B, V]`` logits, untempered; rows that are not active hold anything finite. What must never
            be drawn as a word (marks, codes) is left out behind V, or is -inf.
        """

    def velocity(self, cache: Cache, latents: Tensor, sigma: Tensor, grid: Grid) -> Tensor:
        """Return the velocity of noisy latents seen after each row's context; the cache stays as it was.

        Args:
            cache: of B rows.
            latents: ``[B, N, C]`` float32.
            sigma: ``[B]`` float32 in [0, 1].
            grid: ``(h, w)``, the same for all rows of a call.

        Returns:
            ``[B, N, C]`` float32.
        """
        raise self._draws_otherwise("velocity")

    def next_image_logits(self, cache: Cache, tokens: Tensor, step: int, grid: Grid) -> Tensor:
        """Return the logits of the next code of images that are drawn one code after the other.

        Args:
            cache: of B rows; it may remember the image in progress, begun at step 0.
            tokens: ``[B, N]`` int64 codes, those from ``step`` on still unknown (-1).
            step: number of the code, from 0 (which begins the image anew).
            grid: ``(h, w)``, the same for all rows.

        Returns:
            ``[B, V]`` logits of code ``step``, untempered.
        """
        raise self._draws_otherwise("next_image_logits")

    def masked_logits(self, cache: Cache, tokens: Tensor, where: Tensor, grid: Grid) -> Tensor:
        """Return the logits of codes of images of which some are masked; the cache stays as it was.

        Args:
            cache: of B rows.
            tokens: ``[B, N]`` int64 codes, -1 where masked.
            where: ``[B, N]`` bool, the n codes that are asked for; any, none in some rows.
            grid: ``(h, w)``, the same for all rows.

        Returns:
            ``[n, V]`` logits, row by row, untempered.
        """
        raise self._draws_otherwise("masked_logits")

    def _draws_otherwise(self, method: str) -> TypeError:
        return TypeError(
            f"{type(self).__name__} has no {method}: its image_policy is {self.image_policy!r}."
        )

    def image_prefix(self, cache: Cache) -> Sequence[Tensor] | None:
        """Return the words ``[P]`` that each row's next image is drawn behind; None = its context itself.

        For layouts in which text and image are no one sequence. The rollout records them in the image's
        segment, and :meth:`forward` scores the image behind those that are recorded.

        Raises:
            ValueError: when they do not fit the layout: nothing is cut off.
        """
        return None

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> Any | None:
        """Return what guided *evaluation* compares these contexts with; None = not offered.

        By default a cache, of contexts without the request. :meth:`guided_velocity` and
        :meth:`guided_image_logits` are its only readers.
        """
        return None

    def guided_velocity(
        self,
        cache: Cache,
        unconditional: Any,
        latents: Tensor,
        sigma: Tensor,
        grid: Grid,
        *,
        scale: float,
    ) -> Tensor:
        """Return ``v_u + scale * (v - v_u)``; arguments as in :meth:`velocity`.

        Args:
            cache: of B rows.
            unconditional: from :meth:`guidance` of the same rows.
            latents: ``[B, N, C]`` float32.
            sigma: ``[B]`` float32, the same in all rows.
            grid: ``(h, w)``.
            scale: of the guidance; 1 = none.

        Returns:
            ``[B, N, C]`` float32.
        """
        base = self.velocity(unconditional, latents, sigma, grid)
        return base + scale * (self.velocity(cache, latents, sigma, grid) - base)

    def guided_image_logits(
        self,
        cache: Cache,
        unconditional: Any,
        tokens: Tensor,
        step: int,
        grid: Grid,
        *,
        scale: float,
    ) -> Tensor:
        """Return ``u + scale * (c - u)`` of the logits of the next code; see :meth:`next_image_logits`.

        Args:
            cache: of B rows.
            unconditional: from :meth:`guidance` of the same rows.
            tokens: ``[B, N]`` int64 codes.
            step: number of the code.
            grid: ``(h, w)``.
            scale: of the guidance; 1 = none.
        """
        found = self.next_image_logits(cache, tokens, step, grid)
        base = self.next_image_logits(unconditional, tokens, step, grid)
        return base + scale * (found - base)

    def guided_masked_logits(
        self,
        cache: Cache,
        unconditional: Any,
        tokens: Tensor,
        where: Tensor,
        grid: Grid,
        *,
        scale: float,
    ) -> Tensor:
        """Return ``u + scale * (c - u)`` of the logits of masked codes; see :meth:`masked_logits`.

        Args:
            cache: of B rows.
            unconditional: from :meth:`guidance` of the same rows.
            tokens: ``[B, N]`` int64 codes.
            where: ``[B, N]`` bool.
            grid: ``(h, w)``.
            scale: of the guidance; 1 = none.
        """
        found = self.masked_logits(cache, tokens, where, grid)
        base = self.masked_logits(unconditional, tokens, where, grid)
        return base + scale * (found - base)

    # ---- learning: the only differentiable path

    @abstractmethod
    def forward(self, trajectories: Sequence[Trajectory], steps: slice = slice(None)) -> Scores:
        """Score the sampled segments of whole trajectories in one packed, teacher-forced pass.

        The K noisy (or partly masked) states of one image sit side by side: each sees the context before
        it and itself only. Runs with and without gradients.

        An adapter that can recompute activations in the backward pass says so by a bool attribute
        ``gradient_checkpointing`` (its own, or ``net``'s); it must not change a number.

        Args:
            trajectories: any number, ragged, with any interleaving of segments.
            steps: which of the K window steps to score (a slice of ``range(K)``); images that are drawn
                code after code have none, and are scored whole.
        """

    def footprint(
        self,
        sampling: Sampling,
        *,
        prompt_tokens: int,
        dtype: torch.dtype,
        prompt: Prompt | None = None,
        evaluate: bool = False,
    ) -> Footprint:
        """Return the bytes that sampling and learning need per trajectory, texts at their longest.

        For ``sampling.cache_gib``, ``optim.activation_gib`` and ``unigrpo estimate``. A longer request must
        never need less.

        Args:
            sampling: plan, lengths, window.
            prompt_tokens: words of a request; what every prompt begins with is added to them.
            dtype: of computation.
            prompt: whose image size and input images (their shapes alone) count; ``None`` = an image of
                the default size and no input images.
            evaluate: whether in evaluation, which may hold caches for guidance as well.

        Raises:
            NotImplementedError: when the adapter does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} has no footprint(...).")

    def image_calls(self, sampling: Sampling) -> int:
        """Return how often ``net`` is called to draw one image, for ``unigrpo estimate``.

        By default once for each noise level or unmasking step, or for each code.
        """
        if self.image_policy != "tokens":
            return num_steps(sampling.num_timesteps, sampling.schedule)
        h, w = self.image_grid(Prompt(text=""))
        return h * w

    def require_room(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raise when rollouts of a prompt may not fit the backbone's layout, texts at their longest.

        Asked for every prompt of a data set before anything is drawn; nothing is refused by default.

        Raises:
            ValueError: saying how long it may be, and which setting to change.
        """
        return

    # ---- what strategies and optimizers need to know

    @abstractmethod
    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable parameters as ``{"text": [...], "flow": [...]}``, disjoint and complete."""

    def shard_units(self) -> list[nn.Module]:
        """Return the submodules of ``net`` that a sharding strategy gathers one at a time."""
        return []

    def unreached(self, plan: Sequence[str]) -> list[nn.Parameter]:
        """Return the weights of ``net`` that no forward of such trajectories uses; they are not trained.

        Data-parallel ranks wait for a gradient of every weight that is. Where texts alone are trained, all
        of the ``flow`` group may be listed, although a prompt's pictures may pass through it.

        Args:
            plan: the kinds of segments in order: ``text``, ``image``, ``turn``.
        """
        return []

    def idle(self) -> None:
        """Call ``net`` once, for nothing: ranks whose rows are done keep step with the others.

        By default on no rows; where the backbone refuses an empty batch, on one that is thrown away.
        """
        none = torch.zeros(0, dtype=torch.bool, device=next(self.net.parameters()).device)
        self.next_logits(self.prefill([]), None, none)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the parts outside ``net`` (VAE, ViT) that must follow the device."""
        return []

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Load the weights of a part of ``net`` that are on the meta device; nothing to do by default.

        Sharding strategies ask for one unit at a time, so that no rank holds the whole network.

        Args:
            part: a submodule of ``net`` (or of a copy), or all of it.
            prefix: of its names in ``net``.
        """

    def materialize(self) -> None:
        """Load all that is still on the meta device, frozen parts too; :meth:`fill` by default."""
        self.fill(self.net, "")

    def reference(self) -> AbstractContextManager[None] | None:
        """Return a context in which ``net`` is the reference policy (LoRA off), or None for a frozen twin."""
        return None

    def defaults(self) -> Defaults | None:
        """Return prompts and rewards for a user who brings none; None = there are none."""
        return None


def has_turns(adapter: Adapter) -> bool:
    """Return whether an adapter knows how its layout holds what the user says in the middle."""
    return type(adapter).turn is not Adapter.turn


def dropout_rates(net: nn.Module) -> dict[str, float]:
    """Return every probability above 0 with which a network drops out, by module and attribute.

    Attention keeps its rate as a number of its own: ``dropout``, ``attention_dropout``, ``attn_dropout_p``.

    Example:
        >>> dropout_rates(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.0)))
        {'1.p': 0.1}
    """
    found = {}
    for name, module in net.named_modules():
        is_layer = "dropout" in type(module).__name__.lower()
        for key, rate in vars(module).items():
            is_rate = key == "p" if is_layer else "dropout" in key
            if is_rate and isinstance(rate, float) and rate > 0:
                found[f"{name}.{key}"] = rate
    return found


def token_log_probs(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Score tokens under the tempered distribution they are drawn from.

    ``log_prob = log softmax(logits / temperature)[token]``; ``entropy = -sum p log p``.

    Rollout and training both call this function, so that they agree to rounding.

    Args:
        logits: ``[*, V]`` any float dtype; computed in float32 (float64 stays float64).
        tokens: ``[*]`` int64.
        temperature: > 0.

    Returns:
        Log-probabilities ``[*]`` in nats, differentiable, and entropies ``[*]`` in nats, detached.

    Example:
        >>> log_prob, entropy = token_log_probs(torch.zeros(1, 4), torch.tensor([2]))
        >>> log_prob, entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    log_p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(
        -1
    )
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy
