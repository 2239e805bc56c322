"""Rounds on the command line: `unigrpo generate --rounds --turn` and the dialogues of `unigrpo chat`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from lightning_unigrpo.adapter import Adapter
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.adapters.digits.images import GRID
from lightning_unigrpo.cli import main, training
from lightning_unigrpo.cli.chat import HELP, Chat, Screen, endless, half_blocks
from lightning_unigrpo.cli.generate import in_rounds
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.dialogue import Turns
from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import ImageSegment, Prompt, Trajectory
from tests.test_cli import CONFIG, fit, folder, screen

__all__ = ["folder"]

ASKED = "what is three plus four"
SAMPLING = DigitsAdapter(None).defaults().sampling
assert SAMPLING is not None


def drawn(
    plan: Sequence[Any],
    turns: Sequence[str] = (),
    *,
    number: int = 0,
    seed: int = 0,
    adapter: Adapter | None = None,
    words: str = ASKED,
) -> Trajectory:
    """Draw without a command line."""
    prompt = Prompt(text=words, id=number)
    settings = replace(SAMPLING, plan=tuple(plan), seed=seed)
    ((found,),) = rollout(
        (adapter or DigitsAdapter()).eval(),
        [Start(prompt, number, 0)],
        settings,
        evaluate=True,
        every_image=True,
        speaker=Turns([*turns]) if turns else None,
    )
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def bytes_of(image: Tensor) -> np.ndarray:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def images_of(found: Trajectory) -> list[np.ndarray]:
    each = [r.image for r in found.rounds] or [found.image]
    return [bytes_of(image) for image in each if image is not None]


def same(files: Sequence[Path], images: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(pixels(f), image) for f, image in zip(files, images, strict=True))


# ---- generate


def generate(*arguments: str, output: str = "a") -> tuple[Path, list[dict[str, Any]]]:
    main(["generate", ASKED, *arguments, "--config", CONFIG, "--output", output])
    lines = (Path(output) / "predictions.jsonl").read_text().splitlines()
    return Path(output), [json.loads(line) for line in lines]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_are_those_of_a_rollout(
    rounds: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, (record,) = generate(f"--rounds={rounds}")
    expected = drawn(("text", "image") * rounds)
    files = [f"0_round{k}.png" for k in range(1, rounds)] + ["0.png"]
    assert {path.name for path in place.glob("*.png")} == {*files}
    assert same([place / name for name in files], images_of(expected))
    assert record["image"] == "0.png"
    assert record["reasoning"] == "\n".join(text.words for text in expected.texts)
    if rounds == 1:
        assert set(record) == {"id", "prompt", "reasoning", "image"}
    else:
        said = [text.words for text in expected.texts]
        wanted = [{"reasoning": w, "image": f} for w, f in zip(said, files, strict=True)]
        assert record["rounds"] == wanted
    shown = capsys.readouterr().out
    assert all(f"a/{name}" in shown for name in files)


def test_turns_are_heard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["text", "image", "turn", "text", "image", "turn", "text", "image"]
    place, (record,) = generate("--turn=draw eight", "--turn=draw one", "--seed=3")
    expected = drawn(plan, ["draw eight", "draw one"], seed=3)
    files = ["0_round1.png", "0_round2.png", "0.png"]
    assert same([place / name for name in files], images_of(expected))
    assert [each.get("turn") for each in record["rounds"]] == [None, "draw eight", "draw one"]
    assert "draw one" in capsys.readouterr().out
    other, _ = generate("--turn=draw zero", "--rounds=3", "--seed=3", output="b")
    changed = [not np.array_equal(pixels(place / n), pixels(other / n)) for n in files]
    assert changed == [False, True, True]
    assert same([other / n for n in files], images_of(drawn(plan, ["draw zero"], seed=3)))


TEXT, TURN = ("text", "image"), ("text", "image", "turn", "text", "image")


@pytest.mark.parametrize(
    ("plan", "rounds", "num_turns", "expected"),
    [
        (TEXT, None, 1, TURN),
        (TEXT, 2, 1, TURN),
        (TEXT, 2, 0, TEXT * 2),
        (TEXT * 2, None, 1, TURN),
        (TEXT * 2, 1, 0, TEXT),
        (TURN, None, 1, TURN),
        (TURN, 3, 1, (*TURN, "turn", "text", "image")),
        (("image",), 3, 2, ("image", "turn", "image", "turn", "image")),
    ],
)
def test_plans_get_rounds_and_turns(
    plan: tuple[Any, ...], rounds: int | None, num_turns: int, expected: tuple[str, ...]
) -> None:
    found = in_rounds(Sampling(plan=plan), rounds, num_turns)
    assert found.kinds == expected
    assert found == Sampling(plan=expected)


class Deaf(DigitsAdapter):
    """Has no layout for what the user says in the middle."""

    turn = Adapter.turn


REFUSED = {
    "no such round": (["--rounds=0"], "sampling.rounds is 0"),
    "nothing drawn": (["--rounds=2", "--model.sampling.plan=[text]"], "ends with an image"),
    "more turns than rounds": (
        ["--rounds=2", "--turn=draw one", "--turn=draw two"],
        "--turn is given 2 times, and 1 turns fit",
    ),
    "without thinking": (["--rounds=2", "--thinking=false"], "without thinking"),
    "no turn": (["--turn=draw one", f"--model.adapter={__name__}.Deaf"], "Deaf has no turn"),
    "unknown words": (["--turn=draw hippo"], "does not know ['hippo']"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_is_said_before(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = REFUSED[name]
    command = ["generate", ASKED, "--config", CONFIG, "--output=a", *arguments]
    assert message in screen(command, capsys, monkeypatch)
    assert not list(Path().glob("a/*.png"))


def test_settings_of_the_adapter_stay(folder: Path) -> None:
    """A configuration without model.sampling draws as the adapter is trained, in several rounds too."""
    adapter = "lightning_unigrpo.adapters.digits.DigitsAdapter"
    (folder / "my.yaml").write_text(
        f"model: {{adapter: {{class_path: {adapter}}}}}\ntrainer: {{accelerator: cpu}}\n"
    )
    main(["generate", ASKED, "--config=my.yaml", "--rounds=2", "--seed=0", "--output=a"])
    images = images_of(drawn(("text", "image") * 2))
    assert same([Path("a/0_round1.png"), Path("a/0.png")], images)


# ---- chat


def chat(lines: Sequence[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command with lines in a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    main(["chat", "--config", CONFIG, "--output=drawn", *arguments])


def talk(
    lines: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    adapter: Adapter | None = None,
    console: Console | None = None,
    **settings: Any,
) -> str:
    """Talk without a configuration, into the folder ``drawn``, and return what was printed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    module = UniGRPOModule(
        (adapter or DigitsAdapter()).eval(), sampling=replace(SAMPLING, seed=0, **settings)
    )
    Path("drawn").mkdir(exist_ok=True)
    console = console or Console(file=io.StringIO(), width=80)
    Chat(module, Screen(console), Path("drawn")).run()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def files(number: int, rounds: int) -> list[Path]:
    return [Path("drawn") / f"{number}_round{k}.png" for k in range(1, rounds + 1)]


KEEP = "--trainer.callbacks=[lightning_unigrpo.callbacks.IterationCheckpoint]"
"""Nothing but the checkpoint of a run."""


def test_a_dialogue_is_the_rollout_that_generate_draws(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After training, from the checkpoint."""
    training.run(fit("--trainer.limit_val_batches=0", "--trainer.logger=false", KEEP, steps=1))
    options = ["--ckpt_path=last", "--seed=5", "--scale=2", "--trainer.precision=bf16-mixed"]
    main(["generate", ASKED, "--turn=draw eight", "--config", CONFIG, *options, "--output=a"])
    capsys.readouterr()
    chat([ASKED, "draw eight", "/save kept.json"], monkeypatch, *options)
    said = capsys.readouterr().out
    record = json.loads(Path("a/predictions.jsonl").read_text())
    kept = json.loads(Path("kept.json").read_text())
    assert [pixels(f).tolist() for f in files(0, 2)] == [
        pixels(Path("a") / each["image"]).tolist() for each in record["rounds"]
    ]
    assert pixels(files(0, 1)[0]).shape == (16, 16, 3)
    names = [f"drawn/0_round{k}.png" for k in (1, 2)]
    assert kept == {
        "prompt": ASKED,
        "images": [],
        "rounds": [
            {**each, "image": name} for each, name in zip(record["rounds"], names, strict=True)
        ],
    }
    printed = [
        w
        for each, name in zip(kept["rounds"], names, strict=True)
        for w in (each["reasoning"], name)
    ]
    assert said.splitlines() == [HELP, *(line for line in printed if line), "kept.json"]
    assert not np.array_equal(images_of(drawn(TEXT, seed=5))[0], pixels(files(0, 1)[0])[::2, ::2])


def test_instructions_change_the_drawing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk([ASKED, "draw eight", "draw one"], monkeypatch)
    plan = [*TURN, "turn", "text", "image"]
    assert same(files(0, 3), images_of(drawn(plan, ["draw eight", "draw one"])))
    first, second, third = map(pixels, files(0, 3))
    talk([ASKED, "draw zero"], monkeypatch)
    assert np.array_equal(pixels(files(0, 1)[0]), first)
    assert not np.array_equal(pixels(files(0, 2)[1]), second)
    assert not np.array_equal(second, third)


@pytest.mark.parametrize("word", ["/new", ""])
def test_a_new_dialogue_remembers_nothing(
    word: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the second prompt of `generate`."""
    talk([ASKED, "draw eight", word, "draw nine minus one", "draw two"], monkeypatch)
    alone = drawn(TURN, ["draw two"], number=1, words="draw nine minus one")
    assert same(files(1, 2), images_of(alone))


def test_mistakes_do_not_end_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("text.png").write_text("no picture")
    lines = [
        "/save early.json",
        "draw hippo",
        "/image nowhere.png",
        "/image text.png",
        "/dance",
        ASKED,
        "draw unicorn",
        " ".join(["one"] * 300),
        "/save no/such/folder.json",
        "/save",
        "draw eight",
        "/quit",
        "draw one",
    ]
    said = talk(lines, monkeypatch)
    expected = [
        "Nothing was drawn yet.",
        "does not know ['hippo']",
        "No such file or directory: 'nowhere.png'",
        "cannot identify image file",
        HELP,
        "does not know ['unicorn']",
        "more than sampling.max_turn_tokens 256",
        "no/such/folder.json",
        HELP,
    ]
    place = len(HELP)
    for text in expected:
        place = said.index(text, place) + len(text)
    assert same(files(0, 2), images_of(drawn(TURN, ["draw eight"])))
    assert len(list(Path("drawn").iterdir())) == 2


class Interrupted(DigitsAdapter):
    """The user presses Ctrl-C in the last step of the first image, then of the first instruction's."""

    calls = 0

    def velocity(self, *arguments: Any) -> Tensor:
        self.calls += 1
        if self.calls in (10, 30):
            raise KeyboardInterrupt
        return super().velocity(*arguments)


def test_ctrl_c_returns_to_the_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [ASKED, ASKED, "draw eight", "/save kept.json", ASKED]
    said = talk(lines, monkeypatch, adapter=Interrupted())
    assert said.count("Stopped; a new dialogue begins.") == 2
    assert [path.name for path in sorted(Path("drawn").iterdir())] == [
        "1_round1.png",
        "2_round1.png",
    ]
    for number in (1, 2):  # numbers go on: another noise than that of what was stopped
        assert same(files(number, 1), images_of(drawn(TEXT, number=number)))
    kept = json.loads(Path("kept.json").read_text())["rounds"]
    assert [each.get("image") for each in kept] == ["drawn/1_round1.png", None]
    assert kept[1]["turn"] == "draw eight"


def test_ctrl_c_at_the_prompt_is_no_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([KeyboardInterrupt, ASKED, KeyboardInterrupt, "draw eight"])

    def ask(*_: Any) -> str:
        answer: Any = next(answers, EOFError)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("builtins.input", ask)
    console = Console(file=io.StringIO())
    module = UniGRPOModule(DigitsAdapter().eval(), sampling=replace(SAMPLING, seed=0))
    Path("drawn").mkdir()
    Chat(module, Screen(console), Path("drawn")).run()
    assert same(files(0, 2), images_of(drawn(TURN, ["draw eight"])))


class Seeing(DigitsAdapter):
    """Reads pictures of its own size."""

    def see(self, pixels: Tensor, *, key: tuple[int, ...] = (0,)) -> ImageSegment:
        latent = self.encode(pixels[:1] * 2 - 1)[0]
        return ImageSegment(latent=latent, grid=GRID, is_context=True)

    def image_grid(self, prompt: Prompt) -> tuple[int, int]:
        return GRID


def test_input_images_stand_before_one_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8), "white").save("white.png")
    lines = ["/image white.png", ASKED, "/save kept.json", "", ASKED]
    lines += ["", "/image white.png", "", ASKED, "/image white.png", "draw eight", "", ASKED]
    talk(lines, monkeypatch, adapter=Seeing())
    for number in (0, 3):
        prompt = Prompt(text=ASKED, id=number, images=(torch.ones(3, 8, 8),))
        settings = replace(SAMPLING, seed=0)
        ((seen,),) = rollout(Seeing().eval(), [Start(prompt, 0, 0)], settings, evaluate=True)
        assert same(files(number, 1), images_of(seen))
    assert not same(files(0, 1), images_of(drawn(TEXT)))
    for number in (1, 2):
        assert same(files(number, 1), images_of(drawn(TEXT, number=number)))
    assert json.loads(Path("kept.json").read_text())["images"] == ["white.png"]


def test_input_images_that_nobody_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save("black.png")
    said = talk(["/image black.png", ASKED, "", ASKED], monkeypatch)
    assert "it cannot read input images" in said
    assert same(files(0, 1), images_of(drawn(TEXT)))


def test_each_request_is_alone_where_nobody_hears_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = talk([ASKED, ASKED], monkeypatch, adapter=Deaf())
    assert "Deaf has no turn(text, behind): each request is a new dialogue." in said
    for number in (0, 1):
        assert same(files(number, 1), images_of(drawn(TEXT, number=number)))


def test_two_rounds_answer_each_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base that looks at its drawing does so behind every line of the user's."""
    adapter = DigitsAdapter("two_rounds")
    said = talk([ASKED, "draw eight"], monkeypatch, adapter=adapter, plan=TEXT * 2)
    expected = drawn([*TEXT * 2, "turn", *TEXT * 2], ["draw eight"], adapter=adapter)
    assert same(files(0, 4), images_of(expected))
    words = [text.words for text in expected.texts]
    names = [*map(str, files(0, 4))]
    assert said.splitlines()[1:] == [
        line for k in (0, 2) for line in (*words[k : k + 2], *names[k : k + 2]) if line
    ]


def test_a_content_model_ends_the_dialogue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = DigitsAdapter("two_rounds")
    phrase = drawn(TEXT * 2, adapter=adapter).texts[1].words
    said = talk(
        [ASKED, "draw nine minus one"],
        monkeypatch,
        adapter=adapter,
        plan=TEXT * 3,
        stop_phrase=phrase,
    )
    assert "The model is content; a new dialogue begins." in said
    first, *_ = images_of(drawn(TEXT, number=1, adapter=adapter, words="draw nine minus one"))
    assert same(files(0, 1), images_of(drawn(TEXT, adapter=adapter)))
    assert same(files(1, 1), [first])
    assert not files(0, 2)[1].exists()


def test_plans_go_on_behind_their_last_turn() -> None:
    assert endless(Sampling(plan=TEXT)).plan[:9] == (*TURN, "turn", *TEXT, "turn")
    found = endless(Sampling(plan=(*TURN, "text", "image"))).plan
    assert found[:17] == (*TURN, *TEXT, *("turn", *TEXT * 2) * 2)


# ---- what is seen


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", "ab", "ab c"], "ab c\n"),
        (["7", "7 me", "7 me 1"], "7 me 1\n"),
        (["3", "3+", "3 + is"], "3+\n3 + is\n"),  # spelled otherwise: said again, whole
        (["x", "x\N{REPLACEMENT CHARACTER}", "xé"], "xé\n"),
        (["x\N{REPLACEMENT CHARACTER}"], "x\N{REPLACEMENT CHARACTER}\n"),
        (["", ""], ""),
    ],
)
def test_words_are_printed_once(texts: Sequence[str], expected: str) -> None:
    console = Console(file=io.StringIO())
    shown = Screen(console)
    for place, text in enumerate(texts):
        shown.stream(text, first=place == 0)
    shown.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == expected


def test_words_are_printed_when_they_are_drawn() -> None:
    """Not behind the end of the text: each token tells all of them so far, of the rows that go on."""
    heard: list[tuple[Tensor, Tensor]] = []
    adapter = DigitsAdapter().eval()
    prompts = [Prompt(text=ASKED), Prompt(text="what is one plus two plus three", id=1)]
    starts = [Start(prompt, prompt.id, 0) for prompt in prompts]
    (found,) = rollout(
        adapter,
        starts,
        replace(SAMPLING, seed=0),
        evaluate=True,
        heard=lambda tokens, active: heard.append((tokens.clone(), active.clone())),
    )
    texts = [t.texts[0].tokens for t in found]
    assert len({len(text) for text in texts}) == 2
    assert [tokens.shape[1] for tokens, _ in heard] == [*range(1, max(map(len, texts)) + 1)]
    for row, text in enumerate(texts):
        lengths = [int(tokens.shape[1]) for tokens, active in heard if active[row]]
        assert lengths == [*range(1, len(text) + 1)]
        assert all(
            torch.equal(tokens[row], text[: tokens.shape[1]])
            for tokens, active in heard
            if active[row]
        )


def painted(ansi: str) -> np.ndarray:
    """Return the pixels of lines of half blocks in 24-bit colour."""
    rows: list[list[list[int]]] = []
    for line in ansi.splitlines():
        cells = re.findall(
            r"\x1b\[38;2;(\d+);(\d+);(\d+)(?:;48;2;(\d+);(\d+);(\d+))?m(▀+)\x1b", line
        )
        upper = [[*map(int, cell[:3])] for cell in cells for _ in cell[6]]
        lower = [[*map(int, cell[3:6])] for cell in cells if cell[3] for _ in cell[6]]
        rows += [upper, lower] if lower else [upper]
    return np.array(rows)


@pytest.mark.parametrize("size", [(6, 4), (5, 7), (3, 1)])
def test_half_blocks_are_the_picture(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(half_blocks(Image.fromarray(noise)))
    assert isinstance(console.file, io.StringIO)
    assert np.array_equal(painted(console.file.getvalue()), noise)


@pytest.mark.parametrize(
    ("settings", "columns"),
    [({}, 16), ({"width": 10}, 10), ({"height": 6}, 8), ({"preview": False}, 0)],
)
def test_previews_fit_the_terminal(settings: dict[str, Any], columns: int, tmp_path: Path) -> None:
    preview = settings.pop("preview", True)
    size = {"width": 80, "height": 25} | settings
    console = Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        **size,
    )
    Screen(console, scale=2, preview=preview).show(torch.rand(3, 8, 8), tmp_path / "x.png")
    assert isinstance(console.file, io.StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if "▀" in line]
    assert len(lines) == columns // 2
    assert {line.count("▀") for line in lines} <= {columns}
    assert pixels(tmp_path / "x.png").shape == (16, 16, 3)


def test_nothing_is_painted_into_a_pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = talk([ASKED], monkeypatch)
    assert said.splitlines() == [HELP, "3+4=7", "drawn/0_round1.png"]


CHATS: dict[str, tuple[list[str], str]] = {
    "scale": (["--scale=0"], "--scale is 0"),
    "checkpoint": (["--ckpt_path=last"], "no checkpoint was written yet"),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_refuses_before_it_asks(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = CHATS[name]
    refuse: Callable[..., str] = lambda *_: pytest.fail("too late")  # noqa: E731
    monkeypatch.setattr("builtins.input", refuse)
    command = ["chat", "--config", CONFIG, "--output=drawn", *arguments]
    assert message in screen(command, capsys, monkeypatch)
    assert not Path("drawn").exists()
