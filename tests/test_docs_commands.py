"""Every command of the README and the pages is one that the program takes; those of the digits are run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lightning_unigrpo.cli import COMMANDS, estimate, export, main, training
from lightning_unigrpo.environment import packages

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = re.compile(
    r"^(?:\w+=\S+\s+)*(?:srun\s+|torchrun .*?--no-python\s+)?(?=unigrpo )", re.DOTALL
)
OTHERS = ("hf download ", "python -m venv ", ". .venv/", "#", "pip install ", "make ", "python ")
"""How commands of other programs begin."""
FILES = {
    "prompts.txt": "draw one\ndraw two plus one\n",
    "held_out.txt": "draw three\n",
    "evaluation_metadata.jsonl": '{"prompt": "a bench", "tag": "single_object", "include": []}\n',
    "my.yaml": yaml.safe_dump(
        {"model": {"adapter": {"class_path": "lightning_unigrpo.adapters.digits.DigitsAdapter"}}}
    ),
    "serve.yaml": "reward: lightning_unigrpo.rewards.Repetition\n",
    "my_package.py": """
from lightning_unigrpo.adapters.digits import DigitsAdapter
class MyReward:
    def __call__(self, images, **columns):
        return [0.0] * len(images)
class MyAdapter(DigitsAdapter):
    def __init__(self, size: str = "tiny"):
        super().__init__()
""",
}
"""What the commands speak of as the reader's own."""


RUN = "runs/bagel_lora/version_0"


class Line(NamedTuple):
    """A command as it stands on a page."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """What the shell makes of it, without what starts it."""
        return shlex.split(LAUNCHERS.sub("", self.text), comments=True)


def commands() -> Iterator[Line]:
    for page in PAGES:
        blocks = re.findall(
            r"^```(?:bash|sh|shell)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        )
        for block in blocks:
            for text in block.replace("\\\n", " ").splitlines():
                if text.strip():
                    yield Line(str(page.relative_to(ROOT)), text.strip())


OURS = [line for line in commands() if LAUNCHERS.match(line.text)]
DIGITS = [
    line
    for line in OURS
    if re.search(r"configs/digits.yaml|report runs/digits|unigrpo doctor$", line.text)
    and "--print_config" not in line.text
]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the reader's: our configurations, the digits' one made small, and files of the reader's."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("examples", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / RUN).mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "bagel_lora.yaml", folder / RUN / "config.yaml")
    file = folder / "configs" / "digits.yaml"
    small = yaml.safe_load(file.read_text())
    small["trainer"] |= {
        "max_steps": 2,
        "val_check_interval": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
    }
    small["data"] |= {"prompts_per_iteration": 2, "eval_batch_size": 4}
    file.write_text(yaml.safe_dump(small))
    return folder


@pytest.fixture
def here(sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sandbox)
    monkeypatch.syspath_prepend(str(sandbox))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "new_adapter"))
    return sandbox


def test_all_pages_are_read() -> None:
    assert {line.page for line in OURS} >= {"README.md", "docs/cli.md", "docs/bagel.md"}
    named = {line.words[1] for line in OURS}
    assert named == COMMANDS.keys() - {"validate"}
    assert len(DIGITS) > 8


def test_commands_of_other_programs_name_what_there_is() -> None:
    extras = {str(package.extra) for package in packages()} | {"dev", "docs"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands():
        if LAUNCHERS.match(line.text):
            continue
        assert line.text.startswith((*OTHERS, "--")), line
        assert set(re.findall(r"\[([\w,]+)\]", line.text)) <= extras, line
        assert set(re.findall(r"\bmake (\w+)", line.text)) <= targets, line


class ParsedError(Exception):
    """The command was taken, and its work would begin."""


WORK = {
    "report": "lightning_unigrpo.report.write",
    "consolidate": "lightning_unigrpo.cli.consolidate.consolidate",
    "check-adapter": "jsonargparse.ArgumentParser.instantiate",
    "serve-reward": "jsonargparse.ArgumentParser.instantiate",
    "doctor": "lightning_unigrpo.cli.doctor.packages",
}


def stop(*_: Any, **__: Any) -> None:
    raise ParsedError


OTHER_RUNS = sorted({tuple(line.words[1:]) for line in OURS if line not in DIGITS})


@pytest.mark.parametrize("words", OTHER_RUNS, ids=" ".join)
def test_every_command_is_taken(
    words: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, *rest = words
    if command in WORK:
        monkeypatch.setattr(WORK[command], stop)
        with pytest.raises(ParsedError):
            main([command, *rest])
        return
    build = training.build
    for module in (training, estimate, export):
        monkeypatch.setattr(
            module,
            "build",
            lambda cli, args, **settings: build(cli, [*args, "--print_config"], **settings),
        )
    with pytest.raises(SystemExit) as stopped:
        main([command, *rest])
    assert stopped.value.code in (None, 0)


# Of Lightning: the demo's checkpoint knows callbacks that another configuration does not name.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@pytest.mark.slow
def test_the_commands_of_the_digits_run(here: Path, request: pytest.FixtureRequest) -> None:
    """In the order of the pages, after the demo, whose folder they speak of."""
    main(["fit", "--config", "configs/digits.yaml"])
    assert [*here.glob("runs/digits/version_0/report.html")]
    request.getfixturevalue("without_page")
    for words in dict.fromkeys(tuple(line.words[1:]) for line in DIGITS):
        main(words)
    assert (here / "exported" / "model.safetensors").is_file()
