"""A vision-language model as the judge, behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from lightning_unigrpo.rewards.http import RemoteReward, ServiceError, offer, png, read_json

LONGEST_REPLY = 20_000
"""Characters of a reply that are looked at."""
COLUMNS = {"prompt": "prompts", "completion": "completions"}
"""How a template names what rewards get for all rollouts."""


@dataclass(frozen=True)
class Reply:
    """What a judge answered about one rollout."""

    text: str
    """In words; empty when there are none."""
    first: Mapping[str, float] = field(default_factory=dict)
    """Log-probabilities (nats) of the likeliest first tokens, by token."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The rollout's columns that the template names."""


Parser = Callable[[Reply], float | None]
"""Reads a number out of a reply; ``None`` = there is none."""
Question = Callable[[Mapping[str, Any]], str]
"""Writes the question about one rollout from its columns."""


def unified_reward_1_5(reply: Reply) -> float | None:
    """Read UnifiedReward 1.5.

    ``r = s / 5``, s in [1, 5] after "Final Score:"

    Source: UnifiedReward, https://arxiv.org/abs/2503.05236; the scale is Flow-GRPO's,
    https://arxiv.org/abs/2505.05470 (released code).

    Args:
        reply: of the judge.

    Returns:
        In [0.2, 1]; None without a score in the range.

    Example:
        >>> unified_reward_1_5(Reply("Both cubes are there. Final Score: 4.5"))
        0.9
    """
    found = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)(?![\d.]*\d)", reply.text)
    score = float(found[1]) if found else math.nan
    return score / 5 if score <= 5 else None


def unified_reward_2(reply: Reply) -> float | None:
    r"""Read UnifiedReward 2.0.

    ``r = (clip(mean(s), 1, 5) - 1) / 4`` over the axes alignment, coherence and style that are there.

    Source: UnifiedReward 2.0, https://github.com/CodeGoat24/UnifiedReward; the scale is verl-omni's,
    https://github.com/verl-project/verl-omni.

    Args:
        reply: of the judge.

    Returns:
        In [0, 1]; None when no axis is there.

    Example:
        >>> unified_reward_2(Reply("Alignment Score (1-5): 5\nStyle Score (1-5): 2"))
        0.625
    """
    axis = r"(Alignment|Coherence|Style) Score \(1-5\):\s*(\d+(?:\.\d+)?)"
    scores = {name: float(value) for name, value in re.findall(axis, reply.text)}
    if not scores:
        return None
    mean = sum(scores.values()) / len(scores)
    return (min(5.0, max(1.0, mean)) - 1) / 4


def yes_no_logprob(reply: Reply) -> float | None:
    """Weigh "yes" against "no" as the first token.

    ``r = p(yes) / (p(yes) + p(no))``, each summed over its spellings; with one spelling each this is
    ``sigmoid(log p(Yes) - log p(No))``.

    Source: Flow-Factory, https://github.com/X-GenGroup/Flow-Factory (``vllm_evaluate``).

    Args:
        reply: of the judge, with log-probabilities.

    Returns:
        In [0, 1]; None when neither is among the likeliest tokens.

    Example:
        >>> yes_no_logprob(Reply("Yes", first={"Yes": math.log(0.6), "no": math.log(0.2)}))
        0.75
    """
    total = {"yes": 0.0, "no": 0.0}
    for token, log_prob in reply.first.items():
        word = token.strip().lower()
        if word in total:
            total[word] += math.exp(min(log_prob, 0.0))
    both = total["yes"] + total["no"]
    return total["yes"] / both if both else None


@dataclass(frozen=True)
class JsonScore:
    """Read a number from JSON in the reply.

    ``r = (s - low) / (high - low)``

    Source: the form is that of the judges in R3, https://github.com/sen-ye/R3 (``correct``, 0 to 1).

    Args:
        key: of the number.
        low: the worst score.
        high: the best.

    Raises:
        ValueError: when low is not below high.

    Example:
        >>> JsonScore(low=1, high=5)(Reply('I would say {"score": 4}.'))
        0.75
    """

    key: str = "score"
    low: float = 0.0
    high: float = 10.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.low < self.high:
            raise ValueError(
                f"JsonScore got low={self.low} and high={self.high}; give low < high (Judge.parser)."
            )

    def __call__(self, reply: Reply) -> float | None:
        """Return the score in [0, 1]; None when there is none in the range."""
        value = _find(reply.text, self.key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not self.low <= value <= self.high:
            return None
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Checklist:
    """Compare answers to yes-or-no questions with those that are right.

    ``r = |{i : answer_i = expected_i}| / n``

    Source: R3, https://github.com/sen-ye/R3 (TIIF).

    Deviation: not rounded to two decimals, which would make unequal rollouts equal.

    Args:
        expected: column with the right answers, a list of "yes" and "no" for each rollout.

    Example:
        >>> row = {"yn_answer_list": ["yes", "no"]}
        >>> Checklist()(Reply('{"answers": ["Yes", "yes"]}', row=row))
        0.5
    """

    expected: str = "yn_answer_list"

    def __call__(self, reply: Reply) -> float | None:
        """Return the share of right answers; None when there is not one for each question."""
        right, given = _words(reply.row[self.expected]), _words(_find(reply.text, "answers"))
        if not right or len(given) != len(right) or not set(given) <= {"yes", "no"}:
            return None
        return sum(g == r for g, r in zip(given, right, strict=True)) / len(right)


def _words(answers: Any) -> list[str]:
    if not isinstance(answers, Sequence) or isinstance(answers, str):
        return []
    spelled = {True: "yes", False: "no"}
    return [spelled[a] if isinstance(a, bool) else str(a).strip().lower() for a in answers]


def _find(text: str, key: str) -> Any:
    """Return the value of a key in the first JSON object that has it; None where there is none."""
    return next((found[key] for found in _objects(text) if key in found), None)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    reader = json.JSONDecoder()
    for place in re.finditer(r"\{", text):
        try:
            found, _ = reader.raw_decode(text, place.start())
        except (ValueError, RecursionError):
            continue
        yield found


@dataclass(frozen=True)
class Template:
    """A question, how the answer is read, and what the request needs for that."""

    text: str
    """With ``{prompt}``, ``{completion}`` and columns of the data set in braces."""
    parser: Parser
    columns: tuple[str, ...] = ()
    """What the parser reads beside those in the text."""
    side: int | None = None
    """Pixels to which images are resized, both ways; ``None`` = as drawn."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request."""


TEMPLATES = {
    "unified_reward_1_5": Template(
        "Caption of the picture above: {prompt}\n\nJudge how well the picture shows what the caption says "
        "and how well it is made. Explain your judgement briefly, then close with one line\n"
        "Final Score: X\nwhere X lies between 1 (bad) and 5 (excellent).",
        unified_reward_1_5,
        side=512,
        request={"max_tokens": 512},
    ),
    "unified_reward_2": Template(
        "Caption of the picture above: {prompt}\n\nJudge the picture on three axes: does it show what the "
        "caption says (alignment), is it free of impossible or broken parts (coherence), and is it pleasant "
        "to look at (style)? Answer with these three lines and nothing else:\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z",
        unified_reward_2,
        request={"max_tokens": 512},
    ),
    "yes_no_logprob": Template(
        "Caption: {prompt}\nDoes the picture show everything that the caption says? Reply with one word, "
        "Yes or No.",
        yes_no_logprob,
        request={"max_tokens": 1, "logprobs": True, "top_logprobs": 20},
    ),
    "json_score": Template(
        "Caption: {prompt}\nHow well does the picture show what the caption says? Reply with JSON only, "
        '{"score": X}, where X lies between 0 (not at all) and 10 (in every detail).',
        JsonScore(),
        request={"max_tokens": 256},
    ),
    "checklist": Template(
        "Look at the picture and answer each of these questions by yes or no:\n{yn_question_list}\n"
        'Reply with JSON only, {"answers": ["yes", "no", ...]}, one answer for each question, in order.',
        Checklist(),
        columns=("yn_answer_list",),
        request={"max_tokens": 512},
    ),
}
"""By name: the question, and the parser that goes with it."""


class Judge(RemoteReward):
    """Asks a vision-language model about one image at a time.

    ``POST /chat/completions``: one message, the image (PNG as a data URI) before the text, temperature 0.
    A reply that cannot be read leaves the rollout unscored; ``parsed`` in the logs is the share that
    could be. The questions are ours: a judge that was trained with a wording of its own is asked best by
    that one, as ``template``.

    Args:
        url: with the version, such as ``http://127.0.0.1:8000/v1``.
        model: name that the server knows it by.
        template: a name in :data:`TEMPLATES`, a question with ``{prompt}`` or other columns in braces, or a
            callable from a rollout's ``columns`` to a question.
        parser: a name in :data:`TEMPLATES`, or a callable from :class:`Reply` to a number or None; ``None`` =
            the template's own.
        columns: what a template or parser of your own reads beside what stands in braces.
        settings: more fields of the request, such as ``{seed: 0}``.
        **service: see :class:`RemoteReward`.

    Raises:
        ValueError: for a template without a parser, or a name that is not there.

    Example:
        >>> judge = Judge("http://127.0.0.1:8000/v1", "qwen", "Is {prompt} there?", JsonScore())
        >>> judge.question({"prompt": "a cat"})
        'Is a cat there?'
    """

    batch_size = 1
    concurrency = 8
    health: ClassVar[str] = "/models"

    def __init__(
        self,
        url: str,
        model: str,
        template: Question | str = "yes_no_logprob",
        parser: Parser | str | None = None,
        *,
        columns: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        **service: Any,
    ) -> None:
        super().__init__(url, **service)
        self.model = model
        known = TEMPLATES.get(template) if isinstance(template, str) else None
        has_place = callable(template) or "{" in template
        if known is None and (parser is None or not has_place):
            raise ValueError(
                f"Judge.template is {template!r}; give one of {list(TEMPLATES)}, or with a parser a question "
                "that has {prompt} in it, or a callable (model.rewards)."
            )
        if isinstance(parser, str) and parser not in TEMPLATES:
            raise ValueError(
                f"Judge.parser is {parser!r}; give one of {list(TEMPLATES)}, or a callable (model.rewards)."
            )
        source = TEMPLATES[parser] if isinstance(parser, str) else known
        self.template = known.text if known else template
        self.side = known.side if known else None
        self.parser = parser if callable(parser) else source.parser if source else None
        asked = re.findall(r"\{(\w+)\}", self.template) if isinstance(self.template, str) else []
        self.names = tuple(dict.fromkeys([*asked, *(source.columns if source else ()), *columns]))
        self.request: dict[str, Any] = {"model": model, "temperature": 0.0}
        self.request |= {**(source.request if source else {}), **(settings or {})}
        offer(self, dict.fromkeys(["images", *(COLUMNS.get(name, name) for name in self.names)]))

    def __call__(
        self, *, images: Sequence[Image.Image | None], **columns: Sequence[Any]
    ) -> dict[str, list[float | None]]:
        """Score rollouts one after the other; one without an image stays unscored.

        Raises:
            ServiceError: when the server refuses, cannot be reached, or does not answer as a chat does.
        """
        rows = self.rows(len(images), columns)
        scores = [
            None if image is None else self._ask(image, row)
            for image, row in zip(images, rows, strict=True)
        ]
        return {"score": scores, "parsed": [float(score is not None) for score in scores]}

    def rows(self, count: int, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Return what the template may name, rollout by rollout."""
        return [
            {name: columns[COLUMNS.get(name, name)][i] for name in self.names} for i in range(count)
        ]

    def question(self, row: Mapping[str, Any]) -> str:
        """Return the text for one rollout; lists are numbered, a line each."""
        if callable(self.template):
            return self.template(row)

        def fill(place: re.Match[str]) -> str:
            value = row[place[1]]
            if isinstance(value, list | tuple):
                return "\n".join(f"{i}. {item}" for i, item in enumerate(value, 1))
            return str(value)

        return re.sub(r"\{(\w+)\}", fill, self.template)

    def _ask(self, image: Image.Image, row: Mapping[str, Any]) -> float | None:
        assert self.parser is not None
        score = self.parser(self.reply(image, row))
        return score if score is not None and math.isfinite(score) else None

    def reply(self, image: Image.Image, row: Mapping[str, Any]) -> Reply:
        """Ask about one rollout.

        Raises:
            ServiceError: when the server refuses, cannot be reached, or does not answer as a chat does.
        """
        if self.side is not None:
            image = image.resize((self.side, self.side))
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}},
            {"type": "text", "text": self.question(row)},
        ]
        body = {**self.request, "messages": [{"role": "user", "content": content}]}
        answer = self.send("/chat/completions", json.dumps(body).encode(), "application/json")
        return read_reply(read_json(answer), row)


def read_reply(answer: Any, row: Mapping[str, Any]) -> Reply:
    """Read a chat completion.

    Raises:
        ServiceError: when it is none.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        return Reply(text[:LONGEST_REPLY], {t["token"]: float(t["logprob"]) for t in first}, row)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ServiceError(f"the answer is no chat completion: {str(answer)[:80]!r}") from error
