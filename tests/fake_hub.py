"""What a hub answers to `huggingface_hub` and `datasets`: one data set in two commits, on loopback."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

COMMITS = {"1" * 40: "first", "2" * 40: "second"}


class Hub(BaseHTTPRequestHandler):
    """`main` is whatever commit the file at `head` names; every commit's one file says which it is."""

    head: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        head = self.head.read_text().strip()
        revision = next((one for one in (*COMMITS, "main") if f"/{one}" in path), "main")
        commit = head if revision == "main" else revision
        text = "".join(f'{{"text": "{COMMITS[commit]} {number}"}}\n' for number in range(4)).encode()
        if "/resolve/" in path:
            found = text if path.endswith("train.jsonl") else None
        elif "/tree/" in path or "/paths-info/" in path:
            found = json.dumps(
                [{"type": "file", "oid": commit, "size": len(text), "path": "train.jsonl"}]
            ).encode()
        elif path.startswith("/api/datasets/owner/name"):
            found = json.dumps(
                {"id": "owner/name", "sha": commit, "private": False, "disabled": False, "downloads": 0,
                 "tags": [], "siblings": [{"rfilename": "train.jsonl"}]}
            ).encode()  # fmt: skip
        else:
            found = None
        self.send_response(404 if found is None else 200)
        if found is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{commit}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(found or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(found or b"")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    Hub.head = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
