"""A stand-in of the Hub on this computer: its HTTP interface as far as models are pushed to it and loaded from it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "1" * 40


class Hub(ThreadingHTTPServer):
    """Repositories that can be created, committed to and read; `files[repository]` holds {name: content}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing is printed."""

    def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.server.files.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path):
            self._preupload(body) if found[2] == "preupload" else self._commit(found[1], body)
        else:
            self._answer(404)

    def _preupload(self, body: bytes) -> None:
        files = [file["path"] for file in json.loads(body)["files"]]
        self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]})

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            change = json.loads(line)
            if change["key"] == "file":
                content = base64.b64decode(change["value"]["content"])
                self.server.files[name][change["value"]["path"]] = content
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self) -> None:
        found = re.fullmatch(r"/(.+?)/resolve/(?:main|" + COMMIT + ")/(.+)", self.path)
        content = self.server.files.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self._answer(200, content, ETag=f'"{hash(content):x}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET
