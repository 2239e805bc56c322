"""Guidance as formulas, where the golden vectors do not reach; and the real schedule's interval."""

from __future__ import annotations

import pytest
import torch

from lightning_unigrpo.adapters.bagel.guidance import Guidance, guided

B, N, C = 3, 5, 4


@pytest.fixture
def velocities() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(3, B, N, C, generator=generator, dtype=torch.float64)
    return found[0], found[1], found[2]


def by_definition(
    v: torch.Tensor, v_t: torch.Tensor, v_i: torch.Tensor, a: float, guide: Guidance
) -> torch.Tensor:
    """The formula with loops over samples and tokens."""
    if a <= 1:
        return v
    out = torch.empty_like(v)

    def shrink(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        ratio = float(like.square().sum().sqrt() / (x.square().sum().sqrt() + 1e-8))
        return x * min(1.0, max(guide.renorm_min, ratio))

    for b in range(B):
        mixed = v_t[b] + a * (v[b] - v_t[b])
        if guide.renorm == "text_channel":
            mixed = torch.stack([shrink(mixed[n], v[b, n]) for n in range(N)])
        if guide.image_scale > 1:
            mixed = v_i[b] + guide.image_scale * (mixed - v_i[b])
        if guide.renorm == "global":
            mixed = shrink(mixed, v[b])
        elif guide.renorm == "channel":
            mixed = torch.stack([shrink(mixed[n], v[b, n]) for n in range(N)])
        out[b] = mixed
    return out


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("image_scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("renorm_min", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_formula(
    velocities: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    renorm: str,
    image_scale: float,
    renorm_min: float,
    scale: float,
) -> None:
    """A text scale of 1 or less is none, whatever the image scale; lengths are each sample's own."""
    guide = Guidance(renorm=renorm, image_scale=image_scale, renorm_min=renorm_min)  # type: ignore[arg-type]
    found = guided(*velocities, text_scale=scale, guide=guide)
    torch.testing.assert_close(found, by_definition(*velocities, scale, guide), rtol=1e-12, atol=0)


def test_a_sample_does_not_change_its_neighbours(
    velocities: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    guide = Guidance()
    before = guided(*velocities, text_scale=4.0, guide=guide)
    velocities[0][1] *= 100
    after = guided(*velocities, text_scale=4.0, guide=guide)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "wrong", [{"interval": (0.5, 0.5)}, {"interval": (-0.1, 1.0)}, {"renorm_min": 1.5}]
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"adapter.guide.{next(iter(wrong))}"):
        Guidance(**wrong)  # type: ignore[arg-type]
