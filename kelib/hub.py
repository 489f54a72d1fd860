"""Questions to the model hub, through its own client: revisions, metadata, headers. No torch.

The client finds the hub, a token and its cache as it always does (``HF_ENDPOINT``, ``HF_TOKEN`` or
``hf auth login``, ``HF_HOME``, ``HF_HUB_OFFLINE``). No weights are fetched: the metadata give their
sizes and hashes, and a range request gives the header of a safetensors file. Refusals say what to
do, and show neither a token nor an address.
"""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from kelib.errors import KelibError, listing
from kelib.parsing import one_line

Answer = TypeVar("Answer")
ATTEMPTS = 6
LONGEST_WAIT = 300.0  # seconds: the hub counts requests over five minutes
BUSY = (429, 500, 502, 503, 504)  # HTTP states that pass
# what refusals call a kind of repository, the list of known ones, and the way to another commit
_CALLED = {"model": "model", "dataset": "data set"}
_LISTED = {"model": "the catalogue", "dataset": "data/hub_sources.yaml"}
_PINNED = {
    "model": "lock of revisions and run the audit again",
    "dataset": "lock of hub sources, data/hub_sources.lock.yaml, and read it again",
}


class Unreachable(KelibError):
    """The hub cannot be asked, for there is no network or ``HF_HUB_OFFLINE`` is set."""


@dataclass(frozen=True)
class HubFile:
    """A file of a commit: size in bytes; ``sha`` is the sha256 of a large file, as weights are, and
    the git blob id of a small one."""

    name: str
    size: int
    sha: str


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says: the bytes that the file must have, the bytes of
    its tensors, their names, and how many parameters have which dtype (F32, BF16, ...)."""

    size: int
    data: int
    tensors: frozenset[str]
    parameters: dict[str, int]


def list_refs(
    repo: str, known: Iterable[str] = (), kind: str = "model", bring: str | None = None
) -> dict[str, str]:
    """Commits of the branches and tags of a repository, by name.

    Raises KelibError; if there is no such repository, with the nearest of those ``known``.
    """
    from huggingface_hub import HfApi

    def call() -> Any:
        return HfApi().list_repo_refs(repo, repo_type=kind)

    refs = ask(call, repo, known=known, kind=kind, bring=bring)
    return {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}


def list_files(repo: str, commit: str) -> dict[str, HubFile]:
    """The files of a commit by name, from its metadata. Raises KelibError."""
    from huggingface_hub import HfApi

    def call() -> Any:
        return HfApi().model_info(repo, revision=commit, files_metadata=True, timeout=60)

    siblings = ask(call, repo, commit).siblings or ()
    return {
        file.rfilename: HubFile(
            file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or ""
        )
        for file in siblings
    }


def read_json(repo: str, commit: str, name: str) -> Any:
    """A small JSON file of a commit; None if it is not JSON. Raises KelibError."""
    try:
        return json.loads(_content(repo, commit, name))
    except ValueError:
        return None


def read_header(repo: str, commit: str, file: HubFile) -> Header | None:
    """The header of a safetensors file; None if the file is too short for it, or it is none.

    Raises KelibError if the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    if file.size < 8:
        return None
    # the client tells what is in the header, but not how long it is: that is in the first 8 bytes
    length = int.from_bytes(_content(repo, commit, file.name, first_bytes=8), "little")
    if 8 + length > file.size:
        return None

    def call() -> Any:
        return HfApi().parse_safetensors_file_metadata(repo, file.name, revision=commit)

    try:
        told = ask(call, repo, commit)
    except (SafetensorsParsingError, AttributeError, TypeError):  # not the JSON of a header
        return None
    data = max((tensor.data_offsets[1] for tensor in told.tensors.values()), default=0)
    return Header(8 + length + data, data, frozenset(told.tensors), dict(told.parameter_count))


def cache_folder(repo: str) -> str:
    """What the hub's cache calls the folder of a repository."""
    return f"models--{repo.replace('/', '--')}"


def how_to_bring(repo: str) -> str:
    """The remedy where there is no network."""
    return (
        f"where there is a network, run 'python -m kelib audit {repo}' and, for each commit in "
        f"use, 'hf download {repo} --revision COMMIT'; then bring data/revisions.lock.yaml, data/"
        f"measurements/audit and the folder {cache_folder(repo)} of the hub's cache"
    )


def ask(
    call: Callable[[], Answer],
    repo: str,
    revision: str | None = None,
    known: Iterable[str] = (),
    kind: str = "model",
    bring: str | None = None,
) -> Answer:
    """``call()``, which asks the hub about ``repo``; again, after a wait, while the hub is busy.

    ``kind``: model or dataset. ``bring``: what to do without a network, by default
    :func:`how_to_bring`. Raises KelibError that says what is wrong and what to do;
    :class:`Unreachable` if it is the way to the hub.
    """
    from huggingface_hub.errors import HTTPError

    attempt = 0
    while True:
        try:
            return call()
        except (HTTPError, OSError, ValueError) as error:  # the last: no hub id, or no JSON
            response: Any = getattr(error, "response", None)
            attempt += 1
            if getattr(response, "status_code", None) not in BUSY or attempt == ATTEMPTS:
                raise _refusal(
                    repo, revision, known, error, kind, bring or how_to_bring(repo)
                ) from error
            time.sleep(_pause(response.headers, attempt))


def _content(repo: str, commit: str, name: str, first_bytes: int | None = None) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def call() -> bytes:
        headers = dict(build_hf_headers())
        if first_bytes is not None:
            headers["range"] = f"bytes=0-{first_bytes - 1}"
        url = hf_hub_url(repo, name, revision=commit)
        response = get_session().get(url, headers=headers, timeout=60)
        hf_raise_for_status(response)
        return bytes(response.content)

    return ask(call, repo, commit)


def _pause(headers: Mapping[str, str], attempt: int) -> float:
    """Seconds to wait: what the hub says, else longer each time."""
    told = headers.get("retry-after") or ""
    if not told.isdigit():
        reset = re.search(r";t=(\d+)", headers.get("ratelimit") or "")
        told = reset[1] if reset else ""
    return min(float(told) if told else 2.0**attempt, LONGEST_WAIT)


def _refusal(
    repo: str,
    revision: str | None,
    known: Iterable[str],
    error: BaseException,
    kind: str,
    bring: str,
) -> KelibError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return KelibError(f"{repo!r} is not the form of a hub id; give owner/name")
    if isinstance(error, errors.GatedRepoError):
        return KelibError(
            f"{repo} is given to those alone who agreed to its terms: agree on its page on the "
            "model hub, make a token with read access in the settings of your account there, and "
            "give it with 'hf auth login' or in HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        near = difflib.get_close_matches(repo, list(known))
        nearest = f" (the nearest of {_LISTED[kind]} are {listing(near)})" if near else ""
        return KelibError(
            f"there is no public {_CALLED[kind]} {repo} on the model hub{nearest}; correct the "
            "name, or log in with 'hf auth login' if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return KelibError(
            f"{repo} has no revision {revision} on the model hub any more; delete its entry in the "
            f"{_PINNED[kind]}"
        )
    if status == 401:
        return KelibError(
            f"the model hub does not take the token in use, asked about {repo}; make a new one and "
            "give it with 'hf auth login' or in HF_TOKEN, or unset HF_TOKEN"
        )
    if status is not None:
        return KelibError(
            f"the model hub answers {status} about {repo}: {reason(error)}; try again later, and "
            "if HF_ENDPOINT is set check that it is a hub"
        )
    if isinstance(error, ValueError):
        return KelibError(
            f"what answers in place of the model hub about {repo} is none ({reason(error)}); "
            "check HF_ENDPOINT, and whether the network wants a log-in first"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Unreachable(
            f"HF_HUB_OFFLINE forbids to ask the model hub about {repo}; unset it, or, {bring}"
        )
    return Unreachable(
        f"the model hub cannot be reached about {repo} ({reason(error)}), so there is no network "
        f"or HF_ENDPOINT is wrong; {bring}"
    )


def reason(error: BaseException) -> str:
    """What went wrong in one line, without addresses and tokens."""
    line = one_line(error) if isinstance(error, Exception) else type(error).__name__
    line = re.sub(r"['\"]?[\w+.-]+://\S+", "<address>", line)
    return re.sub(r"\bhf_\w+", "<token>", line)[:200]
