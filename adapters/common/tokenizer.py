"""Tokenizers of ``transformers`` as adapters use them: ids of plain text, no template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class Tokenizer(Protocol):
    """What an adapter needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without marks but those written in it."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""


class MarkedTokenizer:
    """A tokenizer, and the ids of the marks that a layout is made of.

    Args:
        tokenizer: the real one.
        names: what an adapter calls a mark, to its token.
        hint: what to do where one is missing.

    Raises:
        ValueError: when a mark is no token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, names: Mapping[str, str], *, hint: str
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.names = dict(names)
        known = tokenizer.get_vocab()
        lacking = dict.fromkeys(name for name in self.names.values() if name not in known)
        if lacking:
            raise ValueError(f"The tokenizer lacks {', '.join(lacking)}: {hint}")

    @property
    def marks(self) -> dict[str, int]:
        """Ids of the marks."""
        known = self.tokenizer.get_vocab()
        return {key: known[name] for key, name in self.names.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; marks that are written in it are one id each."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def read_tokenizer(folder: Path, *, key: str) -> PreTrainedTokenizerBase:
    """Read a tokenizer's files.

    Not through the class that tokenizer_config.json names: transformers 5 would rebuild LlamaTokenizerFast
    with Llama's own splitting of words and ignore the one in tokenizer.json.

    Args:
        folder: where they are.
        key: the setting that named it, for the message.

    Raises:
        FileNotFoundError: when there are none.
    """
    try:
        found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileNotFoundError(
            f"{key} {folder} holds no tokenizer that transformers reads (tokenizer.json and "
            f"tokenizer_config.json): {error}"
        ) from error
    return found
