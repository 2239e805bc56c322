"""Show-o's words: the tokenizer of phi-1.5 with ten more marks."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_unigrpo.adapters.common.tokenizer import MarkedTokenizer, read_tokenizer
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


class ShowOTokenizer(MarkedTokenizer):
    """phi-1.5's tokenizer.

    Args:
        tokenizer: phi-1.5's; gets the marks that it lacks.

    Raises:
        ValueError: when it has no end of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.add_tokens(list(ADDED))
        hint = f"give adapter.language the phi-1.5 that the checkpoint was built from, {PHI!r}."
        super().__init__(tokenizer, MARKS, hint=hint)
        self.num_words = tokenizer.get_vocab()[PAD]
        """Ids below it are no marks of Show-o's."""

    @classmethod
    def from_folder(cls, folder: Path) -> ShowOTokenizer:
        """Read a tokenizer's files.

        Raises:
            FileNotFoundError: when there are none.
        """
        return cls(read_tokenizer(folder, key="adapter.language"))

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
