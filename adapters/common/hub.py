"""Find a checkpoint: a folder, or a hub id that is downloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

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

FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.*", "tokenizer*")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
CONFIG, LANGUAGE_CONFIG = "config.json", "llm_config.json"
"""``LANGUAGE_CONFIG`` is the language model's config.json in a folder that holds both models'."""


def find_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    example: str = "ByteDance-Seed/BAGEL-7B-MoT",
    key: str = "adapter.source",
    files: Sequence[str] = FILES,
) -> Path:
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
        example: a hub id for the message.
        key: the setting that names ``source``, for the message.
        files: patterns of what is downloaded.

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
            f"{key} is {name!r}: neither a folder nor a hub id such as {example!r}."
        )
    # More connections and gigabytes of buffers; a user's 0 switches them off. hf_xet reads it once, when
    # it is imported, and huggingface_hub imports it no earlier than its first transfer.
    os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")
    silence = _silence(name, revision)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(files),
            local_files_only=silence is not None,
        )
    except Exception as error:
        # All of them: httpx's errors are no OSErrors, hf_xet's are RuntimeErrors.
        raise _explained(error, silence, name, revision, key, files) from error
    return Path(folder)


def find_language(
    folder: Path,
    found: Mapping[str, Any],
    language: str | Path | None,
    *,
    revision: str | None,
    example: str,
) -> tuple[Path, Path]:
    """Return where the tokenizer is, and the file with the sizes, of the language model of a checkpoint.

    Args:
        folder: of the checkpoint; it may hold both.
        found: its ``config.json``, which may name the language model.
        language: folder or hub id; ``None`` = where the checkpoint says.
        revision: of a hub id.
        example: a hub id for the message.

    Raises:
        FileNotFoundError: when files are missing.
        ValueError: when nobody says which language model it is.
    """
    if language is None and (folder / LANGUAGE_CONFIG).is_file():
        return folder, folder / LANGUAGE_CONFIG
    named = language or found.get("llm_model_path")
    if not named:
        raise ValueError(
            f"{folder / CONFIG} has no llm_model_path; give adapter.language the model that the checkpoint "
            f"was built from, such as {example!r}."
        )
    words = find_folder(
        named,
        revision=revision,
        example=example,
        key="adapter.language",
        files=(CONFIG, *TOKENIZER),
    )
    if not (words / CONFIG).is_file():
        raise FileNotFoundError(f"adapter.language {words} has no {CONFIG}.")
    return words, words / CONFIG


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
    error: Exception,
    silence: Exception | None,
    name: str,
    revision: str | None,
    key: str,
    patterns: Sequence[str],
) -> OSError:
    """Return the error that says what to do about a failed download.

    Args:
        error: what ``snapshot_download`` raised.
        silence: why the hub did not answer, if it did not.
        name: hub id.
        revision: as given.
        key: the setting that holds ``name``.
        patterns: of what was to be downloaded.
    """
    hub, given = constants.ENDPOINT, f"{key} is {name!r}"
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
        setting = "adapter.revision" if key == "adapter.source" else f"{key}_revision"
        return FileNotFoundError(
            f"{setting} is {revision!r}: {name} at {hub} has no such branch, tag or commit."
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
        wanted = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
        lost = [file for file in wanted if not Path(error.snapshot_path, file).exists()]
        lacks = f"the local cache lacks {', '.join(lost)}"
    return FileNotFoundError(
        f"{given}: {lacks}, and {reason}. Run `hf download {name}{at}` where there is a network, or give a "
        "folder."
    )


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
