"""Show-o2's words: the tokenizer of Qwen2.5 with four more marks."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_unigrpo.adapters.common.tokenizer import MarkedTokenizer, read_tokenizer

PAD = "[PAD]"
ADDED = ("<image>", "<|vid_start|>", "<|vid_end|>")
"""Plain tokens that upstream adds behind ``[PAD]``, in this order."""
MARKS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "begin_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


class ShowO2Tokenizer(MarkedTokenizer):
    """Qwen2.5's tokenizer.

    Args:
        tokenizer: Qwen2.5's; gets the marks that it lacks.

    Raises:
        ValueError: when a mark of Qwen2.5 is no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        hint = "give adapter.language the Qwen2.5-Instruct that the checkpoint was built from."
        super().__init__(tokenizer, MARKS, hint=hint)
        tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.add_tokens(list(ADDED))

    @classmethod
    def from_folder(cls, folder: Path) -> ShowO2Tokenizer:
        """Read a tokenizer's files.

        Raises:
            FileNotFoundError: when there are none.
        """
        return cls(read_tokenizer(folder, key="adapter.language"))
