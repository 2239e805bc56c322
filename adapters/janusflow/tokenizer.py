"""JanusFlow's words: a tokenizer of ``transformers``, and the marks around texts and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_unigrpo.adapters.common.conversation import END
from lightning_unigrpo.adapters.common.tokenizer import MarkedTokenizer, read_tokenizer

MARKS = {"bos": "<｜begin▁of▁sentence｜>", "eos": END, "end_of_image": "<end_of_image>"}
"""The marks' names where the files do not say."""


class JanusFlowTokenizer(MarkedTokenizer):
    """JanusFlow's tokenizer.

    Args:
        tokenizer: the real one.
        processor: ``processor_config.json``, which names the marks of pictures.

    Raises:
        ValueError: when a mark is no token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, processor: Mapping[str, Any] | None = None
    ) -> None:
        said = {
            "bos": tokenizer.bos_token,
            "eos": tokenizer.eos_token,
            "end_of_image": (processor or {}).get("image_end_tag"),
        }
        names = {key: str(name or MARKS[key]) for key, name in said.items()}
        hint = (
            "take tokenizer.json, tokenizer_config.json and processor_config.json from the same "
            "checkpoint."
        )
        super().__init__(tokenizer, names, hint=hint)
        if names["eos"] != END:
            raise ValueError(
                f"The tokenizer ends a text with {names['eos']}; JanusFlow's template with {END}: take "
                "its own tokenizer.json and tokenizer_config.json."
            )

    @classmethod
    def from_folder(
        cls, folder: Path, processor: Mapping[str, Any] | None = None
    ) -> JanusFlowTokenizer:
        """Read a tokenizer's files.

        Raises:
            FileNotFoundError: when there are none.
        """
        return cls(read_tokenizer(folder, key="adapter.source"), processor)
