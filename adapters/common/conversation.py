"""DeepSeek's conversation template, which the Janus family was tuned with."""

from __future__ import annotations

from collections.abc import Sequence

TURN, END = "\n\n", "<｜end▁of▁sentence｜>"
"""What stands behind a message, by turns: of the user, of the assistant."""
PICTURE = "\x00"
"""Where a picture stands in a conversation that is still text."""


def conversation(turns: Sequence[tuple[str, str | None]], *, system: str = "") -> str:
    r"""Write a conversation as one text, without the mark that opens it.

    ``system + "\n\n"``, then ``role + ": " + message + separator`` for each turn, or ``role + ":"`` where the
    message is to come.

    Source: upstream's ``janus/utils/conversation.py`` (``deepseek``), by description.

    Args:
        turns: role and message; ``None`` or an empty message is to be written by the model.
        system: stands before all turns; empty = nothing.

    Returns:
        The text, without white space at its ends.

    Example:
        >>> conversation([("User", "a red cube "), ("Assistant", None)], system="Think.")
        'Think.\n\nUser: a red cube\n\nAssistant:'
    """
    parts = [system + TURN] if system else []
    for place, (role, message) in enumerate(turns):
        words = (message or "").strip()
        parts.append(f"{role}: {words}{END if place % 2 else TURN}" if words else f"{role}:")
    return "".join(parts).strip()


def picture_turn(text: str, user: str, assistant: str) -> tuple[str, str]:
    r"""Write a turn in which the user shows a picture, up to the assistant's.

    Args:
        text: what the user says of it.
        user: role.
        assistant: role.

    Returns:
        What stands before the picture, and behind it.

    Example:
        >>> picture_turn("Bluer.", "User", "Assistant")
        ('User: ', '\nBluer.\n\nAssistant:')
    """
    words = text.replace(PICTURE, "").strip()
    before, behind = conversation([(user, f"{PICTURE}\n{words}"), (assistant, None)]).split(PICTURE)
    return before, behind
