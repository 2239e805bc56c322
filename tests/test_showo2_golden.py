"""Show-o2 against numbers that upstream's code produced.

Sizes, tolerances and cases come from the files, so another set of the same layout runs unchanged. At the
end: mistakes that are easily made, each of which must be seen by one of the groups.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss

from lightning_unigrpo.adapters.common.attention import Kind, PackedAttention
from lightning_unigrpo.adapters.showo2 import (
    ShowO2Adapter,
    ShowO2Config,
    ShowO2Net,
    network,
    packing,
    semantic,
)
from lightning_unigrpo.adapters.showo2 import config as sizes
from lightning_unigrpo.adapters.showo2 import flow as stack
from lightning_unigrpo.adapters.showo2.checkpoint import EMBEDDING, HEAD
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import ode_step, sigma_schedule
from lightning_unigrpo.rollout import sample_image
from lightning_unigrpo.types import ImageSegment, Prompt, Scores, Segment, TextSegment, Trajectory
from tests.conftest import golden_folder

FOLDER = golden_folder("showo2")
INFO = json.loads((FOLDER / "cases.json").read_text())
CONFIG = json.loads((FOLDER / "config.json").read_text())
CASES = load_file(FOLDER / "cases.safetensors")
IDS = CONFIG["token_ids"]
ATOL, ODE_ATOL = INFO["suggested_atol"], INFO["suggested_atol_ode"]
GUIDED_ATOL = 5e-5
"""Guidance of 5 multiplies rounding by up to 9."""
MARKS = {
    "bos": IDS["bos_id"],
    "eos": IDS["eos_id"],
    "begin_of_image": IDS["boi_id"],
    "end_of_image": IDS["eoi_id"],
}
ARGUMENTS = CONFIG["showo"] | {
    name: CONFIG[name] for name in ("siglip_vision_config", "diffusion_head_config")
}


class Ids:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def golden_adapter() -> ShowO2Adapter:
    config = ShowO2Config.from_upstream(ARGUMENTS, CONFIG["llm_config"], MARKS)
    net, state = ShowO2Net(config), load_file(FOLDER / "state_dict.safetensors")
    assert CONFIG["llm_config"]["tie_word_embeddings"]
    assert torch.equal(state.pop(HEAD), state[EMBEDDING])
    net.load_state_dict(state)
    return ShowO2Adapter(config, Ids(), net=net).eval()


@pytest.fixture
def adapter(golden_adapter: ShowO2Adapter) -> ShowO2Adapter:
    golden_adapter.zero_grad()
    return golden_adapter


def close(got: Tensor, name: str, part: Any = slice(None), *, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, CASES[name][part], atol=atol, rtol=ATOL)


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
    return -velocity.transpose(-1, -2).unflatten(-1, like.shape[-2:])


def grid_of(latents: Tensor) -> tuple[int, int]:
    return latents.shape[-2], latents.shape[-1]


def clean(latents: Tensor) -> ImageSegment:
    """Return an image ``[C, S, S]`` that is seen."""
    return ImageSegment(
        latent=rows_of(latents.unsqueeze(0))[0], grid=grid_of(latents), is_context=True
    )


def drawn(latents: Tensor, level: float | Tensor) -> ImageSegment:
    """Return an image ``[C, S, S]`` to be scored at one level."""
    rows = rows_of(latents.unsqueeze(0))
    levels = torch.tensor([float(level), 0.0])
    return ImageSegment(
        latent=rows[0], grid=grid_of(latents), states=torch.cat([rows, rows]), sigmas=levels
    )


def packed(adapter: ShowO2Adapter, *samples: list[Segment]) -> Scores:
    trajectories = [
        Trajectory(prompt=Prompt(text=""), segments=segments, group=0, member=i)
        for i, segments in enumerate(samples)
    ]
    return adapter(trajectories)


@torch.no_grad()
def cached(
    adapter: ShowO2Adapter, contexts: list[list[Segment]], latents: Tensor, levels: Tensor
) -> Tensor:
    """Return upstream's velocity through caches."""
    cache = adapter.prefill(contexts)
    return upstream(adapter.velocity(cache, rows_of(latents), levels, grid_of(latents)), latents)


def prompts(case: str) -> list[list[Segment]]:
    """Return the words of each row before the mark of its image."""
    ids, offsets = CASES[f"{case}.text_tokens"], CASES[f"{case}.modality_positions"][:, 0, 0]
    assert all(row[at - 1] == MARKS["begin_of_image"] for row, at in zip(ids, offsets, strict=True))
    return [[given(row[: at - 1])] for row, at in zip(ids, offsets, strict=True)]


def whole(
    adapter: ShowO2Adapter, case: str, latents: Tensor, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Run upstream's padded rows, every image noisy or clean, and return all logits and velocities."""
    packer, images = adapter.packer(), iter(latents)
    tokens, blocks = CASES[f"{case}.text_tokens"], CASES[f"{case}.modality_positions"]
    for row, places in zip(tokens.tolist(), blocks.tolist(), strict=True):
        packer.sample()
        at = 0
        for offset, length in places:
            packer.text(row[at:offset], at)
            image = clean(next(images))
            packer.picture(image, image.latent, image.grid, offset)
            at = offset + length
        packer.text(row[at:], at)
    pack, layout = packer.finish()
    pack = replace(pack, sigma=1 - times, num_seen=0, logit_rows=layout.rows.flatten())
    logits, velocity = adapter.net(pack, PackedAttention(layout, len(pack)))
    rows = velocity.unflatten(0, (len(latents), -1))
    return logits.unflatten(0, tokens.shape), upstream(rows, latents)


# ---- whole rows: groups c, c2, f, g, h


@torch.no_grad()
def test_rows_with_images(adapter: ShowO2Adapter) -> None:
    """Logits of every row, images and padding too, and velocities."""
    for case in ("c_velocity", "c2_interp"):
        logits, velocity = whole(adapter, case, CASES[f"{case}.x_t"], CASES[f"{case}.t"])
        close(velocity, f"{case}.velocity")
        if f"{case}.logits" in CASES:
            close(logits, f"{case}.logits")
    logits, _ = whole(
        adapter, "f_understanding", CASES["f_understanding.latents"], CASES["f_understanding.t"]
    )
    close(logits, "f_understanding.logits")
    logits, velocity = whole(
        adapter, "g_interleaved", CASES["g_interleaved.x"], CASES["g_interleaved.t"]
    )
    close(logits[:, : CASES["g_interleaved.logits"].shape[1]], "g_interleaved.logits")
    close(velocity, "g_interleaved.velocity")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_their_slope(
    adapter: ShowO2Adapter, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Upstream's two losses; and along the gradient of both they rise as it says.

    Central differences in float32: 1e-6 of rounding over a change of 2e-3, so 2e-3 is the bound.
    """
    monkeypatch.setattr(adapter.net, "gradient_checkpointing", checkpointing)

    def losses() -> tuple[Tensor, Tensor]:
        case = {name: CASES[f"h_losses.{name}"] for name in ("x_t", "t", "text_labels")}
        logits, velocity = whole(adapter, "h_losses", case["x_t"], case["t"])
        wanted = case["text_labels"][:, 1:].flatten()
        words = cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100)
        return words, mse_loss(velocity, CASES["h_losses.image_labels"])

    for which, name in enumerate(("loss_ntp", "loss_flow")):
        adapter.zero_grad()
        loss = losses()[which]
        close(loss.detach().unsqueeze(0), f"h_losses.{name}")
        loss.backward()
        moved = [p for p in adapter.net.parameters() if p.grad is not None]
        slope = sum(p.grad.square().sum() for p in moved if p.grad is not None).sqrt()
        found = []
        with torch.no_grad():
            for side in (1, -1, 0):
                kept = [p.clone() for p in moved]
                for p in moved:
                    assert p.grad is not None
                    p.add_(side * 1e-3 / slope / slope * p.grad)
                found.append(losses()[which])
                for p, old in zip(moved, kept, strict=True):
                    p.copy_(old)
        assert float(found[0] - found[1]) == pytest.approx(2e-3, rel=5e-3)


@torch.no_grad()
def test_what_the_modules_give(adapter: ShowO2Adapter) -> None:
    """Group c: both embedders, semantic layers, fusion, times, both stacks."""
    seen: dict[str, Any] = {}
    net = adapter.net
    modules = {
        "image_embedder_und": net.image_embedder_und,
        "image_embedder_gen": net.image_embedder_gen,
        "und_trans": net.und_trans.layers[-1],
        "fusion_proj": net.fusion_proj,
        "time_embed": net.time_embed,
        "time_embed_proj": net.time_embed_proj,
    }
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    whole(adapter, "c_velocity", CASES["c_velocity.x_t"], CASES["c_velocity.t"])
    for hook in hooks:
        hook.remove()
    for name in modules:
        close(seen[name], f"c_velocity.debug.{name}")


def test_what_images_and_words_may_attend_to(adapter: ShowO2Adapter) -> None:
    """Group c: upstream's dense mask."""
    packer, expected = adapter.packer(), CASES["c_velocity.allowed_mask"].squeeze(1)
    for row, ((offset, length),) in zip(
        CASES["c_velocity.text_tokens"].tolist(),
        CASES["c_velocity.modality_positions"].tolist(),
        strict=True,
    ):
        packer.sample()
        packer.text(row[:offset], 0)
        image = clean(CASES["c_velocity.x_t"][0])
        packer.picture(image, image.latent, image.grid, offset)
        packer.text(row[offset + length :], offset + length)
    assert torch.equal(packer.finish()[1].visible(), expected)


# ---- words: groups a, b


@torch.no_grad()
def fed(adapter: ShowO2Adapter, context: list[Segment], ids: Tensor) -> Tensor:
    """Return the logits behind a context and behind each further word."""
    cache, one = adapter.prefill([context]), torch.ones(1, dtype=torch.bool)
    tokens = [None, *ids.unsqueeze(1)]
    return torch.cat([adapter.next_logits(cache, token, one) for token in tokens])


@pytest.mark.parametrize("row", [0, 1])
def test_text_logits(adapter: ShowO2Adapter, row: int) -> None:
    """Word by word, and teacher-forced in the packed pass."""
    tokens, expected = CASES["a_text.text_tokens"][row], CASES["a_text.logits"][row]
    close(fed(adapter, [given(tokens[:1])], tokens[1:]), "a_text.logits", row)
    said = torch.cat([tokens[1:], torch.tensor([MARKS["eos"]])])
    (got,) = packed(adapter, [given(tokens[:1]), spoken(said)]).text
    wanted = expected.log_softmax(-1).gather(1, said.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=ATOL)


@torch.no_grad()
def test_greedy_decoding(adapter: ShowO2Adapter) -> None:
    """Three prompts of different lengths side by side, up to where upstream stops."""
    cases = ["b_greedy", "b_stop_boi", "b_stop_eos"]
    contexts: list[list[Segment]] = [[given(CASES[f"{case}.prompt"][0])] for case in cases]
    expected = [CASES[f"{case}.output"][0] for case in cases]
    assert expected[1][-1] == MARKS["begin_of_image"]
    assert expected[2][-1] == MARKS["eos"]
    cache, tokens = adapter.prefill(contexts), None
    for step in range(max(map(len, expected))):
        active = torch.tensor([step < len(words) for words in expected])
        log_p = adapter.next_logits(cache, tokens, active).log_softmax(-1)
        tokens = log_p.argmax(-1)
        for row in active.nonzero().flatten().tolist():
            assert tokens[row] == expected[row][step]
            wanted = CASES[f"{cases[row]}.logprobs"][0, step]
            torch.testing.assert_close(log_p[row].max(), wanted, atol=ATOL, rtol=ATOL)


# ---- velocities through the contract: groups c, c2, g


@pytest.mark.parametrize("case", ["c_velocity", "c2_interp"])
def test_velocity_of_a_ragged_batch(adapter: ShowO2Adapter, case: str) -> None:
    """Two rows of different lengths and times: one packed pass, one call on a cache."""
    x, levels = CASES[f"{case}.x_t"], 1 - CASES[f"{case}.t"]
    close(cached(adapter, prompts(case), x, levels), f"{case}.velocity")
    samples = [[*c, drawn(x[i], levels[i])] for i, c in enumerate(prompts(case))]
    for i, found in enumerate(packed(adapter, *samples).velocity):
        close(upstream(found, x), f"{case}.velocity", slice(i, i + 1))


def test_grids_and_states_side_by_side(adapter: ShowO2Adapter) -> None:
    """Images of two grids in one pass come back in their order; noise blocks do not see each other."""
    a, b = "c_velocity", "c2_interp"
    first, second, third = CASES[f"{a}.x_t"][0], CASES[f"{b}.x_t"][1], CASES[f"{a}.x_t"][1]
    levels = 1 - CASES[f"{a}.t"]
    twice = drawn(first, levels[0])
    assert twice.states is not None
    twice.states = torch.stack([rows_of(third.unsqueeze(0))[0], *twice.states])
    twice.sigmas = torch.tensor([0.9, float(levels[0]), 0.0])
    found = packed(
        adapter,
        [*prompts(a)[0], twice],
        [*prompts(b)[1], drawn(second, 1 - CASES[f"{b}.t"][1])],
        [*prompts(a)[1], drawn(third, levels[1])],
    ).velocity
    close(upstream(found[0][1:], first), f"{a}.velocity", slice(0, 1))
    close(upstream(found[1], second), f"{b}.velocity", slice(1, 2))
    close(upstream(found[2], third), f"{a}.velocity", slice(1, 2))


def interleaved() -> tuple[list[Segment], Tensor]:
    """Return group g's text, clean image and text, and the words of the second text."""
    ids, blocks = (
        CASES["g_interleaved.text_tokens"][0],
        CASES["g_interleaved.modality_positions"][0],
    )
    (one, length), (two, _) = blocks.tolist()
    words = ids[one + length + 1 : two - 1]  # without the marks around images
    assert ids[one + length] == MARKS["end_of_image"]
    return [given(ids[: one - 1]), clean(CASES["g_interleaved.x"][0]), given(words)], words


def test_text_image_text_image(adapter: ShowO2Adapter) -> None:
    """Group g: words behind an image, the second image, and the first at time 1."""
    x, levels = CASES["g_interleaved.x"], 1 - CASES["g_interleaved.t"]
    context, words = interleaved()
    close(cached(adapter, [context], x[1:], levels[1:]), "g_interleaved.velocity", slice(1, 2))
    said = spoken(torch.cat([words, torch.tensor([MARKS["eos"]])]))
    seen = replace(drawn(x[0], levels[0]), is_context=True)
    scores = packed(adapter, [context[0], seen, said, drawn(x[1], levels[1])])
    for i, found in enumerate(scores.velocity):
        close(upstream(found, x), "g_interleaved.velocity", slice(i, i + 1))
    (one, length), _ = CASES["g_interleaved.modality_positions"][0].tolist()
    logits = CASES["g_interleaved.logits"][0, one + length :][: len(words) + 1]
    torch.testing.assert_close(fed(adapter, context[:2], words), logits, atol=ATOL, rtol=ATOL)
    wanted = logits.log_softmax(-1).gather(1, said.tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(scores.text[0], wanted, atol=ATOL, rtol=ATOL)


def test_nothing_follows_an_image_that_is_not_seen(adapter: ShowO2Adapter) -> None:
    """Neither its rows nor the mark before it: the second image is group c's, the mark's place too."""
    x, level = CASES["c_velocity.x_t"], 1 - CASES["c_velocity.t"]
    for share in (True, False):
        adapter.share_prefixes = share
        words = prompts("c_velocity")[1]
        samples = [[*words, drawn(x[0], 0.5), drawn(x[1], level[1])], [*words, drawn(x[0], 0.4)]]
        _, found, _ = packed(adapter, *samples).velocity
        close(upstream(found, x), "c_velocity.velocity", slice(1, 2))


def test_a_text_is_read_without_its_stop_token(adapter: ShowO2Adapter) -> None:
    """A reasoning that stopped gives what upstream computes without the stop token."""
    x, levels = CASES["c_velocity.x_t"][1:], 1 - CASES["c_velocity.t"][1:]
    (text,) = prompts("c_velocity")[1]
    assert isinstance(text, TextSegment)
    segments: list[Segment] = [given(text.tokens[:4]), spoken(text.tokens[4:])]
    assert text.tokens[-1] == MARKS["eos"]
    (found,) = packed(adapter, [*segments, drawn(x[0], levels[0])]).velocity
    close(upstream(found, x), "c_velocity.velocity", slice(1, 2))
    close(cached(adapter, [segments], x, levels), "c_velocity.velocity", slice(1, 2))


# ---- sampling: groups d, e, g


@pytest.mark.parametrize("case", ["d_ode20", "d_ode50"])
def test_ode_sampling(adapter: ShowO2Adapter, case: str) -> None:
    """Every state of upstream's loop, and its end through the sampler of a rollout."""
    times, noise = CASES[f"{case}.times"], CASES[f"{case}.noise"]
    shift = CONFIG["transport"]["time_shifting_factor"]
    sigmas = sigma_schedule(len(times), shift=shift, convention="points")
    torch.testing.assert_close(1 - sigmas, times, atol=1e-6, rtol=0)
    cache = adapter.prefill(prompts(case))
    x, grid, states = rows_of(noise), grid_of(noise), CASES.get(f"{case}.trajectory")
    if states is not None:
        for k, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            torch.testing.assert_close(x, rows_of(states[k]), atol=ODE_ATOL, rtol=0)
            x = ode_step(adapter.velocity(cache, x, sigma.expand(len(x)), grid), x, sigma, after)
    found = sample_image(adapter, cache, rows_of(noise), sigmas, grid, sampling=Sampling())
    got = torch.stack([image.latent for image in found])
    torch.testing.assert_close(got, rows_of(CASES[f"{case}.final"]), atol=ODE_ATOL, rtol=0)


def test_only_the_last_image_is_integrated(adapter: ShowO2Adapter) -> None:
    """Group g: the first stays as it was, at time 1."""
    noise, final = CASES["g_interleaved.x"], CASES["g_interleaved.ode_final"]
    assert torch.equal(noise[0], final[0])
    sigmas = sigma_schedule(
        20, shift=CONFIG["transport"]["time_shifting_factor"], convention="points"
    )
    cache = adapter.prefill([interleaved()[0]])
    x, grid = rows_of(noise[1:]), grid_of(noise)
    (found,) = sample_image(adapter, cache, x, sigmas, grid, sampling=Sampling())
    torch.testing.assert_close(found.latent, rows_of(final)[1], atol=ODE_ATOL, rtol=0)


def test_guidance(adapter: ShowO2Adapter) -> None:
    """The two branches at one state, and their combination."""
    x, level = CASES["e_cfg.x_t"], 1 - CASES["e_cfg.t"]
    context, empty = prompts("e_cfg")
    assert isinstance(empty[0], TextSegment)
    assert empty[0].tokens.tolist() == [MARKS["bos"], MARKS["eos"]]
    cache, other = adapter.prefill([context]), adapter.guidance([context])
    rows, grid = rows_of(x), grid_of(x)
    close(upstream(adapter.velocity(cache, rows, level, grid), x), "e_cfg.v_cond")
    close(upstream(adapter.velocity(other, rows, level, grid), x), "e_cfg.v_uncond")
    scale = CONFIG["transport"]["guidance_scale"]
    guided = adapter.guided_velocity(cache, other, rows, level, grid, scale=scale)
    close(upstream(guided, x), "e_cfg.velocity", atol=GUIDED_ATOL)


# ---- pictures: group f


def picture_context() -> tuple[list[Segment], Tensor]:
    """Return the context up to the picture, and the words behind its end mark."""
    ids = CASES["f_understanding.text_tokens"][0]
    ((offset, length),) = CASES["f_understanding.modality_positions"][0].tolist()
    image = clean(CASES["f_understanding.latents"][0])
    return [given(ids[: offset - 1]), image], ids[offset + length + 1 :]


def test_understanding(adapter: ShowO2Adapter) -> None:
    """A picture as context, the words behind it, and the answer."""
    context, words = picture_context()
    logits = CASES["f_understanding.logits"][0, -len(words) - 1 :]
    torch.testing.assert_close(fed(adapter, context, words), logits, atol=ATOL, rtol=ATOL)
    said = torch.cat([words, torch.tensor([MARKS["eos"]])])
    (got,) = packed(adapter, [*context, spoken(said)]).text
    wanted = logits.log_softmax(-1).gather(1, said.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=ATOL)
    answer = CASES["f_understanding.greedy"][0]
    found = fed(adapter, [*context, given(words)], answer[:-1]).argmax(-1)
    assert torch.equal(found, answer)


# ---- mistakes that a group must see


def errors(adapter: ShowO2Adapter) -> dict[str, float]:
    """Return the largest error of each group that a mistake could be in."""
    found = {}
    for case in ("c_velocity", "c2_interp"):
        x, levels, expected = (CASES[f"{case}.{name}"] for name in ("x_t", "t", "velocity"))
        levels = 1 - levels
        samples = [[*c, drawn(x[i], levels[i])] for i, c in enumerate(prompts(case))]
        with torch.no_grad():
            velocity = torch.cat([*packed(adapter, *samples).velocity])
        found[f"{case} packed"] = upstream(velocity, x) - expected
        found[f"{case} cached"] = cached(adapter, prompts(case), x, levels) - expected
    x, levels = CASES["g_interleaved.x"], 1 - CASES["g_interleaved.t"]
    second = cached(adapter, [interleaved()[0]], x[1:], levels[1:])
    found["interleaved"] = second - CASES["g_interleaved.velocity"][1:]
    context, words = picture_context()
    logits = CASES["f_understanding.logits"][0, -len(words) - 1 :]
    found["picture"] = fed(adapter, context, words) - logits
    return {name: float(each.abs().max()) for name, each in found.items()}


Mistake = Callable[[Any, pytest.MonkeyPatch], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(make: Mistake) -> Mistake:
    MISTAKES[make.__name__] = make
    return make


def permuted(layer: Any, parts: int, order: list[int]) -> None:
    """Give the outputs of a layer, cut into parts, another order."""
    for p in (layer.weight, layer.bias):
        chunks = p.data.chunk(parts)
        p.data = torch.cat([chunks[i] for i in order])


@mistake
def a_row_says_the_latents_it_reads(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    """The textbook's way back from squares."""
    right = ShowO2Net._velocity

    def wrong(self: Any, pack: Any, runs: Any, d: Tensor, times: Tensor) -> Tensor:
        found, first, parts = right(self, pack, runs, d, times), 0, []
        for h, w in pack.grids[pack.num_seen :]:
            rows = found[first : first + h * w].view(h // 2, w // 2, 2, 2, -1)
            parts.append(rows.transpose(1, 2).reshape(h * w, -1))
            first += h * w
        return torch.cat(parts) if parts else found

    patch.setattr(ShowO2Net, "_velocity", wrong)


@mistake
def image_rows_see_those_before_them(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    kinds = {"CAUSAL": Kind.CAUSAL, "NOISE": Kind.CAUSAL_NOISE, "FULL": Kind.CAUSAL}
    patch.setattr(packing, "Kind", type("Wrong", (), kinds))


@mistake
def no_mark_before_an_image(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing.Packer, "open", lambda _self, position: position)


@mistake
def no_mark_behind_an_image(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShowO2Adapter, "behind", lambda self, _image: [])


@mistake
def images_begin_at_position_0(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    noisy = packing.Packer.noisy
    patch.setattr(packing.Packer, "noisy", lambda self, x, s, grid, _at: noisy(self, x, s, grid, 0))


@mistake
def images_take_one_position(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShowO2Adapter, "see", lambda self, p, i, at: see(self, p, i, at) and 1)


see = ShowO2Adapter.see


@mistake
def the_stop_token_is_read(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShowO2Adapter, "_read_ids", lambda _self, text: text.tokens.tolist())


@mistake
def time_runs_with_the_noise(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.net.time_embed.register_forward_pre_hook(lambda _m, args: (1 - args[0],))


@mistake
def times_up_to_1000(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.net.time_embed.register_forward_pre_hook(lambda _m, args: (1000 * args[0],))


@mistake
def sines_before_cosines(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    first = adapter.net.time_embed.mlp[0].weight
    first.data = torch.cat(first.data.chunk(2, 1)[::-1], 1)


@mistake
def clean_images_at_time_0(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    """As upstream's script has it when words follow."""
    finish = packing.Packer.finish

    def wrong(self: Any) -> Any:
        pack, layout = finish(self)
        pack.sigma[: pack.num_seen] = 1
        return pack, layout

    patch.setattr(packing.Packer, "finish", wrong)


@mistake
def scale_before_shift(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in adapter.net.diffusion_head_a:
        permuted(layer.adaLN_modulation[1], 6, [1, 0, 2, 4, 3, 5])


@mistake
def scale_before_shift_at_the_end(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    permuted(adapter.net.diffusion_head_b.adaLN_modulation[1], 2, [1, 0])


@mistake
def the_mlps_modulation_first(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in adapter.net.diffusion_head_a:
        permuted(layer.adaLN_modulation[1], 6, [3, 4, 5, 0, 1, 2])


@mistake
def the_time_row_is_not_modulated(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    right = stack.modulated

    def wrong(x: Tensor, runs: Any, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        found = right(x, runs, scale, shift)
        for _, images, rows in runs:
            step = (rows.stop - rows.start) // (images.stop - images.start)
            firsts = torch.arange(rows.start, rows.stop, step)
            found[firsts] = x[firsts]
        return found

    patch.setattr(stack, "modulated", wrong)


@mistake
def words_skip_the_flow_stack(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    """Images see the words as the first layer got them."""
    layer = stack.FlowLayer.forward

    def wrong(self: Any, d: Tensor, times: Any, runs: Any, *rest: Any) -> Tensor:
        found = layer(self, d, times, runs, *rest)
        first = runs[0].rows.start if runs else len(d)
        return torch.cat([d[:first], found[first:]])

    patch.setattr(stack.FlowLayer, "forward", wrong)


@mistake
def no_norm_between_the_stacks(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    adapter.net.showo.model.norm = nn.Identity()


@mistake
def no_norm_of_queries_and_keys(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in adapter.net.diffusion_head_a:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()


@mistake
def the_rotation_is_not_scaled(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    plain = replace(adapter.config.flow, rope_scaling=dict(sizes.LLAMA3) | {"factor": 1.0})
    right = stack.rotary
    patch.setattr(network, "rotary", lambda _config, positions: right(plain, positions))


@mistake
def the_flow_stack_turns_as_the_language_model(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    wrong, right = replace(adapter.config.flow, rope_theta=1000000.0), stack.rotary
    patch.setattr(network, "rotary", lambda _config, positions: right(wrong, positions))


@mistake
def positions_are_interpolated_smoothly(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    def smooth(*args: Any, **settings: Any) -> Tensor:
        return interpolate(*args, **settings, antialias=True)

    patch.setattr(semantic, "interpolate", smooth)


@mistake
def positions_are_cut_off(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        network, "positions_for", lambda table, grid: table.repeat(9, 1)[: grid[0] * grid[1]]
    )


@mistake
def one_semantic_layer_too_few(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    del adapter.net.und_trans.layers[-1]


@mistake
def an_exact_gelu_in_the_semantic_layers(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    gelu = nn.functional.gelu
    patch.setattr(semantic, "gelu", lambda x, approximate: gelu(x))


@mistake
def detail_before_meaning(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    first, split = adapter.net.fusion_proj[1].weight, adapter.config.semantic.width
    first.data = torch.cat([first.data[:, split:], first.data[:, :split]], 1)


@mistake
def velocity_towards_data(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for p in adapter.net.diffusion_head_b.linear.parameters():
        p.data = -p.data


@mistake
def columns_before_rows(adapter: Any, patch: pytest.MonkeyPatch) -> None:
    for embed in (adapter.net.image_embedder_und, adapter.net.image_embedder_gen):
        embed.proj.weight.data = embed.proj.weight.data.mT.contiguous()


def copied(adapter: ShowO2Adapter) -> ShowO2Adapter:
    """Return an adapter with weights of its own."""
    return ShowO2Adapter(adapter.config, Ids(), net=copy.deepcopy(adapter.net)).eval()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(
    golden_adapter: ShowO2Adapter, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wrong = copied(golden_adapter)
    MISTAKES[name](wrong, monkeypatch)
    assert max(errors(wrong).values()) > 10 * ATOL


def test_without_a_mistake(golden_adapter: ShowO2Adapter) -> None:
    assert max(errors(copied(golden_adapter)).values()) < ATOL


def test_every_eps_is_the_configs() -> None:
    """The vectors cannot tell an eps from one ten times as large: so each is read."""
    found = copy.deepcopy(ARGUMENTS)
    found["siglip_vision_config"]["layer_norm_eps"] = 1e-4
    found["diffusion_head_config"]["rms_norm_eps"] = 1e-3
    language = CONFIG["llm_config"] | {"rms_norm_eps": 1e-2}
    with torch.device("meta"):
        net = ShowO2Net(ShowO2Config.from_upstream(found, language, MARKS))
    for name, module in net.named_modules():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is None:
            continue
        expected = 1e-6
        if name.startswith("showo."):
            expected = 1e-2
        elif name.startswith("und_trans."):
            expected = 1e-4
        elif name.startswith("diffusion_head_a.") and name.endswith("layernorm"):
            expected = 1e-3
        assert eps == expected, name
