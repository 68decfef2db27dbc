"""A hub on this machine with one dataset: as much of its interface as `datasets` asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

REPOSITORY = "owner/name"
_COMMIT = "0" * 40


@contextmanager
def loopback_hub(files: dict[str, bytes]) -> Iterator[str]:
    """Serve the files of a dataset and give the address, for ``HF_ENDPOINT``."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self.wfile.write(self._answer())

        def _answer(self) -> bytes:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path.startswith(f"/api/datasets/{REPOSITORY}/tree"):
                entries = [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()]
                return self._send(json.dumps(entries).encode())
            if path.startswith(f"/api/datasets/{REPOSITORY}"):
                siblings = [{"rfilename": name} for name in files]
                return self._send(json.dumps({"id": REPOSITORY, "sha": _COMMIT, "siblings": siblings}).encode())
            if path.startswith(f"/datasets/{REPOSITORY}/resolve/") and name in files:
                return self._send(files[name], ETag=f'"{_oid(files[name])}"')
            return self._send(b"", 404, **{"X-Error-Code": "EntryNotFound"})

        def _send(self, content: bytes, status: int = 200, **headers: str) -> bytes:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), "X-Repo-Commit": _COMMIT, **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            return content

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
