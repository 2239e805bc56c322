"""Tiny CLIPs in the published layouts, and open_clip's network written out."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from string import ascii_lowercase, digits

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

WIDTH, TALL, SHARED, IMAGE, PATCH, LENGTH, LAYERS = 16, 24, 12, 32, 8, 77, 2
"""Of texts, of images, of both; pixels, pixels of a patch, tokens, layers."""


def tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer without any merge: a token is a letter, another one at the end of a word."""
    letters = [*ascii_lowercase, *digits]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def config(**changes: int) -> CLIPConfig:
    words = tokenizer()
    common = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "vocab_size": len(words),
        "max_position_embeddings": LENGTH,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {
        "hidden_size": TALL,
        "intermediate_size": 4 * TALL,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }
    return CLIPConfig(
        text_config=text | common | changes, vision_config=vision | common, projection_dim=SHARED
    )


def disturb(model: nn.Module, seed: int = 0) -> None:
    """Draw every weight anew: fresh towers see nearly the same in all images."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = noise + (1 if id(parameter) in norms else 0)


def write_processor(folder: Path) -> Path:
    tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    ).save_pretrained(folder)
    return folder


def write_clip(folder: Path, **changes: int) -> Path:
    """Write a tiny CLIP as transformers does; ``changes`` are of the text tower's settings."""
    model = CLIPModel(config(**changes))
    disturb(model)
    nn.init.constant_(model.logit_scale, math.log(50))
    model.save_pretrained(folder)
    return write_processor(folder)


def reference(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


def inputs(folder: Path, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Return what the model reads, each text alone and unpadded, images as 8 bits."""
    bytes_ = (images * 255).round().byte()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(list(bytes_), return_tensors="pt")
    words = CLIPTokenizer.from_pretrained(folder)
    tokens = [torch.tensor([words(prompt).input_ids]) for prompt in prompts]
    return {"pixels": pixels.pixel_values, "tokens": tokens}


class Block(nn.Module):
    """A layer of open_clip, with its names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        inner = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(inner))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    """Layers of open_clip, with their names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """The image tower of open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(TALL))
        self.positional_embedding = nn.Parameter(torch.zeros((IMAGE // PATCH) ** 2 + 1, TALL))
        self.proj = nn.Parameter(torch.zeros(TALL, SHARED))
        self.conv1 = nn.Conv2d(3, TALL, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(TALL), nn.LayerNorm(TALL)
        self.transformer = Stack(TALL)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """open_clip's CLIP: https://github.com/mlfoundations/open_clip/blob/v2.24.0/src/open_clip/model.py."""

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.text_projection = nn.Parameter(torch.zeros(WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.visual, self.transformer = Visual(), Stack(WIDTH)
        self.token_embedding = nn.Embedding(len(tokenizer()), WIDTH)
        self.ln_final = nn.LayerNorm(WIDTH)
        disturb(self)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return ``[B, E]`` of ``[B, L]``, read where the largest id, the end mark, stands."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
