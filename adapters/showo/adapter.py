"""Show-o, the first generation, as one policy: a phi-1.5 reasons, and unmasks the codes of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_unigrpo.adapter import Footprint, ImagePolicy, token_log_probs
from lightning_unigrpo.adapters.common.adapter import DecoderAdapter, Image
from lightning_unigrpo.adapters.common.attention import CachedAttention
from lightning_unigrpo.adapters.common.cache import DecoderCache
from lightning_unigrpo.adapters.common.decoder import cache_sizes
from lightning_unigrpo.adapters.common.tokenizer import Tokenizer
from lightning_unigrpo.adapters.showo.cache import ShowOCache
from lightning_unigrpo.adapters.showo.config import VQ, ShowOConfig
from lightning_unigrpo.adapters.showo.footprint import Rows, footprint
from lightning_unigrpo.adapters.showo.lora import LoRA
from lightning_unigrpo.adapters.showo.network import Pack, ShowONet
from lightning_unigrpo.adapters.showo.packing import Packer, Runs
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.types import (
    Grid,
    Prompt,
    Scores,
    Segment,
    TextSegment,
    TokenImageSegment,
)

if TYPE_CHECKING:
    from lightning_unigrpo.adapters.showo.vq import ShowOVQ

PROMPT = "{prompt}"
"""Where the prompt's words stand in the request."""
STRIDE = 16
"""Image pixels per side of one code, where no VQ model says so."""


class ShowOAdapter(DecoderAdapter):
    """Show-o: reasons, and draws by unmasking codes some at a time.

    Not one sequence but two, coupled by words. A text is ``bos, words`` and goes on word by word. An image
    is drawn behind ``task, bos, words, eos``, left-padded to ``max_prompt_tokens + 1`` places, as ``begin,
    codes and masks, end`` whose rows see each other. The words are those of the context (request and
    reasonings), decoded and tokenised again; the rollout records their ids in the image's segment, and
    words that do not fit are an error, never cut off. So the image's loss reaches the weights through its
    own reading of the words, and no gradient passes into the keys and values of the reasoning.

    A drawn image that is looked at stays in the context of words as ``begin, codes, end, bos``; the next
    image is drawn behind words alone again.

    One vocabulary holds words, codes and the mask, and one phi-1.5 says all of them: the ``text`` group is
    the whole network, and ``optim.text_lr`` its rate in both tasks; the ``flow`` group is empty. A text is
    drawn from words alone, an image from codes alone.

    The published models: :meth:`from_pretrained`.

    Source: Show-o, https://arxiv.org/abs/2408.12528.

    Args:
        config: sizes and special tokens.
        tokenizer: turns prompts into ids.
        net: the network; ``None`` builds one with random weights.
        vq: codes to pixels; without it :meth:`decode` is a subclass's business.
        request: what the reasoning follows, with ``{prompt}`` where the prompt's words stand; all of it is
            part of what an image is drawn behind.
        max_prompt_tokens: words that fit before an image, ``bos`` and ``eos`` included (upstream: 128).
        lora: train low-rank adapters instead of the weights; the base is then the reference, and its dtype
            may be ``bfloat16``.
        gradient_checkpointing: recompute each layer in the backward pass.
        attention: of the packed pass: ``sdpa``, or ``flex`` (FlexAttention) on a GPU.
        freeze: parameters that are not trained, by any part of their names: ``("embed_tokens", "lm_head")``
            for the vocabulary.
        share_prefixes: in the packed pass, run what trajectories begin with in common (the prompt of a
            group, equal reasonings) once for all of them; the numbers stay the same.
    """

    net: ShowONet
    image_policy: ClassVar[ImagePolicy] = "masked"

    def __init__(
        self,
        config: ShowOConfig,
        tokenizer: Tokenizer,
        *,
        net: ShowONet | None = None,
        vq: ShowOVQ | None = None,
        request: str = PROMPT,
        max_prompt_tokens: int = 128,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "flex"] = "sdpa",
        freeze: Sequence[str] = (),
        share_prefixes: bool = True,
    ) -> None:
        super().__init__(
            net or ShowONet(config),
            stop_token=config.eos,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            attention=attention,
            freeze=freeze,
            share_prefixes=share_prefixes,
        )
        if PROMPT not in request:
            raise ValueError(
                f"adapter.request is {request!r}; it must hold {PROMPT}, where the prompt's words stand."
            )
        self.config, self.tokenizer = config, tokenizer
        # A dict, not an attribute: checkpoints do not hold it, and no strategy wraps it.
        self._frozen = {"vq": vq}
        self.request, self.max_prompt_tokens = request, max_prompt_tokens

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        language: str | Path | None = None,
        vq: str | Path = VQ,
        dtype: str = "float32",
        revision: str | None = None,
        language_revision: str | None = None,
        vq_revision: str | None = None,
        **settings: Any,
    ) -> ShowOAdapter:
        """Open a published checkpoint; its weights are read by :meth:`materialize`, when training begins.

        Args:
            source: a folder in the published layout, or a hub id: ``showlab/show-o-512x512``.
            language: a folder or hub id of the phi-1.5 it was built from, whose sizes and tokenizer are
                read; ``None`` = ``source`` itself where it has a tokenizer, else what its config.json names.
            vq: a folder or hub id of the MAGVIT-v2 that draws codes.
            dtype: of the network: ``float32`` for full fine-tuning (with ``bf16-mixed`` compute),
                ``bfloat16`` for a frozen base under LoRA and for inference.
            revision: of a hub id.
            language_revision: of the language model's.
            vq_revision: of the VQ model's.
            settings: the other arguments of the constructor.

        Raises:
            FileNotFoundError: for a wrong folder, missing files, or a hub that cannot be reached.
            ValueError: for truncated files, weights of another model, or an unknown dtype.
        """
        # Here, because it imports this module.
        from lightning_unigrpo.adapters.showo.pretrained import open_checkpoint

        found = open_checkpoint(
            source,
            language=language,
            vq=vq,
            dtype=dtype,
            revision=revision,
            language_revision=language_revision,
            vq_revision=vq_revision,
        )
        adapter = cls(found.config, found.tokenizer, net=found.net, vq=found.vq, **settings)
        adapter.source = found
        return adapter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights in the published layout, which upstream and :meth:`from_pretrained` load."""
        from lightning_unigrpo.adapters.showo.pretrained import save_pretrained

        save_pretrained(self, folder)

    @property
    def decoder(self) -> Any:
        """The phi-1.5."""
        return self.net.showo.model

    @property
    def vq(self) -> ShowOVQ | None:
        """The VQ model."""
        return self._frozen["vq"]

    def frozen_modules(self) -> list[nn.Module]:
        """Return the VQ model."""
        return [module for module in self._frozen.values() if module is not None]

    # ---- words and pixels

    def tokenize(self, prompt: Prompt) -> list[Segment]:
        """Return ``bos`` and the request.

        Raises:
            ValueError: when the prompt brings images: an image is drawn behind words alone.
        """
        if prompt.images:
            raise ValueError(
                f"Prompt {prompt.text!r} brings {len(prompt.images)} input images, but {type(self).__name__} "
                "draws behind words alone: leave them out."
            )
        return [self.given([self.config.bos, *self.tokenizer.encode(self._words_of(prompt))])]

    def turn(self, text: str, behind: Segment) -> TextSegment:
        """Return what the user says: words that go on behind an image, or in a new line.

        They are words of the context like those of the request, so the next image is drawn behind them, too.
        """
        is_apart = not isinstance(behind, TextSegment) and behind.is_context
        return self.given(self.tokenizer.encode(text if is_apart else f"\n{text}"))

    def _words_of(self, prompt: Prompt) -> str:
        return self.request.replace(PROMPT, prompt.text)

    def image_grid(self, prompt: Prompt) -> Grid:
        """Return the grid of codes, always the same.

        Raises:
            ValueError: when another size is asked for.
        """
        size = self.config.side * (STRIDE if self.vq is None else self.vq.stride)
        if prompt.size not in (None, (size, size)):
            raise ValueError(
                f"Prompt.size is {prompt.size}; this model draws {(size, size)} only: give that, or leave it "
                "out."
            )
        return self.config.side, self.config.side

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
            found: Tensor = self.vq.decode(latents, grid)
        return (found / 2 + 0.5).clamp(0, 1)

    # ---- the words that an image is drawn behind

    def prefix(self, heard: Runs) -> list[int]:
        """Return ``task, bos, words, eos`` for the words of a context, tokenised anew.

        Args:
            heard: ids of words, a list for each stretch between images; the stretches become lines.

        Raises:
            ValueError: when they do not fit.
        """
        config = self.config
        marks = {config.bos, config.eos}
        lines = [self.tokenizer.decode([i for i in ids if i not in marks]) for ids in heard]
        found = [config.task, config.bos, *self.tokenizer.encode("\n".join(lines)), config.eos]
        if len(found) > self.image_start:
            raise ValueError(
                f"The words before an image are {len(found) - 1} tokens, bos and eos included, but "
                f"adapter.max_prompt_tokens is {self.max_prompt_tokens}, and nothing is cut off: lower "
                "model.sampling.max_text_tokens, or shorten the prompts. The words are "
                f"{lines[0][:80]!r} ..."
            )
        return found

    @property
    def image_start(self) -> int:
        """Position of an image's first row: the words before it end there, and are padded on the left."""
        return self.max_prompt_tokens + 1

    def require_room(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raise when the words of a prompt and of reasonings at their longest do not fit before an image.

        Raises:
            ValueError: saying how many fit.
        """
        if not sampling.num_images:
            return
        steps = sampling.steps
        last = max(n for n, step in enumerate(steps) if step.kind == "image")
        said = sum(step.max_tokens for step in steps[:last])
        own = len(self.tokenizer.encode(self._words_of(prompt)))
        room = self.max_prompt_tokens - 2 - own
        if said > room:
            raise ValueError(
                f"Prompt {prompt.text[:80]!r} takes {own} tokens, so {max(room, 0)} of "
                f"adapter.max_prompt_tokens {self.max_prompt_tokens} are left for what follows, but "
                f"model.sampling.plan, max_text_tokens and max_turn_tokens allow {said}: lower "
                "model.sampling.max_text_tokens, or shorten the prompt."
            )

    def image_prefix(self, cache: ShowOCache) -> list[Tensor]:  # type: ignore[override]
        """Return the words that each row's next image is drawn behind, ``[P]``.

        Raises:
            ValueError: when they do not fit.
        """
        if cache.prefixes is None:
            cache.prefixes = [self._rows(self.prefix(heard)) for heard in cache.heard]
        return cache.prefixes

    # ---- rows

    def packer(self, *, share: bool = False) -> Packer:
        """Return an empty packer."""
        return Packer(config=self.config, device=self.device, share=share)

    def words(self, ids: Tensor, positions: Tensor) -> Pack:
        """Return a pack of words ``[M]`` at positions ``[M]`` that all want logits."""
        rows = torch.arange(len(ids), device=ids.device)
        return Pack(token_ids=ids, positions=positions, logit_rows=rows, image_rows=rows[:0])

    def see(self, packer: Packer, image: Image, position: int) -> int:
        """Add the codes of an image and the marks around them."""
        assert isinstance(image, TokenImageSegment)
        return packer.picture(image, position)

    def behind(self, image: Image) -> list[int]:
        """Return what opens the words behind an image."""
        return [self.config.bos]

    def draw(self, packer: Packer, image: Image, position: int, steps: slice) -> None:
        """Add the steps that are scored, behind the words that were recorded when the image was drawn."""
        assert isinstance(image, TokenImageSegment)
        ids = self.prefix(packer.heard) if image.prefix is None else image.prefix.tolist()
        packer.drawing(image, ids, steps, self.image_start)

    def image_scores(self, scores: Scores, outputs: Tensor, packer: Packer) -> None:
        """Enter the log-probabilities of the codes that the steps revealed."""
        parts = outputs.split([len(where) for _, where in packer.drawn])
        scores.image_tokens = [
            token_log_probs(
                part, image.tokens.to(part.device)[where], temperature=image.temperature
            )[0]
            for part, (image, where) in zip(parts, packer.drawn, strict=True)
        ]

    def _pack(self, packer: Packer, segment: Segment, position: int, steps: slice) -> int:
        if isinstance(segment, TextSegment):
            packer.heard[-1] += self._read_ids(segment)
        taken = super()._pack(packer, segment, position, steps)
        if not isinstance(segment, TextSegment) and segment.is_context:
            packer.heard.append([])
        return taken

    # ---- sampling

    def new_cache(self, num_rows: int, dtype: torch.dtype) -> ShowOCache:
        """Return a cache of empty contexts, its keys and values in ``dtype``."""
        return ShowOCache(
            cache_sizes(self.decoder.config),
            num_rows,
            device=self.device,
            dtype=dtype,
            vocab_size=self.config.num_words,
        )

    def _read(self, cache: ShowOCache, segments: Sequence[Segment | None]) -> None:  # type: ignore[override]
        cache.forget_image()
        super()._read(cache, segments)
        for heard, segment in zip(cache.heard, segments, strict=True):
            if isinstance(segment, TextSegment):
                heard[-1] += self._read_ids(segment)
            elif segment is not None and segment.is_context:
                heard.append([])

    @torch.no_grad()
    def masked_logits(  # type: ignore[override]
        self, cache: ShowOCache, tokens: Tensor, where: Tensor, grid: Grid
    ) -> Tensor:
        """Run one image per row behind its words; its keys go to scratch slots that nothing remembers."""
        if cache.plan is None:
            cache.beside = self._lay_out(cache)
            packer = self.packer()
            for row in tokens:
                packer.sample()
                packer.state(row, (), self.image_start)
            pack, layout = packer.finish()
            cache.beside.reserve(layout.rows.shape[1])
            cache.plan = pack, CachedAttention(cache.beside, layout)
        pack, attention = cache.plan
        ids = torch.where(tokens < 0, self.config.mask_id, tokens + self.config.code_offset)
        rows = torch.arange(len(pack), device=self.device).view(len(tokens), -1)
        framed = pack.token_ids.view_as(rows).clone()
        framed[:, 1:-1] = ids
        asked = replace(pack, token_ids=framed.flatten(), image_rows=rows[:, 1:-1][where])
        found: Tensor = self.net(asked, attention)[1]
        return found

    def _lay_out(self, cache: ShowOCache) -> DecoderCache:
        """Read the words that images are drawn behind into a cache of their own."""
        beside = self.new_cache(len(cache), cache.keys[0].dtype)
        packer, lengths = self.packer(), []
        for ids in self.image_prefix(cache):
            packer.sample()
            packer.words_before(ids.tolist(), self.image_start - len(ids))
            lengths.append(len(ids))
        beside.reserve(max(lengths, default=0))
        self.append(beside, packer, torch.tensor(lengths), range(len(lengths)))
        return beside

    def guidance(self, contexts: Sequence[Sequence[Segment]]) -> DecoderCache:
        """Return empty contexts: upstream's image behind ``task, bos, eos``.

        Upstream's ``guidance_scale`` s is ``sampling.guidance_scale`` 1 + s.
        """
        return self.prefill([[] for _ in contexts])

    # ---- strategies, optimizers, memory

    def is_flow(self, name: str) -> bool:
        """Whether a parameter of ``net`` only draws: none does."""
        return False

    def footprint(
        self,
        sampling: Sampling,
        *,
        prompt_tokens: int,
        dtype: torch.dtype,
        prompt: Prompt | None = None,
        evaluate: bool = False,
    ) -> Footprint:
        """Return the bytes per trajectory; guidance has caches of its own beside the rollout's."""
        given = 1 + self._count(self.request.replace(PROMPT, "")) + prompt_tokens
        found = footprint(
            self.config,
            sampling,
            Rows(given=given, prefix=self.image_start, codes=self.config.num_vq_tokens),
            gradient_checkpointing=self.net.gradient_checkpointing,
            dtype=dtype,
            weights=self.decoder.embed_tokens.weight.dtype,
        )
        caches = 2 if evaluate and sampling.guidance_scale != 1 else 1
        return found._replace(cache=caches * found.cache)

    def _count(self, text: str) -> int:
        # Without a tokenizer sizes are only estimated: about four letters to a token.
        return len(self.tokenizer.encode(text)) if self.tokenizer else len(text) // 4


def load_showo(source: str, **settings: Any) -> ShowOAdapter:
    """:meth:`ShowOAdapter.from_pretrained` under a name that a YAML file can give as ``class_path``.

    Args:
        source: a folder, or a hub id.
        settings: the other arguments of :meth:`ShowOAdapter.from_pretrained`.
    """
    return ShowOAdapter.from_pretrained(source, **settings)
