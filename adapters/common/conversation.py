"""DeepSeek's conversation template, which the Janus family was tuned with."""

from __future__ import annotations

from collections.abc import Sequence

TURN, END = "\n\n", "<｜end▁of▁sentence｜>"
"""What stands behind a message, by turns: of the user, of the assistant."""


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
