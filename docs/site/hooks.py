"""What the site does to pages that are plain Markdown on a code host."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FIGURES = "benchmarks/results"
"""The only folder outside docs/ whose pictures pages show."""
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)\s]+)\)")
MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the figures of the benchmarks, below the path that they have in the repository."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for figure in sorted((root / FIGURES).rglob("*.png")):
        name = figure.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **kwargs: Any) -> str:
    """Mend links to files of the repository, which the site does not hold.

    Figures are found below the site's own root; any other file is named by its path.
    """
    root = Path(config.config_file_path).parent

    def mend(link: re.Match[str]) -> str:
        target, _, _ = link["target"].partition("#")
        path = posixpath.normpath(
            posixpath.join("docs", posixpath.dirname(page.file.src_uri), target)
        )
        if path.startswith("docs/") or not (root / path).exists():
            return link[0]  # mkdocs says what is wrong with it
        if link["image"]:
            here = posixpath.dirname(page.file.src_uri) or "."
            return f"![{link['text']}]({posixpath.relpath(path, here)})"
        is_name = path.endswith(link["text"].strip("`"))
        return f"`{path}`" if is_name else f"{link['text']} (`{path}`)"

    return LINK.sub(mend, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Set formulas as MathML, which browsers show without a script or a network."""
    return MATH.sub(lambda math: formula(math["tex"], math["tag"] == "div"), html)


def formula(tex: str, is_display: bool) -> str:
    """Return MathML of a formula in TeX, as Markdown escaped it."""
    plain = tex.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return convert(plain.strip(), display="block" if is_display else "inline")
