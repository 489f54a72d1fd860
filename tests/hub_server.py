"""A model hub on this machine, for tests: the real client is pointed at it and asks over HTTP.

It answers what huggingface_hub and datasets ask for listing, metadata and files (refs, revision,
tree, resolve) with the headers and error codes of the hub, from files that a test puts there.
Weights are "large files", known by sha256; others by git blob id. Nothing is ever written to disk.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

LARGE = (".safetensors", ".bin")


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def tensors(seed: int, dtype: str = "float32", names: str = "abcd") -> dict[str, np.ndarray]:
    """Random tensors, (8, 16) each, so that a file has half a kilobyte of each."""
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(8, 16)).astype(dtype) for name in names}


def whole(weights: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Weights in one file."""
    return {"model.safetensors": save(dict(weights))}


def parts(weights: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The same in two files with an index, as save_pretrained writes them."""
    names = sorted(weights)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
        "weight_map": {name: file for file, held in halves.items() for name in held},
    }
    files = {file: save({name: weights[name] for name in held}) for file, held in halves.items()}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


class Hub:
    """``with Hub() as hub``: a server at ``hub.address``.

    ``put`` makes or moves a branch. ``gated`` and ``busy`` say which repositories ask for a token
    (any but hf_expired) and how many requests are answered 429 first. ``asked`` are the requests so
    far, as (method, path, range header), and ``tokens`` the tokens that came with them.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, str]] = {}  # repository: branch: commit
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, commit): files
        self.gated: set[str] = set()
        self.busy = 0
        self.asked: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()

    def put(self, repo: str, branch: str, files: Mapping[str, bytes], message: str = "") -> str:
        """The commit that ``branch`` is at now."""
        lines = [f"{branch} {message}", *(f"{n} {sha256(files[n])}" for n in sorted(files))]
        commit = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        self.commits[repo, commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def environment(self, home: os.PathLike[str] | str) -> dict[str, str]:
        """What a user sets to work with this hub, in a process that knows no other."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_ENDPOINT": self.address, "HF_HOME": str(home)}

    def asked_for_models(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Point the client of this process here: it reads the environment when imported."""
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", self.address)
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.delenv("HF_TOKEN", raising=False)

    def asked_by_this_process(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """The same for models and for text: to import datasets takes half a second."""
        import datasets
        from huggingface_hub import HfFileSystem

        self.asked_for_models(patch, cache)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_ENDPOINT", self.address)
        HfFileSystem.clear_instance_cache()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
        self.server.hub = self  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        split = urlsplit(self.path)
        path, query = split.path, parse_qs(split.query)
        self.hub.asked.append((self.command, unquote(path), self.headers.get("range")))
        self.hub.tokens.add(self.headers.get("authorization"))
        if self.hub.busy > 0:
            self.hub.busy -= 1
            return self._error(429, "", {"ratelimit": '"api";r=0;t=0'})
        asks = "refs|revision|tree|auth-check"
        api = re.fullmatch(rf"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/({asks})(/.*)?)?", path)
        resolve = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api is None and resolve is None:
            return self._error(404, "")
        repo = (api or resolve)[1]
        if repo not in self.hub.branches:
            return self._error(404, "RepoNotFound")
        if self.headers.get("authorization") == "Bearer hf_expired":
            told = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._error(401, "", told)
        if repo in self.hub.gated and self.headers.get("authorization") is None:
            return self._error(401, "GatedRepo")
        if resolve is not None:
            return self._file(repo, unquote(resolve[2]), unquote(resolve[3]))
        if api[2] == "refs":
            return self._json(self._refs(repo))
        if api[2] == "auth-check":
            return self._json({})
        revision, _, folder = (api[3] or "/main")[1:].partition("/")
        commit = self._commit(repo, unquote(revision))
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = self.hub.commits[repo, commit]
        if api[2] == "tree":
            inside = [n for n in sorted(files) if not folder or n.startswith(f"{unquote(folder)}/")]
            if folder and not inside:
                return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            told = [self._described(n, files[n], "path", "oid") for n in inside]
            if path.startswith("/api/datasets/"):
                told = self._level(told, unquote(folder), query.get("recursive") == ["True"])
            return self._json(told)
        siblings = [{"rfilename": name} for name in sorted(files)]
        if "blobs" in query:
            siblings = [self._described(n, files[n], "rfilename", "blobId") for n in sorted(files)]
        return self._json({"id": repo, "sha": commit, "siblings": siblings})

    do_HEAD = do_GET

    def _commit(self, repo: str, revision: str) -> str | None:
        commit = self.hub.branches[repo].get(revision, revision)
        return commit if (repo, commit) in self.hub.commits else None

    def _refs(self, repo: str) -> dict[str, object]:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in self.hub.branches[repo].items()
        ]
        return {"branches": branches, "converts": [], "tags": []}

    def _level(
        self, files: list[dict[str, object]], folder: str, recursive: bool
    ) -> list[dict[str, object]]:
        """What of a tree is asked for: with its folders, and unless recursive what is in one."""
        depth = len(PurePosixPath(folder).parts)
        parents = [p for file in files for p in PurePosixPath(str(file["path"])).parents]
        folders = sorted({str(p) for p in parents if len(p.parts) > depth})
        found = [{"type": "directory", "path": p, "oid": git_blob(p.encode())} for p in folders]
        every = [*found, *files]
        kept = [f for f in every if len(PurePosixPath(str(f["path"])).parts) == depth + 1]
        return every if recursive else kept

    def _described(self, name: str, content: bytes, called: str, blob: str) -> dict[str, object]:
        told: dict[str, object] = {"type": "file", called: name, "size": len(content)}
        told[blob] = git_blob(content)
        if PurePosixPath(name).suffix in LARGE:
            hashed = {"sha256": sha256(content), "oid": sha256(content)}
            told["lfs"] = {"size": len(content), "pointerSize": 134, **hashed}
        return told

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        content = self.hub.commits[repo, commit].get(name)
        if content is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        large = PurePosixPath(name).suffix in LARGE
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{sha256(content) if large else git_blob(content)}"',
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if asked is None:
            return self._send(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self._error(416, "", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Code": code} if code else {}
        self._send(status, b'{"error": "refused"}', told | dict(headers or {}))

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass
