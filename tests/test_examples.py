"""The examples run as they stand, as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "plain_loop": (["--iterations=2"], "reward"),
    "train_digits": (["--steps=2", "--folder=runs"], "held-out test prompts"),
    "custom_reward": (["--steps=2", "--folder=runs"], "reward/equations/failures   0.000"),
    "custom_callback": (["--steps=9", "--folder=runs", "--enough=0.2"], "after 1 steps"),
    "two_rounds": (["--steps=2", "--folder=runs"], "  sampled: an image\n  sampled: "),
}
"""Arguments, and something that stands in the output."""


def test_every_example_is_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    arguments, said = SAYS[name]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
