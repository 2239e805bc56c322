"""GenEval: every rule by hand, all official prompts, and the whole path with small networks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Mask2FormerConfig, SwinConfig
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from lightning_unigrpo.reward import Reward, read_scores
from lightning_unigrpo.rewards import detection
from lightning_unigrpo.rewards.coco import NAMES
from lightning_unigrpo.rewards.detection import CLIPColors, Mask2FormerDetector, objects_of
from lightning_unigrpo.rewards.geneval import (
    COLORS,
    TASKS,
    Detection,
    GenEval,
    judge,
    kept,
    partial_score,
    relations,
)
from tests.clips import inputs, reference, write_clip

SHARED = Path(__file__).parents[2] / "shared" / "rewards" / "data"
Box = tuple[float, float, float, float]


def at(x: float, y: float, score: float = 0.95, side: float = 10) -> Detection:
    """Return a square object around a centre."""
    half = side / 2
    return Detection((x - half, y - half, x + half, y + half), score)


def no_color(name: str, objects: Sequence[Detection]) -> list[str]:
    raise AssertionError("no colour was asked for")


def asked(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": [{"count": 1, **clause} for clause in include], **more}


# ---- the objects that count


def test_thresholds_are_exceeded_not_reached() -> None:
    found = {
        "cat": [at(0, 0, score) for score in (0.3, 0.30001, 0.9, 0.90001)],
        "dog": [at(0, 0, 0.1)],
    }
    assert [d.score for d in kept(found, tag="two_object")["cat"]] == [0.90001, 0.9, 0.30001]
    assert [d.score for d in kept(found, tag="counting")["cat"]] == [0.90001]
    assert "dog" not in kept(found, tag="colors")


def test_at_most_sixteen_objects_of_a_class_the_best_first() -> None:
    found = {"cat": [at(0, 0, 0.5 + i / 100) for i in range(20)]}
    scores = [d.score for d in kept(found, tag="position")["cat"]]
    assert scores == sorted((0.5 + i / 100 for i in range(4, 20)), reverse=True)


# ---- where

CASES: list[tuple[Box, Box, set[str]]] = [
    ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
    ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
    ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
    ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
    ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),  # a diagonal is both
    ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # an offset of a tenth of both widths is none
    ((0, 0, 10, 10), (2.1, 0, 12.1, 10), set()),  # 0.1 of 2.1 is left: less than half of the whole
    ((0, 0, 10, 10), (3.7, 0, 13.7, 10), set()),  # 1.7 of 3.7
    ((0, 0, 10, 10), (0, 3.7, 10, 13.7), set()),
    ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),  # 2.1 of 4.1
    (
        (0, 0, 100, 10),
        (25, 12, 125, 22),
        set(),
    ),  # 5 and 10 are left of 25 and 12, whose length is 27.7
]


@pytest.mark.parametrize(("a", "b", "expected"), CASES)
def test_relations(a: Box, b: Box, expected: set[str]) -> None:
    assert relations(a, b) == expected
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(b, a) == {mirror[word] for word in expected}


def test_the_length_is_that_of_the_whole_offset() -> None:
    """Shrunk (2, 12) of (10, 20): 12 / 22.4 counts as below; 12 / 12.2 would too, 2 / 12.2 never."""
    a, b = (10.0, 20.0, 50.0, 60.0), (0.0, 0.0, 40.0, 40.0)
    assert relations(a, b) == {"below"}
    x, y = 10 - 8, 20 - 8
    assert y / math.hypot(10, 20) > 0.5 > x / math.hypot(10, 20)


# ---- the benchmark's verdict


def test_more_objects_than_asked_for_are_right() -> None:
    found = {"bench": [at(0, 0), at(50, 0)]}
    verdict = judge(found, asked("single_object", {"class": "bench"}), no_color)
    assert (verdict.correct, verdict.strict) == (True, False)
    assert verdict.partial == 0.0  # twice as many as asked for


@pytest.mark.parametrize(("number", "correct"), [(1, False), (2, True), (3, False)])
def test_counting_excludes_one_more(number: int, correct: bool) -> None:
    found = {"cat": [at(30 * i, 0) for i in range(number)]}
    counting = asked(
        "counting", {"class": "cat", "count": 2}, exclude=[{"class": "cat", "count": 3}]
    )
    verdict = judge(found, counting, no_color)
    assert (verdict.correct, verdict.strict) == (correct, correct)
    assert verdict.partial == 1 - abs(2 - number) / 2
    assert bool(verdict.reasons) is not correct


def colored(*colors: str) -> Any:
    """Return a namer that gives objects these colours, from left to right."""

    def color_of(name: str, objects: Sequence[Detection]) -> list[str]:
        return [colors[round(d.box[0] + 5) // 30] for d in objects]

    return color_of


def test_all_of_the_best_objects_have_the_color() -> None:
    """The better of two cars is blue: the benchmark asks it alone, the strict reading finds one too many."""
    car = asked("colors", {"class": "car", "color": "red"})
    assert judge({"car": [at(0, 0)]}, car, colored("red")).correct
    assert not judge({"car": [at(0, 0)]}, car, colored("blue")).correct
    two = {"car": [at(0, 0, 0.8), at(30, 0, 0.9)]}
    assert judge(two, car, colored("blue", "red")).correct
    assert not judge(two, car, colored("red", "blue")).correct
    assert not judge(two, car, colored("red", "red")).strict
    pair = asked("colors", {"class": "car", "color": "red", "count": 2})
    assert judge(two, pair, colored("red", "red")).correct
    assert not judge(two, pair, colored("red", "blue")).correct


def test_a_position_to_a_clause_that_failed_is_wrong() -> None:
    """The bus is there and red is not: the dog below it is in no place."""
    metadata = asked(
        "position",
        {"class": "bus", "color": "red"},
        {"class": "dog", "position": ["below", 0]},
    )
    found = {"bus": [at(0, 0)], "dog": [at(0, 50)]}
    assert judge(found, metadata, colored("red")).correct
    verdict = judge(found, metadata, colored("green"))
    assert len(verdict.reasons) == 2
    above = judge({"bus": [at(0, 50)], "dog": [at(0, 0)]}, metadata, colored("red"))
    assert above.reasons == ("expected dog below object 0",)


def test_every_object_stands_in_relation_to_every_other() -> None:
    metadata = asked(
        "position", {"class": "cup", "count": 2}, {"class": "cow", "position": ["left of", 0]}
    )
    right = {"cup": [at(50, 0), at(90, 0)], "cow": [at(0, 0)]}
    between = {"cup": [at(50, 0), at(90, 0)], "cow": [at(70, 0)]}
    assert judge(right, metadata, no_color).correct
    assert not judge(between, metadata, no_color).correct


# ---- the partial score


def bounded(found: dict[str, list[Detection]], metadata: Any, color: Any = no_color) -> float:
    return partial_score(found, metadata, color)[0]


def served(found: dict[str, list[Detection]], metadata: Any, color: Any = no_color) -> float:
    return partial_score(found, metadata, color, compat=True)[0]


def test_too_many_objects_are_bounded_unless_asked_otherwise() -> None:
    one = asked("single_object", {"class": "cat"})
    three = {"cat": [at(30 * i, 0) for i in range(3)]}
    assert (bounded(three, one), served(three, one)) == (0.0, -1.0)
    sixteen = {"cat": [at(30 * i, 0) for i in range(16)]}
    two = asked("counting", {"class": "cat", "count": 2})
    assert (bounded(sixteen, two), served(sixteen, two)) == (0.0, -6.0)


def test_a_wrong_position_is_a_third_or_a_quarter() -> None:
    metadata = asked("position", {"class": "cup"}, {"class": "cow", "position": ["left of", 0]})
    right, wrong = ({"cup": [at(50, 0)], "cow": [at(x, 0)]} for x in (0, 90))
    assert bounded(right, metadata) == served(right, metadata) == 1.0
    assert bounded(wrong, metadata) == pytest.approx(2 / 3)
    assert served(wrong, metadata) == 0.75
    # The reference is not there: 0, 1, and nothing to stand beside.
    alone = {"cow": [at(0, 0)]}
    assert bounded(alone, metadata) == served(alone, metadata) == pytest.approx(1 / 3)
    # The subject is not there: 1, 0, and no place.
    other = {"cup": [at(0, 0)]}
    assert bounded(other, metadata) == served(other, metadata) == pytest.approx(1 / 3)


def test_a_wrong_color_is_half() -> None:
    metadata = asked("colors", {"class": "car", "color": "red"})
    assert bounded({"car": [at(0, 0)]}, metadata, colored("red")) == 1.0
    assert bounded({"car": [at(0, 0)]}, metadata, colored("blue")) == 0.5
    assert bounded({}, metadata, colored("red")) == 0.0
    pair = asked("color_attr", {"class": "car", "color": "red"}, {"class": "cow", "color": "blue"})
    assert bounded({"car": [at(0, 0)]}, pair, colored("red")) == 0.5


def test_exclusion_is_not_read() -> None:
    metadata = asked(
        "counting", {"class": "cat", "count": 2}, exclude=[{"class": "cat", "count": 1}]
    )
    found = {"cat": [at(0, 0), at(30, 0)]}
    assert bounded(found, metadata) == 1.0
    assert not judge(found, metadata, no_color).correct


# ---- official prompts

official = pytest.mark.skipif(
    not (SHARED / "geneval_eval.jsonl").is_file(), reason="GenEval's prompts are not here"
)


def perfect(metadata: dict[str, Any]) -> tuple[dict[str, list[Detection]], dict[int, str]]:
    """Return the objects of an image that is all that a prompt asks for, and their colours."""
    found: dict[str, list[Detection]] = {}
    colors: dict[int, str] = {}
    where = {"left of": (-60, 0), "right of": (60, 0), "above": (0, -60), "below": (0, 60)}
    for number, clause in enumerate(metadata["include"]):
        x, y = where[clause["position"][0]] if "position" in clause else (400 * number, 0)
        for i in range(clause["count"]):
            each = at(x + 30 * i, y)
            found.setdefault(clause["class"], []).append(each)
            colors[id(each)] = clause.get("color", "")
    return found, colors


@official
def test_all_official_prompts_score() -> None:
    """A perfect image is right in every reading; without its last object it is right in none."""
    lines = (SHARED / "geneval_eval.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 553
    assert {record["tag"] for record in records} == set(TASKS)
    assert {c["class"] for r in records for c in r["include"]} <= set(NAMES)
    for record in records:
        found, colors = perfect(record)

        def color_of(name: str, objects: Sequence[Detection], known: Any = colors) -> list[str]:
            return [known[id(d)] for d in objects]

        verdict = judge(found, record, color_of)
        assert verdict[:3] == (True, True, 1.0), record
        found[record["include"][-1]["class"]].pop()
        verdict = judge(found, record, color_of)
        assert not verdict.correct
        assert not verdict.strict
        assert 0 <= verdict.partial < 1


@official
def test_classes_are_those_of_the_benchmark() -> None:
    assert (SHARED / "coco80_names.txt").read_text(encoding="utf-8").split("\n")[:80] == [*NAMES]


# ---- networks


def planted(
    masks: Tensor, labels: Sequence[int], probability: float = 0.97
) -> tuple[Tensor, Tensor]:
    """Return the outputs of a Mask2Former that found these rectangles, and nothing else."""
    num, rest = len(labels), (1 - probability) / 80
    classes = torch.full((num + 2, 81), math.log(rest))
    for query, label in enumerate(labels):
        classes[query, label] = math.log(probability)
    classes[num:, 80] = math.log(probability)  # no object
    logits = torch.full((num + 2, *masks.shape[1:]), -9.0)
    logits[:num][masks] = 9.0
    return classes, logits


def rectangle(x0: int, y0: int, x1: int, y1: int, size: int = 64) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_planted_masks_become_boxes_in_order() -> None:
    """Boxes are extents, scores the product of class and mask; the best first, overlaps kept."""
    masks = torch.stack(
        [rectangle(4, 8, 20, 30), rectangle(10, 8, 40, 30), rectangle(50, 50, 60, 64)]
    )
    classes, logits = planted(masks, [15, 15, 16])
    classes[1, 15] = 2.0  # surer than the first
    found = objects_of(classes, logits)
    sure = {name: [d for d in each if d.score > 0.3] for name, each in found.items()}
    assert [d.box for d in sure["cat"]] == [(10, 8, 40, 30), (4, 8, 20, 30)]
    assert [d.box for d in sure["dog"]] == [(50, 50, 60, 64)]
    assert torch.equal(sure["cat"][1].mask, masks[0])  # type: ignore[arg-type]
    probability = float(classes[2].softmax(0)[16])
    assert sure["dog"][0].score == pytest.approx(probability / (1 + math.exp(-9)), rel=1e-5)
    assert sum(map(len, found.values())) <= 100


class Planted:
    """A Mask2Former whose outputs are given, at a quarter of its input's size."""

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.rows, self.shapes = iter(rows), []
        self.config = type("Config", (), {"num_labels": 80})()
        self.dtype = torch.float32

    def to(self, *_: Any) -> Any:
        return self

    def eval(self) -> Any:
        return self

    def requires_grad_(self, _: bool) -> Any:
        return self

    def __call__(self, pixel_values: Tensor) -> Any:
        self.shapes.append(pixel_values.shape)
        classes, masks = zip(*(next(self.rows) for _ in pixel_values), strict=True)
        found = {
            "class_queries_logits": torch.stack(classes),
            "masks_queries_logits": torch.stack(masks),
        }
        return type("Found", (), found)()


def scene(*things: tuple[Box, tuple[float, float, float]], size: int = 64) -> Tensor:
    """Return a grey picture with coloured rectangles."""
    image = torch.full((3, size, size), 0.5)
    for (x0, y0, x1, y1), color in things:
        image[:, int(y0) : int(y1), int(x0) : int(x1)] = torch.tensor(color).view(3, 1, 1)
    return image


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def mean_hue(image: Tensor, name: str, objects: Sequence[Detection]) -> list[str]:
    """Name the strongest channel inside the masks."""
    crops = [detection.cropped(image, d).mean((1, 2)) for d in objects]
    return [("red", "green", "blue")[int(c.argmax())] for c in crops]


def test_a_planted_set_scores_as_computed_by_hand() -> None:
    """Four pictures through detector, crops and rules: right, wrong colour, wrong place, one too many."""
    left, right = (4, 20, 20, 44), (44, 20, 60, 44)
    pictures = [
        scene((left, RED), (right, BLUE)),
        scene((left, BLUE), (right, BLUE)),
        scene((left, RED)),
        scene((left, RED), (right, RED)),
    ]
    size, factor = 800 // 4, (800 / 64) / 4

    def masks(*boxes: Box) -> Tensor:
        return torch.stack(
            [rectangle(*(round(x * factor) for x in box), size=size) for box in boxes]
        )  # type: ignore[arg-type]

    none = torch.zeros(1, size, size, dtype=torch.bool)
    car, cow = NAMES.index("car"), NAMES.index("cow")
    rows = [
        planted(masks(left, right), [car, cow]),
        planted(masks(left, right), [car, cow]),
        planted(torch.cat([masks(left), none]), [car, car]),
        planted(masks(left, right), [car, car]),
    ]
    detector = Mask2FormerDetector(model=Planted(rows), batch_size=3)
    columns = {
        "tag": ["color_attr", "color_attr", "position", "single_object"],
        "include": [
            [
                {"class": "car", "count": 1, "color": "red"},
                {"class": "cow", "count": 1, "color": "blue"},
            ],
        ]
        * 2
        + [
            [
                {"class": "car", "count": 1},
                {"class": "cow", "count": 1, "position": ["right of", 0]},
            ],
            [{"class": "car", "count": 1}],
        ],
    }
    reward = Reward(GenEval(detector, mean_hue), name="geneval")
    found = reward(images=torch.stack(pictures), **columns)
    assert found["score"] == pytest.approx([1.0, 0.75, 1 / 3, 0.0])
    assert found["correct"] == [1.0, 0.0, 0.0, 1.0]
    assert found["strict"] == [1.0, 0.0, 0.0, 0.0]
    scores, details = read_scores("geneval", found, 4)
    assert scores.tolist() == pytest.approx(found["score"])
    assert details["partial"].tolist() == scores.tolist()
    assert set(details) == {"partial", "correct", "strict"}
    assert detector.model.shapes == [(3, 3, 800, 800), (1, 3, 800, 800)]


def test_padding_is_no_part_of_the_picture() -> None:
    """64 x 80 is read as 800 x 1000, padded to 1024: masks are cut before they are scaled back."""
    mask = torch.zeros(1, 200, 256, dtype=torch.bool)
    mask[:, 50:100, 125:250] = True
    detector = Mask2FormerDetector(model=Planted([planted(mask, [0])]))
    (found,) = detector([torch.rand(3, 64, 80)])
    sure = [d for d in found["person"] if d.score > 0.3]
    assert [d.box for d in sure] == [(40, 16, 80, 32)]
    assert detector.model.shapes == [(1, 3, 800, 1024)]


def test_an_image_that_is_not_there_is_not_scorable() -> None:
    detector = Mask2FormerDetector(model=Planted([planted(rectangle(0, 0, 9, 9)[None], [0])]))
    reward = GenEval(detector, mean_hue)
    include = [[{"class": "person", "count": 1}]] * 2
    found = reward([None, scene()], ["single_object"] * 2, include)
    assert math.isnan(found["score"][0])
    assert found["score"][1] == 1.0


def tiny_mask2former() -> Any:
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=64
    )
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    torch.manual_seed(0)
    return Mask2Former(config)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_random_networks_run_through_the_whole_path(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of two sizes, one by one as together; scores are numbers in [0, 1]."""
    monkeypatch.setattr(detection, "SHORT", 64)
    detector, colors = Mask2FormerDetector(model=tiny_mask2former()), CLIPColors(str(clip))
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, h, w, generator=generator) for h, w in ((40, 40), (40, 56), (40, 40))]
    together = detector(pictures)
    for picture, objects in zip(pictures, together, strict=True):
        (alone,) = detector([picture])
        assert objects.keys() == alone.keys()
        for name, each in objects.items():
            for a, b in zip(each, alone[name], strict=True):
                assert a.box == b.box
                assert a.score == pytest.approx(b.score, abs=1e-5)
                assert a.mask is not None
                assert a.mask.shape == picture.shape[1:]
    reward = GenEval(detector, colors)
    reward.prepare(torch.device("cpu"))
    found = reward(pictures, ["colors"] * 3, [[{"class": "cat", "count": 1, "color": "red"}]] * 3)
    assert all(0 <= x <= 1 for x in found["score"])
    reward.release()


def test_a_color_is_the_likeliest_mean_of_templates(clip: Path) -> None:
    """By hand, each text alone, for several classes and pictures; more than one colour comes up."""
    colors, every = CLIPColors(str(clip)), set()
    model, generator = reference(clip), torch.Generator().manual_seed(0)
    for name in ("cat", "bus", "wine glass", "tv"):
        means = {}
        for color in COLORS:
            words = [t.format(color=color, name=name) for t in detection.TEMPLATES]
            read = inputs(clip, torch.rand(1, 3, 40, 40), words)
            with torch.no_grad():
                each = torch.cat(
                    [model.get_text_features(ids).pooler_output for ids in read["tokens"]]
                )
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
            means[color] = mean / mean.norm()
        for _ in range(6):
            picture = torch.rand(3, 1, 1, generator=generator).expand(3, 40, 40).contiguous()
            with torch.no_grad():
                pixels = inputs(clip, picture[None], [])["pixels"]
                seen = model.get_image_features(pixel_values=pixels).pooler_output[0]
            shares = {color: float(seen @ mean) for color, mean in means.items()}
            (named,) = colors(picture, name, [Detection((0, 0, 40, 40), 1.0)])
            assert named == max(shares, key=shares.__getitem__)
            every.add(named)
    assert len(every) > 1


def test_what_is_not_the_object_is_grey() -> None:
    image = scene(((0, 0, 64, 64), RED))
    mask = rectangle(8, 8, 16, 24)
    crop = detection.cropped(image, Detection((4, 8, 16, 24), 1.0, mask))
    assert crop.shape == (3, 16, 12)
    assert crop[:, :, 4:].mean((1, 2)).tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(crop[:, :, :4], torch.tensor(0x99 / 255))


# ---- what is refused


def test_metadata_of_another_form_is_refused() -> None:
    reward = GenEval(Mask2FormerDetector(model=Planted([])), mean_hue)
    clause = {"class": "cat", "count": 1}
    for tag, include in (
        ("spatial_count_attr", [clause]),
        ("colors", None),
        ("colors", ["cat"]),
        ("colors", [{"class": "cat"}]),
        ("colors", [clause | {"count": 0}]),
        ("position", [clause | {"position": ["below", 0]}]),
    ):
        with pytest.raises(ValueError, match="GenEval"):
            reward([], [tag], [include])


def test_a_detector_of_other_classes_is_refused_before_anything_is_drawn() -> None:
    model = Planted([])
    model.config.num_labels = 91
    with pytest.raises(ValueError, match="knows 91 classes"):
        GenEval(Mask2FormerDetector(model=model), mean_hue).prepare(torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="hf download facebook/mask2former"):
        GenEval().prepare(torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="hf download openai/clip"):
        CLIPColors().prepare(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"GenEval\.value is 'best'"):
        GenEval(value="best")  # type: ignore[arg-type]
