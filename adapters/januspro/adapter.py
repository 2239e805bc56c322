"""Janus-Pro as one policy: one Llama reasons, and draws code by code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import JanusConfig

from lightning_unigrpo.adapter import Footprint, ImagePolicy, token_log_probs
from lightning_unigrpo.adapters.common.adapter import DecoderAdapter, Image, goes_on
from lightning_unigrpo.adapters.common.attention import NextWord
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.adapters.common.conversation import PICTURE, conversation, picture_turn
from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.adapters.common.pictures import PictureProcessor
from lightning_unigrpo.adapters.common.tokenizer import Tokenizer
from lightning_unigrpo.adapters.januspro.config import Marks
from lightning_unigrpo.adapters.januspro.footprint import Rows, footprint
from lightning_unigrpo.adapters.januspro.network import FLOW_MODULES, JanusProNet, Pack
from lightning_unigrpo.adapters.januspro.packing import Packer
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    TokenImageSegment,
)

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.januspro.network import JanusVision, JanusVQ

USER, ASSISTANT = "<|User|>", "<|Assistant|>"
PROMPT = "{prompt}"
"""Where the prompt's words stand in the request."""


class JanusProAdapter(DecoderAdapter):
    """Janus-Pro: reasons, draws codes one after the other, and looks at pictures.

    Layout of a context, one linear sequence: ``bos``, the conversation as words, and wherever a picture is
    seen ``begin + features + end`` of the vision tower. An image being drawn is ``begin + codes`` behind it.
    Nothing later sees the codes: a drawn picture that is looked at is decoded and read by the tower, in a
    turn of the user.

    The Llama speaks *and* draws. The ``text`` group is all of it with its head, and ``optim.text_lr`` its
    rate in both tasks; the ``flow`` group is what only draws (generation embeddings, aligner and head).

    The published models: :meth:`from_pretrained`.

    Source: Janus-Pro, https://arxiv.org/abs/2501.17811.

    Args:
        config: sizes.
        tokenizer: turns prompts into ids.
        marks: ids of the special tokens.
        net: the network; ``None`` builds one with random weights.
        vq: codes to pixels; without it :meth:`decode` is a subclass's business.
        vision: the tower that looks at pictures; without it there are neither input images nor reflection.
        pictures: how pixels are brought to the tower; ``None`` = the defaults of ``transformers``.
        system_prompt: stands before the conversation.
        request: what the user says, with ``{prompt}`` where the prompt's words stand.
        look_prompt: what the user says when a drawn picture is shown, in a plan that goes on after it.
        lora: train low-rank adapters of the Llama instead of the weights; the base is then the reference,
            and its dtype may be ``bfloat16``.
        detach_context: cut the image loss's gradient into the reasoning's keys and values.
        gradient_checkpointing: recompute each layer in the backward pass.
        attention: of the packed pass: ``sdpa``, or ``flex`` (FlexAttention) on a GPU.
        freeze: parameters that are not trained, by any part of their names: ``("generation_",)`` for all that
            only draws (as T2I-R1 does), ``("embed_tokens", "lm_head")`` for the vocabulary.
        share_prefixes: in the packed pass, run what trajectories begin with in common (the prompt of a
            group, given images, equal reasonings) once for all of them; the numbers stay the same.
    """

    net: JanusProNet
    image_policy: ClassVar[ImagePolicy] = "tokens"

    def __init__(
        self,
        config: JanusConfig,
        tokenizer: Tokenizer,
        *,
        marks: Marks,
        net: JanusProNet | None = None,
        vq: JanusVQ | None = None,
        vision: JanusVision | None = None,
        pictures: PictureProcessor | None = None,
        system_prompt: str | None = None,
        request: str = PROMPT,
        look_prompt: str = "Compare the picture with the request, and say what to draw better.",
        lora: LowRank | None = None,
        detach_context: bool = False,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flex"] = "sdpa",
        freeze: Sequence[str] = (),
        share_prefixes: bool = True,
    ) -> None:
        super().__init__(
            net or JanusProNet(config),
            stop_token=marks.eos,
            lora=lora,
            detach_context=detach_context,
            gradient_checkpointing=gradient_checkpointing,
            attention=attention,
            freeze=freeze,
            share_prefixes=share_prefixes,
        )
        if PROMPT not in request:
            raise ValueError(
                f"adapter.request is {request!r}; it must hold {PROMPT}, where the prompt's words stand."
            )
        self.config: Any = config
        size: int = cast(Any, config.vision_config).image_size
        self.tokenizer = tokenizer
        self.marks = marks
        # A dict, not attributes: checkpoints hold neither, and no strategy wraps them.
        self._frozen = {"vq": vq, "vision": vision}
        self.pictures = pictures or PictureProcessor(size=size)
        self.system_prompt, self.request, self.look_prompt = system_prompt, request, look_prompt

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str = "float32",
        vision: bool = True,
        revision: str | None = None,
        **settings: Any,
    ) -> JanusProAdapter:
        """Open a published checkpoint; its weights are read by :meth:`materialize`, when training begins.

        Args:
            source: a folder, or a hub id such as ``deepseek-community/Janus-Pro-7B``; in the layout of
                ``transformers``, or the original one (``deepseek-ai/Janus-Pro-7B``, downloaded before).
            dtype: of the network: ``float32`` for full fine-tuning (with ``bf16-mixed`` compute),
                ``bfloat16`` for a frozen base under LoRA and for inference.
            vision: build the vision tower; without it there are neither input images nor reflection.
            revision: of a hub id.
            settings: the other arguments of the constructor.

        Raises:
            FileNotFoundError: for a wrong folder, missing files, or a hub that cannot be reached.
            ValueError: for truncated files, weights of another model, or an unknown dtype.
        """
        # Here, because it imports this module.
        from lightning_unigrpo.adapters.januspro.pretrained import open_checkpoint

        found = open_checkpoint(source, dtype=dtype, vision=vision, revision=revision)
        adapter = cls(
            found.config,
            found.tokenizer,
            marks=found.marks,
            net=found.net,
            vq=found.vq,
            vision=found.vision,
            pictures=found.pictures,
            **settings,
        )
        adapter.source = found
        return adapter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights in the layout of ``transformers``, whichever they came in."""
        from lightning_unigrpo.adapters.januspro.pretrained import save_pretrained

        save_pretrained(self, folder)

    @property
    def decoder(self) -> Any:
        """The Llama."""
        return self.net.model.language_model

    @property
    def vq(self) -> JanusVQ | None:
        """The VQ model."""
        return cast("JanusVQ | None", self._frozen["vq"])

    @property
    def vision(self) -> JanusVision | None:
        """The vision tower."""
        return cast("JanusVision | None", self._frozen["vision"])

    def frozen_modules(self) -> list[nn.Module]:
        """Return the VQ model and the vision tower."""
        return [module for module in self._frozen.values() if module is not None]

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return the conversation up to the assistant's turn; input images stand in or before the request."""
        whole = replace(prompt, text=self.request.replace(PROMPT, prompt.text))
        request = PICTURE.join(words.replace(PICTURE, "") for words in whole.pieces("\n"))
        text = conversation([(USER, request), (ASSISTANT, None)], system=self.system_prompt or "")
        first, *rest = text.split(PICTURE)
        segments: list[Segment] = [self.given([self.marks.bos, *self.tokenizer.encode(first)])]
        for pixels, between in zip(prompt.images, rest, strict=True):
            segments += [self.read(pixels), self.given(self.tokenizer.encode(between))]
        return segments

    def read(self, pixels: Tensor) -> ImageSegment:
        """Return an input image as later segments see it.

        Args:
            pixels: ``[3, H, W]`` float32 in [0, 1], of any size.

        Raises:
            ValueError: when there is no vision tower.
        """
        none = torch.zeros(0, 0, device=self.device)
        marks = self.marks
        views = self._views(pixels, [marks.begin_image], [marks.end_image])
        return ImageSegment(latent=none, grid=(0, 0), is_context=True, views=views)

    def look(self, image: TokenImageSegment, *, turn_follows: bool = False) -> TokenImageSegment:
        """Show a drawn image: decoded, read by the tower, and put into a new turn of the user.

        Raises:
            ValueError: when there is no vision tower.
        """
        pixels = self.decode(image.tokens.unsqueeze(0), image.grid)[0]
        before, after = map(self.tokenizer.encode, picture_turn(self.look_prompt, USER, ASSISTANT))
        before = [self.marks.eos, *before, self.marks.begin_image]
        after = [self.marks.end_image, *([] if turn_follows else after)]
        return replace(image, views=self._views(pixels, before, after))

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return what the user says, up to the assistant's turn; ``request`` is of the first one only.

        In a turn that shows a picture it stands where ``look_prompt`` would; else the assistant's ends first.
        """
        if goes_on(behind, self.marks.end_image):
            return self.given(self.tokenizer.encode(picture_turn(text, USER, ASSISTANT)[1]))
        words = conversation([(USER, text), (ASSISTANT, None)])
        return self.given([self.marks.eos, *self.tokenizer.encode(words)])

    @torch.no_grad()
    def _views(
        self, pixels: Tensor, before: Sequence[int], after: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return what the tower sees, ``[n, d]``, and the ids around it."""
        if self.vision is None:
            raise ValueError(
                f"{type(self).__name__} has no vision tower to see a picture with: give adapter.vision true, "
                "or leave out input images and end model.sampling.plan with its only image."
            )
        pixels = self.pictures(pixels.to(self.device, torch.float32))
        with torch.autocast(self.device.type, enabled=False):
            features: Tensor = self.vision(pixels.unsqueeze(0))[0]
        return {
            "before": self.given(before).tokens,
            "features": features,
            "after": self.given(after).tokens,
        }

    @property
    def side(self) -> int:
        """Codes per side of a picture: the VQ model knows this one size."""
        found: int = self.config.vq_config.num_patches
        return found

    @property
    def pixels_per_code(self) -> int:
        """Image pixels per side of one code."""
        return int(2 ** (len(self.config.vq_config.channel_multiplier) - 1))

    def image_grid(self, prompt: Prompt) -> Grid:
        """Return the grid of codes, always the same.

        Raises:
            ValueError: when another size is asked for.
        """
        size = self.side * self.pixels_per_code
        if prompt.size not in (None, (size, size)):
            raise ValueError(
                f"Prompt.size is {prompt.size}; this model draws {(size, size)} only: give that, or leave it "
                "out."
            )
        return self.side, self.side

    @torch.no_grad()
    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        """Turn codes ``[B, N]`` into pixels ``[B, 3, H, W]`` in [0, 1].

        Raises:
            TypeError: when there is no VQ model and no subclass that decodes.
        """
        if self.vq is None:
            raise TypeError(
                f"{type(self).__name__} has no image decoder: give it a vq, or override "
                "decode(latents, grid) -> [B, 3, H, W]."
            )
        with torch.autocast(self.device.type, enabled=False):
            found: Tensor = self.vq(latents)
        return (found / 2 + 0.5).clamp(0, 1)

    # ---- rows

    def packer(self, *, share: bool = False) -> Packer:
        """Return an empty packer."""
        return Packer(
            width=self.decoder.config.hidden_size,
            begin_image=self.marks.begin_image,
            device=self.device,
            share=share,
        )

    def words(self, ids: Tensor, positions: Tensor) -> Pack:
        """Return a pack of words ``[M]`` at positions ``[M]`` that all want logits."""
        rows = torch.arange(len(ids), device=ids.device)
        return self._next(ids, ids[:0], positions, logit_rows=rows, image_rows=rows[:0])

    def _next(self, ids: Tensor, codes: Tensor, positions: Tensor, **rows: Tensor) -> Pack:
        none = torch.zeros(0, self.decoder.config.hidden_size, device=ids.device)
        return Pack(token_ids=ids, features=none, codes=codes, positions=positions, **rows)

    def see(self, packer: Packer, image: Image, position: int) -> int:
        """Add a picture's features and the words around it; one that was not looked at is not seen."""
        if "features" not in image.views:
            return 0
        before, after = (image.views[name].tolist() for name in ("before", "after"))
        features = image.views["features"]
        packer.seen(image, before, features, after, position)
        return len(before) + len(features) + len(after)

    def draw(self, packer: Packer, image: Image, position: int, steps: slice) -> None:
        """Add the rows that predict the codes."""
        assert isinstance(image, TokenImageSegment)
        packer.drawing(image, position)

    def image_scores(self, scores: Scores, outputs: Tensor, packer: Packer) -> None:
        """Enter the log-probabilities of the codes."""
        parts = outputs.split([len(image.tokens) for image in packer.drawn])
        scores.image_tokens = [
            token_log_probs(part, image.tokens.to(part.device), temperature=image.temperature)[0]
            for part, image in zip(parts, packer.drawn, strict=True)
        ]

    @torch.no_grad()
    def next_image_logits(  # type: ignore[override]
        self, cache: DecoderCache, tokens: Tensor, step: int, grid: Grid
    ) -> Tensor:
        """Feed the begin mark (step 0), or the code just drawn, to all rows; a later segment drops it all."""
        rows = torch.arange(len(cache), device=self.device)
        if step == 0:
            cache.branch()
            cache.reserve(tokens.shape[1])
            ids, codes = torch.full_like(rows, self.marks.begin_image), rows[:0]
        else:
            ids, codes = rows[:0], tokens[:, step - 1].to(self.device)
        cache.make_room(1)
        pack = self._next(ids, codes, cache.positions, logit_rows=rows[:0], image_rows=rows)
        logits: Tensor = self.net(pack, NextWord(cache, rows))[1]
        one = torch.ones_like(rows)
        cache.advance(one, one, most=1)
        return logits

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> DecoderCache:
        """Return contexts in which pad stands for each id but ``bos`` and ``begin``, as long as these are."""
        # The stop token behind them is not read.
        return self.prefill([[self.given([*self._masked(c), self.stop_token])] for c in contexts])

    def _masked(self, context: Sequence[Segment]) -> list[int]:
        ids: list[int] = []
        for segment in context:
            if isinstance(segment, TextSegment):
                ids += self._read_ids(segment)
            elif segment.is_context and "features" in segment.views:
                before, after = (segment.views[name].tolist() for name in ("before", "after"))
                ids += [*before, *[self.marks.pad] * len(segment.views["features"]), *after]
        kept = (self.marks.bos, self.marks.begin_image)
        return [i if i in kept else self.marks.pad for i in ids]

    # ---- strategies, optimizers, memory

    def is_flow(self, name: str) -> bool:
        """Whether a parameter of ``net`` only draws; the Llama does both and is none."""
        return any(part in name for part in FLOW_MODULES)

    def unreached(self, plan: Sequence[str]) -> list[nn.Parameter]:
        """Return what only draws, without images; the head, without texts."""
        found: list[nn.Parameter] = [] if "image" in plan else self.param_groups()["flow"]
        if "text" not in plan:
            found += [p for p in self.net.lm_head.parameters() if p.requires_grad]
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
        vision = self.config.vision_config
        picture = 2 + (vision.image_size // vision.patch_size) ** 2
        # "\n" after each picture.
        given = self._template() + prompt_tokens + len(prompt.images) * (picture + 1)
        # What closes the assistant's turn, and "<|User|>: "; what is said.
        before, after = map(self._count, picture_turn(self.look_prompt, USER, ASSISTANT))
        shown = 1 + before + picture
        found = footprint(
            self.config,
            sampling,
            Rows(given=given, codes=self.side**2, looked_at=shown + after, shown=shown),
            gradient_checkpointing=self.net.gradient_checkpointing,
            dtype=dtype,
            weights=self.decoder.embed_tokens.weight.dtype,
        )
        caches = 2 if evaluate and sampling.guidance_scale != 1 else 1
        return found._replace(cache=caches * found.cache)

    def _template(self) -> int:
        """Return how many words every prompt begins with."""
        turns = [(USER, self.request.replace(PROMPT, "x")), (ASSISTANT, None)]
        words = conversation(turns, system=self.system_prompt or "")
        return 1 + self._count(words) - self._count("x")

    def _count(self, text: str) -> int:
        # Without a tokenizer sizes are only estimated: about four letters to a token.
        return len(self.tokenizer.encode(text)) if self.tokenizer else len(text) // 4


def load_januspro(source: str, **settings: Any) -> JanusProAdapter:
    """:meth:`JanusProAdapter.from_pretrained` under a name that a YAML file can give as ``class_path``.

    Args:
        source: a folder, or a hub id.
        settings: the other arguments of :meth:`JanusProAdapter.from_pretrained`.
    """
    return JanusProAdapter.from_pretrained(source, **settings)
