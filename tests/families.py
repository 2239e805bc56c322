"""Other backbones at the size of the digits model, for tests and for ``benchmarks/families.py``.

Published architectures with the words and pictures of :mod:`lightning_unigrpo.adapters.digits`: no template,
no tower, and a decoder of images that needs no training.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import JanusConfig

from lightning_unigrpo.adapters.digits.images import SIDE, load_digits
from lightning_unigrpo.adapters.digits.task import WordTokenizer
from lightning_unigrpo.adapters.janusflow import JanusFlowAdapter
from lightning_unigrpo.adapters.janusflow.config import FlowConfig, JanusFlowConfig
from lightning_unigrpo.adapters.januspro import JanusProAdapter
from lightning_unigrpo.adapters.januspro.config import Marks
from lightning_unigrpo.adapters.showo import ShowOAdapter, ShowOConfig
from lightning_unigrpo.adapters.showo2 import ShowO2Adapter
from lightning_unigrpo.adapters.showo2.config import FlowConfig as TwoStackFlow
from lightning_unigrpo.adapters.showo2.config import SemanticConfig, ShowO2Config
from lightning_unigrpo.types import Grid, Prompt, Segment, TextSegment

WIDTH, CODES, CELL = 64, 32, 2
VOCABULARY = len(WordTokenizer().vocabulary)
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_theta": 100.0,
}


def question(adapter: Any, prompt: Prompt) -> list[Segment]:
    """Return the words of a question behind ``bos``."""
    ids = [adapter.tokenizer.bos, *adapter.tokenizer.encode(prompt.text)]
    return [TextSegment(tokens=torch.tensor(ids, dtype=torch.long, device=adapter.device))]


def rgb(grey: Tensor) -> Tensor:
    """Return ``[B, 3, 8, 8]`` in [0, 1] of ``[B, 8, 8]`` in [-1, 1]."""
    return ((grey + 1) / 2).clamp(0, 1).unsqueeze(1).expand(-1, 3, -1, -1)


class FlowDigits(JanusFlowAdapter):
    """JanusFlow whose latents are the 64 pixels of a digit, in sixteen rows of the decoder."""

    tokenizer: WordTokenizer

    def __init__(self) -> None:
        tokenizer = WordTokenizer()
        flow = FlowConfig(
            latent_channels=1,
            encoder_width=32,
            encoder_blocks=1,
            encoder_eps=1e-6,
            kernel_size=2,
            stride=2,
            padding=0,
            decoder_channels=32,
            decoder_blocks=2,
            decoder_eps=1e-6,
            upsamples=1,
        )
        config = JanusFlowConfig(
            language=LLAMA,
            flow=flow,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            end_of_image=tokenizer.end_of_image,
        )
        super().__init__(config, tokenizer)

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        return question(self, prompt)

    def image_grid(self, prompt: Prompt) -> Grid:
        return SIDE, SIDE

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents ``[n, 64, 1]`` of ``[n, 8, 8]`` pixels."""
        return pixels.flatten(1).unsqueeze(2)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        return rgb(latents.squeeze(2).unflatten(1, grid))


class TwoStackDigits(ShowO2Adapter):
    """Show-o2 whose latents are the 64 pixels of a digit, in sixteen rows of both stacks."""

    tokenizer: WordTokenizer

    def __init__(self) -> None:
        tokenizer = WordTokenizer()
        config = ShowO2Config(
            language=LLAMA | {"num_hidden_layers": 2, "tie_word_embeddings": False},
            semantic=SemanticConfig(width=32, layers=1, heads=2, mlp_width=64, side=4),
            flow=TwoStackFlow(
                width=WIDTH, layers=2, heads=4, key_heads=4, head_dim=16, mlp_width=128
            ),
            latent_channels=1,
            patch_size=CELL,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            begin_of_image=tokenizer.start_of_image,
            end_of_image=tokenizer.end_of_image,
        )
        super().__init__(config, tokenizer)

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        return question(self, prompt)

    def image_grid(self, prompt: Prompt) -> Grid:
        return SIDE, SIDE

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents ``[n, 64, 1]`` of ``[n, 8, 8]`` pixels."""
        return pixels.flatten(1).unsqueeze(2)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        return rgb(latents.squeeze(2).unflatten(1, grid))


@lru_cache
def codebook() -> Tensor:
    """Return the ``[32, 4]`` cells of 2 x 2 pixels that stand for those of the training digits."""
    from sklearn.cluster import KMeans

    found = cells(load_digits("train").pixels).flatten(0, 1)
    means = KMeans(CODES, n_init=1, random_state=0).fit(found.numpy())
    return torch.from_numpy(means.cluster_centers_).float()


def cells(pixels: Tensor) -> Tensor:
    """Cut ``[n, 8, 8]`` pixels into ``[n, 16, 4]`` cells."""
    num = SIDE // CELL
    return (
        pixels.unflatten(1, (num, CELL))
        .unflatten(3, (num, CELL))
        .transpose(2, 3)
        .flatten(3)
        .flatten(1, 2)
    )


class Cells:
    """Pictures as sixteen codes, each a cell of 2 x 2 pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Return codes ``[n, 16]`` of ``[n, 8, 8]`` pixels."""
        return torch.cdist(cells(pixels), codebook()).argmin(2)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Return ``[B, 3, 8, 8]`` in [0, 1] of codes ``[B, 16]``."""
        found = codebook().to(latents.device)[latents].unflatten(1, grid)
        parts = found.unflatten(3, (CELL, CELL)).transpose(2, 3)
        return rgb(parts.flatten(3, 4).flatten(1, 2))


class CodeDigits(Cells, JanusProAdapter):
    """Janus-Pro that draws those codes one after the other."""

    tokenizer: WordTokenizer

    def __init__(self) -> None:
        tokenizer = WordTokenizer()
        vq = {
            "num_embeddings": CODES,
            "embed_dim": 8,
            "projection_dim": WIDTH,
            "image_token_embed_dim": WIDTH,
            "channel_multiplier": (1, 1),
        }
        vision = {
            "image_size": SIDE,
            "patch_size": CELL,
            "projection_dim": WIDTH,
            "num_image_tokens": (SIDE // CELL) ** 2,
        }
        config = JanusConfig(
            text_config=LLAMA | {"model_type": "llama", "tie_word_embeddings": False},
            vision_config=vision,
            vq_config=vq,
            tie_word_embeddings=False,
        )
        marks = Marks(
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            pad=tokenizer.eos,
            begin_image=tokenizer.start_of_image,
            end_image=tokenizer.end_of_image,
        )
        super().__init__(config, tokenizer, marks=marks)

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        return question(self, prompt)


class Spelling(WordTokenizer):
    """Reads words and reasonings alike, as a prompt and its reasoning are tokenised again together."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of words; what is no word is spelled, if it can be."""
        found = []
        for word in text.split():
            spelled = word not in self.ids and set(word) <= set(self.characters)
            found += self.encode_reasoning(word) if spelled else super().encode(word)
        return found


class MaskedDigits(Cells, ShowOAdapter):
    """Show-o that unmasks those codes some at a time."""

    tokenizer: WordTokenizer

    def __init__(self) -> None:
        tokenizer = Spelling()
        phi = {k: v for k, v in LLAMA.items() if k != "vocab_size"}
        config = ShowOConfig(
            language=phi | {"partial_rotary_factor": 0.5},
            llm_vocab_size=VOCABULARY,
            codebook_size=CODES,
            num_vq_tokens=(SIDE // CELL) ** 2,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            pad=VOCABULARY,
            begin_image=VOCABULARY + 1,
            end_image=VOCABULARY + 2,
            task=VOCABULARY + 5,
        )
        super().__init__(config, tokenizer, max_prompt_tokens=40)
