"""Bagel's words: the Qwen2 tokenizer, with the marks that open and close texts and images."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_unigrpo.adapters.bagel.checkpoint import MARKS


class BagelTokenizer:
    """A tokenizer of ``transformers`` as the adapter uses it: ids of plain text, no template.

    Args:
        tokenizer: the real one; marks it lacks are added.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        lacking = [mark for mark in MARKS.values() if mark not in known]
        # Known ones too: they may be in the vocabulary and yet be split like any text.
        tokenizer.add_tokens(list(MARKS.values()), special_tokens=True)
        now = tokenizer.get_vocab()
        moved = [
            mark for mark in MARKS.values() if mark not in lacking and now[mark] != known[mark]
        ]
        if moved:
            raise ValueError(
                f"The tokenizer gave new ids to {', '.join(moved)}; use its original files."
            )

    @classmethod
    def from_folder(cls, folder: Path) -> BagelTokenizer:
        """Read a tokenizer's files.

        Raises:
            FileNotFoundError: when there are none.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, TypeError) as error:
            raise FileNotFoundError(
                f"adapter.source {folder} holds no tokenizer that transformers reads (tokenizer.json, or "
                f"vocab.json and merges.txt): {error}"
            ) from error

    @property
    def marks(self) -> dict[str, int]:
        """Ids of the special tokens, by the names of :data:`MARKS`."""
        known = self.tokenizer.get_vocab()
        return {name: known[mark] for name, mark in MARKS.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without marks."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
