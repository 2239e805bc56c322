"""Prompts: files, the order in which training sees them, and loaders that resume."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

from lightning_unigrpo.distributed import rank, world_size
from lightning_unigrpo.types import IMAGE_PATHS, Defaults, Prompt

Split = Literal["train", "val", "test", "predict"]
FIRST_ID: dict[Split, int] = {"train": 0, "val": 10**9, "test": 2 * 10**9, "predict": 0}
"""Ids key the random draws; those of training, validation and test never meet."""
SUFFIXES = {".txt", ".jsonl", ".json", ".csv", ".parquet"}


def read_prompts(
    path: str | Path, *, first_id: int = 0, key: str = "data.train", column: str | None = None
) -> list[Prompt]:
    """Read prompts from a file.

    ``.txt``: one prompt a line. ``.jsonl``, ``.json`` (a list of records), ``.csv`` and ``.parquet``: the
    column ``prompt`` (or ``text``) is the request; ``image`` (a path) or ``images`` (a list of them),
    relative to the file, are input images; every other column reaches the rewards by its name, None where
    a record lacks it. So the files of GenEval, flow_grpo, T2I-R1 and (with ``column``) TIIF are read as
    they are.

    Args:
        path: the file, UTF-8.
        first_id: id of its first prompt.
        key: the setting that named the file, for error messages.
        column: with the request, where it is called otherwise.

    Raises:
        FileNotFoundError: when there is no such file, or no such image.
        ValueError: when it holds no prompts, or a record without one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{key} is {str(path)!r}, which is not a file.")
    records = _records(path, key)
    if not records:
        raise ValueError(f"{key}: {path} holds no prompts; give one per line.")
    prompts = []
    for number, record in enumerate(records):
        columns, where = dict(record), f"{key}: record {number + 1} of {path}"
        keys = ("prompt", "text") if column is None else (column,)
        text = next((found for name in keys if (found := columns.pop(name, None))), None)
        if not isinstance(text, str) or not text.strip():
            wanted = "'prompt' (or 'text')" if column is None else repr(column)
            raise ValueError(
                f"{where} has no {wanted}; it has {sorted(record)}. data.prompt_column names another one."
            )
        columns |= _image_paths(columns, path.parent, where)
        prompts.append(Prompt(text=text, id=first_id + number, columns=columns))
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return [replace(p, columns={**dict.fromkeys(names), **p.columns}) for p in prompts]


def _records(path: Path, key: str) -> list[dict[str, Any]]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{key}: {path} is neither .txt, .jsonl, .json, .csv nor .parquet.")
    if path.suffix == ".parquet":
        return _parquet_records(path, key)
    content = path.read_text(encoding="utf-8-sig")
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    lines = [line for line in content.split("\n") if line.strip()]
    if path.suffix == ".txt":
        return [{"prompt": line.strip()} for line in lines]
    if path.suffix == ".csv":
        return _csv_records(content, path, key)
    try:
        records = (
            json.loads(content if lines else "[]")
            if path.suffix == ".json"
            else [json.loads(line) for line in lines]
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{key}: {path} is not valid JSON ({error}).") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        form = "a list of objects" if path.suffix == ".json" else "an object a line,"
        raise ValueError(f'{key}: {path} must hold {form} such as {{"prompt": "a red cube"}}.')
    return records


def _parquet_records(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        from datasets import Dataset as Table
    except ImportError as error:
        raise ImportError(
            f'{key}: {path} needs datasets: pip install "lightning-unigrpo[datasets]".'
        ) from error
    try:
        records: list[dict[str, Any]] = Table.from_parquet(str(path), cache_dir=None).to_list()
    except Exception as error:  # whatever pyarrow raises
        raise ValueError(f"{key}: {path} is not valid parquet ({error}).") from error
    return records


def _csv_records(content: str, path: Path, key: str) -> list[dict[str, Any]]:
    records: list[dict[Any, Any]] = list(csv.DictReader(io.StringIO(content)))
    for number, record in enumerate(records):
        if None in record:  # where DictReader puts what is too much
            raise ValueError(
                f"{key}: record {number + 1} of {path} has more cells than there are columns; put text "
                'with commas into "quotes".'
            )
    return records


def _image_paths(columns: dict[str, Any], folder: Path, where: str) -> dict[str, list[str]]:
    """Take ``image`` and ``images`` out of the columns of a record and return where they lie."""
    found = [columns.pop(name) for name in ("image", "images") if name in columns]
    names = [name for value in found for name in (value if isinstance(value, list) else [value])]
    names = [name for name in names if name]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: 'image' is a path and 'images' a list of paths, not {names!r}.")
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{where} names the input image {str(path)!r}, which is not a file; rename the column if "
                "it holds something else."
            )
    return {IMAGE_PATHS: [str(path) for path in paths]} if paths else {}


def load_image(path: str | Path) -> Tensor:
    """Read an image file as ``[3, H, W]`` float32 in [0, 1], upright."""
    with Image.open(path) as image:
        pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def read_requests(source: str) -> list[Prompt]:
    """Read a file, known by its ending, or requests in words separated by semicolons.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when there are none.
    """
    first = FIRST_ID["predict"]
    if Path(source).suffix in SUFFIXES and (" " not in source or Path(source).is_file()):
        return read_prompts(source, first_id=first, key="data.predict")
    words = [word.strip() for word in source.split(";") if word.strip()]
    if not words:
        raise ValueError("data.predict holds no prompts; give a file, or requests in words.")
    return [Prompt(text=text, id=first + i) for i, text in enumerate(words)]


NOBODY = -1
"""Index of no prompt: what fills the turn of a rank that has one prompt fewer."""


class PromptDataset(Dataset[Prompt | None]):
    """A list of prompts; input images that a file names are read when a prompt is asked for."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        """Return their number."""
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt | None:
        """Return one, with its images; None for :data:`NOBODY`."""
        if index == NOBODY:
            return None
        prompt = self.prompts[index]
        paths = prompt.columns.get(IMAGE_PATHS)
        if not paths:
            return prompt
        return replace(prompt, images=tuple(load_image(path) for path in paths))


class PromptSampler(DistributedSampler[int]):
    """The order of training prompts: a permutation per pass, a function of (seed, pass) alone.

    Every rank sees the same prompts; ``RolloutGrouping`` decides which rank draws which rollouts. A
    subclass of ``DistributedSampler`` because Lightning replaces and shuffles any other.

    Args:
        dataset: the prompts.
        batch_size: prompts per iteration; a pass leaves out what does not fill one.
        seed: of the permutations.
    """

    def __init__(self, dataset: PromptDataset, *, batch_size: int, seed: int) -> None:
        super().__init__(cast(Any, dataset), num_replicas=1, rank=0, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.batches = len(dataset) // batch_size
        self.position = 0
        """Batches handed out since the beginning of training."""

    @override
    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        done, first = divmod(self.position, self.batches)
        order = np.random.default_rng((self.seed, done)).permutation(size)
        for batch in range(first, self.batches):
            # Counted before it is handed out: Lightning never asks for what comes after the last.
            self.position = done * self.batches + batch + 1
            yield from order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    @override
    def __len__(self) -> int:
        return self.batches * self.batch_size


class PromptLoader(DataLoader[Prompt | None]):
    """A loader of prompt lists that continues where its state says, in the middle of a pass too."""

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream, the same on every rank."""
        return {"position": self._prompts().position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the batches already served."""
        self._prompts().position = state["position"]

    def _prompts(self) -> PromptSampler:
        assert isinstance(self.sampler, PromptSampler)
        return self.sampler


class ShardSampler(DistributedSampler[int]):
    """Evaluation prompts in order, dealt to ranks without repeating or dropping any.

    All ranks get equally many turns, and so equally many batches; turns that are left over are nobody's.
    """

    def __init__(self, dataset: PromptDataset) -> None:
        super().__init__(cast(Any, dataset), num_replicas=world_size(), rank=rank(), shuffle=False)

    @override
    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        places = (self.rank + turn * self.num_replicas for turn in range(len(self)))
        return (place if place < size else NOBODY for place in places)

    @override
    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.num_replicas)  # type: ignore[arg-type]


def present(prompts: Sequence[Prompt | None]) -> list[Prompt]:
    """Return a batch without the turns that are nobody's; it may be empty."""
    return [prompt for prompt in prompts if prompt is not None]


class PromptDataModule(LightningDataModule):
    """Training, validation, test and prediction prompts.

    What is left out comes from the adapter's defaults. Lists of prompts: :meth:`from_prompts`.

    Args:
        train: a file (see :func:`read_prompts`).
        val: held-out prompts for validation, a file.
        test: held-out prompts for the final report, a file.
        predict: a file, or requests in words, separated by semicolons.
        prompt_column: of the files, with the request where it is not called ``prompt`` or ``text``.
        prompts_per_iteration: prompts of one iteration, over all ranks (paper: 32).
        eval_batch_size: prompts drawn together in evaluation.
        seed: of the order of training prompts; ``None`` = that of the module's sampling.
    """

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        prompts_per_iteration: int = 32,
        eval_batch_size: int = 64,
        seed: int | None = None,
        prompt_column: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("prompts_per_iteration", prompts_per_iteration),
            ("eval_batch_size", eval_batch_size),
        ):
            if value < 1:
                raise ValueError(f"data.{name} is {value}; it must be 1 or more.")
        self.prompts_per_iteration, self.eval_batch_size = prompts_per_iteration, eval_batch_size
        self.seed = seed
        self._prompts: dict[str, Sequence[Prompt]] = {}
        self._fitting: set[str] = set()
        # Read now: a missing or empty file should not wait for the weights to load.
        files: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        for split, path in files.items():
            if path is not None:
                self._prompts[split] = read_prompts(
                    path, first_id=FIRST_ID[split], key=f"data.{split}", column=prompt_column
                )
        if predict is not None:
            self._prompts["predict"] = read_requests(predict)

    @classmethod
    def from_prompts(
        cls,
        train: Sequence[Prompt] = (),
        val: Sequence[Prompt] = (),
        test: Sequence[Prompt] = (),
        **settings: Any,
    ) -> PromptDataModule:
        """Build from lists; an empty one is left to the adapter's defaults.

        Args:
            train: training prompts; ids must be unique over all lists, they key the random draws.
            val: validation prompts.
            test: test prompts.
            settings: the other arguments of the constructor.

        Raises:
            ValueError: when two prompts share an id.
        """
        everyone = [p.id for p in (*train, *val, *test)]
        if len(set(everyone)) < len(everyone):
            raise ValueError("Two prompts share an id; ids key the random draws, so number them.")
        data = cls(**settings)
        lists = {"train": train, "val": val, "test": test}
        data._prompts |= {split: rows for split, rows in lists.items() if rows}
        return data

    def _has(self, split: Split) -> bool:
        """Whether the user or the adapter gives prompts of a split."""
        return split in self._prompts or bool(getattr(self._defaults(), split, ()))

    def _defaults(self) -> Defaults | None:
        if self.trainer is None:
            return None
        found: Defaults | None = self.trainer.lightning_module.adapter.defaults()  # type: ignore[union-attr, operator]
        return found

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Return the prompts of a split, from the user or from the adapter.

        Raises:
            ValueError: when neither has any, or when one is too long for the adapter.
        """
        if split not in self._prompts:
            defaults = self._defaults() if split != "predict" else None
            if defaults is None:
                raise ValueError(
                    f"There are no prompts: set data.{split}"
                    + (
                        ", for example --data.predict 'what is three plus four'."
                        if split == "predict"
                        else "."
                    )
                )
            self._prompts[split] = getattr(defaults, split)
        self._require_room(split)
        return self._prompts[split]

    def _require_room(self, split: str) -> None:
        """Ask the backbone, once, whether all prompts of a split fit its layout.

        Raises:
            ValueError: when one does not.
        """
        if self.trainer is None or split in self._fitting:
            return
        module: Any = self.trainer.lightning_module
        # Another module may use these prompts.
        require_room: Any = getattr(module, "require_room", None)
        for prompt in self._prompts[split] if require_room is not None else ():
            require_room(prompt)
        self._fitting.add(split)

    @override
    def train_dataloader(self) -> PromptLoader:
        data = PromptDataset(self.prompts("train"))
        if len(data) < self.prompts_per_iteration:
            raise ValueError(
                f"data.prompts_per_iteration is {self.prompts_per_iteration}, but there are only "
                f"{len(data)} training prompts; lower it."
            )
        sampler = PromptSampler(data, batch_size=self.prompts_per_iteration, seed=self._seed())
        _no_workers_needed()
        return PromptLoader(
            data, batch_size=self.prompts_per_iteration, sampler=sampler, collate_fn=list
        )

    def _seed(self) -> int:
        if self.seed is not None:
            return self.seed
        return self.trainer.lightning_module.sampling.seed if self.trainer else 0  # type: ignore[union-attr, return-value]

    @override
    def val_dataloader(self) -> DataLoader[Prompt | None] | list[Any]:
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and not self._has("val"):
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
            return []  # training without validation, as Lightning understands it
        return self._evaluation("val")

    @override
    def test_dataloader(self) -> DataLoader[Prompt | None]:
        return self._evaluation("test")

    @override
    def predict_dataloader(self) -> DataLoader[Prompt | None]:
        return self._evaluation("predict")

    def _evaluation(self, split: Split) -> DataLoader[Prompt | None]:
        data = PromptDataset(self.prompts(split))
        _no_workers_needed()
        return DataLoader(
            data, batch_size=self.eval_batch_size, sampler=ShardSampler(data), collate_fn=present
        )


def _no_workers_needed() -> None:
    """Silence Lightning's advice to use more workers, which it gives for any loader on many cores.

    A batch of prompts is a few words, once per iteration: workers would only cost memory.
    """
    warnings.filterwarnings("ignore", ".* does not have many workers", PossibleUserWarning)
