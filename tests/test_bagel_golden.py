"""Bagel against numbers that upstream's code produced.

Sizes, tolerances and cases come from the files, so another set of the same layout runs unchanged.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig
from lightning_unigrpo.adapters.bagel.attention import Kind, Layout, PackedAttention
from lightning_unigrpo.adapters.bagel.network import Pack, sincos_table
from lightning_unigrpo.adapters.bagel.packing import position_ids
from lightning_unigrpo.flow import ode_step, sigma_schedule
from lightning_unigrpo.types import Grid, ImageSegment, Prompt, TextSegment, Trajectory
from tests.conftest import golden_folder

FOLDER = golden_folder("bagel")
INFO = json.loads((FOLDER / "cases.json").read_text())
CONFIG = json.loads((FOLDER / "config.json").read_text())
CASES = load_file(FOLDER / "cases.safetensors")
WEIGHTS = load_file(FOLDER / "state_dict.safetensors")
ATOL, GRADIENT_ATOL = (
    float(number) for number in re.findall(r"\de-\d", INFO["conventions"]["tolerance"])[:2]
)
VISION = ("vit_model.", "connector.", "vit_pos_embed.")


class Ids:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def golden_adapter() -> BagelAdapter:
    config = BagelConfig.from_upstream(
        llm_config=CONFIG["llm_config"],
        bagel_config=CONFIG["bagel_config"],
        vae_config=CONFIG["vae_config"],
        special_tokens=INFO["special_tokens"],
    )
    adapter = BagelAdapter(config, Ids())
    weights = {k: v for k, v in WEIGHTS.items() if not k.startswith(VISION)}
    adapter.net.load_state_dict(weights, strict=True)
    return adapter.eval()


@pytest.fixture(scope="module")
def adapter() -> BagelAdapter:
    return golden_adapter()


def close(got: Tensor, name: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(got, CASES[name], atol=atol, rtol=0)


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
        ("v_uncond", adapter.guidance([[text("prompt_A")]])),
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


class Vision(nn.Module):
    """SigLIP and connector as the golden training sample needs them; kept to this test."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = CONFIG["vit_config"]["num_attention_heads"]
        self.eps = CONFIG["vit_config"]["layer_norm_eps"]
        names = [k for k in WEIGHTS if k.startswith(VISION)]
        self.index = {k: str(i) for i, k in enumerate(names)}
        self.weights = nn.ParameterDict({self.index[k]: WEIGHTS[k].clone() for k in names})

    def get(self, name: str) -> Tensor:
        return self.weights[self.index[name]]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return nn.functional.layer_norm(x, weight.shape, weight, bias, self.eps)

    def forward(self, patches: Tensor, ids: Tensor) -> Tensor:
        root = "vit_model.vision_model."
        x = self.linear(patches, root + "embeddings.patch_embedding")
        x = x + self.get(root + "embeddings.position_embedding.weight")[ids]
        layer = 0
        while f"{root}encoder.layers.{layer}.layer_norm1.weight" in self.index:
            here = f"{root}encoder.layers.{layer}."
            u = self.norm(x, here + "layer_norm1")
            q, k, v = (
                self.linear(u, f"{here}self_attn.{p}_proj")
                .unflatten(1, (self.heads, -1))
                .transpose(0, 1)
                for p in "qkv"
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            x = x + self.linear(mixed, here + "self_attn.out_proj")
            u = nn.functional.gelu(
                self.linear(self.norm(x, here + "layer_norm2"), here + "mlp.fc1"),
                approximate="tanh",
            )
            x = x + self.linear(u, here + "mlp.fc2")
            layer += 1
        x = self.norm(x, root + "post_layernorm")
        x = nn.functional.gelu(self.linear(x, "connector.fc1"), approximate="tanh")
        return self.linear(x, "connector.fc2") + self.get("vit_pos_embed.pos_embed")[ids]


def patchify(latent: Tensor, grid: Grid) -> Tensor:
    """``[z, H, W]`` to ``[h * w, p * p * z]``, (row, column, channel) inside a token."""
    p, (h, w) = CONFIG["bagel_config"]["latent_patch_size"], grid
    cells = latent[:, : h * p, : w * p].unflatten(1, (h, p)).unflatten(3, (w, p))
    return cells.permute(1, 3, 2, 4, 0).flatten(0, 1).flatten(1)


def train_inputs() -> dict[str, Any]:
    return {
        k.removeprefix("i_train/in_"): v for k, v in CASES.items() if k.startswith("i_train/in_")
    }


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
    """Group i: cross entropy, velocities and every gradient, vision rows included."""
    adapter, vision, given = golden_adapter(), Vision(), train_inputs()
    config, info = adapter.config, INFO["train"]
    text_at, vit_at, vae_at = (
        given[f"packed_{name}"]
        for name in ("text_indexes", "vit_token_indexes", "vae_token_indexes")
    )
    num_words, num_und = len(text_at), len(text_at) + len(vit_at)
    order = torch.empty(num_und + len(vae_at), dtype=torch.long)  # packed row -> our flat row
    order[torch.cat([text_at, vit_at, vae_at])] = torch.arange(len(order))
    layout = golden_layout(order)
    for b in range(len(info["sample_lens"])):
        size = info["sample_lens"][b]
        assert torch.equal(layout.visible()[b, :size, :size].to(torch.uint8), given[f"mask_{b}"])

    clean = torch.cat(
        [
            patchify(x, tuple(g))
            for x, g in zip(given["padded_latent"], info["latent_shapes"], strict=True)
        ]
    )
    sigma = given["packed_timesteps"].sigmoid()
    shift = CONFIG["bagel_config"]["timestep_shift"]
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise = CASES["i_train/noise"]
    scored = (sigma > 0).nonzero().squeeze(1)
    positions = given["packed_position_ids"]
    pack = Pack(
        token_ids=given["packed_text_ids"],
        positions=torch.cat([positions[text_at], positions[vit_at]]),
        latents=(1 - sigma).unsqueeze(1) * clean + sigma.unsqueeze(1) * noise,
        sigma=sigma,
        image_of=torch.arange(len(sigma)),
        latent_ids=given["packed_latent_position_ids"],
        latent_positions=positions[vae_at],
        logit_rows=order[given["ce_loss_indexes"]],
        velocity_rows=scored,
        extra=vision(given["packed_vit_tokens"], given["packed_vit_position_ids"]),
    )
    assert num_words == len(pack.token_ids)
    assert config.latent_channels == clean.shape[1]
    logits, velocity = adapter.net(pack, PackedAttention(layout, len(order), dense=dense))
    close(logits, "i_train/logits")
    close(velocity, "i_train/v_pred")
    ce = nn.functional.cross_entropy(logits, given["packed_label_ids"], reduction="none")
    mse = (velocity - (noise - clean)[scored]).square()
    close(ce, "i_train/ce")
    close(mse, "i_train/mse")
    (ce.mean() + mse.mean()).backward()
    gradients = {name: p.grad for name, p in adapter.net.named_parameters()}
    gradients |= {name: vision.get(name).grad for name in vision.index}
    norms = torch.stack([gradients[name].norm() for name in info["grad_names"]])
    close(norms, "i_train/grad_norms", GRADIENT_ATOL)
    for name in (k for k in CASES if k.startswith("i_train/grad.")):
        close(gradients[name.removeprefix("i_train/grad.")], name, GRADIENT_ATOL)
