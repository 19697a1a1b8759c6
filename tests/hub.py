"""A hub on this machine: as much of its API as huggingface_hub uses to make, fill and read a repository of a model."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Repo:
    """Attributes:
    commits: what files held at each, by its name.
    branches: the commit that each ends in.
    """

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> str | None:
        """The commit that a branch or a commit's name means."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """Attributes:
    token: what a client must send, or nothing.
    large: stored files by their digest, as git-lfs has them.
    asked: requests so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.token = ""
        self.address = ""

    def settings(self, home: Path) -> dict[str, str]:
        """The environment of a process whose hub this is, with what it fetches kept in ``home``."""
        keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_TOKEN": "hf_ours"}
        return {**keep, **ours, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _oid(data: bytes) -> str:
    """A file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, code: int, body: Any = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def allowed(self) -> bool:
            return not state.token or self.headers.get("Authorization") == f"Bearer {state.token}"

        def do_POST(self) -> None:
            data, path = self.body(), self.path
            state.asked.append(f"POST {path}")
            if not self.allowed():
                return self.answer(401, {"error": "Invalid credentials in Authorization header"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                told = json.loads(data)
                name = f"{told.get('organization') or 'me'}/{told['name']}"
                known = name in state.repos
                if not known:
                    state.repos[name] = Repo(bool(told.get("private")) or told.get("visibility") == "private")
                return self.answer(409 if known else 200, {"url": f"{state.address}/{name}", "name": name})
            if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                objects = [
                    {**own, "actions": {"upload": {"href": f"{state.address}/large/{own['oid']}"}}}
                    for own in json.loads(data)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/json")
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                repo = state.repos[found[1]]
                branch = unquote(found[2])
                if branch in repo.branches:
                    return self.answer(409, {"error": "Reference already exists"})
                repo.branches[branch] = repo.branches["main"]
                return self.answer(201, b"")
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                files = [
                    {"path": own["path"], "uploadMode": "lfs" if own["path"].endswith(".safetensors") else "regular"}
                    for own in json.loads(data)["files"]
                ]
                return self.answer(200, {"files": [{**own, "shouldIgnore": False, "oid": None} for own in files]})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^?]+)(\?.*)?", path):
                repo, branch = state.repos[found[1]], unquote(found[2])
                files = dict(repo.commits[repo.branches[branch]])
                for line in data.splitlines():
                    part = json.loads(line)
                    value = part["value"]
                    if part["key"] == "header":
                        repo.messages.append(value["summary"])
                    elif part["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif part["key"] == "lfsFile":
                        files[value["path"]] = state.large[value["oid"]]
                name = hashlib.sha1(f"{found[1]}{branch}{len(repo.commits)}".encode()).hexdigest()
                repo.commits[name], repo.branches[branch] = files, name
                url = f"{state.address}/{found[1]}/commit/{name}"
                return self.answer(200, {"success": True, "commitOid": name, "commitUrl": url, "hookOutput": ""})
            return self.answer(404, {"error": f"no {path}"})

        def do_PUT(self) -> None:
            data, oid = self.body(), self.path.rsplit("/", 1)[-1]
            assert hashlib.sha256(data).hexdigest() == oid
            state.large[oid] = data
            self.answer(200)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            state.asked.append(f"{self.command} {path}")
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = found or file
            repo = state.repos.get(match[1]) if match else None
            if match is None or repo is None or (repo.private and not self.allowed()):
                return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            commit = repo.at(unquote(match[2] or "main"))
            if commit is None:
                return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            files = repo.commits[commit]
            if "/tree/" in path:
                told = [
                    {"type": "file", "path": name, "size": len(own), "oid": _oid(own)} for name, own in files.items()
                ]
                return self.answer(200, told)
            if file is None:
                told = {"id": match[1], "sha": commit, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
                return self.answer(200, told | {"siblings": [{"rfilename": name} for name in files]})
            if (data := files.get(unquote(file[3]))) is None:
                return self.answer(
                    404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit
                )
            digest = hashlib.sha256(data).hexdigest()
            return self.answer(
                200, data, ETag=f'"{digest}"', X_Repo_Commit=commit, Content_Type="application/octet-stream"
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
