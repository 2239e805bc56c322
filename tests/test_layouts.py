"""Turns, and input images between words, in the layout of each family: ids by hand, both paths alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer

from lightning_unigrpo.adapters.bagel import BagelAdapter
from lightning_unigrpo.adapters.common.conversation import END
from lightning_unigrpo.budget import largest_footprint
from lightning_unigrpo.config import Sampling
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import Prompt, Segment, TextSegment, Trajectory
from tests import published_janusflow, published_showo2, test_janusflow, test_showo, test_showo2
from tests.test_bagel_golden import golden_adapter as bagel
from tests.test_januspro import MARKS, Letters
from tests.test_januspro import golden_adapter as januspro
from tests.test_showo2_golden import Ids


class Lines(Ids):
    """Ids of numbers, and 3 where a line ends."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("\n", " 3 "))

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).replace(" 3 ", "\n")


class Family(NamedTuple):
    """An adapter, and how its layout writes what is said."""

    adapter: Any
    said: str
    apart: list[int]
    """The turn behind an answer, or an image that is not seen."""
    behind_an_image: list[int]
    request: str = ""
    """With two images: one in the middle, one at its end."""
    pieces: list[list[int]] = []  # noqa: RUF012
    """Its words before, between and behind the images."""


def flow(folder: Path) -> Family:
    adapter = test_janusflow.load(published_janusflow.write_checkpoint(folder), look_prompt="see")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    apart = raw.encode(f"{END}User: make it blue\n\nAssistant:").ids
    behind = raw.encode("\nmake it blue\n\nAssistant:").ids
    request = [
        [adapter.config.bos, *raw.encode("User: put ").ids],
        raw.encode(" into ").ids,
        raw.encode("\n\nAssistant:").ids,
    ]
    return Family(adapter, "make it blue", apart, behind, "put <image> into <image>", request)


def codes(folder: Path) -> Family:
    encode = Letters().encode
    apart = [MARKS.eos, *encode("<|User|>: Bluer.\n\n<|Assistant|>:")]
    behind = encode("\nBluer.\n\n<|Assistant|>:")
    request = [
        [MARKS.bos, *encode("<|User|>: Draw put ")],
        encode(" into "),
        encode("!\n\n<|Assistant|>:"),
    ]
    adapter = januspro(request="Draw {prompt}!")
    return Family(adapter, " Bluer. ", apart, behind, "put <image> into <image>", request)


def stacks(folder: Path, **settings: Any) -> Family:
    adapter = test_showo2.load(published_showo2.write_checkpoint(folder), **settings)
    raw = Tokenizer.from_file(str(folder / "language" / "tokenizer.json"))
    bos, eos, said = published_showo2.BOS, published_showo2.EOS, "make it blue"
    request, words = "put <image> into <image>", ["put ", " into ", ""]
    if not settings:  # one sequence of words and images
        apart, behind, words[0] = raw.encode(f"\n{said}").ids, raw.encode(said).ids, f"{bos}put "
    else:
        apart = behind = raw.encode(f"{eos}\n{bos}user\n{said}{eos}\n{bos}assistant\n").ids
        words[0] = f"{bos}system\nthink{eos}\n{bos}user\nput "
        words[2] = f"{eos}\n{bos}assistant\n"
    return Family(adapter, said, apart, behind, request, [raw.encode(w).ids for w in words])


def masks(folder: Path) -> Family:
    adapter = test_showo.build(max_prompt_tokens=60)
    adapter.tokenizer = Lines()
    return Family(adapter, "7 8", [3, 7, 8], [7, 8])


def blocks(folder: Path) -> Family:
    adapter, request = bagel(default_size=(24, 40)), "5 <image> 6 7 <image>"
    return Family(adapter, "7 8", [7, 8], [7, 8], request, [[5], [6, 7], []])


BUILDS: dict[str, Callable[[Path], Family]] = {
    "bagel": blocks,
    "janusflow": flow,
    "januspro": codes,
    "showo2": lambda folder: stacks(folder, system_prompt="think"),
    "showo2 bare": stacks,
    "showo": masks,
}


@pytest.fixture(scope="module", params=list(BUILDS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return BUILDS[request.param](tmp_path_factory.mktemp("published"))


def drawn(family: Family, *plan: Any, **settings: Any) -> list[Trajectory]:
    """Draw two trajectories, where the user says the same whenever it is his turn."""
    sampling = Sampling(
        plan=plan,
        max_text_tokens=4,
        num_timesteps=4,
        schedule="steps",
        window_size=2,
        window_range=(0, 3),
        seed=0,
        **settings,
    )
    words = "5 6" if family.said == "7 8" else "a red cube"
    starts = [Start(Prompt(text=words), 0, member) for member in range(2)]
    chunks = rollout(
        family.adapter, starts, sampling, speaker=lambda rows, _: [family.said] * len(rows)
    )
    return list(chain.from_iterable(chunks))


def turns(trajectory: Trajectory) -> list[tuple[Segment, list[int]]]:
    """Return what the user said, and behind what."""
    pairs = list(zip(trajectory.segments, trajectory.segments[1:], strict=False))
    return [
        (before, segment.tokens.tolist())
        for before, segment in pairs[trajectory.num_given - 1 :]
        if isinstance(segment, TextSegment) and not segment.is_sampled
    ]


def both_paths_agree(adapter: Any, trajectories: Sequence[Trajectory]) -> None:
    with torch.no_grad():
        scores = adapter(trajectories)
    segments = [s for t in trajectories for s in t.segments if s.is_sampled]
    texts = [s for s in segments if isinstance(s, TextSegment)]
    images: list[Any] = [s for s in segments if not isinstance(s, TextSegment)]
    pairs = list(zip(scores.text, (s.log_prob for s in texts), strict=True))
    if adapter.image_policy == "flow":
        pairs += zip(scores.velocity, (s.velocity for s in images), strict=True)
    else:
        pairs += zip(scores.image_tokens, (s.log_prob for s in images), strict=True)
    for new, old in pairs:
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-4)


PICTURES = tuple(torch.rand(3, 24, 40, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
READERS = [name for name in BUILDS if name != "showo"]


def test_marks_say_where_images_stand() -> None:
    words = "from <image> to <image>"
    assert Prompt(text=words, images=PICTURES).pieces() == ["from ", " to ", ""]
    assert Prompt(text="mix", images=PICTURES).pieces("\n") == ["", "\n", "\nmix"]
    assert Prompt(text="mix").pieces("\n") == ["mix"]
    read_later = {"image_paths": ["a.png", "b.png"]}
    assert replace(Prompt(text=words, columns=read_later), images=PICTURES).text == words
    for images in ((), PICTURES[:1], PICTURES[:1] * 3):
        with pytest.raises(
            ValueError, match=rf"<image> 2 times, but Prompt\.images are {len(images)}:"
        ):
            Prompt(text=words, images=images)


@pytest.mark.parametrize("family", READERS, indirect=True)
def test_input_images_between_words(family: Family) -> None:
    """Each stands where the words say so, seen as it would be before them."""
    adapter, prompt = family.adapter, Prompt(text=family.request, images=PICTURES)
    segments = adapter.tokenize(prompt)
    before, between, behind = family.pieces
    is_blocks = isinstance(adapter, BagelAdapter)  # none for no words
    texts = [s.tokens.tolist() for s in segments if isinstance(s, TextSegment)]
    assert texts == [before, between, *([] if is_blocks else [behind])]
    kinds = [isinstance(s, TextSegment) for s in segments]
    assert kinds == [True, False, True, False, True][: len(kinds)]
    alone = adapter.tokenize(Prompt(text="", images=PICTURES))
    for found, pixels in zip(kept(segments), kept(alone), strict=True):
        assert torch.equal(found, pixels)


def kept(segments: Sequence[Any]) -> list[torch.Tensor]:
    """Return what is seen of the images."""
    return [
        torch.cat(
            [
                s.latent.flatten(),
                *(s.views[name].flatten() for name in ("rows", "features") if name in s.views),
            ]
        )
        for s in segments
        if not isinstance(s, TextSegment)
    ]


@pytest.mark.parametrize("family", READERS, indirect=True)
def test_room_for_images_between_words(family: Family) -> None:
    """No less than the rows of the context, and a few marks more at most; without pixels."""
    adapter, prompt = family.adapter, Prompt(text=family.request, images=PICTURES)
    cache = adapter.prefill([adapter.tokenize(prompt)])
    nothing = adapter.prefill([adapter.tokenize(Prompt(text=""))])
    sampling = Sampling(plan=("text",), max_text_tokens=1, window_range=(0, 5))
    sizes = [
        largest_footprint(adapter, [each], sampling, dtype=torch.float32).cache
        for each in (prompt, Prompt(text=""))
    ]
    each = sum(layer[0, 0].nbytes for layer in (*cache.keys, *cache.values))
    rows = int(cache.lengths[0] - nothing.lengths[0])
    counted = (sizes[0] - sizes[1]) / each
    assert rows <= counted <= rows + 8


@pytest.mark.parametrize("look", [True, False])
def test_turns_behind_answers_and_images(family: Family, look: bool) -> None:
    """Said between two answers, and behind an image that is seen or not."""
    plan = ("text", "turn", "text", "image", "turn", "text", "image")
    trajectories = drawn(family, *plan, look=look)
    for trajectory in trajectories:
        (answer, first), (image, second) = turns(trajectory)
        assert isinstance(answer, TextSegment)
        assert not isinstance(image, TextSegment)
        assert image.is_context is look
        assert first == family.apart
        assert second == (family.behind_an_image if look else family.apart)
    both_paths_agree(family.adapter, trajectories)


@pytest.mark.parametrize("family", ["janusflow", "januspro"], indirect=True)
def test_a_turn_stands_where_the_template_would_speak(family: Family) -> None:
    """``look_prompt`` said by the user is the same context as a picture that is looked at without a turn."""
    adapter = family.adapter
    (trajectory, _) = drawn(family, "text", "image", "text")
    *before, image = trajectory.segments[: trajectory.num_given + 2]
    shown = adapter.look(image, turn_follows=True)
    contexts = [[*before, image], [*before, shown, adapter.turn(adapter.look_prompt, shown)]]
    caches = [adapter.prefill([context]) for context in contexts]
    one, other = (adapter.next_logits(cache, None, torch.ones(1).bool()) for cache in caches)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert caches[0].positions.tolist() == caches[1].positions.tolist()


@pytest.mark.parametrize("family", ["showo"], indirect=True)
def test_show_o_draws_behind_what_was_said(family: Family) -> None:
    """Words of all turns, each in a line of its own, tokenised once and recorded."""
    config = family.adapter.config
    (trajectory, _) = drawn(family, "text", "turn", "image", "turn", "image")
    answer, first, last = (trajectory.segments[n] for n in (1, 3, 5))
    said = [i for i in answer.tokens.tolist() if i != config.eos]  # type: ignore[union-attr]
    words = [config.task, config.bos, 5, 6, *said, 3, 7, 8]
    assert first.prefix.tolist() == [*words, config.eos]  # type: ignore[union-attr]
    assert last.prefix.tolist() == [*words, 3, 7, 8, config.eos]  # type: ignore[union-attr]


def test_an_image_that_was_not_left_open_ends_its_turn(family: Family) -> None:
    """A turn behind words of the template begins like one behind an answer."""
    (trajectory, _) = drawn(family, "text", "image", "text")
    image = trajectory.segments[trajectory.num_given + 1]
    has_words = hasattr(family.adapter, "look_prompt")
    expected = family.apart if has_words else family.behind_an_image
    assert family.adapter.turn(family.said, image).tokens.tolist() == expected
