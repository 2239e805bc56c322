"""Sizes and special tokens of a Janus-Pro model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import JanusConfig


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Ids of the special tokens."""

    bos: int
    """Begins every context."""
    eos: int
    """Ends a sampled text, and a turn of the assistant."""
    pad: int
    """Stands for each id of the request in a context without it."""
    begin_image: int
    """Before a picture's codes, or its features."""
    end_image: int
    """Behind the features of a picture that is looked at."""


NAMES = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "begin_image": "<begin_of_image>",
    "end_image": "<end_of_image>",
}
"""How the tokenizer calls them."""
IMAGE = "<image_placeholder>"
"""Where a picture stands in a written prompt."""
RELEASED_MARKS = Marks(bos=100000, eos=100001, pad=100015, begin_image=100016, end_image=100593)
"""For estimates without files; a checkpoint's are its tokenizer's."""


def released(hidden_size: int, intermediate_size: int, num_layers: int, heads: int) -> JanusConfig:
    """Return the configuration of a published model: its decoder, and the defaults for the rest."""
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 102400,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
    }
    return JanusConfig(
        text_config=text,
        vision_config={"projection_dim": hidden_size},
        vq_config={"projection_dim": hidden_size, "image_token_embed_dim": hidden_size},
        tie_word_embeddings=False,
    )


SIZES = {"1B": (2048, 5632, 24, 16), "7B": (4096, 11008, 30, 32)}
RELEASES = {
    f"{owner}/Janus-Pro-{name}": sizes
    for owner in ("deepseek-community", "deepseek-ai")
    for name, sizes in SIZES.items()
}
"""Arguments of :func:`released` of published models, for estimates without their files."""
