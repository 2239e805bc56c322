"""Reads the package's docstrings as the reference pages need them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`(?P<short>~?)\.?(?P<name>[^`]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
LITERAL = re.compile(r"::\n\n(?= {4})")
ATTRIBUTION = re.compile(r"\n\n(Source|Deviation): ")


class Docstrings(griffe.Extension):
    """Turns what is Sphinx's in docstrings into Markdown: roles, and the double colon before code.

    ``Example:`` becomes the section that griffe renders as code, and what is a source or a deviation
    from the paper stands out.
    """

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of a package, when every name in them can be resolved."""
        for owner in objects(pkg):
            if owner.docstring is not None:
                owner.docstring.value = to_markdown(owner.docstring.value, owner)


def objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    """Walk an object and what it defines itself."""
    yield owner
    for member in owner.members.values():
        if isinstance(member, griffe.Object):
            yield from objects(member)


def to_markdown(text: str, owner: griffe.Object) -> str:
    """Return a docstring in Markdown.

    Args:
        text: of the docstring.
        owner: in whose scope its names are looked up.
    """
    text = ROLE.sub(lambda role: link(role["name"], bool(role["short"]), owner), text)
    text = LITERAL.sub(":\n\n", EXAMPLE.sub("Examples:", text))
    return ATTRIBUTION.sub(r"\n\n**\1**: ", text)


def link(name: str, short: bool, owner: griffe.Object) -> str:
    """Return a link to a name, or the name alone where no page shows it."""
    shown = f"<code>{name.rpartition('.')[2] if short else name}</code>"
    head, dot, tail = name.partition(".")
    if head != owner.package.name:
        try:
            name = owner.resolve(head) + dot + tail
        except griffe.NameResolutionError:
            return shown
    return f'<autoref optional identifier="{name}">{shown}</autoref>'
