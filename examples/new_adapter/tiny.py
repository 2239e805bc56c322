"""A release of Emu3 that is small enough for a CPU: random weights, a byte-level tokenizer, real classes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Emu3Config, Emu3ForConditionalGeneration, PreTrainedTokenizerFast

MARKS = ["<|extra_200|>", "<|extra_201|>", "<|extra_203|>", "<|extra_204|>"]
MARKS += ["<|image token|>", "<|image start|>", "<|image end|>"]
NUM_CODES = 16


def tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, then the marks, then the codes: in the order of the published vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([*MARKS, *(f"<|visual token {i:06d}|>" for i in range(NUM_CODES))])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token=MARKS[2], eos_token=MARKS[3])


def write_release(folder: str | Path, seed: int = 0) -> None:
    """Write config, weights and tokenizer as a published folder holds them."""
    words = tokenizer()
    config = Emu3Config(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vq_config={
            "codebook_size": NUM_CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map=words.get_vocab(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Emu3ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
