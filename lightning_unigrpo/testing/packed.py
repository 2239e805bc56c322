"""Checks of the packed pass alone."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lightning_unigrpo.testing.report import (
    Finding,
    rule,
)
from lightning_unigrpo.testing.subject import (
    Subject,
    apart,
    flat_gradient,
    joined,
    last_scores,
    scores_apart,
    short_list,
    text_scores,
    worst,
)
from lightning_unigrpo.types import (
    ImageSegment,
    Scores,
    TextSegment,
    TokenImageSegment,
    as_given,
    sampled,
)


@rule(
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


@rule(
    "forward gives one entry (float32) per sampled segment in walking order, entropies detached",
    mend="walk trajectories, then segments; skip the given ones; return [L], [K, N, C] and [M]",
    bound=0,
    per_round=True,
)
def scores_shapes(s: Subject) -> Finding:
    """Entries of a wrong shape or dtype."""
    scores = s.adapter(s.trajectories)
    segments = [segment for _, segment in sampled(s.trajectories)]
    texts = [x.tokens for x in segments if isinstance(x, TextSegment)]
    flows = [x.noise for x in segments if isinstance(x, ImageSegment) and x.noise is not None]
    codes = [
        x.log_prob for x in segments if isinstance(x, TokenImageSegment) and x.log_prob is not None
    ]
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
    return Finding(len(wrong), short_list(wrong))


@rule(
    "a trajectory's scores do not depend on what it is packed with",
    mend="keep trajectories apart in the mask; mask the padding",
    per_round=True,
)
def batch_invariance(s: Subject) -> float:
    """Distance between all trajectories together and one by one."""
    alone = [s.adapter([trajectory]) for trajectory in s.trajectories]
    return scores_apart(s.adapter(s.trajectories), joined(alone))


@rule(
    "forward(steps=...) is that slice of the whole: a noisy copy sees the context and itself only",
    mend="hide the copies of an image from each other; keep the context when there is no step",
    per_round=True,
)
def slices_of_steps(s: Subject) -> float | None:
    """Distance between steps one at a time and all steps."""
    if not (s.is_flow or s.is_masked):
        return None
    kind = "velocity" if s.is_flow else "image_tokens"
    whole = s.adapter(s.trajectories)
    parts = [s.adapter(s.trajectories, slice(k, k + 1)) for k in range(2)]
    columns = zip(*(getattr(part, kind) for part in parts), strict=True)
    joined = replace(parts[0], **{kind: [torch.cat(steps) for steps in columns]})
    nothing = s.adapter(s.trajectories, slice(0, 0))
    if any(len(v) for v in getattr(nothing, kind)):
        return math.nan
    return worst(
        [
            scores_apart(joined, whole),
            scores_apart(replace(nothing, **{kind: []}), text_scores(whole)),
        ]
    )


@rule(
    "an earlier score is the same without what comes later, but for the rounding of another length",
    mend="check the mask: text is causal, a copy that is scored is invisible to later segments",
    per_round=True,
)
def causality(s: Subject) -> float:
    """Change of the scores when the trajectory ends behind each of its sampled segments."""
    trajectory, errors = s.trajectories[1], []
    whole = s.adapter([trajectory])
    for end in range(trajectory.num_given + 1, len(trajectory.segments)):
        cut = s.adapter([replace(trajectory, segments=trajectory.segments[:end])])
        start = Scores(
            text=whole.text[: len(cut.text)],
            entropy=whole.entropy[: len(cut.entropy)],
            velocity=whole.velocity[: len(cut.velocity)],
            image_tokens=whole.image_tokens[: len(cut.image_tokens)],
        )
        errors.append(scores_apart(cut, start))
    return worst(errors)


@rule(
    "a segment is the same context for later ones whether it was given or sampled",
    mend="noisy copies and scored rows must not be seen by later segments",
    per_round=True,
)
def given_equals_sampled(s: Subject) -> float:
    """Change of the last scores when everything before them is given."""
    kept = 1 if s.rounds == 1 else 2
    given = [
        replace(t, segments=[*map(as_given, t.segments[:-kept]), *t.segments[-kept:]])
        for t in s.trajectories
    ]
    whole = joined([last_scores(s.adapter([t])) for t in s.trajectories])
    found = joined([last_scores(s.adapter([t])) for t in given])
    if kept == 1:
        whole = replace(whole, text=[], entropy=[])
    return scores_apart(found, whole)


@rule(
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


@rule(
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
            scores, gradient = flat_gradient(s)
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


@rule(
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
