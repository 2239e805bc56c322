"""CLIP's rewards against CLIPModel's own forward, cosines by hand and open_clip's network."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, CLIPTokenizer

from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.reward import RewardRunner
from lightning_unigrpo.rewards import AestheticScore, CLIPScore, HPSv2, PickScore
from lightning_unigrpo.rewards.hps import from_open_clip, to_open_clip
from lightning_unigrpo.types import Prompt, Trajectory
from tests.clips import (
    SHARED,
    OpenCLIP,
    config,
    inputs,
    reference,
    write_clip,
    write_processor,
)
from tests.hub import Repository, serve
from tests.toys import ToyFlow

PROMPTS = ["two red cubes", "a dog", "a", "the sign 42 on a long wall"]
# Rows of one batch and rows alone go through different kernels of the same float32 sums.
CLOSE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    """Give four images ``[4, 3, 40, 48]`` that differ in more than noise."""
    coarse = torch.rand(4, 3, 5, 6, generator=generator)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def cosines(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """Return ``[n]`` by :meth:`CLIPModel.forward` on one pair at a time."""
    model, given = reference(folder), inputs(folder, images, prompts)
    found = []
    with torch.no_grad():
        for pixels, tokens in zip(given["pixels"], given["tokens"], strict=True):
            out = model(input_ids=tokens, pixel_values=pixels[None])
            found.append(cosine_similarity(out.image_embeds, out.text_embeds))
    return torch.cat(found)


# ---- scores


@pytest.mark.parametrize(("scale", "factor"), [(None, 50 / 30), (1.0, 1.0), (100.0, 100.0)])
def test_clip_score_is_the_cosine_in_every_scale(
    folder: Path, images: Tensor, scale: float | None, factor: float
) -> None:
    expected = cosines(folder, images, PROMPTS)
    assert expected.std() > 0.05  # or else nothing is compared
    found = CLIPScore(str(folder), scale=scale)(images, PROMPTS)
    torch.testing.assert_close(found / factor, expected, **CLOSE)
    assert found.dtype == torch.float32


def test_pick_score_reads_its_words_from_elsewhere(
    folder: Path, images: Tensor, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    found = PickScore(str(tmp_path), processor=str(folder))(images, PROMPTS)
    expected = cosines(folder, images, PROMPTS) * 50 / 26
    torch.testing.assert_close(found, expected, **CLOSE)


def test_scores_do_not_depend_on_their_company(folder: Path, images: Tensor) -> None:
    together = CLIPScore(str(folder), scale=1.0)(images, PROMPTS)
    reward = CLIPScore(str(folder), scale=1.0, batch_size=3)
    alone = [reward(images[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(torch.cat(alone), together, **CLOSE)
    order = [2, 0, 3, 1, 0]  # equal texts are read once; more than one batch
    mixed = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(mixed, together[order], **CLOSE)


def test_texts_are_cut_at_77_tokens_with_their_end(folder: Path, images: Tensor) -> None:
    reward = CLIPScore(str(folder), scale=1.0)
    long = "ab" * 50  # a letter is a token; both ends are two
    words = CLIPTokenizer.from_pretrained(folder)
    cut = [words.bos_token_id, *words(long, add_special_tokens=False).input_ids[:75]]
    tokens = torch.tensor([[*cut, words.eos_token_id]])
    assert tokens.shape == (1, 77)
    text = reference(folder).get_text_features(tokens).pooler_output
    expected = cosine_similarity(reward.embed_images(images[:1]), text)
    torch.testing.assert_close(reward(images[:1], [long]), expected.detach(), **CLOSE)
    short = reward(images[:1], ["ab" * 30])
    assert (short - expected).abs() > 1e-3


def test_images_may_differ_in_size_or_be_missing(folder: Path, images: Tensor) -> None:
    reward = CLIPScore(str(folder), scale=1.0)
    small = images[1, :, :32, :32]
    found = reward([images[0], None, small], PROMPTS[:3])
    assert found.isnan().tolist() == [False, True, False]
    expected = [reward(images[:1], PROMPTS[:1]), reward(small[None], PROMPTS[2:3])]
    torch.testing.assert_close(found[[0, 2]], torch.cat(expected), **CLOSE)
    assert reward([None, None], PROMPTS[:2]).isnan().all()


def test_half_precision_around_it_changes_nothing(folder: Path, images: Tensor) -> None:
    def run() -> Tensor:
        rows = [
            Trajectory(prompt=Prompt(text=p), segments=[], group=0, member=0, image=image)
            for p, image in zip(PROMPTS, images, strict=True)
        ]
        rewards = [CLIPScore(str(folder), scale=1.0), AestheticScore(head, source=str(folder))]
        with RewardRunner(rewards) as runner:
            runner.submit(rows)
            return runner.finish()[0]

    head = str(folder / "head.pth")
    write_head(Path(head))
    expected = run()
    torch.set_default_dtype(torch.bfloat16)  # as precision: bf16-true does inside a step
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(run(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_learns_nothing_and_is_no_part_of_the_module(folder: Path, images: Tensor) -> None:
    reward = CLIPScore(str(folder))
    before = set(UniGRPOModule(ToyFlow()).state_dict())
    module = UniGRPOModule(ToyFlow(), rewards=[reward])
    scores = reward(images.requires_grad_(), PROMPTS)
    assert not scores.requires_grad
    assert not any(p.requires_grad for p in reward._model.parameters())
    assert not reward._model.training
    names = {name for name in module.state_dict() if not name.startswith("evaluation")}
    assert names == {name for name in before if not name.startswith("evaluation")}
    assert {id(p) for p in reward._model.parameters()}.isdisjoint(map(id, module.parameters()))


def test_another_process_reads_the_weights_itself(folder: Path, images: Tensor) -> None:
    reward = CLIPScore(str(folder))
    size, scores = len(pickle.dumps(reward)), reward(images, PROMPTS)
    sent = pickle.dumps(reward)
    assert len(sent) < size + 10_000  # the tokenizer goes along
    torch.testing.assert_close(pickle.loads(sent)(images, PROMPTS), scores, rtol=0, atol=0)


def test_release_moves_the_weights_off_and_prepare_back(folder: Path) -> None:
    moves: list[Any] = []
    for offload in (True, False):
        reward = CLIPScore(str(folder), offload=offload)
        reward.release()  # nothing there yet
        reward.prepare("cpu")
        reward._model.to = moves.append
        reward.release()
        reward.prepare("cuda:1")
    assert moves == ["cpu", "cuda:1", "cuda:1"]


@pytest.mark.gpu
def test_on_a_gpu_the_scores_are_the_same_and_the_memory_is_given_back(
    folder: Path, images: Tensor
) -> None:
    reward = CLIPScore(str(folder), scale=1.0)
    expected, before = reward(images, PROMPTS), torch.cuda.memory_allocated()
    reward.prepare(torch.device("cuda"))
    found = reward(images.cuda(), PROMPTS)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)  # TF32 may be on
    del found
    reward.release()
    assert torch.cuda.memory_allocated() <= before + 512 * 1024


# ---- where the model comes from


def test_a_hub_id_gives_what_the_folder_gives(
    folder: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(url: str, *, offline: bool) -> None:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": offline,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    expected = CLIPScore(str(folder))(images, PROMPTS)
    with serve({"someone/clip": Repository(folder=folder)}) as hub:
        connect(hub.url, offline=False)
        first = CLIPScore("someone/clip")(images, PROMPTS)
        assert "model.safetensors" in hub.transfers
        with pytest.raises(FileNotFoundError, match=r"CLIPScore\.source is 'someone/other'"):
            CLIPScore("someone/other").prepare("cpu")
        asked = len(hub.transfers)
        connect(hub.url, offline=True)
        second = CLIPScore("someone/clip")(images, PROMPTS)  # from the cache
        assert len(hub.transfers) == asked
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_building_needs_no_file_and_prepare_says_what_is_missing() -> None:
    for reward, key in [
        (CLIPScore(), "CLIPScore.source is 'openai/clip-vit-large-patch14'"),
        (PickScore(), "PickScore.source is 'yuvalkirstain/PickScore_v1'"),
        (HPSv2(), "HPSv2.source is 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'"),
        (CLIPScore("./no/such/folder"), "CLIPScore.source is './no/such/folder'"),
    ]:
        with pytest.raises(FileNotFoundError, match=key) as caught:
            reward.prepare("cpu")
        assert "model.rewards" in str(caught.value)
        assert "hf download" in str(caught.value)


def spoil_type(folder: Path) -> None:
    BertConfig().save_pretrained(folder)


def spoil_weights(folder: Path) -> None:
    found = json.loads((folder / "config.json").read_text())
    found["vision_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(found))


def spoil_words(folder: Path) -> None:
    CLIPTokenizer().save_pretrained(folder)


def spoil_more_words(folder: Path) -> None:
    words = CLIPTokenizer.from_pretrained(folder)
    words.add_tokens(["zebra"])
    words.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_type, r"CLIPScore\.source is .* type 'bert'; give a CLIP"),
        (
            spoil_weights,
            r"CLIPScore\.source is .* lacks weights .*vision_model\.encoder\.layers\.2",
        ),
        (
            spoil_words,
            r"CLIPScore\.source has 2 words.*looks for 73.*processor that belongs to the model",
        ),
        (spoil_more_words, r"CLIPScore\.source has 75 words.*reads 74"),
    ],
)
def test_what_is_no_whole_clip_is_refused(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        CLIPScore(str(copy)).prepare("cpu")


def test_batches_hold_something() -> None:
    with pytest.raises(ValueError, match=r"CLIPScore\.batch_size is 0; give 1 or more"):
        CLIPScore(batch_size=0)


def test_old_settings_that_name_the_end_mark_2_are_read(
    folder: Path, images: Tensor, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    found = json.loads((copy / "config.json").read_text())
    found["text_config"]["eos_token_id"] = 2  # as in OpenAI's files
    (copy / "config.json").write_text(json.dumps(found))
    expected = CLIPScore(str(folder))(images, PROMPTS)
    torch.testing.assert_close(CLIPScore(str(copy))(images, PROMPTS), expected, **CLOSE)


# ---- HPSv2: names of open_clip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenCLIP, Path]:
    """Give open_clip's network and a folder with its weights, the settings and the words."""
    model, folder = OpenCLIP().eval(), tmp_path_factory.mktemp("hps")
    mask = {"attn_mask": torch.zeros(77, 77)}  # a constant that the published file may hold
    state = {"state_dict": model.state_dict() | mask, "epoch": 1}
    torch.save(state, folder / "HPS_v2.1_compressed.pt")
    config().save_pretrained(folder)
    return model, write_processor(folder)


def test_hps_equals_the_network_of_open_clip(
    published: tuple[OpenCLIP, Path], images: Tensor
) -> None:
    model, folder = published
    given = inputs(folder, images, PROMPTS)
    with torch.no_grad():
        shown = model.visual(given["pixels"])
        said = torch.cat([model.encode_text(tokens) for tokens in given["tokens"]])
    expected = cosine_similarity(shown, said)
    assert expected.std() > 0.05
    for checkpoint in (folder, folder / "HPS_v2.1_compressed.pt"):
        found = HPSv2(str(checkpoint), source=str(folder))(images, PROMPTS)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_names_go_to_transformers_and_back(published: tuple[OpenCLIP, Path], folder: Path) -> None:
    theirs, ours = published[0].state_dict(), reference(folder).state_dict()
    for state, there, back in (
        (theirs, from_open_clip, to_open_clip),
        (ours, to_open_clip, from_open_clip),
    ):
        again = back(there(state))
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], value) for name, value in state.items())
    assert from_open_clip(theirs).keys() == ours.keys()


def test_hps_refuses_what_it_cannot_read(published: tuple[OpenCLIP, Path], tmp_path: Path) -> None:
    model, folder = published
    source = str(folder)
    state = model.state_dict()
    torch.save(state | {"visual.head.weight": torch.zeros(1)}, tmp_path / "more.pt")
    torch.save({k: v for k, v in state.items() if "ln_final" not in k}, tmp_path / "less.pt")
    torch.save(state | {"ln_final.bias": torch.zeros(5)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, message in {
        "more": r"visual\.head\.weight.*no part of a CLIP",
        "less": "lacks weights of a CLIP: text_model.final_layer_norm",
        "other": "other sizes than the config.json",
        "text": "no file of open_clip weights",
    }.items():
        with pytest.raises(ValueError, match=rf"HPSv2\.checkpoint.*{message}"):
            HPSv2(str(tmp_path / f"{name}.pt"), source=source).prepare("cpu")
    with pytest.raises(FileNotFoundError, match=r"HPSv2\.checkpoint is 'xswu/HPSv2'"):
        HPSv2(source=source).prepare("cpu")


# ---- LAION's head


class Head(torch.nn.Module):
    """The published head at its published depth; dropout does nothing in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (SHARED, 10, 9, 8, 7, 1)
        layers: list[torch.nn.Module] = []
        for number, (inner, outer) in enumerate(pairwise(sizes)):
            layers.append(torch.nn.Linear(inner, outer))
            if number < 3:
                layers.append(torch.nn.Dropout(0.2))
        self.layers = torch.nn.Sequential(*layers)


def write_head(path: Path) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head().eval()
    torch.save(head.state_dict(), path)
    return head


def test_aesthetic_score_is_the_head_layer_by_layer(
    folder: Path, images: Tensor, tmp_path: Path
) -> None:
    head = write_head(tmp_path / "head.pth")
    model, given = reference(folder), inputs(folder, images, PROMPTS)
    with torch.no_grad():
        vectors = model.get_image_features(given["pixels"]).pooler_output
        expected = head.layers(vectors / vectors.norm(dim=-1, keepdim=True))[:, 0]
    assert expected.std() > 1e-3
    reward = AestheticScore(str(tmp_path / "head.pth"), source=str(folder))
    torch.testing.assert_close(reward(images), expected, rtol=0, atol=1e-6)
    tenth = AestheticScore(str(tmp_path / "head.pth"), source=str(folder), divisor=10.0)
    torch.testing.assert_close(tenth([None, images[1]])[1], expected[1] / 10, rtol=0, atol=1e-6)


def test_aesthetic_score_refuses_heads_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    source = str(folder)
    with pytest.raises(FileNotFoundError, match=r"AestheticScore\.head is 'no\.pth'.*sac\+logos"):
        AestheticScore("no.pth", source=source).prepare("cpu")
    wide, many = torch.nn.Linear(SHARED + 1, 1), torch.nn.Linear(SHARED, 2)
    for layer, message in ((wide, "vectors of 13 numbers"), (many, "2 numbers come out")):
        torch.save(torch.nn.Sequential(layer).state_dict(), tmp_path / "head.pth")
        with pytest.raises(ValueError, match=rf"AestheticScore\.head.*{message}"):
            AestheticScore(str(tmp_path / "head.pth"), source=source).prepare("cpu")
    torch.save({"a": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="no layers"):
        AestheticScore(str(tmp_path / "head.pth"), source=source).prepare("cpu")
