"""The reward: how sure a small convolutional network is that the right digit was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_unigrpo.adapters.digits.images import load_digits

WEIGHTS = Path(__file__).parent / "weights"


class Classifier(nn.Module):
    """Two convolutions and two linear layers over ``[B, 1, 8, 8]`` in [-1, 1]."""

    def __init__(self, width: int = 24, hidden: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 16, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits ``[B, 10]``."""
        return cast(Tensor, self.head(self.features(pixels)))


def train_classifier(
    seed: int, *, width: int = 24, hidden: int = 64, noise: float = 0.3, epochs: int = 40
) -> Classifier:
    """Train on the 1437 training images with shifts and noise; seconds on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = load_digits("train")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(width, hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(64):
            batch = pixels[rows].unsqueeze(1)
            shift = int(torch.randint(-1, 2, (), generator=generator))
            batch = batch.roll(shift, -1) if shift else batch
            batch = batch + noise * torch.randn(batch.shape, generator=generator)
            loss = nn.functional.cross_entropy(model(batch), labels[rows], label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


class DigitReward:
    """Probability that a separately trained classifier gives to the right digit.

    Args:
        weights: a file of classifier weights; ``None`` = the shipped ones.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        state = load_file(weights or WEIGHTS / "classifier.safetensors")
        self.model = Classifier().eval().requires_grad_(False)
        self.model.load_state_dict({k: v.float() for k, v in state.items()})

    def __call__(self, *, images: Tensor, answer: Sequence[int], **columns: Any) -> Tensor:
        """Return ``[B]`` probabilities in [0, 1].

        Args:
            images: ``[B, 3, 8, 8]`` float32 in [0, 1].
            answer: B digits, from the prompts.
            columns: not looked at.
        """
        pixels = images[:, :1].float().cpu() * 2 - 1
        with torch.no_grad():
            probability = self.model(pixels).softmax(1)
        return cast(Tensor, probability.gather(1, torch.as_tensor(answer).unsqueeze(1)).squeeze(1))


class ReasoningReward:
    """1 when the first reasoning is exactly the right one, else 0; for the logs, with weight 0."""

    def __call__(
        self, *, completions: Sequence[str], reasoning: Sequence[str], **columns: Any
    ) -> list[float]:
        """Return one number per completion; each round's text is a line of it."""
        first = [completion.split("\n")[0] for completion in completions]
        return [float(c == r) for c, r in zip(first, reasoning, strict=True)]


def main() -> None:
    """Train the reward classifier and save it beside this file."""
    model = train_classifier(0)
    WEIGHTS.mkdir(exist_ok=True)
    save_file(
        {k: v.half() for k, v in model.state_dict().items()}, WEIGHTS / "classifier.safetensors"
    )


if __name__ == "__main__":
    main()
