"""JanusFlow as an adapter: the contract, its contexts, its files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common.conversation import END, conversation
from lightning_unigrpo.adapters.common.pictures import PictureProcessor
from lightning_unigrpo.adapters.common.rotary import Rotary
from lightning_unigrpo.adapters.janusflow import JanusFlowAdapter, JanusFlowConfig, JanusFlowNet
from lightning_unigrpo.adapters.janusflow.config import RELEASES
from lightning_unigrpo.adapters.janusflow.vision import (
    DROPPED,
    JanusFlowVision,
)
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory
from tests.published import SENTENCES
from tests.published_janusflow import BOS, CONFIG, SEEN, SIDE, weights, write_checkpoint

PROMPTS = [Prompt(text=text, id=i, size=(32, 32)) for i, text in enumerate(SENTENCES[:3])]
RELEASE = RELEASES["deepseek-ai/JanusFlow-1.3B"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("janusflow"))


def load(folder: Path | str, **settings: Any) -> JanusFlowAdapter:
    settings = {"vae": Path(folder, "vae"), "default_size": (32, 32)} | settings
    adapter = JanusFlowAdapter.from_pretrained(folder, **settings)
    adapter.materialize()
    return adapter.eval()


@pytest.fixture(scope="module")
def adapter(folder: Path) -> JanusFlowAdapter:
    return load(folder)


def picture(*size: int) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(1))


def drawn(adapter: JanusFlowAdapter, prompt: Prompt) -> Trajectory:
    """Return a rollout with one text and one image of fixed numbers."""
    generator = torch.Generator().manual_seed(0)
    h, w = adapter.image_grid(prompt)
    states = torch.randn(3, h * w, adapter.latent_channels, generator=generator)
    image = ImageSegment(
        latent=states[-1], grid=(h, w), states=states, sigmas=torch.tensor([0.9, 0.5, 0.2])
    )
    text = TextSegment(tokens=torch.tensor([7, 9, adapter.stop_token]), log_prob=torch.zeros(3))
    return Trajectory(
        prompt=prompt, segments=[*adapter.tokenize(prompt), text, image], group=0, member=0
    )


@torch.no_grad()
def outputs(adapter: JanusFlowAdapter) -> list[Tensor]:
    """Return log-probabilities and velocities of a text-to-image and of an editing rollout."""
    prompts = [
        Prompt(text="a red cube", size=(32, 48)),
        Prompt(text="make the ball green", images=(picture(40, 24),)),
    ]
    scores = adapter([drawn(adapter, prompt) for prompt in prompts])
    return [*scores.text, *scores.velocity]


def ids(segments: list[Segment]) -> list[list[int]]:
    return [s.tokens.tolist() for s in segments if isinstance(s, TextSegment)]


# ---- the contract


@pytest.mark.parametrize("settings", [{}, {"detach_context": True, "share_prefixes": False}])
def test_contract(folder: Path, settings: dict[str, Any]) -> None:
    """One round and two, ragged, with requests of three lengths; drawn pictures are looked at."""
    adapter = load(folder, system_prompt="think", look_prompt="draw it again", **settings)
    only = None if not settings else {"text_log_probs", "velocities", "batch_invariance"}
    check_adapter(adapter, prompts=PROMPTS, only=only)


@pytest.mark.parametrize("rounds", [(1, 2), pytest.param((3,), marks=pytest.mark.slow)], ids=str)
def test_contract_of_editing(folder: Path, rounds: tuple[int, ...]) -> None:
    """Prompts with one input picture, none, and two between the words."""
    prompts = [
        replace(p, images=tuple(picture(20, 30) for _ in range(n)))
        for p, n in zip(PROMPTS, (1, 0, 2), strict=True)
    ]
    prompts[2].text = f"{prompts[2].text} as in <image> and <image>"
    check_adapter(load(folder), prompts=prompts, rounds=rounds)


def test_the_image_loss_can_be_kept_from_the_reasoning(folder: Path) -> None:
    """The embedding of a word that only the reasoning has gets no gradient of the velocity."""
    for detach in (False, True):
        adapter = load(folder, detach_context=detach)
        (velocity,) = adapter([drawn(adapter, PROMPTS[0])]).velocity
        velocity.square().sum().backward()
        grad = adapter.decoder.embed_tokens.weight.grad
        reached = grad is not None and bool(grad[9].abs().sum() > 0)
        assert reached is not detach


# ---- contexts


def test_the_template() -> None:
    """DeepSeek's, written out: separators by turns, messages and whole text stripped."""
    turns = [("User", " draw \n"), ("Assistant", "done"), ("User", "again"), ("Assistant", None)]
    assert conversation(turns, system="Be brief.") == (
        f"Be brief.\n\nUser: draw\n\nAssistant: done{END}User: again\n\nAssistant:"
    )
    assert conversation([("User", "a cat"), ("Assistant", "")]) == "User: a cat\n\nAssistant:"


def test_prompts_are_conversations(adapter: JanusFlowAdapter, folder: Path) -> None:
    """Ids are the tokenizer file's of the whole text, pictures cut out."""
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    mark = {name: raw.token_to_id(name) for name in (BOS, END, SEEN)}
    assert (adapter.config.bos, adapter.config.eos) == (mark[BOS], mark[END])
    (text,) = adapter.tokenize(Prompt(text="a red cube, 漢字!"))
    assert isinstance(text, TextSegment)
    expected = raw.encode("User: a red cube, 漢字!\n\nAssistant:").ids
    assert text.tokens.tolist() == [mark[BOS], *expected]
    images = (picture(20, 30), picture(8, 8))
    segments = adapter.tokenize(Prompt(text="make it blue", images=images))
    assert [type(s) for s in segments] == [TextSegment, ImageSegment] * 2 + [TextSegment]
    first, second, third = ids(segments)
    assert first == [mark[BOS], *raw.encode("User: ").ids]
    assert second == raw.encode("\n").ids
    assert third == raw.encode("\nmake it blue\n\nAssistant:").ids
    image = segments[1]
    assert isinstance(image, ImageSegment)
    assert image.views["before"].tolist() == []
    assert image.views["after"].tolist() == [mark[SEEN]]
    assert image.views["rows"].shape == (17, 32)


def test_a_drawn_picture_is_shown_in_a_turn(folder: Path) -> None:
    """The context behind it is that of a conversation written out by hand."""
    adapter = load(folder, look_prompt="see the ball")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    image = ImageSegment(latent=torch.randn(64, 4), grid=(8, 8), is_context=True)
    seen = adapter.look(image)
    assert adapter.vision is not None
    assert adapter.pictures is not None
    pixels = adapter.decode(image.latent.unsqueeze(0), image.grid)
    rows = adapter.vision(adapter.pictures(pixels[0]).unsqueeze(0))[0]
    torch.testing.assert_close(seen.views["rows"], rows)
    prompt, said = adapter.tokenize(Prompt(text="a red cube")), raw.encode("three apples").ids
    reasoning = TextSegment(tokens=torch.tensor([*said, adapter.config.eos]))
    cache = adapter.prefill([[*prompt, reasoning, seen]])
    before = raw.encode(f"User: a red cube\n\nAssistant:three apples{END}User: ").ids
    # The reasoning was its own text: its words are not merged with the template's.
    before = [*raw.encode("User: a red cube\n\nAssistant:").ids, *said, adapter.config.eos]
    before += raw.encode("User: ").ids
    after = [raw.token_to_id(SEEN), *raw.encode("\nsee the ball\n\nAssistant:").ids]
    net = adapter.net
    packer = adapter.packer()
    packer.sample()
    packer.text([adapter.config.bos, *before], 0)
    packer.picture(None, rows, 1 + len(before))
    packer.text(after, 1 + len(before) + len(rows), last=True)
    pack, layout = packer.finish()
    with torch.no_grad():
        expected, _ = net(pack, adapter._packed_attention(layout, len(pack)))
    found = adapter.next_logits(cache, None, torch.ones(1, dtype=torch.bool))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert int(cache.positions[0]) == len(pack)


def test_guidance_keeps_the_place_of_the_image(adapter: JanusFlowAdapter) -> None:
    """``bos`` at 0 and the image behind the whole context, its reasoning and pictures counted."""
    *context, image = drawn(adapter, PROMPTS[1]).segments
    assert isinstance(image, ImageSegment)
    seen = adapter.look(replace(image, is_context=True))
    contexts = [adapter.tokenize(PROMPTS[0]), [*context, seen, adapter.read(picture(8, 8))]]
    full, alone = adapter.prefill(contexts), adapter.guidance(contexts)
    assert torch.equal(alone.positions, full.positions)
    assert alone.lengths.tolist() == [1, 1]


def test_without_a_tower_pictures_are_refused(folder: Path) -> None:
    adapter = load(folder, vision=False)
    assert adapter.vision is None
    with pytest.raises(ValueError, match=r"no vision tower .* give adapter\.vision true"):
        adapter.tokenize(Prompt(text="edit", images=(picture(8, 8),)))
    with pytest.raises(ValueError, match=r"model\.sampling\.plan"):
        adapter.look(ImageSegment(latent=torch.randn(64, 4), grid=(8, 8)))
    check_adapter(adapter, prompts=PROMPTS, rounds=(1,), only={"rollouts_run", "velocities"})


def test_sizes_that_do_not_fit_are_refused(adapter: JanusFlowAdapter) -> None:
    assert adapter.image_grid(Prompt(text="", size=(16, 40))) == (4, 10)
    with pytest.raises(ValueError, match=rf"Prompt\.size \(16, 12\) must be multiples of {SIDE}"):
        adapter.image_grid(Prompt(text="", size=(16, 12)))


def test_what_is_not_reached(adapter: JanusFlowAdapter) -> None:
    """By a backward pass: nothing that has a gradient is listed, and all that has none."""
    trajectory = drawn(adapter, PROMPTS[0])
    *context, text, image = trajectory.segments
    for plan, segments in ((("text",), [*context, text]), (("image",), [*context, image])):
        adapter.zero_grad()
        scores = adapter([replace(trajectory, segments=segments)])
        sum(x.square().sum() for x in (*scores.text, *scores.velocity)).backward()
        without = {name for name, p in adapter.net.named_parameters() if p.grad is None}
        listed = {id(p) for p in adapter.unreached(plan)}
        assert without == {n for n, p in adapter.net.named_parameters() if id(p) in listed}
        assert without
    assert adapter.unreached(("text", "image")) == []


# ---- pictures and latents


def test_pictures_for_the_tower() -> None:
    """Longer side, padding with whole levels of the mean, mean and deviation: by hand."""
    make = PictureProcessor(
        size=16, rounding="down", min_size=3, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.25)
    )
    pixels = picture(32, 24)
    found = make(pixels)
    assert found.shape == (3, 16, 16)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (make.mean, make.std))
    small = interpolate(pixels[None], (16, 12), mode="bicubic", antialias=True)[0].clamp(0, 1)
    torch.testing.assert_close(found[:, :, 2:14], (small - mean) / std)
    colour = torch.tensor([127, 102, 76]).view(3, 1, 1) / 255
    edge = ((colour - mean) / std).expand(3, 16, 2)
    torch.testing.assert_close(found[:, :, :2], edge, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, :, 14:], edge, atol=1e-6, rtol=0)
    same = picture(16, 16)
    torch.testing.assert_close(make(same), (same - mean) / std)
    thin = make(picture(32, 2))  # not narrower than min_size
    assert bool((thin[:, :, [5, 9]] == thin[:, :1, :1]).all())
    assert not bool((thin[:, :, 6:9] == thin[:, :1, :1]).all((0, 1)).any())


def test_latents_are_scaled(adapter: JanusFlowAdapter) -> None:
    """``vae.decode(x / scaling_factor)``, clipped: diffusers' own decoder."""
    assert adapter.vae is not None
    x = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = adapter.vae.vae.decode(x / 0.13025).sample.clamp(-1, 1)
    got = adapter.decode(x.flatten(2).transpose(1, 2), (4, 6))
    torch.testing.assert_close(got, (expected + 1) / 2, atol=1e-6, rtol=0)
    assert got.shape == (2, 3, 16, 24)


def test_rotary_has_nothing_to_load_or_round() -> None:
    """The closed form, after a cast to bfloat16 and from the meta device."""
    config = JanusFlowConfig.from_upstream(CONFIG).llama()
    with torch.device("meta"):
        rotary = Rotary(config)
    rotary.to(torch.bfloat16)
    cos, sin = rotary(torch.zeros(1), torch.tensor([[0, 701]]))
    angles = torch.tensor([701 * 1000.0 ** (-j / 4) for j in range(4)]).repeat(2)
    torch.testing.assert_close(cos[0, 1], angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sin[0, 1], angles.sin(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"rope_type is 'linear'; only 'default'"):
        Rotary(type(config)(rope_parameters={"rope_type": "linear", "factor": 2.0}))


# ---- files


def test_the_releases_sizes() -> None:
    """587 tensors and 2,046,367,504 parameters, the 13 that are never run included."""
    with torch.device("meta"):
        net = JanusFlowNet(RELEASE)
        assert RELEASE.vision is not None
        vision = JanusFlowVision(RELEASE.vision, RELEASE.llama().hidden_size)
    state = net.state_dict() | vision.state_dict()
    w = RELEASE.vision.width
    pool = 12 * w * w + 12 * w  # latent, q, kv, proj, norm and an MLP four times as wide
    assert len(state) + 13 == 587
    assert sum(math.prod(p.shape) for p in state.values()) + pool == 2_046_367_504
    for name, shape in (
        ("vision_gen_enc_model.time_embed.linear_1.weight", (2048, 768)),
        ("vision_gen_enc_model.in_conv.weight", (768, 4, 2, 2)),
        ("vision_gen_enc_model.mid_block.res_blocks.1.channelwise_norm.bias", (1, 1, 1, 3072)),
        ("vision_gen_dec_model.mid_block.res_blocks.1.cond_embeds_mapper.weight", (3072, 2048)),
        ("vision_gen_dec_model.out_convs.0.unpatch_conv.weight", (16, 1536, 1, 1)),
        ("language_model.model.layers.23.mlp.down_proj.weight", (2048, 5632)),
        ("language_model.lm_head.weight", (102400, 2048)),
        ("vision_und_enc_model.vision_tower.blocks.23.attn.qkv.weight", (3072, 1024)),
        ("vision_und_enc_aligner.weight", (2048, 1024)),
        ("beg_of_und_embed", (1, 2048)),
    ):
        assert tuple(state[name].shape) == shape
    assert RELEASE.num_rows((48, 48)) == 577


def test_sizes_without_files() -> None:
    """For estimates: no file, no network."""
    token = SIZES_ONLY.set(True)
    try:
        adapter = JanusFlowAdapter.from_pretrained("deepseek-ai/JanusFlow-1.3B", dtype="bfloat16")
        adapter.materialize()
    finally:
        SIZES_ONLY.reset(token)
    assert all(p.is_meta for p in adapter.net.parameters())
    assert adapter.vae is not None
    assert sum(p.numel() for p in adapter.vae.parameters()) == 83_653_863  # SDXL's


def test_nothing_heavy_is_read_before_materialize(folder: Path) -> None:
    adapter = JanusFlowAdapter.from_pretrained(folder, vae=folder / "vae")
    assert all(p.is_meta for p in adapter.net.parameters())
    assert all(p.is_meta for m in adapter.frozen_modules() for p in m.parameters())
    assert not list(adapter.net.buffers())
    adapter.materialize()
    assert adapter.vision is not None
    state, expected = adapter.net.state_dict() | adapter.vision.state_dict(), weights()
    assert expected.keys() - state.keys() == {n for n in expected if n.startswith(DROPPED)}
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    assert not any(p.requires_grad for m in adapter.frozen_modules() for p in m.parameters())
    assert all(p.requires_grad for p in adapter.net.parameters())
    with torch.no_grad():
        adapter.net.vision_gen_enc_aligner.weight.add_(1)
    trained = adapter.net.vision_gen_enc_aligner.weight.clone()
    adapter.materialize()
    assert torch.equal(adapter.net.vision_gen_enc_aligner.weight, trained)


@pytest.mark.parametrize("shards", [1, 3])
def test_save_and_load_are_bit_equal(folder: Path, tmp_path: Path, shards: int) -> None:
    source = folder if shards == 1 else write_checkpoint(tmp_path / "shards", shards=shards)
    adapter = load(source)
    with torch.no_grad():
        for parameter in adapter.net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", vae=folder / "vae")
    for a, b in zip(outputs(adapter), outputs(again), strict=True):
        assert torch.equal(a, b)
    found, expected = load_file(tmp_path / "saved" / "model.safetensors"), weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected if n.startswith(DROPPED))
    for name in ("config", "processor_config", "preprocessor_config", "tokenizer"):
        saved, original = (path / f"{name}.json" for path in (tmp_path / "saved", source))
        assert saved.read_bytes() == original.read_bytes()
    assert not list((tmp_path / "saved").glob("*.tmp"))


def test_what_was_left_out_is_saved_too(folder: Path, tmp_path: Path) -> None:
    load(folder, vision=False).save_pretrained(tmp_path)
    state, expected = load_file(tmp_path / "model.safetensors"), weights()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder, dtype="bfloat16")
    assert {p.dtype for p in adapter.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for m in adapter.frozen_modules() for p in m.parameters()} == {torch.float32}
    adapter.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("language_model.lm_head.weight").dtype == torch.bfloat16


def test_layers_are_read_one_by_one(folder: Path) -> None:
    """As sharding strategies ask: a unit under its name, the others left alone."""
    adapter = JanusFlowAdapter.from_pretrained(folder, vae=folder / "vae")
    first, second = adapter.shard_units()
    adapter.fill(second, "language_model.model.layers.1.")
    assert all(p.is_meta for p in first.parameters())
    for name, p in second.named_parameters():
        assert torch.equal(p, weights()[f"language_model.model.layers.1.{name}"])


def broken(folder: Path, change: Any) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("vision_gen_dec_aligner_norm.weight"),
            r"1 tensors differ:\n  vision_gen_dec_aligner_norm\.weight: missing in the file, \(32,\) in",
        ),
        (
            lambda state: state.update({"language_model.lm_head.weight": torch.zeros(7, 32)}),
            r"lm_head\.weight: \(7, 32\) in the file, \(320, 32\) in the model",
        ),
        (
            lambda state: state.update({"gen_head.weight": torch.zeros(1)}),
            r"gen_head\.weight: \(1,\) in the file, unknown in the model",
        ),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(broken(write_checkpoint(tmp_path), change))


def test_missing_files_are_named(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.vae .*diffusion_pytorch_model"):
        load(copy)
    with pytest.raises(FileNotFoundError, match=r"adapter\.vae is 'nowhere/at/all'"):
        load(copy, vae="nowhere/at/all")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a JanusFlow checkpoint: model\.safetensors"):
        load(copy)
    copy = write_checkpoint(tmp_path / "shards", shards=2)
    next(copy.glob("model-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-0000\d-of-00002"):
        load(copy)


def edited(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path)
    for name, changes, message in (
        ("preprocessor_config.json", {"image_size": 16}, r"pictures of 16 pixels, but .* reads 32"),
        ("processor_config.json", {"image_end_tag": "<none>"}, r"tokenizer lacks <none>"),
        ("vae/config.json", {"latent_channels": 16}, r"AutoencoderKL of 16 channels; .* draws 4"),
        ("vae/config.json", {"shift_factor": 0.1}, r"adapter\.vae has shift_factor 0\.1"),
    ):
        original = (copy / name).read_text()
        with pytest.raises(ValueError, match=message):
            load(edited(copy, name, **changes))
        (copy / name).write_text(original)
    with pytest.raises(ValueError, match=r"adapter\.dtype is 'int8'; known are float32"):
        load(copy, dtype="int8")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_gen_enc_config", {"use_bias": False}, r"use_bias is false; only true"),
        ("vision_gen_dec_config", {"use_mid_block": False}, r"use_mid_block is false"),
        ("vision_gen_enc_config", {"dropout": 0.1}, r"dropout is 0\.1; give 0"),
        ("vision_gen_enc_config", {"block_out_channels": [24]}, r"the skip needs them equal"),
        ("vision_gen_dec_config", {"upsamples": 2}, r"at stride 2, the decoder writes 4 after 2"),
        ("vision_und_enc_config", {"layers": None}, r"lacks layers\. They are known for"),
    ],
)
def test_configurations_that_are_refused(part: str, changes: dict[str, Any], message: str) -> None:
    found = json.loads(json.dumps(CONFIG))
    found[part]["params"].update(changes)
    with pytest.raises(ValueError, match=message):
        JanusFlowConfig.from_upstream(found)


def test_a_tied_head_is_refused() -> None:
    found = json.loads(json.dumps(CONFIG))
    found["language_config"]["tie_word_embeddings"] = True
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true; only false"):
        JanusFlowNet(JanusFlowConfig.from_upstream(found))


@pytest.mark.parametrize(("select", "layers"), [(-1, 24), (-2, 23), (0, 24), (5, 5)])
def test_layers_of_the_tower(select: int, layers: int) -> None:
    """Upstream's table by name, and how many of its layers are built."""
    found = json.loads(json.dumps(CONFIG))
    found["vision_und_enc_config"]["params"] = {
        "model_name": "siglip_large_patch16_384",
        "select_layer": select,
        "image_size": 384,
    }
    vision = JanusFlowConfig.from_upstream(found).vision
    assert vision is not None
    assert (vision.layers, vision.width, vision.num_patches) == (layers, 1024, 576)


def test_frozen_by_name(folder: Path) -> None:
    adapter = load(folder, freeze=("vision_gen_", "lm_head"))
    trained = {n for n, p in adapter.net.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith("language_model.model.") for n in trained)
