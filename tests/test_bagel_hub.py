"""Checkpoints from a hub: what is fetched, what is kept, and what is said when it fails.

The hub is :mod:`tests.hub`, on this machine; the client is the installed huggingface_hub.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_unigrpo.adapters.bagel import BagelAdapter
from lightning_unigrpo.adapters.common.hub import find_folder
from tests.hub import COMMIT, Cut, Hub, Repository, files, serve
from tests.published import write_checkpoint
from tests.test_bagel_checkpoint import load, outputs

NAME, SHARDED = "someone/bagel", "someone/sharded"
FOREIGN = {"README.md": 10_000, "assets/teaser.webp": 1_000_000, "ema.pt": 1_000_000}
"""Of the hub's repository, not of the checkpoint; bytes."""
SHARD = "ema-00002-of-00003.safetensors"
WEIGHTS = "ema.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the same checkpoint in one file and in three, with files that nobody needs."""
    found = {}
    for name, shards in ((NAME, 1), (SHARDED, 3)):
        found[name] = write_checkpoint(tmp_path_factory.mktemp("published"), shards=shards)
        for file, size in FOREIGN.items():
            (found[name] / file).parent.mkdir(exist_ok=True)
            (found[name] / file).write_bytes(bytes(size))
    return found


@pytest.fixture
def hub(folders: dict[str, Path]) -> Iterator[Hub]:
    with serve({name: Repository(folder=folder) for name, folder in folders.items()}) as hub:
        yield hub


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Give a function that points the client at an address, with a cache of this test's own.

    The environment is read when huggingface_hub is imported; the tests of new processes show it.
    """
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "0")  # or find_folder would leave its own

    def connect(url: str, *, cache: Path = tmp_path / "cache", offline: bool = False) -> None:
        constants = {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": offline,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)

    return connect


def from_hub(name: str) -> BagelAdapter:
    adapter = BagelAdapter.from_pretrained(name)
    adapter.materialize()
    return adapter.eval()


def needed(folder: Path) -> list[str]:
    return [name for name in files(folder) if name not in FOREIGN]


@pytest.fixture
def closed() -> str:
    """Give an address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """Give an address that takes a call and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        end = threading.Timer(20, server.close)  # a client that waits for ever fails all the same
        end.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        end.cancel()


# ---- what is fetched


@pytest.mark.parametrize("name", [NAME, SHARDED])
def test_a_hub_id_is_as_good_as_a_folder(
    hub: Hub, connect: Callable[..., None], folders: dict[str, Path], name: str
) -> None:
    connect(hub.url)
    adapter, expected = from_hub(name), load(folders[NAME])
    for a, b in zip(outputs(adapter), outputs(expected), strict=True):
        assert torch.equal(a, b)
    assert sorted(hub.transfers) == needed(folders[name])  # each once, and nothing else
    assert all(request.range is None for request in hub.asked())
    hub.requests.clear()
    assert adapter.source is not None
    assert adapter.source.checkpoint is not None
    assert find_folder(name) == adapter.source.checkpoint.folder
    assert not hub.asked("GET")
    assert not hub.asked("HEAD")


@pytest.mark.parametrize("how", ["offline", "closed", "silent"])
def test_the_cache_is_enough(
    hub: Hub,
    connect: Callable[..., None],
    closed: str,
    silent: str,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    connect(hub.url)
    folder = find_folder(SHARDED)
    assert find_folder(SHARDED, revision=COMMIT) == folder
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    connect({"offline": hub.url, "closed": closed, "silent": silent}[how], offline=how == "offline")
    for revision in (None, COMMIT):
        assert find_folder(SHARDED, revision=revision) == folder
    assert not hub.requests
    from_hub(SHARDED)


def test_progress_is_shown(
    hub: Hub,
    connect: Callable[..., None],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    connect(hub.url)
    find_folder(NAME)
    shown = capsys.readouterr().err
    number = len(needed(folders[NAME]))
    assert re.search(rf"Fetching {number} files: 100%\S* {number}/{number}", shown), shown
    connect(hub.url, cache=tmp_path / "other")
    # By path it would be the class of the same name.
    monkeypatch.setattr(
        sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True
    )
    find_folder(NAME)
    assert capsys.readouterr().err == ""


# ---- connections that break


def test_a_connection_that_closes_early_is_taken_up_where_it_was(
    hub: Hub,
    connect: Callable[..., None],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect(hub.url)
    chunk = 1 << 16
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", chunk)  # else 10 MB
    hub.repositories[NAME].cuts[WEIGHTS] = Cut()
    folder = find_folder(NAME)
    source = folders[NAME] / WEIGHTS
    assert (folder / WEIGHTS).read_bytes() == source.read_bytes()
    ranges = [request.range for request in hub.asked() if request.path.endswith(f"/{WEIGHTS}")]
    # The half that was sent, in whole chunks.
    assert ranges == [None, f"bytes={source.stat().st_size // 2 // chunk * chunk}-"]


def test_a_download_that_broke_off_keeps_whole_files(
    hub: Hub, connect: Callable[..., None], folders: dict[str, Path]
) -> None:
    connect(hub.url)
    hub.repositories[SHARDED].cuts[SHARD] = Cut(reset=True)
    with pytest.raises(
        FileNotFoundError, match=r"'someone/sharded'.* broke off \(ReadError"
    ) as error:
        BagelAdapter.from_pretrained(SHARDED)
    assert "Start again" in str(error.value)
    from_hub(SHARDED)
    counts = Counter(hub.transfers)
    assert counts.pop(SHARD) == 2
    assert dict(counts) == dict.fromkeys(set(needed(folders[SHARDED])) - {SHARD}, 1)
    # What find_folder says of the file that was cut; huggingface_hub up to 1.17 asked for the rest only.
    assert all(request.range is None for request in hub.asked())


# ---- hubs that refuse


def refused(error: type[OSError], say: str, name: str = NAME, revision: str | None = None) -> str:
    """Check what is said, and that it takes no time."""
    start = time.monotonic()
    with pytest.raises(error, match=say) as found:
        BagelAdapter.from_pretrained(name, revision=revision)
    assert time.monotonic() - start < 10  # a refusal takes milliseconds; machines are busy
    return str(found.value)


def test_an_unknown_repository(hub: Hub, connect: Callable[..., None]) -> None:
    connect(hub.url)
    said = refused(FileNotFoundError, "'someone/else': there is no such folder", "someone/else")
    assert "hf auth login" in said
    refused(FileNotFoundError, "no such repository", "someone/b gel")  # no id at all
    assert not hub.asked("HEAD")


def test_an_unknown_revision(hub: Hub, connect: Callable[..., None]) -> None:
    connect(hub.url)
    for revision in ("v2", "0" * 40):
        refused(FileNotFoundError, f"adapter.revision is '{revision}'", revision=revision)
    assert not hub.asked("HEAD")


@pytest.mark.parametrize("gated", ["files", "all"])
def test_a_gated_repository(hub: Hub, connect: Callable[..., None], gated: str) -> None:
    connect(hub.url)
    hub.repositories[NAME].gated = gated
    refused(
        PermissionError, re.escape(f"accept its terms at {hub.url}/{NAME}, then `hf auth login`")
    )
    assert not hub.transfers


def test_a_hub_in_trouble(hub: Hub, connect: Callable[..., None]) -> None:
    connect(hub.url)
    hub.status = 503
    refused(
        FileNotFoundError,
        r"not in the local cache, and http.* cannot be reached \(HfHubHTTPError: .*503",
    )


def test_mistakes_are_found_before_a_hub_is_asked(hub: Hub, connect: Callable[..., None]) -> None:
    connect(hub.url)
    with pytest.raises(ValueError, match=r"adapter\.dtype is 'int4'"):
        BagelAdapter.from_pretrained(NAME, dtype="int4")
    assert not hub.requests


# ---- no hub


def test_nobody_listens(connect: Callable[..., None], closed: str) -> None:
    connect(closed)
    said = refused(FileNotFoundError, re.escape(f"{closed} cannot be reached (ConnectError"))
    assert "`hf download someone/bagel` where there is a network" in said


def test_nobody_answers(
    connect: Callable[..., None], silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall that drops packets: ``snapshot_download`` alone would wait for ever."""
    connect(silent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    refused(FileNotFoundError, re.escape(f"{silent} cannot be reached (ReadTimeout"))


def test_no_network(hub: Hub, connect: Callable[..., None]) -> None:
    """A hub id without a cache: named at once, with the command that helps."""
    connect(hub.url, offline=True)
    said = refused(FileNotFoundError, "HF_HUB_OFFLINE is set", revision="v2")
    assert "`hf download someone/bagel --revision v2`" in said
    assert not hub.requests


@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_without_a_shard(
    hub: Hub, connect: Callable[..., None], closed: str, offline: bool
) -> None:
    connect(hub.url)
    (find_folder(SHARDED) / SHARD).unlink()
    connect(closed, offline=offline)
    why = "HF_HUB_OFFLINE is set" if offline else f"{closed} cannot be reached"
    refused(FileNotFoundError, f"the local cache lacks {SHARD}, and {why}", SHARDED)


def test_a_cache_without_a_shard_or_a_listing(
    hub: Hub, connect: Callable[..., None], tmp_path: Path
) -> None:
    """As other programs leave it that fetch file by file."""
    connect(hub.url)
    folder = find_folder(SHARDED)
    cache = tmp_path / "copy"
    shutil.copytree(tmp_path / "cache", cache, symlinks=True)
    shutil.rmtree(next(cache.glob("models--*")) / "trees")
    (cache / folder.relative_to(tmp_path / "cache") / SHARD).unlink()
    connect(hub.url, cache=cache, offline=True)
    refused(FileNotFoundError, f"names {SHARD}, missing", SHARDED)


# ---- new processes: the environment, and the fast path

PUBLISH = """
import json, sys
from hf_xet import XetSession
with XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    sent = {path: commit.start_upload_file(path) for path in sys.argv[2:]}
print(json.dumps({path: file.result().xet_info.hash for path, file in sent.items()}))
"""
"""Puts files into a storage of hf-xet's that is a folder."""


def python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, *command],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("hf_xet"), reason="the hub installs hf-xet on common CPUs only")
def test_the_fast_path(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights come through hf-xet, in its fast mode; its errors are explained, too; then offline."""
    home = {"HF_HOME": str(tmp_path / "home")}
    storage = f"local://{tmp_path}/storage"
    weights = [str(folders[NAME] / name) for name in (WEIGHTS, "ae.safetensors")]
    hashes = json.loads(python("-c", PUBLISH, storage, *weights, **home).stdout)
    chunks = {Path(path).name: value for path, value in hashes.items()}
    for name, where in ((NAME, storage), ("someone/lost", f"local://{tmp_path}/nothing")):
        hub.repositories[name] = Repository(folder=folders[NAME], chunks=chunks, storage=where)

    online = {"HF_ENDPOINT": hub.url, **home}
    result = python("-m", "tests.hub", "someone/lost", NAME, **online)
    found = json.loads(result.stdout)
    lost, folder = found["outcomes"]
    assert re.match(r"FileNotFoundError: .*'someone/lost'.* broke off \(RuntimeError", lost)
    for name in needed(folders[NAME]):
        assert Path(folder, name).read_bytes() == (folders[NAME] / name).read_bytes()
    assert load_file(Path(folder, WEIGHTS))
    assert not set(hub.transfers) & set(chunks)
    assert not found["early"]  # else the mode would have been read before it was set
    plain = 'import hf_xet; print(hf_xet.XetConfig().get("client.ac_max_download_concurrency"))'
    modes = [int(python("-c", plain, HF_XET_HIGH_PERFORMANCE=mode, **home).stdout) for mode in "10"]
    assert found["connections"] == modes[0] > modes[1]
    assert "Fetching" in result.stderr

    hub.requests.clear()
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_XET_HIGH_PERFORMANCE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    result = python("-m", "tests.hub", NAME, "someone/else", **online, **quiet)
    found = json.loads(result.stdout)
    assert found["outcomes"][0] == folder
    assert "HF_HUB_OFFLINE is set" in found["outcomes"][1]
    assert found["connections"] == modes[1]
    assert not hub.requests
    assert result.stderr == ""
