"""What is installed from a wheel is what is imported in a checkout."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
DATA = {".css", ".jinja", ".js", ".json", ".jsonl", ".npz", ".pyi", ".safetensors", ".txt"}

pytestmark = pytest.mark.slow


def expected() -> set[str]:
    """Return the files that belong into a wheel, by their path in it."""
    sources = {"lightning_unigrpo": CHECKOUT / "lightning_unigrpo"}
    sources["lightning_unigrpo/adapters"] = CHECKOUT / "adapters"
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in sources.items()
        for path in folder.rglob("*")
        if path.suffix in {".py", *DATA} or path.name == "py.typed"
    }


def build(command: str, source: Path, target: Path) -> Path:
    """Run one hook of the build backend on a source tree; no isolation, so no network."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.{command}({str(target)!r})"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Copy what git would check out, links as links, so that nothing is built in the checkout."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, tree)
    for name in ("lightning_unigrpo", "adapters"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, tree / name, symlinks=True, ignore=ignore)
    assert (tree / "lightning_unigrpo" / "adapters").is_symlink()
    return tree


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    return build("build_wheel", tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def wheel_of_sdist(tree) -> Path:
    sdist = build("build_sdist", tree, tree.parent / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tree.parent / "unpacked")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    return build("build_wheel", unpacked, tree.parent / "second")


@pytest.mark.parametrize("kind", ["wheel", "wheel_of_sdist"])
def test_wheel_holds_the_adapters_as_files(kind, request):
    with zipfile.ZipFile(request.getfixturevalue(kind)) as archive:
        entries = archive.infolist()
    names = {entry.filename for entry in entries}
    assert not expected() - names
    assert "lightning_unigrpo/adapters/__init__.py" in names
    assert all((entry.external_attr >> 28) == 0o10 for entry in entries)  # regular files
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lightning_unigrpo", next(top for top in tops if top.endswith(".dist-info"))}


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, lightning_unigrpo.adapters as a; print(a.__file__);"
        "assert 'adapters' not in sys.modules"
    )
    run = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "lightning_unigrpo" / "adapters" / "__init__.py"
