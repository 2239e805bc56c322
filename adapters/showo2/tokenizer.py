"""Show-o2's words: the tokenizer of Qwen2.5 with four more marks."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD = "[PAD]"
ADDED = ("<image>", "<|vid_start|>", "<|vid_end|>")
"""Plain tokens that upstream adds behind ``[PAD]``, in this order."""
MARKS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "begin_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


class ShowO2Tokenizer:
    """A tokenizer as the adapter uses it: ids of plain text, no template.

    Args:
        tokenizer: Qwen2.5's; gets the marks that it lacks.

    Raises:
        ValueError: when a mark of Qwen2.5 is no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        lacking = [name for name in MARKS.values() if name not in known]
        if lacking:
            raise ValueError(
                f"The tokenizer lacks {', '.join(lacking)}: give adapter.language the Qwen2.5-Instruct that "
                "the checkpoint was built from."
            )
        tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.add_tokens(list(ADDED))

    @classmethod
    def from_folder(cls, folder: Path) -> ShowO2Tokenizer:
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
        """Ids of ``bos``, ``eos``, ``begin_of_image`` and ``end_of_image``."""
        known = self.tokenizer.get_vocab()
        return {key: known[name] for key, name in MARKS.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; marks that are written in it are one id each."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
