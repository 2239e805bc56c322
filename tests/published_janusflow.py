"""A tiny JanusFlow in the published layout: real file formats, a real tokenizer, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_unigrpo.adapters.common.conversation import END
from lightning_unigrpo.adapters.janusflow import JanusFlowConfig, JanusFlowNet
from lightning_unigrpo.adapters.janusflow.vision import DROPPED, JanusFlowVision
from tests.published import SENTENCES

BOS, PAD, SEEN = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<image_end>"
SIDE = 8
"""Pixels of a row of the decoder: the tiny autoencoder halves twice, a row has 2 x 2 latents."""
CONFIG: dict[str, Any] = {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": "bfloat16",
    "language_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0,
    },
    "vision_und_enc_config": {
        "cls": "CLIPVisionTower",
        "params": {
            "model_name": "tiny",
            "image_size": 32,
            "select_layer": -1,
            "width": 24,
            "layers": 2,
            "heads": 2,
            "patch_size": 8,
            "mlp_ratio": 2.0,
        },
    },
    "vision_gen_enc_config": {
        "cls": "ShallowUViTEncoder",
        "params": {
            "input_channels": 4,
            "stride": 2,
            "kernel_size": 2,
            "padding": 0,
            "block_out_channels": [16],
            "layers_in_middle": 1,
            "hidden_size": 32,
            "norm_eps": 1e-6,
            "use_bias": True,
        },
    },
    "vision_gen_dec_config": {
        "cls": "ShallowUViTDecoder",
        "params": {
            "in_channels": 16,
            "out_channels": 4,
            "block_out_channels": [16],
            "upsamples": 1,
            "layers_in_middle": 1,
            "hidden_size": 32,
            "norm_eps": 1e-6,
            "use_bias": True,
        },
    },
}
PROCESSOR = {"image_end_tag": SEEN, "image_start_tag": "<image_beg>", "num_image_tokens": 16}
PICTURES = {"image_size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.25]}


def weights() -> dict[str, torch.Tensor]:
    """Return every tensor of the file, none of them neutral, and those that are never run."""
    config = JanusFlowConfig.from_upstream(CONFIG)
    assert config.vision is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [JanusFlowNet(config), JanusFlowVision(config.vision, 32)]
        state = {name: value for part in parts for name, value in part.state_dict().items()}
        state = {
            name: value + 0.1 * torch.randn_like(value)
            if value.ndim == 1 or "channelwise_norm" in name or value.numel() == value[:1].numel()
            else value.clone()
            for name, value in state.items()
        }
        unread = {"latent": (1, 1, 24), "q.weight": (24, 24), "norm.bias": (24,)}
        return state | {DROPPED + name: torch.randn(shape) for name, shape in unread.items()}


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer of a few merges and write the published files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, END, PAD, "<image_beg>", SEEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": True,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(found))


def write_vae(folder: Path) -> Path:
    """Write a tiny autoencoder as diffusers does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(  # type: ignore[no-untyped-call]
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.13025,
        )
    vae.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def write_checkpoint(folder: Path, *, shards: int = 1, **language: Any) -> Path:
    """Write a tiny checkpoint as the release lays it out, its autoencoder in ``vae``.

    Args:
        folder: where to.
        shards: number of files for the weights; more than one get an index.
        language: changes of ``language_config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"language_config": CONFIG["language_config"] | language}
    for name, found in (
        ("config", config),
        ("processor_config", PROCESSOR),
        ("preprocessor_config", PICTURES),
    ):
        (folder / f"{name}.json").write_text(json.dumps(found))
    write_tokenizer(folder)
    write_vae(folder / "vae")
    state = weights()
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    names = sorted(state)
    where = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
