"""A tiny Janus-Pro in both published layouts: real file formats, a real tokenizer, random weights."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import JanusConfig, JanusForConditionalGeneration

from lightning_unigrpo.adapters.januspro.config import IMAGE, NAMES
from tests.published import SENTENCES

VOCABULARY = 320  # more than the tokenizer's: the release has spare rows, too
SIDE = 8
"""Pixels per side of a drawn picture; the tower reads twice that."""


def tokenizer() -> Tokenizer:
    """Train a byte-level tokenizer of a few merges; the marks are tokens of their own."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    found.train_from_iterator(SENTENCES, trainer)
    found.add_special_tokens([*NAMES.values(), IMAGE])
    return found


def config(**fields: Any) -> JanusConfig:
    words = tokenizer()
    ids = {key: words.token_to_id(name) for key, name in NAMES.items()}
    hidden = 32
    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 500.0,
            "rms_norm_eps": 1e-5,
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 64,  # one head: upstream's towers have heads of 64
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 16,
            "patch_size": 4,
            "mlp_ratio": 2.0,
            "projection_dim": hidden,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 40,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
        },
        image_token_id=words.token_to_id(IMAGE),
        **{"tie_word_embeddings": False, **fields},
    )


@lru_cache
def model() -> JanusForConditionalGeneration:
    """Return transformers' model, none of its weights neutral."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = JanusForConditionalGeneration(config()).eval()
        with torch.no_grad():
            for value in found.state_dict().values():
                value.add_(0.1 * torch.randn_like(value))
    return found


def write_checkpoint(folder: Path, *, shards: bool = False, **json_fields: Any) -> Path:
    """Write the layout of ``transformers``, by ``transformers``.

    Args:
        folder: where to.
        shards: several files with an index.
        json_fields: changes of ``config.json``.
    """
    model().save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    write_words(folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | json_fields))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "JanusImageProcessor",
                "size": {"height": 16, "width": 16},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "min_size": 4,
            }
        )
    )
    return folder


def write_words(folder: Path) -> None:
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 16384})
    )


TOWER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.projection_layer": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
HEADS = {
    "language_model": "language_model.model",
    "generation_embeddings": "gen_embed",
    "generation_head": "gen_head",
    "generation_aligner": "gen_aligner",
    "aligner": "aligner",
    "vqmodel": "gen_vision_model",
    "vision_model": "vision_model.vision_tower",
}


def original_name(name: str) -> str:
    """Return what upstream's code calls a tensor of ``transformers``, by upstream's modules."""
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    head, _, rest = name.removeprefix("model.").partition(".")
    inside = {
        "vision_model": in_the_tower,
        "vqmodel": in_the_vq_model,
        "generation_head": lambda rest: rest.replace("proj_out", "output_mlp_projector"),
        "generation_aligner": in_an_aligner,
        "aligner": in_an_aligner,
    }.get(head, lambda rest: rest)
    return f"{HEADS[head]}.{inside(rest)}"


def in_an_aligner(rest: str) -> str:
    return f"layers.{0 if rest.startswith('fc1') else 2}.{rest.rsplit('.', 1)[1]}"


def in_the_vq_model(rest: str) -> str:
    rest = re.sub(r"\b(up|down)\.(\d)\.", r"conv_blocks.\2.", rest).replace(".block.", ".res.")
    for number, part in enumerate(("block_1", "attn_1", "block_2")):
        rest = rest.replace(f"mid.{part}", f"mid.{number}")
    return rest


def in_the_tower(rest: str) -> str:
    last = rest.rsplit(".", 1)[1]
    if "position_embedding" in rest:
        return "pos_embed"
    if "patch_embedding" in rest:
        return f"patch_embed.proj.{last}"
    if rest.startswith("post_layernorm"):
        return f"norm.{last}"
    _, _, number, *inner = rest.split(".")
    return f"blocks.{number}.{TOWER['.'.join(inner[:-1])]}.{last}"


def original_state() -> dict[str, torch.Tensor]:
    """Return the weights as upstream lays them out, with what it never runs."""
    state = model().state_dict()
    found = {}
    for name, value in state.items():
        if "vision_model" in name and re.search(r"\.[qkv]_proj\.", name):
            continue
        found[original_name(name)] = value.clone()
    for layer in range(2):
        for kind in ("weight", "bias"):
            start = f"model.vision_model.encoder.layers.{layer}.self_attn"
            parts = [state[f"{start}.{p}_proj.{kind}"] for p in "qkv"]
            found[f"vision_model.vision_tower.blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    found["vision_model.vision_tower.pos_embed"].unsqueeze_(0)
    found["vision_model.vision_tower.attn_pool.latent"] = torch.ones(1, 1, 64)
    found["vision_model.vision_tower.attn_pool.kv.weight"] = torch.ones(128, 64)
    found["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    return found


def write_original(folder: Path, *, shards: int = 1) -> Path:
    """Write the original layout: pickled weights, and a ``config.json`` that leaves much to code."""
    folder.mkdir(parents=True, exist_ok=True)
    state = original_state()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        names = sorted(state)
        where = {n: f"pytorch_model-{i % shards}.bin" for i, n in enumerate(names)}
        for file in set(where.values()):
            torch.save({n: state[n] for n in names if where[n] == file}, folder / file)
        index = {"weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    language = {
        key: value
        for key, value in config().text_config.to_dict().items()
        if key
        in {
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
        }
    }
    vision = {"image_size": 16, "model_name": "siglip_large_patch16_384", "select_layer": -1}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "multi_modality",
                "language_config": {"model_type": "llama", "rope_theta": 500.0, **language},
                "vision_config": {"cls": "CLIPVisionTower", "params": vision},
                "gen_vision_config": {
                    "cls": "VQ-16",
                    "params": {"image_token_size": 40, "n_embed": 8},
                },
            }
        )
    )
    write_words(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "VLMImageProcessor",
                "image_size": 16,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "min_size": 4,
            }
        )
    )
    return folder
