"""Show-o's words: the tokenizer of phi-1.5 with ten more marks."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_unigrpo.adapters.showo.config import PHI

END_OF_TEXT = "<|endoftext|>"
PAD = "[PAD]"
ADDED = (
    "<|soi|>",
    "<|eoi|>",
    "<|sov|>",
    "<|eov|>",
    "<|t2i|>",
    "<|mmu|>",
    "<|t2v|>",
    "<|v2v|>",
    "<|lvg|>",
)
"""Plain tokens that upstream adds behind ``[PAD]``, in this order."""
MARKS = {
    "bos": END_OF_TEXT,
    "eos": END_OF_TEXT,
    "pad": PAD,
    "begin_image": "<|soi|>",
    "end_image": "<|eoi|>",
    "task": "<|t2i|>",
}


class ShowOTokenizer:
    """A tokenizer as the adapter uses it: ids of plain text, no template.

    Args:
        tokenizer: phi-1.5's; gets the marks that it lacks.

    Raises:
        ValueError: when it has no end of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if END_OF_TEXT not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer lacks {END_OF_TEXT}: give adapter.language the phi-1.5 that the checkpoint "
                f"was built from, {PHI!r}."
            )
        tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.add_tokens(list(ADDED))
        self.num_words = tokenizer.get_vocab()[PAD]
        """Ids below it are no marks of Show-o's."""

    @classmethod
    def from_folder(cls, folder: Path) -> ShowOTokenizer:
        """Read a tokenizer's files.

        Raises:
            FileNotFoundError: when there are none.
        """
        try:
            found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileNotFoundError(
                f"adapter.language {folder} holds no tokenizer that transformers reads (tokenizer.json and "
                f"tokenizer_config.json): {error}"
            ) from error
        return cls(found)

    @property
    def marks(self) -> dict[str, int]:
        """Ids of ``bos``, ``eos``, ``pad``, ``begin_image``, ``end_image`` and ``task``."""
        known = self.tokenizer.get_vocab()
        return {key: known[name] for key, name in MARKS.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; marks that are written in it are one id each."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, marks left out."""
        # Upstream's marks are plain tokens, which transformers would not skip.
        words = [word for word in ids if word < self.num_words]
        # Files of phi-1.5 ask for a clean-up of spaces, which were said; transformers warns of it.
        return str(
            self.tokenizer.decode(
                words, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
