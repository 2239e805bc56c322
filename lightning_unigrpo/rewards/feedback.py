"""A vision-language model speaks for the user: what it finds wrong with a drawing is the next turn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from lightning_unigrpo.rewards.http import ServiceError
from lightning_unigrpo.rewards.judge import Judge, Question

QUESTION = (
    "Somebody asked for this picture: {prompt}\nIn one short sentence, say what must be changed so that it "
    "shows what was asked for. If nothing must be changed, reply DONE."
)


class Feedback(Judge):
    """Looks at each drawing and says what to change, for ``model.turns``.

    A trajectory whose drawing the judge is content with ends there. Where it cannot be reached, or says
    nothing, ``fallback`` is said: a turn is part of the state, so that costs information and biases nothing.

    Args:
        url: with the version, such as ``http://127.0.0.1:8000/v1``.
        model: name that the server knows it by.
        template: a question with ``{prompt}`` or other columns in braces, or a callable from a rollout's
            columns to a question.
        content: a reply that says this ends the trajectory.
        fallback: said in place of a reply.
        max_words: of a reply that are said; a judge may ramble, and context is memory.
        columns: what a callable template reads.
        settings: more fields of the request, such as ``{seed: 0}``.
        **service: see :class:`~lightning_unigrpo.rewards.http.RemoteReward`.

    Example:
        >>> speaker = Feedback("http://127.0.0.1:8000/v1", "qwen", "What is wrong with {prompt}?")
        >>> speaker.question({"prompt": "a cat"})
        'What is wrong with a cat?'
    """

    def __init__(
        self,
        url: str,
        model: str,
        template: Question | str = QUESTION,
        *,
        content: str = "DONE",
        fallback: str = "Look at the picture again and make it better.",
        max_words: int = 40,
        columns: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        **service: Any,
    ) -> None:
        if max_words < 1 or not fallback.strip():
            raise ValueError(
                f"Feedback got max_words={max_words} and fallback={fallback!r}; give 1 or more, and some "
                "words (model.turns)."
            )
        limit = {"max_tokens": 4 * max_words}
        super().__init__(
            url,
            model,
            template,
            lambda reply: None,
            columns=columns,
            settings={**limit, **(settings or {})},
            **service,
        )
        self.content, self.fallback, self.max_words = content, fallback, max_words

    def __call__(  # type: ignore[override]
        self, *, images: Sequence[Image.Image | None], **columns: Sequence[Any]
    ) -> list[str | None]:
        """Return what is said to each trajectory; None where there is nothing to change."""
        rows = self.rows(len(images), columns)
        with ThreadPoolExecutor(self.concurrency) as pool:
            found = [*pool.map(self._attempt, images, rows)]
        failed = [each for each in found if isinstance(each, ServiceError)]
        if failed:
            warnings.warn(
                f"The judge of model.turns did not answer for {len(failed)} of {len(found)} drawings, which "
                f"are told {self.fallback!r} instead: {failed[0]}",
                stacklevel=2,
            )
        return [self._said(each) for each in found]

    def _attempt(self, image: Image.Image | None, row: Mapping[str, Any]) -> str | ServiceError:
        if image is None:
            return ""
        try:
            return self.reply(image, row).text
        except ServiceError as error:
            return error

    def _said(self, reply: str | ServiceError) -> str | None:
        words = [] if isinstance(reply, ServiceError) else reply.split()
        if self.content in " ".join(words):
            return None
        return " ".join(words[: self.max_words]) or self.fallback
