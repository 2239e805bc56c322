"""Services that speak pickle: what they send is read as plain data or not at all."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lightning_unigrpo.rewards.http import RemoteReward, ServiceError, offer, read_numbers

# fmt: off
PLAIN = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET",
    "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE",
})
# fmt: on
"""Instructions of pickle that make text, numbers and built-in containers, and call nothing."""
NUMBERED = {"PUT", "BINPUT", "LONG_BINPUT"}


class PlainUnpickler(pickle.Unpickler):
    """Looks up no names."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse.

        Raises:
            pickle.UnpicklingError: always.
        """
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def load_plain(data: bytes) -> Any:
    """Read a pickle of str, float, int, bool, None, and lists, tuples, dicts and sets of them.

    Every instruction is looked at before the first is carried out; names are refused a second time when
    they are looked up.

    Args:
        data: from anybody.

    Returns:
        What was pickled.

    Raises:
        ServiceError: when there is anything else in it.

    Example:
        >>> load_plain(pickle.dumps({"scores": [0.5, 1]}))
        {'scores': [0.5, 1]}
    """
    try:
        for code, argument, place in pickletools.genops(data):
            # A place far beyond what was read makes the C reader take that much memory.
            far = code.name in NUMBERED and int(argument or 0) > len(data)
            if code.name not in PLAIN or far:
                raise ServiceError(
                    f"the answer is a pickle with more than plain data in it ({code.name} at byte "
                    f"{place}); it was not carried out"
                )
        return PlainUnpickler(io.BytesIO(data)).load()
    except ServiceError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the reader raise
        raise ServiceError(f"the answer is no pickle of plain data: {data[:80]!r}") from error


def jpeg(image: Image.Image) -> bytes:
    """Return an image as JPEG, with the quality that these services are used with."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


class PickledReward(RemoteReward):
    """Asks a service of flow_grpo or verl-omni: pickles both ways.

    Prefer :class:`~lightning_unigrpo.rewards.http.HTTPReward` where there is a choice. Nothing takes this
    class by itself, and what the service sends is read by :func:`load_plain`, so it cannot run code here.
    What is sent is an ordinary pickle.

    Source: flow_grpo, https://github.com/yifan123/flow_grpo (``rewards.py``), reward-server,
    https://github.com/yifan123/reward-server; verl-omni, https://github.com/verl-project/verl-omni.

    Args:
        url: complete, such as ``http://127.0.0.1:18085``.
        fields: what is sent beside ``images`` (JPEG, quality 95), as key of the service: column.
        constants: what is sent as it stands.
        scores: key of the answer with one number per rollout.
        **service: see :class:`RemoteReward`.

    Example:
        >>> geneval = PickledReward(
        ...     "http://127.0.0.1:18085",
        ...     fields={"meta_datas": "metadata"},
        ...     constants={"only_strict": False},
        ... )
        >>> quality = PickledReward("http://127.0.0.1:18086", fields={}, scores="outputs")
    """

    health = "/"

    def __init__(
        self,
        url: str,
        *,
        fields: Mapping[str, str] | None = None,
        constants: Mapping[str, Any] | None = None,
        scores: str = "scores",
        **service: Any,
    ) -> None:
        super().__init__(url, **service)
        self.fields = {"prompts": "prompts"} if fields is None else dict(fields)
        self.constants, self.scores = dict(constants or {}), scores
        offer(self, dict.fromkeys(["images", *self.fields.values()]))

    def __call__(
        self, *, images: Sequence[Image.Image | None], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score rollouts; one without an image stays unscored.

        Raises:
            ServiceError: when the service refuses, cannot be reached, or sends more than plain data.
        """
        drawn = [(i, image) for i, image in enumerate(images) if image is not None]
        found: list[float | None] = [None] * len(images)
        if not drawn:
            return found
        body = {
            **self.constants,
            **{key: [columns[name][i] for i, _ in drawn] for key, name in self.fields.items()},
            "images": [jpeg(image) for _, image in drawn],
        }
        answer = load_plain(self.send("", pickle.dumps(body), "application/octet-stream"))
        if isinstance(answer, Mapping) and answer.get("error"):
            raise ServiceError(f"the service says: {str(answer['error'])[:300]}")
        if not isinstance(answer, Mapping) or self.scores not in answer:
            raise ServiceError(f"the answer holds no {self.scores!r} (PickledReward.scores)")
        numbers = read_numbers(answer[self.scores], len(drawn))
        for (i, _), number in zip(drawn, numbers, strict=True):
            found[i] = number
        return found
