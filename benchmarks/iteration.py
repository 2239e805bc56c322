"""What one UniGRPO iteration costs on the digits model, and what each economy saves.

Five ways to do the same iteration, measured in one process, in turn:

* ``naive``: nothing is remembered: every token and every denoising step reads the whole context again,
  and training makes a forward for the text and one more for every window step, each of which reads the
  prompt and the text again, once per rollout;
* ``kv``: text decoding has a key-value cache;
* ``cached``: the context is cached for all denoising steps too;
* ``packed``: one packed forward scores the text and all window steps;
* ``shared``: the prompt is read once per group when drawing, and what trajectories begin with in common
  (the prompt, and reasonings that came out the same) once when training.

The reference scores no text in any of them. The gradients of all five agree; the script checks that
before it prints a ratio.

    python benchmarks/iteration.py --repeats 5 --out benchmarks/results/iteration.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.config import Objective, Sampling
from lightning_unigrpo.flow import sigma_schedule
from lightning_unigrpo.loss import count, trajectory_loss
from lightning_unigrpo.rollout import Draws, Start, _Chunk, sample_image, sample_text
from lightning_unigrpo.types import ImageSegment, TextSegment, Trajectory, as_given, sampled

PROMPTS, GROUP = 16, 8


@dataclass(frozen=True)
class Variant:
    """Which economies are on."""

    name: str
    cached_text: bool = False
    cached_context: bool = False
    packed: bool = False
    shared_prefix: bool = False


VARIANTS = (
    Variant("naive"),
    Variant("kv", True),
    Variant("cached", True, True),
    Variant("packed", True, True, True),
    Variant("shared", True, True, True, True),
)


class Recomputed:
    """A policy that reads the whole context again at every call; the cache it is given is not used."""

    def __init__(self, adapter: DigitsAdapter, contexts: Sequence[Sequence[object]]) -> None:
        self.adapter, self.contexts = adapter, contexts
        self.stop_token = adapter.stop_token
        self.texts: list[list[int]] = [[] for _ in contexts]

    def next_logits(
        self, cache: object, tokens: torch.Tensor | None, active: torch.Tensor
    ) -> torch.Tensor:
        """Read prompt and text so far, and return the logits of the next token."""
        fresh = self.adapter.prefill(self.contexts)
        packer, positions = self.adapter._packer(), fresh.positions.tolist()
        for b, is_active in enumerate(active.tolist()):
            packer.sample()
            if is_active:
                begin = self.adapter.config.bos
                self.texts[b].append(begin if tokens is None else int(tokens[b]))
                packer.text(self.texts[b], positions[b], last=True)
        found = self.adapter._append(fresh, packer)[0]
        logits = found.new_zeros(len(active), found.shape[1])
        logits[active] = found
        return logits

    def velocity(self, cache: object, *args: torch.Tensor) -> torch.Tensor:
        """Read the context, and return the velocity behind it."""
        return self.adapter.velocity(self.adapter.prefill(self.contexts), *args)


def clock(parts: dict[str, float], name: str, work: Callable[[], object]) -> object:
    """Add the process time of some work to a part."""
    begin = time.process_time()
    result = work()
    parts[name] = parts.get(name, 0.0) + time.process_time() - begin
    return result


@torch.no_grad()
def draw(
    adapter: DigitsAdapter,
    starts: list[Start],
    sampling: Sampling,
    variant: Variant,
    parts: dict[str, float],
) -> list[Trajectory]:
    """Draw one collection step by step, with the economies of the variant."""
    draws = Draws(0, 0)
    prompts = [s.prompt for s in starts]
    if variant.shared_prefix:
        first = [adapter.tokenize(p) for p in prompts[::GROUP]]
        given = [segments for segments in first for _ in range(GROUP)]
        cache = clock(parts, "text", lambda: adapter.prefill(first).expand([GROUP] * len(first)))
    else:
        given = [adapter.tokenize(p) for p in prompts]
        cache = clock(parts, "text", lambda: adapter.prefill(given))
    uniforms = draws.uniforms(starts, 0, sampling.max_text_tokens)
    writer = adapter if variant.cached_text else Recomputed(adapter, given)
    texts = clock(
        parts,
        "text",
        lambda: sample_text(
            writer, cache, uniforms, max_tokens=sampling.max_text_tokens, temperature=1.0
        ),
    )
    if not variant.cached_text:  # the cache has seen none of it: append the texts whole
        cache.open.zero_()
    clock(parts, "text", lambda: adapter.extend(cache, texts))
    contexts = [[*g, t] for g, t in zip(given, texts, strict=True)]
    policy = adapter if variant.cached_context else Recomputed(adapter, contexts)
    grid = adapter.image_grid(prompts[0])
    shape = (grid[0] * grid[1], adapter.latent_channels)
    chunk = _Chunk(adapter, starts, sampling, 0, False, None)
    sigmas = sigma_schedule(
        sampling.num_timesteps, shift=sampling.shift, convention=sampling.schedule
    )
    images = clock(
        parts,
        "denoise",
        lambda: sample_image(
            policy,
            cache,
            draws.normals(starts, 1, 1, shape),
            sigmas,
            grid,
            windows=[chunk._window(s, len(sigmas) - 1) for s in starts],
            window_noise=draws.normals(starts, 1, 2, (sampling.window_size, *shape)),
            sampling=sampling,
        ),
    )
    return [
        Trajectory(prompt=s.prompt, segments=[*c, i], group=s.group, member=s.member)
        for s, c, i in zip(starts, contexts, images, strict=True)
    ]


def refer(
    adapter: DigitsAdapter, trajectories: list[Trajectory], variant: Variant, sampling: Sampling
) -> None:
    """Store reference velocities (here the policy's own: the cost is the same)."""
    drawn = [only(t, ImageSegment) for t in trajectories]
    with torch.no_grad():
        parts = [adapter(drawn, steps).velocity for steps in window_steps(variant.packed, sampling)]
    images = [s for _, s in sampled(drawn)]
    for i, image in enumerate(images):
        image.ref_velocity = torch.cat([part[i] for part in parts])


def train(
    adapter: DigitsAdapter, trajectories: list[Trajectory], variant: Variant, sampling: Sampling
) -> torch.Tensor:
    """Forward and backward; returns the flat gradient."""
    adapter.zero_grad()
    counts, objective = (
        count(trajectories, sampling),
        Objective(flow_clip_low=1e-3, flow_clip_high=1e-3),
    )
    parts = [trajectories]
    if not variant.packed:
        parts = [[only(t, TextSegment) for t in trajectories]]
        for steps in window_steps(False, sampling):
            drawn = [only(t, ImageSegment) for t in trajectories]
            parts.append([window(t, steps) for t in drawn])
    share = 1.0 / max(1, len(parts) - 1)  # a mean over window steps, one to a part
    scaled = replace(
        objective,
        flow_weight=objective.flow_weight * share,
        mse_weight=objective.mse_weight * share,
    )
    for part in parts:
        loss, _ = trajectory_loss(
            adapter(part), part, objective=scaled, sampling=sampling, counts=counts
        )
        loss.backward()
    return torch.cat([p.grad.flatten() for p in adapter.net.parameters() if p.grad is not None])


def window_steps(packed: bool, sampling: Sampling) -> list[slice]:
    """Return the window steps of each forward."""
    return [slice(None)] if packed else [slice(k, k + 1) for k in range(sampling.window_size)]


def only(trajectory: Trajectory, kind: type) -> Trajectory:
    """Return the trajectory with its other sampled segments given; a text alone needs no image."""
    segments = [
        s if isinstance(s, kind) else as_given(s)
        for s in trajectory.segments
        if not (kind is TextSegment and isinstance(s, ImageSegment))
    ]
    return replace(trajectory, segments=segments)


def window(trajectory: Trajectory, steps: slice) -> Trajectory:
    """Return the trajectory with only one step of its window."""
    *context, image = trajectory.segments
    part = replace(
        image,
        start=image.start + steps.start,
        states=image.states[steps.start : steps.stop + 1],
        sigmas=image.sigmas[steps.start : steps.stop + 1],
        **{name: getattr(image, name)[steps] for name in ("noise", "velocity", "ref_velocity")},
    )
    return replace(trajectory, segments=[*context, part])


def iteration(
    adapter: DigitsAdapter, variant: Variant, sampling: Sampling
) -> tuple[dict[str, float], torch.Tensor]:
    """Run one iteration and return its process time by part, and the gradient."""
    adapter.share_prefixes = variant.shared_prefix
    parts: dict[str, float] = {}
    defaults = adapter.defaults()
    starts = [Start(p, g, m) for g, p in enumerate(defaults.train[:PROMPTS]) for m in range(GROUP)]
    trajectories = draw(adapter, starts, sampling, variant, parts)
    for i, trajectory in enumerate(trajectories):  # any advantages of both signs do
        for _, segment in sampled([trajectory]):
            segment.advantage = 1.0 if i % 2 else -1.0
    images = torch.stack([t.segments[-1].latent for t in trajectories])
    reward = defaults.rewards[0]
    clock(
        parts,
        "reward",
        lambda: reward(
            images=adapter.decode(images, trajectories[0].segments[-1].grid),
            answer=[t.prompt.columns["answer"] for t in trajectories],
        ),
    )
    clock(parts, "reference", lambda: refer(adapter, trajectories, variant, sampling))
    gradient = clock(parts, "update", lambda: train(adapter, trajectories, variant, sampling))
    return parts, gradient


def main() -> None:
    """Measure all variants in turn and print the split and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapter = DigitsAdapter().eval()
    sampling = adapter.defaults().sampling
    runs: dict[str, list[dict[str, float]]] = {v.name: [] for v in VARIANTS}
    gradients = {}
    for repeat in range(args.repeats + 1):
        for variant in VARIANTS:
            parts, gradients[variant.name] = iteration(adapter, variant, sampling)
            if repeat:  # the first round warms up
                runs[variant.name].append(parts)
    for name, gradient in gradients.items():
        error = float((gradient - gradients["naive"]).norm() / gradients["naive"].norm())
        if error > 1e-3:
            raise RuntimeError(
                f"the gradient of '{name}' differs from the naive one by {error:.1e}"
            )
    report(runs, args.out)


def report(runs: dict[str, list[dict[str, float]]], out: Path | None) -> None:
    """Print medians and ratios to naive, and keep them."""
    split = {
        name: {part: median(run[part] for run in found) for part in found[0]}
        for name, found in runs.items()
    }
    total = {name: median(sum(run.values()) for run in found) for name, found in runs.items()}
    ratio = {name: total["naive"] / value for name, value in total.items()}
    table = Table(title="process seconds per iteration, one thread, median")
    for column in ("part", *split):
        table.add_column(column, justify="right")
    for part in split["naive"]:
        table.add_row(part, *(f"{values[part]:.3f}" for values in split.values()))
    table.add_row("total", *(f"{value:.3f}" for value in total.values()))
    table.add_row("naive / this", *(f"{value:.2f}" for value in ratio.values()))
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        record = {"machine": machine, "split": split, "total": total, "ratio": ratio}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
