"""What all built-in rewards have in common: a name in YAML, a place in the page, two optional methods."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from lightning_unigrpo import rewards
from lightning_unigrpo.reward import Reward, wrap

PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AestheticScore": {"head": "head.pth", "divisor": 10.0},
    "CLIPScore": {"scale": 100.0, "offload": False},
    "HTTPReward": {"url": "http://127.0.0.1:9/score"},
    "HPSv2": {"checkpoint": "weights.pt"},
    "Judge": {"url": "http://127.0.0.1:9/v1", "model": "some"},
    "LengthBand": {"low": 2, "high": 4},
    "OCRReward": {"column": "text"},
    "PickScore": {"scale": None},
    "PickledReward": {"url": "http://127.0.0.1:9"},
    "SoftLength": {"max_tokens": 8, "buffer": 4},
}
"""Where a reward needs some, or shows more with some."""


def build(settings: Any) -> list[Reward]:
    """Build rewards as the command line does."""
    parser = ArgumentParser()
    parser.add_function_arguments(wrap)
    return wrap(parser.instantiate(parser.parse_object(settings)).rewards)


@pytest.mark.parametrize("name", rewards.__all__)
def test_each_is_named_in_yaml_and_described(name: str) -> None:
    arguments = ARGUMENTS.get(name, {})
    settings = {"class_path": f"lightning_unigrpo.rewards.{name}", "init_args": arguments}
    (reward,) = build({"rewards": [settings]})
    assert type(reward.fn) is getattr(rewards, name)
    assert {key: getattr(reward.fn, key) for key in arguments} == arguments
    assert re.search(rf"^\|.*`{name}\b.*\|$", PAGE, re.MULTILINE)  # has a row in a table
    assert not isinstance(reward.fn, nn.Module)  # nothing that a strategy would wrap


def test_the_examples_of_the_page_can_be_built() -> None:
    blocks = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    lists = [block for block in blocks if block.keys() == {"rewards"}]  # not those of a service
    found = [reward for block in lists for reward in build(block)]
    assert {type(reward.fn).__name__ for reward in found} >= {
        "CLIPScore",
        "LengthBand",
        "PickScore",
        "AestheticScore",
        "OCRReward",
    }
    ocr = next(r for r in found if isinstance(r.fn, rewards.OCRReward))
    assert (ocr.remote, ocr.concurrency) == (True, 4)
