"""JanusFlow's words: a tokenizer of ``transformers``, and the marks around texts and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_unigrpo.adapters.common.conversation import END

MARKS = {"bos": "<｜begin▁of▁sentence｜>", "eos": END, "end_of_image": "<end_of_image>"}
"""The marks' names where the files do not say."""


class JanusFlowTokenizer:
    """A tokenizer as the adapter uses it: ids of plain text, no template.

    Args:
        tokenizer: the real one.
        processor: ``processor_config.json``, which names the marks of pictures.

    Raises:
        ValueError: when a mark is no token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, processor: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        names = {
            "bos": tokenizer.bos_token,
            "eos": tokenizer.eos_token,
            "end_of_image": (processor or {}).get("image_end_tag"),
        }
        self.names = {key: str(name or MARKS[key]) for key, name in names.items()}
        known = tokenizer.get_vocab()
        lacking = [name for name in self.names.values() if name not in known]
        if lacking:
            raise ValueError(
                f"The tokenizer lacks {', '.join(lacking)}: take tokenizer.json, tokenizer_config.json and "
                "processor_config.json from the same checkpoint."
            )
        if self.names["eos"] != END:
            raise ValueError(
                f"The tokenizer ends a text with {self.names['eos']}; JanusFlow's template with {END}: take "
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
        try:
            # Not the class that tokenizer_config.json names: transformers 5 would rebuild LlamaTokenizerFast
            # with Llama's own splitting of words and ignore the one in tokenizer.json.
            found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileNotFoundError(
                f"adapter.source {folder} holds no tokenizer that transformers reads (tokenizer.json and "
                f"tokenizer_config.json): {error}"
            ) from error
        return cls(found, processor)

    @property
    def marks(self) -> dict[str, int]:
        """Ids of ``bos``, ``eos`` and ``end_of_image``."""
        known = self.tokenizer.get_vocab()
        return {key: known[name] for key, name in self.names.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; marks that are written in it are one id each."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
