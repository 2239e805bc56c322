"""Bagel against numbers that upstream's code produced.

Sizes, tolerances and cases come from the files, so another set of the same layout runs unchanged. At the
end: drawing and stopping, which no set exercises; for guidance and bfloat16 see the files of that name.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_unigrpo import rollout as drawing
from lightning_unigrpo.adapter import token_log_probs
from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig
from lightning_unigrpo.adapters.bagel import adapter as contract
from lightning_unigrpo.adapters.bagel.checkpoint import Checkpoint
from lightning_unigrpo.adapters.bagel.guidance import Guidance
from lightning_unigrpo.adapters.bagel.network import Pack, sincos_table
from lightning_unigrpo.adapters.bagel.packing import position_ids
from lightning_unigrpo.adapters.bagel.pretrained import Source, on_meta
from lightning_unigrpo.adapters.bagel.vae import BagelVAE, build_vae
from lightning_unigrpo.adapters.bagel.vision import patchify, unpatchify
from lightning_unigrpo.adapters.common.attention import Kind, Layout, PackedAttention
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import log_prob, ode_step, sigma_schedule, transition
from lightning_unigrpo.rollout import Draws, Start, rollout, sample_image, sample_text
from lightning_unigrpo.types import Grid, ImageSegment, Prompt, TextSegment, Trajectory
from tests.conftest import golden_folder
from tests.published import write_checkpoint

FOLDER = golden_folder("bagel")
INFO = json.loads((FOLDER / "cases.json").read_text())
CONFIG = json.loads((FOLDER / "config.json").read_text())


class Cases(dict[str, Tensor]):
    """The golden tensors, and the names of those that were asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


CASES = Cases(load_file(FOLDER / "cases.safetensors"))
ATOL, GRADIENT_ATOL = (
    float(number) for number in re.findall(r"\de-\d", INFO["conventions"]["tolerance"])[:2]
)


class Ids:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def golden_folder_as_published(folder: Path) -> Path:
    """Lay the golden model out like a published checkpoint."""
    for name in ("llm_config", "vit_config"):
        (folder / f"{name}.json").write_text(json.dumps(CONFIG[name]))
    shutil.copyfile(FOLDER / "state_dict.safetensors", folder / "ema.safetensors")
    shutil.copyfile(FOLDER / "ae.safetensors", folder / "ae.safetensors")
    return folder


def golden_adapter(**settings: Any) -> BagelAdapter:
    """Load the golden model as a published one is loaded, but for its tokenizer."""
    with TemporaryDirectory() as folder:
        checkpoint = Checkpoint(golden_folder_as_published(Path(folder)))
        config = checkpoint.config(INFO["special_tokens"], vision=True)
        assert config == BagelConfig.from_upstream(
            llm_config=CONFIG["llm_config"],
            vit_config=CONFIG["vit_config"],
            bagel_config=CONFIG["bagel_config"],
            vae_config=CONFIG["vae_config"],
            special_tokens=INFO["special_tokens"],
        )
        assert config.vision is not None
        net, vision = on_meta(config, torch.float32)
        assert vision is not None
        with torch.device("meta"):
            vae = build_vae(
                {name: file.shape for name, file in checkpoint.autoencoder.items()},
                scaling_factor=CONFIG["vae_config"]["scale_factor"],
                shift_factor=CONFIG["vae_config"]["shift_factor"],
            )
        checkpoint.check({"net": net, "vision": vision})
        adapter = BagelAdapter(
            config,
            Ids(),
            net=net,
            vision=vision,
            vae=BagelVAE(vae, config.latent_patch_size),
            **settings,
        )
        adapter.source = Source(
            checkpoint=checkpoint,
            config=config,
            tokenizer=None,
            net=net,
            vision=vision,
            vae=adapter.vae,
        )
        adapter.materialize()
    return adapter.eval()


@pytest.fixture(scope="module")
def adapter() -> BagelAdapter:
    return golden_adapter()


def close(got: Tensor, name: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, CASES[name], atol=atol, rtol=0)


RAN: set[str] = set()


@pytest.fixture(autouse=True)
def remember(request: pytest.FixtureRequest) -> None:
    """Note which tests ran: :func:`test_every_tensor_is_compared` can only tell after all others."""
    RAN.add(request.node.name)


def text(name: str) -> TextSegment:
    return TextSegment(tokens=CASES[f"in/{name}"])


def grid_of(name: str) -> Grid:
    height, width = INFO["sizes"][name]
    patch = CONFIG["vae_config"]["downsample"] * CONFIG["bagel_config"]["latent_patch_size"]
    return height // patch, width // patch


def test_sincos_table_and_latent_ids(adapter: BagelAdapter) -> None:
    config = adapter.config
    close(sincos_table(config.max_latent_size, config.hidden_size), "basic/latent_pos_sincos", 1e-6)
    ids = position_ids(grid_of("sample0"), config.max_latent_size)
    assert torch.equal(ids, CASES["basic/latent_position_ids_img0"])


def test_time_embedding(adapter: BagelAdapter) -> None:
    close(adapter.net.time_embedder(CASES["basic/timesteps"]), "basic/time_embed")


@pytest.mark.parametrize("name", ["A", "B"])
def test_text_logits_of_the_packed_pass(adapter: BagelAdapter, name: str) -> None:
    """Group a: the log-probabilities of a whole text, teacher-forced."""
    logits = CASES[f"a_text_logits/{name}"]
    ids = CASES[f"in/prompt_{name}"]
    tokens = torch.cat([ids, torch.tensor([adapter.config.eos])])
    sampled = TextSegment(tokens=tokens, log_prob=torch.zeros(len(tokens)))
    trajectory = Trajectory(prompt=Prompt(text=""), segments=[sampled], group=0, member=0)
    expected = logits.log_softmax(-1)[:-1].gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(adapter([trajectory]).text[0], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["A", "B"])
def test_text_logits_of_the_cached_path(adapter: BagelAdapter, name: str) -> None:
    """Group a again, token by token through the cache."""
    cache = adapter.prefill([[]])
    active = torch.ones(1, dtype=torch.bool)
    tokens = [None, *CASES[f"in/prompt_{name}"].tolist(), adapter.config.eos]
    for step, token in enumerate(tokens):
        fed = None if token is None else torch.tensor([token])
        got = adapter.next_logits(cache, fed, active)[0]
        torch.testing.assert_close(got, CASES[f"a_text_logits/{name}"][step], atol=ATOL, rtol=0)


def greedy(
    adapter: BagelAdapter, contexts: list[list[TextSegment]], steps: int
) -> tuple[Tensor, Tensor]:
    cache = adapter.prefill(contexts)
    active = torch.ones(len(contexts), dtype=torch.bool)
    fed = torch.full((len(contexts),), adapter.config.bos)
    tokens, logits = [], []
    for step in range(steps):
        tokens.append(fed)
        logits.append(adapter.next_logits(cache, None if step == 0 else fed, active))
        fed = logits[-1].argmax(-1)
    return torch.stack(tokens), torch.stack(logits)


@pytest.mark.parametrize("name", ["A", "B"])
def test_greedy_decoding(adapter: BagelAdapter, name: str) -> None:
    steps = len(CASES[f"b_greedy/{name}_tokens"])
    tokens, logits = greedy(adapter, [[text(f"prompt_{name}")]], steps)
    assert torch.equal(tokens[:, 0], CASES[f"b_greedy/{name}_tokens"])
    close(logits[:, 0], f"b_greedy/{name}_logits")


def test_greedy_decoding_of_a_ragged_batch(adapter: BagelAdapter) -> None:
    steps = len(CASES["b_greedy/batch_tokens"])
    tokens, logits = greedy(adapter, [[text("prompt_A")], [text("prompt_B")]], steps)
    assert torch.equal(tokens, CASES["b_greedy/batch_tokens"])
    close(logits, "b_greedy/batch_logits")


def split(rows: Tensor) -> list[Tensor]:
    sizes = [math.prod(grid_of(name)) for name in ("sample0", "sample1")]
    return list(rows.split(sizes))


@pytest.mark.parametrize("index", range(len(INFO["t_values"])))
def test_ragged_velocity_packed_and_cached(adapter: BagelAdapter, index: int) -> None:
    """Group c: two samples of other text length and image size."""
    sigma, expected = INFO["t_values"][index], split(CASES[f"c_velocity/v_t{index}"])
    trajectories = []
    for i, (state, name) in enumerate(zip(split(CASES["c_velocity/x_t"]), "AB", strict=True)):
        image = ImageSegment(
            latent=state,
            grid=grid_of(f"sample{i}"),
            states=torch.stack([state, state]),
            sigmas=torch.tensor([sigma, 0.0]),
        )
        prompt = text(f"prompt_{name}")
        trajectories.append(
            Trajectory(prompt=Prompt(text=""), segments=[prompt, image], group=0, member=i)
        )
        cached = adapter.velocity(
            adapter.prefill([[prompt]]), state.unsqueeze(0), torch.tensor([sigma]), image.grid
        )
        torch.testing.assert_close(cached[0], expected[i], atol=ATOL, rtol=0)
    for got, want in zip(adapter(trajectories).velocity, expected, strict=True):
        torch.testing.assert_close(got[0], want, atol=ATOL, rtol=0)


def test_unconditional_velocity(adapter: BagelAdapter) -> None:
    """Group e, the empty context: the noise block sits at position 0 and sees only itself."""
    state, grid = CASES["e_cfg/x_t"], grid_of("sample0")
    sigma = torch.tensor([INFO["t_for_e_h_k"]])
    for name, cache in (
        ("v_uncond", adapter.guidance([[text("prompt_A")]]).without_text),
        ("v_cond", adapter.prefill([[text("prompt_A")]])),
        ("v_think_cond", adapter.prefill([[text(f"prompt_{n}") for n in ("sys", "A", "think")]])),
    ):
        close(adapter.velocity(cache, state.unsqueeze(0), sigma, grid)[0], f"e_cfg/{name}")


def test_ode_sampling(adapter: BagelAdapter) -> None:
    """Group d, latents; the points convention: N time points are N - 1 calls."""
    sampling = INFO["sampling"]
    sigmas = sigma_schedule(
        sampling["num_timesteps"], shift=sampling["timestep_shift"], convention="points"
    )
    close(sigmas, "d_ode/timesteps", 1e-6)
    for i, (x, name) in enumerate(zip(split(CASES["d_ode/noise"]), "AB", strict=True)):
        cache, x = adapter.prefill([[text(f"prompt_{name}")]]), x.unsqueeze(0)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            velocity = adapter.velocity(cache, x, sigma.expand(1), grid_of(f"sample{i}"))
            x = ode_step(velocity, x, sigma, sigma_next)
        close(x[0], f"d_ode/final_{i}")


def test_ode_sampling_of_a_rollout(adapter: BagelAdapter) -> None:
    """Group d through the sampler: noise to latents to pixels; one prefix read once for two rows."""
    sampling = INFO["sampling"]
    sigmas = sigma_schedule(
        sampling["num_timesteps"], shift=sampling["timestep_shift"], convention="points"
    )
    for i, (x, name) in enumerate(zip(split(CASES["d_ode/noise"]), "AB", strict=True)):
        cache, grid = adapter.prefill([[text(f"prompt_{name}")]]).expand([2]), grid_of(f"sample{i}")
        drawn = sample_image(
            adapter, cache, torch.stack([-x, x]), sigmas, grid, sampling=Sampling()
        )
        close(drawn[1].latent, f"d_ode/final_{i}")
        if i == 0:
            expected = (CASES["d_ode/final_image_0"] / 2 + 0.5).clamp(0, 1)
            got = adapter.decode(torch.stack([image.latent for image in drawn]), grid)[1:]
            torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)


def tokens_of(latents: Tensor) -> Tensor:
    """Return ``[N, C]`` of the latents ``[z, H, W]`` that upstream made of an image."""
    return patchify(latents, CONFIG["bagel_config"]["latent_patch_size"])


def test_vae_encodes_and_decodes(adapter: BagelAdapter) -> None:
    """Group f."""
    assert adapter.vae is not None
    z = CASES["f_vae/z"]
    grid = z.shape[2] // adapter.vae.patch, z.shape[3] // adapter.vae.patch
    close(adapter.vae.decode(tokens_of(z), grid), "f_vae/decoded")
    encoded = adapter.vae.encode(CASES["f_vae/image"])
    torch.testing.assert_close(encoded, tokens_of(CASES["f_vae/encoded_mean"]), atol=ATOL, rtol=0)
    close(adapter.vae.vae.encode(CASES["f_vae/image"]).latent_dist.parameters, "f_vae/moments")
    # A sample is mean + std noise, with the noise of the generator given.
    mean, log_var = CASES["f_vae/moments"].chunk(2, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    sample = adapter.vae.scale * (mean + (0.5 * log_var).exp() * noise - adapter.vae.shift)
    got = adapter.vae.encode(CASES["f_vae/image"], torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, tokens_of(sample), atol=ATOL, rtol=0)


def test_decoding_of_sampled_latents(adapter: BagelAdapter) -> None:
    """Group d, pixels."""
    latent, grid = CASES["d_ode/final_0"], grid_of("sample0")
    assert torch.equal(
        unpatchify(latent, grid, adapter.config.latent_patch_size), CASES["d_ode/final_latent_0"][0]
    )
    expected = (CASES["d_ode/final_image_0"] / 2 + 0.5).clamp(0, 1)
    got = adapter.decode(latent.unsqueeze(0), grid)
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    assert adapter.vae is not None
    close(adapter.vae.decode(latent.unsqueeze(0), grid), "d_ode/final_image_0")  # unclamped


def vit_rows(adapter: BagelAdapter, name: str) -> Tensor:
    assert adapter.vision is not None
    with torch.no_grad():
        return adapter.vision([CASES[f"in/{name}"]])[0]


def only_seen(adapter: BagelAdapter, name: str) -> ImageSegment:
    """Return an image for understanding: patches and no latents."""
    latent = torch.zeros(0, adapter.latent_channels)
    views = {"vit": vit_rows(adapter, name)}
    return ImageSegment(latent=latent, grid=(0, 0), is_context=True, views=views)


def edited(adapter: BagelAdapter) -> ImageSegment:
    """Return the golden input image: latents by the mean, patches of a picture of its own size."""
    assert adapter.vae is not None
    pixels = CASES["in/edit_img"]
    pixels = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    side = adapter.config.pixels_per_token
    return ImageSegment(
        latent=adapter.vae.encode(pixels)[0],
        grid=(pixels.shape[2] // side, pixels.shape[3] // side),
        is_context=True,
        views={"vit": vit_rows(adapter, "edit_vit_img")},
    )


def test_vision_tower(adapter: BagelAdapter) -> None:
    """Group g: patches, positions, features and rows of the language model."""
    vision = adapter.vision
    assert vision is not None
    config = vision.config
    image = CASES["in/vit_img0"]
    patches = patchify(image, config.patch_size)
    close(patches, "g_vit/patches", 0)
    grid = image.shape[1] // config.patch_size, image.shape[2] // config.patch_size
    ids = position_ids(grid, config.max_patches_per_side)
    assert torch.equal(ids, CASES["g_vit/position_ids"])
    with torch.no_grad():
        close(vision.vit_model["vision_model"](patches, ids), "g_vit/vit_out")
    close(vit_rows(adapter, "vit_img0"), "g_vit/llm_in")


GREEDY = {
    "b_greedy/A_": ["prompt_A"],
    "b_greedy/B_": ["prompt_B"],
    "g_vit/greedy_": ["vit_img0", "prompt_A"],
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_of_a_rollout(adapter: BagelAdapter, name: str) -> None:
    """Groups b and g as evaluation decodes: bos is no part of a text, and its stop token ends it."""
    expected, logits = CASES[f"{name}tokens"][1:], CASES[f"{name}logits"]
    stops = (expected == adapter.stop_token).nonzero().flatten().tolist()
    expected = expected[: stops[0] + 1] if stops else expected
    context = [only_seen(adapter, n) if n.startswith("vit") else text(n) for n in GREEDY[name]]
    (found,) = sample_text(
        adapter, adapter.prefill([context]), None, max_tokens=len(expected), temperature=1.0
    )
    assert torch.equal(found.tokens, expected)
    scores = token_log_probs(logits[: len(expected)], expected)[0]
    torch.testing.assert_close(found.log_prob, scores, atol=ATOL, rtol=0)


def cached_logits(adapter: BagelAdapter, cache: Any, ids: Tensor) -> Tensor:
    """Return the logits ``[L + 2, V]`` of a text read behind a cache, token by token."""
    tokens = [None, *ids.tolist(), adapter.config.eos]
    active = torch.ones(1, dtype=torch.bool)
    fed = (None if token is None else torch.tensor([token]) for token in tokens)
    return torch.stack([adapter.next_logits(cache, token, active)[0] for token in fed])


def packed_log_probs(adapter: BagelAdapter, given: list[Any], ids: Tensor) -> Tensor:
    """Return the log-probabilities of a text and its stop token from the packed pass."""
    tokens = torch.cat([ids, torch.tensor([adapter.config.eos])])
    written = TextSegment(tokens=tokens, log_prob=torch.zeros(len(tokens)))
    row = Trajectory(prompt=Prompt(text=""), segments=[*given, written], group=0, member=0)
    with torch.no_grad():
        return adapter([row]).text[0]


def agrees(adapter: BagelAdapter, given: list[Any], ids: Tensor, name: str) -> None:
    """Both paths read a text behind a context and find the golden logits."""
    cache = adapter.prefill([given])
    logits = CASES[name]
    got = cached_logits(adapter, cache, ids)[: len(logits)]
    torch.testing.assert_close(got, logits, atol=ATOL, rtol=0)
    tokens = torch.cat([ids, torch.tensor([adapter.config.eos])])[: len(logits)]
    expected = logits.log_softmax(-1)[: len(tokens)].gather(1, tokens.unsqueeze(1)).squeeze(1)
    packed = packed_log_probs(adapter, given, ids)[: len(tokens)]
    torch.testing.assert_close(packed, expected, atol=ATOL, rtol=0)


def test_image_for_understanding(adapter: BagelAdapter) -> None:
    """Group g: a text behind what the tower saw, alone and in a ragged batch."""
    images = [only_seen(adapter, name) for name in ("vit_img0", "vit_img1")]
    prompts = [CASES["in/prompt_A"], CASES["in/prompt_B"]]
    agrees(adapter, [images[0]], prompts[0], "g_vit/logits")
    agrees(adapter, [images[1]], prompts[1], "g_vit/batch_logits_B")
    steps = len(CASES["g_vit/greedy_tokens"])
    tokens, logits = greedy(adapter, [[images[0], text("prompt_A")]], steps)
    assert torch.equal(tokens[:, 0], CASES["g_vit/greedy_tokens"])
    close(logits[:, 0], "g_vit/greedy_logits")
    cache = adapter.prefill([[images[0]], [images[1]]])
    assert cache.positions.tolist() == [1, 1]
    adapter.extend(cache, [text("prompt_A"), text("prompt_B")])
    both = adapter.next_logits(cache, None, torch.ones(2, dtype=torch.bool))[0]
    torch.testing.assert_close(both, CASES["g_vit/greedy_logits"][0], atol=ATOL, rtol=0)


def test_texts_of_a_ragged_batch_behind_images(adapter: BagelAdapter) -> None:
    """Group g: images of other sizes, then texts of other lengths, fed row by row until each ends."""
    images = [only_seen(adapter, name) for name in ("vit_img0", "vit_img1")]
    names = {"prompt_A": "g_vit/logits", "prompt_B": "g_vit/batch_logits_B"}
    texts = [[*CASES[f"in/{name}"].tolist(), adapter.config.eos] for name in names]
    expected = [CASES[name] for name in names.values()]
    cache = adapter.prefill([[image] for image in images])
    for step in range(max(map(len, expected))):
        active = torch.tensor([step < len(logits) for logits in expected])
        fed = torch.tensor([ids[min(step, len(ids)) - 1] for ids in texts]) if step else None
        got = adapter.next_logits(cache, fed, active)
        for b in active.nonzero().flatten().tolist():
            torch.testing.assert_close(got[b], expected[b][step], atol=ATOL, rtol=0)


def velocity_of(
    adapter: BagelAdapter, given: list[Any], name: str, state: Tensor, grid: Grid
) -> None:
    """Both paths find the golden velocity behind a context."""
    sigma = torch.tensor([INFO["t_for_e_h_k"]])
    got = adapter.velocity(adapter.prefill([given]), state.unsqueeze(0), sigma, grid)
    close(got[0], name)
    image = ImageSegment(
        latent=state,
        grid=grid,
        states=torch.stack([state, state]),
        sigmas=torch.cat([sigma, sigma * 0]),
    )
    row = Trajectory(prompt=Prompt(text=""), segments=[*given, image], group=0, member=0)
    with torch.no_grad():
        close(adapter([row]).velocity[0][0], name)


def test_editing(adapter: BagelAdapter) -> None:
    """Group h: latents, patches, instruction, and the velocity behind them."""
    given = [edited(adapter), text("prompt_B")]
    agrees(adapter, given[:1], CASES["in/prompt_B"], "h_edit/logits")
    velocity_of(adapter, given, "h_edit/v", CASES["h_edit/x_t"], grid_of("edit"))


@pytest.fixture
def sizes_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden pictures are what upstream's two transforms returned: resize nothing."""
    small = CASES["in/edit_vit_img"] / 2 + 0.5
    monkeypatch.setattr(contract, "latent_resize", lambda _: lambda pixels: pixels)
    monkeypatch.setattr(contract, "patch_resize", lambda _: lambda _: small)


EDIT = CASES["in/edit_img"] / 2 + 0.5


@pytest.mark.usefixtures("sizes_as_given")
def test_editing_from_a_prompt(adapter: BagelAdapter) -> None:
    """Group h from the request: pixels in [0, 1] and words become the golden context."""
    words = " ".join(map(str, CASES["in/prompt_B"].tolist()))
    prompt = Prompt(text=words, images=(EDIT,), size=tuple(INFO["sizes"]["edit"]))
    given, grid = adapter.tokenize(prompt), adapter.image_grid(prompt)
    assert grid == grid_of("edit")
    agrees(adapter, given[:1], CASES["in/prompt_B"], "h_edit/logits")
    velocity_of(adapter, given, "h_edit/v", CASES["h_edit/x_t"], grid)


@pytest.mark.usefixtures("sizes_as_given")
def test_posterior_of_an_input_image() -> None:
    """``scale (mean + std noise(id) - shift)`` of the golden moments; edit_img is their first picture."""
    assert torch.equal(CASES["in/edit_img"], CASES["f_vae/image"][0])
    mean, log_var = CASES["f_vae/moments"][:1].chunk(2, 1)
    adapter = golden_adapter(posterior="sample")
    assert adapter.vae is not None
    for key in (0, 7):
        seed = np.random.SeedSequence((key, 0)).generate_state(1)  # of its first image
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(seed[0])))
        z = adapter.vae.scale * (mean + (log_var / 2).exp() * noise - adapter.vae.shift)
        seen = adapter.tokenize(Prompt(text="", id=key, images=(EDIT,)))[0]
        assert isinstance(seen, ImageSegment)
        torch.testing.assert_close(seen.latent, tokens_of(z)[0], atol=ATOL, rtol=0)


def test_reflection(adapter: BagelAdapter) -> None:
    """Group k: two texts, an image looked at, a third text; keys, counters, velocity."""
    given = [text("prompt_sys"), text("prompt_A"), edited(adapter)]
    agrees(adapter, given, CASES["in/prompt_2"], "k_reflect/logits")
    whole = [*given, text("prompt_2")]
    cache = adapter.prefill([whole])
    assert cache.positions.tolist() == CASES["k_reflect/rope_next"].tolist()
    assert cache.lengths.tolist() == CASES["k_reflect/cache_len"].tolist()
    close(cache.keys[-1][0, : int(cache.lengths)], "k_reflect/key_cache_last")
    velocity_of(adapter, whole, "k_reflect/v", CASES["h_edit/x_t"], grid_of("edit"))


class Played:
    """Sets what a rollout draws: the words of its texts, and x at the noise level of the golden velocities.

    Args:
        adapter: what it says at that level is noted, with the cache it was asked of.
        texts: names of the sampled texts in order.
        patch: undoes it.
    """

    def __init__(
        self, adapter: BagelAdapter, patch: pytest.MonkeyPatch, texts: Sequence[str] = ()
    ) -> None:
        words = ([*CASES[f"in/{name}"].tolist(), adapter.stop_token] for name in texts)
        self.adapter, self.words = adapter, itertools.chain.from_iterable(words)
        self.logits: list[Tensor] = []
        self.velocities: list[Tensor] = []
        self.caches: list[Any] = []
        for name in ("velocity", "guided_velocity"):
            patch.setattr(adapter, name, self.led(getattr(adapter, name)))
        patch.setattr(drawing, "draw_tokens", self.draw)

    def draw(self, logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Draw the next of the words."""
        self.logits.append(logits[0])
        token = torch.tensor([next(self.words)])
        return token, token_log_probs(logits, token)[0]

    def led(self, velocity: Any) -> Any:
        """Let the step from pure noise end at the golden state."""

        def found(cache: Any, *rest: Any, **settings: Any) -> Tensor:
            *_, x, sigma, _ = rest
            level = INFO["t_for_e_h_k"]
            if sigma[0] > level:
                return (x - CASES["h_edit/x_t"]) / (sigma[0] - level)
            self.caches.append(cache)
            self.velocities.append(velocity(cache, *rest, **settings))
            return self.velocities[-1]

        return found

    def run(self, prompt: Prompt, plan: Sequence[Any], **settings: Any) -> Trajectory:
        """Draw one trajectory through the noise levels 1, that of the state, and 0."""
        sampling = Sampling(plan=tuple(plan), eval_num_timesteps=3, **settings)
        words = [spelled("prompt_2")]
        rows = rollout(
            self.adapter,
            [Start(prompt, 0, 0)],
            sampling,
            evaluate=True,
            speaker=lambda *_: words,
        )
        ((trajectory,),) = rows
        return trajectory


def spelled(name: str) -> str:
    return " ".join(map(str, CASES[f"in/{name}"].tolist()))


@pytest.mark.usefixtures("sizes_as_given")
@pytest.mark.parametrize("name", ["h_edit/v", "h_edit/v_cfg_text_channel", "h_edit/v_cfg_global"])
def test_editing_in_a_rollout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group h from a request to the velocity, with and without guidance and a mark where the image stands."""
    renorm: Any = name.removeprefix("h_edit/v_cfg_")
    adapter = golden_adapter(
        guide=Guidance(image_scale=2.0, renorm=renorm) if "cfg" in name else None
    )
    words = f"{'<image> ' if 'cfg' in name else ''}{spelled('prompt_B')}"
    prompt = Prompt(text=words, images=(EDIT,), size=tuple(INFO["sizes"]["edit"]))
    played = Played(adapter, monkeypatch)
    played.run(prompt, ["image"], guidance_scale=4.0 if "cfg" in name else 1.0)
    close(played.velocities[-1][0], name)


@pytest.mark.usefixtures("sizes_as_given")
@pytest.mark.parametrize("third", ["turn", "text"])
def test_reflection_in_a_rollout(third: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Group k as a plan: a text and an image that is looked at, then words of the user or of the policy."""
    adapter = golden_adapter()
    monkeypatch.setattr(adapter, "decode", lambda *_: EDIT.unsqueeze(0))
    played = Played(adapter, monkeypatch, ["prompt_A", "prompt_2"])
    prompt = Prompt(text=spelled("prompt_sys"), size=tuple(INFO["sizes"]["edit"]))
    trajectory = played.run(prompt, ["text", "image", third, "image"])
    close(played.velocities[-1][0], "k_reflect/v")
    cache = played.caches[-1]
    assert cache.positions.tolist() == CASES["k_reflect/rope_next"].tolist()
    assert cache.lengths.tolist() == CASES["k_reflect/cache_len"].tolist()
    close(cache.keys[-1][0, : int(cache.lengths)], "k_reflect/key_cache_last")
    # And what learning makes of the recorded segments.
    *context, image = trajectory.segments
    state, sigma = CASES["h_edit/x_t"], INFO["t_for_e_h_k"]
    assert isinstance(image, ImageSegment)
    image = replace(image, states=torch.stack([state, state]), sigmas=torch.tensor([sigma, 0.0]))
    with torch.no_grad():
        scores = adapter([replace(trajectory, segments=[*context, image])])
    close(scores.velocity[0][0], "k_reflect/v")
    if third == "text":
        tokens = [*CASES["in/prompt_2"].tolist(), adapter.stop_token]
        expected = CASES["k_reflect/logits"][: len(tokens)]
        found = torch.stack(played.logits[-len(tokens) :])
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
        log_probs = token_log_probs(expected, torch.tensor(tokens))[0]
        torch.testing.assert_close(scores.text[-1], log_probs, atol=ATOL, rtol=0)


GUIDED: dict[str, tuple[list[str], float, dict[str, Any]]] = {
    "e_cfg/v_text4_global": (["prompt_A"], 4.0, {}),
    "e_cfg/v_text4_channel": (["prompt_A"], 4.0, {"renorm": "channel"}),
    "e_cfg/v_text4_text_channel": (["prompt_A"], 4.0, {"renorm": "text_channel"}),
    "e_cfg/v_text4_global_min1": (["prompt_A"], 4.0, {"renorm_min": 1.0}),
    "e_cfg/v_text4_img1p5_global": (["prompt_A"], 4.0, {"image_scale": 1.5}),
    "e_cfg/v_think_global": (["prompt_sys", "prompt_A", "prompt_think"], 4.0, {"image_scale": 1.5}),
    "h_edit/v_cfg_text_channel": (
        ["edit", "prompt_B"],
        4.0,
        {"image_scale": 2.0, "renorm": "text_channel"},
    ),
    "h_edit/v_cfg_global": (["edit", "prompt_B"], 4.0, {"image_scale": 2.0}),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance(name: str) -> None:
    """Groups e and h: contexts without text and without images, renormalised in three ways."""
    parts, scale, settings = GUIDED[name]
    adapter = golden_adapter(
        guide=Guidance(**settings), system_prompt="5" if "prompt_sys" in parts else None
    )
    context = [edited(adapter) if part == "edit" else text(part) for part in parts]
    if parts[-1] == "prompt_think":
        reasoning = context[-1]
        assert isinstance(reasoning, TextSegment)
        reasoning.log_prob = torch.zeros(len(reasoning.tokens))
    group = name.split("/")[0]
    state = CASES[f"{group}/x_t"]
    grid = grid_of("edit" if "edit" in parts else "sample0")
    sigma = torch.tensor([INFO["t_for_e_h_k"]]).expand(2)
    found = adapter.guided_velocity(
        adapter.prefill([context, context]),
        adapter.guidance([context, context]),
        torch.stack([state, -state]),  # another sample of the batch changes nothing
        sigma,
        grid,
        scale=scale,
    )
    close(found[0], name)


def test_guidance_inside_an_interval() -> None:
    """Group e: a whole ODE that is guided while ``low < sigma <= high``."""
    adapter = golden_adapter(guide=Guidance(interval=(0.5, 1.0)))
    sampling = INFO["sampling"]
    sigmas = sigma_schedule(
        sampling["num_timesteps"], shift=sampling["timestep_shift"], convention="points"
    )
    context = [text("prompt_A")]
    (image,) = sample_image(
        adapter,
        adapter.prefill([context]),
        CASES["e_cfg/x_t"].unsqueeze(0),
        sigmas,
        grid_of("sample0"),
        sampling=Sampling(guidance_scale=4.0),
        unconditional=adapter.guidance([context]),
    )
    close(image.latent, "e_cfg/ode_interval")


def train_input(name: str) -> Tensor:
    return CASES[f"i_train/in_{name}"]


def clean_latents() -> list[Tensor]:
    """Return the clean tokens of the pack's images, in its order."""
    patch = CONFIG["bagel_config"]["latent_patch_size"]
    padded, shapes = train_input("padded_latent"), INFO["train"]["latent_shapes"]
    return [
        tokens_of(x[:, : g[0] * patch, : g[1] * patch]) for x, g in zip(padded, shapes, strict=True)
    ]


def train_levels() -> Tensor:
    """Return the noise level of each latent row of the pack."""
    sigma = train_input("packed_timesteps").sigmoid()
    shift = CONFIG["bagel_config"]["timestep_shift"]
    return shift * sigma / (1 + (shift - 1) * sigma)


def check_training(
    ce: Tensor, velocity: Tensor, parameters: dict[str, nn.Parameter], target: Tensor
) -> None:
    """Compare velocities, losses and the gradients of their sum with the golden ones."""
    mse = (velocity - target).square()
    close(velocity, "i_train/v_pred")
    close(ce, "i_train/ce")
    close(mse, "i_train/mse")
    (ce.mean() + mse.mean()).backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norms = torch.stack([gradients[name].norm() for name in INFO["train"]["grad_names"]])
    close(norms, "i_train/grad_norms", GRADIENT_ATOL)
    for name in (k for k in CASES if k.startswith("i_train/grad.")):
        close(gradients[name.removeprefix("i_train/grad.")], name, GRADIENT_ATOL)


def golden_layout(order: Tensor) -> Layout:
    """Blocks of the packed golden samples; ``order`` maps packed rows to our flat rows."""
    kinds = {"causal": Kind.CAUSAL, "full": Kind.FULL, "noise": Kind.NOISE}
    info, at, samples = INFO["train"], 0, []
    ends = torch.tensor(info["sample_lens"]).cumsum(0).tolist()
    blocks: list[Any] = []
    for length, mode in zip(info["split_lens"], info["attn_modes"], strict=True):
        blocks.append((kinds[mode], order[at : at + length].tolist()))
        at += length
        if at in ends:
            samples.append(blocks)
            blocks = []
    return Layout.build(samples, torch.device("cpu"))


@pytest.mark.parametrize("dense", [True, False])
def test_packed_training_forward_with_losses_and_gradients(dense: bool) -> None:
    """Group i as upstream packs it: cross entropy, velocities and every gradient, vision rows included."""
    adapter = golden_adapter()
    vision = adapter.vision
    assert vision is not None
    vision.requires_grad_(True)  # upstream trains it, too
    config, info = adapter.config, INFO["train"]
    text_at, vit_at, vae_at = (
        train_input(f"packed_{name}")
        for name in ("text_indexes", "vit_token_indexes", "vae_token_indexes")
    )
    num_words, num_und = len(text_at), len(text_at) + len(vit_at)
    order = torch.empty(num_und + len(vae_at), dtype=torch.long)  # packed row -> our flat row
    order[torch.cat([text_at, vit_at, vae_at])] = torch.arange(len(order))
    layout = golden_layout(order)
    for b, size in enumerate(info["sample_lens"]):
        found = layout.visible()[b, :size, :size].to(torch.uint8)
        assert torch.equal(found, train_input(f"mask_{b}"))

    clean, sigma, noise = torch.cat(clean_latents()), train_levels(), CASES["i_train/noise"]
    scored = (sigma > 0).nonzero().squeeze(1)
    assert torch.equal(vae_at[scored], train_input("mse_loss_indexes"))
    positions = train_input("packed_position_ids")
    pack = Pack(
        token_ids=train_input("packed_text_ids"),
        positions=torch.cat([positions[text_at], positions[vit_at]]),
        latents=(1 - sigma).unsqueeze(1) * clean + sigma.unsqueeze(1) * noise,
        sigma=sigma,
        image_of=torch.arange(len(sigma)),
        latent_ids=train_input("packed_latent_position_ids"),
        latent_positions=positions[vae_at],
        logit_rows=order[train_input("ce_loss_indexes")],
        velocity_rows=scored,
        extra=vision.rows(train_input("packed_vit_tokens"), train_input("packed_vit_position_ids")),
    )
    assert num_words == len(pack.token_ids)
    assert config.latent_channels == clean.shape[1]
    logits, velocity = adapter.net(pack, PackedAttention(layout, len(order), dense=dense))
    close(logits, "i_train/logits")
    labels = train_input("packed_label_ids")
    ce = nn.functional.cross_entropy(logits, labels, reduction="none")
    parameters = dict(adapter.net.named_parameters()) | dict(vision.named_parameters())
    check_training(ce, velocity, parameters, (noise - clean)[scored])


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_training_through_the_contract(gradient_checkpointing: bool, share_prefixes: bool) -> None:
    """Group i from trajectories: the adapter finds the rows, positions, losses and gradients itself."""
    adapter = golden_adapter(
        gradient_checkpointing=gradient_checkpointing, share_prefixes=share_prefixes
    )
    vae, vision = adapter.vae, adapter.vision
    assert vae is not None
    assert vision is not None
    vision.requires_grad_(True)
    latents, shapes = clean_latents(), INFO["train"]["latent_shapes"]
    for latent, name in zip(latents, ("edit_img", "edit_img", "vae_img1"), strict=True):
        torch.testing.assert_close(
            vae.encode(CASES[f"in/{name}"].unsqueeze(0))[0], latent, atol=ATOL, rtol=0
        )
    sizes = [len(latent) for latent in latents]
    noise, levels = CASES["i_train/noise"].split(sizes), train_levels().split(sizes)

    def drawn(i: int) -> ImageSegment:
        sigma = levels[i][0]
        state = (1 - sigma) * latents[i] + sigma * noise[i]
        return ImageSegment(
            latent=latents[i],
            grid=tuple(shapes[i]),
            states=torch.stack([state, state]),
            sigmas=torch.stack([sigma, 0 * sigma]),
        )

    (patches,) = vision([CASES["in/vit_img1"]])
    assert train_input("vit_token_seqlens").tolist() == [len(patches)]
    labels = train_input("packed_label_ids")
    assert labels.tolist() == [*CASES["in/prompt_A"].tolist(), adapter.stop_token]
    segments: list[list[Any]] = [
        [
            replace(only_seen(adapter, "vit_img1"), views={"vit": patches}),
            ImageSegment(latent=latents[0], grid=tuple(shapes[0]), is_context=True),
            TextSegment(tokens=labels, log_prob=torch.zeros(len(labels))),
            drawn(1),
        ],
        [text("prompt_B"), drawn(2)],
    ]
    calls: list[Any] = []
    adapter.net.register_forward_pre_hook(lambda _, args: calls.append(args))
    scores = adapter(
        [Trajectory(prompt=Prompt(text=""), segments=s, group=0, member=0) for s in segments]
    )
    ((pack, attention),) = calls
    flat = attention.layout.rows[attention.layout.valid]
    positions = torch.cat([pack.positions, pack.latent_positions])[flat]
    assert positions.tolist() == train_input("packed_position_ids").tolist()
    parameters = dict(adapter.net.named_parameters()) | dict(vision.named_parameters())
    velocity = torch.cat([v[0] for v in scores.velocity])
    target = torch.cat([noise[i] - latents[i] for i in (1, 2)])
    check_training(-scores.text[0], velocity, parameters, target)


# ---- l


@pytest.mark.parametrize("mode", ["constant", "monotonic"])
def test_density_of_a_step_token_by_token(mode: str) -> None:
    """Group l, R3's log-probabilities: one number a token; test_flow.py compares everything else."""
    described = re.search(
        r"constant_eta=([\d.]+)", INFO["tensors"][f"l_sde/r3_{mode}_mean"]["desc"]
    )
    assert described
    grid, constant = CASES["l_sde/grid"], float(described[1])
    x, v, x_next = (CASES[f"l_sde/{name}"] for name in ("x_t", "v", "x_next"))
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(grid.tolist())):
        eta = constant * (math.sqrt(sigma / (1 - min(sigma, 0.95))) if mode == "monotonic" else 1)
        mean, std = transition(v, x, sigma, sigma_next, eta=eta, kind="dance")
        found = log_prob(x_next.unsqueeze(1), mean.unsqueeze(1), std)
        expected = CASES[f"l_sde/r3_{mode}_logprob"][i]
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)  # float32 on both sides


# ---- what the vectors do not exercise


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> BagelAdapter:
    """Load a tiny checkpoint as a user does; its words are far from equally probable."""
    adapter = BagelAdapter.from_pretrained(write_checkpoint(tmp_path_factory.mktemp("bagel")))
    adapter.materialize()
    with torch.no_grad():
        adapter.net.language_model.lm_head.weight.mul_(8)
    return adapter.eval()


def next_word(adapter: BagelAdapter, context: list[Any], fed: list[int]) -> Tensor:
    """Return the logits ``[V]`` behind a text that has been fed so far, by a cache of its own."""
    cache, active = adapter.prefill([context]), torch.ones(1, dtype=torch.bool)
    logits = adapter.next_logits(cache, None, active)
    for token in fed:
        logits = adapter.next_logits(cache, torch.tensor([token]), active)
    return logits[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_words_are_drawn_from_the_tempered_logits(
    published: BagelAdapter, temperature: float
) -> None:
    """The first and the second word, each at evenly spread uniforms: frequencies are exact to 1 / n."""
    num = 2000
    context = published.tokenize(Prompt(text="a red cube"))
    cache = published.prefill([context])
    even = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    middle = torch.full_like(even, 0.5)
    fed: list[int] = []
    for uniforms in ([even, middle], [middle, even]):
        texts = sample_text(
            published,
            cache.expand([num]),
            torch.stack(uniforms, 1),
            max_tokens=2,
            temperature=temperature,
        )
        drawn = torch.stack([text.tokens[len(fed)] for text in texts])
        expected = (next_word(published, context, fed).double() / temperature).softmax(0)
        assert expected.max() > 2 / len(expected)
        frequency = torch.bincount(drawn, minlength=len(expected)) / num
        torch.testing.assert_close(frequency.double(), expected, atol=1 / num + 1e-5, rtol=0)
        scores = torch.stack([t.log_prob[len(fed)] for t in texts if t.log_prob is not None])
        torch.testing.assert_close(
            scores.double(), expected[drawn].log(), atol=ATOL / temperature, rtol=0
        )
        fed = [int(torch.searchsorted(expected.cumsum(0), 0.5, right=True))]
    row = Trajectory(prompt=Prompt(text=""), segments=[*context, texts[0]], group=0, member=0)
    with torch.no_grad():
        (packed,) = published([row]).text
    torch.testing.assert_close(packed, texts[0].log_prob, atol=ATOL / temperature, rtol=0)


def test_texts_end_at_the_stop_token_or_are_closed(published: BagelAdapter) -> None:
    """A stopped row is fed no more; one that was cut off gets the stop token as a mark."""
    num, limit = 200, 12
    context = published.tokenize(Prompt(text="a red cube"))
    cache = published.prefill([context])
    first = int(cache.positions)
    rows = cache.expand([num])
    uniforms = Draws(0, 0).uniforms([Start(Prompt(text=""), 0, m) for m in range(num)], 0, limit)
    texts = sample_text(published, rows, uniforms, max_tokens=limit, temperature=2.0)
    stopped = [b for b, text in enumerate(texts) if text.stopped]
    cut = [b for b, text in enumerate(texts) if not text.stopped]
    assert len(stopped) >= 3
    assert len(cut) >= 3
    for text in texts:
        ends = text.tokens == published.stop_token
        assert int(ends.sum()) == int(text.stopped)
        assert bool(ends[-1]) is text.stopped
        assert text.stopped or len(text.tokens) == limit
    lengths = torch.tensor([len(text.tokens) for text in texts])
    assert torch.equal(rows.positions, first + lengths)  # bos, and all words but the last
    published.extend(rows, texts)
    few = stopped[:3] + cut[:3]
    closed = [
        TextSegment(tokens=torch.cat([texts[b].tokens, torch.tensor([published.stop_token])]))
        if b in cut
        else TextSegment(tokens=texts[b].tokens)
        for b in few
    ]
    whole = published.prefill([[*context, text] for text in closed])
    words = torch.tensor([len(text.tokens) - 1 for text in closed])
    assert torch.equal(whole.positions, first + 1 + words + 1)
    found = rows.select(torch.tensor(few))
    assert torch.equal(found.positions, whole.positions)
    assert torch.equal(found.lengths, whole.lengths)
    noise = torch.randn(6, 4, published.latent_channels, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((6,), 0.8)
    torch.testing.assert_close(
        published.velocity(found, noise, sigma, (2, 2)),
        published.velocity(whole, noise, sigma, (2, 2)),
        atol=ATOL,
        rtol=0,
    )


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_the_network_is_told_the_shifted_level(published: BagelAdapter, shift: float) -> None:
    """``S t / (1 + (S - 1) t)`` in the rollout, in its record, and again in the packed pass."""
    num = 7
    sampling = Sampling(
        plan=("image",), num_timesteps=num, schedule="points", shift=shift, window_size=3
    )
    start = Start(Prompt(text="a red cube", size=(16, 24)), 0, 0)
    told: list[Tensor] = []
    hook = published.net.time_embedder.register_forward_pre_hook(
        lambda _, args: told.append(args[0])
    )
    ((trajectory,),) = rollout(published, [start], sampling)
    with torch.no_grad():
        scores = published([trajectory])
    hook.remove()
    t = 1 - torch.arange(num, dtype=torch.float64) / (num - 1)
    expected = (shift * t / (1 + (shift - 1) * t)).float()
    torch.testing.assert_close(torch.cat(told[:-1]), expected[:-1], atol=1e-7, rtol=0)
    image = trajectory.segments[-1]
    assert isinstance(image, ImageSegment)
    assert image.sigmas is not None
    window = slice(image.start, image.start + 4)
    torch.testing.assert_close(image.sigmas, expected[window], atol=1e-7, rtol=0)
    torch.testing.assert_close(told[-1], expected[window][:-1], atol=1e-7, rtol=0)
    torch.testing.assert_close(scores.velocity[0], image.velocity, atol=ATOL, rtol=0)


# ---- the table of cases


ELSEWHERE = ("l_sde/",)
"""Groups that test_flow.py reads by a pattern: whatever it is called, it is compared."""


def test_every_tensor_is_compared(request: pytest.FixtureRequest) -> None:
    """A case that is added to the files needs a test; inputs (``in/``) may be left over.

    Says something only behind all other tests of this file.
    """
    module = request.module
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    marks = [getattr(test, "pytestmark", []) for test in tests]
    sizes = [[len(m.args[1]) for m in found if m.name == "parametrize"] for found in marks]
    if len(RAN) < sum(map(math.prod, sizes)):
        pytest.skip("only some of this file's tests ran before it")
    results = {name for name in CASES if not name.startswith(("in/", *ELSEWHERE))}
    assert sorted(results - CASES.read) == []
    assert INFO["tensors"].keys() == CASES.keys()
