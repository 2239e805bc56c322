"""Show-o2 as an adapter: the contract, its contexts, its files."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.adapters.showo2 import ShowO2Adapter, ShowO2Config, ShowO2Net
from lightning_unigrpo.adapters.showo2.adapter import cropped
from lightning_unigrpo.adapters.showo2.checkpoint import HEAD
from lightning_unigrpo.adapters.showo2.config import RELEASES, FlowConfig, rotary_frequencies
from lightning_unigrpo.adapters.showo2.lora import LoRA
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import ImageSegment, Prompt, Segment, TextSegment, Trajectory
from tests.hub import Repository, serve
from tests.published import SENTENCES
from tests.published_showo2 import (
    ADDED,
    BEGIN,
    BOS,
    CONFIG,
    END,
    EOS,
    LANGUAGE,
    MEAN,
    SIDE,
    STD,
    WORDS,
    weights,
    write_checkpoint,
)

PROMPTS = [Prompt(text=text, id=i, size=(32, 32)) for i, text in enumerate(SENTENCES[:3])]
SMALL, LARGE = RELEASES["showlab/show-o2-1.5B"], RELEASES["showlab/show-o2-7B"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("showo2"))


def opened(folder: Path, **settings: Any) -> ShowO2Adapter:
    settings = {
        "language": Path(folder, "language"),
        "vae": Path(folder, "pipeline"),
        "default_size": (32, 32),
    } | settings
    return ShowO2Adapter.from_pretrained(folder, **settings)


def load(folder: Path, **settings: Any) -> ShowO2Adapter:
    adapter = opened(folder, **settings)
    adapter.materialize()
    return adapter.eval()


@pytest.fixture(scope="module")
def adapter(folder: Path) -> ShowO2Adapter:
    return load(folder)


def picture(*size: int) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(1))


def drawn(adapter: ShowO2Adapter, prompt: Prompt) -> Trajectory:
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
def outputs(adapter: ShowO2Adapter) -> list[Tensor]:
    """Return log-probabilities and velocities of a text-to-image and of an editing rollout."""
    prompts = [
        Prompt(text="a red cube", size=(32, 48)),
        Prompt(text="make the ball green", images=(picture(40, 24),)),
    ]
    scores = adapter([drawn(adapter, prompt) for prompt in prompts])
    return [*scores.text, *scores.velocity]


# ---- the contract


@pytest.mark.parametrize("settings", [{}, {"detach_context": True, "share_prefixes": False}])
def test_contract(folder: Path, settings: dict[str, Any]) -> None:
    """One round and two, ragged, with requests of three lengths; drawn images are looked at."""
    only = None if not settings else {"text_log_probs", "velocities", "batch_invariance"}
    check_adapter(load(folder, system_prompt="think", **settings), prompts=PROMPTS, only=only)


@pytest.mark.parametrize("rounds", [(1, 2), pytest.param((3,), marks=pytest.mark.slow)], ids=str)
def test_contract_of_editing(folder: Path, rounds: tuple[int, ...]) -> None:
    """Prompts with one input picture, none, and two between the words."""
    prompts = [
        replace(p, images=tuple(picture(20, 30) for _ in range(n)))
        for p, n in zip(PROMPTS, (1, 0, 2), strict=True)
    ]
    prompts[2].text = f"{prompts[2].text} as in <image> and <image>"
    check_adapter(load(folder), prompts=prompts, rounds=rounds)


def test_contract_of_a_head_of_its_own(tmp_path: Path) -> None:
    """As the 7B model has it."""
    adapter = load(write_checkpoint(tmp_path, tied=False))
    check_adapter(adapter, prompts=PROMPTS, rounds=(1,))
    found = adapter([drawn(adapter, PROMPTS[0])]).text[0]
    head = adapter.net.showo.lm_head
    head.weight.data = head.weight.data.flip(0)
    assert not torch.allclose(adapter([drawn(adapter, PROMPTS[0])]).text[0], found, atol=1e-3)


def test_equal_beginnings_that_are_cut_elsewhere(adapter: ShowO2Adapter) -> None:
    """One request goes on where another's reasoning does: rows are shared block by block only."""
    one = torch.zeros(1)

    def say(*texts: list[int]) -> list[Segment]:
        given, said = (torch.tensor(ids) for ids in texts)
        return [TextSegment(tokens=given), TextSegment(tokens=said, log_prob=one.expand(len(said)))]

    pairs = [say([1, 7], [8, 9, 3]), say([1, 7, 8], [9, 3]), say([1, 7], [8])]
    trajectories = [
        Trajectory(prompt=PROMPTS[0], segments=segments, group=0, member=i)
        for i, segments in enumerate(pairs)
    ]
    alone = [adapter([each]).text[0] for each in trajectories]
    for got, expected in zip(adapter(trajectories).text, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_image_loss_can_be_kept_from_the_reasoning(folder: Path) -> None:
    """The embedding of a word that only the reasoning has gets no gradient of the velocity."""
    for detach in (False, True):
        adapter = load(folder, detach_context=detach)
        (velocity,) = adapter([drawn(adapter, PROMPTS[0])]).velocity
        velocity.square().sum().backward()
        grad = adapter.decoder.embed_tokens.weight.grad
        reached = grad is not None and bool(grad[9].abs().sum() > 0)
        assert reached is not detach


def test_what_is_not_reached(folder: Path, tmp_path: Path) -> None:
    """By a backward pass: nothing that has a gradient is listed, and all that has none."""
    for source in (folder, write_checkpoint(tmp_path, tied=False)):
        adapter = load(source)
        trajectory = drawn(adapter, PROMPTS[0])
        *context, text, image = trajectory.segments
        for plan, segments in ((("text",), [*context, text]), (("image",), [*context, image])):
            adapter.zero_grad()
            scores = adapter([replace(trajectory, segments=segments)])
            sum(x.square().sum() for x in (*scores.text, *scores.velocity)).backward()  # type: ignore[union-attr]
            without = {name for name, p in adapter.net.named_parameters() if p.grad is None}
            listed = {id(p) for p in adapter.unreached(plan)}
            assert without == {n for n, p in adapter.net.named_parameters() if id(p) in listed}
        assert adapter.unreached(("text", "image")) == []


def test_groups(adapter: ShowO2Adapter) -> None:
    """The Qwen2.5 is text, all else is flow; also under the names that a strategy gives."""
    groups = adapter.param_groups()
    language = {id(p) for p in adapter.net.showo.parameters()}
    assert {id(p) for p in groups["text"]} == language
    assert len(groups["text"]) + len(groups["flow"]) == len(list(adapter.net.parameters()))
    assert not adapter.is_flow("_fsdp_wrapped_module.showo.model.norm.weight")
    assert adapter.is_flow("module.diffusion_head_a.0.mlp.up_proj.weight")
    assert len(adapter.shard_units()) == 4


# ---- contexts


def test_prompts(adapter: ShowO2Adapter, folder: Path) -> None:
    """Ids are the tokenizer file's of the whole text, pictures cut out."""
    raw = Tokenizer.from_file(str(folder / "language" / "tokenizer.json"))
    mark = {name: raw.token_to_id(name) for name in (BOS, EOS, BEGIN, END)}
    config = adapter.config
    found = (config.bos, config.eos, config.begin_of_image, config.end_of_image)
    assert found == tuple(mark.values())
    (text,) = adapter.tokenize(Prompt(text="a red cube, 漢字!"))
    assert isinstance(text, TextSegment)
    assert text.tokens.tolist() == [mark[BOS], *raw.encode("a red cube, 漢字!").ids]
    images = (picture(20, 30), picture(8, 8))
    segments = adapter.tokenize(Prompt(text="make it blue", images=images))
    assert [type(s) for s in segments] == [TextSegment, ImageSegment] * 2 + [TextSegment]
    words = [s.tokens.tolist() for s in segments if isinstance(s, TextSegment)]
    assert words == [[mark[BOS]], [], raw.encode("make it blue").ids]
    image = segments[1]
    assert isinstance(image, ImageSegment)
    assert image.is_context
    assert (image.latent.shape, image.grid) == ((64, 4), (8, 8))


def test_a_conversation(folder: Path) -> None:
    """With a system prompt: upstream's, an end of turn before the assistant's as in training."""
    adapter = load(folder, system_prompt="think")
    raw = Tokenizer.from_file(str(folder / "language" / "tokenizer.json"))
    text = f"{BOS}system\nthink{EOS}\n{BOS}user\na cat{EOS}\n{BOS}assistant\n"
    (found,) = adapter.tokenize(Prompt(text="a cat"))
    assert isinstance(found, TextSegment)
    assert found.tokens.tolist() == raw.encode(text).ids
    before, after = text.split("a cat")
    first, _, second = adapter.tokenize(Prompt(text="a cat", images=(picture(8, 8),)))
    assert isinstance(first, TextSegment)
    assert isinstance(second, TextSegment)
    assert first.tokens.tolist() == raw.encode(before).ids
    assert second.tokens.tolist() == raw.encode("a cat" + after).ids


def test_guidance_is_the_empty_request(adapter: ShowO2Adapter) -> None:
    """Its image right behind ``bos``, whatever the context; two rows are alike."""
    contexts = [adapter.tokenize(PROMPTS[0]), drawn(adapter, PROMPTS[1]).segments[:-1]]
    other, empty = adapter.guidance(contexts), adapter.prefill([adapter.tokenize(Prompt(text=""))])
    assert other.positions.tolist() == other.lengths.tolist() == [1, 1]
    x, level = torch.randn(1, 64, 4), torch.tensor([0.7])
    expected = adapter.velocity(empty, x, level, (8, 8))
    got = adapter.velocity(other, x.expand(2, -1, -1), level.expand(2), (8, 8))
    torch.testing.assert_close(got, expected.expand(2, -1, -1), atol=1e-5, rtol=0)


def test_sizes_that_do_not_fit_are_refused(adapter: ShowO2Adapter) -> None:
    assert adapter.image_grid(Prompt(text="", size=(16, 40))) == (4, 10)
    with pytest.raises(ValueError, match=rf"Prompt\.size \(16, 12\) must be multiples of {SIDE}"):
        adapter.image_grid(Prompt(text="", size=(16, 12)))


# ---- pictures and latents


def test_pictures_are_scaled_and_cropped() -> None:
    """The shorter side fits, the middle of the longer one stays."""
    pixels = picture(20, 60)
    found = cropped(pixels, (40, 40))
    scaled = interpolate(pixels[None], (40, 120), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(found, scaled[:, :, 40:80].clamp(0, 1))
    assert torch.equal(cropped(pixels, (20, 32)), pixels[:, :, 14:46])


@torch.no_grad()
def test_latents_are_normalised(adapter: ShowO2Adapter) -> None:
    """``decode(x * std + mean)``, and ``(mode - mean) / std``: diffusers' own halves, a video of 1 frame."""
    assert adapter.vae is not None
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (MEAN, STD))
    x = torch.randn(2, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = adapter.vae.vae.decode(x * std + mean).sample.squeeze(2).clamp(-1, 1)
    got = adapter.decode(x.squeeze(2).flatten(2).transpose(1, 2), (4, 6))
    torch.testing.assert_close(got, (expected + 1) / 2, atol=1e-6, rtol=0)
    assert got.shape == (2, 3, 16, 24)
    pixels = picture(32, 32)
    z = adapter.vae.vae.encode(2 * pixels[None, :, None] - 1).latent_dist.mode()
    wanted = ((z - mean) / std).squeeze(2).flatten(2).transpose(1, 2)[0]
    torch.testing.assert_close(adapter.read(pixels).latent, wanted, atol=1e-6, rtol=0)


def test_the_rotation_of_the_flow_stack() -> None:
    """Frequencies are those of ``transformers``, to the bit."""
    flow = FlowConfig()
    config = LlamaConfig(
        head_dim=flow.head_dim,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": flow.rope_theta,
            **flow.rope_scaling,
        },
    )
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert factor == 1
    assert torch.equal(torch.tensor(rotary_frequencies(flow)), expected)


# ---- files


@pytest.mark.parametrize(("release", "numbers"), [(SMALL, 2_830_777_056), (LARGE, 8_932_118_752)])
def test_the_releases_sizes(release: ShowO2Config, numbers: int) -> None:
    """910 tensors; 2.831 and 8.932 billion parameters, a tied head counted once."""
    with torch.device("meta"):
        state = ShowO2Net(release).state_dict()
    assert len(state | {HEAD: 0}) == 910
    assert sum(math.prod(p.shape) for p in state.values()) == numbers
    h = release.language["hidden_size"]
    for name, shape in (
        ("showo.model.embed_tokens.weight", (151669, h)),
        ("showo.model.layers.27.self_attn.q_proj.bias", (h,)),
        ("image_embedder_und.proj.weight", (1152, 16, 2, 2)),
        ("image_embedder_gen.proj.weight", (h, 16, 2, 2)),
        ("position_embedding.weight", (729, 1152)),
        ("und_trans.layers.25.self_attn.out_proj.weight", (1152, 1152)),
        ("und_trans.layers.25.mlp.fc1.weight", (4304, 1152)),
        ("fusion_proj.0.weight", (1152 + h,)),
        ("fusion_proj.1.weight", (h, 1152 + h)),
        ("time_embed.mlp.0.weight", (2048, 256)),
        ("time_embed_proj.weight", (h, 2048)),
        ("diff_proj.0.weight", (2048, h)),
        ("diffusion_head_a.9.self_attn.k_proj.weight", (512, 2048)),
        ("diffusion_head_a.9.self_attn.q_norm.weight", (64,)),
        ("diffusion_head_a.9.adaLN_modulation.1.bias", (12288,)),
        ("diffusion_head_b.linear.weight", (64, 2048)),
        ("diffusion_head_b.adaLN_modulation.1.weight", (4096, 2048)),
    ):
        assert tuple(state[name].shape) == shape
    assert release.num_rows((54, 54)) == 730


def test_widths_that_agree_need_no_bridge() -> None:
    """Upstream builds neither projection then."""
    config = replace(SMALL, flow=replace(SMALL.flow, width=1536))
    with torch.device("meta"):
        names = set(ShowO2Net(config).state_dict())
    assert not any(name.startswith(("time_embed_proj", "diff_proj")) for name in names)


def test_sizes_without_files() -> None:
    """For estimates: no file, no network."""
    token = SIZES_ONLY.set(True)
    try:
        adapter = ShowO2Adapter.from_pretrained("showlab/show-o2-1.5B-HQ", dtype="bfloat16")
        adapter.materialize()
    finally:
        SIZES_ONLY.reset(token)
    assert all(p.is_meta for p in adapter.net.parameters())
    assert adapter.vae is not None
    assert sum(p.numel() for p in adapter.vae.parameters()) == 126_892_531  # Wan 2.1's


def test_nothing_heavy_is_read_before_materialize(folder: Path) -> None:
    adapter = opened(folder)
    assert all(p.is_meta for p in adapter.net.parameters())
    assert all(p.is_meta for m in adapter.frozen_modules() for p in m.parameters())
    assert not list(adapter.net.buffers())
    adapter.materialize()
    state, expected = adapter.net.state_dict(), weights()
    assert expected.keys() - state.keys() == {HEAD}
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name
    assert not any(p.requires_grad for m in adapter.frozen_modules() for p in m.parameters())
    assert all(p.requires_grad for p in adapter.net.parameters())
    with torch.no_grad():
        adapter.net.time_embed_proj.weight.add_(1)  # type: ignore[operator, union-attr]
    trained = adapter.net.time_embed_proj.weight.clone()  # type: ignore[operator, union-attr]
    adapter.materialize()
    assert torch.equal(adapter.net.time_embed_proj.weight, trained)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shards", "pickled", "tied"), [(1, True, True), (3, True, False), (2, False, True)]
)
def test_save_and_load_are_bit_equal(
    tmp_path: Path, shards: int, pickled: bool, tied: bool
) -> None:
    """In every form that is read; what is written is one file, and needs no other model's folder."""
    source = write_checkpoint(tmp_path / "source", shards=shards, pickled=pickled, tied=tied)
    adapter = load(source)
    with torch.no_grad():
        for parameter in adapter.net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    saved = tmp_path / "saved"
    adapter.save_pretrained(saved)
    again = load(saved, language=None, vae=source / "pipeline")
    for a, b in zip(outputs(adapter), outputs(again), strict=True):
        assert torch.equal(a, b)
    found, expected = torch.load(saved / "pytorch_model.bin", weights_only=True), weights(tied=tied)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in expected.items()}
    assert torch.equal(found[HEAD], found["showo.model.embed_tokens.weight"]) is tied
    assert (saved / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not list(saved.glob("*.tmp"))
    again.save_pretrained(saved)
    third = load(saved, language=None, vae=source / "pipeline")
    for a, b in zip(outputs(adapter), outputs(third), strict=True):
        assert torch.equal(a, b)


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    """Weights and contract: both views round alike."""
    adapter = load(folder, dtype="bfloat16")
    assert {p.dtype for p in adapter.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for m in adapter.frozen_modules() for p in m.parameters()} == {torch.float32}
    adapter.save_pretrained(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    check_adapter(adapter, prompts=PROMPTS, only={"text_log_probs", "velocities"})


def test_layers_are_read_one_by_one(folder: Path) -> None:
    """As sharding strategies ask: a unit under its name, the others left alone."""
    adapter = opened(folder)
    first, second, *_ = adapter.shard_units()
    adapter.fill(second, "showo.model.layers.1.")
    assert all(p.is_meta for p in first.parameters())
    for name, p in second.named_parameters():
        assert torch.equal(p, weights()[f"showo.model.layers.1.{name}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("diffusion_head_b.norm_final.weight"),
            r"1 tensors differ:\n  diffusion_head_b\.norm_final\.weight: missing in the file, \(48,\) in",
        ),
        (
            lambda state: state.update({HEAD: torch.zeros(7, 32)}),
            r"lm_head\.weight: \(7, 32\) in the file, \(304, 32\) in the model",
        ),
        (
            lambda state: state.update({"video.weight": torch.zeros(1)}),
            r"video\.weight: \(1,\) in the file, unknown in the model",
        ),
        (
            lambda state: state.update({HEAD: state[HEAD] + 1}),
            r"embed_tokens\.weight differ, but .* tie_word_embeddings true; set it to false",
        ),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    copy, state = write_checkpoint(tmp_path), weights()
    change(state)
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load(copy)


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    """Neither one that holds code, nor one that was cut off."""
    copy, ran = write_checkpoint(tmp_path / "copy"), tmp_path / "ran"
    torch.save({"a": Runs(ran)}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(ran)))
    with pytest.raises(ValueError, match=r"truncated or no file of tensors"):
        load(copy)
    assert not ran.exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy")
    (copy / "pipeline/vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.vae .*diffusion_pytorch_model"):
        load(copy)
    with pytest.raises(FileNotFoundError, match=r"adapter\.vae is 'nowhere/at/all'"):
        load(copy, vae="nowhere/at/all")
    (copy / "language" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer"):
        load(copy)
    (copy / "language" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.language .* has no config\.json"):
        load(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a Show-o2 checkpoint: pytorch_model\.bin"):
        load(copy)
    copy = write_checkpoint(tmp_path / "shards", shards=2)
    next(copy.glob("pytorch_model-0*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names pytorch_model-0000\d-of-00002"):
        load(copy)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path)
    for name, changes, message in (
        ("config.json", {"llm_vocab_size": 3}, r"gives a mark the id 4, but .* llm_vocab_size 3"),
        ("config.json", {"llm_vocab_size": None}, r"config\.json lacks llm_vocab_size"),
        ("config.json", {"add_time_embeds": False}, r"add_time_embeds is false; only true"),
        ("config.json", {"clip_latent_dim": 32}, r"clip_latent_dim is 32, but .* 24 wide"),
        ("language/config.json", {"hidden_size": 64}, r"hidden_size 32, .* 64: give adapter\.lang"),
        ("language/config.json", {"use_sliding_window": True}, r"use_sliding_window is true"),
        ("language/config.json", {"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ("pipeline/vae/config.json", {"z_dim": 16}, r"AutoencoderKLWan of 16 channels; .* 4 chan"),
        ("pipeline/vae/config.json", {"_class_name": "AutoencoderKL"}, r"is AutoencoderKL of 4"),
    ):
        path = copy / name
        original = path.read_text()
        path.write_text(json.dumps(json.loads(original) | changes))
        with pytest.raises(ValueError, match=message):
            load(copy)
        path.write_text(original)
    with pytest.raises(ValueError, match=r"adapter\.dtype is 'int8'; known are float32"):
        load(copy, dtype="int8")
    path = copy / "config.json"
    path.write_text(json.dumps(CONFIG | {"llm_model_path": None}))
    with pytest.raises(ValueError, match=r"no llm_model_path; give adapter\.language"):
        load(copy, language=None)
    tokenizer = copy / "language" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace(BEGIN, "<|other|>"))
    with pytest.raises(ValueError, match=r"tokenizer lacks <\|vision_start\|>: give adapter\.lang"):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, r"attention_bias is true; only false"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_type 'yarn'; only 'llama3'"),
    ],
)
def test_flow_stacks_that_are_refused(changes: dict[str, Any], message: str) -> None:
    head = CONFIG["diffusion_head_config"] | changes
    with pytest.raises(ValueError, match=message):
        ShowO2Config.from_upstream(CONFIG | {"diffusion_head_config": head}, LANGUAGE)


def test_marks_are_added_as_upstream_adds_them(adapter: ShowO2Adapter) -> None:
    """Behind all words, in this order."""
    tokenizer = adapter.tokenizer.tokenizer
    assert [tokenizer.convert_tokens_to_ids(name) for name in ADDED] == [*range(WORDS, WORDS + 4)]
    assert adapter.tokenizer.encode("a[PAD]b")[1] == WORDS


def test_from_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three repositories, of which only what is read is fetched."""
    source = write_checkpoint(tmp_path / "source", shards=2, llm_model_path="Qwen/tiny")
    for name in ("language", "pipeline"):
        shutil.move(source / name, tmp_path / name)
    shutil.copy(tmp_path / "pipeline/vae/config.json", tmp_path / "pipeline/model_index.json")
    for foreign in ("source/a.bin", "language/model.safetensors", "pipeline/text/m.safetensors"):
        (tmp_path / foreign).parent.mkdir(exist_ok=True)
        (tmp_path / foreign).write_bytes(bytes(1000))
    names = {"showlab/tiny": "source", "Qwen/tiny": "language", "Wan/tiny": "pipeline"}
    hubs = {name: Repository(folder=tmp_path / folder) for name, folder in names.items()}
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "0")
    with serve(hubs) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        adapter = ShowO2Adapter.from_pretrained(
            "showlab/tiny", vae="Wan/tiny", default_size=(32, 32)
        )
        adapter.materialize()
    kept = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_symlink()}
    assert kept == {
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "diffusion_pytorch_model.safetensors",
    }
    local = load(tmp_path / "source", language=tmp_path / "language", vae=tmp_path / "pipeline")
    for a, b in zip(outputs(local), outputs(adapter.eval()), strict=True):
        assert torch.equal(a, b)


# ---- LoRA and freezing


@pytest.mark.parametrize(
    ("stacks", "prefixes"),
    [
        (("text",), ("showo.model.layers",)),
        (("flow",), ("diffusion_head_a",)),
        (("text", "flow"), ("showo.model.layers", "diffusion_head_a")),
    ],
)
def test_lora_sits_where_it_is_asked_to(
    folder: Path, stacks: tuple[str, ...], prefixes: tuple[str, ...]
) -> None:
    adapter = load(folder, lora=LoRA(rank=2, stacks=stacks))
    trained = [n for n, p in adapter.net.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 * len(stacks)  # layers, projections, factors
    assert all(name.startswith(prefixes) for name in trained)
    assert isinstance(adapter.lora, LowRank)
    with pytest.raises(ValueError, match=r"adapter\.lora\.stacks is .*; give some of text, flow"):
        LoRA(stacks=("vision",))


def test_contract_with_lora(folder: Path) -> None:
    """The whole contract, weights of the base in bfloat16 left out of it."""
    check_adapter(load(folder, lora=LoRA(rank=2), gradient_checkpointing=True), prompts=PROMPTS)


def test_frozen_by_name(folder: Path) -> None:
    adapter = load(folder, freeze=("und_trans", "position_embedding", "showo"))
    trained = {n.split(".")[0] for n, p in adapter.net.named_parameters() if p.requires_grad}
    assert {"fusion_proj", "diffusion_head_a"} <= trained
    assert not {"und_trans", "position_embedding", "showo"} & trained


def test_nothing_is_saved_that_was_not_loaded(adapter: ShowO2Adapter, tmp_path: Path) -> None:
    built = ShowO2Adapter(adapter.config, adapter.tokenizer)
    with pytest.raises(ValueError, match="writes what from_pretrained read"):
        built.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no image decoder"):
        built.decode(torch.zeros(1, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="no autoencoder to read a picture with"):
        built.read(picture(8, 8))


def test_safetensors_are_read_before_pickles(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path, pickled=False)
    (copy / "pytorch_model.bin").write_bytes(b"nothing")
    state = load_file(copy / "model.safetensors")
    assert torch.equal(load(copy).net.fusion_proj[0].weight, state["fusion_proj.0.weight"])
