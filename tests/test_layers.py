"""Imports point one way: each module knows only the layers below it.

The table below is the architecture. A new module is entered here first; one that is missing fails
:func:`test_every_module_has_a_layer`.
"""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = "lightning_unigrpo"
PACKAGE = Path(__file__).parent.parent / ROOT

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "config"),
    ("flow", "masked", "objective", "advantage"),
    ("adapter", "reward", "distributed"),
    ("rollout", "dialogue", "loss", "checkpoint", "metrics"),
    ("guard", "data", "budget", "timing", "report"),
    ("callbacks",),
    ("evaluation",),
    ("module",),
    ("estimate", "prompts", "serve", "environment"),
    ("cli",),
)
LEAVES = {"adapters": 2, "rewards": 2, "testing": 3}
"""Beside the layers, and the highest layer that each may import."""

LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
DECLARED = LAYER.keys() | LEAVES.keys()
COMMAND_LINE = LAYER["cli"]
# The module may fall back on a built-in reward; a backbone is always handed to it.
VARIANTS = {("digits", "bagel")}
"""Adapter families (who, what) that are a small form of another and share its code."""
FOLDERS = {
    *("adapters", "rewards", "callbacks", "testing", "distributed", "checkpoint", "report"),
}
LEAF_USERS = {"adapters": COMMAND_LINE, "rewards": LAYER["evaluation"], "testing": COMMAND_LINE}
TYPES_ONLY = {("callbacks", "module"), ("data", "module")}
"""Imports (who, what) that may stand under TYPE_CHECKING against the direction."""

LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
LIGHTNING_FROM = 4
FORMULAS = 1
"""Up to this layer nothing is imported but :data:`PLAIN`: tensors in, tensors out."""
NEIGHBOURS = {("types", "config")}
"""The exception: what an adapter is trained with by default is a noun and holds settings."""
PLAIN = {"torch", "numpy"} | sys.stdlib_module_names


class Import(NamedTuple):
    line: int
    target: str
    types_only: bool


def read_imports(module: str, source: str) -> Iterator[Import]:
    """Yield every import of a module, wherever it stands; ``from a import b`` counts as ``a.b``."""
    package = module.split(".")[:-1]

    def walk(node: ast.AST, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, types_only)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield Import(node.lineno, ".".join([*base, alias.name]), types_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, types_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, types_only)

    yield from walk(ast.parse(source), False)


def may_import(importer: list[str], target: list[str], families: frozenset[str]) -> bool:
    """Say whether one module of the package may import another; both as paths below the root."""
    who, what = importer[0], target[0]
    if who == what and who in FOLDERS:
        foreign = target[1:2] and target[1] in families and target[1] != importer[1]
        return importer[1] == "__init__" or not foreign or (importer[1], target[1]) in VARIANTS
    layer = LAYER.get(who)
    if layer == COMMAND_LINE:
        return True
    if what in LEAF_USERS:
        return layer is not None and layer >= LEAF_USERS[what]
    if layer is not None and layer <= FORMULAS:
        return (who, what) in NEIGHBOURS
    highest = layer - 1 if layer is not None else LEAVES[who]
    return what in LAYER and LAYER[what] <= highest


def fault(importer: list[str], item: Import, families: frozenset[str]) -> str | None:
    """Return what is wrong with one import, or None."""
    top, *inside = item.target.split(".")
    who, layer = importer[0], LAYER.get(importer[0])
    if top == "adapters":
        return f"adapters are imported as {ROOT}.adapters"
    if top == ROOT:
        if item.types_only and inside and (who, inside[0]) in TYPES_ONLY:
            return None
        if not inside or inside[0] not in DECLARED:
            aside = layer == COMMAND_LINE
            return None if aside else "inside the package, import from the module itself"
        allowed = may_import(importer, inside, families)
        return None if allowed else f"{who} may not import {inside[0]}"
    if top in LIGHTNING and who != "distributed" and (layer or 0) < LIGHTNING_FROM:
        return f"only layers {LIGHTNING_FROM} and up import lightning"
    if layer is not None and layer <= FORMULAS and top not in PLAIN:
        return "formulas need torch, NumPy and the standard library only"
    return None


def violations(module: str, source: str, families: frozenset[str] = frozenset()) -> list[str]:
    """Return what is wrong with the imports of a module, given its dotted name and its text."""
    importer = module.split(".")[1:]
    if importer == ["__init__"]:
        return []
    found = ((item, fault(importer, item, families)) for item in read_imports(module, source))
    return [f"{module}, line {item.line}: {item.target}: {text}" for item, text in found if text]


def modules() -> dict[str, Path]:
    """Return every module of the package by dotted name, adapters included."""
    files = [  # os.walk, since Path.rglob passes links over before Python 3.13
        Path(folder, name)
        for folder, _, names in os.walk(PACKAGE, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    return {
        ".".join((ROOT, *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in sorted(files)
    }


SHARED = {"common"}
"""Folders of adapters that are no family: any may import them, and they import none."""
FAMILIES = (
    frozenset(
        path.parent.name for path in (PACKAGE / "adapters").glob("*/__init__.py") if path.is_file()
    )
    - SHARED
)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    text = modules()[module].read_text(encoding="utf-8")
    assert violations(module, text, FAMILIES) == []


def test_every_module_has_a_layer():
    names = {name.split(".")[1] for name in modules()} - {"__init__"}
    assert names <= DECLARED, f"enter in LAYERS or LEAVES: {sorted(names - DECLARED)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from lightning_unigrpo.types import Prompt"),
        ("types", "import lightning as L"),
        ("flow", "from lightning_unigrpo.types import Prompt"),
        ("flow", "import transformers"),
        ("flow", "from lightning_unigrpo.config import Sampling"),
        ("objective", "from lightning_unigrpo import flow"),
        ("adapter", "from lightning_unigrpo.reward import combine"),
        ("reward", "from lightning.pytorch import Trainer"),
        ("rollout", "def f():\n    from lightning_unigrpo.loss import trajectory_loss"),
        ("rollout", "from lightning_unigrpo.adapters.bagel import Bagel"),
        ("loss", "from . import module"),
        ("loss", "from .module import UniGRPOModule"),
        ("loss", "from lightning_unigrpo import UniGRPOModule"),
        ("loss", "import lightning_unigrpo"),
        ("callbacks.rewards", "from lightning_unigrpo.module import UniGRPOModule"),
        ("callbacks.rewards", "from ..evaluation import Figures"),
        ("callbacks.__init__", "from lightning_unigrpo.cli import main"),
        ("data", "if TYPE_CHECKING:\n    from lightning_unigrpo.cli import main"),
        ("rollout", "if TYPE_CHECKING:\n    from lightning_unigrpo.module import UniGRPOModule"),
        ("data", "if not TYPE_CHECKING:\n    pass\nelse:\n    from lightning_unigrpo.cli import a"),
        ("module", "from lightning_unigrpo.adapters.bagel import Bagel"),
        ("module", "from lightning_unigrpo.cli import main"),
        ("testing", "from lightning_unigrpo.callbacks import RewardLogger"),
        ("rewards.clip", "from lightning_unigrpo.loss import trajectory_loss"),
        ("rewards.clip", "from lightning_unigrpo.adapters.bagel import Bagel"),
        ("adapters.bagel.model", "import lightning"),
        ("adapters.bagel.model", "from lightning_unigrpo.rollout import rollout"),
        ("adapters.bagel.model", "from lightning_unigrpo.adapters.janus import Janus"),
        ("adapters.bagel.model", "from lightning_unigrpo.adapters import janus"),
        ("adapters.bagel.model", "from adapters.bagel.net import Net"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(violations(f"{ROOT}.{module}", source, frozenset({"bagel", "janus"}))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("__init__", "from lightning_unigrpo.module import UniGRPOModule"),
        ("types", "from lightning_unigrpo.config import Sampling"),
        ("flow", "import math\nimport numpy as np\nfrom torch import Tensor"),
        (
            "adapter",
            "from lightning_unigrpo import flow\nfrom lightning_unigrpo.types import Prompt",
        ),
        ("distributed", "from lightning.pytorch.strategies import FSDPStrategy"),
        ("callbacks.rewards", "from lightning_unigrpo.callbacks.base import Experience"),
        ("data", "if TYPE_CHECKING:\n    from lightning_unigrpo.module import UniGRPOModule"),
        ("module", "from lightning_unigrpo.rewards.clip import ClipScore"),
        ("testing", "from lightning_unigrpo.rollout import rollout"),
        ("adapters.bagel.model", "from lightning_unigrpo.adapters.bagel.net import Net"),
        ("adapters.bagel.model", "from lightning_unigrpo.adapters.packing import pack"),
        ("adapters.bagel.model", "from lightning_unigrpo.adapter import Adapter"),
        ("adapters.__init__", "from lightning_unigrpo.adapters.bagel import Bagel"),
        ("cli", "import lightning_unigrpo\nfrom lightning_unigrpo.adapters.bagel import Bagel"),
    ],
)
def test_a_right_import_passes(module, source):
    assert violations(f"{ROOT}.{module}", source, frozenset({"bagel", "janus"})) == []


def test_adapters_have_one_identity():
    assert (PACKAGE / "adapters").resolve() == PACKAGE.parent / "adapters"
    assert "adapters" not in sys.modules  # every test module and every doctest is imported by now
