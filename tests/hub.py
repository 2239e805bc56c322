"""A model hub on this machine: as much of its interface as the downloads of huggingface_hub use.

``python -m tests.hub ID ...`` is a client of it, for what only a new process can show.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
REVISIONS = ("main", COMMIT)


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    range: str | None


@dataclass(kw_only=True)
class Cut:
    """A file whose connection breaks in the middle."""

    times: int = 1
    """Requests that break; later ones are served."""
    reset: bool = False
    """With an RST, as from a host that crashed, rather than a FIN."""


@dataclass(kw_only=True)
class Repository:
    """What one id stands for."""

    folder: Path
    gated: str = ""
    """``"files"``: listed but not given, as on the hub; ``"all"``: not even listed."""
    cuts: dict[str, Cut] = field(default_factory=dict)
    chunks: dict[str, str] = field(default_factory=dict)
    """Files in hf-xet's storage, and their hashes there."""
    storage: str = ""
    """Where that is."""


class Hub:
    """Repositories behind an address, and what was asked of them.

    Args:
        repositories: by id.
    """

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.status = 200
        """Of every answer: 503 for a hub in trouble."""
        self.requests: list[Request] = []
        self.url = ""

    def asked(self, method: str = "GET") -> list[Request]:
        """Return the requests for the content (``GET``) or the description (``HEAD``) of files."""
        return [r for r in self.requests if r.method == method and "/resolve/" in r.path]

    @property
    def transfers(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [request.path.rpartition("/")[2] for request in self.asked()]


class Server(ThreadingHTTPServer):
    """With room for as many calls at once as the client makes; one that finds none is late by a second."""

    request_queue_size = 64


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run a hub on a port that the system chooses."""
    hub = Hub(repositories)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    # The default of half a second is how long shutdown would take.
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; https://github.com/huggingface/huggingface_hub is the other side."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Print nothing: progress bars are looked for on the same stream."""

    def end_headers(self) -> None:
        # A connection kept open would outlive the hub that it belongs to.
        self.send_header("Connection", "close")
        super().end_headers()

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers["Range"]))
        if self.hub.status != 200:
            return self.refuse(self.hub.status, "")
        listed = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.refuse(404, "RepoNotFound")
        if repository.gated == "all" or (repository.gated == "files" and not listed):
            return self.refuse(403, "GatedRepo")
        if len(rest) > 1 and rest[1] not in REVISIONS:
            return self.refuse(404, "RevisionNotFound")
        if not listed:
            return self.content(repository, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self.json([entry(repository, path) for path in files(repository.folder)])
        if rest[:1] == ["xet-read-token"]:
            return self.token(repository)
        return self.json({"id": f"{owner}/{name}", "sha": COMMIT})

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def json(self, found: object) -> None:
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def token(self, repository: Repository) -> None:
        self.send_response(200)
        self.send_header("X-Xet-Cas-Url", repository.storage)
        self.send_header("X-Xet-Access-Token", "token")
        self.send_header("X-Xet-Token-Expiration", str(2**40))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def content(self, repository: Repository, name: str) -> None:
        path = repository.folder / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        whole = path.read_bytes()
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - start))
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return None
        cut = repository.cuts.get(name)
        if cut is None or cut.times == 0:
            self.wfile.write(whole[start:])
            return None
        cut.times -= 1
        self.wfile.write(whole[start : (start + len(whole)) // 2])
        if cut.reset:
            # Linger for no time at all: closing sends an RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        return None


def files(folder: Path) -> list[str]:
    """Return the paths of a repository's files."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def entry(repository: Repository, path: str) -> dict[str, object]:
    """Describe a file as the listing of a repository does."""
    content = (repository.folder / path).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    found: dict[str, object] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": digest[:40],
    }
    if path.endswith(".safetensors"):
        found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    if path in repository.chunks:
        found["xetHash"] = repository.chunks[path]
    return found


def main(ids: list[str]) -> None:
    """Look for folders as a run does, and print what came of it as JSON."""
    from lightning_unigrpo.adapters.common import hub

    def outcome(name: str) -> str:
        try:
            return str(hub.find_folder(name))
        except OSError as error:
            return f"{type(error).__name__}: {error}"

    early, outcomes = "hf_xet" in sys.modules, [outcome(name) for name in ids]
    from hf_xet import XetConfig

    connections = XetConfig().get("client.ac_max_download_concurrency")
    found = {"early": early, "outcomes": outcomes, "connections": connections}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
