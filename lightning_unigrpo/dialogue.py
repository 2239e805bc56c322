"""What the user says between the rounds of a trajectory: the turns of ``sampling.plan``.

``model.turns`` is a list of texts, or a callable that is called like a reward::

    def turns(*, images, prompts, completions, turn, **columns) -> Sequence[str | None]

It receives what its signature names, of trajectories as they stand: ``images``, the last one that each drew,
in the form its ``image_format`` says; ``turn``, the number of the turn from 0; the rest as rewards do
(:mod:`lightning_unigrpo.reward`). ``None`` ends a trajectory there. What it says is part of the state: no
gradient passes, and it must not depend on which other trajectories are drawn beside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from lightning_unigrpo.reward import (
    ImageFormat,
    call_plainly,
    convert_images,
    gather_columns,
    select_columns,
)
from lightning_unigrpo.types import Prompt, Trajectory

Source: TypeAlias = Sequence[str] | Callable[..., Any]
"""What ``model.turns`` may be."""
WHO = "model.turns"


class Script:
    """Says the same to every trajectory.

    Args:
        *texts: turn by turn; the last one in all that follow.

    Example:
        >>> Script("What is wrong?", "And now?")(prompts=["a cat", "a dog"], turn=5)
        ['And now?', 'And now?']
    """

    def __init__(self, *texts: str) -> None:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{WHO} is {list(texts)}; give one text or more.")
        self.texts = texts

    def __call__(self, *, prompts: Sequence[str], turn: int) -> list[str]:
        """Return the text of a turn, as often as there are prompts."""
        return [self.texts[min(turn, len(self.texts) - 1)]] * len(prompts)

    def known(self, prompt: Prompt) -> Sequence[str]:
        """Return all that will be said."""
        return self.texts


class Column:
    """Says what stands in a column of the data set: a list of texts for each prompt, turn by turn.

    A trajectory ends where the list of its prompt does.

    Args:
        name: of the column.

    Example:
        >>> edits = [["larger", "blue"], ["on grass"]]
        >>> Column("edits")(prompts=["a cat", "a dog"], edits=edits, turn=1)
        ['blue', None]
    """

    def __init__(self, name: str = "turns") -> None:
        self.name = name

    def __call__(
        self, *, prompts: Sequence[str], turn: int, **columns: Sequence[Any]
    ) -> list[str | None]:
        """Return the texts of a turn, None behind the end of a list."""
        found = columns.get(self.name, [None] * len(prompts))
        lists = map(self._texts, prompts, found)
        return [texts[turn] if turn < len(texts) else None for texts in lists]

    def known(self, prompt: Prompt) -> Sequence[str]:
        """Return all that will be said to trajectories of a prompt.

        Raises:
            ValueError: when it does not say.
        """
        return self._texts(prompt.text, prompt.columns.get(self.name))

    def _texts(self, prompt: str, found: Any) -> Sequence[str]:
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"The column {self.name!r} of prompt {prompt[:80]!r} holds {found!r}; {WHO} wants a list of "
                "texts there."
            )
        return texts


class Turns:
    """Lets a source speak, and looks at what it says.

    Args:
        source: texts, turn by turn, or a callable.

    Raises:
        ValueError: when it is nothing of the kind.
    """

    def __init__(self, source: Source) -> None:
        if isinstance(source, str):
            raise ValueError(f"{WHO} is {source!r}; give a list of texts, or a callable.")
        self.source = source if callable(source) else Script(*source)

    @property
    def needs_images(self) -> bool:
        """Whether it may look at what was drawn: what is known beforehand does not depend on it."""
        return not hasattr(self.source, "known")

    def prepare(self, device: torch.device) -> None:
        """Let a source open what it needs, before the first rollout of a collection is drawn."""
        prepare = getattr(self.source, "prepare", None)
        if prepare is not None:
            prepare(device)

    def close(self) -> None:
        """Let a source close what it opened."""
        release = getattr(self.source, "release", None)
        if release is not None:
            release()

    def known(self, prompt: Prompt) -> Sequence[str]:
        """Return what is known, before anything is drawn, to be said to trajectories of a prompt."""
        known = getattr(self.source, "known", None)
        return () if known is None else known(prompt)

    def __call__(self, trajectories: Sequence[Trajectory], number: int) -> list[str | None]:
        """Return what the user says to each trajectory as it stands; None = nothing more.

        Raises:
            ValueError: when the source does not answer with a text or None for each.
        """
        columns = gather_columns(trajectories) | {"turn": number}
        chosen = select_columns(self.source, columns, WHO)
        if "images" in chosen:
            kind: ImageFormat = getattr(self.source, "image_format", "tensor")
            chosen["images"] = convert_images(chosen["images"], kind)
        said = call_plainly(self.source, chosen)
        fits = isinstance(said, Sequence) and not isinstance(said, str)
        if not fits or len(said) != len(trajectories) or not all(map(_is_turn, said)):
            raise ValueError(
                f"{WHO} was asked for turn {number} of {len(trajectories)} trajectories and returned "
                f"{said!r}; it must return a list with a text, or None, for each."
            )
        return list(said)


def _is_turn(said: Any) -> bool:
    return said is None or isinstance(said, str)
