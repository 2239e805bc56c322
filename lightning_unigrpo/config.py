"""Settings, with the paper's value as the default of each field.

Frozen, keyword-only dataclasses: jsonargparse turns every field into a YAML key and a command-line
flag (``--model.sampling.group_size 8``). A value that cannot work raises ``ValueError`` here, before
anything is loaded; a value that contradicts the paper is legal and warned about once.

Source: UniGRPO, https://arxiv.org/abs/2603.23500, Table 3. Where the paper is silent the docstring
says so and gives the reason for our default.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_memory(key: str, gib: float | None) -> None:
    _require(
        gib is None or 0 < gib < math.inf,
        f"{key} is {gib}; give a positive number of GiB, or leave it out.",
    )


def _off_paper(condition: bool, message: str) -> None:
    if condition:
        warnings.warn(message, UserWarning, stacklevel=4)


Kind: TypeAlias = Literal["text", "image", "turn"]


class Step(NamedTuple):
    """One segment of a plan."""

    kind: Kind
    """Sampled text, sampled image, or given words of the user."""
    round: int
    """Number of its round, from 0: an image ends one."""
    max_tokens: int = 0
    """Of a text or a turn, marks included."""
    is_seen: bool = False
    """Whether later segments see an image."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rollouts are drawn, in training and in evaluation."""

    group_size: int = 24
    """G, rollouts per prompt (paper: 24). At least 2: the advantage is relative to the group."""
    plan: tuple[Kind, ...] = ("text", "image")
    """Segments in order: what is sampled, and ``turn`` where the user speaks (``model.turns``). Two rounds
    are ``[text, image, text, image]``."""
    rounds: int | None = None
    """Images of a trajectory, at most: the plan is cut behind as many, or its last round (what stands behind
    its last image but one) is repeated. ``None`` = as the plan says."""
    stop_phrase: str | None = None
    """A text that says this, once there is an image, is the last segment of its trajectory: the policy is
    content with its drawing. ``None`` = all rounds are drawn."""
    look: bool = True
    """Whether later segments see the images that were drawn before."""
    max_text_tokens: int | tuple[int, ...] = 1024
    """Length limit of one reasoning text, stop token included (paper: not stated; UniRL: 1024); or one for
    each round, the last of them for all that follow."""
    max_turn_tokens: int = 256
    """Length limit of what the user says in a turn, marks included; longer ones are refused."""
    temperature: float = 1.0
    """Softmax temperature of training rollouts (paper: 1; no top-k or top-p)."""
    num_timesteps: int = 25
    """Time points of a training rollout (paper: 25)."""
    schedule: Literal["points", "steps"] = "points"
    """``points``: N points are N-1 network calls (Bagel); ``steps``: N calls (diffusers)."""
    shift: float = 3.0
    """Timestep shift (paper: 3)."""
    sde: Literal["flow", "dance", "cps"] = "flow"
    """The stochastic step inside the window (paper: Flow-SDE)."""
    eta: float = 0.8
    """Noise level of the stochastic step (paper: 0.8); at most 1 with ``cps``."""
    window_size: int = 3
    """SDE steps per image (paper: 3); of a masked image the unmasking steps that are trained."""
    window_range: tuple[int, int] = (0, 5)
    """Half-open range of steps that holds the window (paper: [0, 5])."""
    window_mode: Literal["random", "fixed", "sliding"] = "random"
    """Where the window lies inside the range, the same for a whole group (paper: not stated)."""
    reveal: Literal["independent", "confident"] = "independent"
    """Which codes of a masked image a step reveals (not in the paper): each by its own chance, so that
    log-probabilities are exact; or the likeliest ones, whose choice is a factor that no ratio counts."""
    reveal_temperature: float = 1.0
    """Gumbel noise in the choice of the likeliest, nats, annealed to 0 (Show-o: 1)."""
    eval_num_timesteps: int = 50
    """Time points of evaluation, always ODE (paper: 50)."""
    eval_reveal: Literal["independent", "confident"] = "confident"
    """Which codes of a masked image a step of evaluation reveals (Show-o: the likeliest)."""
    eval_temperature: float = 0.0
    """Temperature of evaluation text; 0 = greedy."""
    eval_top_k: int | None = None
    """Draw evaluation text from the k most probable tokens only; ``None`` = from all. There is no such
    setting for training: the log-probabilities would be of another distribution than the one drawn from."""
    eval_top_p: float = 1.0
    """Draw evaluation text from the fewest tokens that together have this probability; 1 = from all."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of *evaluation* only; 1 = off. Training never uses guidance."""
    rows_per_chunk: int | None = None
    """Rollouts drawn together, at most; ``None`` = all of a rank. Never changes what is drawn."""
    cache_gib: float | None = None
    """Memory for keys and values while drawing, GiB: as many rollouts are drawn together as fit, at least
    one; ``None`` = no such bound. Where ``rows_per_chunk`` is given as well, the smaller number counts."""
    rollout_weights: Literal["auto", "resident", "sharded"] = "auto"
    """How rollouts get at sharded weights: gathered once per collection and freed again, or unit by unit at
    every call, all ranks in step. ``auto`` = resident where they fit, decided once. Changes no number."""
    seed: int | None = None
    """Keys every random draw together with iteration, prompt, member, round and phase; ``None`` = the
    seed of ``seed_everything``, else 0."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        _require(
            self.group_size >= 2,
            f"sampling.group_size is {self.group_size}; it must be at least 2: a group of one has no "
            "relative advantage, so nothing would be learned.",
        )
        self._check_plan()
        for name in ("max_turn_tokens", "window_size"):
            _require(
                getattr(self, name) >= 1,
                f"sampling.{name} is {getattr(self, name)}; it must be 1 or more.",
            )
        _require(
            len(self._text_limits) > 0 and min(self._text_limits) >= 1,
            f"sampling.max_text_tokens is {self.max_text_tokens}; it must be 1 or more, or a list of such "
            "numbers, one for each round.",
        )
        for name in ("temperature", "shift", "eta"):
            _require(
                getattr(self, name) > 0,
                f"sampling.{name} is {getattr(self, name)}; it must be positive.",
            )
        _require(
            self.sde != "cps" or self.eta <= 1,
            f"sampling.eta is {self.eta} with sampling.sde 'cps', where the noise is "
            "sigma * sin(eta * pi / 2): lower sampling.eta to 1 or less, or choose sampling.sde 'flow'.",
        )
        for name in ("num_timesteps", "eval_num_timesteps"):
            _require(
                num_steps(getattr(self, name), self.schedule) >= 1,
                f"sampling.{name} is {getattr(self, name)}, which leaves no step with "
                f"sampling.schedule '{self.schedule}'; raise sampling.{name}.",
            )
        _require(
            self.reveal_temperature >= 0,
            f"sampling.reveal_temperature is {self.reveal_temperature}; it must not be negative.",
        )
        _require(
            self.eval_top_k is None or self.eval_top_k >= 1,
            f"sampling.eval_top_k is {self.eval_top_k}; give 1 or more, or leave it out.",
        )
        _require(
            0 < self.eval_top_p <= 1,
            f"sampling.eval_top_p is {self.eval_top_p}; it is a probability, above 0.",
        )
        if "image" in self.plan:
            self._check_window()
        _require(
            self.rows_per_chunk is None or self.rows_per_chunk >= 1,
            f"sampling.rows_per_chunk is {self.rows_per_chunk}; give 1 or more, or leave it out.",
        )
        _require_memory("sampling.cache_gib", self.cache_gib)

    def _check_plan(self) -> None:
        _require(
            bool({"text", "image"} & set(self.plan))
            and set(self.plan) <= {"text", "image", "turn"},
            f"sampling.plan is {self.plan}; give one or more of 'text' and 'image', with 'turn' where the "
            "user speaks in between.",
        )
        _require(
            "turn" not in (self.plan[0], self.plan[-1]),
            f"sampling.plan is {self.plan}; a 'turn' stands between what is sampled: the prompt is the first "
            "turn, and behind the last one something must be drawn.",
        )
        _require(
            self.rounds is None or (self.rounds >= 1 and self.plan[-1] == "image"),
            f"sampling.rounds is {self.rounds} with sampling.plan {self.plan}; give 1 or more, and a plan "
            "that ends with an image, or leave sampling.rounds out.",
        )
        _require(
            self.stop_phrase is None or bool(self.stop_phrase.strip()),
            "sampling.stop_phrase is empty, which every text says; give some words, or leave it out.",
        )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The plan with as many rounds as ``rounds`` says.

        Example:
            >>> Sampling(plan=("text", "image", "turn", "text", "image"), rounds=3).kinds[5:]
            ('turn', 'text', 'image')
        """
        if self.rounds is None:
            return self.plan
        ends = [n for n, kind in enumerate(self.plan, 1) if kind == "image"]
        if self.rounds <= len(ends):
            return self.plan[: ends[self.rounds - 1]]
        last = self.plan[ends[-2] if len(ends) > 1 else 0 :]
        return self.plan + last * (self.rounds - len(ends))

    @property
    def num_images(self) -> int:
        """Images of a trajectory, at most."""
        return self.kinds.count("image")

    @property
    def steps(self) -> tuple[Step, ...]:
        """The segments of a trajectory that ends as late as it may.

        Example:
            >>> [step.max_tokens for step in Sampling(rounds=3, max_text_tokens=(9, 5)).steps]
            [9, 0, 5, 0, 5, 0]
        """
        found: list[Step] = []
        kinds, limits, number = self.kinds, self._text_limits, 0
        for place, kind in enumerate(kinds):
            most = 0
            if kind == "text":
                most = limits[min(number, len(limits) - 1)]
            elif kind == "turn":
                most = self.max_turn_tokens
            is_seen = kind == "image" and self.look and place + 1 < len(kinds)
            found.append(Step(kind, number, most, is_seen))
            number += kind == "image"
        return tuple(found)

    @property
    def longest_text(self) -> int:
        """The largest length limit of a text, 0 without texts."""
        return max((step.max_tokens for step in self.steps if step.kind == "text"), default=0)

    @property
    def _text_limits(self) -> tuple[int, ...]:
        limit = self.max_text_tokens
        return (limit,) if isinstance(limit, int) else tuple(limit)

    def _check_window(self) -> None:
        low, high = self.window_range
        usable = num_steps(self.num_timesteps, self.schedule) - 1
        _require(
            low >= 0 and low + self.window_size <= min(high, usable),
            f"sampling.window_size {self.window_size} does not fit into sampling.window_range "
            f"[{low}, {high}) of a schedule with {usable + 1} steps, whose last step is never "
            f"stochastic: the window must lie in [0, {usable}). Change sampling.window_size, "
            "sampling.window_range or sampling.num_timesteps.",
        )


def num_steps(num_timesteps: int, schedule: Literal["points", "steps"]) -> int:
    """Return the number of network calls of a schedule.

    Example:
        >>> num_steps(25, "points"), num_steps(25, "steps")
        (24, 25)
    """
    return num_timesteps - 1 if schedule == "points" else num_timesteps


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of matrix products under a ``trainer.precision``.

    Example:
        >>> compute_dtype("bf16-mixed"), compute_dtype("32-true")
        (torch.bfloat16, torch.float32)
    """
    known = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return known.get(precision.split("-")[0], torch.float32)


@dataclass(frozen=True, kw_only=True)
class Objective:
    r"""What is maximised: J = J_text + λ J_flow − γ MSE(v_θ, v_ref)."""

    text_weight: float = 1.0
    """Weight of J_text (paper: 1); 0 trains images only."""
    text_clip_low: float = 0.2
    """Lower clip of the per-token ratio (paper: not stated; PPO's usual value)."""
    text_clip_high: float = 0.2
    """Upper clip of the per-token ratio (paper: not stated; PPO's usual value)."""
    text_aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """Mean over a chain, then over chains (paper, Eq. 2); over all tokens (DAPO); by a constant (Dr.GRPO)."""
    text_constant_length: int | None = None
    """Divisor of ``constant``; ``None`` = the largest of ``sampling.max_text_tokens``."""
    flow_weight: float = 1.0
    """λ (paper: 1); 0 trains text only."""
    flow_clip_low: float = 1e-6
    """Lower clip of the flow ratio (paper: 1e-6, at 1024 px: 262,144 latent numbers)."""
    flow_clip_high: float = 1e-6
    """Upper clip of the flow ratio (paper: 1e-6)."""
    clip_reference_size: int | None = None
    """Latent numbers D_ref the flow clips were chosen for: they are rescaled by sqrt(D_ref / D).
    ``None`` = as given."""
    ratio_norm: bool = True
    """RatioNorm (paper, Eq. 5) instead of the plain ratio."""
    inverse_step_weight: bool = False
    """Multiply each step's flow loss by 1/dt (GRPO-Guard; paper: not stated). It changes what γ means."""
    image_token_weight: float | None = None
    """Weight of the surrogate of a discrete image's tokens (not in the paper); ``None`` = ``flow_weight``."""
    image_token_clip_low: float = 0.2
    """Lower clip of the ratio of each image token (not in the paper; as for text)."""
    image_token_clip_high: float = 0.2
    """Upper clip of the ratio of each image token."""
    image_token_kl_weight: float = 0.0
    """Weight of the k3 estimate of the image tokens' KL (not in the paper; T2I-R1: 0.01)."""
    mse_weight: float = 1.5e-5
    """γ (paper: 1.5e-5, on a squared norm; see ``mse_reduction``)."""
    mse_reduction: Literal["mean", "sum"] = "mean"
    """Of the velocity error over the latent. At D numbers, ``sum`` with γ equals ``mean`` with γ·D."""
    latent_kl_weight: float = 0.0
    """Weight of the exact Gaussian KL of the transitions (FlowGRPO's regulariser; paper: 0)."""
    text_kl_weight: float = 0.0
    """Weight of the k3 estimate of the text KL (paper: 0)."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the group (paper), of the batch, or not (Dr.GRPO)."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation, unit of the reward (paper: not stated)."""
    advantage_clamp: float = 5.0
    """Largest absolute advantage (paper: not stated; Flow-GRPO: 5)."""
    round_rewards: Literal["last", "each", "improvement"] = "last"
    """Which of a trajectory's images are worth something: the last (paper), each, or each by what it adds to
    the one before. The others cost a decoding and a scoring for every image."""
    round_weights: tuple[float, ...] | None = None
    """Weight of each round's reward, in order; ``None`` = 1 each."""
    round_credit: Literal["trajectory", "round"] = "trajectory"
    """Compare whole trajectories (paper), or round by round what came in that round and after it."""
    round_loss_weights: tuple[float, ...] | None = None
    """Weight of the surrogates of each round's text and image, in order, the last of them for all that
    follow; ``None`` = 1 each."""
    combine_rewards: Literal["sum", "gdpo"] = "sum"
    """Weighted sum, then group normalisation; or each reward normalised first (GDPO)."""
    truncation_reward: float | None = 0.0
    """Reward of a rollout whose text hit the length limit; ``None`` = as scored. Without this rule the
    stop token drifts away."""
    old_log_prob: Literal["auto", "rollout", "recompute"] = "auto"
    """Old policy terms: as sampled, or recomputed by the training path; ``auto`` = as sampled in float32."""

    def __post_init__(self) -> None:
        """Refuse bounds and weights without meaning, and warn off the paper."""
        for name in ("text_clip_low", "flow_clip_low", "image_token_clip_low"):
            _require(
                0 <= getattr(self, name) < 1,
                f"objective.{name} is {getattr(self, name)}; a ratio is positive, so give 0 <= clip < 1.",
            )
        for name in (
            "text_clip_high",
            "flow_clip_high",
            "image_token_clip_high",
            "text_weight",
            "flow_weight",
            "image_token_weight",
            "image_token_kl_weight",
            "mse_weight",
            "latent_kl_weight",
            "text_kl_weight",
        ):
            _require(
                (getattr(self, name) or 0) >= 0,
                f"objective.{name} is {getattr(self, name)}; it must not be negative.",
            )
        _require(
            self.text_weight > 0 or self.flow_weight > 0 or bool(self.image_token_weight),
            "objective.text_weight and objective.flow_weight are both 0: nothing would be learned.",
        )
        _require(
            self.round_weights is None or self.round_rewards != "last",
            f"objective.round_weights is {self.round_weights} with objective.round_rewards 'last', which has "
            "one reward: leave the weights out, or choose 'each' or 'improvement'.",
        )
        _require(
            self.round_loss_weights is None
            or (min(self.round_loss_weights, default=-1) >= 0 and max(self.round_loss_weights) > 0),
            f"objective.round_loss_weights is {self.round_loss_weights}; give weights of 0 or more, one of "
            "them above 0, or leave it out.",
        )
        _off_paper(
            self.mse_weight > 0 and self.latent_kl_weight > 0,
            "objective.mse_weight and objective.latent_kl_weight are both on; the paper replaces the "
            "latent KL by the velocity MSE.",
        )

    def loss_weight(self, number: int) -> float:
        """Return the weight of the surrogates of a round, counted from 0."""
        weights = self.round_loss_weights or (1.0,)
        return weights[min(number, len(weights) - 1)]

    @property
    def needs_ref_velocity(self) -> bool:
        """Whether an image regulariser compares with the reference policy."""
        return self.mse_weight > 0 or self.latent_kl_weight > 0

    @property
    def needs_ref_log_prob(self) -> bool:
        """Whether the text regulariser compares with the reference policy."""
        return self.text_kl_weight > 0

    def needs_image_reference(self, image_policy: str) -> bool:
        """Whether a regulariser compares images with the reference policy, for images of a kind."""
        if image_policy == "flow":
            return self.needs_ref_velocity
        return self.image_token_kl_weight > 0

    def needs_reference(self, image_policy: str) -> bool:
        """Whether any term compares with the reference policy, for images of a kind."""
        return self.needs_image_reference(image_policy) or self.needs_ref_log_prob

    def image_weight(self, image_policy: str) -> float:
        """Return the weight of the surrogate of images of a kind."""
        if image_policy == "flow" or self.image_token_weight is None:
            return self.flow_weight
        return self.image_token_weight


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How the objective is climbed: AdamW, one optimizer, two parameter groups, no weight decay."""

    text_lr: float = 1e-6
    """Learning rate of the reasoning expert (paper: 1e-6); 0 freezes it."""
    flow_lr: float = 3e-5
    """Learning rate of the denoising expert (paper: 3e-5); 0 freezes it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moments (paper: not stated)."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up (paper: not stated)."""
    max_grad_norm: float | None = 1.0
    """Largest gradient norm of each parameter group (paper: not stated); ``None`` = no clipping."""
    ppo_epochs: int = 2
    """Passes over each collection (paper: 2)."""
    updates_per_rollout: int = 1
    """Disjoint parts of a collection, one optimizer step each, in every pass."""
    micro_batch_size: int | None = None
    """Trajectories per forward and backward, at most; ``None`` = all of an update. Never changes the
    result."""
    activation_gib: float | None = None
    """Memory for what a forward keeps for its backward, GiB: as many trajectories go into a micro-batch as
    fit, at least one; ``None`` = no such bound. Where ``micro_batch_size`` is given as well, the smaller
    number counts. On top come the copies of weights that a mixed precision makes, and what is there in
    passing, such as the logits of all words, several times."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("text_lr", "flow_lr", "warmup_steps"):
            _require(
                getattr(self, name) >= 0,
                f"optim.{name} is {getattr(self, name)}; it must not be negative.",
            )
        _require(
            self.text_lr > 0 or self.flow_lr > 0,
            "optim.text_lr and optim.flow_lr are both 0: nothing would be learned.",
        )
        for name in ("ppo_epochs", "updates_per_rollout"):
            _require(
                getattr(self, name) >= 1,
                f"optim.{name} is {getattr(self, name)}; it must be 1 or more.",
            )
        _require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"optim.micro_batch_size is {self.micro_batch_size}; give 1 or more, or leave it out.",
        )
        _require_memory("optim.activation_gib", self.activation_gib)
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"optim.max_grad_norm is {self.max_grad_norm}; give a positive norm or null.",
        )


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Bounds of the on-policy check; ``None`` = by compute dtype, from measurements.

    Quantities, not ratios: at 262,144 latent numbers even a random velocity leaves the averaged ratio
    within 5e-5 of 1.
    """

    velocity: float | None = None
    """Largest ``||v_train - v_rollout|| / ||v_rollout||`` of a window step."""
    log_prob: float | None = None
    """Largest ``|log p_train - log p_rollout|`` of a token, nats."""
    residual: float | None = None
    """Largest ``rms(x_next - mean_train - std * noise) / std`` of a transition."""
    action: Literal["raise", "warn", "off"] = "raise"
    """What happens beyond a bound: stop the run, warn, or do not even measure."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What validation and test draw; how they draw it is in :class:`Sampling`."""

    num_images: int = 1
    """Rollouts per prompt (GenEval: 4), each with draws of its own that are the same in every evaluation."""
    thinking: bool = True
    """Whether texts are drawn; without them the last image of the plan follows the prompt alone."""
    every_round: bool = False
    """Whether every image of a trajectory is scored, beside the last: as ``reward/round_1`` and so on."""
    task_column: str = "tag"
    """Column with the name of a prompt's GenEval task: its rewards are logged by task, too."""

    def __post_init__(self) -> None:
        """Refuse an evaluation of nothing."""
        _require(
            self.num_images >= 1,
            f"evaluation.num_images is {self.num_images}; it must be 1 or more.",
        )
