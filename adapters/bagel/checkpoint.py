"""Bagel's published files: found or downloaded, checked before anything heavy, read a tensor at a time.

Layout: ``llm_config.json``, ``vit_config.json``, ``ema.safetensors`` (language model, bridges and vision
tower; one file, or shards with an index), ``ae.safetensors`` (the autoencoder), and a tokenizer's files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.lora import base_name, first_value
from lightning_unigrpo.adapters.bagel.network import sincos_table

WEIGHTS, AUTOENCODER, INDEX = "ema.safetensors", "ae.safetensors", "ema.safetensors.index.json"
LLM, VIT = "llm_config.json", "vit_config.json"
FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.*", "tokenizer*")
VISION = ("vit_model.", "connector.", "vit_pos_embed.")
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Sine tables: read when the file's fits, else left as computed."""
MARKS = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}
"""Special tokens, as :meth:`BagelConfig.from_upstream` names them; ``llm_config.json`` names others."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloaded if ``source`` is a hub id.

    Bytes come through hf-xet where the hub offers them so and the package is there, else through HTTP;
    progress is shown. A connection that closes early is taken up again where it was. After a download that
    broke off or was stopped, files that were whole are kept; one that was cut begins anew, because
    huggingface_hub since 1.18 keeps no parts of files. ``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_ENDPOINT`` and
    ``HF_HUB_DISABLE_PROGRESS_BARS`` are respected. Where the hub gives no answer within
    ``HF_HUB_ETAG_TIMEOUT`` (10 s), the local cache has to do.

    Args:
        source: a folder, or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: when there is no such folder, repository or revision, no way to reach it, or the
            download broke off.
        PermissionError: when the repository asks for an agreement or a token.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.exists():
        raise FileNotFoundError(
            f"adapter.source is {name!r}: neither a folder nor a hub id such as "
            "'ByteDance-Seed/BAGEL-7B-MoT'."
        )
    # More connections and gigabytes of buffers; a user's 0 switches them off. hf_xet reads it once, when
    # it is imported, and huggingface_hub imports it no earlier than its first transfer.
    os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")
    silence = _silence(name, revision)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(FILES),
            local_files_only=silence is not None,
        )
    except Exception as error:
        # All of them: httpx's errors are no OSErrors, hf_xet's are RuntimeErrors.
        raise _explained(error, silence, name, revision) from error
    return Path(folder)


def _silence(name: str, revision: str | None) -> Exception | None:
    """Ask the hub for a repository, and return why there was no answer.

    ``snapshot_download`` asks the same without a time limit: behind a firewall that drops packets it hangs.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        return None  # an answer, too
    except Exception as error:
        return error
    return None


def _explained(
    error: Exception, silence: Exception | None, name: str, revision: str | None
) -> OSError:
    """Return the error that says what to do about a failed download.

    Args:
        error: what ``snapshot_download`` raised.
        silence: why the hub did not answer, if it did not.
        name: hub id.
        revision: as given.
    """
    hub, given = constants.ENDPOINT, f"adapter.source is {name!r}"
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{given}, which is gated: accept its terms at {hub}/{name}, then `hf auth login`."
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return FileNotFoundError(
            f"{given}: there is no such folder here and no such repository at {hub} (a private one needs "
            "`hf auth login`)."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"adapter.revision is {revision!r}: {name} at {hub} has no such branch, tag or commit."
        )
    if not isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{given}: the download from {hub} broke off ({_line(error)}). Start again; files that are whole "
            "are not fetched twice."
        )
    cause = silence or error.__cause__ or error
    reason = (
        "HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE)"
        if isinstance(cause, OfflineModeIsEnabled)
        else f"{hub} cannot be reached ({_line(cause)})"
    )
    at = f" --revision {revision}" if revision else ""
    lacks = "there is no such folder here, it is not in the local cache"
    if isinstance(error, IncompleteSnapshotError):
        files = [file.path for file in get_cached_repo_tree(name, revision=revision)]
        wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in FILES)]
        lost = [file for file in wanted if not Path(error.snapshot_path, file).exists()]
        lacks = f"the local cache lacks {', '.join(lost)}"
    return FileNotFoundError(
        f"{given}: {lacks}, and {reason}. Run `hf download {name}{at}` where there is a network, or give a "
        "folder."
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor is, and its shape, from the header alone."""

    path: Path
    name: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder in the published layout.

    Args:
        folder: where the files are.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = [name for name in (LLM, AUTOENCODER) if not (folder / name).is_file()]
        shards = self._shards()
        if not shards:
            missing.append(WEIGHTS)
        if missing:
            here = sorted(path.name for path in folder.iterdir())[:12]
            raise FileNotFoundError(
                f"adapter.source {folder} is not a Bagel checkpoint: {', '.join(missing)} missing; it holds "
                f"{', '.join(here) or 'nothing'}."
            )
        self.llm_config = read_json(folder / LLM)
        self.vit_config = read_json(folder / VIT) if (folder / VIT).is_file() else None
        self.tensors = {k: v for path in shards for k, v in read_header(path).items()}
        self.autoencoder = read_header(folder / AUTOENCODER)

    def _shards(self) -> list[Path]:
        whole, index = self.folder / WEIGHTS, self.folder / INDEX
        if whole.is_file():
            return [whole]
        if not index.is_file():
            return []
        names = sorted(set(read_json(index)["weight_map"].values()))
        lost = [name for name in names if not (self.folder / name).is_file()]
        if lost:
            raise FileNotFoundError(
                f"adapter.source {self.folder}: {INDEX} names {', '.join(lost)}, missing."
            )
        return [self.folder / name for name in names]

    @property
    def has_vision(self) -> bool:
        """Whether a vision tower is there."""
        return self.vit_config is not None and any(k.startswith(VISION) for k in self.tensors)

    def config(self, marks: Mapping[str, int], *, vision: bool, **overrides: Any) -> BagelConfig:
        """Return the sizes, from the JSON files and the tensors' shapes.

        Upstream keeps some of them in code. Where a tensor shows them, the tensor is believed.

        Args:
            marks: ids of the special tokens, as :data:`MARKS` names them.
            vision: whether to build the vision tower.
            overrides: fields of :class:`BagelConfig` to set instead.
        """
        z = self.autoencoder["decoder.conv_in.weight"].shape[1]
        levels = {
            name.split(".")[2] for name in self.autoencoder if name.startswith("encoder.down.")
        }
        channels = self._shape("vae2llm.weight", 1, 64)
        bagel = {
            "latent_patch_size": math.isqrt(channels // z),
            "max_latent_size": math.isqrt(self._shape(TABLES[0], 0, 64**2)),
            "vit_max_num_patch_per_side": math.isqrt(self._shape(TABLES[1], 0, 70**2)),
        }
        config = BagelConfig.from_upstream(
            llm_config=self.llm_config,
            vit_config=self.vit_config if vision else None,
            bagel_config=bagel,
            vae_config={"z_channels": z, "downsample": 2 ** (len(levels) - 1)},
            special_tokens=marks,
        )
        unknown = overrides.keys() - vars(config).keys()
        if unknown:
            raise ValueError(
                f"adapter.overrides has {', '.join(sorted(unknown))}; known are {', '.join(vars(config))}."
            )
        return BagelConfig(**(vars(config) | overrides))

    def _shape(self, name: str, axis: int, default: int) -> int:
        return self.tensors[name].shape[axis] if name in self.tensors else default

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """Compare names and shapes with what modules expect, before a byte of weights is read.

        Args:
            modules: title to module; together they hold every tensor of the file.

        Raises:
            ValueError: naming what differs.
        """
        expected = {
            name: tuple(value.shape)
            for module in modules.values()
            for name, value in module.state_dict().items()
        }
        found = {name: file.shape for name, file in self.tensors.items()}
        if not any(name.startswith(VISION) for name in expected):
            found = {name: shape for name, shape in found.items() if not name.startswith(VISION)}
        wrong = [
            f"  {name}: {found.get(name, 'missing')} in the file, "
            f"{expected.get(name, 'unknown')} in the model"
            for name in sorted(found.keys() | expected.keys())
            if name not in TABLES and not self._agree(name, found.get(name), expected.get(name))
        ]
        if wrong:
            more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(
                f"adapter.source {self.folder} holds another model; {len(wrong)} tensors differ:\n"
                + "\n".join(wrong[:8])
                + more
                + "\nSizes come from llm_config.json and vit_config.json; adapter.overrides changes them."
            )

    def _agree(
        self, name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None
    ) -> bool:
        if found is not None and expected is not None and name.endswith("patch_embedding.weight"):
            return math.prod(found) == math.prod(expected)  # as a convolution or flat
        return found == expected

    def fill(self, part: nn.Module, *, prefix: str = "", device: torch.device) -> None:
        """Replace what is on the meta device, one tensor in memory at a time; each keeps its dtype.

        Args:
            part: of a module with names as in the file.
            prefix: of its names there.
            device: of the tensors afterwards.
        """
        lacking = {name: p for name, p in part.named_parameters() if p.is_meta}
        wanted = {
            name: self.tensors[file]
            for name, p in lacking.items()
            if (file := base_name(prefix + name)) in self.tensors
            and (file not in TABLES or tuple(p.shape) == self.tensors[file].shape)
        }
        for name, tensor in read_tensors(wanted):
            value = flat_patch(tensor) if name.endswith("patch_embedding.weight") else tensor
            _set(part, name, value, device)
        for name in lacking.keys() - wanted.keys():
            whole = prefix + name
            if whole in TABLES:
                rows, size = lacking[name].shape
                value = sincos_table(math.isqrt(rows), size)
            else:
                value = first_value(whole, lacking[name])
            _set(part, name, value, device)

    def fill_autoencoder(self, vae: nn.Module, names: Mapping[str, str]) -> None:
        """Read the autoencoder in float32, under diffusers' names.

        Raises:
            ValueError: when the file holds another model.
        """
        expected = vae.state_dict()
        state = {
            names[name]: tensor.to(torch.float32, copy=True)
            for name, tensor in read_tensors(self.autoencoder)
        }
        for name, value in state.items():
            if name in expected and value.numel() == expected[name].numel():
                state[name] = value.reshape(
                    expected[name].shape
                )  # 1x1 convolutions as linear layers
        wrong = [
            name
            for name in sorted(state.keys() | expected.keys())
            if name not in state
            or name not in expected
            or state[name].shape != expected[name].shape
        ]
        if wrong:
            raise ValueError(
                f"{self.folder / AUTOENCODER} is not the autoencoder of FLUX.1's shape: {len(wrong)} tensors "
                f"differ, {', '.join(wrong[:4])} ..."
            )
        vae.load_state_dict(state, assign=True)


def _set(module: nn.Module, name: str, value: Tensor, device: torch.device) -> None:
    path, _, leaf = name.rpartition(".")
    old = module.get_parameter(name)
    # A copy even where nothing changes: the original is a page of the file.
    value = value.to(device=device, dtype=old.dtype, copy=True).contiguous()
    setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def flat_patch(weight: Tensor) -> Tensor:
    """Return a patch embedding as a linear weight; a convolution's ``[d, C, p, p]`` is permuted."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: when it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return found


def read_header(path: Path) -> dict[str, TensorFile]:
    """Return names and shapes without reading tensors.

    Raises:
        ValueError: when the file is truncated or no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {
                name: TensorFile(path, name, tuple(file.get_slice(name).get_shape()))
                for name in names
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it is truncated or not a safetensors file: download it again."
        ) from error


def read_tensors(files: Mapping[str, TensorFile]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors under the names of the mapping; pages stay in memory until the next one only.

    Each is a view of the mapped file: a file that stayed open would come to hold all of it.
    """
    for name, tensor in files.items():
        with safe_open(tensor.path, "pt") as file:
            yield name, file.get_tensor(tensor.name)


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy files that training does not change."""
    for name in names:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            shutil.copyfile(source / name, target / name)
