"""Sizes of JPEG files against Pillow's, written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_unigrpo.reward import Reward, RewardRunner
from lightning_unigrpo.rewards import JPEGCompressibility, JPEGIncompressibility
from lightning_unigrpo.types import Prompt, Trajectory


def picture(roughness: float, size: int = 40) -> torch.Tensor:
    noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    return 0.5 + (noise - 0.5) * roughness


def size_on_disk(image: torch.Tensor, path: Path, quality: int) -> int:
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=quality)
    return path.stat().st_size


@pytest.mark.parametrize("quality", [95, 50])
def test_sizes_are_those_of_files(quality: int, tmp_path: Path) -> None:
    images = [picture(0.0), picture(0.3), picture(1.0)]
    rows = [
        Trajectory(prompt=Prompt(text="p"), segments=[], group=0, member=i, image=image)
        for i, image in enumerate([*images, None])
    ]
    rewards = [JPEGIncompressibility(quality), JPEGCompressibility(quality)]
    with RewardRunner(rewards) as runner:
        runner.submit(rows)
        found, _ = runner.finish()
    sizes = torch.tensor([size_on_disk(i, tmp_path / "image.jpg", quality) for i in images])
    torch.testing.assert_close(found[:3, 0], sizes / 1000, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:3, 1], -sizes / 500_000, rtol=1e-6, atol=0)
    assert found[3].isnan().all()
    assert sizes.tolist() == sorted(set(sizes.tolist()))  # rougher is larger


def test_an_image_with_transparency_is_packed_without_it() -> None:
    opaque = Image.new("RGB", (8, 8), (200, 10, 30))
    clear = opaque.copy()
    clear.putalpha(9)
    first, second = JPEGIncompressibility()([opaque, clear])
    assert first == second


def test_jpeg_has_such_a_quality() -> None:
    assert Reward(JPEGCompressibility()).image_format == "pil"
    for quality in (0, 101):
        with pytest.raises(ValueError, match=rf"JPEGCompressibility\.quality is {quality}; give 1"):
            JPEGCompressibility(quality)
