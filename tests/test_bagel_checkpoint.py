"""The published layout: loading, saving, the real sizes, and what is said when files are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelNet
from lightning_unigrpo.adapters.bagel import checkpoint as files
from lightning_unigrpo.adapters.bagel.config import RELEASES
from lightning_unigrpo.adapters.bagel.images import Resize, latent_resize, patch_resize
from lightning_unigrpo.adapters.bagel.pretrained import released
from lightning_unigrpo.adapters.bagel.tokenizer import BagelTokenizer
from lightning_unigrpo.adapters.bagel.vae import build_vae, vae_names
from lightning_unigrpo.adapters.bagel.vision import BagelVision
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import ImageSegment, Prompt, TextSegment, Trajectory
from tests.published import CONFIG, PIXELS, weights, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bagel"))


def load(folder: Path, **settings: object) -> BagelAdapter:
    adapter = BagelAdapter.from_pretrained(folder, **settings)  # type: ignore[arg-type]
    adapter.materialize()
    return adapter.eval()


def drawn(adapter: BagelAdapter, prompt: Prompt) -> Trajectory:
    """Return a rollout with one text and one image of fixed numbers."""
    generator = torch.Generator().manual_seed(0)
    h, w = adapter.image_grid(prompt)
    states = torch.randn(3, h * w, adapter.latent_channels, generator=generator)
    image = ImageSegment(
        latent=states[-1], grid=(h, w), states=states, sigmas=torch.tensor([0.9, 0.5, 0.2])
    )
    text = TextSegment(tokens=torch.tensor([5, 9, adapter.stop_token]), log_prob=torch.zeros(3))
    return Trajectory(
        prompt=prompt, segments=[*adapter.tokenize(prompt), text, image], group=0, member=0
    )


def outputs(adapter: BagelAdapter) -> list[torch.Tensor]:
    """Return log-probabilities and velocities of a text-to-image and of an editing rollout."""
    picture = torch.rand(3, 40, 24, generator=torch.Generator().manual_seed(1))
    prompts = [
        Prompt(text="a red cube", size=(32, 48)),
        Prompt(text="make the ball green", images=(picture,)),
    ]
    with torch.no_grad():
        scores = adapter([drawn(adapter, prompt) for prompt in prompts])
    return [*scores.text, *scores.velocity]


def test_nothing_heavy_is_read_before_materialize(folder: Path) -> None:
    adapter = BagelAdapter.from_pretrained(folder)
    assert all(p.is_meta for name, p in adapter.net.named_parameters() if name not in files.TABLES)
    adapter.materialize()
    state, expected = adapter.net.state_dict(), weights()
    assert adapter.vision is not None
    state |= adapter.vision.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    assert not any(p.requires_grad for m in adapter.frozen_modules() for p in m.parameters())
    assert all(
        p.requires_grad for name, p in adapter.net.named_parameters() if name not in files.TABLES
    )


def test_materialize_keeps_trained_weights(folder: Path) -> None:
    adapter = load(folder)
    with torch.no_grad():
        adapter.net.vae2llm.weight.add_(1)
    trained = adapter.net.vae2llm.weight.clone()
    adapter.materialize()
    assert torch.equal(adapter.net.vae2llm.weight, trained)


def test_sizes_are_read_from_the_files(folder: Path) -> None:
    config = load(folder).config
    marks = BagelTokenizer.from_folder(folder).marks
    assert vars(config) == vars(CONFIG) | {
        "bos": marks["bos_token_id"],
        "eos": marks["eos_token_id"],
        "start_of_image": marks["start_of_image"],
        "end_of_image": marks["end_of_image"],
    }
    assert load(folder, overrides={"rope_theta": 77.0}).config.rope_theta == 77.0


@pytest.mark.parametrize("shards", [1, 3])
def test_save_and_load_are_bit_equal(folder: Path, tmp_path: Path, shards: int) -> None:
    source = folder if shards == 1 else write_checkpoint(tmp_path / "shards", shards=shards)
    adapter = load(source)
    with torch.no_grad():
        for parameter in adapter.net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    for a, b in zip(outputs(adapter), outputs(again), strict=True):
        assert torch.equal(a, b)
    assert again.tokenizer.encode("a red cube") == adapter.tokenizer.encode("a red cube")
    with safe_open(tmp_path / "saved" / "ema.safetensors", "pt") as file:
        assert set(file.keys()) == set(weights())
    assert (tmp_path / "saved" / "vocab.json").is_file()  # what upstream's tokenizer class reads
    assert not list((tmp_path / "saved").glob("*.tmp"))


def test_what_was_left_out_is_saved_too(folder: Path, tmp_path: Path) -> None:
    """Generation only: the tower's weights are copied, so that others can load all of it."""
    adapter = load(folder, vision=False)
    assert adapter.vision is None
    adapter.save_pretrained(tmp_path)
    state, expected = load_file(tmp_path / "ema.safetensors"), weights()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder, dtype="bfloat16")
    assert {p.dtype for p in adapter.net.parameters()} == {torch.bfloat16}
    adapter.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="bfloat16")
    for (name, a), b in zip(adapter.net.named_parameters(), again.net.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_patch_embedding_of_a_convolution(folder: Path, tmp_path: Path) -> None:
    """Some files keep the kernel ``[d, channels, p, p]``."""
    copy = write_checkpoint(tmp_path)
    name = "vit_model.vision_model.embeddings.patch_embedding.weight"
    state = load_file(copy / "ema.safetensors")
    p = 4
    state[name] = state[name].unflatten(1, (p, p, 3)).permute(0, 3, 1, 2).contiguous()
    save_file(state, copy / "ema.safetensors")
    for a, b in zip(outputs(load(folder)), outputs(load(copy)), strict=True):
        assert torch.equal(a, b)


def test_a_table_of_another_size_is_computed(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path)
    adapter = load(copy, overrides={"max_latent_size": 4})
    table = adapter.net.latent_pos_embed.pos_embed
    assert table.shape == (16, CONFIG.hidden_size)
    assert not table.is_meta
    state = load_file(copy / "ema.safetensors")
    del state["latent_pos_embed.pos_embed"]
    save_file(state, copy / "ema.safetensors")
    assert load(copy, overrides={"max_latent_size": 4}).config.max_latent_size == 4


def test_tokenizer_is_real(folder: Path) -> None:
    """Qwen2's class; marks are single ids, and re-adding them moves none."""
    tokenizer = BagelTokenizer.from_folder(folder)
    assert type(tokenizer.tokenizer).__name__.startswith("Qwen2Tokenizer")
    again = BagelTokenizer(tokenizer.tokenizer)
    assert again.marks == tokenizer.marks
    assert len(set(tokenizer.marks.values())) == 4
    ids = tokenizer.encode("a red cube, 漢字!")
    assert tokenizer.decode(ids) == "a red cube, 漢字!"
    assert not set(ids) & set(tokenizer.marks.values())
    for name, mark in files.MARKS.items():
        assert tokenizer.encode(mark) == [tokenizer.marks[name]]


# ---- the real sizes


RELEASE = RELEASES["ByteDance-Seed/BAGEL-7B-MoT"]


def release_names() -> dict[str, tuple[int, ...]]:
    """The specification's list of tensors, written out."""
    d, kv, ff, v, c, t, vff = 3584, 512, 18944, 152064, 64, 1152, 4304
    names: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (v, d),
        "language_model.lm_head.weight": (v, d),
        "vae2llm.weight": (d, c),
        "vae2llm.bias": (d,),
        "llm2vae.weight": (c, d),
        "llm2vae.bias": (c,),
        "time_embedder.mlp.0.weight": (d, 256),
        "time_embedder.mlp.0.bias": (d,),
        "time_embedder.mlp.2.weight": (d, d),
        "time_embedder.mlp.2.bias": (d,),
        "latent_pos_embed.pos_embed": (4096, d),
        "connector.fc1.weight": (d, t),
        "connector.fc1.bias": (d,),
        "connector.fc2.weight": (d, d),
        "connector.fc2.bias": (d,),
        "vit_pos_embed.pos_embed": (4900, d),
    }
    for e in ("", "_moe_gen"):
        names[f"language_model.model.norm{e}.weight"] = (d,)
        for n in range(28):
            layer = f"language_model.model.layers.{n}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"{layer}.{norm}{e}.weight"] = (d,)
            for part, rows in (("q", d), ("k", kv), ("v", kv)):
                names[f"{layer}.self_attn.{part}_proj{e}.weight"] = (rows, d)
                names[f"{layer}.self_attn.{part}_proj{e}.bias"] = (rows,)
            names[f"{layer}.self_attn.o_proj{e}.weight"] = (d, d)
            names[f"{layer}.self_attn.q_norm{e}.weight"] = (128,)
            names[f"{layer}.self_attn.k_norm{e}.weight"] = (128,)
            for part in ("gate", "up"):
                names[f"{layer}.mlp{e}.{part}_proj.weight"] = (ff, d)
            names[f"{layer}.mlp{e}.down_proj.weight"] = (d, ff)
    root = "vit_model.vision_model"
    names |= {
        f"{root}.embeddings.patch_embedding.weight": (t, 588),
        f"{root}.embeddings.patch_embedding.bias": (t,),
        f"{root}.embeddings.position_embedding.weight": (4900, t),
        f"{root}.post_layernorm.weight": (t,),
        f"{root}.post_layernorm.bias": (t,),
    }
    for n in range(26):
        layer = f"{root}.encoder.layers.{n}"
        shapes = {
            "layer_norm1": (t,),
            "layer_norm2": (t,),
            "mlp.fc1": (vff, t),
            "mlp.fc2": (t, vff),
        }
        shapes |= {f"self_attn.{part}_proj": (t, t) for part in ("q", "k", "v", "out")}
        for part, shape in shapes.items():
            names[f"{layer}.{part}.weight"] = shape
            names[f"{layer}.{part}.bias"] = (shape[0],)
    return names


def test_the_release_has_these_tensors() -> None:
    assert RELEASE.vision is not None
    with torch.device("meta"):
        parts = [BagelNet(RELEASE), BagelVision(RELEASE.vision, RELEASE.hidden_size)]
    found = {n: tuple(p.shape) for part in parts for n, p in part.state_dict().items()}
    assert found == release_names()
    assert len(found) == 1223
    assert sum(p.numel() for part in parts for p in part.parameters()) == 14_607_260_128


def test_the_release_has_this_autoencoder() -> None:
    """FLUX.1's sizes, found from the shapes of a few of its tensors."""
    vae = released("ByteDance-Seed/BAGEL-7B-MoT", torch.float32, vision=False).vae.vae
    assert len(vae.state_dict()) == 244
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683


def test_every_tensor_of_the_autoencoder_has_its_name(folder: Path) -> None:
    upstream = files.read_header(folder / "ae.safetensors")
    vae = build_vae({name: file.shape for name, file in upstream.items()})
    assert sorted(vae_names(upstream).values()) == sorted(vae.state_dict())


# ---- sizes of images


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1024, 1024)),
        ((2048, 1024), (1024, 512)),
        ((300, 500), (512, 848)),  # the shorter side grows to 512: 500 * 512 / 300 = 853.3
        ((768, 1000), (768, 992)),  # 62.5 strides, rounded to even
        ((100, 2000), (48, 1024)),  # too long at 512: the longer side wins
    ],
)
def test_resizing_of_input_images(size: tuple[int, int], expected: tuple[int, int]) -> None:
    rule = latent_resize(RELEASE)
    assert (rule.stride, rule.min_size, rule.max_size) == (16, 512, 1024)
    found = rule.fit(*size)
    assert all(side % 16 == 0 and side <= 1024 for side in found)
    ratio = found[0] / found[1] / (size[0] / size[1])
    assert 0.9 < ratio < 1.1
    assert found == expected
    pixels = torch.rand(3, *size)
    resized = rule(pixels)
    assert tuple(resized.shape[1:]) == found
    assert resized.min() >= 0
    assert resized.max() <= 1
    if found == size:
        assert torch.equal(resized, pixels)


def test_resizing_for_the_tower() -> None:
    assert RELEASE.vision is not None
    rule = patch_resize(RELEASE.vision)
    assert rule == Resize(stride=14, min_size=224, max_size=980)
    assert rule.fit(1024, 1024) == (980, 980)


# ---- contexts


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        ("draw", 1),
        ("draw", 2),
        pytest.param("draw", 3, marks=pytest.mark.slow),
        ("edit", 1),
        pytest.param("edit", 2, marks=pytest.mark.slow),
        pytest.param("edit", 3, marks=pytest.mark.slow),
    ],
)
def test_contract(folder: Path, kind: str, rounds: int) -> None:
    """Text-to-image and editing, ragged prompts, a size that is not square, one to three rounds."""
    generator = torch.Generator().manual_seed(0)
    pictures = [
        torch.rand(3, 40, 64, generator=generator),
        torch.rand(3, 80, 128, generator=generator),
    ]
    prompts = [
        Prompt(text="a red cube", id=0, size=(32, 48)),
        Prompt(text="three green apples on a table", id=1, size=(32, 48)),
        Prompt(text="ball", id=2, size=(32, 48)),
    ]
    if kind == "edit":
        for prompt, images in zip(prompts, ([pictures[0]], pictures, [pictures[1]]), strict=True):
            prompt.images = tuple(images)
        prompts[1].text = "three <image> apples on a <image> table"
    adapter = load(folder, system_prompt="think about the layout", default_size=(32, 48))
    check_adapter(adapter, prompts=prompts, rounds=[rounds])


def test_system_prompt_images_and_request_in_this_order(folder: Path) -> None:
    adapter = load(folder, system_prompt="think", posterior="sample")
    picture = torch.rand(3, 40, 64)
    segments = adapter.tokenize(Prompt(text="a dog", id=3, images=(picture,)))
    kinds = [type(segment).__name__ for segment in segments]
    assert kinds == ["TextSegment", "ImageSegment", "TextSegment"]
    assert adapter.detokenize(segments[0].tokens) == "think"  # type: ignore[union-attr]
    assert adapter.detokenize(segments[2].tokens) == "a dog"  # type: ignore[union-attr]
    image = segments[1]
    assert isinstance(image, ImageSegment)
    assert image.grid == (40 // PIXELS, 64 // PIXELS)
    assert image.views["vit"].shape[1] == CONFIG.hidden_size
    # A posterior's sample is a function of the prompt's id, and not its mean.
    assert torch.equal(adapter.see(picture, key=(3, 0)).latent, image.latent)
    assert not torch.equal(adapter.see(picture, key=(4, 0)).latent, image.latent)
    pair = adapter.tokenize(Prompt(text="a dog", id=3, images=(picture, picture)))[1:3]
    assert not torch.equal(pair[0].latent, pair[1].latent)  # type: ignore[union-attr]
    mean = load(folder).see(picture)
    assert not torch.equal(mean.latent, image.latent)
    assert adapter.image_grid(Prompt(text="", images=(picture,))) == image.grid
    assert adapter.image_grid(Prompt(text="", images=(picture,), size=(16, 16))) == (2, 2)


def test_a_drawn_image_is_looked_at_as_upstream_does(folder: Path) -> None:
    """Decoded, then read like an input image of its own size."""
    adapter = load(folder)
    image = ImageSegment(
        latent=torch.randn(30, adapter.latent_channels), grid=(6, 5), is_context=True
    )
    looked = adapter.look(image)
    assert looked.latent is image.latent  # what was sampled stays the action
    pixels = adapter.decode(image.latent.unsqueeze(0), image.grid)
    assert pixels.shape == (1, 3, 48, 40)
    again = adapter.see(pixels[0])
    torch.testing.assert_close(looked.views["vae"], again.latent)
    torch.testing.assert_close(looked.views["vit"], again.views["vit"])


# ---- wrong files


def spoil(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name)


def test_a_wrong_folder_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        FileNotFoundError, match=r"llm_config.json, ae.safetensors, ema.safetensors missing"
    ):
        BagelAdapter.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        BagelAdapter.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "say"),
    [
        ("vocab.json", "holds no tokenizer"),
        ("ae.safetensors", "ae.safetensors missing"),
        ("ema.safetensors", "ema.safetensors missing"),
    ],
)
def test_missing_files(tmp_path: Path, name: str, say: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=say):
        BagelAdapter.from_pretrained(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "ema-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="ema-00002-of-00003"):
        BagelAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "say"),
    [
        (
            lambda s: s.pop("vae2llm.bias"),
            r"vae2llm.bias: missing in the file, \(32,\) in the model",
        ),
        (
            lambda s: s.update(extra=torch.zeros(2)),
            r"extra: \(2,\) in the file, unknown in the model",
        ),
        (
            lambda s: s.update({"llm2vae.weight": torch.zeros(3, 32)}),
            r"llm2vae.weight: \(3, 32\) in the file, \(16, 32\) in the model",
        ),
    ],
)
def test_weights_of_another_model(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], say: str
) -> None:
    write_checkpoint(tmp_path)
    spoil(tmp_path, "ema.safetensors", change)
    with pytest.raises(ValueError, match=say):
        BagelAdapter.from_pretrained(tmp_path)


def test_a_configuration_of_another_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, intermediate_size=48)
    with pytest.raises(ValueError, match=r"8 tensors|tensors differ") as error:
        BagelAdapter.from_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) < 15
    assert "and 4 more" in str(error.value)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated"):
        BagelAdapter.from_pretrained(tmp_path)


def test_other_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\.dtype is 'int4'; known are float32"):
        BagelAdapter.from_pretrained(folder, dtype="int4")
    with pytest.raises(ValueError, match=r"adapter\.overrides has colour; known are"):
        BagelAdapter.from_pretrained(folder, overrides={"colour": 1})
    small = write_checkpoint(tmp_path / "small", vocab_size=280)
    with pytest.raises(ValueError, match="the files belong to different models"):
        BagelAdapter.from_pretrained(small)
    (tmp_path / "small" / "llm_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        BagelAdapter.from_pretrained(small)
    with pytest.raises(ValueError, match="was built otherwise"):
        BagelAdapter(CONFIG, None).save_pretrained(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no autoencoder"):
        BagelAdapter(CONFIG, None).see(torch.zeros(3, 8, 8))  # type: ignore[arg-type]


def test_llm_config_written_by_transformers_5(tmp_path: Path) -> None:
    """It moves rope_theta into rope_parameters."""
    write_checkpoint(tmp_path)
    path = tmp_path / "llm_config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    path.write_text(json.dumps(config))
    assert BagelAdapter.from_pretrained(tmp_path).config.rope_theta == CONFIG.rope_theta


@pytest.mark.slow
def test_a_rank_never_holds_the_model_twice(tmp_path: Path) -> None:
    """Two ranks read 100 MB: at most one tensor (and its pages of the file) above what each keeps."""
    config = replace(CONFIG, hidden_size=256, intermediate_size=1024, num_hidden_layers=10)
    folder = write_checkpoint(tmp_path / "large", config=config)
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.materialize", str(folder), str(tmp_path)]
    subprocess.run(command, check=True, cwd=root, timeout=120)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["kept"] > 80e6
        # The allocator's slack is a few per cent; another copy of the model would be 100.
        assert found["peak"] <= found["kept"] + 2 * found["largest"] + 8e6
