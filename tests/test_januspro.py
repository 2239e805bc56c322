"""Janus-Pro through the contract: the golden vectors once more, drawing, looking, guidance, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.adapters.januspro import JanusProAdapter, Marks
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.rollout import Start, rollout, sample_image_tokens, sample_text
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import (
    ImageSegment,
    Prompt,
    Segment,
    TextSegment,
    TokenImageSegment,
    Trajectory,
    as_given,
)
from tests.test_januspro_network import (
    CASES,
    CONFIG,
    IDS,
    INFO,
    VISION,
    VQ,
    close,
    copied,
    guided,
    unpadded,
)

MARKS = Marks(
    bos=IDS["bos"],
    eos=IDS["eos"],
    pad=IDS["pad"],
    begin_image=IDS["boi"],
    end_image=IDS["eoi"],
)
GRID = (4, 4)


class Letters:
    """A tokenizer with one id per letter, out of the marks' way."""

    def encode(self, text: str) -> list[int]:
        return [10 + ord(letter) % 140 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def golden_adapter(**settings: Any) -> JanusProAdapter:
    settings = {"look_prompt": "ok?"} | settings
    return JanusProAdapter(
        CONFIG, Letters(), marks=MARKS, net=copied(), vq=VQ, vision=VISION, **settings
    ).eval()


@pytest.fixture(scope="module")
def adapter() -> JanusProAdapter:
    return golden_adapter()


def text(ids: Sequence[int]) -> TextSegment:
    return TextSegment(tokens=torch.tensor(ids))


def drawing(codes: Tensor, **fields: Any) -> TokenImageSegment:
    return TokenImageSegment(tokens=codes, grid=GRID, log_prob=torch.zeros(len(codes)), **fields)


def trajectory(segments: list[Segment]) -> Trajectory:
    return Trajectory(prompt=Prompt(text=""), segments=segments, group=0, member=0)


def contexts(name: str, rows: int = 1) -> list[list[Segment]]:
    """Return the texts of a case; the begin mark at their end is the image's own."""
    found = [unpadded(name, row) for row in range(rows)]
    assert all(ids[-1] == MARKS.begin_image for ids in found)
    return [[text(ids[:-1])] for ids in found]


# ---- golden vectors


def test_a_and_b_greedy_text(adapter: JanusProAdapter) -> None:
    ids = unpadded("a")
    for length in range(1, len(ids) + 1):
        cache = adapter.prefill([[text(ids[:length])]])
        found = adapter.next_logits(cache, None, torch.tensor([True]))[0]
        torch.testing.assert_close(found, CASES["a.logits"][0, length - 1], atol=1e-5, rtol=0)
    cache = adapter.prefill([[text(unpadded("b"))]])
    new = sample_text(adapter, cache, None, max_tokens=8, temperature=1.0)[0].tokens.tolist()
    expected = CASES["b.new_tokens"][0].tolist()
    assert new == expected[: len(new)]
    assert len(new) == len(expected) or new[-1] == MARKS.eos


@pytest.mark.parametrize(("name", "rows"), [("c", 1), ("f", 2)])
def test_c_and_f_drawing_greedily(adapter: JanusProAdapter, name: str, rows: int) -> None:
    """Ragged rows together; the logits of every step where they are known."""
    codes = CASES[f"{name}.image_tokens"]
    cache = adapter.prefill(contexts(name, rows))
    drawn = torch.full_like(codes, -1)
    for step in range(codes.shape[1]):
        logits = adapter.next_image_logits(cache, drawn, step, GRID)
        if name == "c":
            expected = CASES["c.step_logits"][:, step]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        drawn[:, step] = logits.argmax(1)
    assert torch.equal(drawn, codes)


def scored_d(adapter: JanusProAdapter, **image: Any) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of case d's thought and codes in one packed pass."""
    begin, length = INFO["meta"]["d.prompt_len"], INFO["meta"]["d.thought_len"]
    ids = CASES["d.context_ids"][0]
    assert ids[begin + length :].tolist() == [MARKS.begin_image]
    thought = TextSegment(tokens=ids[begin : begin + length], log_prob=torch.zeros(length))
    codes = drawing(CASES["d.image_tokens"][0], **image)
    with torch.no_grad():
        scores = adapter([trajectory([text(ids[:begin].tolist()), thought, codes])])
    return scores.text[0], scores.image_tokens[0]


def test_d_thought_and_codes_in_one_pass(adapter: JanusProAdapter) -> None:
    words, codes = scored_d(adapter)
    close(words, "d.text_logprobs")
    close(codes, "d.image_logprobs")


def test_d_sees_a_forgotten_temperature(adapter: JanusProAdapter) -> None:
    with pytest.raises(AssertionError, match=r"d\.image_logprobs"):
        close(scored_d(adapter, temperature=0.7)[1], "d.image_logprobs")


def test_e_pixels(adapter: JanusProAdapter) -> None:
    found = adapter.decode(CASES["c.image_tokens"], GRID)
    expected = (CASES["e.decoded"].permute(0, 3, 1, 2) + 1) / 2
    torch.testing.assert_close(found, expected.clamp(0, 1), atol=1e-5, rtol=0)
    assert float(expected.min()) < 0  # a random model leaves the range
    assert float(expected.max()) > 1


def test_g_looking(adapter: JanusProAdapter) -> None:
    """An input image stands between ``begin`` and ``end``, in the middle of the words."""
    ids = unpadded("g")
    first, last = ids.index(IDS["image"]), len(ids) - ids[::-1].index(IDS["image"])
    assert (ids[first - 1], ids[last]) == (MARKS.begin_image, MARKS.end_image)
    with torch.no_grad():
        features = VISION(CASES["g.pixel_values"])[0]
    views = {
        "before": torch.tensor([MARKS.begin_image]),
        "features": features,
        "after": torch.tensor([MARKS.end_image]),
    }
    image = ImageSegment(latent=torch.zeros(0, 0), grid=(0, 0), is_context=True, views=views)
    rest = ids[last + 1 :]
    segments: list[Segment] = [text(ids[: first - 1]), image]
    cache = adapter.prefill([segments])
    one = torch.tensor([True])
    found = [adapter.next_logits(cache, None, one)]
    found += [adapter.next_logits(cache, torch.tensor([word]), one) for word in rest]
    expected = CASES["g.logits"][0, last:]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=0)
    thought = TextSegment(tokens=torch.tensor(rest), log_prob=torch.zeros(len(rest)))
    with torch.no_grad():
        scores = adapter([trajectory([*segments, thought])])
    log_p = expected[:-1].log_softmax(1).gather(1, thought.tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(scores.text[0], log_p, atol=1e-5, rtol=0)


def test_h_guided_drawing(adapter: JanusProAdapter) -> None:
    codes, rows = CASES["h.image_tokens_cfg2"], contexts("h")
    cache, without = adapter.prefill(rows), adapter.guidance(rows)
    drawn, expected = torch.full_like(codes, -1), guided(codes[0])
    for step in range(codes.shape[1]):
        found = adapter.guided_image_logits(
            cache, without, drawn, step, GRID, scale=INFO["meta"]["h.guidance_scale"]
        )
        # 2 c - u: three times the rounding of one pass.
        torch.testing.assert_close(found[0], expected[step], atol=3e-5, rtol=0)
        drawn[:, step] = found.argmax(1)
    assert torch.equal(drawn, codes)
    # With guidance the codes are others than without it.
    assert not torch.equal(codes, CASES["c.image_tokens"])


# ---- the contract

PROMPTS = [Prompt(text=words, id=i) for i, words in enumerate(["a cube", "two green apples", "x"])]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "share_prefixes": False},
        {"lora": LowRank(rank=2), "system_prompt": "think"},
        {"freeze": ("generation_",)},
    ],
    ids=["plain", "checkpointing", "lora", "frozen"],
)
def test_contract(settings: dict[str, Any]) -> None:
    check_adapter(golden_adapter(**settings), PROMPTS)


@pytest.mark.parametrize("rounds", [(1, 2), pytest.param((3,), marks=pytest.mark.slow)], ids=str)
def test_contract_with_input_images(rounds: tuple[int, ...]) -> None:
    """In one prompt of two, between its words."""
    picture = torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(0))
    prompts = [replace(PROMPTS[0], text="a <image> cube", images=(picture,)), PROMPTS[1]]
    check_adapter(golden_adapter(), prompts, rounds=rounds)


def test_other_pictures_are_other_rows(adapter: JanusProAdapter) -> None:
    """Behind the same words, packed together with shared beginnings: each counts as alone."""
    ids = CASES["d.context_ids"][0]
    codes = [CASES["c.image_tokens"][0], CASES["h.image_tokens_cfg2"][0]]
    given = [TokenImageSegment(tokens=c, grid=GRID, is_context=True) for c in codes]
    rows = [
        trajectory([text(ids[:6].tolist()), adapter.look(image), drawing(codes[0])])
        for image in given
    ]
    with torch.no_grad():
        together = adapter(rows).image_tokens
        alone = [adapter([row]).image_tokens[0] for row in rows]
    assert float((alone[0] - alone[1]).abs().max()) > 1e-2
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def drawn(adapter: JanusProAdapter, **settings: Any) -> list[Trajectory]:
    settings = {"plan": ("text", "image"), "max_text_tokens": 5, "seed": 0} | settings
    starts = [Start(prompt, i, m) for i, prompt in enumerate(PROMPTS) for m in range(2)]
    return [t for chunk in rollout(adapter, starts, Sampling(**settings)) for t in chunk]


@pytest.mark.parametrize("plan", [("image",), ("text", "image"), ("text", "image") * 2])
def test_packed_log_probs_are_those_that_were_sampled(
    adapter: JanusProAdapter, plan: tuple[Any, ...]
) -> None:
    """At temperature 1 and without guidance: what T2I-R1 does not have."""
    found = drawn(adapter, plan=plan)
    with torch.no_grad():
        scores = adapter(found)
    segments = [s for t in found for s in t.segments]
    for kind, new in ((TextSegment, scores.text), (TokenImageSegment, scores.image_tokens)):
        old = [s.log_prob for s in segments if isinstance(s, kind) and s.log_prob is not None]
        assert (
            len(old)
            == len(new)
            == len(found) * plan.count("text" if kind is TextSegment else "image")
        )
        for a, b in zip(new, old, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_guided_codes_are_not_the_scored_policy(adapter: JanusProAdapter) -> None:
    """What T2I-R1 trains on: log-probabilities of the guided distribution are others."""
    rows = contexts("h")
    uniforms = torch.full((1, 16), 0.5)
    image = sample_image_tokens(
        adapter,
        adapter.prefill(rows),
        uniforms,
        GRID,
        temperature=1.0,
        unconditional=adapter.guidance(rows),
        guidance_scale=5.0,
    )[0]
    with torch.no_grad():
        scores = adapter([trajectory([*rows[0], image])])
    assert image.log_prob is not None
    assert float((scores.image_tokens[0] - image.log_prob).abs().max()) > 0.1


def test_evaluation_is_guided_if_asked_for(adapter: JanusProAdapter) -> None:
    """By hand: greedy texts, then codes from contexts with and without the request."""
    settings = Sampling(plan=("text", "image"), max_text_tokens=3, seed=0, guidance_scale=5.0)
    starts = [Start(prompt, i, 0) for i, prompt in enumerate(PROMPTS)]
    found = [t for chunk in rollout(adapter, starts, settings, evaluate=True) for t in chunk]
    for t in found:
        *context, image = t.segments
        assert isinstance(image, TokenImageSegment)
        cache, without = adapter.prefill([context]), adapter.guidance([context])
        tokens = torch.full((1, 16), -1)
        for step, code in enumerate(image.tokens):
            c = adapter.next_image_logits(cache, tokens, step, GRID)[0]
            u = adapter.next_image_logits(without, tokens, step, GRID)[0]
            log_p = (5 * c - 4 * u).log_softmax(0)
            assert image.log_prob is not None
            torch.testing.assert_close(log_p[code], image.log_prob[step], atol=1e-4, rtol=0)
            tokens[0, step] = code


def test_the_layout_of_a_second_round(adapter: JanusProAdapter) -> None:
    """By hand: the drawn picture ends the assistant's turn, and is shown in one of the user."""
    encode, codes = Letters().encode, CASES["c.image_tokens"][0]
    drawn_image = TokenImageSegment(tokens=codes, grid=GRID, is_context=True)
    packer = adapter.packer()
    packer.sample()
    before = [MARKS.eos, *encode("<|User|>: "), MARKS.begin_image]
    after = [MARKS.end_image, *encode("\nok?\n\n<|Assistant|>:")]
    assert adapter.see(packer, drawn_image, 7) == 0  # nobody looked at it
    assert adapter.see(packer, adapter.look(drawn_image), 7) == len(before) + 16 + len(after)
    pack, layout = packer.finish()
    order = layout.rows[0]
    assert pack.token_ids.tolist() == [*before, *after]
    assert pack.positions[order].tolist() == list(range(7, 7 + len(order)))
    pixels = adapter.pictures(adapter.decode(codes.unsqueeze(0), GRID)[0])
    with torch.no_grad():
        assert torch.equal(pack.features, VISION(pixels.unsqueeze(0))[0])
    here = order[len(before) : len(before) + 16]
    assert here.tolist() == list(range(len(pack.token_ids), len(pack)))


def test_a_prompt_is_a_conversation(adapter: JanusProAdapter) -> None:
    encode, picture = Letters().encode, torch.rand(3, 16, 16)
    adapter = golden_adapter(system_prompt="s", request="Plan: {prompt}!")
    first, image, rest = adapter.tokenize(Prompt(text="a cube", images=(picture,)))
    assert isinstance(first, TextSegment)
    assert isinstance(rest, TextSegment)
    assert first.tokens.tolist() == [MARKS.bos, *encode("s\n\n<|User|>: ")]
    assert rest.tokens.tolist() == encode("\nPlan: a cube!\n\n<|Assistant|>:")
    assert isinstance(image, ImageSegment)
    assert image.is_context
    assert adapter.detokenize(torch.tensor([5, 9, MARKS.eos])) == "5 9"


def test_contexts_without_the_request(adapter: JanusProAdapter) -> None:
    """As long as those with it, pictures and their words included; ``bos`` and ``begin`` stay."""
    codes = CASES["c.image_tokens"][0]
    image = adapter.look(TokenImageSegment(tokens=codes, grid=GRID, is_context=True))
    ids = [MARKS.bos, 20, 21, MARKS.begin_image, 22]
    sampled_text = TextSegment(tokens=torch.tensor([30, MARKS.eos]), log_prob=torch.zeros(2))
    rows: list[list[Segment]] = [[text(ids), sampled_text, image], [text(ids[:2])]]
    whole, without = (
        adapter.prefill([[as_given(s) for s in row] for row in rows]),
        adapter.guidance(rows),
    )
    assert torch.equal(without.lengths, whole.lengths)
    assert torch.equal(without.positions, whole.positions)
    pads = [MARKS.bos, MARKS.pad, MARKS.pad, MARKS.begin_image, MARKS.pad, MARKS.pad]
    by_hand = adapter.prefill([[text(pads)], [text([MARKS.bos, MARKS.pad])]])
    for mine, theirs in zip(without.keys, by_hand.keys, strict=True):
        torch.testing.assert_close(mine[0, :6], theirs[0, :6])
        torch.testing.assert_close(mine[1, :2], theirs[1, :2])


# ---- what is trained


def test_groups_of_parameters() -> None:
    adapter = golden_adapter()
    names = {id(p): name for name, p in adapter.net.named_parameters()}
    groups = {k: {names[id(p)] for p in v} for k, v in adapter.param_groups().items()}
    assert groups["text"] | groups["flow"] == set(names.values())
    assert all(n.startswith("model.generation_") for n in groups["flow"])
    assert not any("generation_" in n for n in groups["text"])
    frozen = golden_adapter(freeze=("generation_",)).param_groups()
    assert frozen["flow"] == []
    assert len(frozen["text"]) == len(groups["text"])


@pytest.mark.parametrize("plan", [("text",), ("image",), ("text", "image")])
def test_unreached_is_what_gets_no_gradient(plan: tuple[str, ...]) -> None:
    adapter = golden_adapter()
    found = drawn(adapter, plan=plan)
    scores = adapter(found)
    torch.cat([*scores.text, *scores.image_tokens]).sum().backward()
    idle = {
        name
        for name, p in adapter.net.named_parameters()
        if p.grad is None or not bool(p.grad.abs().any())
    }
    listed = {id(p) for p in adapter.unreached(plan)}
    assert idle == {name for name, p in adapter.net.named_parameters() if id(p) in listed}


def test_the_image_loss_reaches_the_reasoning_unless_cut() -> None:
    for detach in (False, True):
        adapter = golden_adapter(detach_context=detach)
        ids = CASES["d.context_ids"][0]
        thought = TextSegment(tokens=ids[6:11], log_prob=torch.zeros(5))
        codes = drawing(CASES["d.image_tokens"][0])
        scores = adapter([trajectory([text(ids[:6].tolist()), thought, codes])])
        scores.image_tokens[0].sum().backward()
        grad = adapter.decoder.embed_tokens.weight.grad[ids[6:11]]
        assert bool(grad.abs().any()) != detach


# ---- what is refused


def test_another_size_is_refused(adapter: JanusProAdapter) -> None:
    assert adapter.image_grid(Prompt(text="", size=(8, 8))) == GRID
    with pytest.raises(
        ValueError, match=r"Prompt\.size is \(16, 8\); this model draws \(8, 8\) only"
    ):
        adapter.image_grid(Prompt(text="", size=(16, 8)))


def test_no_tower_no_pictures() -> None:
    blind = JanusProAdapter(CONFIG, Letters(), marks=MARKS, net=copied(), vq=VQ)
    with pytest.raises(ValueError, match=r"no vision tower .* give adapter\.vision true"):
        blind.tokenize(Prompt(text="x", images=(torch.rand(3, 8, 8),)))
    with pytest.raises(ValueError, match=r"end model\.sampling\.plan with its only image"):
        drawn(blind, plan=("image", "text"))
    with pytest.raises(TypeError, match="give it a vq"):
        JanusProAdapter(CONFIG, Letters(), marks=MARKS).decode(CASES["c.image_tokens"], GRID)


def test_a_request_without_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.request is 'draw it'; it must hold {prompt}"):
        golden_adapter(request="draw it")
