"""The page in a real browser: everything is seen, nothing is fetched, no text becomes markup."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_unigrpo import Objective
from lightning_unigrpo.callbacks import RolloutRecorder, RunReport
from lightning_unigrpo.report import write
from tests.runs import fill, group
from tests.test_report import DIALOGUE, ENDS, edits, lines, train

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="no browser: install chromium and chromium-driver"
    ),
]
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ATTACK = "</script>\"><img src=x onerror='document.title=1'><b>${7*7}{{7*7}}<!--"


class Page:
    """A page that is open in the browser."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.browser = browser
        browser.get(file.as_uri())

    def run(self, script: str) -> Any:
        return self.browser.execute_script(f"return {script}")

    def press(self, name: str) -> None:
        self.browser.find_element("id", name).click()

    @property
    def position(self) -> str:
        return self.browser.find_element("id", "position").text

    def require_sound(self) -> None:
        """Every image is there, the page is no wider than the window, and the console is silent."""
        broken = "[...document.images].filter((each) => !(each.complete && each.naturalWidth))"
        self.run("Promise.all([...document.images].map((each) => each.decode()))")
        assert self.run(f"{broken}.length") == 0
        assert self.run("document.documentElement.scrollWidth <= window.innerWidth")
        assert self.browser.get_log("browser") == []


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER)
    with webdriver.Chrome(options=options, service=service) as running:
        yield running


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recorder, report = RolloutRecorder(every=1, groups=2), RunReport(num_samples=2)
    train(folder, recorder, report, steps=8, logger=CSVLogger(folder, name=None))
    return folder / "version_0" / "report.html"


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialogues")
    train(
        folder,
        RolloutRecorder(every=1, groups=2),
        steps=1,
        sampling=DIALOGUE,
        objective=Objective(round_rewards="each"),
        turns=edits,
        chosen=ENDS,
    )
    return write(folder)


def resize(browser: Any, width: int, scheme: str = "light") -> None:
    """Show pages as a screen of that width does; a headless window has a smallest width."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_of_groups_is_whole(browser: Any, finished: Path, width: int) -> None:
    resize(browser, width)
    page = Page(browser, finished)
    assert page.run("window.innerWidth") == width
    assert page.run("document.querySelectorAll('svg').length") > 10
    assert page.position == "16 groups, page 1 of 1"
    page.require_sound()
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.require_sound()


CONTRAST = """[...document.querySelectorAll('.round h4, .turn, .round .reasoning, .round dt, .round dd')].map(
  (each) => [getComputedStyle(each).color, getComputedStyle(each.closest('li')).backgroundColor])"""


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_rounds_stand_below_each_other(
    browser: Any, dialogues: Path, width: int, scheme: str
) -> None:
    resize(browser, width, scheme)
    page = Page(browser, dialogues)
    page.require_sound()
    recorded = [*(dialogues.parent / "rollouts" / "images").iterdir()]
    assert page.run("document.querySelectorAll('#shown img').length") == len(recorded) > 6
    text = page.run("document.getElementById('shown').innerText")
    assert "ended by the user" in text
    assert "ended with its stop phrase" in text
    boxes = page.run(
        "[...document.querySelectorAll('.members li')].map((card) => [card.clientWidth, "
        "...[...card.querySelectorAll('.turn, .round .reasoning, .round img, .round dl')].map("
        "(each) => each.getBoundingClientRect()).map((box) => [box.top, box.bottom, box.width])])"
    )
    members = [
        member
        for line in lines(dialogues.parent / "rollouts" / "groups.jsonl")
        for member in line["members"]
    ]
    for (room, *parts), member in zip(boxes, members, strict=True):
        told = [[r.get("turn"), r["reasoning"], r["image"], "reward"] for r in member["rounds"]]
        assert len(parts) == sum(bool(part) for each in told for part in each)
        assert room >= 140
        assert all(width > 0.85 * room for *_, width in parts)
        assert all(one[1] <= other[0] for one, other in pairwise(parts))
    for ink, paper in page.run(CONTRAST):
        light, dark = sorted([luminance(ink), luminance(paper)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    resize(browser, 1280)


def test_search_finds_what_the_user_said(browser: Any, dialogues: Path) -> None:
    page = Page(browser, dialogues)
    assert page.position == "2 groups, page 1 of 1"
    turns = page.run(
        "groups.map((group) => group.members.some((member) => member.rounds[1]?.turn))"
    )
    page.browser.find_element("id", "search").send_keys("DRAW NINE")
    assert page.position == f"{turns.count(True)} groups, page 1 of 1"
    assert "draw nine" not in page.run("groups.map((group) => group.prompt).join()")
    page.browser.find_element("id", "search").send_keys(" thousand")
    assert page.position == "no group matches"


def test_rounds_of_old_records_and_input_images_are_shown(browser: Any, tmp_path: Path) -> None:
    """Before there were ``rounds``, a member held the names of its earlier images."""
    old = group(0, earlier=["first.png"], image="last.png", reasoning="one\ntwo")
    plain = group(1, earlier=[], image="last.png") | {"input_images": ["../../given.png"]}
    fill(tmp_path, [old, plain])
    for name, red in {"first": 250, "last": 90, "given": 10}.items():
        file = tmp_path / "rollouts" / "images" / f"{name}.png"
        Image.new("RGB", (8, 8), (red, 0, 0)).save(file)
    page = Page(browser, write(tmp_path))
    page.require_sound()
    alts = page.run("[...document.querySelectorAll('#shown img')].map((each) => each.alt)")
    assert alts == [
        "Round 1 of member 0 for: draw",
        "Round 2 of member 0 for: draw",
        "Input image 1 for: draw",
        "Image of member 0 for: draw",
    ]
    width = page.run("document.querySelector('.inputs img').clientWidth")
    assert width == 150  # not that of the group
    page.run(
        "window.reds = [...document.querySelectorAll('#shown img')].map((each) => { const canvas ="
        " document.createElement('canvas').getContext('2d'); canvas.drawImage(each, 0, 0); return"
        " canvas.getImageData(0, 0, 1, 1).data[0]; })"
    )
    assert page.run("window.reds") == [250, 90, 10, 90]
    assert page.run("document.querySelector('.members').innerText").count("one\ntwo") == 1


def test_paging_filter_and_search(browser: Any, tmp_path: Path) -> None:
    fill(tmp_path, [group(i // 2, prompt=f"prompt {i}", size=8) for i in range(13)])
    page = Page(browser, write(tmp_path))
    assert page.position == "13 groups, page 1 of 3"
    assert page.run("document.getElementById('previous').disabled")
    page.press("next")
    page.press("next")
    assert page.position == "13 groups, page 3 of 3"
    assert page.run("document.getElementById('next').disabled")
    assert "prompt 12" in page.run("document.getElementById('shown').innerText")
    page.press("previous")
    assert page.position == "13 groups, page 2 of 3"
    page.browser.find_element("css selector", "#iteration option[value='4']").click()
    assert page.position == "2 groups, page 1 of 1"
    page.browser.find_element("id", "search").send_keys("PROMPT 9\n")
    assert page.position == "1 group, page 1 of 1"
    page.browser.find_element("id", "search").send_keys("9")
    assert page.position == "no group matches"
    assert page.run("document.querySelectorAll('.group').length") == 0


def test_what_a_model_writes_stays_text(browser: Any, tmp_path: Path) -> None:
    member = {"reasoning": ATTACK, "rewards": {ATTACK: 0.5}, "stopped": False, "usable": False}
    rounds = [{"turn": ATTACK, "reasoning": ATTACK, "image": None}]
    several = member | {"rounds": rounds, "ended": ATTACK}
    fill(tmp_path, [group(0, prompt=ATTACK, **each) for each in (member, several)])
    sample = group(0, prompt=ATTACK, **several) | {"title": "base"}
    fill(tmp_path, [sample], name="samples.jsonl")
    (tmp_path / "config.yaml").write_text(f"# {ATTACK}")
    names = f"epoch,step,reward/{ATTACK},reward/{ATTACK}/failures\n0,0,1.0,0.0\n"
    (tmp_path / "metrics.csv").write_text(names)
    page = Page(browser, write(tmp_path))
    page.require_sound()
    title = page.run("document.title")
    assert title.endswith("run report")
    for part, times in {"groups": 7, "samples": 3, "config": 1, "numbers": 2, "rewards": 2}.items():
        # In the groups: prompt, reasoning and reward, and where there are rounds the turn; among the
        # numbers: the reward and its failures.
        assert page.run(f"document.getElementById('{part}').textContent").count(ATTACK) == times
    for text in ("cut at the limit", "not learned from"):
        assert text in page.run("document.getElementById('shown').textContent")
    assert page.run("document.querySelectorAll('img, b').length") == 0


def test_a_thousand_groups_stay_below_twenty_megabytes(browser: Any, tmp_path: Path) -> None:
    groups = [group(10 * i, prompt=f"prompt {i}", size=8) for i in range(1000)]
    fill(tmp_path, groups)
    draw = np.random.default_rng(0)
    for i in range(48):  # noise does not compress, and each use is encoded and stored by itself
        pixels = draw.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "rollouts" / "images" / f"{i}.jpg", quality=90)
    for i, each in enumerate(groups):
        each["members"] = [
            member | {"image": f"{(8 * i + j) % 48}.jpg", "reasoning": f"{i} {j} " + 60 * "why "}
            for j, member in enumerate(each["members"])
        ]
    file = write(fill(tmp_path, groups))
    assert 10**7 < file.stat().st_size < 2 * 10**7
    page = Page(browser, file)
    assert page.position == "1000 groups, page 1 of 167"
    assert "reduced from 256" in page.run("document.getElementById('groups').innerText")
    for _ in range(4):
        page.press("next")
        page.require_sound()
    page.run("(page = 166, render())")
    assert "prompt 999" in page.run("document.getElementById('shown').innerText")
    page.require_sound()
