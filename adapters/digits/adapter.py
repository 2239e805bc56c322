"""The embedded default: a small Bagel that answers questions by drawing digits."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_unigrpo.adapters.bagel import BagelAdapter, BagelConfig, BagelNet
from lightning_unigrpo.adapters.digits.classifier import WEIGHTS, DigitReward, ReasoningReward
from lightning_unigrpo.adapters.digits.images import GRID, PATCH, SIDE, patchify, to_rgb
from lightning_unigrpo.adapters.digits.task import WordTokenizer, prompts
from lightning_unigrpo.config import Objective, Optim, Sampling
from lightning_unigrpo.reward import Reward
from lightning_unigrpo.types import Defaults, Grid

CHECKPOINTS = ("base", "base1")
"""Shipped base models of two pretraining seeds."""
TWO_ROUNDS = "two_rounds"
"""Shipped base model that looks at its drawing and draws again."""
FILE = Path("model.safetensors")
"""What a saved model's folder holds."""


def digits_config() -> BagelConfig:
    """Return the sizes of the shipped models."""
    tokenizer = WordTokenizer()
    return BagelConfig(
        vocab_size=len(tokenizer.vocabulary),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_theta=100.0,
        z_channels=1,
        latent_patch_size=PATCH,
        latent_downsample=1,
        max_latent_size=GRID[0],
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        start_of_image=tokenizer.start_of_image,
        end_of_image=tokenizer.end_of_image,
    )


class DigitsAdapter(BagelAdapter):
    """Bagel's code at 0.4 million parameters, words for tokens and 4 x 4 pixels for latents.

    Args:
        checkpoint: ``base``, ``base1`` or ``two_rounds`` (shipped), a safetensors file or a folder with
            one, or ``None`` for random weights.
        detach_context: as in :class:`BagelAdapter`.
        gradient_checkpointing: as in :class:`BagelAdapter`.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = "base",
        *,
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            digits_config(),
            WordTokenizer(),
            default_size=(SIDE, SIDE),
            detach_context=detach_context,
            gradient_checkpointing=gradient_checkpointing,
        )
        if checkpoint is not None:
            load_checkpoint(self.net, checkpoint)

    tokenizer: WordTokenizer

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn ``[n, 8, 8]`` pixels in [-1, 1] into latents ``[n, 4, 16]``."""
        return patchify(pixels)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Return ``[B, 3, 8, 8]`` in [0, 1]."""
        return to_rgb(latents)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the weights as float16 safetensors that ``checkpoint`` reads.

        Args:
            path: a file that ends in ``.safetensors``, or a folder, which gets one.
        """
        file = Path(path)
        if file.suffix != FILE.suffix:
            file.mkdir(parents=True, exist_ok=True)
            file /= FILE
        state = {name: value.half().contiguous() for name, value in self.net.state_dict().items()}
        save_file(state, file, metadata={"config": json.dumps(vars(self.config))})

    def defaults(self) -> Defaults:
        """Return the arithmetic prompts, the classifier's reward, and settings that learn in a minute."""
        return Defaults(
            train=prompts("train"),
            val=prompts("dev"),
            test=prompts("test"),
            rewards=[
                Reward(DigitReward(), name="digit"),
                Reward(ReasoningReward(), name="reasoning", weight=0.0),
            ],
            sampling=Sampling(
                group_size=8,
                max_text_tokens=12,
                num_timesteps=10,
                schedule="steps",
                shift=1.0,
                eta=0.7,
                window_size=5,
                window_range=(0, 5),
                eval_num_timesteps=10,
            ),
            objective=Objective(flow_clip_low=1e-3, flow_clip_high=1e-3, mse_weight=0.004),
            optim=Optim(text_lr=3e-4, flow_lr=3e-4, ppo_epochs=1),
        )


def load_checkpoint(net: BagelNet, checkpoint: str | Path) -> None:
    """Fill a network from a shipped or given file.

    Raises:
        ValueError: when there is no such file, it cannot be read, or it holds another model: other
            tensors, or the same ones under other settings.
    """
    path, shipped = Path(checkpoint), (*CHECKPOINTS, TWO_ROUNDS)
    if str(checkpoint) in shipped:
        path = WEIGHTS / f"{checkpoint}.safetensors"
    elif path.is_dir():
        path /= FILE
    if not path.is_file():
        raise ValueError(
            f"adapter.checkpoint is {str(checkpoint)!r}: neither one of {', '.join(shipped)} nor a "
            f"safetensors file, nor a folder with {FILE} in it."
        )
    try:
        with safe_open(path, "pt") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = json.loads((file.metadata() or {}).get("config", "{}"))
    except SafetensorError as error:
        raise ValueError(
            f"adapter.checkpoint {path} is not a safetensors file: {error}."
        ) from error
    expected = net.state_dict()
    wrong = [
        f"  {name}: {_shape(given.get(name))} in the file, {_shape(expected.get(name))} in the model"
        for name in sorted(given.keys() | expected.keys())
        if _shape(given.get(name)) != _shape(expected.get(name))
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(
            f"adapter.checkpoint {path} holds another model; {len(wrong)} tensors differ:\n"
            + "\n".join(wrong[:8])
            + more
        )
    # Settings that no shape shows (rope_theta, the marks' ids) would change the model silently.
    settings = [
        f"  {name}: {written[name]} in the file, {value} in the model"
        for name, value in vars(net.config).items()
        if name in written and written[name] != value
    ]
    if settings:
        raise ValueError(
            f"adapter.checkpoint {path} was made with other settings:\n" + "\n".join(settings)
        )
    net.load_state_dict({name: value.float() for name, value in given.items()})


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(tuple(value.shape))
