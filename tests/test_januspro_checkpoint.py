"""Janus-Pro's published layouts: loading, saving, the real sizes, and what is said when files are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.adapters.common.pictures import PictureProcessor
from lightning_unigrpo.adapters.januspro import JanusProAdapter, load_januspro
from lightning_unigrpo.adapters.januspro.config import NAMES, RELEASES, released
from lightning_unigrpo.adapters.januspro.pretrained import on_meta
from lightning_unigrpo.adapters.januspro.tokenizer import JanusProTokenizer
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import (
    ImageSegment,
    Prompt,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)
from tests.januspro import model, tokenizer, write_checkpoint, write_original, write_words

GRID, CODES = (4, 4), torch.arange(16) * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("januspro"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("original"))


def load(folder: Path, **settings: Any) -> JanusProAdapter:
    adapter = JanusProAdapter.from_pretrained(folder, **settings)
    adapter.materialize()
    return adapter.eval()


def picture() -> Tensor:
    return torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(adapter: JanusProAdapter) -> list[Tensor]:
    """Return log-probabilities of a text and of codes behind a request with a picture, and pixels."""
    prompt = Prompt(text="a red cube", images=(picture(),) if adapter.vision is not None else ())
    text = TextSegment(tokens=torch.tensor([5, 9, adapter.stop_token]), log_prob=torch.zeros(3))
    image = TokenImageSegment(tokens=CODES, grid=GRID, log_prob=torch.zeros(16))
    segments = [*adapter.tokenize(prompt), text, image]
    scores = adapter([Trajectory(prompt=prompt, segments=segments, group=0, member=0)])
    return [*scores.text, *scores.image_tokens, adapter.decode(CODES.unsqueeze(0), GRID)]


@torch.no_grad()
def outputs_of_transformers(
    theirs: JanusForConditionalGeneration, adapter: JanusProAdapter
) -> list[Tensor]:
    """Return the same, by ``transformers`` alone; the adapter tells what it read."""
    marks = adapter.marks
    first, image, rest = adapter.tokenize(Prompt(text="a red cube", images=(picture(),)))
    assert isinstance(first, TextSegment)
    assert isinstance(rest, TextSegment)
    assert isinstance(image, ImageSegment)
    pixels = adapter.pictures(picture()).unsqueeze(0)
    thought, end = [5, 9], torch.tensor
    before = [*first.tokens.tolist(), marks.begin_image]
    after = [marks.end_image, *rest.tokens.tolist(), *thought]
    ids = end([[*before, *[theirs.config.image_token_id] * 16, *after]])
    words = theirs(input_ids=ids, pixel_values=pixels).logits[0, -3:].log_softmax(1)
    features = theirs.model.get_image_features(pixels).pooler_output
    embed = theirs.get_input_embeddings()
    rows = torch.cat(
        [
            embed(end([before])),
            features,
            embed(end([[*after, marks.begin_image]])),
            theirs.prepare_embeddings_for_image_generation(CODES[:-1].unsqueeze(0)),
        ],
        1,
    )
    hidden = theirs.model.language_model(inputs_embeds=rows).last_hidden_state[0, -16:]
    codes = theirs.model.generation_head(hidden).log_softmax(1)
    decoded = theirs.decode_image_tokens(CODES.unsqueeze(0)).permute(0, 3, 1, 2)
    return [
        words.gather(1, end([[5], [9], [marks.eos]])).squeeze(1),
        codes.gather(1, CODES.unsqueeze(1)).squeeze(1),
        ((decoded + 1) / 2).clamp(0, 1),
    ]


def same(found: list[Tensor], expected: list[Tensor], atol: float = 2e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_both_layouts_are_the_model_of_transformers(folder: Path, original: Path) -> None:
    for source in (folder, original):
        adapter = load(source)
        same(outputs(adapter), outputs_of_transformers(model(), adapter))


def test_nothing_heavy_is_read_before_materialize(folder: Path) -> None:
    adapter = JanusProAdapter.from_pretrained(folder)
    parts = [adapter.net, *adapter.frozen_modules()]
    assert all(p.is_meta for part in parts for p in part.parameters())
    adapter.materialize()
    state, expected = {}, model().state_dict()
    for part in parts:
        state |= part.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(p.requires_grad for p in adapter.net.parameters())
    assert not any(p.requires_grad for part in parts[1:] for p in part.parameters())
    assert not any(b.is_meta for part in parts for b in part.buffers())
    with torch.no_grad():
        adapter.net.lm_head.weight.add_(1)
    trained = adapter.net.lm_head.weight.clone()
    adapter.materialize()
    assert torch.equal(adapter.net.lm_head.weight, trained)


def test_units_are_filled_alone(original: Path) -> None:
    adapter = JanusProAdapter.from_pretrained(original, dtype="bfloat16")
    names = {id(module): name for name, module in adapter.net.named_modules()}
    unit = adapter.shard_units()[1]
    adapter.fill(unit, f"{names[id(unit)]}.")
    filled = {name for name, p in adapter.net.named_parameters() if not p.is_meta}
    assert {name.split(".")[3] for name in filled} == {"1"}
    assert len(filled) == 9
    assert all(p.dtype == torch.bfloat16 for p in adapter.net.parameters())
    assert {p.dtype for m in adapter.frozen_modules() for p in m.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", ["one file", "shards", "original", "original shards"])
def test_save_and_load_are_bit_equal(tmp_path: Path, layout: str) -> None:
    write: Any = write_original if "original" in layout else write_checkpoint
    shards: Any = 3 if "original" in layout else True
    source = write(tmp_path / "source", **({"shards": shards} if "shards" in layout else {}))
    adapter = load(source)
    with torch.no_grad():
        for parameter in adapter.net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    adapter.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(outputs(adapter), outputs(again), strict=True))
    theirs, info = JanusForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(outputs(adapter), outputs_of_transformers(theirs.eval(), adapter))
    assert theirs.generation_config.bos_token_id == adapter.marks.bos
    found = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert found["size"] == {"height": 16, "width": 16}


def test_a_tied_configuration_is_not_believed(tmp_path: Path) -> None:
    """Published configurations keep the default; saved ones say what is in the file."""
    adapter = load(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    same(outputs(adapter), outputs_of_transformers(model(), adapter))
    adapter.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert not torch.equal(theirs.lm_head.weight, theirs.get_input_embeddings().weight)
    same(outputs_of_transformers(theirs, adapter), outputs(adapter), 2e-5)


@pytest.mark.parametrize("layout", ["folder", "original"])
def test_without_the_tower(request: pytest.FixtureRequest, tmp_path: Path, layout: str) -> None:
    source = request.getfixturevalue(layout)
    adapter = load(source, vision=False)
    assert adapter.vision is None
    assert len(adapter.frozen_modules()) == 1
    adapter.save_pretrained(tmp_path)
    saved, expected = load_file(tmp_path / "model.safetensors"), model().state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())


def test_lora_is_added_in(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder, lora=LowRank(rank=2), dtype="bfloat16")
    factors = {n: p for n, p in adapter.net.named_parameters() if p.requires_grad}
    assert len(factors) == 2 * 7 * 2  # two layers, seven projections, A and B
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in factors.items())
    assert adapter.param_groups()["flow"] == []
    adapter = load(folder, lora=LowRank(rank=2))
    before = outputs(adapter)
    with torch.no_grad():
        for parameters in adapter.param_groups().values():
            for parameter in parameters:
                parameter.add_(0.1)
    after = outputs(adapter)
    assert float((after[0] - before[0]).abs().max()) > 1e-3
    reference = adapter.reference()
    assert reference is not None
    with reference:
        assert torch.equal(outputs(adapter)[0], before[0])
    adapter.save_pretrained(tmp_path)
    same(outputs(load(tmp_path)), after, 1e-4)


def test_the_contract_of_a_loaded_model(folder: Path) -> None:
    prompts = [Prompt(text="a red cube", id=0), Prompt(text="three green apples", id=1)]
    check_adapter(load(folder), prompts)
    assert isinstance(load_januspro(str(folder)), JanusProAdapter)


# ---- sizes of the releases


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    # Sizes of the published files in bfloat16, which also hold 13 tensors that are never run.
    [("deepseek-community/Janus-Pro-1B", 4.18), ("deepseek-ai/Janus-Pro-7B", 14.84)],
)
def test_sizes_of_the_releases(name: str, gigabytes: float) -> None:
    config: Any = released(*RELEASES[name])
    parts = on_meta(config, torch.bfloat16, vision=True)
    count = {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()}
    d, ff, layers, _ = RELEASES[name]
    llama = 2 * 102400 * d + layers * (4 * d * d + 3 * d * ff + 2 * d) + d
    draws = 16384 * 8 + (8 * d + d) + (d * d + d) + (d * d + d) + (d * 16384 + 16384)
    assert count["net"] == llama + draws
    pooling = 12 * 1024**2 + 12 * 1024  # its matrices, biases, norm and query
    total = sum(count.values()) + pooling
    assert 2 * total / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert config.vq_config.num_patches == 24
    assert config.vision_config.num_image_tokens == 576


# ---- words and pixels


def test_words(folder: Path) -> None:
    words, plain = JanusProTokenizer.from_folder(folder), tokenizer()
    text = f"<|User|>: a red cube\n\n<|Assistant|>: ok{NAMES['eos']}"
    ids = words.encode(text)
    assert ids[-1] == words.marks.eos
    assert words.decode(ids) == text.removesuffix(NAMES["eos"])
    assert ids[:-1] == plain.encode(text.removesuffix(NAMES["eos"])).ids
    assert words.marks.bos not in ids


@pytest.mark.parametrize("size", [(12, 20), (20, 12), (16, 16), (40, 33), (3, 40)])
def test_pictures_are_brought_to_the_tower_as_by_transformers(size: tuple[int, int]) -> None:
    """They round to whole levels of 255 between the steps, and their filter's edges differ a little."""
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1)
    levels = (pixels * 255).round().byte()
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.3, 0.2)
    theirs = JanusImageProcessorPil(
        size={"height": 16, "width": 16}, min_size=4, image_mean=mean, image_std=std
    )
    image = Image.fromarray(levels.permute(1, 2, 0).numpy().astype(np.uint8))
    expected = theirs(image, return_tensors="pt").pixel_values[0]
    mine = PictureProcessor(size=16, min_size=4, mean=mean, std=std)
    found = mine(levels.float() / 255)
    assert found.shape == expected.shape == (3, 16, 16)
    step = torch.tensor(std).view(3, 1, 1)
    assert float(((found - expected) * step).abs().max()) < 3 / 255


def test_sharp_edges_do_not_overshoot() -> None:
    """A bicubic filter would leave [0, 1]; levels of 255 cannot."""
    pixels = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    plain = PictureProcessor(size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = plain(pixels.expand(3, 8, 8))
    assert (float(found.min()), float(found.max())) == (0.0, 1.0)


# ---- what is refused


def changed(folder: Path, target: Path, name: str, **fields: Any) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    found = json.loads((target / name).read_text())
    for key, value in fields.items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    (target / name).write_text(json.dumps(found))
    return target


def test_another_model_is_refused_before_weights_are_read(folder: Path, tmp_path: Path) -> None:
    source = changed(folder, tmp_path / "a", "config.json", text_config={"intermediate_size": 64})
    with pytest.raises(ValueError, match=r"holds another model; 6 tensors differ") as error:
        JanusProAdapter.from_pretrained(source)
    assert "mlp.up_proj.weight: (48, 32) in the file, (64, 32) in the model" in str(error.value)
    source = changed(folder, tmp_path / "b", "config.json", model_type="llava")
    with pytest.raises(ValueError, match=r"model_type 'llava'; Janus-Pro's is 'janus'"):
        JanusProAdapter.from_pretrained(source)
    source = changed(folder, tmp_path / "c", "config.json")
    state = load_file(source / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing in the file"):
        JanusProAdapter.from_pretrained(source)
    source = changed(folder, tmp_path / "d", "preprocessor_config.json", size={"height": 32})
    with pytest.raises(ValueError, match=r"makes pictures of 32 pixels, but the vision tower"):
        JanusProAdapter.from_pretrained(source)


def test_missing_and_torn_files_are_named(folder: Path, original: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json, model\.safetensors .* missing"):
        JanusProAdapter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter\.dtype is 'int8'"):
        JanusProAdapter.from_pretrained(folder, dtype="int8")
    for name, source in (("model.safetensors", folder), ("pytorch_model.bin", original)):
        torn = changed(source, tmp_path / name, "config.json")
        (torn / name).write_bytes((source / name).read_bytes()[:-500])
        with pytest.raises(ValueError, match=r"cannot be read .* download it again"):
            JanusProAdapter.from_pretrained(torn)
    wordless = changed(folder, tmp_path / "wordless", "config.json")
    (wordless / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        JanusProAdapter.from_pretrained(wordless)
    write_words(wordless)
    words = json.loads((wordless / "tokenizer.json").read_text())
    words["added_tokens"] = [t for t in words["added_tokens"] if "pad" not in t["content"]]
    (wordless / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token <｜▁pad▁｜>"):
        JanusProAdapter.from_pretrained(wordless)


def test_what_was_not_loaded_cannot_be_saved(tmp_path: Path) -> None:
    from tests.test_januspro import golden_adapter

    with pytest.raises(ValueError, match="writes what from_pretrained read"):
        golden_adapter().save_pretrained(tmp_path)
