"""Show-o2 as one policy: a Qwen2.5 reasons, a flow stack behind it draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.flow_adapter import FlowDecoderAdapter
from lightning_unigrpo.adapters.common.tokenizer import Tokenizer
from lightning_unigrpo.adapters.showo2.cache import ShowO2Cache
from lightning_unigrpo.adapters.showo2.config import ShowO2Config
from lightning_unigrpo.adapters.showo2.footprint import Rows, footprint
from lightning_unigrpo.adapters.showo2.lora import LoRA
from lightning_unigrpo.adapters.showo2.network import Pack, ShowO2Net
from lightning_unigrpo.adapters.showo2.packing import Packer
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import Grid, ImageSegment, Prompt, Segment, TextSegment

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.showo2.vae import ShowO2VAE

PICTURE = "\x00"
"""Where a picture stands in a prompt that is still text."""
VAE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
TURN, END = "<|im_start|>", "<|im_end|>"


class ShowO2Adapter(FlowDecoderAdapter):
    """Show-o2: reasons, draws with a flow, and sees images as latents.

    Layout of a context, one linear sequence: ``bos``, words, and wherever an image is seen ``begin of image,
    time 1, latents, end of image``. An image being drawn is ``begin of image, time, latents`` behind it: the
    adapter appends the mark, the policy never says it. A drawn image that is looked at stays where it was
    drawn, at time 1.

    Deviation: upstream's scripts give a seen image time 0 when words follow it, and begin the rows that see
    each other one row late; its training does neither, nor does this.

    The Qwen2.5 speaks, and what it makes of each row is where the flow stack begins. The ``text`` group is
    the Qwen2.5 with its head; the ``flow`` group is the rest: embedders of latents, semantic layers, fusion,
    and the flow stack.

    The published model: :meth:`from_pretrained`.

    Source: Show-o2, https://arxiv.org/abs/2506.15564.

    Args:
        config: sizes and special tokens.
        tokenizer: turns prompts into ids.
        net: the network; ``None`` builds one with random weights.
        vae: latents to pixels and back; without it :meth:`decode` is a subclass's business, and there are no
            input images.
        system_prompt: makes a prompt a conversation that begins with it: the wish to reason before drawing;
            ``None`` = the request alone, as upstream draws.
        default_size: height and width in pixels of an image whose prompt names none, and of input images.
        lora: train low-rank adapters instead of the weights; the base is then the reference, and its dtype
            may be ``bfloat16``.
        detach_context: cut the image loss's gradient into the reasoning's keys and values, in both stacks.
        gradient_checkpointing: recompute each layer in the backward pass.
        attention: of the packed pass: ``sdpa``, or ``flex`` (FlexAttention) on a GPU.
        freeze: parameters that are not trained, by any part of their names: ``("und_trans",
            "position_embedding")`` for the semantic layers.
        share_prefixes: in the packed pass, run what trajectories begin with in common (the prompt of a
            group, given images, equal reasonings) once for all of them; the numbers stay the same.
    """

    net: ShowO2Net

    def __init__(
        self,
        config: ShowO2Config,
        tokenizer: Tokenizer,
        *,
        net: ShowO2Net | None = None,
        vae: ShowO2VAE | None = None,
        system_prompt: str | None = None,
        default_size: tuple[int, int] = (432, 432),
        lora: LoRA | None = None,
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flex"] = "sdpa",
        freeze: Sequence[str] = (),
        share_prefixes: bool = True,
    ) -> None:
        super().__init__(
            net or ShowO2Net(config),
            vae=vae,
            default_size=default_size,
            latents_per_row=config.patch_size,
            stop_token=config.eos,
            lora=lora,
            detach_context=detach_context,
            gradient_checkpointing=gradient_checkpointing,
            attention=attention,
            freeze=freeze,
            share_prefixes=share_prefixes,
        )
        self.config, self.latent_channels = config, config.latent_channels
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        language: str | Path | None = None,
        vae: str | Path = VAE,
        dtype: str = "float32",
        revision: str | None = None,
        language_revision: str | None = None,
        vae_revision: str | None = None,
        **settings: Any,
    ) -> ShowO2Adapter:
        """Open a published checkpoint; its weights are read by :meth:`materialize`, when training begins.

        Args:
            source: a folder in the published layout, or a hub id: ``showlab/show-o2-1.5B``.
            language: a folder or hub id of the Qwen2.5 it was built from, whose sizes and tokenizer are
                read; ``None`` = ``source`` itself where it has a tokenizer, else what its config.json names.
            vae: a folder or hub id of Wan 2.1's autoencoder in the layout of ``diffusers``, or of a whole
                pipeline with a folder ``vae``.
            dtype: of the network: ``float32`` for full fine-tuning (with ``bf16-mixed`` compute),
                ``bfloat16`` for a frozen base under LoRA and for inference.
            revision: of a hub id.
            language_revision: of the language model's.
            vae_revision: of the autoencoder's.
            settings: the other arguments of the constructor.

        Raises:
            FileNotFoundError: for a wrong folder, missing files, or a hub that cannot be reached.
            ValueError: for truncated files, weights of another model, or an unknown dtype.
        """
        # Here, because diffusers takes seconds to import and a subclass may not need it.
        from lightning_unigrpo.adapters.showo2.pretrained import open_checkpoint

        found = open_checkpoint(
            source,
            language=language,
            vae=vae,
            dtype=dtype,
            revision=revision,
            language_revision=language_revision,
            vae_revision=vae_revision,
        )
        adapter = cls(found.config, found.tokenizer, net=found.net, vae=found.vae, **settings)
        adapter.source = found
        return adapter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights in the published layout, which upstream and :meth:`from_pretrained` load."""
        from lightning_unigrpo.adapters.showo2.pretrained import save_pretrained

        save_pretrained(self, folder)

    @property
    def decoder(self) -> Any:
        """The Qwen2.5."""
        return self.net.showo.model

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return the request behind ``bos``, input images in or before it; or a conversation with it."""
        text = PICTURE.join(words.replace(PICTURE, "") for words in prompt.pieces())
        first, *rest = self._conversation(text).split(PICTURE)
        segments: list[Segment] = [self.given([self.config.bos, *self.tokenizer.encode(first)])]
        for pixels, words in zip(prompt.images, rest, strict=True):
            segments += [self.read(pixels), self.given(self.tokenizer.encode(words))]
        return segments

    def _conversation(self, request: str) -> str:
        """Return what stands behind ``bos``, which opens the first turn."""
        if self.system_prompt is None:
            return request
        return f"system\n{self.system_prompt}{END}\n{TURN}user\n{request}{END}\n{TURN}assistant\n"

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return what the user says: a turn of the conversation, the assistant's closed and opened anew.

        Without a system prompt there are no roles, and a context is one sequence of words and images, as in
        upstream's training on mixed documents: the words go on behind an image, or in a new line.
        """
        if self.system_prompt is not None:
            words = f"{END}\n{TURN}user\n{text}{END}\n{TURN}assistant\n"
        elif isinstance(behind, ImageSegment) and behind.is_context:
            words = text
        else:
            words = f"\n{text}"
        return self.given(self.tokenizer.encode(words))

    @torch.no_grad()
    def read(self, pixels: Tensor) -> ImageSegment:
        """Return an input image as later segments see it: cropped to ``default_size``, and encoded.

        Deviation: upstream draws a sample of the latent; the mean is the same in rollout and training.

        Args:
            pixels: ``[3, H, W]`` float32 in [0, 1], of any size.

        Raises:
            ValueError: when there is no autoencoder.
        """
        if self.vae is None:
            raise ValueError(
                f"{type(self).__name__} has no autoencoder to read a picture with: give it a vae, or leave "
                "out input images."
            )
        pixels = cropped(pixels.to(self.device, torch.float32), self.default_size)
        grid = self.image_grid(Prompt(text=""))
        latent = self.vae.encode(2 * pixels.unsqueeze(0) - 1)[0]
        return ImageSegment(latent=latent, grid=grid, is_context=True)

    # ---- rows

    def packer(self, *, share: bool = False) -> Packer:
        """Return an empty packer."""
        return Packer(config=self.config, device=self.device, share=share)

    def words(self, ids: Tensor, positions: Tensor) -> Pack:
        """Return a pack of words ``[M]`` at positions ``[M]`` that all want logits."""
        return Pack.words(ids, positions, self.latent_channels)

    def see(self, packer: Packer, image: Any, position: int) -> int:
        """Add the mark before an image, and the image."""
        packer.picture(image, image.latent, image.grid, packer.open(position))
        return 1 + self.config.num_rows(image.grid)

    def noise(
        self, packer: Packer, latents: Tensor, sigmas: Tensor, grid: Grid, position: int
    ) -> None:
        """Add k images ``[k, N, C]`` at noise levels ``[k]``, side by side, to the present sample."""
        packer.noisy(latents, sigmas, grid, packer.open(position))

    def behind(self, image: Any) -> list[int]:
        """Return the mark behind an image."""
        return [self.config.end_of_image]

    def _pack(self, packer: Packer, segment: Segment, position: int, steps: slice) -> int:
        packer.go_on()
        return super()._pack(packer, segment, position, steps)

    def new_cache(self, num_rows: int, dtype: torch.dtype) -> ShowO2Cache:
        """Return a cache of empty contexts, its keys and values in ``dtype``."""
        config = self.decoder.config
        return ShowO2Cache(
            cache_sizes(config),
            self.config.flow_sizes,
            num_rows,
            device=self.device,
            dtype=dtype,
            vocab_size=config.vocab_size,
        )

    # ---- guidance, in evaluation

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> DecoderCache:
        """Return contexts of ``bos`` alone: upstream's empty request, its image right behind it."""
        return self.prefill([[self.given([self.config.bos])]] * len(contexts))

    # ---- strategies, optimizers, memory

    def is_flow(self, name: str) -> bool:
        """Whether a parameter of ``net`` lies outside the Qwen2.5 and its head."""
        return "showo" not in name.split(".")  # strategies put words before it

    def shard_units(self) -> list[nn.Module]:
        """Return the layers of both stacks: every call runs them, semantic layers only where images are."""
        return [*self.decoder.layers, *self.net.diffusion_head_a]

    def unreached(self, plan: Sequence[str]) -> list[nn.Parameter]:
        """Return the flow group, without images; a head of its own, without texts."""
        found: list[nn.Parameter] = [] if "image" in plan else self.param_groups()["flow"]
        if "text" not in plan and not self.net.showo.is_tied:
            found += [p for p in self.net.showo.lm_head.parameters() if p.requires_grad]
        return found

    def footprint(
        self,
        sampling: Sampling,
        *,
        prompt_tokens: int,
        dtype: torch.dtype,
        prompt: Prompt | None = None,
        evaluate: bool = False,
    ) -> Footprint:
        """Return the bytes per trajectory; guidance has a cache of its own beside the rollout's."""
        prompt = prompt or Prompt(text="")
        pictures = len(prompt.images)
        rows = self.config.num_rows(self.image_grid(Prompt(text="")))
        given = 1 + self._count(self._conversation("")) + prompt_tokens + pictures * (2 + rows)
        found = footprint(
            self.config,
            sampling,
            Rows(given=given, squares=pictures * (rows - 1), grid=self.image_grid(prompt)),
            gradient_checkpointing=self.net.gradient_checkpointing,
            dtype=dtype,
            weights=self.decoder.embed_tokens.weight.dtype,
        )
        caches = 2 if evaluate and sampling.guidance_scale != 1 else 1
        return found._replace(cache=caches * found.cache)

    def _count(self, text: str) -> int:
        # Without a tokenizer sizes are only estimated: about four letters to a token.
        return len(self.tokenizer.encode(text)) if self.tokenizer else len(text) // 4


def cropped(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale ``[3, H, W]`` in [0, 1] until it just covers ``size``, and cut out the middle."""
    (h, w), (height, width) = pixels.shape[1:], size
    scale = max(height / h, width / w)
    scaled = (max(height, round(h * scale)), max(width, round(w * scale)))
    if scaled != (h, w):
        pixels = interpolate(pixels.unsqueeze(0), scaled, mode="bicubic", antialias=True)[0]
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return pixels[:, top : top + height, left : left + width].clamp(0, 1)


def load_showo2(source: str, **settings: Any) -> ShowO2Adapter:
    """:meth:`ShowO2Adapter.from_pretrained` under a name that a YAML file can give as ``class_path``.

    Args:
        source: a folder in the published layout, or a hub id.
        settings: the other arguments of :meth:`ShowO2Adapter.from_pretrained`.
    """
    return ShowO2Adapter.from_pretrained(source, **settings)
