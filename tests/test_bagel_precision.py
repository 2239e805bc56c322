"""Which of Bagel's tensors are float32 and which bfloat16, and how often a number is rounded on its way.

Three ways to compute: float32 weights under autocast (full fine-tuning), bfloat16 weights (a frozen base,
inference), and both. Weights are numbers that bfloat16 holds, so all three are the same function as the
float64 reference but for rounding. A rounding to bfloat16 moves a number by at most 1 / 256 of itself.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig, BagelNet
from lightning_unigrpo.adapters.bagel.network import Heads, Pack, RMSNorm
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import sigma_schedule, transition
from lightning_unigrpo.rollout import sample_image, sample_text
from lightning_unigrpo.types import ImageSegment, Prompt, TextSegment, Trajectory
from tests.published import write_checkpoint
from tests.test_bagel_golden import Ids

WIDE, NARROW = torch.float32, torch.bfloat16
CONFIG = BagelConfig(
    vocab_size=200,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    z_channels=4,
    latent_downsample=2,
    max_latent_size=8,
    bos=196,
    eos=197,
    start_of_image=198,
    end_of_image=199,
)
GRID, N, C = (6, 6), 36, CONFIG.latent_channels


class Mode(NamedTuple):
    """How a network computes."""

    weights: torch.dtype
    autocast: bool

    def __call__(self) -> torch.autocast:
        """Return the context to compute in."""
        return torch.autocast("cpu", NARROW, enabled=self.autocast)


FINE_TUNING, INFERENCE, PRODUCTION = Mode(WIDE, True), Mode(NARROW, False), Mode(NARROW, True)
modes = pytest.mark.parametrize(
    "mode",
    [FINE_TUNING, INFERENCE, PRODUCTION],
    ids=["float32 weights, autocast", "bfloat16 weights", "bfloat16 weights, autocast"],
)


def build(weights: torch.dtype, seed: int = 0) -> BagelAdapter:
    """Return an adapter whose weights are not neutral, and whose queries and keys are long."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = BagelAdapter(CONFIG, Ids())
        with torch.no_grad():
            for name, parameter in adapter.net.named_parameters():
                if parameter.ndim == 1:
                    centre = 0.0 if name.endswith("bias") else 1.0
                    parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
                if "q_norm" in name or "k_norm" in name:
                    parameter.mul_(2)
                parameter.copy_(parameter.to(NARROW))
    return adapter.to(weights).eval()


class Record:
    """What passes through a network: modules by name, and the heads of each call of attention.

    Args:
        net: watched from now on.
    """

    change: Callable[[int, Heads, Pack], Heads] | None = None
    """Replaces the heads before they attend; told the layer and the rows of the call."""

    def __init__(self, net: BagelNet) -> None:
        self.packs: list[Pack] = []
        self.ropes: list[Tensor] = []
        self.heads: list[Heads] = []
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        net.register_forward_pre_hook(self._attention)
        for layer in net.language_model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: self.ropes.extend(sum(args[1], ())))
        for name, module in net.named_modules():
            if isinstance(module, nn.Linear | RMSNorm):
                module.register_forward_hook(self._hook(name))
        net.time_embedder.register_forward_hook(self._hook("time_embedder"))

    def _hook(self, name: str) -> Callable[..., None]:
        return lambda _, args, out: self.calls[name].append((args[0], out))

    def _attention(self, _: nn.Module, args: tuple[Pack, Any]) -> tuple[Pack, Any]:
        pack, attention = args
        self.packs.append(pack)

        def attend(layer: int, heads: Heads, *others: Any) -> Any:
            if self.change is not None:
                heads = self.change(layer, heads, pack)
            self.heads.append(heads)
            return attention(layer, heads, *others)

        return pack, attend

    def of(self, *parts: str) -> list[tuple[Tensor, Tensor]]:
        """Return input and output of the modules with one of these parts in their names."""
        return [
            c for name, calls in self.calls.items() if any(p in name for p in parts) for c in calls
        ]


def words(num: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 196, (num,), generator=generator)


def rollout_of(generator: torch.Generator) -> Trajectory:
    """Return a request, a reasoning and three states of an image."""
    states = torch.randn(4, N, C, generator=generator)
    image = ImageSegment(
        latent=states[-1],
        grid=GRID,
        states=states,
        sigmas=torch.tensor([0.9231, 0.5019, 0.2509, 0.0]),
    )
    text = TextSegment(tokens=words(9, generator), log_prob=torch.zeros(9), temperature=0.7)
    given = TextSegment(tokens=words(12, generator))
    return Trajectory(prompt=Prompt(text=""), segments=[given, text, image], group=0, member=0)


def dtypes(tensors: Any) -> set[torch.dtype]:
    return {tensor.dtype for tensor in tensors}


@modes
def test_which_is_which(mode: Mode, generator: torch.Generator) -> None:
    """Everything between prefill and the packed pass, in the order in which a number meets it."""
    adapter, row = build(mode.weights), rollout_of(generator)
    record, text, image = Record(adapter.net), row.segments[1], row.segments[2]
    assert isinstance(image, ImageSegment)
    assert image.states is not None
    looked_at = ImageSegment(latent=image.latent, grid=GRID, is_context=True)
    with torch.no_grad(), mode():
        cache = adapter.prefill([row.segments[:1]])
        logits = adapter.next_logits(cache, None, torch.ones(1, dtype=torch.bool))
        adapter.extend(cache, [text])
        velocity = adapter.velocity(cache, image.states[:1], torch.tensor([0.9231]), GRID)
        adapter.extend(cache, [looked_at])
        scores = adapter([row])
    found = {
        "states and levels": [x for pack in record.packs for x in (pack.latents, pack.sigma)],
        "levels in the embedder": [
            given for given, _ in record.of("time_embedder") if given.ndim == 1
        ],
        "sines of a level": [given for given, _ in record.of("time_embedder.mlp.0")],
        "angles": record.ropes,
        "rows between layers": [given for given, _ in record.of("_layernorm")],
        "normalised rows": [out for _, out in record.of("_layernorm")],
        "projected rows": [out for _, out in record.of("_proj")],
        "queries and keys": [x for heads in record.heads for x in heads[:2]],
        "values": [heads.value for heads in record.heads],
        "attended": [given for given, _ in record.of("o_proj")],
        "cache": [*cache.keys, *cache.values],
        "outputs": [out for _, out in record.of("lm_head", "llm2vae")],
        "results": [logits, velocity, *scores.text, *scores.entropy, *scores.velocity],
    }
    stream = WIDE if mode is FINE_TUNING else NARROW
    expected = {
        "states and levels": WIDE,
        "levels in the embedder": WIDE,
        "sines of a level": stream,
        "angles": WIDE,
        "rows between layers": stream,
        "normalised rows": stream,
        "projected rows": NARROW,
        "queries and keys": stream,
        "values": NARROW,
        "attended": NARROW,
        "cache": NARROW,
        "outputs": NARROW,
        "results": WIDE,
    }
    assert {name: dtypes(tensors) for name, tensors in found.items()} == {
        name: {dtype} for name, dtype in expected.items()
    }
    # Logits and velocities are the outputs, not computed again.
    assert torch.equal(logits, record.of("lm_head")[1][1].float())


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    """Assert that float64 numbers were rounded as they should, but for those next to a border.

    float32 errs by 1e-7: one number in 30,000 lies so near to the middle between two of bfloat16.
    """
    expected = exact.to(found.dtype).double()
    off = (found.double() - expected).abs() > 1e-6 + 2e-6 * expected.abs()
    assert off.double().mean() < 2e-3


@modes
def test_norms_compute_in_float32(mode: Mode, generator: torch.Generator) -> None:
    """``weight * cast(x / rms(x))``: one rounding, and that of the product where the weight is bfloat16.

    A mean of squares in bfloat16 would move whole rows.
    """
    adapter = build(mode.weights)
    record = Record(adapter.net)
    with torch.no_grad(), mode():
        adapter([rollout_of(generator)])
    norms = {name: m for name, m in adapter.net.named_modules() if isinstance(m, RMSNorm)}
    assert norms.keys() < record.calls.keys()
    for name, module in norms.items():
        for x, out in record.calls[name]:
            wide = x.double()
            wide = wide / (wide.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt()
            if x.dtype is NARROW:
                wide = wide.to(NARROW).double()
            assert_rounded(out, module.weight.double() * wide)


@modes
def test_levels_of_noise_are_embedded_in_float32(mode: Mode, generator: torch.Generator) -> None:
    """Sines of a level that bfloat16 does not hold, rounded once at the door of the MLP."""
    adapter = build(mode.weights)
    record = Record(adapter.net)
    with torch.no_grad(), mode():
        adapter([rollout_of(generator)])
    ((sigma, _),) = record.calls["time_embedder"]
    ((features, _),) = record.calls["time_embedder.mlp.0"]
    assert not (sigma == sigma.to(NARROW)).any()
    speeds = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = sigma.double().unsqueeze(1) * speeds
    assert_rounded(features, torch.cat([angles.cos(), angles.sin()], 1))


# ---- queries, keys, attention


def by_hand(x: Tensor, norm: RMSNorm, positions: Tensor) -> Tensor:
    """Normalise and rotate projected rows ``[M, H * D]`` in float64."""
    size = CONFIG.head_dim
    wide = x.double().unflatten(1, (-1, size))
    wide = (
        wide
        / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        * norm.weight.detach().double()
    )
    speeds = CONFIG.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = (positions.double().unsqueeze(1) * speeds).unsqueeze(1)
    a, b = wide.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def roundings(found: Tensor, exact: Tensor) -> float:
    """Return the error in units of that which one rounding to bfloat16 makes."""
    one = (exact.to(NARROW).double() - exact).norm()
    return float((found.to(NARROW).double() - exact).norm() / one)


@modes
@pytest.mark.parametrize("position", [0, 1000, 30_000])
def test_rotation_at_any_position(mode: Mode, generator: torch.Generator, position: int) -> None:
    """The angle is float32: behind 30,000 words queries and keys err as behind a few.

    In roundings, at any position: 1.4 with float32 weights (the norm's cast back, the cast for attention),
    2.2 with bfloat16 weights (also the weight's product, the rotation's). Upstream's sampler: 2.2 for
    words; 1.3 for the rows of an image, normalised and rotated in float32 by cosines in bfloat16. An angle
    in bfloat16 makes 150 at position 1000.
    """
    adapter = build(mode.weights)
    record, bound = Record(adapter.net), 1.6 if mode is FINE_TUNING else 2.5
    with torch.no_grad(), mode():
        cache = adapter.prefill([[]])
        cache.positions.fill_(position)
        adapter.extend(cache, [TextSegment(tokens=words(40, generator))])
        adapter.velocity(cache, torch.randn(1, N, C, generator=generator), torch.ones(1), GRID)
    attention = adapter.net.language_model.model.layers[0].self_attn._modules
    layers = CONFIG.num_hidden_layers
    for call, pack in enumerate(record.packs):
        heads = record.heads[call * layers]
        assert int(pack.positions.min()) >= position
        for expert, rows in (
            ("", slice(len(pack.positions))),
            ("_moe_gen", slice(len(pack.positions), None)),
        ):
            where = pack.latent_positions if expert else pack.positions
            if not len(where):
                continue
            for part, found in (("q", heads.query), ("k", heads.key)):
                name = f"language_model.model.layers.0.self_attn.{part}_proj{expert}"
                projected = record.calls[name][0 if expert else call][1]
                norm = attention[f"{part}_norm{expert}"]
                assert isinstance(norm, RMSNorm)
                exact = by_hand(projected, norm, where)
                if len(where) > 2:  # two marks are too few for a norm to be steady
                    assert roundings(found[rows], exact) < bound
    # What is remembered is what attended, rounded once.
    text = record.heads[0]
    assert torch.equal(cache.keys[0][0, : len(text.key)], text.key.to(NARROW))
    assert torch.equal(cache.values[0][0, : len(text.value)], text.value)


@modes
def test_scores_and_softmax_are_not_bfloat16(mode: Mode, generator: torch.Generator) -> None:
    """Their inputs are, and the result: 1.05 roundings of it. Scores in bfloat16 would make 2 to 4."""
    adapter = build(mode.weights)
    record = Record(adapter.net)
    with torch.no_grad(), mode():
        cache = adapter.prefill([[TextSegment(tokens=words(30, generator))]])
        adapter.velocity(cache, torch.randn(1, N, C, generator=generator), torch.ones(1), GRID)
    total = int(cache.lengths) + N + 2  # its own rows lie behind the context
    for layer in range(CONFIG.num_hidden_layers):
        heads = record.heads[CONFIG.num_hidden_layers + layer]
        path = f"language_model.model.layers.{layer}.self_attn.o_proj"
        out = torch.cat([record.calls[path + expert][-1][0] for expert in ("", "_moe_gen")])
        query = heads.query.to(NARROW).double().transpose(0, 1)
        key, value = (
            x[layer][0, :total].double().transpose(0, 1) for x in (cache.keys, cache.values)
        )
        scores = query @ key.transpose(1, 2) / CONFIG.head_dim**0.5
        assert scores.abs().max() > 8

        def attended(scores: Tensor, value: Tensor = value) -> Tensor:
            return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)

        exact = attended(scores)
        assert roundings(out, exact) < 1.3
        assert roundings(attended(scores.to(NARROW).double()), exact) > 1.8


def upstream(net: BagelNet, record: Record) -> Callable[[int, Heads, Pack], Heads]:
    """Return how upstream's sampler makes queries and keys of all rows of an image, marks included.

    Normalised and rotated in float32, by cosines that were rounded to bfloat16; then bfloat16.
    """

    def change(layer: int, heads: Heads, pack: Pack) -> Heads:
        if not len(pack.latents):
            return heads
        path = f"language_model.model.layers.{layer}.self_attn"
        new = []
        for part in ("q", "k"):
            rows = []
            for expert, where in (("", pack.positions), ("_moe_gen", pack.latent_positions)):
                x = record.calls[f"{path}.{part}_proj{expert}"][-1][1].float()
                norm = net.get_submodule(f"{path}.{part}_norm{expert}")
                x = norm(x.unflatten(1, (-1, CONFIG.head_dim)))
                speeds = CONFIG.rope_theta ** (
                    -torch.arange(0, CONFIG.head_dim, 2).float() / CONFIG.head_dim
                )
                angles = (where.float().unsqueeze(1) * speeds).unsqueeze(1)
                cos, sin = (x.to(NARROW).float() for x in (angles.cos(), angles.sin()))
                a, b = x.float().chunk(2, -1)
                rows.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
            new.append(torch.cat(rows).to(NARROW))
        return heads._replace(query=new[0], key=new[1])

    return change


@functools.cache
def velocity_error(mode: Mode, *, as_upstream: bool = False) -> float:
    """Return the relative error of velocities behind a text, against float64; mean over four models."""
    errors = []
    for seed in range(4):
        found = []
        for way in (Mode(torch.float64, autocast=False), mode):
            adapter, generator = build(way.weights, seed), torch.Generator().manual_seed(seed)
            record = Record(adapter.net)
            if as_upstream and way is mode:
                record.change = upstream(adapter.net, record)
            x, given = torch.randn(1, N, C, generator=generator), words(30, generator)
            with way():
                cache = adapter.prefill([[TextSegment(tokens=given)]])
                found.append(adapter.velocity(cache, x, torch.tensor([0.7]), GRID).double())
        exact, rough = found
        errors.append(float((rough - exact).norm() / exact.norm()))
    return sum(errors) / len(errors)


@modes
def test_velocities_are_no_rougher_than_upstream(mode: Mode) -> None:
    """Queries and keys of an image are rounded 1.3 times there, 1.4 or 2.2 times here; it does not show.

    Relative errors here: ours 0.0054 with float32 weights, where rows between layers are float32, and
    0.0082 with bfloat16 weights; upstream's sampler (bfloat16 weights under autocast) 0.0083. Upstream's
    training pass rounds as ours does, and ours as our sampler.
    """
    theirs = velocity_error(PRODUCTION, as_upstream=True)
    assert theirs != velocity_error(PRODUCTION)
    assert velocity_error(mode) < 1.15 * theirs


# ---- what leaves the network


@modes
def test_log_probs_are_computed_in_float32(mode: Mode, generator: torch.Generator) -> None:
    """From the head's logits, in the packed pass and in decoding; in bfloat16 they would err by 0.01."""
    adapter, row = build(mode.weights), rollout_of(generator)
    temperature, (given, text) = 0.7, row.segments[:2]
    assert isinstance(text, TextSegment)
    record = Record(adapter.net)
    with torch.no_grad(), mode():
        scores = adapter([row])
        drawn = sample_text(
            adapter,
            adapter.prefill([[given]]).expand([3]),
            torch.rand(3, 5, generator=generator, dtype=torch.float64),
            max_tokens=5,
            temperature=temperature,
        )
    packed, *steps = [out for _, out in record.calls["language_model.lm_head"] if len(out)]
    exact = (packed.double() / temperature).log_softmax(-1)
    expected = exact.gather(1, text.tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(scores.text[0].double(), expected, atol=2e-6, rtol=1e-6)
    entropy = -(exact.exp() * exact).sum(-1)
    torch.testing.assert_close(scores.entropy[0].double(), entropy, atol=1e-5, rtol=1e-6)
    coarse = (packed / temperature).log_softmax(-1).gather(1, text.tokens.unsqueeze(1)).squeeze(1)
    assert (coarse.double() - expected).abs().max() > 2e-3
    assert all(len(text.tokens) == 5 for text in drawn)
    for i, logits in enumerate(steps):
        exact = (logits.double() / temperature).log_softmax(-1)
        for b, text in enumerate(drawn):
            assert text.log_prob is not None
            assert text.log_prob.dtype is WIDE
            found = text.log_prob[i].double()
            torch.testing.assert_close(found, exact[b, text.tokens[i]], atol=2e-6, rtol=1e-6)


@modes
def test_states_stay_float32_through_a_rollout(
    mode: Mode, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same velocities integrated in float64 end in the same place; each state has all its bits."""
    adapter, shape = build(mode.weights), (2, N, C)
    states: list[Tensor] = []
    velocities: list[Tensor] = []
    ask = adapter.velocity

    def spied(cache: Any, latents: Tensor, *others: Any) -> Tensor:
        states.append(latents)
        velocities.append(ask(cache, latents, *others))
        return velocities[-1]

    monkeypatch.setattr(adapter, "velocity", spied)
    sampling = Sampling(window_size=3, eta=0.8)
    sigmas = sigma_schedule(9, shift=3.0, convention="points")
    noise, steps = (torch.randn(n, generator=generator) for n in (shape, (2, 3, *shape[1:])))
    with mode():
        cache = adapter.prefill([[TextSegment(tokens=words(n, generator))] for n in (5, 9)])
        images = sample_image(
            adapter,
            cache,
            noise,
            sigmas,
            GRID,
            windows=[range(1, 4)] * 2,
            window_noise=steps,
            sampling=sampling,
        )
    x = noise.double()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.double())):
        v = velocities[i].double()
        if 1 <= i < 4:
            mean, std = transition(v, x, sigma, sigma_next, eta=sampling.eta)
            x = mean + std * steps[:, i - 1].double()
        else:
            x = x - (sigma - sigma_next) * v
    assert dtypes(states) == dtypes(velocities) == {WIDE}
    for state in states:
        assert (state != state.to(NARROW)).double().mean() > 0.95
    for b, image in enumerate(images):
        assert image.states is not None
        assert image.velocity is not None
        assert dtypes([image.latent, image.states, image.velocity]) == {WIDE}
        torch.testing.assert_close(image.latent.double(), x[b], atol=1e-5, rtol=0)
        assert torch.equal(image.states[:3], torch.stack(states)[1:4, b])
        assert torch.equal(image.velocity, torch.stack(velocities)[1:4, b])


def test_autoencoder_and_tower_stay_float32(tmp_path: Path, generator: torch.Generator) -> None:
    """Beside a network in bfloat16: pixels, latents and patches as beside one in float32, to the bit."""
    folder = write_checkpoint(tmp_path)
    adapters = [BagelAdapter.from_pretrained(folder, dtype=d) for d in ("float32", "bfloat16")]
    pixels = torch.rand(3, 40, 24, generator=generator)
    found = []
    for adapter in adapters:
        adapter.materialize()
        parts = adapter.frozen_modules()
        assert len(parts) == 2
        assert dtypes(p for part in parts for p in part.parameters()) == {WIDE}
        (seen, _) = adapter.tokenize(Prompt(text="a dog", images=(pixels,)))
        assert isinstance(seen, ImageSegment)
        latents = torch.randn(seen.latent.shape, generator=torch.Generator().manual_seed(1))
        looked = adapter.look(ImageSegment(latent=latents, grid=seen.grid, is_context=True))
        image = adapter.decode(latents.unsqueeze(0), seen.grid)
        found.append([seen.latent, *seen.views.values(), *looked.views.values(), image])
    assert dtypes(adapters[1].net.parameters()) == {NARROW}
    assert len(found[0]) == 5
    for a, b in zip(*found, strict=True):
        assert a.dtype is WIDE
        assert torch.equal(a, b)


def test_autoencoder_is_float32_under_autocast(tmp_path: Path) -> None:
    """bf16-mixed training decodes and encodes as float32 does, to the bit."""
    adapter = BagelAdapter.from_pretrained(write_checkpoint(tmp_path))
    adapter.materialize()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 40, 24, generator=generator)
    latents = torch.randn(1, 15, adapter.latent_channels, generator=generator)
    expected = adapter.see(pixels).latent, adapter.decode(latents, (5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.see(pixels).latent, adapter.decode(latents, (5, 3))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), float((a - b).abs().max())
