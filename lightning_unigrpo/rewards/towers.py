"""CLIP's two towers for rewards: found, held outside every module, moved away when not needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_unigrpo.reward import convert_images


class Towers:
    """A CLIP that turns images and texts into unit vectors; base of the rewards that compare them.

    The model is made when it is first needed: by :meth:`prepare`, else on the device of the images. It is
    frozen and in float32, whatever the precision of the run, and no part of the Lightning module: no
    strategy wraps it and no checkpoint holds it. Images pass Pillow's resize, so that scores do not depend
    on whether torchvision is installed; texts are cut at the model's length (77 tokens with both ends).

    Args:
        source: folder or hub id of a CLIP in the layout of transformers.
        processor: folder or hub id with its tokenizer and image settings; ``None`` = ``source``.
        revision: branch, tag or commit of ``source`` on the hub.
        batch_size: images, or texts, in one pass; memory only.
        offload: whether :meth:`release` moves the weights to the CPU, so that updates have the memory.

    Raises:
        ValueError: when ``batch_size`` is no count.
    """

    def __init__(
        self,
        source: str,
        *,
        processor: str | None = None,
        revision: str | None = None,
        batch_size: int = 32,
        offload: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"{self._key('batch_size')} is {batch_size}; give 1 or more.")
        self.source, self.revision = source, revision
        self.processor, self.batch_size, self.offload = processor, batch_size, offload
        self._device = torch.device("cpu")
        self._model: Any = None
        self._tokenizer: Any = None
        self._image_processor: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the weights behind: another process reads its own."""
        return self.__dict__ | {"_model": None}

    # ---- the two calls of a collection

    def prepare(self, device: torch.device | str) -> None:
        """Have the model on a device.

        Args:
            device: of the images that will be scored.

        Raises:
            FileNotFoundError: when a file is missing here and cannot be had from the hub.
            ValueError: when what was found is no CLIP, or tokenizer and model do not belong together.
        """
        if self._model is None:
            model = self._load()
            self._read_processor(model.config)
            self._model = model.eval().requires_grad_(False)
        self._device = torch.device(device)
        self._model.to(device)

    def release(self) -> None:
        """Give the device its memory back, if asked for."""
        if self.offload and self._model is not None:
            self._model.to("cpu")

    # ---- vectors

    @torch.no_grad()
    def embed_images(self, images: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Return the unit vectors of images.

        Args:
            images: ``[n, 3, H, W]`` float32 in [0, 1], or a list when sizes differ or some are missing.

        Returns:
            ``[n, E]`` float32 on the images' device, NaN where there is no image.
        """
        drawn = [i for i, image in enumerate(images) if image is not None]
        here = images[drawn[0]].device if drawn else self._device  # type: ignore[union-attr]
        self.prepare(here)
        found = torch.full((len(images), self._model.config.projection_dim), torch.nan, device=here)
        found = found.float()  # a run in half precision changes the default
        pictures = convert_images([images[i] for i in drawn], "pil")
        for first in range(0, len(drawn), self.batch_size):
            part = slice(first, first + self.batch_size)
            pixels = self._image_processor(images=pictures[part], return_tensors="pt").pixel_values
            vectors = self._model.get_image_features(pixel_values=pixels.float().to(here))
            found[drawn[part]] = normalize(vectors.pooler_output, dim=-1)
        return found

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Return the unit vectors ``[n, E]`` float32 of texts; equal texts are read once."""
        self.prepare(device)
        different = list(dict.fromkeys(texts))
        parts = []
        for first in range(0, len(different), self.batch_size):
            tokens = self._tokenizer(
                different[first : first + self.batch_size],
                padding=True,
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(device)
            vectors = self._model.get_text_features(tokens.input_ids, tokens.attention_mask)
            parts.append(normalize(vectors.pooler_output, dim=-1))
        rows = {text: row for row, text in enumerate(different)}
        return torch.cat(parts)[[rows[text] for text in texts]]

    @property
    def logit_scale(self) -> float:
        """The factor that the model was trained with, 100 for most."""
        return float(self._model.logit_scale.exp())

    # ---- files

    def _load(self) -> Any:
        from transformers import CLIPModel

        self._read_config()
        model, report = self._read(
            "source", CLIPModel, dtype=torch.float32, output_loading_info=True
        )
        self._require_whole("source", self.source, report)
        return model

    def _read_config(self) -> Any:
        """Return the settings of the model.

        Raises:
            ValueError: when it is no CLIP.
        """
        from transformers import AutoConfig

        config = self._read("source", AutoConfig)
        if config.model_type != "clip":
            raise ValueError(
                f"{self._key('source')} is {self.source!r}, a model of type {config.model_type!r}; give a "
                "CLIP (model_type 'clip'), such as 'openai/clip-vit-large-patch14'."
            )
        return config

    def _require_whole(self, setting: str, name: str, report: Any) -> None:
        """Refuse a model of which weights were made up because no file held them."""
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"{self._key(setting)} is {name!r}, which lacks weights of a CLIP: "
                f"{', '.join(missing[:3])}{' …' * (len(missing) > 3)}."
            )

    def _read_processor(self, config: Any) -> None:
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        where = "source" if self.processor is None else "processor"
        self._tokenizer = self._read(where, CLIPTokenizer)
        self._image_processor = self._read(where, CLIPImageProcessorPil)
        words, last, text = len(self._tokenizer), self._tokenizer.eos_token_id, config.text_config
        # 2 stands in older files, where the end is the largest id: transformers pull request 24773.
        if words > text.vocab_size or text.eos_token_id not in (2, last):
            raise ValueError(
                f"{self._key(where)} has {words} words, and ends a text by {last}; the model of "
                f"{self._key('source')} reads {text.vocab_size}, and looks for {text.eos_token_id}. Give "
                "the processor that belongs to the model."
            )

    def _read(self, where: str, kind: Any, **settings: Any) -> Any:
        """Read something from where a setting points."""
        name = self.source if where == "source" else str(self.processor)
        folder = Path(name).expanduser()
        revision = self.revision if where == "source" else None
        try:
            return kind.from_pretrained(
                folder if folder.is_dir() else name, revision=revision, **settings
            )
        # All of them: OSError for what is missing, ValueError for a config that names no model,
        # and what the hub's client raises for a name that is none.
        except Exception as error:
            raise not_found(self._key(where), name, error) from error

    def _key(self, setting: str) -> str:
        return f"model.rewards: {type(self).__name__}.{setting}"


def not_found(key: str, name: str, error: Exception) -> FileNotFoundError:
    """Return the error that says what to do about a model that could not be read."""
    reason = " ".join(str(error).split())
    return FileNotFoundError(
        f"{key} is {name!r}, which cannot be read ({type(error).__name__}: {reason[:300]}). Give a folder, "
        f"or a hub id: without a network run `hf download {name}` first, where there is one."
    )
