"""Show-o's files: read, refused, written."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from lightning_unigrpo.adapter import SIZES_ONLY
from lightning_unigrpo.adapters.common import files
from lightning_unigrpo.adapters.common.lora import LowRank, add_lora
from lightning_unigrpo.adapters.showo.checkpoint import VQCheckpoint, levels_of, shapes_of
from lightning_unigrpo.adapters.showo.config import RELEASES, ShowOConfig
from lightning_unigrpo.adapters.showo.network import ShowONet
from lightning_unigrpo.adapters.showo.pretrained import Source, open_checkpoint, save_pretrained
from lightning_unigrpo.adapters.showo.tokenizer import ShowOTokenizer
from lightning_unigrpo.adapters.showo.vq import DECODER, ENCODER, ShowOVQ
from tests.hub import Repository, serve
from tests.published_showo import (
    BITS,
    CODES,
    CONFIG,
    END_OF_TEXT,
    MARKS,
    PHI,
    VQ_SIZES,
    WORDS,
    vq_weights,
    weights,
    write_checkpoint,
    write_language,
    write_tensors,
    write_vq,
)

PICKLED, UPSTREAM, OTHER = "pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors"


@dataclass(eq=False)
class Loaded:
    """As much of an adapter as files need to know."""

    source: Any
    net: Any
    vq: Any
    lora: LowRank | None = None

    def frozen_modules(self) -> list[nn.Module]:
        return [self.vq]


def opened(folder: Path, **settings: Any) -> Source:
    known: dict[str, Any] = {
        "language": folder / "language",
        "vq": folder / "vq",
        "dtype": "float32",
        "revision": None,
        "language_revision": None,
        "vq_revision": None,
    }
    return open_checkpoint(folder, **known | settings)


def load(folder: Path, **settings: Any) -> Any:
    source = opened(folder, **settings)
    found: Any = Loaded(source, source.net, source.vq)
    source.fill(found.net, "")
    source.fill_frozen(found)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("showo"))


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- reading


@pytest.mark.parametrize(
    ("name", "shards"), [(PICKLED, 1), (PICKLED, 3), (UPSTREAM, 1), (UPSTREAM, 3), (OTHER, 1)]
)
def test_every_tensor_is_read(tmp_path: Path, name: str, shards: int) -> None:
    """From each form of the files, the VQ model's too; its tables are no part of the model."""
    folder = write_checkpoint(tmp_path, name=name, shards=shards)
    shutil.rmtree(folder / "vq")
    write_vq(folder / "vq", name)
    adapter = load(folder)
    same(adapter.net.state_dict(), weights())
    same(adapter.vq.state_dict(), {k: v for k, v in vq_weights().items() if "quantize." not in k})
    assert not any(p.requires_grad for p in adapter.vq.parameters())
    assert all(p.requires_grad for p in adapter.net.parameters())
    assert not adapter.vq.training


def test_layers_are_read_one_by_one(folder: Path) -> None:
    """As sharding strategies ask: a unit under its name, the others left alone."""
    source = opened(folder)
    first, second = source.net.showo.model.layers
    source.fill(second, "showo.model.layers.1.")
    assert all(p.is_meta for p in first.parameters())
    for name, p in second.named_parameters():
        assert torch.equal(p, weights()[f"showo.model.layers.1.{name}"])


def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder, dtype="bfloat16")
    assert {p.dtype for p in adapter.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapter.vq.parameters()} == {torch.float32}
    save_pretrained(adapter, tmp_path)
    same(load_file(tmp_path / UPSTREAM), {n: x.bfloat16() for n, x in weights().items()})


def test_the_first_of_several_forms_is_read(tmp_path: Path) -> None:
    """Safetensors before pickles, upstream's name before the other."""
    folder = write_checkpoint(tmp_path, name=UPSTREAM)
    (folder / PICKLED).write_bytes(b"nothing")
    (folder / OTHER).write_bytes(b"nothing")
    same(load(folder).net.state_dict(), weights())


def test_the_language_model_that_the_checkpoint_names(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "one", llm_model_path=str(tmp_path / "phi"))
    shutil.move(folder / "language", tmp_path / "phi")
    assert load(folder, language=None).source.language == (
        tmp_path / "phi",
        tmp_path / "phi" / "config.json",
    )


def test_sizes(folder: Path) -> None:
    """Of config.json and of the language model; the marks are the tokenizer's."""
    source = opened(folder)
    config, names = source.config, source.tokenizer.tokenizer.convert_tokens_to_ids
    assert config.num_words == WORDS
    assert config.vocab_size == CONFIG["vocab_size"] == len(weights()["showo.lm_head.bias"])
    assert config.mask_id == CONFIG["mask_token_id"]
    assert config.code_offset == WORDS + len(MARKS)
    assert (config.bos, config.eos) == (names(END_OF_TEXT), names(END_OF_TEXT))
    assert (config.pad, config.task) == (names("[PAD]"), names("<|t2i|>"))
    assert (config.begin_image, config.end_image) == (names("<|soi|>"), names("<|eoi|>"))
    assert (config.side, source.vq.stride, source.vq.num_codes) == (4, 2, CODES)


def test_every_word_is_trained() -> None:
    """Also the one that a language model's file calls its padding: its row would get no gradient."""
    config = ShowOConfig.from_upstream(CONFIG, PHI | {"pad_token_id": 3})
    with torch.device("meta"):
        assert ShowONet(config).showo.model.embed_tokens.padding_idx is None


def test_sizes_of_a_vq_model_are_those_of_its_tensors(tmp_path: Path) -> None:
    """The tiny one's, and the release's."""
    assert VQCheckpoint(write_vq(tmp_path)).sizes == VQ_SIZES
    with torch.device("meta"):
        shapes = shapes_of(ShowOVQ())
    assert levels_of(shapes, "encoder.down", 128) == ENCODER
    assert levels_of(shapes, "decoder.up", 128) == DECODER


# ---- the releases


def test_the_releases_sizes() -> None:
    """phi-1.5 as published, a longer vocabulary, and a norm for queries and one for keys in each layer."""
    published, words, width, layers, head = 1_418_270_720, 51_200, 2048, 24, 64
    more_rows = (58_498 - words) * (2 * width + 1)  # in the embedding, in the head and its bias
    norms = layers * 2 * 2 * head
    for config in RELEASES.values():
        with torch.device("meta"):
            net = ShowONet(config)
        assert sum(p.numel() for p in net.parameters()) == published + more_rows + norms
        assert len(net.state_dict()) == 5 + layers * 18
        assert (config.vocab_size, config.code_offset, config.mask_id) == (58498, 50305, 58497)
    assert [config.side for config in RELEASES.values()] == [16, 32, 16, 32]


def test_sizes_without_files() -> None:
    token = SIZES_ONLY.set(True)
    try:
        source = opened(Path("showlab/show-o-512x512"), dtype="bfloat16")
        adapter: Any = Loaded(source, source.net, source.vq)
        source.fill(source.net, "")
        source.fill_frozen(adapter)
    finally:
        SIZES_ONLY.reset(token)
    parameters = [*source.net.parameters(), *source.vq.parameters()]
    assert all(p.is_meta for p in parameters)
    assert parameters[0].dtype == torch.bfloat16
    assert source.config.num_vq_tokens == 1024
    assert source.vq.num_codes == source.config.codebook_size


# ---- writing


@pytest.mark.parametrize(("name", "shards"), [(PICKLED, 1), (PICKLED, 2), (UPSTREAM, 2)])
def test_save_and_load_are_bit_equal(tmp_path: Path, name: str, shards: int) -> None:
    """What is written is one file under upstream's name, and needs no other model's folder."""
    source = write_checkpoint(tmp_path / "source", name=name, shards=shards)
    adapter = load(source)
    with torch.no_grad():
        for parameter in adapter.net.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    saved, expected = tmp_path / "saved", adapter.net.state_dict()
    save_pretrained(adapter, saved)
    same(load_file(saved / UPSTREAM), expected)
    again = load(saved, language=None, vq=source / "vq")
    same(again.net.state_dict(), expected)
    assert again.source.config == adapter.source.config
    assert (saved / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "llm_config.json",
        UPSTREAM,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    text = "a red  cube"
    assert again.source.tokenizer.encode(text) == adapter.source.tokenizer.encode(text)
    save_pretrained(again, saved)  # over the file that its tensors came from
    same(load(saved, language=None, vq=source / "vq").net.state_dict(), expected)


def test_a_projector_of_clip_features_is_kept(tmp_path: Path) -> None:
    """In the file, not in the network."""
    source = write_checkpoint(tmp_path / "source", projector=True)
    adapter = load(source)
    same(adapter.net.state_dict(), weights())
    save_pretrained(adapter, tmp_path / "saved")
    written = torch.load(source / PICKLED, weights_only=True)
    assert sum(name.startswith("mm_projector.") for name in written) == 4
    same(load_file(tmp_path / "saved" / UPSTREAM), written)


def test_low_rank_adapters_are_added_in(folder: Path, tmp_path: Path) -> None:
    """``W + alpha / rank B A`` under the names of the base."""
    source = opened(folder)
    lora = LowRank(rank=2, alpha=6.0, projections=("q_proj", "v_proj"))
    add_lora(source.net, lora)
    adapter: Any = Loaded(source, source.net, source.vq, lora)
    source.fill(source.net, "")
    expected = weights()
    for number, layer in enumerate(source.net.showo.model.layers):
        for name in lora.projections:
            part: Any = getattr(layer.self_attn, name)
            a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
            b.data = torch.randn_like(b)
            expected[f"showo.model.layers.{number}.self_attn.{name}.weight"] += 3 * (b @ a).detach()
    save_pretrained(adapter, tmp_path)
    found = load_file(tmp_path / UPSTREAM)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)


def test_nothing_is_saved_that_was_not_loaded(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder)
    adapter.source = None
    with pytest.raises(ValueError, match="writes what from_pretrained read"):
        save_pretrained(adapter, tmp_path)


# ---- refusing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("showo.model.layers.1.self_attn.q_layernorm.bias"),
            r"1 tensors differ:\n  .*q_layernorm\.bias: missing in the file, \(8,\) in the model",
        ),
        (
            lambda state: state.update({"showo.lm_head.bias": torch.zeros(7)}),
            r"lm_head\.bias: \(7,\) in the file, \(343,\) in the model",
        ),
        (
            lambda state: state.update({"video.weight": torch.zeros(1)}),
            r"video\.weight: \(1,\) in the file, unknown in the model\nSizes come from config\.json",
        ),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    """Before a byte of weights is read."""
    copy, state = write_checkpoint(tmp_path), weights()
    change(state)
    write_tensors(state, copy, PICKLED)
    monkeypatch.setattr(files, "read_tensors", None)
    with pytest.raises(ValueError, match=message):
        opened(copy)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"llm_vocab_size": None}, r"config\.json lacks llm_vocab_size: it is not"),
        (
            "config.json",
            {"vocab_size": 58498},
            r"vocab_size is 58498, but llm_vocab_size 300, .* 10, codebook_size 32 and one mask make 343",
        ),
        ("config.json", {"mask_token_id": 310}, r"mask_token_id is 310; only the last id, 342,"),
        ("config.json", {"num_vq_tokens": 15}, r"num_vq_tokens is 15, which is no square"),
        (
            "config.json",
            {"llm_vocab_size": 301, "vocab_size": 344, "mask_token_id": 343},
            r"has 300 words, but config\.json has llm_vocab_size 301.*give 'microsoft/phi-1_5'",
        ),
        (
            "config.json",
            {"num_new_special_tokens": 9, "vocab_size": 342, "mask_token_id": 341},
            r"num_new_special_tokens 9; only 10 is supported",
        ),
        ("config.json", {"codebook_size": 16, "vocab_size": 327, "mask_token_id": 326}, r"differ"),
        ("language/config.json", {"model_type": "qwen2"}, r"model_type 'qwen2'; Show-o's is 'phi'"),
        ("language/config.json", {"tie_word_embeddings": True}, r"tie_word_embeddings is true"),
        ("language/config.json", {"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ("language/config.json", {"embd_pdrop": 0.1}, r"embd_pdrop is 0\.1"),
        ("language/config.json", {"hidden_size": 64}, r"differ"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    copy = write_checkpoint(tmp_path)
    changed(copy / name, **changes)
    with pytest.raises(ValueError, match=message):
        opened(copy)


def test_another_vq_model_is_refused(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path)
    write_vq(copy / "vq", bits=BITS + 1)
    with pytest.raises(ValueError, match=r"adapter\.vq .* has 64 codes, .* codebook_size 32: give"):
        opened(copy)
    state = vq_weights()
    del state["decoder.mid.attn_1.q.bias"]
    write_tensors(state, copy / "vq", PICKLED)
    with pytest.raises(
        ValueError, match=r"adapter\.vq .*\n  decoder\.mid\.attn_1\.q\.bias: missing"
    ):
        opened(copy)
    write_tensors({"a": torch.zeros(1)}, copy / "vq", PICKLED)
    with pytest.raises(ValueError, match=r"holds no MAGVIT-v2; give 'showlab/magvitv2'"):
        opened(copy)
    (copy / "vq" / PICKLED).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.vq .* has no .*; it holds config\.json"):
        opened(copy)
    with pytest.raises(FileNotFoundError, match=r"adapter\.vq is 'nowhere/at/all'"):
        opened(copy, vq="nowhere/at/all")
    write_tensors(vq_weights(), copy / "vq", PICKLED, shards=2)
    next((copy / "vq").glob("pytorch_model-0*")).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"adapter\.vq .*: pytorch_model\.bin\.index\.json names"
    ):
        opened(copy)


def test_missing_files_are_named(tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"adapter\.dtype is 'int8'; known are float32"):
        opened(copy, dtype="int8")
    (copy / "language" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.language .* holds no tokenizer"):
        opened(copy)
    (copy / "language" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter\.language .* has no config\.json"):
        opened(copy)
    changed(copy / "config.json", llm_model_path=None)
    with pytest.raises(ValueError, match=r"no llm_model_path; give adapter\.language"):
        opened(copy, language=None)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a Show-o checkpoint: config\.json missing"):
        opened(copy)
    (copy / PICKLED).unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json, pytorch_model\.safetensors or "):
        opened(copy)
    copy = write_checkpoint(tmp_path / "shards", shards=2)
    next(copy.glob("pytorch_model-0*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names pytorch_model-0000\d-of-00002"):
        opened(copy)


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_are_cut_off_or_hold_code(tmp_path: Path) -> None:
    """Of the network and of the VQ model, in both formats; nothing in a pickle is run."""
    ran = tmp_path / "ran"
    for name in (PICKLED, UPSTREAM):
        copy = write_checkpoint(tmp_path / name, name=name)
        path = copy / name
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="truncated"):
            load(copy)
    copy = tmp_path / PICKLED
    for path in (copy / PICKLED, copy / "vq" / PICKLED):
        torch.save({"a": Runs(ran)}, path)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
            load(copy)
        path.write_bytes(pickle.dumps(Runs(ran)))
        with pytest.raises(ValueError, match=r"truncated or no file of tensors"):
            load(copy)
        write_tensors(weights(), copy, PICKLED)
    assert not ran.exists()


# ---- words


def test_marks_are_added_as_upstream_adds_them(folder: Path) -> None:
    """Behind all words, in this order; a file that has them already is left as it is."""
    tokenizer = opened(folder).tokenizer
    assert tokenizer.tokenizer.convert_tokens_to_ids(MARKS) == [*range(WORDS, WORDS + len(MARKS))]
    again = ShowOTokenizer(tokenizer.tokenizer)
    assert (again.num_words, again.marks) == (WORDS, tokenizer.marks)
    assert len(again.tokenizer) == WORDS + len(MARKS)


def test_words(folder: Path) -> None:
    """Ids are the file's; what is said comes back to the letter, marks left out."""
    raw = Tokenizer.from_file(str(folder / "language" / "tokenizer.json"))
    tokenizer = opened(folder).tokenizer
    text = " three  green apples , isn't it ?\n"
    ids = raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == ids
    assert raw.token_to_id("  ") in ids
    marks = [tokenizer.marks[key] for key in ("task", "bos", "begin_image", "pad")]
    assert tokenizer.decode([*marks, *ids, *marks]) == text
    assert tokenizer.encode("a<|soi|>b")[1] == WORDS + 1


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    path = write_language(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace(END_OF_TEXT, "<|other|>"))
    changed(
        tmp_path / "tokenizer_config.json", bos_token=None, eos_token=None, unk_token="<|other|>"
    )
    with pytest.raises(ValueError, match=r"lacks <\|endoftext\|>: give adapter\.language"):
        ShowOTokenizer.from_folder(tmp_path)


def test_a_configuration_without_marks_has_the_releases() -> None:
    """bos and eos of phi-1.5, and upstream's order of marks behind 50,295 words."""
    config = RELEASES["showlab/show-o"]
    found = ShowOConfig.from_upstream(
        CONFIG
        | {"llm_vocab_size": 50295, "codebook_size": 8192, "vocab_size": 58498}
        | {"mask_token_id": 58497, "num_vq_tokens": 256},
        PHI,
    )
    for name, key in (("[PAD]", "pad"), ("<|soi|>", "begin_image"), ("<|eoi|>", "end_image")):
        assert getattr(found, key) == getattr(config, key) == 50295 + MARKS.index(name)
    assert found.task == 50295 + MARKS.index("<|t2i|>")


# ---- hubs


def test_from_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three repositories, of which only what is read is fetched."""
    source = write_checkpoint(tmp_path / "source", shards=2, llm_model_path="microsoft/tiny")
    for name in ("language", "vq"):
        shutil.move(source / name, tmp_path / name)
    for foreign in ("source/a.bin", "language/model.safetensors", "vq/training.ckpt"):
        (tmp_path / foreign).write_bytes(bytes(1000))
    names = {"showlab/tiny": "source", "microsoft/tiny": "language", "showlab/codes": "vq"}
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
        adapter = load(Path("showlab/tiny"), language=None, vq="showlab/codes")
    kept = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_symlink()}
    assert kept == {
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    same(adapter.net.state_dict(), weights())
    assert adapter.vq.encoder.conv_in.weight.equal(vq_weights()["encoder.conv_in.weight"])
