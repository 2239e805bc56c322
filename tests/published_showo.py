"""A tiny Show-o in the published layout: real file formats, a real tokenizer, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from lightning_unigrpo.adapters.showo.config import ShowOConfig
from lightning_unigrpo.adapters.showo.network import ShowONet
from lightning_unigrpo.adapters.showo.vq import Levels, ShowOVQ
from tests.published import SENTENCES

END_OF_TEXT = "<|endoftext|>"
SPACES = ("  ", "    ")
"""phi-1.5 has such tokens behind its words."""
MARKS = [
    "[PAD]",
    "<|soi|>",
    "<|eoi|>",
    "<|sov|>",
    "<|eov|>",
    "<|t2i|>",
    "<|mmu|>",
    "<|t2v|>",
    "<|v2v|>",
    "<|lvg|>",
]
"""In upstream's order."""
WORDS = 300
"""Of the tokenizer before the marks are added."""
BITS, CODES, SIDE = 5, 32, 4
STRIDE = 2
"""Pixels of a code, per side."""
PHI: dict[str, Any] = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "max_position_embeddings": 256,
    "rope_theta": 1000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": True,
    "torch_dtype": "float16",
}
CONFIG: dict[str, Any] = {
    "_class_name": "Showo",
    "_diffusers_version": "0.30.1",
    "w_clip_vit": False,
    "vocab_size": WORDS + len(MARKS) + CODES + 1,
    "llm_vocab_size": WORDS,
    "llm_model_path": "microsoft/phi-1_5",
    "codebook_size": CODES,
    "num_vq_tokens": SIDE**2,
    "num_new_special_tokens": len(MARKS),
    "load_from_showo": True,
    "mask_token_id": WORDS + len(MARKS) + CODES,
}
VQ_SIZES: dict[str, Any] = {
    "base": 32,
    "encoder": Levels((1, 1), (1, 2)),
    "decoder": Levels((1, 1), (2, 1)),
    "bits": BITS,
}


def random(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return float32 weights that keep activations about 1, none of them neutral."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, value in shapes.items():
        draw = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            draw /= value[0].numel() ** 0.5
        else:
            draw = 0.1 * draw + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        found[name] = draw
    return found


def weights(*, projector: bool = False) -> dict[str, Tensor]:
    """Return every tensor of the network's file."""
    with torch.device("meta"):
        net = ShowONet(ShowOConfig.from_upstream(CONFIG, PHI))
    found = random(net.state_dict())
    if projector:
        for number, (width_in, width) in {0: (24, 32), 2: (32, 32)}.items():
            found[f"mm_projector.{number}.weight"] = torch.randn(width, width_in)
            found[f"mm_projector.{number}.bias"] = torch.randn(width)
    return found


def vq_weights(bits: int = BITS) -> dict[str, Tensor]:
    """Return every tensor of the VQ model's file, the two tables included."""
    with torch.device("meta"):
        vq = ShowOVQ(**VQ_SIZES | {"bits": bits})
    powers = 2 ** torch.arange(bits - 1, -1, -1)
    table = (torch.arange(1 << bits).unsqueeze(1) & powers).bool().float() * 2 - 1
    return random(vq.state_dict()) | {"quantize.embedding": table, "quantize.power_vals": powers}


def write_language(folder: Path, **changes: Any) -> Path:
    """Write what is read of a phi-1.5: sizes, and a byte-level tokenizer of a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PHI | changes))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - len(SPACES),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.add_tokens([AddedToken(spaces, normalized=True) for spaces in SPACES])
    assert tokenizer.get_vocab_size() == WORDS
    tokenizer.save(str(folder / "tokenizer.json"))
    found = {
        "tokenizer_class": "CodeGenTokenizer",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(found))
    return folder


def write_tensors(state: dict[str, Tensor], folder: Path, name: str, *, shards: int = 1) -> None:
    """Write weights under a name, as ``torch.save`` or safetensors by its end; several get an index."""
    stem, _, end = name.rpartition(".")
    names = sorted(state)
    where = {}
    for number in range(1, shards + 1):
        part = {each: state[each] for each in names[number - 1 :: shards]}
        file = name if shards == 1 else f"{stem}-{number:05}-of-{shards:05}.{end}"
        where |= dict.fromkeys(part, file)
        if end == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / f"{name}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )


def write_vq(folder: Path, name: str = "pytorch_model.bin", *, bits: int = BITS) -> Path:
    """Write a tiny MAGVIT-v2, whose configuration says nothing of sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2"}))
    write_tensors(vq_weights(bits), folder, name)
    return folder


def write_checkpoint(
    folder: Path,
    *,
    name: str = "pytorch_model.bin",
    shards: int = 1,
    projector: bool = False,
    **changes: Any,
) -> Path:
    """Write a tiny checkpoint as the release lays it out; beside it ``language`` and ``vq``.

    Args:
        folder: where to.
        name: of the file of weights; its end says the format.
        shards: number of files for the weights; more than one get an index.
        projector: whether it is a model that read CLIP features.
        changes: of ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"w_clip_vit": projector} | changes))
    write_language(folder / "language")
    write_vq(folder / "vq")
    write_tensors(weights(projector=projector), folder, name, shards=shards)
    return folder
