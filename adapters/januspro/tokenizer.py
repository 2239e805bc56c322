"""Janus-Pro's words, from ``tokenizer.json`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lightning_unigrpo.adapters.januspro.config import IMAGE, NAMES, Marks

FILE = "tokenizer.json"


class JanusProTokenizer:
    """A tokenizer as the adapter uses it: ids of text, no template.

    Not through ``transformers``, which would first look for a model that ``config.json`` names.

    Args:
        tokenizer: of ``tokenizer.json``.

    Raises:
        ValueError: when a mark is no token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = (*NAMES.values(), IMAGE)
        lacking = [name for name in names if tokenizer.token_to_id(name) is None]
        if lacking:
            raise ValueError(
                f"{FILE} has no token {', '.join(lacking)}: take the file of a Janus-Pro checkpoint."
            )

    @classmethod
    def from_folder(cls, folder: Path) -> JanusProTokenizer:
        """Read the file.

        Raises:
            FileNotFoundError: when it is missing.
            ValueError: when it cannot be read.
        """
        if not (folder / FILE).is_file():
            raise FileNotFoundError(f"adapter.source {folder} holds no {FILE}.")
        try:
            found = Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # the package raises bare exceptions
            raise ValueError(f"{folder / FILE} cannot be read: {error}") from error
        return cls(found)

    @property
    def marks(self) -> Marks:
        """Ids of the special tokens."""
        return Marks(**{key: self.tokenizer.token_to_id(name) for key, name in NAMES.items()})

    @property
    def image_token(self) -> int:
        """Id of the placeholder of a picture, which ``transformers`` wants to know."""
        return int(self.tokenizer.token_to_id(IMAGE))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; marks that are written in it are one id each."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, marks left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
