"""The adapter's contract as executable checks, for authors of new adapters.

    print(check_adapter(MyAdapter.tiny(), [Prompt(text="a red cube"), Prompt(text="two cats")]))

A check is a function with a name, a bound and advice. Most compute one thing in two ways and return
how far apart they are: logits and velocities as ``max ||a - b|| / ||b||`` over rows, log-probabilities
in nats. Run them on a small configuration with random weights, in float32 on a CPU: what is wrong
there is wrong everywhere, and all of them take a second.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Adapter, Cache, token_log_probs
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import sigma_schedule
from lightning_unigrpo.rollout import Start, rollout, sample_image, sample_image_tokens
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    sampled,
)

ATOL = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Default bound by precision of the weights; velocities leave the adapter as float32."""
COARSE = 0.1
"""Default bound in lower precision."""
MAX_DIFFERENCE_ERROR = 0.05
"""Bound of a gradient against finite differences of float32 numbers."""

Build: TypeAlias = Callable[[], Cache]


class Finding(NamedTuple):
    """What a check measured."""

    value: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One rule of the contract."""

    name: str
    measure: Callable[[Subject], Finding | float | None]
    """Returns what is compared with the bound; None = does not apply to this adapter."""
    rule: str
    """What must hold."""
    mend: str
    """Where to look when it does not."""
    bound: float | None
    """Largest value that passes; None = the tolerance of the run."""
    at_least: bool = False
    """The value must exceed the bound instead."""
    per_round: bool = False
    """Runs once for each number of rounds."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one check went."""

    check: Check
    rounds: int | None
    """Rounds of the trajectories, for checks that run per round."""
    value: float | None
    """None = skipped."""
    bound: float
    detail: str = ""

    @property
    def name(self) -> str:
        """Name of the check."""
        return self.check.name

    @property
    def passed(self) -> bool:
        """Whether the rule holds; a skipped check does not fail."""
        if self.value is None:
            return True
        return self.value > self.bound if self.check.at_least else self.value <= self.bound

    def __str__(self) -> str:
        label = self.name if self.rounds is None else f"{self.name} ({self.rounds} rounds)"
        if self.value is None:
            return f"skip  {label:<38} {self.detail}"
        sign = ">" if self.check.at_least else "<="
        state = "ok  " if self.passed else "FAIL"
        line = f"{state}  {label:<38} {self.value:.1e} {sign} {self.bound:.0e}"
        if self.passed:
            return line
        found = f"\n      found: {self.detail}" if self.detail else ""
        return f"{line}\n      rule:  {self.check.rule}{found}\n      mend:  {self.check.mend}"


@dataclass(frozen=True)
class Report:
    """How all checks went; ``str(report)`` is a table, with advice under what failed."""

    adapter: str
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        """Results that break the contract."""
        return [result for result in self.results if not result.passed]

    @property
    def failed_names(self) -> set[str]:
        """Names of the checks that failed."""
        return {result.name for result in self.failed}

    def __str__(self) -> str:
        ran = sum(result.value is not None for result in self.results)
        head = f"{self.adapter}: {ran - len(self.failed)} of {ran} checks passed"
        return "\n".join([head, *map(str, self.results)])


CHECKS: list[Check] = []
"""Every check, in the order in which they run: parts first, so that a failure explains later ones."""


def check_adapter(
    adapter: Adapter,
    prompts: Sequence[Prompt] | None = None,
    *,
    rounds: Sequence[int] = (1, 2),
    atol: float | None = None,
    only: Collection[str] | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Check an adapter against the contract of :class:`lightning_unigrpo.adapter.Adapter`.

    Weights, mode and global generators are left as they were.

    Args:
        adapter: the backbone, best a small one with random weights.
        prompts: two or more of different length; ``None`` takes the adapter's own.
        rounds: how often trajectories think and draw; leave 2 out if drawn images are never seen.
        atol: bound of all comparisons; ``None`` = by precision of the weights (:data:`ATOL`).
        only: names of the checks to run; ``None`` = all of :data:`CHECKS`.
        raise_on_failure: raise, or only return the report.

    Returns:
        The report; ``str(report)`` is a table with advice.

    Raises:
        AssertionError: with that table, when a rule is broken.
        ValueError: when there are no prompts to check with.
    """
    subject = Subject(adapter, _choose_prompts(adapter, prompts), max(rounds), atol)
    report = Report(type(adapter).__name__)
    was_training = adapter.training
    devices = [subject.device] if subject.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for check in (c for c in CHECKS if only is None or c.name in only):
            for number in rounds if check.per_round else [None]:
                adapter.eval()
                subject.rounds = number or max(rounds)
                report.results.append(_run(check, subject, number))
    adapter.train(was_training)
    if raise_on_failure and report.failed:
        raise AssertionError(str(report))
    return report


def _choose_prompts(adapter: Adapter, prompts: Sequence[Prompt] | None) -> list[Prompt]:
    """Return three prompts, short and long; fewer are repeated."""
    if prompts is None:
        defaults = adapter.defaults()
        prompts = [*defaults.train[:50], *defaults.val[:50]] if defaults is not None else []
    if not prompts:
        name = type(adapter).__name__
        raise ValueError(f"{name} brings no prompts: call check_adapter(adapter, prompts=[...]).")
    by_length = sorted(prompts, key=lambda prompt: len(prompt.text.split()))
    return [by_length[0], by_length[-1], by_length[len(by_length) // 2]]


def _run(check: Check, subject: Subject, rounds: int | None) -> Result:
    bound = subject.atol if check.bound is None else check.bound
    detail = ""
    value: float | None = math.nan  # of a check that could not be measured: it fails
    try:
        found = check.measure(subject)
        if isinstance(found, Finding):
            value, detail = found
        else:
            value, detail = found, "" if found is not None else "does not apply"
    except _NoRolloutError:
        value, detail = None, "needs a rollout"
    except Exception as error:  # whatever an adapter under test raises is a finding
        detail = f"{type(error).__name__}: {error}"
    return Result(check=check, rounds=rounds, value=value, bound=bound, detail=detail)


class _NoRolloutError(Exception):
    """Trajectories could not be drawn; the check ``rollout`` says why."""


def _rule(
    rule: str,
    *,
    mend: str,
    bound: float | None = None,
    at_least: bool = False,
    per_round: bool = False,
) -> Callable[[Callable[[Subject], Finding | float | None]], Check]:
    """Make a check of a function and enter it in :data:`CHECKS`."""

    def enter(measure: Callable[[Subject], Finding | float | None]) -> Check:
        check = Check(
            name=measure.__name__,
            measure=measure,
            rule=rule,
            mend=mend,
            bound=bound,
            at_least=at_least,
            per_round=per_round,
        )
        CHECKS.append(check)
        return check

    return enter


class Subject:
    """The adapter under test, with ragged contexts and deterministic inputs."""

    def __init__(
        self, adapter: Adapter, prompts: Sequence[Prompt], rounds: int, atol: float | None
    ) -> None:
        self.adapter, self.prompts, self.rounds = adapter, prompts, rounds
        weight = next(adapter.net.parameters())
        self.device = weight.device
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.atol = ATOL.get(weight.dtype, COARSE) if atol is None else atol
        self.is_flow = adapter.image_policy == "flow"
        self._drawn: dict[int, list[Trajectory] | None] = {}

    @property
    def trajectories(self) -> list[Trajectory]:
        """Six trajectories of three prompts, drawn once per number of rounds."""
        if self._drawn.get(self.rounds, []) is None:
            raise _NoRolloutError
        if self.rounds not in self._drawn:
            self._drawn[self.rounds] = None
            self._drawn[self.rounds] = self.draw()
        return self._drawn[self.rounds] or []

    def draw(self) -> list[Trajectory]:
        """Draw trajectories; tempered, so that a forgotten temperature is found."""
        starts = [Start(prompt, i, m) for i, prompt in enumerate(self.prompts) for m in range(2)]
        sampling = Sampling(
            plan=("text", "image") * self.rounds,
            max_text_tokens=6,
            temperature=0.8,
            num_timesteps=5,
            schedule="steps",
            window_size=2,
            window_range=(0, 4),
            seed=0,
        )
        return list(chain.from_iterable(rollout(self.adapter, starts, sampling)))

    # ---- inputs: three ragged rows

    @property
    def contexts(self) -> list[list[Segment]]:
        """The given segments of the prompts."""
        return [self.adapter.tokenize(prompt) for prompt in self.prompts]

    @property
    def grid(self) -> Grid:
        """The grid of the first prompt; all rows of a call share it."""
        return self.adapter.image_grid(self.prompts[0])

    def texts(self) -> list[TextSegment]:
        """Return likely words as given texts: short and stopped, cut off, long and stopped."""
        cache = self.adapter.prefill(self.contexts)
        logits = self.adapter.next_logits(cache, None, self.active())
        logits[:, self.adapter.stop_token] = -math.inf
        words = logits.topk(4).indices
        stop = words.new_tensor([self.adapter.stop_token])
        return [
            TextSegment(tokens=torch.cat([words[0, :1], stop])),
            TextSegment(tokens=words[1, :3], stopped=False),
            TextSegment(tokens=torch.cat([words[2], stop])),
        ]

    def pictures(self) -> list[Segment]:
        """Return given images that later segments see."""
        if self.is_flow:
            return [
                self.adapter.look(ImageSegment(latent=x, grid=self.grid, is_context=True))
                for x in self.noise(range(3))
            ]
        cache = self.adapter.prefill(self.contexts)
        num = self.grid[0] * self.grid[1]
        num_codes = self.image_output(cache).shape[-1]
        codes = torch.randint(num_codes, (3, num), generator=torch.Generator().manual_seed(0))
        return [
            TokenImageSegment(tokens=row, grid=self.grid, is_context=True)
            for row in codes.to(self.device)
        ]

    def history(self) -> list[list[Segment]]:
        """Return what follows the prompts: a text; with two rounds also an image and a text."""
        texts = self.texts()
        if self.rounds == 1:
            return [[text] for text in texts]
        return [list(row) for row in zip(texts, self.pictures(), texts[::-1], strict=True)]

    def noise(self, rows: Sequence[int]) -> Tensor:
        """Return ``[B, N, C]`` standard normals, the same for the same row."""
        shape = (self.grid[0] * self.grid[1], self.adapter.latent_channels)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def active(self, rows: Sequence[bool] = (True, True, True)) -> Tensor:
        """Return ``[B]`` bool."""
        return torch.tensor(rows, device=self.device)

    # ---- outputs

    def image_output(self, cache: Cache, rows: Sequence[int] | None = None) -> Tensor:
        """Ask a cache for velocities at different noise levels, or for the first codes' logits."""
        rows = range(len(cache)) if rows is None else rows
        if self.is_flow:
            sigma = torch.tensor([0.9 / (1 + row) for row in rows], device=self.device)
            return self.adapter.velocity(cache, self.noise(rows), sigma, self.grid)
        num = self.grid[0] * self.grid[1]
        codes = torch.full((len(rows), num), -1, device=self.device)
        return self.adapter.next_image_logits(cache, codes, 0, self.grid).logits

    def asked(self, build: Build, rows: Sequence[int] | None = None) -> list[Tensor]:
        """Return what caches know: logits of a new text, word by word, and of an image."""
        cache = build()
        active = torch.ones(len(cache), dtype=torch.bool, device=self.device)
        opened = self.adapter.next_logits(cache, None, active)
        word = torch.full_like(
            active, (self.adapter.stop_token + 1) % opened.shape[1], dtype=torch.long
        )
        second = self.adapter.next_logits(cache, word, active)
        return [opened, second, self.image_output(build(), rows)]

    def differ(self, one: Build, other: Build) -> float:
        """Return how far apart two caches are, by their answers."""
        pairs = zip(self.asked(one), self.asked(other), strict=True)
        return worst([apart(a, b) for a, b in pairs])

    def decoded(self, cache: Cache, texts: Sequence[TextSegment]) -> list[Tensor]:
        """Feed texts word by word, as ``rollout.sample_text`` does; returns log-probabilities."""
        lengths = torch.tensor([len(text.tokens) for text in texts], device=self.device)
        table = nn.utils.rnn.pad_sequence([text.tokens for text in texts], batch_first=True)
        found = []
        logits = self.adapter.next_logits(cache, None, lengths > 0)
        for i, token in enumerate(table.T):
            found.append(token_log_probs(logits, token)[0])
            active = lengths > i + 1
            if active.any():
                logits = self.adapter.next_logits(cache, token, active)
        return [row[:n] for row, n in zip(torch.stack(found, 1), lengths.tolist(), strict=True)]


def apart(a: Tensor, b: Tensor) -> float:
    """Return ``max ||a - b|| / ||b||`` over rows ``[B, *]``, NaN if anything is not finite."""
    if a.shape != b.shape:
        return math.nan
    if not a.numel():
        return 0.0
    error, size = (a - b).double().flatten(1).norm(dim=1), b.double().flatten(1).norm(dim=1)
    return float((error / size.clamp_min(1e-12)).max())


def scores_apart(a: Scores, b: Scores) -> float:
    """Return the largest disagreement: nats of tokens and codes, relative norms of velocities."""
    errors = [0.0]
    for name in ("text", "entropy", "image_tokens"):
        pairs = zip(getattr(a, name), getattr(b, name), strict=True)
        errors += [nats(x, y) for x, y in pairs]
    errors += [apart(x, y) for x, y in zip(a.velocity, b.velocity, strict=True)]
    return worst(errors)


def nats(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of log-probabilities."""
    if a.shape != b.shape:
        return math.nan
    return float((a - b).abs().max()) if a.numel() else 0.0


def worst(errors: Sequence[float]) -> float:
    """Return the largest error; NaN wins, where ``max`` may lose it."""
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


# ---- the network and its parameters


@_rule(
    "every trainable weight is reached through adapter.net",
    mend="move the module into net; what stays outside must not require gradients",
    bound=0,
)
def weights_under_net(s: Subject) -> Finding:
    """Trainable parameters outside net."""
    inside = {id(p) for p in s.adapter.net.parameters()}
    foreign = [
        name for name, p in s.adapter.named_parameters() if p.requires_grad and id(p) not in inside
    ]
    return Finding(len(foreign), _names(foreign))


@_rule(
    'param_groups() is {"text": [...], "flow": [...]}, disjoint, and holds all trainable weights',
    mend="put each trainable parameter of net into exactly one of the two lists",
    bound=0,
)
def param_groups(s: Subject) -> Finding:
    """Weights that are missing, doubled or foreign."""
    groups = s.adapter.param_groups()
    if set(groups) != {"text", "flow"}:
        return Finding(math.inf, f"the groups are {sorted(groups)}")
    listed = [id(p) for group in groups.values() for p in group]
    own = {id(p): name for name, p in s.adapter.net.named_parameters()}
    wrong = [
        name
        for i, name in own.items()
        if listed.count(i) > 1
        or (i not in listed and s.adapter.net.get_parameter(name).requires_grad)
    ]
    foreign = [f"a parameter outside net ({i})" for i in listed if i not in own]
    return Finding(len(wrong) + len(foreign), _names(wrong + foreign))


@_rule(
    "nothing drops out: rollout and training would be two policies",
    mend="build the backbone (and its LoRA) with dropout 0",
    bound=0,
)
def no_dropout(s: Subject) -> Finding:
    """Modules with a dropout probability above 0."""
    found = []
    for name, module in s.adapter.net.named_modules():
        if "dropout" in type(module).__name__.lower():
            rate = getattr(module, "p", 0.0)
        else:
            rate = getattr(module, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            found.append(f"{name} (p={rate})")
    return Finding(len(found), _names(found))


@_rule(
    "shard_units() lie inside net, frozen_modules() outside the module tree",
    mend="return submodules of net; keep VAE and ViT in a plain list or tuple, unregistered",
    bound=0,
)
def modules_in_their_place(s: Subject) -> Finding:
    """Units outside net and registered frozen modules."""
    inside = set(s.adapter.net.modules())
    registered = set(s.adapter.modules())
    wrong = [f"unit {type(m).__name__}" for m in s.adapter.shard_units() if m not in inside]
    wrong += [f"frozen {type(m).__name__}" for m in s.adapter.frozen_modules() if m in registered]
    return Finding(len(wrong), _names(wrong))


@_rule(
    "equal arguments give equal answers: nothing is drawn at random, nothing counts calls",
    mend="take the mode of a posterior; keep state in the cache, never in the adapter",
)
def repeatable(s: Subject) -> float:
    """Distance between two runs under different global seeds."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(s.asked(lambda: s.adapter.prefill(s.contexts)))
    return worst([apart(a, b) for a, b in zip(*runs, strict=True)])


@_rule(
    "net's state_dict, saved and loaded, gives the same policy to the bit",
    mend="register every buffer that outputs depend on, or derive it from the config",
    bound=0,
)
def state_dict_round_trip(s: Subject) -> float:
    """Change of the outputs after weights were saved, spoilt and loaded."""
    net = s.adapter.net
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    before = s.asked(lambda: s.adapter.prefill(s.contexts))
    with _moved(list(net.parameters()), [torch.ones_like(p) for p in net.parameters()]):
        file.seek(0)
        net.load_state_dict(torch.load(file, map_location=s.device, weights_only=True))
        after = s.asked(lambda: s.adapter.prefill(s.contexts))
    return worst([apart(a, b) for a, b in zip(after, before, strict=True)])


# ---- words and pixels


@_rule(
    "tokenize gives given segments ([L] int64 texts); detokenize leaves the stop token out",
    mend="mind dtype, shape and log_prob=None in tokenize, the stop token in detokenize",
    bound=0,
)
def words(s: Subject) -> Finding:
    """Broken rules of texts."""
    wrong = []
    for prompt, context in zip(s.prompts, s.contexts, strict=True):
        for segment in context:
            if segment.is_sampled:
                wrong.append(f"prompt {prompt.id}: a sampled segment")
            if isinstance(segment, TextSegment) and (
                segment.tokens.ndim != 1 or segment.tokens.dtype != torch.int64
            ):
                wrong.append(f"prompt {prompt.id}: tokens {segment.tokens.dtype}")
    stop = torch.tensor([s.adapter.stop_token], device=s.device)
    for text in s.texts():
        kept = text.tokens[text.tokens != stop]
        if s.adapter.detokenize(torch.cat([kept, stop])) != s.adapter.detokenize(kept):
            wrong.append("detokenize shows the stop token")
    return Finding(len(wrong), _names(wrong))


@_rule(
    "decode gives finite [B, 3, H, W] float32 in [0, 1], of the size asked for, row by row",
    mend="clamp after un-normalising, cast to float32, repeat a grey channel three times",
)
def decode(s: Subject) -> Finding:
    """Distance from the range, and between a batch and its rows; NaN for a wrong shape."""
    codes = 3 * s.noise(range(3)) if s.is_flow else torch.stack([_codes(p) for p in s.pictures()])
    pixels = s.adapter.decode(codes, s.grid)
    size = s.prompts[0].size
    shape = (3, 3, *(size or pixels.shape[2:]))
    if pixels.shape != shape or pixels.dtype != torch.float32:
        return Finding(
            math.nan, f"{list(pixels.shape)} {pixels.dtype}, expected {list(shape)} float32"
        )
    alone = torch.cat([s.adapter.decode(row.unsqueeze(0), s.grid) for row in codes])
    beyond = float((pixels - pixels.clamp(0, 1)).abs().max())
    return Finding(
        worst([beyond, apart(pixels, alone)]), f"range {pixels.min():.3} to {pixels.max():.3}"
    )


# ---- the cache


@_rule(
    "rows of a ragged batch, an empty context among them, are what they are alone",
    mend="mask the padding; take lengths and positions per row",
)
def ragged_rows(s: Subject) -> float:
    """Distance between rows together and rows alone."""
    rows: list[list[Segment]] = [[]]
    rows += [c + h[:n] for n, (c, h) in enumerate(zip(s.contexts, s.history(), strict=True))]
    together = s.asked(lambda: s.adapter.prefill(rows))
    errors = []
    for b, row in enumerate(rows):
        alone = s.asked(lambda row=row: s.adapter.prefill([row]), [b])  # type: ignore[misc]
        errors += [apart(x[b : b + 1], y) for x, y in zip(together, alone, strict=True)]
    return worst(errors)


@_rule(
    "select and expand make new caches with the rows asked for; neither writes into the other",
    mend="index every tensor of the cache (lengths, positions, open texts too) and copy it",
)
def select_and_expand(s: Subject) -> float:
    """Distance to a prefill of the same rows, and of a used original to an unused one."""
    adapter, contexts = s.adapter, s.contexts

    def fresh() -> Cache:
        return adapter.prefill(contexts)

    def of(rows: Sequence[int]) -> Build:
        return lambda: adapter.prefill([contexts[b] for b in rows])

    def pair(use: int) -> Cache:
        caches = [fresh()]
        caches.append(caches[0].select(torch.arange(3)))
        for _ in range(2):
            opened = adapter.next_logits(caches[use], None, s.active())
            adapter.next_logits(caches[use], opened.argmax(1), s.active())
        return caches[1 - use]

    return worst(
        [
            s.differ(lambda: fresh().select(torch.tensor([2, 0, 0])), of([2, 0, 0])),
            s.differ(lambda: fresh().expand([1, 0, 2]), of([0, 2, 2])),
            s.differ(lambda: pair(0), fresh),
            s.differ(lambda: pair(1), fresh),
            math.nan if len(fresh().expand([1, 0, 2])) != 3 else 0.0,
        ]
    )


@_rule(
    "next_logits leaves rows with active=False exactly as they were",
    mend="write keys, lengths and positions of active rows only",
)
def inactive_rows(s: Subject) -> float:
    """Change of a paused row's next two logits by what other rows were fed meanwhile."""
    fed = torch.stack([text.tokens[0] for text in s.texts()])

    def answers(*pauses: tuple[bool, bool, bool]) -> Tensor:
        cache = s.adapter.prefill(s.contexts)
        s.adapter.next_logits(cache, None, s.active())
        for active in pauses:
            s.adapter.next_logits(cache, fed, s.active(active))
        return torch.cat([s.adapter.next_logits(cache, fed, s.active())[:1] for _ in range(2)])

    return apart(answers((False, True, False), (False, True, True)), answers())


@_rule(
    "velocity leaves the cache as it was",
    mend="use scratch slots, or a copy of keys and values; advance neither lengths nor positions",
)
def velocity_keeps_cache(s: Subject) -> float | None:
    """Change of a cache by asking for velocities."""
    if not s.is_flow:
        return None

    def used() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        for _ in range(2):
            s.image_output(cache)
        return cache

    return s.differ(used, lambda: s.adapter.prefill(s.contexts))


@_rule(
    "extend equals prefill of the longer lists",
    mend="feed the marks of each segment, in every row; advance positions as prefill does",
    per_round=True,
)
def extend_equals_prefill(s: Subject) -> float:
    """Distance between extending segment by segment and reading everything at once."""

    def step_by_step() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        for place in zip(*s.history(), strict=True):
            s.adapter.extend(cache, place)
        return cache

    whole = [c + h for c, h in zip(s.contexts, s.history(), strict=True)]
    return s.differ(step_by_step, lambda: s.adapter.prefill(whole))


@_rule(
    "extend completes a text that was decoded into the cache: its last token, a forced stop mark",
    mend="remember per row how much of an open text was fed; feed the rest, then forget it",
)
def extend_after_decoding(s: Subject) -> float:
    """Distance between decode, then extend, and prefill; rows stopped early or were cut."""
    texts = s.texts()

    def walked() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        s.decoded(cache, texts)
        return _extended(s.adapter, cache, texts)

    whole = [[*c, text] for c, text in zip(s.contexts, texts, strict=True)]
    return s.differ(walked, lambda: s.adapter.prefill(whole))


@_rule(
    "extend after drawing appends the drawn image once, as prefill does",
    mend="forget (or complete) the image in progress before the finished one is appended",
)
def extend_after_drawing(s: Subject) -> float | None:
    """Distance between draw, then extend, and prefill."""
    if s.rounds < 2:
        return None
    num = s.grid[0] * s.grid[1]
    pictures: list[Segment] = []

    def walked() -> Cache:
        cache = s.adapter.prefill(s.contexts)
        if s.is_flow:
            s.image_output(cache)
            pictures[:] = s.pictures()
        else:
            uniforms = torch.linspace(0, 0.99, 3 * num, device=s.device).view(3, num)
            drawn = sample_image_tokens(s.adapter, cache, uniforms, s.grid, temperature=1.0)
            pictures[:] = [replace(image, is_context=True) for image in drawn]
        return _extended(s.adapter, cache, pictures)

    walked()
    whole = [[*c, image] for c, image in zip(s.contexts, pictures, strict=True)]
    return s.differ(walked, lambda: s.adapter.prefill(whole))


@_rule(
    "the image depends on the reasoning: other words, another image",
    mend="show the sampled text to the image block",
    bound=1e-6,
    at_least=True,
)
def image_sees_text(s: Subject) -> float:
    """Change of the image's answer between two reasoning texts of the same length."""
    text = s.texts()[2]
    other = replace(text, tokens=torch.cat([text.tokens[:-1].flip(0), text.tokens[-1:]]))
    [one, two] = [
        s.image_output(s.adapter.prefill([[*s.contexts[0], words]]), [0]) for words in (text, other)
    ]
    return apart(one, two)


@_rule(
    "integrating with eta 0 is a plain Euler loop over velocity, from a fresh cache each time",
    mend="velocity must depend on its arguments alone and leave no trace in the cache",
)
def ode_at_eta_0(s: Subject) -> float | None:
    """Distance of an evaluation, and of an SDE with hardly any noise, from the Euler loop."""
    if not s.is_flow:
        return None
    sigmas = sigma_schedule(5, shift=3.0, convention="steps").to(s.device)
    x = noise = s.noise(range(3))
    for sigma, sigma_next in pairwise(sigmas):
        cache = s.adapter.prefill(s.contexts)
        x = x - (sigma - sigma_next) * s.adapter.velocity(cache, x, sigma.expand(3), s.grid)
    errors = []
    for windows in (None, [range(b, b + 2) for b in range(3)]):
        images = sample_image(
            s.adapter,
            s.adapter.prefill(s.contexts),
            noise,
            sigmas,
            s.grid,
            windows=windows,
            window_noise=s.noise([3, 4]).expand(3, -1, -1, -1),
            sampling=Sampling(eta=s.atol / 10),
        )
        errors.append(apart(torch.stack([image.latent for image in images]), x))
    return worst(errors)


# ---- the packed pass


@_rule(
    "a rollout runs, and its log-probabilities, latents and images are finite",
    mend="see the error; the methods it names do not fit together",
    bound=0,
    per_round=True,
)
def rollouts_run(s: Subject) -> Finding:
    """Number of values that are not finite."""
    parts = []
    for trajectory, segment in sampled(s.trajectories):
        if isinstance(segment, ImageSegment):
            parts += [segment.latent, segment.velocity, trajectory.image]
        else:
            parts.append(segment.log_prob)
    wrong = sum(int((~part.isfinite()).sum()) for part in parts if part is not None)
    return Finding(wrong, f"{len(parts)} tensors")


@_rule(
    "every position of a discrete image is revealed exactly once, some at each step",
    mend="return the positions that are still -1, and num_revealed >= 1 of them",
    bound=0,
    per_round=True,
)
def codes_revealed_once(s: Subject) -> int | None:
    """Images with an open position or an idle step."""
    if s.is_flow:
        return None
    images = [x for _, x in sampled(s.trajectories) if isinstance(x, TokenImageSegment)]
    return sum(
        bool((x.tokens < 0).any()) or x.step is None or 0 in torch.bincount(x.step) for x in images
    )


@_rule(
    "forward gives one entry (float32) per sampled segment in walking order, entropies detached",
    mend="walk trajectories, then segments; skip the given ones; return [L], [K, N, C] and [N]",
    bound=0,
    per_round=True,
)
def scores_shapes(s: Subject) -> Finding:
    """Entries of a wrong shape or dtype."""
    scores = s.adapter(s.trajectories)
    segments = [segment for _, segment in sampled(s.trajectories)]
    texts = [x.tokens for x in segments if isinstance(x, TextSegment)]
    flows = [x.noise for x in segments if isinstance(x, ImageSegment) and x.noise is not None]
    codes = [x.tokens for x in segments if isinstance(x, TokenImageSegment)]
    wrong = []
    for name, expected in (
        ("text", texts),
        ("entropy", texts),
        ("velocity", flows),
        ("image_tokens", codes),
    ):
        found = getattr(scores, name)
        if [x.shape for x in found] != [x.shape for x in expected]:
            wrong.append(f"{name}: {[list(x.shape) for x in found]}")
        wrong += [f"{name}: {x.dtype}" for x in found if x.dtype not in (torch.float32, s.wide)]
    with torch.enable_grad():
        if any(x.requires_grad for x in s.adapter(s.trajectories[:1]).entropy):
            wrong.append("entropy has a gradient")
    return Finding(len(wrong), _names(wrong))


@_rule(
    "a trajectory's scores do not depend on what it is packed with",
    mend="keep trajectories apart in the mask; mask the padding",
    per_round=True,
)
def batch_invariance(s: Subject) -> float:
    """Distance between all trajectories together and one by one."""
    alone = [s.adapter([trajectory]) for trajectory in s.trajectories]
    return scores_apart(s.adapter(s.trajectories), _joined(alone))


@_rule(
    "forward(steps=...) is that slice of the whole: a noisy copy sees the context and itself only",
    mend="hide the copies of an image from each other; keep the context when there is no step",
    per_round=True,
)
def slices_of_steps(s: Subject) -> float | None:
    """Distance between steps one at a time and all steps."""
    if not s.is_flow:
        return None
    whole = s.adapter(s.trajectories)
    parts = [s.adapter(s.trajectories, slice(k, k + 1)) for k in range(2)]
    columns = zip(*(part.velocity for part in parts), strict=True)
    joined = replace(parts[0], velocity=[torch.cat(steps) for steps in columns])
    nothing = s.adapter(s.trajectories, slice(0, 0))
    if any(len(v) for v in nothing.velocity):
        return math.nan
    return worst(
        [scores_apart(joined, whole), scores_apart(replace(nothing, velocity=[]), _texts(whole))]
    )


@_rule(
    "nothing that comes later changes an earlier score",
    mend="check the mask: text is causal, a copy that is scored is invisible to later segments",
    per_round=True,
)
def causality(s: Subject) -> float:
    """Change of the scores when the last segment, then all but the first text, is cut off."""
    whole, errors = s.adapter(s.trajectories[:1]), []
    trajectory = s.trajectories[0]
    num_given = sum(not segment.is_sampled for segment in trajectory.segments)
    for end in (len(trajectory.segments) - 1, num_given + 1):
        cut = s.adapter([replace(trajectory, segments=trajectory.segments[:end])])
        start = Scores(
            text=whole.text[: len(cut.text)],
            entropy=whole.entropy[: len(cut.entropy)],
            velocity=whole.velocity[: len(cut.velocity)],
            image_tokens=whole.image_tokens[: len(cut.image_tokens)],
        )
        errors.append(scores_apart(cut, start))
    return worst(errors)


@_rule(
    "a segment is the same context for later ones whether it was given or sampled",
    mend="noisy copies and scored rows must not be seen by later segments",
    per_round=True,
)
def given_equals_sampled(s: Subject) -> float:
    """Change of the last scores when everything before them is given."""
    kept = 1 if s.rounds == 1 else 2
    given = [
        replace(t, segments=[*map(_given, t.segments[:-kept]), *t.segments[-kept:]])
        for t in s.trajectories
    ]
    whole = _joined([_last(s.adapter([t])) for t in s.trajectories])
    found = _joined([_last(s.adapter([t])) for t in given])
    if kept == 1:
        whole = replace(whole, text=[], entropy=[])
    return scores_apart(found, whole)


@_rule(
    "train() changes nothing: same scores, same cached answers",
    mend="no dropout, no batch norm; leave transformers' own checkpointing off (it drops the cache)",
)
def train_mode(s: Subject) -> float:
    """Distance between train and eval mode, packed and cached."""
    packed, cached = s.adapter(s.trajectories), s.asked(lambda: s.adapter.prefill(s.contexts))
    s.adapter.train()
    errors = [scores_apart(s.adapter(s.trajectories), packed)]
    again = s.asked(lambda: s.adapter.prefill(s.contexts))
    return worst(errors + [apart(a, b) for a, b in zip(again, cached, strict=True)])


@_rule(
    "gradient checkpointing changes nothing: same scores, gradients and cached answers",
    mend="checkpoint each block with use_reentrant=False, only when torch.is_grad_enabled()",
)
def gradient_checkpointing(s: Subject) -> Finding | None:
    """Distance with net.gradient_checkpointing (or the adapter's) on, in train mode."""
    owners = [
        m
        for m in (s.adapter, s.adapter.net)
        if isinstance(getattr(m, "gradient_checkpointing", None), bool)
    ]
    if not owners:
        return None
    s.adapter.train()
    settings = [m.gradient_checkpointing for m in owners]
    found = []
    try:
        for value in (False, True):
            for m in owners:
                m.gradient_checkpointing = value  # type: ignore[assignment]
            scores, gradient = _gradient(s)
            found.append((scores, gradient, s.asked(lambda: s.adapter.prefill(s.contexts))))
    finally:
        for m, setting in zip(owners, settings, strict=True):
            m.gradient_checkpointing = setting
    (scores, gradient, cached), (scores_on, gradient_on, cached_on) = found
    errors = {
        "scores": scores_apart(scores_on, scores),
        "gradients": apart(gradient_on.unsqueeze(0), gradient.unsqueeze(0)),
        "cached": worst([apart(a, b) for a, b in zip(cached_on, cached, strict=True)]),
    }
    return Finding(worst(list(errors.values())), str({k: f"{v:.1e}" for k, v in errors.items()}))


@_rule(
    "reference() is another policy inside its context only",
    mend="undo in a finally clause what the context switched off",
    bound=0,
)
def reference_is_undone(s: Subject) -> float | None:
    """Change of the scores after the context was left."""
    before = s.adapter(s.trajectories)
    context = s.adapter.reference()
    if context is None:
        return None
    with context:
        s.adapter(s.trajectories)
    return scores_apart(s.adapter(s.trajectories), before)


# ---- both are one policy


@_rule(
    "cached decoding and the packed pass give a text the same log-probabilities",
    mend="compare positions, marks and mask of decoded tokens; divide logits by the temperature",
    per_round=True,
)
def text_log_probs(s: Subject) -> Finding:
    """Nats between rollout and forward."""
    old = [x.log_prob for _, x in sampled(s.trajectories) if isinstance(x, TextSegment)]
    pairs = zip(s.adapter(s.trajectories).text, old, strict=True)
    errors = [nats(new, known) for new, known in pairs if known is not None]
    return Finding(worst(errors), f"text {errors.index(max(errors))} of {len(errors)} is worst")


@_rule(
    "the same for texts that stop at once, late or never, side by side and in later rounds",
    mend="finished rows wait with active=False; extend closes the texts that were cut",
    per_round=True,
)
def ragged_texts(s: Subject) -> float:
    """Nats between words fed one by one and the packed pass."""
    texts = s.texts()
    before = [h[: 2 * (s.rounds - 1)] for h in s.history()]
    cache = s.adapter.prefill(s.contexts)
    for place in zip(*before, strict=True):
        s.adapter.extend(cache, place)
    cached = s.decoded(cache, texts)
    rows = zip(s.prompts, s.contexts, before, texts, strict=True)
    packed = s.adapter(
        [
            _trajectory(prompt, [*c, *b, replace(text, log_prob=torch.zeros(len(text.tokens)))])
            for prompt, c, b, text in rows
        ]
    ).text
    return worst([nats(a, b) for a, b in zip(packed, cached, strict=True)])


@_rule(
    "velocity and the packed pass give the same velocities",
    mend="compare the image block: its marks and their weights, positions, who sees whom, sigma",
    per_round=True,
)
def velocities(s: Subject) -> float | None:
    """Relative distance between rollout and forward, per SDE step."""
    if not s.is_flow:
        return None
    old = [x.velocity for _, x in sampled(s.trajectories) if isinstance(x, ImageSegment)]
    pairs = zip(s.adapter(s.trajectories).velocity, old, strict=True)
    return worst([apart(new, known) for new, known in pairs if known is not None])


@_rule(
    "next_image_logits and the packed pass give the same log-probabilities of codes",
    mend="rebuild the state of each step from tokens and step; compare places and marks",
    per_round=True,
)
def image_log_probs(s: Subject) -> float | None:
    """Nats between rollout and forward."""
    if s.is_flow:
        return None
    old = [x.log_prob for _, x in sampled(s.trajectories) if isinstance(x, TokenImageSegment)]
    pairs = zip(s.adapter(s.trajectories).image_tokens, old, strict=True)
    return worst([nats(new, known) for new, known in pairs if known is not None])


# ---- gradients


@_rule(
    "one backward reaches every trainable weight, both groups with a finite gradient above 0",
    mend="do not detach or skip a branch; weights that nothing uses must not require gradients",
    bound=0,
    per_round=True,
)
def gradients(s: Subject) -> Finding:
    """Weights without a gradient (a strategy would wait for it), and groups whose gradient is 0."""
    with torch.enable_grad():
        scores = s.adapter(s.trajectories)
        total = _image_total(scores) + _weighted(scores.text)
    names = {id(p): name for name, p in s.adapter.net.named_parameters()}
    wrong = []
    for group, listed in s.adapter.param_groups().items():
        live = [p for p in listed if p.requires_grad]
        found = torch.autograd.grad(total, live, retain_graph=True, allow_unused=True)
        pairs = list(zip(live, found, strict=True))
        wrong += [names[id(p)] for p, g in pairs if g is None or not bool(g.isfinite().all())]
        if live and not any(g is not None and bool(g.any()) for _, g in pairs):
            wrong.append(f"all of {group!r}")
    return Finding(len(wrong), _names(wrong))


@_rule(
    "the image's loss reaches the reasoning: its gradient in the text group is complete",
    mend="do not detach the context's keys and values, and do not run it under no_grad",
    bound=MAX_DIFFERENCE_ERROR,
)
def image_loss_reaches_text(s: Subject) -> Finding | None:
    """Relative error of directional derivatives against finite differences."""
    live = [p for p in s.adapter.param_groups()["text"] if p.requires_grad]
    if not live or live[0].dtype not in ATOL:
        return None
    batch = s.trajectories[:1]
    with torch.enable_grad():
        total = _image_total(s.adapter(batch))
        slopes = torch.autograd.grad(total, live, allow_unused=True, materialize_grads=True)
    expected, measured, step = [], [], 1e-3
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        move = [p * torch.randn(p.shape, generator=generator).to(p) for p in live]
        expected.append(
            float(sum((g.double() * d).sum() for g, d in zip(slopes, move, strict=True)))
        )
        sides = []
        for sign in (1, -1):
            with _moved(live, [p + sign * step * d for p, d in zip(live, move, strict=True)]):
                sides.append(float(_image_total(s.adapter(batch))))
        measured.append((sides[0] - sides[1]) / (2 * step))
    size = max(map(abs, [*expected, *measured]))
    errors = [abs(a - b) / max(size, 1e-12) for a, b in zip(expected, measured, strict=True)]
    if size == 0:
        return Finding(math.nan, "no gradient at all")
    return Finding(
        worst(errors), f"autograd {expected[0]:.3g}, finite difference {measured[0]:.3g}"
    )


# ---- small helpers


def _names(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _extended(adapter: Adapter, cache: Cache, segments: Sequence[Segment]) -> Cache:
    adapter.extend(cache, segments)
    return cache


def _codes(segment: Segment) -> Tensor:
    assert not isinstance(segment, ImageSegment)
    return segment.tokens


def _given(segment: Segment) -> Segment:
    """Return the segment without what was sampled."""
    if isinstance(segment, ImageSegment):
        return replace(segment, states=None, sigmas=None, noise=None, velocity=None)
    return replace(segment, log_prob=None)


def _trajectory(prompt: Prompt, segments: list[Segment]) -> Trajectory:
    return Trajectory(prompt=prompt, segments=segments, group=0, member=0)


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        text=[x for part in parts for x in part.text],
        entropy=[x for part in parts for x in part.entropy],
        velocity=[x for part in parts for x in part.velocity],
        image_tokens=[x for part in parts for x in part.image_tokens],
    )


def _last(scores: Scores) -> Scores:
    """Return the last entry of each kind."""
    return Scores(
        text=scores.text[-1:],
        entropy=scores.entropy[-1:],
        velocity=scores.velocity[-1:],
        image_tokens=scores.image_tokens[-1:],
    )


def _texts(scores: Scores) -> Scores:
    return Scores(text=scores.text, entropy=scores.entropy)


def _weighted(parts: Sequence[Tensor]) -> Tensor:
    """Return a sum with fixed random weights, in which errors do not cancel."""
    flat = torch.cat([part.flatten() for part in parts])
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(0))
    return (flat.double() * weights.to(flat.device)).sum()


def _image_total(scores: Scores) -> Tensor:
    return _weighted([*scores.velocity, *scores.image_tokens])


def _gradient(s: Subject) -> tuple[Scores, Tensor]:
    """Return scores and the flat gradient of a weighted sum of all of them."""
    live = [p for p in s.adapter.net.parameters() if p.requires_grad]
    with torch.enable_grad():
        scores = s.adapter(s.trajectories)
        total = _image_total(scores) + _weighted(scores.text)
        found = torch.autograd.grad(total, live, allow_unused=True, materialize_grads=True)
    return scores, torch.cat([g.flatten() for g in found])


@contextmanager
def _moved(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters other values, and restore them to the bit."""
    kept = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
