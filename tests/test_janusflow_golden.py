"""JanusFlow against numbers that upstream's code produced.

Sizes, tolerances and cases come from the files, so another set of the same layout runs unchanged. At the
end: mistakes that are easily made, each of which must be seen by one of the groups.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_unigrpo.adapters.common.attention import Kind
from lightning_unigrpo.adapters.janusflow import JanusFlowAdapter, JanusFlowConfig, network, packing
from lightning_unigrpo.adapters.janusflow import flow as halves
from lightning_unigrpo.adapters.janusflow.checkpoint import Checkpoint
from lightning_unigrpo.adapters.janusflow.pretrained import on_meta
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import ode_step, sigma_schedule
from lightning_unigrpo.rollout import sample_image
from lightning_unigrpo.types import ImageSegment, Prompt, Scores, Segment, TextSegment, Trajectory
from tests.conftest import golden_folder

FOLDER = golden_folder("janusflow")
INFO = json.loads((FOLDER / "cases.json").read_text())
CONFIG = json.loads((FOLDER / "config.json").read_text())
META = INFO["meta"]
CASES = load_file(FOLDER / "cases.safetensors")
ATOL = 1e-5
"""Of values and gradients on a CPU; the files' own bound, 5e-5, is for any machine."""
ODE_ATOL = 5e-5
"""Of whole runs, the files' own: sigma = 1 - s in float32 moves each timestep of 1000 s by up to 3e-5."""
GRADIENT_RTOL = 1e-5
"""Some gradients are above 10."""
MARKS = {
    "bos": META["special_ids"]["bos"],
    "eos": META["special_ids"]["eos"],
    "end_of_image": META["special_ids"]["eoi"],
}


class Ids:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def golden_adapter(tmp_path_factory: pytest.TempPathFactory) -> JanusFlowAdapter:
    """Load the golden model as a published one is loaded."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copyfile(FOLDER / "config.json", folder / "config.json")
    shutil.copyfile(FOLDER / "state_dict.safetensors", folder / "model.safetensors")
    checkpoint, cpu = Checkpoint(folder), torch.device("cpu")
    config = checkpoint.config(MARKS)
    assert config == JanusFlowConfig.from_upstream(CONFIG, MARKS)
    parts = on_meta(config, torch.float32)
    checkpoint.check(parts)
    for part in parts.values():
        checkpoint.fill(part, device=cpu)
    return JanusFlowAdapter(config, Ids(), **parts).eval()


@pytest.fixture
def adapter(golden_adapter: JanusFlowAdapter) -> JanusFlowAdapter:
    golden_adapter.zero_grad()
    return golden_adapter


def close(got: Tensor, name: str, part: Any = slice(None)) -> None:
    torch.testing.assert_close(got, CASES[name][part], atol=ATOL, rtol=0)


def given(ids: Tensor) -> TextSegment:
    """Return context as it is: one stop token at the end of a text is not read."""
    return TextSegment(tokens=torch.cat([ids, torch.tensor([MARKS["eos"]])]))


def spoken(ids: Tensor) -> TextSegment:
    return TextSegment(tokens=ids, log_prob=torch.zeros(len(ids)))


def rows_of(latents: Tensor) -> Tensor:
    """Return ``[B, N, C]`` for upstream's ``[B, C, S, S]``."""
    return latents.flatten(2).transpose(1, 2)


def upstream(velocity: Tensor, like: Tensor) -> Tensor:
    """Return upstream's velocity: data - noise, channels first."""
    return -velocity.transpose(1, 2).unflatten(2, like.shape[2:])


def drawn(latents: Tensor, level: float | Tensor) -> ImageSegment:
    """Return an image ``[C, S, S]`` to be scored at one level."""
    rows = rows_of(latents.unsqueeze(0))
    levels = torch.tensor([float(level), 0.0])
    grid = (latents.shape[1], latents.shape[2])
    return ImageSegment(latent=rows[0], grid=grid, states=torch.cat([rows, rows]), sigmas=levels)


def packed(adapter: JanusFlowAdapter, *samples: list[Segment]) -> Scores:
    trajectories = [
        Trajectory(prompt=Prompt(text=""), segments=segments, group=0, member=i)
        for i, segments in enumerate(samples)
    ]
    return adapter(trajectories)


@torch.no_grad()
def cached(
    adapter: JanusFlowAdapter, contexts: list[list[Segment]], latents: Tensor, levels: Tensor
) -> Tensor:
    """Return upstream's velocity through caches."""
    cache, grid = adapter.prefill(contexts), (latents.shape[2], latents.shape[3])
    return upstream(adapter.velocity(cache, rows_of(latents), levels, grid), latents)


# ---- words: groups a, b, g


@torch.no_grad()
def fed(adapter: JanusFlowAdapter, context: list[Segment], ids: Tensor) -> Tensor:
    """Return the logits behind a context and behind each further word."""
    cache, one = adapter.prefill([context]), torch.ones(1, dtype=torch.bool)
    tokens = [None, *ids.unsqueeze(1)]
    return torch.cat([adapter.next_logits(cache, token, one) for token in tokens])


@pytest.mark.parametrize(
    ("ids", "logits"), [("a.input_ids", "a.logits"), ("g.context_ids", "g.text_logits")]
)
def test_text_logits(adapter: JanusFlowAdapter, ids: str, logits: str) -> None:
    """Word by word, and teacher-forced in the packed pass."""
    tokens, expected = CASES[ids][0], CASES[logits][0]
    close(fed(adapter, [given(tokens[:1])], tokens[1:]), logits, 0)
    said = torch.cat([tokens[1:], torch.tensor([MARKS["eos"]])])
    (got,) = packed(adapter, [given(tokens[:1]), spoken(said)]).text
    wanted = expected.log_softmax(-1).gather(1, said.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["b", "b2"])
@torch.no_grad()
def test_greedy_decoding(adapter: JanusFlowAdapter, case: str) -> None:
    """A prompt alone, and two of different lengths; a row's words count up to its stop token."""
    ids = CASES[f"{case}.input_ids"]
    mask = CASES.get(f"{case}.attention_mask", torch.ones_like(ids)).bool()
    contexts: list[list[Segment]] = [
        [given(row[seen])] for row, seen in zip(ids, mask, strict=True)
    ]
    cache, active = adapter.prefill(contexts), torch.ones(len(ids), dtype=torch.bool)
    expected, logits = CASES[f"{case}.new_tokens"], CASES[f"{case}.step_logits"]
    tokens = None
    for step, word in enumerate(expected.T):
        found = adapter.next_logits(cache, tokens, active)
        torch.testing.assert_close(found[active], logits[active, step], atol=ATOL, rtol=0)
        tokens = found.argmax(-1)
        assert torch.equal(tokens[active], word[active])
        active = active & (tokens != MARKS["eos"])


# ---- velocities: groups c, c48, g


def test_velocity_of_a_ragged_batch(adapter: JanusFlowAdapter) -> None:
    """Two rows of different lengths and levels: one packed pass, one call on a cache."""
    x, levels = CASES["c.x_t"], 1 - CASES["c.t"]
    contexts: list[list[Segment]] = [[given(CASES[f"c.ctx{i}"][0])] for i in range(2)]
    got = cached(adapter, contexts, x, levels)
    close(got, "c.v")
    close(got, "c.v_leftpad")
    samples = [[*c, drawn(x[i], levels[i])] for i, c in enumerate(contexts)]
    for i, found in enumerate(packed(adapter, *samples).velocity):
        close(upstream(found, x), "c.v", slice(i, i + 1))


@pytest.mark.parametrize(("case", "context"), [("c48", "c48.ctx"), ("g", "g.context_ids")])
def test_velocity(adapter: JanusFlowAdapter, case: str, context: str) -> None:
    """On the release's grid, and behind words that were sampled."""
    x, level = CASES[f"{case}.x_t"], 1 - CASES[f"{case}.t"]
    ids = CASES[context][0]
    texts: list[Segment] = [given(ids)] if case == "c48" else [given(ids[:5]), spoken(ids[5:])]
    close(cached(adapter, [texts], x, level), f"{case}.v")
    (found,) = packed(adapter, [*texts, drawn(x[0], level)]).velocity
    close(upstream(found, x), f"{case}.v")


def test_a_text_is_read_without_its_stop_token(adapter: JanusFlowAdapter) -> None:
    """Group g: a reasoning that stopped gives what upstream computes without the stop token."""
    x, level, ids = CASES["g.x_t"], 1 - CASES["g.t"], CASES["g.context_ids"][0]
    said = spoken(torch.cat([ids[5:], torch.tensor([MARKS["eos"]])]))
    (found,) = packed(adapter, [given(ids[:5]), said, drawn(x[0], level)]).velocity
    close(upstream(found, x), "g.v")
    close(cached(adapter, [[given(ids[:5]), said]], x, level), "g.v")


def test_images_of_two_grids_in_one_pass(adapter: JanusFlowAdapter) -> None:
    """They run by grid, and come back in their order."""
    x, level = CASES["c.x_t"], 1 - CASES["c.t"]
    large, context = CASES["c48.x_t"], given(CASES["c48.ctx"][0])
    samples: list[list[Segment]] = [
        [given(CASES["c.ctx0"][0]), drawn(x[0], level[0])],
        [context, drawn(large[0], 1 - CASES["c48.t"])],
        [given(CASES["c.ctx1"][0]), drawn(x[1], level[1])],
    ]
    first, second, third = packed(adapter, *samples).velocity
    close(upstream(first, x), "c.v", slice(0, 1))
    close(upstream(second, large), "c48.v")
    close(upstream(third, x), "c.v", slice(1, 2))


def test_what_the_modules_give(adapter: JanusFlowAdapter) -> None:
    """Group c, row 0: encoder, time embedding, and the decoder's last hidden states."""
    seen: dict[str, Any] = {}
    net = adapter.net
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, module in (
            ("encoder", net.vision_gen_enc_model),
            ("norm", net.language_model.model.norm),
        )
    ]
    x, level = CASES["c.x_t"][:1], 1 - CASES["c.t"][:1]
    cached(adapter, [[given(CASES["c.ctx0"][0])]], x, level)
    for hook in hooks:
        hook.remove()
    close(seen["encoder"][0], "c.enc_feature0")
    close(seen["encoder"][1], "c.t_emb0")
    close(seen["norm"][:, 1:], "c.lm_hidden0")  # behind the time embedding's


# ---- sampling: groups d, e


def test_ode_sampling(adapter: JanusFlowAdapter) -> None:
    """Every state of upstream's loop, and its end through the sampler of a rollout."""
    steps = META["d.num_steps"]
    sigmas = sigma_schedule(steps, shift=1.0, convention="steps")
    torch.testing.assert_close(1000 * (1 - sigmas[:-1]).float(), CASES["d.timesteps"])
    noise = CASES["d.noise"]
    rows, grid = rows_of(noise), (noise.shape[2], noise.shape[3])
    context = given(CASES["d.input_ids"][0, :-1])  # the marker's place is the time embedding's
    cache = adapter.prefill([[context]]).expand([len(rows)])
    x = rows
    for k, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        torch.testing.assert_close(x, rows_of(CASES["d.x_traj"][k]), atol=ODE_ATOL, rtol=0)
        x = ode_step(adapter.velocity(cache, x, sigma.expand(len(x)), grid), x, sigma, after)
    torch.testing.assert_close(x, rows_of(CASES["d.final"]), atol=ODE_ATOL, rtol=0)
    found = sample_image(adapter, cache, rows, sigmas, grid, sampling=Sampling())
    again = torch.stack([image.latent for image in found])
    torch.testing.assert_close(again, rows_of(CASES["d.final"]), atol=ODE_ATOL, rtol=0)


def test_guidance(adapter: JanusFlowAdapter) -> None:
    """The two branches at one state, their combination, and a whole guided run."""
    steps, scale = META["e.num_steps"], META["e.cfg_weight"]
    sigmas = sigma_schedule(steps, shift=1.0, convention="steps")
    context: list[Segment] = [given(CASES["e.input_ids"][0, :-1])]
    x = CASES["e.x_t"]
    contexts, grid = [context] * len(x), (x.shape[2], x.shape[3])
    cache, other = adapter.prefill(contexts), adapter.guidance(contexts)
    level = (1 - CASES["e.timestep"] / 1000).expand(len(x))
    assert float(level[0]) == pytest.approx(float(sigmas[META["e.step_index"]]), abs=1e-6)
    rows = rows_of(x)
    close(upstream(adapter.velocity(cache, rows, level, grid), x), "e.v_cond")
    close(upstream(adapter.velocity(other, rows, level, grid), x), "e.v_uncond")
    guided = adapter.guided_velocity(cache, other, rows, level, grid, scale=scale)
    close(upstream(guided, x), "e.v")
    y = rows_of(CASES["e.noise"])
    for sigma, after in itertools.pairwise(sigmas):
        v = adapter.guided_velocity(cache, other, y, sigma.expand(len(y)), grid, scale=scale)
        y = ode_step(v, y, sigma, after)
    torch.testing.assert_close(y, rows_of(CASES["e.final"]), atol=ODE_ATOL, rtol=0)


# ---- pictures: group f


def picture_context(adapter: JanusFlowAdapter) -> tuple[list[Segment], Tensor]:
    """Return the context up to the picture, picture included, and the words behind its end mark."""
    ids, seen = CASES["f.input_ids"][0], CASES["f.images_seq_mask"][0].nonzero().squeeze(1)
    first, last = int(seen[0]), int(seen[-1])
    assert ids[last + 1] == MARKS["end_of_image"]
    assert adapter.vision is not None
    with torch.no_grad():
        rows = adapter.vision(CASES["f.pixel_values"][0])[0]
    none = torch.zeros(0, dtype=torch.long)
    views = {"before": none, "rows": rows, "after": ids[last + 1 : last + 2]}
    picture = ImageSegment(
        latent=torch.zeros(0, adapter.latent_channels), grid=(0, 0), is_context=True, views=views
    )
    return [given(ids[:first]), picture], ids[last + 2 :]


def test_understanding(adapter: JanusFlowAdapter) -> None:
    """The tower, its rows in the context, and the words behind them."""
    assert adapter.vision is not None
    with torch.no_grad():
        close(adapter.vision.features(CASES["f.pixel_values"][0]), "f.vision_features")
    context, words = picture_context(adapter)
    assert isinstance(context[1], ImageSegment)
    seen = CASES["f.images_seq_mask"][0]
    close(context[1].views["rows"], "f.inputs_embeds", (0, seen))
    logits = CASES["f.logits"][0, -len(words) - 1 :]
    torch.testing.assert_close(fed(adapter, context, words), logits, atol=ATOL, rtol=0)
    said = torch.cat([words, torch.tensor([MARKS["eos"]])])
    (got,) = packed(adapter, [*context, spoken(said)]).text
    wanted = logits.log_softmax(-1).gather(1, said.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


# ---- gradients: group h


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(
    adapter: JanusFlowAdapter, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.setattr(adapter.net, "gradient_checkpointing", checkpointing)
    x, level = CASES["c.x_t"][:1], 1 - CASES["c.t"][:1]
    image = drawn(x[0], level)
    assert image.states is not None
    image.states.requires_grad_()
    (found,) = packed(adapter, [given(CASES["c.ctx0"][0]), image]).velocity
    (upstream(found, x) * CASES["h.probe"]).sum().backward()
    assert image.states.grad is not None
    torch.testing.assert_close(
        image.states.grad[:1], rows_of(CASES["h.grad_x_t"]), atol=ATOL, rtol=GRADIENT_RTOL
    )
    names = [name.removeprefix("h.grad.") for name in CASES if name.startswith("h.grad.")]
    assert len(names) >= 5
    for name in names:
        grad = adapter.net.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(grad, CASES[f"h.grad.{name}"], atol=ATOL, rtol=GRADIENT_RTOL)


# ---- mistakes that a group must see


def errors(adapter: JanusFlowAdapter) -> dict[str, float]:
    """Return the largest error of each group that a mistake could be in."""
    x, levels = CASES["c.x_t"], 1 - CASES["c.t"]
    contexts: list[list[Segment]] = [[given(CASES[f"c.ctx{i}"][0])] for i in range(2)]
    samples = [[*c, drawn(x[i], levels[i])] for i, c in enumerate(contexts)]
    with torch.no_grad():
        velocity = torch.cat([*packed(adapter, *samples).velocity])
        other = adapter.guidance([[given(CASES["e.input_ids"][0, :-1])]] * len(CASES["e.x_t"]))
        y = CASES["e.x_t"]
        level = (1 - CASES["e.timestep"] / 1000).expand(len(y))
        alone = adapter.velocity(other, rows_of(y), level, (y.shape[2], y.shape[3]))
    context, words = picture_context(adapter)
    logits = CASES["f.logits"][0, -len(words) - 1 :]
    return {
        "packed": float((upstream(velocity, x) - CASES["c.v"]).abs().max()),
        "cached": float((cached(adapter, contexts, x, levels) - CASES["c.v"]).abs().max()),
        "unconditional": float((upstream(alone, y) - CASES["e.v_uncond"]).abs().max()),
        "picture": float((fed(adapter, context, words) - logits).abs().max()),
    }


def swap_halves(layer: Any, axis: int = 0) -> None:
    """Exchange the two halves of a layer's outputs (axis 0) or inputs (axis 1)."""
    first, second = layer.weight.data.chunk(2, axis)
    layer.weight.data = torch.cat([second, first], axis)
    if axis == 0:
        layer.bias.data = torch.cat(list(layer.bias.data.chunk(2))[::-1])


def every_block(net: Any) -> list[Any]:
    return [
        block
        for half in (net.vision_gen_enc_model, net.vision_gen_dec_model)
        for block in half.mid_block.res_blocks
    ]


Mistake = Callable[[Any, pytest.MonkeyPatch], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(make: Mistake) -> Mistake:
    MISTAKES[make.__name__] = make
    return make


@mistake
def image_rows_see_each_other(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "Kind", type("Wrong", (), {"CAUSAL": 0, "CAUSAL_NOISE": Kind.NOISE}))


@mistake
def shift_before_scale(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for block in every_block(adapter.net):
        swap_halves(block.cond_embeds_mapper)


@mistake
def modulation_before_the_skip(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor, e: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.channelwise_norm(nn.functional.gelu(self.channelwise_linear_1(y)))
        y = self.channelwise_linear_2(y).permute(0, 3, 1, 2)
        scale, shift = self.cond_embeds_mapper(nn.functional.silu(e))[..., None, None].chunk(2, 1)
        return y * (1 + scale) + shift + x

    patch.setattr(halves.Block, "forward", forward)


@mistake
def no_silu_before_the_modulation(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for block in every_block(adapter.net):
        block.cond_embeds_mapper.register_forward_pre_hook(lambda _m, _i: (adapter.raw_e,))
    embed = adapter.net.vision_gen_enc_model.time_embed
    embed.register_forward_hook(lambda _m, _i, out: setattr(adapter, "raw_e", out))


@mistake
def timesteps_from_0_to_1(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(network, "TIMESTEPS", 1)


@mistake
def timesteps_run_with_the_noise(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    embed = adapter.net.vision_gen_enc_model.time_embed
    embed.register_forward_pre_hook(lambda _m, args: (1000 - args[0],))


@mistake
def timesteps_in_bfloat16(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    embed = adapter.net.vision_gen_enc_model.time_embed
    embed.register_forward_pre_hook(lambda _m, args: (args[0].bfloat16().float(),))


@mistake
def sines_before_cosines(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    swap_halves(adapter.net.vision_gen_enc_model.time_embed.linear_1, axis=1)


@mistake
def no_second_norm(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.net.vision_gen_dec_aligner_norm = nn.Identity()


@mistake
def no_first_norm(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.net.language_model.model.norm = nn.Identity()


@mistake
def skip_before_hidden_states(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden: Tensor, skip: Tensor, e: Tensor) -> Tensor:
        return self.out_convs[0](self.mid_block(torch.cat([skip, self.input_norm(hidden)], 1), e))

    patch.setattr(halves.FlowDecoder, "forward", forward)


@mistake
def pixels_before_channels(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    out = adapter.net.vision_gen_dec_model.out_convs[0].unpatch_conv
    for p in (out.weight, out.bias):
        p.data = p.data.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


@mistake
def columns_before_rows(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    encode = halves.FlowEncoder.forward
    decode = halves.FlowDecoder.forward

    def encoder(self: Any, latents: Tensor, timestep: Tensor) -> Any:
        skip, e = encode(self, latents, timestep)
        return skip.mT, e

    patch.setattr(halves.FlowEncoder, "forward", encoder)
    patch.setattr(
        halves.FlowDecoder, "forward", lambda self, h, skip, e: decode(self, h.mT, skip.mT, e)
    )


@mistake
def tanh_gelu(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    gelu = nn.functional.gelu
    patch.setattr(nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))


@mistake
def response_of_channels_alone(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    """The mean of the responses left out."""

    def forward(self: Any, u: Tensor) -> Tensor:
        return (
            self.bias
            + (self.weight * torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True) + 1) * u
        )

    patch.setattr(halves.ResponseNorm, "forward", forward)


@mistake
def response_without_its_input(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for block in every_block(adapter.net):
        block.channelwise_norm.weight.data.sub_(1)


@mistake
def velocity_towards_data(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    out = adapter.net.vision_gen_dec_model.out_convs[0].unpatch_conv
    for p in (out.weight, out.bias):
        p.data = -p.data


@mistake
def the_time_embedding_is_no_row(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    """Its place holds zeros instead."""
    encode = network.JanusFlowNet._encode

    def wrong(self: Any, latents: Tensor, sigma: Tensor) -> Any:
        rows, skip, e = encode(self, latents, sigma)
        return torch.cat([torch.zeros_like(rows[:, :1]), rows[:, 1:]], 1), skip, e

    patch.setattr(network.JanusFlowNet, "_encode", wrong)


@mistake
def images_begin_at_position_0(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    noisy = packing.Packer.noisy
    patch.setattr(packing.Packer, "noisy", lambda self, x, s, grid, _at: noisy(self, x, s, grid, 0))


@mistake
def no_gap_behind_bos(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(JanusFlowAdapter, "_length", lambda *_: 1)


@mistake
def the_stop_token_is_read(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(JanusFlowAdapter, "_read_ids", lambda _self, text: text.tokens.tolist())


@mistake
def keys_before_queries(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for block in adapter.vision.vision_und_enc_model["vision_tower"].blocks:
        qkv = block.attn.qkv
        for p in (qkv.weight, qkv.bias):
            q, k, v = p.data.chunk(3)
            p.data = torch.cat([k, q, v])


@mistake
def no_norm_behind_the_tower(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.vision.vision_und_enc_model["vision_tower"].norm = nn.Identity()


@mistake
def one_layer_of_the_tower_too_few(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    del adapter.vision.vision_und_enc_model["vision_tower"].blocks[-1]


@mistake
def no_mark_before_a_picture(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.vision.beg_of_und_embed.data.zero_()


def copied(adapter: JanusFlowAdapter) -> JanusFlowAdapter:
    """Return an adapter with weights of its own."""
    net, vision = copy.deepcopy(adapter.net), copy.deepcopy(adapter.vision)
    return JanusFlowAdapter(adapter.config, Ids(), net=net, vision=vision).eval()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(
    golden_adapter: JanusFlowAdapter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wrong = copied(golden_adapter)
    MISTAKES[name](wrong, monkeypatch)
    assert max(errors(wrong).values()) > 10 * ATOL


def test_without_a_mistake(golden_adapter: JanusFlowAdapter) -> None:
    assert max(errors(copied(golden_adapter)).values()) < ATOL


def test_every_eps_is_the_configs() -> None:
    """The vectors cannot tell an eps from one ten times as large: so each is read."""
    found = copy.deepcopy(CONFIG)
    found["language_config"]["rms_norm_eps"] = 1e-3
    found["vision_gen_enc_config"]["params"]["norm_eps"] = 1e-4
    found["vision_gen_dec_config"]["params"]["norm_eps"] = 1e-5
    config = JanusFlowConfig.from_upstream(found, MARKS)
    parts = on_meta(config, torch.float32)
    expected = {
        "language_model.": 1e-3,
        "vision_gen_dec_aligner_norm": 1e-3,
        "vision_gen_enc_model.": 1e-4,
        "vision_gen_dec_model.": 1e-5,
        "vision_und_enc_model.": 1e-6,
    }
    seen = dict.fromkeys(expected, 0)
    for part in parts.values():
        for name, module in part.named_modules():
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            if eps is not None:
                (prefix,) = [p for p in expected if name.startswith(p)]
                assert eps == expected[prefix], name
                seen[prefix] += 1
    assert halves.GRN_EPS == 1e-6
    flow, layers = config.flow, CONFIG["language_config"]["num_hidden_layers"]
    assert config.vision is not None
    assert list(seen.values()) == [
        2 * layers + 1,
        1,
        flow.encoder_blocks,
        1 + flow.decoder_blocks + flow.upsamples,
        2 * config.vision.layers + 1,
    ]


def test_padding_of_the_first_convolution() -> None:
    """Absent or null, it is ``ceil(kernel - stride)``."""
    params = CONFIG["vision_gen_enc_config"]["params"] | {"kernel_size": 3}
    for given_padding, expected in ((None, 1), (2, 2)):
        found = {**CONFIG, "vision_gen_enc_config": {"params": params | {"padding": given_padding}}}
        assert JanusFlowConfig.from_upstream(found, MARKS).flow.padding == expected
    del params["padding"]
    found = {**CONFIG, "vision_gen_enc_config": {"params": params}}
    assert JanusFlowConfig.from_upstream(found, MARKS).flow.padding == 1


def test_two_doublings_of_the_grid() -> None:
    """Stride 4: keys and shapes of upstream's list."""
    flow = replace(JanusFlowConfig.from_upstream(CONFIG).flow, stride=4, kernel_size=4, upsamples=2)
    found = {n: tuple(p.shape) for n, p in halves.FlowDecoder(flow, 8).named_parameters()}
    wide = flow.decoder_channels + flow.encoder_width
    assert found["out_convs.0.norm.weight"] == (wide,)
    assert found["out_convs.0.unpatch_conv.weight"] == (4 * flow.encoder_width, wide, 1, 1)
    assert found["out_convs.1.norm.weight"] == (flow.encoder_width,)
    assert found["out_convs.1.unpatch_conv.weight"] == (16, flow.encoder_width, 1, 1)
