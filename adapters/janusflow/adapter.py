"""JanusFlow as one policy: one Llama reasons and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Footprint
from lightning_unigrpo.adapters.common.adapter import goes_on
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.adapters.common.conversation import PICTURE, conversation, picture_turn
from lightning_unigrpo.adapters.common.flow_adapter import FlowDecoderAdapter
from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.adapters.common.pictures import PictureProcessor
from lightning_unigrpo.adapters.common.tokenizer import Tokenizer
from lightning_unigrpo.adapters.janusflow.config import JanusFlowConfig
from lightning_unigrpo.adapters.janusflow.footprint import Rows, footprint
from lightning_unigrpo.adapters.janusflow.network import JanusFlowNet, Pack
from lightning_unigrpo.adapters.janusflow.packing import Packer
from lightning_unigrpo.adapters.janusflow.vision import JanusFlowVision
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Segment,
    TextSegment,
)

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.janusflow.vae import JanusFlowVAE

USER, ASSISTANT = "User", "Assistant"
VAE = "stabilityai/sdxl-vae"


class JanusFlowAdapter(FlowDecoderAdapter):
    """JanusFlow: reasons, draws with a flow, and looks at pictures.

    Layout of a context, one linear sequence: ``bos``, the conversation as words, and wherever a picture is
    seen ``begin + patches + end`` of the vision tower. An image being drawn is
    ``time embedding + latents`` behind it; its rows see those before them. Nothing later sees it: a drawn
    picture that is looked at is decoded and read by the tower, in a turn of the user.

    The Llama speaks *and* draws. The ``text`` group is all of it with its head, and ``optim.text_lr`` its
    rate in both tasks; the ``flow`` group is what only draws (encoder, decoder and their bridges).

    The published model: :meth:`from_pretrained`.

    Source: JanusFlow, https://arxiv.org/abs/2411.07975.

    Args:
        config: sizes and special tokens.
        tokenizer: turns prompts into ids.
        net: the network; ``None`` builds one with random weights.
        vae: latents to pixels; without it :meth:`decode` is a subclass's business.
        vision: the tower that looks at pictures; without it there are neither input images nor reflection.
        pictures: how pixels are brought to the tower; ``None`` = upstream's defaults.
        system_prompt: stands before the conversation: the wish to reason before drawing.
        look_prompt: what the user says when a drawn picture is shown, in a plan that goes on after it.
        default_size: height and width in pixels of an image whose prompt names none.
        lora: train low-rank adapters of the Llama instead of the weights; the base is then the reference,
            and its dtype may be ``bfloat16``.
        detach_context: cut the image loss's gradient into the reasoning's keys and values.
        gradient_checkpointing: recompute each layer in the backward pass.
        attention: of the packed pass: ``sdpa``, or ``flex`` (FlexAttention) on a GPU.
        freeze: parameters that are not trained, by any part of their names: ``("vision_gen_",)`` for all that
            only draws, ``("embed_tokens", "lm_head")`` for the vocabulary.
        share_prefixes: in the packed pass, run what trajectories begin with in common (the prompt of a
            group, given images, equal reasonings) once for all of them; the numbers stay the same.
    """

    net: JanusFlowNet

    def __init__(
        self,
        config: JanusFlowConfig,
        tokenizer: Tokenizer,
        *,
        net: JanusFlowNet | None = None,
        vae: JanusFlowVAE | None = None,
        vision: JanusFlowVision | None = None,
        pictures: PictureProcessor | None = None,
        system_prompt: str | None = None,
        look_prompt: str = "Compare the picture with the request, and say what to draw better.",
        default_size: tuple[int, int] = (384, 384),
        lora: LowRank | None = None,
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flex"] = "sdpa",
        freeze: Sequence[str] = (),
        share_prefixes: bool = True,
    ) -> None:
        super().__init__(
            net or JanusFlowNet(config),
            vae=vae,
            default_size=default_size,
            latents_per_row=config.flow.stride,
            stop_token=config.eos,
            lora=lora,
            detach_context=detach_context,
            gradient_checkpointing=gradient_checkpointing,
            attention=attention,
            freeze=freeze,
            share_prefixes=share_prefixes,
        )
        self.config, self.latent_channels = config, config.flow.latent_channels
        self.tokenizer = tokenizer
        self._frozen["vision"] = vision
        if pictures is None and config.vision is not None:
            pictures = PictureProcessor(size=config.vision.image_size, rounding="down")
        self.pictures = pictures
        self.system_prompt, self.look_prompt = system_prompt, look_prompt

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        vae: str | Path = VAE,
        dtype: str = "float32",
        vision: bool = True,
        revision: str | None = None,
        vae_revision: str | None = None,
        **settings: Any,
    ) -> JanusFlowAdapter:
        """Open a published checkpoint; its weights are read by :meth:`materialize`, when training begins.

        Args:
            source: a folder in the published layout, or a hub id: ``deepseek-ai/JanusFlow-1.3B``.
            vae: a folder or hub id of SDXL's autoencoder in the layout of ``diffusers``.
            dtype: of the network: ``float32`` for full fine-tuning (with ``bf16-mixed`` compute),
                ``bfloat16`` for a frozen base under LoRA and for inference.
            vision: build the vision tower; without it there are neither input images nor reflection.
            revision: of a hub id.
            vae_revision: of the autoencoder's.
            settings: the other arguments of the constructor.

        Raises:
            FileNotFoundError: for a wrong folder, missing files, or a hub that cannot be reached.
            ValueError: for truncated files, weights of another model, or an unknown dtype.
        """
        # Here, because diffusers takes seconds to import and a subclass may not need it.
        from lightning_unigrpo.adapters.janusflow.pretrained import open_checkpoint

        found = open_checkpoint(
            source,
            vae=vae,
            dtype=dtype,
            vision=vision,
            revision=revision,
            vae_revision=vae_revision,
        )
        adapter = cls(
            found.config,
            found.tokenizer,
            net=found.net,
            vae=found.vae,
            vision=found.vision,
            pictures=found.pictures,
            **settings,
        )
        adapter.source = found
        return adapter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights in the published layout, which upstream and :meth:`from_pretrained` load."""
        from lightning_unigrpo.adapters.janusflow.pretrained import save_pretrained

        save_pretrained(self, folder)

    @property
    def decoder(self) -> Any:
        """The Llama."""
        return self.net.language_model.model

    @property
    def vision(self) -> JanusFlowVision | None:
        """The vision tower."""
        return cast("JanusFlowVision | None", self._frozen["vision"])

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return the conversation up to the assistant's turn; input images stand in or before the request."""
        request = PICTURE.join(words.replace(PICTURE, "") for words in prompt.pieces("\n"))
        text = conversation([(USER, request), (ASSISTANT, None)], system=self.system_prompt or "")
        first, *rest = text.split(PICTURE)
        segments: list[Segment] = [self.given([self.config.bos, *self.tokenizer.encode(first)])]
        for pixels, words in zip(prompt.images, rest, strict=True):
            segments += [self.read(pixels), self.given(self.tokenizer.encode(words))]
        return segments

    def read(self, pixels: Tensor) -> ImageSegment:
        """Return an input image as later segments see it.

        Args:
            pixels: ``[3, H, W]`` float32 in [0, 1], of any size.

        Raises:
            ValueError: when there is no vision tower.
        """
        none = torch.zeros(0, self.latent_channels, device=self.device)
        views = self._views(pixels.to(self.device, torch.float32), (), (self.config.end_of_image,))
        return ImageSegment(latent=none, grid=(0, 0), is_context=True, views=views)

    def look(self, image: ImageSegment, *, turn_follows: bool = False) -> ImageSegment:
        """Show a drawn image: decoded, read by the tower, and put into a new turn of the user.

        Raises:
            ValueError: when there is no vision tower.
        """
        pixels = self.decode(image.latent.unsqueeze(0), image.grid)[0]
        before, after = map(self.tokenizer.encode, picture_turn(self.look_prompt, USER, ASSISTANT))
        after = [self.config.end_of_image, *([] if turn_follows else after)]
        return replace(image, views=self._views(pixels, [self.config.eos, *before], after))

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return what the user says, up to the assistant's turn.

        In a turn that shows a picture it stands where ``look_prompt`` would; else the assistant's ends first.
        """
        if goes_on(behind, self.config.end_of_image):
            return self.given(self.tokenizer.encode(picture_turn(text, USER, ASSISTANT)[1]))
        words = conversation([(USER, text), (ASSISTANT, None)])
        return self.given([self.config.eos, *self.tokenizer.encode(words)])

    @torch.no_grad()
    def _views(
        self, pixels: Tensor, before: Sequence[int], after: Sequence[int]
    ) -> dict[str, Tensor]:
        if self.vision is None or self.pictures is None:
            raise ValueError(
                f"{type(self).__name__} has no vision tower to see a picture with: give adapter.vision true, "
                "or leave out input images and end model.sampling.plan with its only image."
            )
        return {
            "before": self.given(before).tokens,
            "rows": self.vision(self.pictures(pixels).unsqueeze(0))[0],
            "after": self.given(after).tokens,
        }

    # ---- rows

    def packer(self, *, share: bool = False) -> Packer:
        """Return an empty packer."""
        return Packer(config=self.config, device=self.device, share=share)

    def words(self, ids: Tensor, positions: Tensor) -> Pack:
        """Return a pack of words ``[M]`` at positions ``[M]`` that all want logits."""
        return Pack.words(ids, positions, self.latent_channels)

    def see(self, packer: Packer, image: Any, position: int) -> int:
        """Add a picture and the words around it; one that was not looked at is not seen."""
        if "rows" not in image.views:
            return 0
        before, after = (image.views[name].tolist() for name in ("before", "after"))
        rows = image.views["rows"]
        packer.read_on(before, position)
        packer.picture(image, rows, position + len(before))
        packer.read_on(after, position + len(before) + len(rows))
        return len(before) + len(rows) + len(after)

    def noise(
        self, packer: Packer, latents: Tensor, sigmas: Tensor, grid: Grid, position: int
    ) -> None:
        """Add k images ``[k, N, C]`` at noise levels ``[k]``, side by side, to the present sample."""
        packer.noisy(latents, sigmas, grid, position)

    # ---- guidance, in evaluation

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> DecoderCache:
        """Return contexts of ``bos`` alone, with the image where it stands behind the whole context.

        ``v_u + scale (v - v_u)``, which is upstream's ``w v - (w - 1) v_u``. The gap matters: the image's
        place moves with the length of the request.
        """
        cache = self.prefill([[self.given([self.config.bos])]] * len(contexts))
        cache.positions = self._rows([self._length(context) for context in contexts])
        return cache

    def _length(self, context: Sequence[Segment]) -> int:
        """Return how many positions a context takes."""
        packer, position = self.packer(), 0
        packer.sample()
        for segment in context:
            position += self._pack(packer, segment, position, slice(0))
        return position

    # ---- strategies, optimizers, memory

    def is_flow(self, name: str) -> bool:
        """Whether a parameter of ``net`` only draws; the Llama does both and is none."""
        return "vision_gen_" in name  # strategies put words before it

    def unreached(self, plan: Sequence[str]) -> list[nn.Parameter]:
        """Return what only draws, without images; the head, without texts."""
        found: list[nn.Parameter] = [] if "image" in plan else self.param_groups()["flow"]
        if "text" not in plan:
            found += [p for p in self.net.language_model.lm_head.parameters() if p.requires_grad]
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
        vision = self.config.vision if self.vision is not None else None
        picture = 1 + vision.num_patches if vision is not None else 0
        # "User: ", "\n" and the end mark, for each picture.
        given = self._template() + prompt_tokens + len(prompt.images) * (picture + 2)
        before, after = map(self._count, picture_turn(self.look_prompt, USER, ASSISTANT))
        rows = Rows(
            given=given,
            grid=self.image_grid(prompt),
            before=1 + before,
            picture=picture,
            after=after,
        )
        found = footprint(
            self.config,
            sampling,
            rows,
            gradient_checkpointing=self.net.gradient_checkpointing,
            dtype=dtype,
            weights=self.decoder.embed_tokens.weight.dtype,
        )
        caches = 2 if evaluate and sampling.guidance_scale != 1 else 1
        return found._replace(cache=caches * found.cache)

    def _template(self) -> int:
        """Return how many words every prompt begins with."""
        text = conversation([(USER, None), (ASSISTANT, None)], system=self.system_prompt or "")
        return 1 + self._count(text)

    def _count(self, text: str) -> int:
        # Without a tokenizer sizes are only estimated: about four letters to a token.
        return len(self.tokenizer.encode(text)) if self.tokenizer else len(text) // 4


def load_janusflow(source: str, **settings: Any) -> JanusFlowAdapter:
    """:meth:`JanusFlowAdapter.from_pretrained` under a name that a YAML file can give as ``class_path``.

    Args:
        source: a folder in the published layout, or a hub id.
        settings: the other arguments of :meth:`JanusFlowAdapter.from_pretrained`.
    """
    return JanusFlowAdapter.from_pretrained(source, **settings)
