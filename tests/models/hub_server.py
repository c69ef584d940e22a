"""A stand-in for the Hugging Face hub on this machine, which the real client talks to."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants


class LocalHub:
    """Repositories in memory: the files of each branch or commit, by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.gated: set[str] = set()

    def add(self, name: str, folder: Path) -> None:
        """Put the files of a folder on the main branch of a repository."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repositories.setdefault(name, {})["main"] = files

    def commit_of(self, name: str, revision: str) -> str | None:
        """Return the hash of the newest commit of a revision; None if there is none."""
        branches = self.repositories[name]
        files = branches.get(revision)
        if files is None:
            return None
        if len(revision) == 40:
            return revision
        parts = [f"{file} {hashlib.sha1(content).hexdigest()}" for file, content in sorted(files.items())]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        branches[commit] = files
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        self._resolve(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"POST {self.path}")
        match self.path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                given = json.loads(body)
                owner = given.get("organization") or "user"
                name = f"{owner}/{given['name']}"
                self.hub.repositories.setdefault(name, {}).setdefault("main", {})
                self.hub.private.setdefault(name, given.get("private") is True or given.get("visibility") == "private")
                self._answer({"url": f"http://{self.headers['Host']}/{name}"})
            case ["api", "models", owner, name, "branch", branch]:
                branches = self.hub.repositories[f"{owner}/{name}"]
                branches.setdefault(branch, dict(branches["main"]))
                self._answer({})
            case ["api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                self._answer({"files": modes})
            case ["api", "models", owner, name, "commit", branch]:
                self._commit(f"{owner}/{name}", branch, body)
            case _:
                self._answer({"error": "unknown"}, status=404)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        files = self.hub.repositories[name].setdefault(branch, {})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        commit = self.hub.commit_of(name, branch)
        url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
        self._answer({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _resolve(self, *, with_body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        match self.path.strip("/").split("/"):
            case ["api", "models", owner, name, *rest]:
                self._send_info(f"{owner}/{name}", rest[1] if rest else "main")
            case [owner, name, "resolve", revision, file]:
                self._send_file(f"{owner}/{name}", revision, file, with_body=with_body)
            case _:
                self._answer({"error": "unknown"}, status=404)

    def _send_info(self, name: str, revision: str) -> None:
        commit = self.hub.commit_of(name, revision) if name in self.hub.repositories else None
        if commit is None:
            is_known = name in self.hub.repositories
            error = "RevisionNotFound" if is_known else "RepoNotFound"
            return self._answer({}, status=404 if is_known else 401, error=error)
        siblings = [{"rfilename": file} for file in self.hub.repositories[name][revision]]
        return self._answer({"id": name, "sha": commit, "siblings": siblings, "private": False})

    def _send_file(self, name: str, revision: str, file: str, *, with_body: bool) -> None:
        if name not in self.hub.repositories:
            return self._answer({}, status=401, error="RepoNotFound")
        if name in self.hub.gated:
            return self._answer({}, status=403, error="GatedRepo")
        commit = self.hub.commit_of(name, revision)
        if commit is None:
            return self._answer({}, status=404, error="RevisionNotFound")
        content = self.hub.repositories[name][revision].get(file)
        if content is None:
            return self._answer({}, status=404, error="EntryNotFound", commit=commit)
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)
        return None

    def _answer(self, content: Any, *, status: int = 200, error: str | None = None, commit: str | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if error is not None:
            self.send_header("X-Error-Code", error)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[LocalHub]:
    """Run a stand-in for the hub, which `huggingface_hub` uses until the end; nothing goes to another address."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
