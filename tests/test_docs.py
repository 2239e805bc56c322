"""The site builds without a warning, and its reference pages say what the code says."""

import ast
import dataclasses
import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_unigrpo
from lightning_unigrpo.cli import COMMANDS
from lightning_unigrpo.config import Evaluation, Guard, Objective, Optim, Sampling

CHECKOUT = Path(__file__).parent.parent
SETTINGS = {each.__name__.lower(): each for each in (Sampling, Objective, Optim, Guard, Evaluation)}
SETTING = re.compile(rf"(?:`|--|model\.)({'|'.join(SETTINGS)})\.(?!py`)(\w+)(?=[`:= ])")
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
HEADING = re.compile(r'<h\d id="(lightning_unigrpo[\w.]+)"[^>]*>(.*?)</h\d>', re.DOTALL)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as ``make docs`` does."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(CHECKOUT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def headings(site: Path) -> dict[str, str]:
    """Return the text of each heading of the reference pages, by the path of its object."""
    pages = [page.read_text(encoding="utf-8") for page in site.glob("reference/*.html")]
    found = [match for page in pages for match in HEADING.findall(page)]
    assert len({name for name, _ in found}) == len(found), "an object stands on two pages"
    return {name: html.unescape(re.sub("<[^>]+>", "", text)).strip("¶\n ") for name, text in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", lightning_unigrpo.__all__)
def test_every_public_name_is_in_the_reference(name: str, headings: dict[str, str]) -> None:
    assert any(path.rpartition(".")[2] == name for path in headings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values())
def test_every_setting_stands_there_with_its_default(
    settings: type, headings: dict[str, str]
) -> None:
    for field in dataclasses.fields(settings):
        text = headings[f"lightning_unigrpo.config.{settings.__name__}.{field.name}"]
        shown, _, default = text.partition(" = ")
        assert shown == f"{field.name}: {field.type}".replace('"', "'")
        assert ast.literal_eval(default) == field.default


@pytest.mark.slow
def test_docstrings_and_formulas_arrive_as_readers_expect(site: Path) -> None:
    pages = {p.name: p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    assert pages["method.html"].count("<math") > 50
    for name, page in pages.items():
        assert 'class="arithmatex"' not in page, name
        assert not re.search(r":(func|class|meth|mod|data|attr):<?", page), name


@pytest.mark.parametrize(
    ("name", "page", "complaint"),
    [
        ("index", "[x](nowhere.md)", "target is not found"),
        ("index", "[x](index.md#nowhere)", "no such anchor"),
        ("index", "[x][lightning_unigrpo.nowhere]", "Could not find cross-reference target"),
        ("index", "[x](../benchmarks/nowhere.png)", "target is not found"),
        ("forgotten", "", "not included in the"),
    ],
)
def test_strict_refuses_what_leads_nowhere(
    name: str, page: str, complaint: str, tmp_path: Path
) -> None:
    """The settings of mkdocs.yml, on a small site."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").touch()
    (tmp_path / f"docs/{name}.md").write_text(page)
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {CHECKOUT}/mkdocs.yml\n"
        f"hooks: [{CHECKOUT}/docs/site/hooks.py]\n"
        "plugins: [autorefs]\nextra_css: []\nnav: [index.md]\n"
    )
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert re.search(f"^WARNING.*{re.escape(complaint)}", done.stderr, re.MULTILINE)


def test_links_of_pages_beside_the_site_lead_somewhere() -> None:
    """The site holds docs/ alone; README and its like are read on a code host."""
    for page in CHECKOUT.glob("*.md"):
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            assert (CHECKOUT / target).exists(), f"{page.name}: {target}"


def test_pages_name_settings_that_there_are() -> None:
    pages = [CHECKOUT / "README.md", *(CHECKOUT / "docs").rglob("*.md")]
    found = [(p, *m) for p in pages for m in SETTING.findall(p.read_text(encoding="utf-8"))]
    assert len(found) > 100
    for page, part, name in found:
        fields = {field.name for field in dataclasses.fields(SETTINGS[part])}
        assert name in fields, f"{page}: {part}.{name}"


def test_every_command_has_a_section() -> None:
    page = (CHECKOUT / "docs/cli.md").read_text(encoding="utf-8")
    sections = "".join(re.findall("^## (.*)$", page, re.MULTILINE))
    for command in COMMANDS:
        assert f"`{command}`" in sections
