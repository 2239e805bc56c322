"""A Show-o2 of the digits' size, trained on two ranks: what ``tests/test_showo2_ranks.py`` starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_unigrpo.adapters.digits.images import SIDE
from lightning_unigrpo.adapters.digits.task import WordTokenizer
from lightning_unigrpo.adapters.showo2 import ShowO2Adapter, ShowO2Config
from lightning_unigrpo.adapters.showo2.config import FlowConfig, SemanticConfig
from lightning_unigrpo.types import Grid, Prompt, Segment, TextSegment
from tests import rank_cases
from tests.ranks import CPUFSDPStrategy

VOCABULARY = len(WordTokenizer().vocabulary)


class Digits(ShowO2Adapter):
    """Latents are the 64 pixels of a digit, in sixteen rows; a question is words behind ``bos``."""

    def __init__(self, *, tied: bool = True) -> None:
        tokenizer = WordTokenizer()
        language = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 100.0,
            "tie_word_embeddings": tied,
        }
        config = ShowO2Config(
            language=language,
            semantic=SemanticConfig(width=24, layers=1, heads=2, mlp_width=32, side=4),
            flow=FlowConfig(width=48, layers=2, heads=3, key_heads=1, head_dim=16, mlp_width=64),
            latent_channels=1,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            begin_of_image=tokenizer.start_of_image,
            end_of_image=tokenizer.end_of_image,
        )
        super().__init__(config, tokenizer)

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        ids = [self.tokenizer.bos, *self.tokenizer.encode(prompt.text)]
        return [TextSegment(tokens=torch.tensor(ids, dtype=torch.long, device=self.device))]

    def image_grid(self, prompt: Prompt) -> Grid:
        return SIDE, SIDE

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        grey = latents.squeeze(2).unflatten(1, grid)
        return ((grey + 1) / 2).clamp(0, 1).unsqueeze(1).expand(-1, 3, -1, -1)


CASES = {
    key: replace(
        rank_cases.CASES["janusflow"],
        build=lambda folder, tied=tied: rank_cases.seeded(lambda: Digits(tied=tied)),
        sampling=sampling,
    )
    for key, tied, sampling in (
        ("one round", False, {}),
        ("two rounds", True, {"plan": ("text", "image", "text", "image"), "max_text_tokens": 6}),
    )
}


def rollouts(folder: Path) -> None:
    """Draw with whole and with sharded weights, in both precisions."""
    for strategy in ("fsdp", "fsdp2"):
        for precision in ("32-true", "bf16-mixed"):
            for mode in ("resident", "sharded"):
                settings: dict[str, Any] = {"precision": precision}
                if strategy == "fsdp" and precision == "bf16-mixed":
                    settings["strategy"] = CPUFSDPStrategy(mixed_precision=rank_cases.BFLOAT16)
                case = CASES["two rounds"]
                _, record = rank_cases.run(
                    case, strategy, folder, iterations=1, mode=mode, trainer=settings
                )
                name = f"{strategy}/{precision}/{mode}"
                torch.save(record._replace(before={}, after={}), rank_cases.file_of(folder, name))


def trained(folder: Path, *names: str) -> None:
    """Train cases, each named ``strategy/case/mode``, on what one process drew."""
    for name in names:
        strategy, key, mode = name.split("/")
        drawn = torch.load(folder / f"{key}.pt", weights_only=False)[0]
        _, record = rank_cases.run(CASES[key], strategy, folder, mode=mode, given=drawn)
        torch.save(record, rank_cases.file_of(folder, name))
