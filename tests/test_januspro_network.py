"""Janus-Pro's network against numbers of ``transformers``, before any contract is put around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import JanusConfig

from lightning_unigrpo.adapter import token_log_probs
from lightning_unigrpo.adapters.common.attention import Kind, Layout, PackedAttention
from lightning_unigrpo.adapters.januspro.network import JanusProNet, JanusVision, JanusVQ, Pack
from tests.conftest import golden_folder

FOLDER = golden_folder("januspro")
INFO = json.loads((FOLDER / "cases.json").read_text())
CONFIG = JanusConfig(**json.loads((FOLDER / "config.json").read_text()))
CASES = load_file(FOLDER / "cases.safetensors")
STATE = load_file(FOLDER / "state_dict.safetensors")
IDS = INFO["meta"]["special_ids"]
ATOL = 1e-5  # the portable bound is 5e-5; on a CPU the rest is rounding
CPU = torch.device("cpu")


def load(part: Any) -> Any:
    """Fill a part from the one file that holds all of them."""
    part.load_state_dict({name: STATE[name] for name in part.state_dict()})
    return part.eval()


NET: JanusProNet = load(JanusProNet(CONFIG))
VISION: JanusVision = load(JanusVision(CONFIG))
VQ: JanusVQ = load(JanusVQ(CONFIG))


def run(
    words: Sequence[int],
    codes: Sequence[int] = (),
    *,
    net: JanusProNet = NET,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run one sequence of words, pictures' features where the words say so, and codes.

    Returns:
        Logits behind every word ``[T, V]``, and behind the last word and each code but the last.
    """
    ids = torch.tensor(words)
    # A sampled word may have the placeholder's id; it is a word.
    is_image = (ids == IDS["image"]) & (features is not None)
    seen = torch.zeros(0, NET.lm_head.in_features) if features is None else features
    order = torch.cat([(~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]])
    given = torch.tensor(codes, dtype=torch.long)[:-1]
    places = torch.cat([order, torch.arange(len(words), len(words) + len(given))])
    row = places.argsort()  # of each place
    pack = Pack(
        token_ids=ids[~is_image],
        features=seen,
        codes=given,
        positions=places,
        logit_rows=row[: len(words)],
        image_rows=row[len(words) - 1 :] if codes else row[:0],
    )
    layout = Layout.build([[(Kind.CAUSAL, row.tolist())]], CPU)
    with torch.no_grad():
        found: tuple[Tensor, Tensor] = net(pack, PackedAttention(layout, len(pack)))
    return found


def close(found: Tensor, name: str, atol: float = ATOL) -> None:
    expected = CASES[name].view(found.shape)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


def unpadded(name: str, row: int = 0) -> list[int]:
    ids: list[int] = CASES[f"{name}.input_ids"][row].tolist()
    mask = CASES.get(f"{name}.attention_mask")
    return ids if mask is None else [i for i, on in zip(ids, mask[row], strict=True) if on]


def test_every_tensor_has_a_place() -> None:
    named = [set(part.state_dict()) for part in (NET, VISION, VQ)]
    assert set.union(*named) == STATE.keys()
    assert sum(map(len, named)) == len(STATE)


def test_a_text_logits() -> None:
    close(run(unpadded("a"))[0], "a.logits")


def test_b_greedy_text() -> None:
    """Each word of the continuation is the most probable one behind those before it."""
    given, new = unpadded("b"), CASES["b.new_tokens"][0].tolist()
    logits, _ = run([*given, *new])
    assert logits[len(given) - 1 : -1].argmax(1).tolist() == new


def test_c_codes() -> None:
    codes = CASES["c.image_tokens"][0]
    _, logits = run(unpadded("c"), codes.tolist())
    close(logits, "c.step_logits")
    assert torch.equal(logits.argmax(1), codes)


def test_d_one_pass_over_thought_and_codes() -> None:
    compare_d(NET)


def compare_d(net: JanusProNet) -> None:
    ids, codes = CASES["d.context_ids"][0].tolist(), CASES["d.image_tokens"][0]
    words, images = run(ids, codes.tolist(), net=net)
    close(words, "d.text_logits")
    close(images, "d.image_logits")
    close(token_log_probs(images, codes)[0], "d.image_logprobs")
    begin, length = INFO["meta"]["d.prompt_len"], INFO["meta"]["d.thought_len"]
    thought = torch.tensor(ids[begin : begin + length])
    close(
        token_log_probs(words[begin - 1 : begin - 1 + length], thought)[0],
        "d.text_logprobs",
    )


def test_e_pixels() -> None:
    with torch.no_grad():
        found = VQ(CASES["c.image_tokens"])
    close(found.permute(0, 2, 3, 1), "e.decoded")


@pytest.mark.parametrize("row", [0, 1])
def test_f_codes_of_a_padded_batch(row: int) -> None:
    """Without the padding: rotation is relative, and a masked key is no key."""
    codes = CASES["f.image_tokens"][row]
    assert torch.equal(run(unpadded("f", row), codes.tolist())[1].argmax(1), codes)


def test_g_looking() -> None:
    with torch.no_grad():
        features = VISION(CASES["g.pixel_values"])[0]
    close(run(unpadded("g"), features=features)[0], "g.logits")


def guided(codes: Tensor, net: JanusProNet = NET) -> Tensor:
    """Return the guided logits of all codes of case h, teacher-forced."""
    ids = unpadded("h")
    kept = (IDS["bos"], IDS["boi"])
    without = [i if i in kept else IDS["pad"] for i in ids]
    c, u = (run(words, codes.tolist(), net=net)[1] for words in (ids, without))
    return u + INFO["meta"]["h.guidance_scale"] * (c - u)


def test_h_guided_codes() -> None:
    codes = CASES["h.image_tokens_cfg2"][0]
    assert torch.equal(guided(codes).argmax(1), codes)


def copied() -> JanusProNet:
    return load(JanusProNet(CONFIG))  # type: ignore[no-any-return]


def with_codebook() -> JanusProNet:
    """Read codes from the VQ model's table, which has the same shape."""
    net = copied()
    net.model.generation_embeddings.weight = torch.nn.Parameter(
        STATE["model.vqmodel.quantize.embedding.weight"]
    )
    return net


def with_tied_head() -> JanusProNet:
    net = copied()
    net.lm_head.weight = net.model.language_model.embed_tokens.weight
    return net


def with_logits_one_late() -> JanusProNet:
    """Predict each token where it is read."""
    net, forward = copied(), JanusProNet.forward

    def late(pack: Pack, attention: PackedAttention) -> tuple[Tensor, Tensor]:
        last = len(pack) - 1
        rows = {n: (getattr(pack, n) + 1).clamp_max(last) for n in ("logit_rows", "image_rows")}
        return forward(net, replace(pack, **rows), attention)

    net.forward = late  # type: ignore[method-assign, assignment]
    return net


def with_the_words_head() -> JanusProNet:
    """Take the logits of codes from the head of words."""
    net = copied()
    net.model.generation_head.forward = lambda h: net.lm_head(h)[
        :, : CONFIG.vq_config.num_embeddings
    ]
    return net


MISTAKES: list[tuple[Callable[[], JanusProNet], str]] = [
    (with_codebook, "d.image_logits"),
    (with_tied_head, "d.text_logits"),
    (with_logits_one_late, "d.text_logits"),
    (with_the_words_head, "d.image_logits"),
]


@pytest.mark.parametrize(("mistake", "where"), MISTAKES, ids=[m.__name__ for m, _ in MISTAKES])
def test_mistakes_are_seen(mistake: Callable[[], JanusProNet], where: str) -> None:
    with pytest.raises(AssertionError, match=where.replace(".", r"\.")):
        compare_d(mistake())


def test_a_forgotten_temperature_is_seen() -> None:
    codes = CASES["d.image_tokens"][0]
    _, images = run(CASES["d.context_ids"][0].tolist(), codes.tolist())
    with pytest.raises(AssertionError, match=r"d\.image_logprobs"):
        close(token_log_probs(images, codes, temperature=0.8)[0], "d.image_logprobs")


def test_the_head_is_untied_whatever_the_config_says() -> None:
    """The default of :class:`JanusConfig` ties it, and published configurations keep that default."""
    tied = JanusConfig(**(CONFIG.to_dict() | {"tie_word_embeddings": True}))
    net = JanusProNet(tied)
    assert net.lm_head.weight is not net.model.language_model.embed_tokens.weight


def test_the_rotation_survives_a_cast() -> None:
    """In bfloat16 throughout, far positions are still told apart as in float32."""
    x, positions = torch.zeros(1, 1, 1), torch.tensor([[5000]])
    expected = NET.model.language_model.rotary_emb(x, positions)
    found = copied().bfloat16().model.language_model.rotary_emb(x, positions)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
