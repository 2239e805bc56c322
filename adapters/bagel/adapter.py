"""Bagel as one policy: reason with the understanding expert, draw with the generation expert."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Adapter, Footprint
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.footprint import MARKS, footprint
from lightning_unigrpo.adapters.bagel.guidance import Guidance, guided
from lightning_unigrpo.adapters.bagel.images import latent_resize, patch_resize
from lightning_unigrpo.adapters.bagel.lora import LoRA
from lightning_unigrpo.adapters.bagel.network import BagelNet, Layer, Pack
from lightning_unigrpo.adapters.bagel.packing import Packer
from lightning_unigrpo.adapters.common import parameters
from lightning_unigrpo.adapters.common.attention import (
    Attention,
    CachedAttention,
    FlexPackedAttention,
    Layout,
    NextWord,
    PackedAttention,
)
from lightning_unigrpo.adapters.common.cache import RowCache
from lightning_unigrpo.adapters.common.lora import add_lora, lora_off
from lightning_unigrpo.adapters.common.scores import score_texts
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import (
    IMAGE_MARK,
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    Trajectory,
    sampled,
)

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.bagel.pretrained import Source
    from lightning_unigrpo.adapters.bagel.vae import BagelVAE
    from lightning_unigrpo.adapters.bagel.vision import BagelVision

FLOW_MODULES = ("vae2llm", "llm2vae", "time_embedder")
"""The bridges between latents and the language model; with ``moe_gen`` they are the flow group."""
GRAIN = 128
"""Slots by which compiled decoding grows: each size of the context is a shape of its own."""


class Tokenizer(Protocol):
    """What the adapter needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without marks."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""


class GuidanceCache(NamedTuple):
    """What guided evaluation compares with."""

    without_text: RowCache
    without_image: RowCache | None
    """``None`` where the image scale is 1."""


class BagelAdapter(Adapter):
    """Bagel: reasons, draws, looks at images and edits them.

    Layout of a context, one linear sequence: every text is ``bos + ids + eos``, every image
    ``start + latents + end`` and, where there is a vision tower, ``start + patches + end`` behind it.
    RoPE counts words; all rows of a block of image share one position. A segment's ids never hold
    ``bos``; a sampled text ends with ``eos`` if it stopped, and the adapter adds ``eos`` wherever it is
    missing.

    The published model: :meth:`from_pretrained`.

    Source: Bagel, https://arxiv.org/abs/2505.14683.

    Args:
        config: sizes and special tokens.
        tokenizer: turns prompts into ids.
        net: the network; ``None`` builds one with random weights.
        vae: pixels to latents and back; without it :meth:`decode` is a subclass's business.
        vision: the tower that looks at images; ``None`` shows later segments the latents only.
        system_prompt: a text before every prompt, in think mode the request to reason.
        default_size: height and width in pixels of an image whose prompt names none.
        posterior: latents of input images are the ``mean`` (reproducible) or a ``sample`` (upstream),
            drawn by the prompt's id and the image's place.
        lora: train low-rank adapters instead of the weights; the base is then the reference, and its dtype
            may be ``bfloat16``.
        guide: how evaluation guides, where ``sampling.guidance_scale`` is above 1.
        detach_context: cut the image loss's gradient into the reasoning's keys and values.
        gradient_checkpointing: recompute each layer in the backward pass.
        attention: of the packed pass: ``sdpa``, or ``flex`` (FlexAttention) on a GPU.
        compile_layers: fuse what stands between two attentions with ``torch.compile``, and keep shapes few.
        freeze: parameters that are not trained, by any part of their names: ``("vae2llm", "llm2vae",
            "time_embedder")`` for the bridges, ``("embed_tokens", "lm_head")`` for the vocabulary. A whole
            expert: ``optim.text_lr`` or ``optim.flow_lr`` 0.
        share_prefixes: in the packed pass, run what trajectories begin with in common (the prompt of a
            group, given images, equal reasonings) once for all of them; the numbers stay the same.
    """

    def __init__(
        self,
        config: BagelConfig,
        tokenizer: Tokenizer,
        *,
        net: BagelNet | None = None,
        vae: BagelVAE | None = None,
        vision: BagelVision | None = None,
        system_prompt: str | None = None,
        default_size: tuple[int, int] = (1024, 1024),
        posterior: Literal["mean", "sample"] = "mean",
        lora: LoRA | None = None,
        guide: Guidance | None = None,
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flex"] = "sdpa",
        compile_layers: bool = False,
        freeze: Sequence[str] = (),
        share_prefixes: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: Any = tokenizer
        self.net: BagelNet = net or BagelNet(config)
        self.net.gradient_checkpointing = gradient_checkpointing
        # A dict, not attributes: checkpoints hold neither, and no strategy wraps them.
        self._frozen = {"vae": vae, "vision": vision}
        self.system_prompt, self.posterior, self.guide = (
            system_prompt,
            posterior,
            guide or Guidance(),
        )
        self.default_size, self.detach_context = default_size, detach_context
        self.share_prefixes, self.lora = share_prefixes, lora
        self.stop_token, self.latent_channels = config.eos, config.latent_channels
        if attention == "flex" and detach_context:
            raise ValueError(
                "adapter.attention is 'flex', where adapter.detach_context cannot cut a gradient; give "
                "'sdpa'."
            )
        self.attention, self.compile_layers, self.freeze = attention, compile_layers, tuple(freeze)
        if compile_layers:
            self.net.compile_layers()
        parameters.freeze(self.net, self.freeze)
        if lora is not None:
            add_lora(self.net, lora)

    source: Source | None = None
    """Where :meth:`from_pretrained` found the weights."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str = "float32",
        vision: bool = True,
        revision: str | None = None,
        overrides: dict[str, Any] | None = None,
        **settings: Any,
    ) -> BagelAdapter:
        """Open a published checkpoint; its weights are read by :meth:`materialize`, when training begins.

        Args:
            source: a folder in the published layout, or a hub id such as ``ByteDance-Seed/BAGEL-7B-MoT``.
            dtype: of the network: ``float32`` for full fine-tuning (with ``bf16-mixed`` compute),
                ``bfloat16`` for a frozen base under LoRA and for inference.
            vision: build the vision tower; without it images are seen as latents only.
            revision: of a hub id.
            overrides: fields of :class:`BagelConfig` that the files do not show, such as ``rope_theta``.
            settings: the other arguments of the constructor.

        Raises:
            FileNotFoundError: for a wrong folder, missing files, or a hub that cannot be reached.
            ValueError: for truncated files, weights of another model, or an unknown dtype.
        """
        # Here, because diffusers and transformers take seconds to import and a subclass may need neither.
        from lightning_unigrpo.adapters.bagel.pretrained import open_checkpoint

        found = open_checkpoint(
            source, dtype=dtype, vision=vision, revision=revision, overrides=overrides or {}
        )
        adapter = cls(
            found.config,
            found.tokenizer,
            net=found.net,
            vae=found.vae,
            vision=found.vision,
            **settings,
        )
        adapter.source = found
        return adapter

    def fill(self, part: nn.Module, prefix: str) -> None:
        """Read the weights of a part of ``net`` that :meth:`from_pretrained` left in their files."""
        if self.source is not None:
            self.source.fill(part, prefix)

    def materialize(self) -> None:
        """Read all that :meth:`from_pretrained` left in its files."""
        super().materialize()
        if self.source is not None:
            self.source.fill_frozen(self)

    def reference(self) -> AbstractContextManager[None] | None:
        """Return the base without its LoRA, where there is one."""
        return lora_off(self.net) if self.lora is not None else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights in the published layout, which upstream and :meth:`from_pretrained` load."""
        from lightning_unigrpo.adapters.bagel.pretrained import save_pretrained

        save_pretrained(self, folder)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.net.vae2llm.weight.device

    @property
    def vae(self) -> BagelVAE | None:
        """The autoencoder."""
        return cast("BagelVAE | None", self._frozen["vae"])

    @property
    def vision(self) -> BagelVision | None:
        """The vision tower."""
        return cast("BagelVision | None", self._frozen["vision"])

    def frozen_modules(self) -> list[nn.Module]:
        """Return the autoencoder and the vision tower."""
        return [module for module in self._frozen.values() if module is not None]

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return system text, and request with input images in their places; Bagel has no chat template."""
        found: list[Segment] = [self._words(self.system_prompt)] if self.system_prompt else []
        *between, last = prompt.pieces()
        for number, (words, pixels) in enumerate(zip(between, prompt.images, strict=True)):
            found += [self._words(words.strip())] if words.strip() else []
            found.append(self.see(pixels, key=(prompt.id, number)))
        if IMAGE_MARK not in prompt.text:
            return [*found, self._words(last)]
        return [*found, self._words(last.strip())] if last.strip() else found

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return what the user says: a block of words like any other."""
        return self._words(text)

    def _words(self, text: str) -> TextSegment:
        ids = torch.tensor(self.tokenizer.encode(text), dtype=torch.long)
        return TextSegment(tokens=ids.to(self.device))

    def detokenize(self, tokens: Tensor) -> str:
        """Return the words of ``[L]`` ids without the closing ``eos``."""
        ids = tokens.tolist()
        return str(self.tokenizer.decode(ids[:-1] if ids[-1:] == [self.config.eos] else ids))

    @torch.no_grad()
    def see(self, pixels: Tensor, *, key: tuple[int, ...] = (0,)) -> ImageSegment:
        """Return an input image as later segments see it: latents, and patches if there is a tower.

        Args:
            pixels: ``[3, H, W]`` float32 in [0, 1], of any size.
            key: of the posterior's noise, where it is sampled.

        Raises:
            ValueError: when there is no autoencoder.
        """
        if self.vae is None:
            raise ValueError(
                f"{type(self).__name__} has no autoencoder: it cannot read input images."
            )
        pixels = latent_resize(self.config)(pixels.to(self.device, torch.float32))
        noise = None
        if self.posterior == "sample":
            seed = np.random.SeedSequence(key).generate_state(1)
            noise = torch.Generator().manual_seed(int(seed[0]))
        latent = self.vae.encode(2 * pixels.unsqueeze(0) - 1, noise).squeeze(0)
        side = self.config.pixels_per_token
        grid = (pixels.shape[1] // side, pixels.shape[2] // side)
        views = self._patches(pixels)
        return ImageSegment(latent=latent, grid=grid, is_context=True, views=views)

    @torch.no_grad()
    def look(self, image: ImageSegment, *, turn_follows: bool = False) -> ImageSegment:
        """Show a drawn image as upstream does: decoded, and read again like an input image.

        By the posterior's mean, whatever ``posterior`` says: a sample would need a draw of its own.
        """
        if self.vae is None:
            return image
        pixels = self.decode(image.latent.unsqueeze(0), image.grid)
        views = {"vae": self.vae.encode(2 * pixels - 1).squeeze(0), **self._patches(pixels[0])}
        return replace(image, views=views)

    def _patches(self, pixels: Tensor) -> dict[str, Tensor]:
        if self.vision is None:
            return {}
        small = patch_resize(self.vision.config)(pixels)
        return {"vit": self.vision([2 * small - 1])[0]}

    def image_grid(self, prompt: Prompt) -> Grid:
        """Return the latent grid of the size asked for; of the last input image where none is.

        Raises:
            ValueError: when the size is not a multiple of a latent token's pixels.
        """
        height, width = prompt.size or self.default_size
        if prompt.images and prompt.size is None:
            height, width = latent_resize(self.config).fit(*prompt.images[-1].shape[1:])
        side = self.config.pixels_per_token
        if height % side or width % side:
            raise ValueError(
                f"Prompt.size {(height, width)} must be multiples of {side} pixels (one latent token)."
            )
        return height // side, width // side

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
        return (self.vae.decode(latents, grid) / 2 + 0.5).clamp(0, 1)

    # ---- sampling

    @torch.no_grad()
    def prefill(self, contexts: Sequence[Sequence[Segment]]) -> RowCache:
        """Read ragged contexts segment by segment."""
        dtype = torch.get_autocast_dtype(self.device.type) if self._autocast() else None
        weight = self.net.vae2llm.weight
        cache = RowCache(
            self.config.cache_sizes,
            len(contexts),
            device=self.device,
            dtype=dtype or weight.dtype,
            grain=GRAIN if self.compile_layers else 1,
        )
        for place in range(max((len(c) for c in contexts), default=0)):
            self.extend(cache, [c[place] if place < len(c) else None for c in contexts])
        return cache

    def _autocast(self) -> bool:
        return torch.is_autocast_enabled(self.device.type)

    @torch.no_grad()
    def extend(self, cache: RowCache, segments: Sequence[Segment | None]) -> None:  # type: ignore[override]
        """Append one segment per row; None appends nothing. Latents and patches are two blocks."""
        looked_at = [
            isinstance(s, ImageSegment) and s.is_context and "vit" in s.views for s in segments
        ]
        self._append_blocks(cache, segments, patches=False)
        if any(looked_at):
            rows = [s if seen else None for s, seen in zip(segments, looked_at, strict=True)]
            self._append_blocks(cache, rows, patches=True)

    def _append_blocks(
        self, cache: RowCache, segments: Sequence[Segment | None], *, patches: bool
    ) -> None:
        packer, positions = self._packer(), cache.positions.tolist()
        advance, fed = [], cache.open.tolist()
        for b, segment in enumerate(segments):
            packer.sample()
            if isinstance(segment, TextSegment):
                ids = self._closed(segment.tokens)[fed[b] :]
                if ids:
                    packer.text(ids, positions[b])
                fed[b] = 0
                advance.append(len(ids))
            elif isinstance(segment, ImageSegment) and patches:
                packer.seen(segment, positions[b])
                advance.append(1)
            elif isinstance(segment, ImageSegment) and segment.is_context and len(segment.latent):
                packer.clean(segment, positions[b])
                advance.append(1)
            else:
                advance.append(0)
        cache.open = torch.tensor(fed, dtype=torch.long, device=self.device)
        if any(advance):
            added = self._append(cache, packer)[1]
            cache.advance(added, torch.tensor(advance, device=self.device))

    def _closed(self, tokens: Tensor) -> list[int]:
        ids = tokens.tolist()
        tail = [] if ids[-1:] == [self.config.eos] else [self.config.eos]
        return [self.config.bos, *ids, *tail]

    def _packer(self) -> Packer:
        return Packer(config=self.config, device=self.device)

    def _append(self, cache: RowCache, packer: Packer) -> tuple[Tensor, Tensor]:
        """Run new rows against the cache; returns logits, and how many slots each row filled."""
        pack, layout = packer.finish()
        cache.reserve(layout.rows.shape[1])
        logits, _ = self.net(pack, CachedAttention(cache, layout))
        return logits, layout.valid.sum(1)

    @torch.no_grad()
    def next_logits(self, cache: RowCache, tokens: Tensor | None, active: Tensor) -> Tensor:  # type: ignore[override]
        """Feed ``bos`` (``tokens`` None) or the tokens just sampled to the active rows."""
        active = active.to(self.device)
        rows = self._fed(active)
        ids = torch.full_like(rows, self.config.bos) if tokens is None else tokens[rows]
        cache.make_room(1)
        pack = Pack.words(ids, cache.positions[rows], self.latent_channels)
        found, _ = self.net(pack, NextWord(cache, rows))
        one = active.long()
        cache.advance(one, one, most=1)
        cache.open = cache.open + one
        logits: Tensor = found.new_zeros(len(cache), found.shape[1])
        logits[rows] = found
        return logits

    def _fed(self, active: Tensor) -> Tensor:
        """Return the rows that are run: the active ones, repeated to a power of two when compiled."""
        rows = active.nonzero().squeeze(1)
        if not self.compile_layers or not len(active):
            return rows
        size = 2  # one row would be a graph of its own
        while size < len(rows):
            size *= 2
        first = rows[:1] if len(rows) else torch.zeros_like(active[:1], dtype=torch.long)
        return torch.cat([rows, first.expand(size - len(rows))])

    @torch.no_grad()
    def velocity(  # type: ignore[override]
        self, cache: RowCache, latents: Tensor, sigma: Tensor, grid: Grid
    ) -> Tensor:
        """Run one noise block per row; its keys go to scratch slots that nothing remembers."""
        if grid not in cache.plans:
            cache.plans[grid] = self._noise_plan(cache, grid)
        pack, attention = cache.plans[grid]
        pack = replace(pack, latents=latents.flatten(0, 1), sigma=sigma)
        found: Tensor = self.net(pack, attention)[1]
        return found.view_as(latents)

    def _noise_plan(self, cache: RowCache, grid: Grid) -> tuple[Pack, CachedAttention]:
        """Lay out one noise block per row; the same for all denoising steps of an image."""
        packer = self._packer()
        empty = torch.zeros(1, grid[0] * grid[1], self.latent_channels, device=self.device)
        for position in cache.positions.tolist():
            packer.sample()
            packer.noisy(empty, empty[:, 0, 0], grid, position)
        pack, layout = packer.finish()
        cache.reserve(layout.rows.shape[1])
        return pack, CachedAttention(cache, layout)

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> GuidanceCache:
        """Return the contexts that guided evaluation compares with: without the request, without images."""
        parts = [self._less(context) for context in contexts]
        without_text = self.prefill([less for less, _ in parts])
        if self.guide.image_scale <= 1:
            return GuidanceCache(without_text, None)
        return GuidanceCache(without_text, self.prefill([less for _, less in parts]))

    def _less(self, context: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
        """Return a context before its last given text (or behind its last image), and its given texts.

        A reasoning is no given text; the system prompt belongs to both.
        """
        system = 1 if self.system_prompt else 0
        without_text = list(context[:system])
        for n, segment in enumerate(context[system:], system):
            if isinstance(segment, ImageSegment):
                if segment.is_context:
                    without_text = list(context[: n + 1])
            elif not segment.is_sampled:
                without_text = list(context[:n])
        without_image: list[Segment] = [
            s for s in context if isinstance(s, TextSegment) and not s.is_sampled
        ]
        return without_text, without_image

    @torch.no_grad()
    def guided_velocity(  # type: ignore[override]
        self,
        cache: RowCache,
        unconditional: GuidanceCache,
        latents: Tensor,
        sigma: Tensor,
        grid: Grid,
        *,
        scale: float,
    ) -> Tensor:
        """Return the velocity under text and image guidance; sigma must be the same in all rows."""
        velocity = self.velocity(cache, latents, sigma, grid)
        # In the levels' own precision: 0.4 is a level of several schedules, and float32 rounds it up.
        low, high = torch.tensor(self.guide.interval, dtype=sigma.dtype).tolist()
        if scale <= 1 or not low < float(sigma[0]) <= high:
            return velocity
        without_text = self.velocity(unconditional.without_text, latents, sigma, grid)
        without_image = None
        if unconditional.without_image is not None:
            without_image = self.velocity(unconditional.without_image, latents, sigma, grid)
        return guided(velocity, without_text, without_image, text_scale=scale, guide=self.guide)

    # ---- learning

    def forward(self, trajectories: Sequence[Trajectory], steps: slice = slice(None)) -> Scores:
        """Score all trajectories in one packed pass; equal beginnings are packed once."""
        packer = Packer(config=self.config, device=self.device, share=self.share_prefixes)
        for trajectory in trajectories:
            packer.sample()
            position = 0
            for segment in trajectory.segments:
                position = self._pack(packer, segment, position, steps)
        pack, layout = packer.finish()
        num_rows = len(pack.positions) + len(pack.latents)
        logits, velocity = self.net(pack, self._packed_attention(layout, num_rows))
        shapes = packer.velocity_shapes
        parts = velocity.split([shape[:2].numel() for shape in shapes]) if shapes else ()
        scores = Scores(velocity=[v.view(s) for v, s in zip(parts, shapes, strict=True)])
        if texts := [s for _, s in sampled(trajectories) if isinstance(s, TextSegment)]:
            scores.text, scores.entropy = score_texts(logits, texts)
        return scores

    def _packed_attention(self, layout: Layout, num_rows: int) -> Attention:
        if self.attention == "flex":
            if torch.is_grad_enabled() and self.device.type == "cpu":
                raise ValueError(
                    "adapter.attention is 'flex', which torch cannot differentiate on a CPU; give 'sdpa'."
                )
            return FlexPackedAttention(layout, num_rows)
        return PackedAttention(layout, num_rows, detach_context=self.detach_context)

    def _pack(self, packer: Packer, segment: Segment, position: int, steps: slice) -> int:
        """Add a segment to the present sample; returns the position behind it.

        The window's states stand side by side at one position, each blind to the others.
        """
        if isinstance(segment, TextSegment):
            ids = self._closed(segment.tokens)
            packer.text(ids, position, score=len(segment.tokens) if segment.is_sampled else 0)
            return position + len(ids)
        assert isinstance(segment, ImageSegment)
        if segment.is_sampled:
            assert segment.states is not None
            assert segment.sigmas is not None
            states, levels = segment.states[:-1][steps], segment.sigmas[:-1][steps]
            packer.noisy(states, levels, segment.grid, position)
        if not segment.is_context:
            return position
        if len(segment.latent):
            packer.clean(segment, position)
            position += 1
        if "vit" in segment.views:
            packer.seen(segment, position)
            position += 1
        return position

    def footprint(
        self,
        sampling: Sampling,
        *,
        prompt_tokens: int,
        dtype: torch.dtype,
        prompt: Prompt | None = None,
        evaluate: bool = False,
    ) -> Footprint:
        """Return the bytes per trajectory; each cache of guidance counts as much as the rollout's own."""
        prompt = prompt or Prompt(text="")
        given = prompt_tokens + MARKS
        if self.system_prompt:
            # Without a tokenizer sizes are only estimated: about four letters to a token.
            letters, words = len(self.system_prompt), self.tokenizer
            given += (len(words.encode(self.system_prompt)) if words else letters // 4) + MARKS
        if IMAGE_MARK in prompt.text:
            given += len(prompt.images) * MARKS
        seen = 0
        for pixels in prompt.images:
            tokens, patches = self._seen_rows(*latent_resize(self.config).fit(*pixels.shape[1:]))
            seen += tokens + MARKS + (patches + MARKS if patches else 0)
        side = self.config.pixels_per_token
        tokens, patches = self._seen_rows(*(side * length for length in self.image_grid(prompt)))
        found = footprint(
            self.config,
            sampling,
            given_rows=given + seen,
            seen_rows=seen,
            image_tokens=tokens,
            patches=patches,
            gradient_checkpointing=self.net.gradient_checkpointing,
            dtype=dtype,
            weights=self.net.vae2llm.weight.dtype,
            grain=GRAIN if self.compile_layers else 1,
        )
        caches = 1
        if evaluate and sampling.guidance_scale != 1:
            caches = 3 if self.guide.image_scale > 1 else 2
        return found._replace(cache=caches * found.cache)

    def _seen_rows(self, height: int, width: int) -> tuple[int, int]:
        """Return how many latents and patches an image of so many pixels is seen as."""
        tokens = height * width // self.config.pixels_per_token**2
        if self.vision is None:
            return tokens, 0
        rule = patch_resize(self.vision.config)
        height, width = rule.fit(height, width)
        return tokens, height * width // rule.stride**2

    # ---- strategies and optimizers

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the understanding expert (with embedding and head) and the generation expert."""
        groups: dict[str, list[nn.Parameter]] = {"text": [], "flow": []}
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                is_flow = "moe_gen" in name or any(part in name for part in FLOW_MODULES)
                groups["flow" if is_flow else "text"].append(parameter)
        return groups

    def unreached(self, plan: Sequence[str]) -> list[nn.Parameter]:
        """Return the generation expert without images; without texts, all that makes only logits.

        That is the head, and the understanding expert behind the last attention: images see its keys.
        """
        if "image" not in plan:
            return self.param_groups()["flow"]
        if "text" in plan:
            return []
        model = self.net.language_model
        last = cast(Layer, model.model.layers[-1]).expert(0)
        parts = (last.o_proj, last.output_norm, last.mlp, model.model.norm, model.lm_head)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def shard_units(self) -> list[nn.Module]:
        """Return the layers."""
        return list(self.net.language_model.model.layers)


def load_bagel(source: str, **settings: Any) -> BagelAdapter:
    """:meth:`BagelAdapter.from_pretrained` under a name that a YAML file can give as ``class_path``.

    Args:
        source: a folder in the published layout, or a hub id.
        settings: the other arguments of :meth:`BagelAdapter.from_pretrained`.
    """
    return BagelAdapter.from_pretrained(source, **settings)
