"""The nouns: prompts, segments, trajectories and what is known about them.

Shape letters, the same everywhere in this project: ``B`` rows, ``G`` rollouts of a group, ``L`` text
tokens, ``V`` vocabulary, ``T`` denoising steps, ``K`` SDE steps of a window, ``N`` latent tokens, ``C``
latent channels, ``H W`` pixels, ``n`` any flat count, ``[*]`` any leading dimensions.

A trajectory is a list of segments. A *given* segment is part of the state (the prompt, an input
image, what the user says in between); a *sampled* segment holds actions of the policy and what is
needed to score them again. One round is ``[Text(given), Text, Image]``; think, draw, reflect, redraw is
``[Text(given), Text, Image, Text, Image]``: the same code, a longer list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_unigrpo.config import Objective, Optim, Sampling

Grid: TypeAlias = tuple[int, int]
"""Latent tokens per column and per row, ``(h, w)``; ``N = h * w``, row-major."""
IMAGE_MARK = "<image>"
"""Where an input image stands in the words of a prompt."""
IMAGE_PATHS = "image_paths"
"""Column with the files of a prompt's input images, where a data set reads them when it is asked."""


@dataclass(kw_only=True, eq=False)
class Prompt:
    """What the user asked for. Not frozen, because Lightning moves its images to the device.

    Raises:
        ValueError: when ``text`` says where images stand, and there are more or fewer of them.

    Example:
        >>> pixels = torch.zeros(3, 8, 8)
        >>> Prompt(text="<image> as in <image>, please", images=(pixels, pixels)).pieces()
        ['', ' as in ', ', please']
    """

    text: str
    """The request, in words. Input images stand where it says ``<image>``, one for each mark and in order;
    without any mark before it."""
    id: int = 0
    """Position in the data set: it keys every random draw made for this prompt."""
    size: tuple[int, int] | None = None
    """Height and width of the image in pixels; ``None`` leaves the choice to the adapter."""
    images: tuple[Tensor, ...] = ()
    """Input images, ``[3, H, W]`` float32 in [0, 1]."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data set; rewards receive them by name."""

    def __post_init__(self) -> None:
        """Refuse another number of marks than of images."""
        marks = self.text.count(IMAGE_MARK)
        images = len(self.images) or len(self.columns.get(IMAGE_PATHS) or ())
        if marks not in (0, images):
            raise ValueError(
                f"Prompt.text {self.text[:80]!r} holds {IMAGE_MARK} {marks} times, but Prompt.images are "
                f"{images}: give one mark for each image, or none, and they stand before the words."
            )

    def pieces(self, behind: str = "") -> list[str]:
        """Return the words between which the input images stand: one piece more than there are images.

        Args:
            behind: what follows an image that stands before the words, where they do not say its place.
        """
        if IMAGE_MARK in self.text:
            return self.text.split(IMAGE_MARK)
        if not self.images:
            return [self.text]
        return ["", *[behind] * (len(self.images) - 1), behind + self.text]


@dataclass(kw_only=True, eq=False)
class TextSegment:
    """Text, as the ids that were given or sampled; never re-tokenised."""

    tokens: Tensor
    """``[L]`` int64. A sampled segment ends with the stop token if, and only if, ``stopped``."""
    words: str = ""
    """What it says, without the layout's marks: of sampled texts and of turns."""
    stopped: bool = True
    """False when the length limit cut the text off before the stop token."""
    log_prob: Tensor | None = None
    """``[L]`` float32, nats, of the tempered distribution that was sampled from; ``None`` = given."""
    ref_log_prob: Tensor | None = None
    """``[L]`` float32, the same tokens under the reference policy; only when a text KL is on."""
    temperature: float = 1.0
    """Softmax temperature of the draws: log-probabilities are of ``softmax(logits / temperature)``."""
    advantage: float = 0.0
    """Filled after the rewards are known; 0 for a group without information."""

    @property
    def is_sampled(self) -> bool:
        """Whether the tokens are actions of the policy."""
        return self.log_prob is not None


@dataclass(kw_only=True, eq=False)
class ImageSegment:
    """An image as continuous latent tokens, with the SDE window it was sampled through."""

    latent: Tensor
    """``[N, C]`` float32, clean (sigma 0)."""
    grid: Grid
    """``(h, w)`` with ``h * w = N``."""
    is_context: bool = False
    """Whether later segments see this image (an input image, or a drawn one that is looked at)."""
    views: dict[str, Tensor] = field(default_factory=dict)
    """Frozen inputs an adapter makes once (pixels for a ViT, an encoded latent)."""
    start: int = 0
    """Step index of the first SDE step; step 0 has its own rule (:func:`flow.transition`)."""
    states: Tensor | None = None
    """``[K+1, N, C]`` float32: x before each SDE step and after the last; ``None`` = given."""
    sigmas: Tensor | None = None
    """``[K+1]`` float32, descending noise levels of ``states``."""
    noise: Tensor | None = None
    """``[K, N, C]`` float32: ``(states[k+1] - mean_old[k]) / std[k]``."""
    velocity: Tensor | None = None
    """``[K, N, C]`` float32, the sampling policy's velocity at ``states[:-1]``."""
    ref_velocity: Tensor | None = None
    """``[K, N, C]`` float32, the reference policy's velocity on the same states and text."""
    advantage: float = 0.0
    """Filled after the rewards are known; 0 for a group without information."""

    @property
    def is_sampled(self) -> bool:
        """Whether the window's transitions are actions of the policy."""
        return self.states is not None


@dataclass(kw_only=True, eq=False)
class TokenImageSegment:
    """An image as discrete tokens (autoregressive or masked)."""

    tokens: Tensor
    """``[N]`` int64 codes."""
    grid: Grid
    """``(h, w)`` with ``h * w = N``."""
    is_context: bool = False
    """Whether later segments see this image."""
    views: dict[str, Tensor] = field(default_factory=dict)
    """How later segments see it, made once when it was drawn, as the adapter names it."""
    prefix: Tensor | None = None
    """``[P]`` int64, the words the image was drawn behind where those are not its context itself: recorded
    when it was drawn, so that learning tokenises nothing. ``None`` = drawn behind its context."""
    step: Tensor | None = None
    """``[N]`` int64, the sampling step each code was revealed in; ``None`` = one after the other."""
    window: tuple[int, int] | None = None
    """Half-open range of the steps whose codes are scored; ``None`` = all."""
    log_prob: Tensor | None = None
    """``[M]`` float32, nats, of the codes at ``scored``; ``None`` = given."""
    ref_log_prob: Tensor | None = None
    """``[M]`` float32, the same codes under the reference policy; only when a KL is on."""
    temperature: float = 1.0
    """Softmax temperature of the draws."""
    advantage: float = 0.0
    """Filled after the rewards are known; 0 for a group without information."""

    @property
    def is_sampled(self) -> bool:
        """Whether the codes are actions of the policy."""
        return self.log_prob is not None

    @property
    def scored(self) -> Tensor:
        """Positions ``[M]`` int64 of the codes that are scored, step by step."""
        if self.step is None:
            return torch.arange(len(self.tokens), device=self.tokens.device)
        order = self.step.argsort(stable=True)
        if self.window is None:
            return order
        steps, (low, high) = self.step[order], self.window
        return order[(steps >= low) & (steps < high)]

    def masked_states(self, steps: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
        """Return what each scored step of a masked image saw, and where it revealed codes.

        Args:
            steps: which of the scored steps.

        Returns:
            Codes ``[N]`` int64, -1 where masked, and positions ``[m]`` int64; all positions one after the
            other are ``scored``.
        """
        assert self.step is not None
        low, high = self.window or (0, int(self.step.max()) + 1)
        return [
            (self.tokens.where(self.step < step, -1), (self.step == step).nonzero().squeeze(1))
            for step in range(low, high)[steps]
        ]


Segment: TypeAlias = TextSegment | ImageSegment | TokenImageSegment


class Round(NamedTuple):
    """How a trajectory stood when one of its images had been drawn."""

    image: Tensor
    """``[3, H, W]`` float32 in [0, 1], decoded."""
    completion: str
    """All text that was sampled before it, in words."""
    num_segments: int
    """Segments so far, the image included."""


@dataclass(kw_only=True, eq=False)
class Trajectory:
    """One rollout: the state is any prefix of ``segments``, an action a token or a transition."""

    prompt: Prompt
    segments: list[Segment]
    group: int
    """Rollouts of one prompt share it; any integer."""
    member: int
    """0 .. G-1 inside the group, wherever its rank."""
    num_given: int = 0
    """How many segments the prompt is."""
    image: Tensor | None = None
    """``[3, H, W]`` float32 in [0, 1], the last image drawn, decoded."""
    completion: str = ""
    """All sampled text of the trajectory in words, for rewards and logs."""
    rounds: list[Round] = field(default_factory=list)
    """One for each image that was drawn, where more than the last is scored; else empty."""
    rewards: dict[str, float] = field(default_factory=dict)
    """One number per reward; NaN = not scorable."""
    reward: float = float("nan")
    """The combined reward."""
    usable: bool = True
    """False when the group holds no information (no spread, or too few finite rewards)."""

    @property
    def stopped(self) -> bool:
        """Whether every sampled text ended with its stop token inside the length limit."""
        return all(text.stopped for text in self.texts)

    @property
    def texts(self) -> list[TextSegment]:
        """The sampled texts."""
        return [s for s in self.segments if isinstance(s, TextSegment) and s.is_sampled]


def after_each_round(trajectory: Trajectory, num_rounds: int) -> list[Trajectory]:
    """Return the trajectory as it stood after each of its rounds; the last is the whole of it.

    One that ends early stands as it is in the rounds that it does without, so the last one counts for all of
    those. Where rounds are not known (``Trajectory.rounds``) it is alone.

    Args:
        trajectory: with n images.
        num_rounds: K, how many it may have.

    Returns:
        K, or n + 1 of one that ended early: behind its last image it said why.
    """
    whole = replace(trajectory, rounds=[])
    parts = [
        replace(
            whole,
            segments=trajectory.segments[: each.num_segments],
            image=each.image,
            completion=each.completion,
        )
        for each in trajectory.rounds[: num_rounds - 1]
    ]
    return [*parts, whole]


def sampled_by_round(trajectory: Trajectory) -> Iterator[tuple[int, Segment]]:
    """Walk the sampled segments with the number of their round, from 0: an image ends one."""
    number = 0
    for _, segment in sampled([trajectory]):
        yield number, segment
        number += not isinstance(segment, TextSegment)


@dataclass(kw_only=True, eq=False)
class Scores:
    """What the differentiable pass says about the sampled segments, in walking order.

    Walking order is trajectory by trajectory, segment by segment, one entry for each *sampled*
    segment of the kind; given segments have none.
    """

    text: list[Tensor] = field(default_factory=list)
    """``[L]`` float32 log-probabilities per :class:`TextSegment`."""
    entropy: list[Tensor] = field(default_factory=list)
    """``[L]`` float32, nats, detached, per :class:`TextSegment`."""
    velocity: list[Tensor] = field(default_factory=list)
    """``[k, N, C]`` float32 velocities per :class:`ImageSegment`, k = the steps asked for."""
    image_tokens: list[Tensor] = field(default_factory=list)
    """``[M]`` float32 log-probabilities per :class:`TokenImageSegment`, of its ``scored`` codes; of masked
    images only those of the steps asked for."""


@dataclass(kw_only=True, eq=False)
class Defaults:
    """What an adapter offers to a user who brings neither prompts nor rewards."""

    train: Sequence[Prompt]
    val: Sequence[Prompt]
    test: Sequence[Prompt]
    rewards: Sequence[Callable[..., Any]]
    sampling: Sampling | None = None
    """Settings this backbone is trained with; ``None`` = the paper's."""
    objective: Objective | None = None
    optim: Optim | None = None


def sampled(trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, Segment]]:
    """Walk the sampled segments in the order of :class:`Scores`."""
    for trajectory in trajectories:
        for segment in trajectory.segments:
            if segment.is_sampled:
                yield trajectory, segment


def as_given(segment: Segment) -> Segment:
    """Return the segment as part of the state: later segments see the same, nothing scores it."""
    if not segment.is_sampled:
        return segment
    if isinstance(segment, ImageSegment):
        return replace(segment, states=None, sigmas=None, noise=None, velocity=None)
    return replace(segment, log_prob=None)
