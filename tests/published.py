"""A tiny Bagel in the published layout: real file formats, a real tokenizer, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

from lightning_unigrpo.adapters.bagel import BagelConfig, BagelNet
from lightning_unigrpo.adapters.bagel.config import VisionConfig
from lightning_unigrpo.adapters.bagel.vision import BagelVision
from tests.conftest import golden_folder

SENTENCES = [
    "a red cube on a blue table",
    "three green apples",
    "a small dog beside the red ball",
    "think about the layout, then draw",
]
PIXELS = (
    8  # of a latent token: the golden autoencoder halves twice, a token has 2 x 2 latent pixels
)
CONFIG = BagelConfig(
    vocab_size=304,  # more than the tokenizer's: the release has spare rows, too
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=1000.0,
    z_channels=4,
    latent_downsample=4,
    max_latent_size=8,
    bos=0,
    eos=0,
    start_of_image=0,
    end_of_image=0,
    vision=VisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        max_patches_per_side=8,
    ),
)
"""The marks' ids are the tokenizer's."""


def weights(config: BagelConfig = CONFIG) -> dict[str, torch.Tensor]:
    """Return every tensor of the language model, bridges and tower, none of them neutral."""
    assert config.vision is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [BagelNet(config), BagelVision(config.vision, config.hidden_size)]
        state = {name: value for part in parts for name, value in part.state_dict().items()}
        return {
            name: value + 0.1 * torch.randn_like(value) if value.ndim == 1 else value.clone()
            for name, value in state.items()
        }


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer of a few merges and write Qwen2's files; the marks are not in it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(SENTENCES, vocab_size=280, min_frequency=1, show_progress=False)
    tokenizer.save_model(str(folder))
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 32768}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_checkpoint(
    folder: Path, *, shards: int = 1, config: BagelConfig = CONFIG, **llm: Any
) -> Path:
    """Write a tiny checkpoint as the release lays it out.

    Args:
        folder: where to.
        shards: number of files for the weights; more than one get an index.
        config: sizes.
        llm: changes of ``llm_config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert config.vision is not None
    # The ids in the release's file are not the ones that are used.
    llm_config = config.to_upstream() | {"bos_token_id": 1, "eos_token_id": 2} | llm
    (folder / "llm_config.json").write_text(json.dumps(llm_config))
    (folder / "vit_config.json").write_text(json.dumps(config.vision.to_upstream()))
    write_tokenizer(folder)
    save_file(load_file(golden_folder("bagel") / "ae.safetensors"), folder / "ae.safetensors")
    state = weights(config)
    if shards == 1:
        save_file(state, folder / "ema.safetensors")
        return folder
    names = sorted(state)
    where = {
        name: f"ema-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "ema.safetensors.index.json").write_text(json.dumps(index))
    return folder
