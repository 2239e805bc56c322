"""Checks that sampling and learning are one policy, and that gradients reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_unigrpo.testing.report import (
    ATOL,
    MAX_DIFFERENCE_ERROR,
    Finding,
    rule,
)
from lightning_unigrpo.testing.subject import (
    Subject,
    apart,
    image_total,
    nats,
    only_first,
    short_list,
    trajectory_of,
    weighted,
    with_values,
    worst,
)
from lightning_unigrpo.types import (
    ImageSegment,
    TextSegment,
    TokenImageSegment,
    sampled,
)

# ---- both are one policy


@rule(
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


@rule(
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
            trajectory_of(prompt, [*c, *b, replace(text, log_prob=torch.zeros(len(text.tokens)))])
            for prompt, c, b, text in rows
        ]
    ).text
    return worst([nats(a, b) for a, b in zip(packed, cached, strict=True)])


@rule(
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


@rule(
    "next_image_logits (or masked_logits) and the packed pass give codes the same log-probabilities",
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


@rule(
    "one backward reaches every trainable weight, both groups with a finite gradient above 0",
    mend="do not detach or skip a branch; weights that nothing uses must not require gradients",
    bound=0,
    per_round=True,
)
def gradients(s: Subject) -> Finding:
    """Weights without a gradient (a strategy would wait for it), and groups whose gradient is 0."""
    with torch.enable_grad():
        scores = s.adapter(s.trajectories)
        total = image_total(scores) + weighted(scores.text)
    names = {id(p): name for name, p in s.adapter.net.named_parameters()}
    wrong = []
    for group, listed in s.adapter.param_groups().items():
        live = [p for p in listed if p.requires_grad]
        if not live:  # LoRA may be on one side only
            continue
        found = torch.autograd.grad(total, live, retain_graph=True, allow_unused=True)
        pairs = list(zip(live, found, strict=True))
        wrong += [names[id(p)] for p, g in pairs if g is None or not bool(g.isfinite().all())]
        if not any(g is not None and bool(g.any()) for _, g in pairs):
            wrong.append(f"all of {group!r}")
    return Finding(len(wrong), short_list(wrong))


@rule(
    "unreached(plan) is what texts alone, or images alone, leave without a gradient",
    mend="list what stands behind the last use: the other head, the last layer's other expert",
    bound=0,
)
def unreached(s: Subject) -> Finding:
    """Weights that a strategy would wait for, and weights that would be frozen although they are used."""
    names = {id(p): name for name, p in s.adapter.net.named_parameters()}
    live = [p for p in s.adapter.net.parameters() if p.requires_grad]
    # Pictures of a prompt may pass through what draws: texts alone then reach what is not theirs to train.
    has_pictures = any(trajectory.prompt.images for trajectory in s.trajectories)
    drawing = {id(p) for p in s.adapter.param_groups()["flow"]} if has_pictures else set()
    wrong = []
    for plan in ("text", "image"):
        spared = drawing if plan == "text" else set()
        batch = [only_first(trajectory, plan) for trajectory in s.trajectories]
        with torch.enable_grad():
            scores = s.adapter(batch)
            total = weighted(scores.text) if plan == "text" else image_total(scores)
        found: Sequence[Tensor | None] = torch.autograd.grad(total, live, allow_unused=True)
        listed = {id(p) for p in s.adapter.unreached((plan,))}
        for p, g in zip(live, found, strict=True):
            if g is None and id(p) not in listed:
                wrong.append(f"{names[id(p)]} without a gradient of {plan}")
            elif g is not None and bool(g.any()) and id(p) in listed - spared:
                wrong.append(f"{names[id(p)]} listed, but reached by {plan}")
    return Finding(len(wrong), short_list(wrong))


@rule(
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
        total = image_total(s.adapter(batch))
        slopes = torch.autograd.grad(total, live, allow_unused=True, materialize_grads=True)
    expected, measured, step = [], [], 1e-3
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        # Relative to each weight; a factor that starts at 0, as LoRA's second does, moves as well.
        sizes = [p if p.any() else torch.full_like(p, 0.1) for p in live]
        move = [p * torch.randn(p.shape, generator=generator).to(p) for p in sizes]
        expected.append(
            float(sum((g.double() * d).sum() for g, d in zip(slopes, move, strict=True)))
        )
        sides = []
        for sign in (1, -1):
            with with_values(live, [p + sign * step * d for p, d in zip(live, move, strict=True)]):
                sides.append(float(image_total(s.adapter(batch))))
        measured.append((sides[0] - sides[1]) / (2 * step))
    size = max(map(abs, [*expected, *measured]))
    errors = [abs(a - b) / max(size, 1e-12) for a, b in zip(expected, measured, strict=True)]
    if size == 0:
        return Finding(math.nan, "no gradient at all")
    return Finding(
        worst(errors), f"autograd {expected[0]:.3g}, finite difference {measured[0]:.3g}"
    )
