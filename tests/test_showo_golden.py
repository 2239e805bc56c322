"""Show-o's network against numbers that upstream's code produced.

Upstream pads every text on the left and counts the pads' positions. Here the pads are left out: rows begin at
the position that is their number. At the end: mistakes that are easily made, each of which must be seen.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PhiForCausalLM

from lightning_unigrpo.adapters.common.attention import Kind, Layout, PackedAttention
from lightning_unigrpo.adapters.showo.config import ShowOConfig
from lightning_unigrpo.adapters.showo.network import Pack, ShowONet
from tests.conftest import golden_folder

FOLDER = golden_folder("showo1")
INFO = json.loads((FOLDER / "cases.json").read_text())
FILE = json.loads((FOLDER / "config.json").read_text())
CASES = load_file(FOLDER / "cases.safetensors")
ATOL = INFO["suggested_atol"]
GUIDED_ATOL = 5e-5
"""Guidance of 1.75 multiplies rounding by up to 4.5."""
IDS = FILE["special_token_ids"]
NAMES = {
    "bos": "<|sot|>",
    "eos": "<|eot|>",
    "pad": "<|pad|>",
    "begin_image": "<|soi|>",
    "end_image": "<|eoi|>",
    "task": "<|t2i|>",
}
MARKS = {key: IDS[name] for key, name in NAMES.items()}
CONFIG = ShowOConfig.from_upstream(FILE["showo"], FILE["llm_config"], MARKS)
CODES = range(CONFIG.code_offset, CONFIG.mask_id)
FORWARD = CASES["v1_forward.input_ids"]


class Row(NamedTuple):
    """One row of a sample; neighbours of one kind form a block."""

    id: int
    position: int
    kind: Kind


Reading = Callable[[list[Row]], list[Row]]


def unpadded(ids: list[int]) -> list[Row]:
    """Return the rows of one of upstream's: a text, then an image."""
    pads, at = ids.count(CONFIG.pad), ids.index(CONFIG.begin_image)
    kinds = [Kind.CAUSAL] * at + [Kind.NOISE] * (len(ids) - at)
    rows = [Row(*row) for row in zip(ids, range(len(ids)), kinds, strict=True)]
    assert all(row.id == CONFIG.pad for row in rows[:pads])
    return rows[pads:]


def packed(ids: Tensor, read: Reading = list) -> tuple[Pack, Layout]:
    """Return upstream's rows ``[B, L]`` flat; each row of a text wants words, each of an image its code."""
    samples = [read(unpadded(each)) for each in ids.tolist()]
    numbers = itertools.count()
    layout = Layout.build(
        [
            [
                (kind, [next(numbers) for _ in rows])
                for kind, rows in itertools.groupby(each, kind_of)
            ]
            for each in samples
        ],
        torch.device("cpu"),
    )
    flat = [row for each in samples for row in each]
    is_code = torch.tensor([row.id >= CONFIG.code_offset for row in flat])
    is_mark = torch.tensor([row.id in (CONFIG.begin_image, CONFIG.end_image) for row in flat])
    pack = Pack(
        token_ids=torch.tensor([row.id for row in flat]),
        positions=torch.tensor([row.position for row in flat]),
        logit_rows=(~is_code & ~is_mark).nonzero().flatten(),
        image_rows=is_code.nonzero().flatten(),
    )
    return pack, layout


def kind_of(row: Row) -> Kind:
    return row.kind


def run(net: ShowONet, ids: Tensor, read: Reading = list) -> tuple[Tensor, Tensor]:
    """Return logits of the words of all texts ``[R, words]``, and of codes ``[B, N, codes]``."""
    pack, layout = packed(ids, read)
    words, codes = net(pack, PackedAttention(layout, len(pack)))
    return words, codes.unflatten(0, (len(ids), -1))


def of_rows(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of ``[B, L, V]`` that are not padding."""
    return logits[ids != CONFIG.pad]


@pytest.fixture(scope="module")
def golden_net() -> ShowONet:
    net = ShowONet(CONFIG)
    net.load_state_dict(load_file(FOLDER / "state_dict.safetensors"))
    return net.eval()


@pytest.fixture
def net(golden_net: ShowONet) -> ShowONet:
    golden_net.zero_grad()
    return golden_net


def upstream(state: dict[str, Tensor]) -> Any:
    """Return transformers' model with the weights of a network."""
    config = CONFIG.phi()
    config._attn_implementation = "sdpa"
    model = PhiForCausalLM(config)
    model.load_state_dict({k.removeprefix("showo."): v for k, v in state.items()})
    return model.eval()


def upstream_logits(model: Any, ids: Tensor, allowed: Tensor) -> Tensor:
    """Return ``[B, L, V]``, pads and all, under the dense mask."""
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    found: Tensor = model(ids, attention_mask=added, position_ids=positions).logits
    return found


def close(got: Tensor, expected: Tensor, *, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=ATOL)


# ---- what the files say


def test_ids() -> None:
    """Offsets that follow from the sizes are those of the file; rows hold the marks where they should."""
    assert CONFIG.code_offset == FILE["image_token_offset"]
    assert CONFIG.mask_id == FILE["mask_token_id"]
    assert CONFIG.vocab_size == FILE["showo"]["vocab_size"]
    assert CONFIG.side == 6
    for ids in FORWARD.tolist():
        rows = unpadded(ids)
        assert [rows[0].id, rows[1].id] == [CONFIG.task, CONFIG.bos]
        assert [rows[-CONFIG.num_vq_tokens - i].id for i in (3, 2)] == [
            CONFIG.eos,
            CONFIG.begin_image,
        ]
        assert rows[-1].id == CONFIG.end_image
    masked, codes = CASES["v1_forward.masked"], CASES["v1_forward.codes"]
    written = torch.where(masked, CONFIG.mask_id, codes + CONFIG.code_offset)
    assert torch.equal(FORWARD[:, -CONFIG.num_vq_tokens - 1 : -1], written)


def test_what_rows_may_attend_to() -> None:
    """Upstream's dense mask without its pads, which no other row sees."""
    allowed = CASES["v1_forward.allowed_mask"][:, 0]
    _, layout = packed(FORWARD)
    for ids, mask, valid, visible in zip(
        FORWARD, allowed, layout.valid, layout.visible(), strict=True
    ):
        real = ids != CONFIG.pad
        assert not mask[real][:, ~real].any()
        assert torch.equal(mask[real][:, real], visible[valid][:, valid])


# ---- logits


@torch.no_grad()
def test_logits(net: ShowONet) -> None:
    """Both slices at every row that is no padding, and log-probabilities of all codes."""
    expected = of_rows(CASES["v1_forward.logits"], FORWARD)
    pack, layout = packed(FORWARD)
    every = torch.arange(len(pack))
    whole = replace(pack, logit_rows=every, image_rows=every)
    words, codes = net(whole, PackedAttention(layout, len(pack)))
    close(words, expected[:, : FILE["showo"]["llm_vocab_size"]])
    close(codes, expected[:, CODES.start : CODES.stop])
    _, codes = run(net, FORWARD)
    log_prob = codes.log_softmax(-1).gather(2, CASES["v1_forward.codes"].unsqueeze(2)).squeeze(2)
    close(log_prob, CASES["v1_forward.image_logprobs_of_codes"])


@torch.no_grad()
def test_rows_that_are_asked_for(net: ShowONet) -> None:
    """Any of them in any order, of one sort only, or none."""
    pack, layout = packed(FORWARD)
    attention = PackedAttention(layout, len(pack))
    expected = of_rows(CASES["v1_forward.logits"], FORWARD)
    rows, none = torch.tensor([40, 3, 3, 17]), torch.tensor([], dtype=torch.long)
    words, codes = net(replace(pack, logit_rows=rows, image_rows=none), attention)
    close(words, expected[rows, : CONFIG.num_words])
    assert codes.shape == (0, len(CODES))
    words, codes = net(replace(pack, logit_rows=none, image_rows=rows), attention)
    close(codes, expected[rows, CODES.start : CODES.stop])
    assert words.shape == (0, CONFIG.num_words)


@torch.no_grad()
def test_images_side_by_side(net: ShowONet) -> None:
    """Two states of an image behind one text: neither sees the other."""
    (text, noisy), other = packed(FORWARD[:1]), FORWARD.clone()
    other[0, -CONFIG.num_vq_tokens - 1 : -1] = CASES["v1_forward.codes"][0] + CONFIG.code_offset
    (words, image), (extra, _) = noisy.samples[0], packed(other[:1])
    count = len(text)
    again = [row + len(image[1]) for row in image[1]]
    both = Pack(
        token_ids=torch.cat([text.token_ids, extra.token_ids[image[1]]]),
        positions=torch.cat([text.positions, extra.positions[image[1]]]),
        logit_rows=text.logit_rows,
        image_rows=torch.cat([text.image_rows, text.image_rows + len(image[1])]),
    )
    layout = Layout.build([[words, image, (Kind.NOISE, again)]], torch.device("cpu"))
    _, codes = net(both, PackedAttention(layout, count + len(again)))
    first, second = codes.unflatten(0, (2, -1))
    close(first, CASES["v1_forward.logits"][0, -CONFIG.num_vq_tokens - 1 : -1, CODES.start : -1])
    close(second, run(net, other[:1])[1][0])


@torch.no_grad()
def test_guidance(net: ShowONet) -> None:
    """``(1 + s) cond - s uncond``; the empty prompt is task, bos and eos."""
    ids, scale = CASES["v1_cfg.input_ids"], FILE["guidance_scale"]
    half = len(ids) // 2
    for row in ids[half:].tolist():
        marks = [CONFIG.task, CONFIG.bos, CONFIG.eos]
        assert [each.id for each in unpadded(row) if each.kind == Kind.CAUSAL] == marks
    _, codes = run(net, ids)
    guided = (1 + scale) * codes[:half] - scale * codes[half:]
    close(guided, CASES["v1_cfg.image_logits"], atol=GUIDED_ATOL)


@torch.no_grad()
def test_sampling(net: ShowONet) -> None:
    """Of every step of a whole run: the log-probabilities of what was revealed in it."""
    steps, final = CASES["v1_sampling.step_inputs"], CASES["v1_sampling.final_codes"]
    known = torch.zeros_like(final, dtype=torch.bool)
    for step, ids in enumerate(steps):
        image = ids[:, -CONFIG.num_vq_tokens - 1 : -1]
        masked = image == CONFIG.mask_id
        assert torch.equal(~masked, known)
        assert torch.equal(image[known], final[known] + CONFIG.code_offset)
        last = step == len(steps) - 1
        # What the last step draws is returned, though it marks one of it again.
        revealed = masked if last else masked & ~CASES["v1_sampling.remasked"][step]
        log_prob = run(net, ids)[1].log_softmax(-1).gather(2, final.unsqueeze(2)).squeeze(2)
        close(log_prob * revealed, CASES["v1_sampling.step_logprobs"][step])
        known |= revealed
    assert known.all()


# ---- transformers' model under upstream's mask


def test_transformers_gives_the_same(net: ShowONet) -> None:
    """With pads, at every row: the reference of the next test is upstream's model."""
    allowed = CASES["v1_forward.allowed_mask"]
    with torch.no_grad():
        found = upstream_logits(upstream(net.state_dict()), FORWARD, allowed)
    close(found, CASES["v1_forward.logits"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(
    net: ShowONet, monkeypatch: pytest.MonkeyPatch, checkpointing: bool, generator: torch.Generator
) -> None:
    """Of both outputs; rows of the head in neither slice get none; layers are run again where asked."""
    monkeypatch.setattr(net, "gradient_checkpointing", checkpointing)
    runs: list[nn.Module] = []
    hook = net.showo.model.layers[1].register_forward_pre_hook(lambda layer, _: runs.append(layer))
    words, codes = run(net, FORWARD)
    weights = [torch.randn(x.shape, generator=generator) for x in (words, codes)]
    ((words * weights[0]).mean() + (codes * weights[1]).mean()).backward()
    hook.remove()
    assert len(runs) == 1 + checkpointing
    model = upstream(net.state_dict())
    logits = upstream_logits(model, FORWARD, CASES["v1_forward.allowed_mask"])
    image = logits[:, -CONFIG.num_vq_tokens - 1 : -1, CODES.start : CODES.stop]
    is_text = torch.zeros_like(FORWARD, dtype=torch.bool)
    is_text[:, : -CONFIG.num_vq_tokens - 2] = FORWARD[:, : -CONFIG.num_vq_tokens - 2] != CONFIG.pad
    text = logits[is_text][:, : CONFIG.num_words]
    ((text * weights[0]).mean() + (image * weights[1]).mean()).backward()
    theirs = {f"showo.{name}": p.grad for name, p in model.named_parameters()}
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, theirs[name], atol=1e-6, rtol=1e-4, msg=name)
    head = net.showo.lm_head.weight.grad
    assert head is not None
    assert not head[CONFIG.num_words : CONFIG.code_offset].any()
    assert head[: CONFIG.num_words].any()
    assert head[CODES.start : CODES.stop].any()


def test_a_call_without_rows(net: ShowONet) -> None:
    """Every weight is used: ranks with nothing to do reduce gradients with the others."""
    none = torch.zeros(0, dtype=torch.long)
    pack = Pack(token_ids=none, positions=none, logit_rows=none, image_rows=none)
    words, codes = net(pack, PackedAttention(Layout.build([], torch.device("cpu")), 0))
    assert [words.shape, codes.shape] == [(0, CONFIG.num_words), (0, len(CODES))]
    (words.sum() + codes.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.showo.lm_head.parameters())


def test_a_low_precision_net_says_float32(net: ShowONet) -> None:
    """bfloat16 has 8 bits; after three layers some 3 % of logits up to 4.5 remain."""
    words, codes = run(copy.deepcopy(net).bfloat16(), FORWARD)
    assert words.dtype == codes.dtype == torch.float32
    torch.testing.assert_close(codes, run(net, FORWARD)[1], atol=0.15, rtol=0)


# ---- mistakes that must be seen


def errors(net: ShowONet, read: Reading = list) -> float:
    """Return the largest error of words and codes."""
    expected = CASES["v1_forward.logits"]
    image = expected[:, -CONFIG.num_vq_tokens - 1 : -1, CODES.start : CODES.stop]
    is_text = FORWARD.ne(CONFIG.pad)
    is_text[:, -CONFIG.num_vq_tokens - 2 :] = False
    with torch.no_grad():
        words, codes = run(net, FORWARD, read)
    text = expected[is_text][:, : CONFIG.num_words]
    return float(max((words - text).abs().max(), (codes - image).abs().max()))


def as_kind(old: Kind, new: Kind) -> Reading:
    return lambda rows: [row._replace(kind=new) if row.kind == old else row for row in rows]


def with_first_of_image(**changes: Any) -> Reading:
    return lambda rows: [
        row._replace(**changes) if row.id == CONFIG.begin_image else row for row in rows
    ]


READINGS: dict[str, Reading] = {
    "the image sees what is before": as_kind(Kind.NOISE, Kind.CAUSAL_NOISE),
    "the text sees what is behind": as_kind(Kind.CAUSAL, Kind.FULL),
    "the text sees the image": lambda rows: [row._replace(kind=Kind.FULL) for row in rows],
    "the first mark belongs to the text": with_first_of_image(kind=Kind.CAUSAL),
    "the last mark is left out": lambda rows: rows[:-1],
    "the last mark is apart": lambda rows: [*rows[:-1], rows[-1]._replace(kind=Kind.FULL)],
    "the first mark is left out": lambda rows: [
        row for row in rows if row.id != CONFIG.begin_image
    ],
    "marks are exchanged": lambda rows: [
        row._replace(id={CONFIG.begin_image: CONFIG.end_image}.get(row.id, row.id)) for row in rows
    ],
    "a mask is read as code 0": lambda rows: [
        row._replace(id=CODES.start) if row.id == CONFIG.mask_id else row for row in rows
    ],
    "the image begins at position 0": lambda rows: [
        row._replace(position=row.position - 12) if row.kind == Kind.NOISE else row for row in rows
    ],
}


@pytest.mark.parametrize("name", READINGS)
def test_a_wrong_reading_is_seen(golden_net: ShowONet, name: str) -> None:
    assert errors(golden_net, READINGS[name]) > 10 * ATOL


def test_only_distances_count(golden_net: ShowONet) -> None:
    """A rotation tells no more: rows may as well begin at position 0, whatever the pads were."""

    def from_zero(rows: list[Row]) -> list[Row]:
        return [row._replace(position=row.position - rows[0].position) for row in rows]

    assert errors(golden_net, from_zero) < ATOL


Mistake = Callable[[Any], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(make: Mistake) -> Mistake:
    MISTAKES[make.__name__] = make
    return make


@mistake
def no_norm_of_queries_and_keys(net: Any) -> None:
    for layer in net.showo.model.layers:
        layer.self_attn.qk_layernorm = False


@mistake
def norms_of_queries_and_keys_exchanged(net: Any) -> None:
    for layer in net.showo.model.layers:
        attn = layer.self_attn
        attn.q_layernorm, attn.k_layernorm = attn.k_layernorm, attn.q_layernorm


@mistake
def whole_heads_are_turned(net: Any) -> None:
    model = net.showo.model
    model.rotary_emb.config.rope_parameters["partial_rotary_factor"] = 1.0
    for layer in model.layers:
        layer.self_attn.rotary_ndims = layer.self_attn.head_dim


@mistake
def half_the_frequencies_of_whole_heads(net: Any) -> None:
    """The right number of angles, which fall too slowly."""
    rope = net.showo.model.rotary_emb.config.rope_parameters
    rope["rope_theta"] = rope["rope_theta"] ** 0.5


@mistake
def another_theta(net: Any) -> None:
    net.showo.model.rotary_emb.config.rope_parameters["rope_theta"] = 1000.0


@mistake
def no_last_norm(net: Any) -> None:
    net.showo.model.final_layernorm = nn.Identity()


@mistake
def an_exact_gelu(net: Any) -> None:
    for layer in net.showo.model.layers:
        layer.mlp.activation_fn = nn.GELU()


@mistake
def no_bias_of_the_head(net: Any) -> None:
    net.showo.lm_head.bias.data.zero_()


@mistake
def one_layer_too_few(net: Any) -> None:
    del net.showo.model.layers[-1]


@mistake
def codes_begin_behind_the_words(net: Any) -> None:
    net.config = replace(net.config, num_new_special_tokens=0)


@mistake
def codes_end_with_the_mask(net: Any) -> None:
    net.config = replace(net.config, num_new_special_tokens=11)


@mistake
def the_embedding_is_the_head(net: Any) -> None:
    net.showo.lm_head.weight = net.showo.model.embed_tokens.weight


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(golden_net: ShowONet, name: str) -> None:
    wrong = copy.deepcopy(golden_net)
    MISTAKES[name](wrong)
    assert errors(wrong) > 10 * ATOL


def test_without_a_mistake(golden_net: ShowONet) -> None:
    assert errors(copy.deepcopy(golden_net)) < ATOL


def test_every_eps_is_the_configs() -> None:
    """The vectors cannot tell an eps from one ten times as large: so each is read."""
    with torch.device("meta"):
        net = ShowONet(replace(CONFIG, language=FILE["llm_config"] | {"layer_norm_eps": 1e-2}))
    found = [module.eps for module in net.modules() if isinstance(module, nn.LayerNorm)]
    assert found == [1e-2] * (3 * len(net.showo.model.layers) + 1)


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "embd_pdrop"])
def test_nothing_drops_out(name: str) -> None:
    config = replace(CONFIG, language=FILE["llm_config"] | {name: 0.1})
    with pytest.raises(ValueError, match=rf"{name} is 0\.1 in the model's config; give 0"):
        ShowONet(config)
