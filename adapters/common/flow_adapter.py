"""What adapters of one causal decoder have in common that draw with a flow."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapters.common.adapter import DecoderAdapter
from lightning_unigrpo.adapters.common.attention import CachedAttention
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.types import Grid, Prompt, Scores


class FlowDecoderAdapter(DecoderAdapter):
    """A decoder that draws with a flow over the latents of an autoencoder.

    An image being drawn is a block of rows behind its context that nothing later sees. Several of them, at
    several noise levels, stand side by side in a packed pass.

    Args:
        net: see :class:`DecoderAdapter`.
        vae: ``decode(latents, grid)`` to [-1, 1], and ``downsample``, image pixels per side of one latent;
            without it :meth:`decode` is a subclass's business.
        default_size: height and width in pixels of an image whose prompt names none.
        latents_per_row: latents per side of what one row of the decoder reads.
        settings: the other arguments of :class:`DecoderAdapter`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        vae: nn.Module | None,
        default_size: tuple[int, int],
        latents_per_row: int,
        **settings: Any,
    ) -> None:
        super().__init__(net, **settings)
        # A dict, not attributes: checkpoints do not hold what is frozen, and no strategy wraps it.
        self._frozen: dict[str, Any] = {"vae": vae}
        self.default_size, self.latents_per_row = default_size, latents_per_row

    @property
    def vae(self) -> Any:
        """The autoencoder, or None."""
        return self._frozen["vae"]

    def frozen_modules(self) -> list[nn.Module]:
        """Return the autoencoder, and what else stands beside ``net``."""
        return [module for module in self._frozen.values() if module is not None]

    @property
    def downsample(self) -> int:
        """Image pixels per side of one latent."""
        return int(self.vae.downsample) if self.vae is not None else 8

    def image_grid(self, prompt: Prompt) -> Grid:
        """Return the latent grid of the size asked for.

        Raises:
            ValueError: when the size is not a multiple of a row's pixels.
        """
        height, width = prompt.size or self.default_size
        side = self.downsample * self.latents_per_row
        if height % side or width % side:
            raise ValueError(
                f"Prompt.size {(height, width)} must be multiples of {side} pixels (one row of the decoder)."
            )
        return height // self.downsample, width // self.downsample

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Turn latents ``[B, N, C]`` into pixels ``[B, 3, H, W]`` in [0, 1].

        Raises:
            TypeError: when there is no autoencoder and no subclass that decodes.
        """
        if self.vae is None:
            raise TypeError(
                f"{type(self).__name__} has no image decoder: give it a vae, or override "
                "decode(latents, grid) -> [B, 3, H, W]."
            )
        pixels: Tensor = (self.vae.decode(latents, grid) / 2 + 0.5).clamp(0, 1)
        return pixels

    @abstractmethod
    def noise(
        self, packer: Any, latents: Tensor, sigmas: Tensor, grid: Grid, position: int
    ) -> None:
        """Add k images ``[k, N, C]`` at noise levels ``[k]``, side by side, to the present sample.

        The packer remembers their shapes, in order, as ``velocity_shapes``.
        """

    def with_noise(self, pack: Any, latents: Tensor, sigma: Tensor) -> Any:
        """Return a pack of one noise block per row with other latents ``[B, N, C]`` at levels ``[B]``."""
        return replace(pack, latents=latents.flatten(0, 1), sigma=sigma)

    def draw(self, packer: Any, image: Any, position: int, steps: slice) -> None:
        """Add the window's states, side by side, each blind to the others."""
        states, levels = image.states[:-1][steps], image.sigmas[:-1][steps]
        self.noise(packer, states, levels, image.grid, position)

    def image_scores(self, scores: Scores, outputs: Tensor, packer: Any) -> None:
        """Enter the velocities."""
        shapes = packer.velocity_shapes
        parts = outputs.split([shape[:2].numel() for shape in shapes]) if shapes else ()
        scores.velocity = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def velocity(  # type: ignore[override]
        self, cache: DecoderCache, latents: Tensor, sigma: Tensor, grid: Grid
    ) -> Tensor:
        """Run one noise block per row; its keys go to scratch slots that nothing remembers."""
        cache.rewind()
        if grid not in cache.plans:
            packer = self.packer()
            for position in cache.positions.tolist():
                packer.sample()
                self.noise(packer, torch.zeros_like(latents[:1]), sigma[:1], grid, position)
            pack, layout = packer.finish()
            cache.reserve(layout.rows.shape[1])
            cache.plans[grid] = (pack, CachedAttention(cache, layout))
        pack, attention = cache.plans[grid]
        found: Tensor = self.net(self.with_noise(pack, latents, sigma), attention)[1]
        return found.view_as(latents)
