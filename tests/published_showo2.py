"""A tiny Show-o2 in the published layout: real file formats, a real tokenizer, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_unigrpo.adapters.showo2 import ShowO2Config, ShowO2Net
from lightning_unigrpo.adapters.showo2.checkpoint import EMBEDDING, HEAD
from tests.published import SENTENCES

END_OF_TEXT, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
BEGIN, END = "<|vision_start|>", "<|vision_end|>"
ADDED = ("[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>")
WORDS = 300
"""Of the tokenizer before four marks are added."""
SIDE = 8
"""Pixels of a row: the tiny autoencoder halves twice, a row has 2 x 2 latents."""
MEAN, STD = [0.3, -0.2, 0.1, -0.4], [1.5, 0.7, 2.0, 1.1]
LANGUAGE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 28,
    "attention_dropout": 0.0,
    "torch_dtype": "bfloat16",
}
CONFIG: dict[str, Any] = {
    "_class_name": "Showo2Qwen2_5",
    "_diffusers_version": "0.31.0",
    "llm_vocab_size": WORDS + len(ADDED),
    "llm_model_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "load_from_showo": True,
    "image_latent_dim": 4,
    "image_latent_height": 4,
    "image_latent_width": 4,
    "patch_size": 2,
    "hidden_size": 32,
    "clip_latent_dim": 24,
    "num_diffusion_layers": 2,
    "add_time_embeds": True,
    "add_qk_norm": True,
    "siglip_vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    },
    "diffusion_head_config": {
        "hidden_size": 48,
        "head_dim": 16,
        "intermediate_size": 64,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
}


def weights(*, tied: bool = True) -> dict[str, torch.Tensor]:
    """Return every tensor of the file, none of them neutral."""
    config = ShowO2Config.from_upstream(CONFIG, LANGUAGE | {"tie_word_embeddings": tied})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {
            name: value + 0.1 * torch.randn_like(value) if value.ndim == 1 else value.clone()
            for name, value in ShowO2Net(config).state_dict().items()
        }
    if tied:
        state[HEAD] = state[EMBEDDING].clone()
    return state


def write_language(folder: Path, **changes: Any) -> Path:
    """Write what is read of a Qwen2.5: sizes, and a byte-level tokenizer of a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LANGUAGE | changes))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=[END_OF_TEXT, BOS, EOS, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return folder


def write_vae(folder: Path) -> Path:
    """Write a tiny autoencoder as diffusers does, in a pipeline's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=MEAN,
            latents_std=STD,
            scale_factor_spatial=4,
        )
    vae.save_pretrained(folder / "vae")
    return folder


def write_checkpoint(
    folder: Path, *, shards: int = 1, pickled: bool = True, tied: bool = True, **changes: Any
) -> Path:
    """Write a tiny checkpoint as the release lays it out; beside it ``language`` and ``pipeline``.

    Args:
        folder: where to.
        shards: number of files for the weights; more than one get an index.
        pickled: as upstream does; otherwise safetensors.
        tied: whether the head is the embedding.
        changes: of ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_language(folder / "language", tie_word_embeddings=tied)
    write_vae(folder / "pipeline")
    state = weights(tied=tied)
    stem, end = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    where = {}
    for i, part in enumerate(parts, 1):
        file = f"{stem}.{end}" if shards == 1 else f"{stem}-{i:05}-of-{shards:05}.{end}"
        where |= dict.fromkeys(part, file)
        tensors = {name: state[name] for name in part}
        if pickled:
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder
