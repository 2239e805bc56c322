"""Sizes of a Show-o model, from its published ``config.json`` and that of its phi-1.5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PhiConfig

PHI, VQ = "microsoft/phi-1_5", "showlab/magvitv2"
"""What the published models were built from, and what draws their codes."""
ARGUMENTS = ("vocab_size", "llm_vocab_size", "codebook_size", "num_vq_tokens")
"""Fields of ``config.json`` that must be there."""
OWN = ("architectures", "use_cache", "qk_layernorm", "pad_token_id")
"""Fields of the language model's ``config.json`` that Show-o does not follow."""


@dataclass(frozen=True, kw_only=True)
class ShowOConfig:
    """A phi-1.5 whose vocabulary holds words, marks, codes of an image, and the mask, in this order.

    Source: Show-o, https://arxiv.org/abs/2408.12528; field names as in the published files.
    """

    language: Mapping[str, Any]
    """Fields of ``PhiConfig``."""
    llm_vocab_size: int = 50295
    """Words of the language model's tokenizer."""
    num_new_special_tokens: int = 10
    """``[PAD]`` and nine marks."""
    codebook_size: int = 8192
    num_vq_tokens: int = 256
    """Codes of an image, which is square."""
    bos: int = 50256
    """Opens a text."""
    eos: int = 50256
    """Ends a text."""
    pad: int = 50295
    begin_image: int = 50296
    """``<|soi|>``"""
    end_image: int = 50297
    """``<|eoi|>``"""
    task: int = 50300
    """``<|t2i|>``, at the very beginning of a context that is drawn."""

    @property
    def num_words(self) -> int:
        """Ids that a sampled text may have: words, no marks."""
        return self.llm_vocab_size

    @property
    def code_offset(self) -> int:
        """The id of code 0."""
        return self.llm_vocab_size + self.num_new_special_tokens

    @property
    def mask_id(self) -> int:
        """The id of a code that is not known yet, the last one."""
        return self.code_offset + self.codebook_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return self.mask_id + 1

    @property
    def side(self) -> int:
        """Codes in a row of an image."""
        return math.isqrt(self.num_vq_tokens)

    @classmethod
    def from_upstream(
        cls,
        found: Mapping[str, Any],
        language: Mapping[str, Any],
        marks: Mapping[str, int] | None = None,
    ) -> ShowOConfig:
        """Read ``config.json`` and that of the language model.

        Args:
            found: arguments of upstream's constructor.
            language: fields of ``PhiConfig``.
            marks: ids of ``bos``, ``eos``, ``pad``, ``begin_image``, ``end_image`` and ``task``; those of
                the release where they are not given.

        Raises:
            ValueError: when fields are missing, unsupported, or do not fit together.
        """
        missing = [name for name in ARGUMENTS if found.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: it is not that of a Show-o.")
        kind = language.get("model_type", "phi")
        if kind != "phi":
            raise ValueError(
                f"The language model's config.json has model_type {kind!r}; Show-o's is 'phi': give "
                f"adapter.language {PHI!r}."
            )
        if language.get("tie_word_embeddings"):
            raise ValueError(
                "The language model's config.json: tie_word_embeddings is true; only false is supported."
            )
        config = cls(
            language=dict(language),
            llm_vocab_size=found["llm_vocab_size"],
            num_new_special_tokens=found.get("num_new_special_tokens", 10),
            codebook_size=found["codebook_size"],
            num_vq_tokens=found["num_vq_tokens"],
            **(marks or {}),
        )
        config._require_sums(found)
        return config

    def _require_sums(self, found: Mapping[str, Any]) -> None:
        """Raise a ValueError where a number of ``config.json`` is not what the others make it."""
        if found["vocab_size"] != self.vocab_size:
            raise ValueError(
                f"config.json: vocab_size is {found['vocab_size']}, but llm_vocab_size "
                f"{self.llm_vocab_size}, num_new_special_tokens {self.num_new_special_tokens}, "
                f"codebook_size {self.codebook_size} and one mask make {self.vocab_size}."
            )
        if found.get("mask_token_id", self.mask_id) != self.mask_id:
            raise ValueError(
                f"config.json: mask_token_id is {found['mask_token_id']}; only the last id, "
                f"{self.mask_id}, is supported."
            )
        if self.side**2 != self.num_vq_tokens:
            raise ValueError(
                f"config.json: num_vq_tokens is {self.num_vq_tokens}, which is no square of a whole number."
            )

    def phi(self) -> PhiConfig:
        """Return the language model's configuration: its sizes, Show-o's vocabulary and Q/K norms."""
        known = {k: v for k, v in self.language.items() if k not in OWN}
        # No pad_token_id: torch would give that row of the embedding no gradient.
        return PhiConfig(**known | {"vocab_size": self.vocab_size, "qk_layernorm": True})


PHI_SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
}
"""Fields of phi-1.5's ``config.json``."""
SMALL = ShowOConfig(language=PHI_SIZES)
LARGE = ShowOConfig(language=PHI_SIZES, num_vq_tokens=1024)
RELEASES = {
    "showlab/show-o": SMALL,
    "showlab/show-o-512x512": LARGE,
    "showlab/show-o-w-clip-vit": SMALL,
    "showlab/show-o-w-clip-vit-512x512": LARGE,
}
"""Sizes of published models, for estimates without their files."""
