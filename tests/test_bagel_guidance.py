"""Guidance as formulas, where the golden vectors do not reach; and the real schedule's interval."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import pytest
import torch

from lightning_unigrpo.adapters.bagel.guidance import Guidance, Renorm, guided
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.flow import sigma_schedule
from lightning_unigrpo.rollout import sample_image
from tests.test_bagel_golden import edited, golden_adapter, text

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
    num, out = v.shape[1], torch.empty_like(v)

    def shrink(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        ratio = float(like.square().sum().sqrt() / (x.square().sum().sqrt() + 1e-8))
        return x * min(1.0, max(guide.renorm_min, ratio))

    for b in range(len(v)):
        mixed = v_t[b] + a * (v[b] - v_t[b])
        if guide.renorm == "text_channel":
            mixed = torch.stack([shrink(mixed[n], v[b, n]) for n in range(num)])
        if guide.image_scale > 1:
            mixed = v_i[b] + guide.image_scale * (mixed - v_i[b])
        if guide.renorm == "global":
            mixed = shrink(mixed, v[b])
        elif guide.renorm == "channel":
            mixed = torch.stack([shrink(mixed[n], v[b, n]) for n in range(num)])
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


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("renorm_min", [0.0, 0.6])
@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_editing_by_definition(renorm: Renorm, renorm_min: float, scale: float) -> None:
    """Two images and both scales through the adapter: its contexts, its three velocities, the formula.

    Without a text scale above 1 it is the plain velocity to the bit, although the image scale is 2.
    """
    guide = Guidance(renorm=renorm, renorm_min=renorm_min, image_scale=2.0, interval=(0.0, 1.0))
    adapter = golden_adapter(guide=guide)
    images, words = [edited(adapter), edited(adapter)], [text("prompt_A"), text("prompt_B")]
    contexts = [[image, word] for image, word in zip(images, words, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, adapter.latent_channels, generator=generator)
    sigma = torch.full((2,), 0.7)
    cache, twins = adapter.prefill(contexts), adapter.guidance(contexts)
    found = adapter.guided_velocity(cache, twins, x, sigma, (2, 3), scale=scale)
    parts = (contexts, [[image] for image in images], [[word] for word in words])
    v, v_t, v_i = (adapter.velocity(adapter.prefill(part), x, sigma, (2, 3)) for part in parts)
    if scale <= 1:
        assert torch.equal(found, adapter.velocity(cache, x, sigma, (2, 3)))
    else:
        expected = by_definition(v, v_t, v_i, scale, guide)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # as in the golden files
        assert not torch.allclose(found, v, atol=1e-2)


@pytest.mark.parametrize("interval", [(0.4, 1.0), (0.0, 1.0), (0.5, 0.75)])
@pytest.mark.parametrize(("count", "convention"), [(25, "points"), (25, "steps"), (50, "points")])
def test_guided_steps_of_the_real_schedule(
    count: int, convention: Literal["points", "steps"], interval: tuple[float, float]
) -> None:
    """At shift 3: the steps that guide, found with fractions, are those that ask the network twice.

    25 points stand on both ends of the last interval: 1/2 is not guided, 3/4 is.
    """
    adapter = golden_adapter(guide=Guidance(interval=interval))
    context = [[text("prompt_A")]]
    cache, twins = adapter.prefill(context), adapter.guidance(context)
    levels: list[float] = []
    adapter.net.register_forward_pre_hook(lambda _, args: levels.append(float(args[0].sigma[0])))
    sigmas = sigma_schedule(count, shift=3.0, convention=convention)
    x = torch.randn(1, 2, adapter.latent_channels, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(guidance_scale=4.0)
    sample_image(adapter, cache, x, sigmas, (1, 2), sampling=sampling, unconditional=twins)
    num = count - 1 if convention == "points" else count
    times = [Fraction(num - i, num) for i in range(num)]
    exact = [3 * t / (1 + 2 * t) for t in times]
    low, high = (Fraction(str(end)) for end in interval)
    if (count, convention) == (25, "points"):
        assert {Fraction(1, 2), Fraction(3, 4)} < set(exact)
    expected = [float(n) for n in exact for _ in range(2 if low < n <= high else 1)]
    assert levels == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("ends", "acts"), [((0.4, 1.0), False), ((0.1, 0.4), True)])
def test_guidance_interval_ends_at_float32_levels(ends: tuple[float, float], acts: bool) -> None:
    """A level that is an end of the interval, as upstream compares: both in float32."""
    adapter = golden_adapter(guide=Guidance(interval=ends))
    context = [[text("prompt_A")]]
    cache, twins = adapter.prefill(context), adapter.guidance(context)
    x, sigma = torch.ones(1, 2, adapter.latent_channels), torch.tensor([0.4])
    plain = adapter.velocity(cache, x, sigma, (1, 2))
    found = adapter.guided_velocity(cache, twins, x, sigma, (1, 2), scale=4.0)
    assert torch.equal(found, plain) is not acts
