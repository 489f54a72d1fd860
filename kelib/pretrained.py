"""Models that others trained: found in a folder or on the model hub, and loaded with care.

Only safetensors are opened, no code that comes with a model is run, weights that are missing are an
error, and every refusal says how to bring the files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, has_file, is_offline_mode

from kelib.errors import KelibError, listing
from kelib.parsing import one_line

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def locate(model: str, revision: str | None) -> tuple[str, str | None]:
    """(folder, None) of a model on this disk, or (hub id, commit) of one of the hub or its cache.

    Raises KelibError that says which of the two was tried, what failed, and how to bring the files.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise KelibError(
                f"{model} is a local folder and has no revisions; leave --revision out or give the "
                "folder of that checkpoint"
            )
        if not (folder / "config.json").is_file():
            there = listing(path.name for path in folder.iterdir())
            raise KelibError(
                f"{model} holds no model, for it has no config.json; it has {there}; give a folder "
                "that save_pretrained wrote"
            )
        return str(folder), None
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        raise KelibError(
            f"there is no model folder {model}; beside it are "
            f"{listing(path.name for path in beside)}; give one of those or the id of a hub model"
        )
    try:
        found = cached_file(model, "config.json", revision=revision)
    except Exception as error:  # several kinds, told apart by what caused them
        raise KelibError(_why_not(model, revision, error)) from error
    if found is None:
        raise KelibError(
            f"{model} on the model hub has no config.json; give a model that transformers can load"
        )
    return model, Path(found).parent.name  # the cache names a snapshot by its commit


def _why_not(model: str, revision: str | None, error: BaseException) -> str:
    causes: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        causes.add(type(cause).__name__)
        cause = cause.__cause__
    bring = (
        f"run 'hf download {model} --local-dir FOLDER"
        + (f" --revision {revision}" if revision else "")
        + "' where there is a network, bring FOLDER here and give it as the model"
    )
    if "HFValidationError" in causes:
        return f"{model!r} is neither a folder here nor the form of a hub id (owner/name)"
    if "GatedRepoError" in causes:
        return (
            f"{model} asks for consent on the model hub: give it there, log in with 'hf auth login'"
        )
    if "RepositoryNotFoundError" in causes:
        return (
            f"there is no folder {model} here and no public model of that name on the model hub; "
            "correct the name, or log in with 'hf auth login' if it is private"
        )
    if "RevisionNotFoundError" in causes:
        return f"{model} has no revision {revision!r} on the model hub; its page lists those it has"
    wanted = f"{model} at revision {revision}" if revision else model
    if is_offline_mode():
        return (
            f"there is no folder {model} here, the hub's cache does not hold {wanted}, and "
            f"HF_HUB_OFFLINE forbids to fetch it; unset HF_HUB_OFFLINE, or {bring}"
        )
    return (
        f"there is no folder {model} here, and {wanted} could not be fetched: the model hub cannot "
        f"be reached ({_reason(error)}); {bring}"
    )


def read_tokenizer(place: str, commit: str | None) -> tuple[int | None, Any, int]:
    """(window in tokens or None if it has none, tokenizer, id of the end-of-text token).

    Raises KelibError if one cannot be loaded, or no end-of-text token is known.
    """
    options = {"revision": commit, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise _unloadable(place, "configuration", error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        raise _unloadable(place, "tokenizer", error) from error
    config = config.get_text_config()
    end = tokenizer.eos_token_id
    end = getattr(config, "eos_token_id", None) if end is None else end
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise KelibError(
            f"{place} names no end-of-text token to put between documents; set eos_token in its "
            "tokenizer_config.json"
        )
    return getattr(config, "max_position_embeddings", None), tokenizer, int(end)


def load_model(place: str, commit: str | None, dtype: torch.dtype, head: bool) -> Any:
    """The model in ``dtype``, in evaluation mode, from safetensors alone.

    ``head``: whether its vocabulary projection must be there. Raises KelibError if a weight is
    missing, the weights are pickles only, or transformers cannot load them.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            revision=commit,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        files = [name for name in (*SAFE, *PICKLES) if has_file(place, name, revision=commit)]
        if not set(files) & set(SAFE):
            raise KelibError(_no_safetensors(place, files)) from error
        raise _unloadable(place, "weights", error) from error
    output = model.get_output_embeddings()
    unused = () if head or output is None else {id(p) for p in output.parameters()}
    spare = {name for name, p in model.named_parameters() if id(p) in unused}
    # transformers fills what is missing with random numbers and only warns
    if missing := set(info["missing_keys"]) - spare:
        raise KelibError(
            f"{place} lacks weights of {type(model).__name__}: {listing(missing, 3)}; bring the "
            "whole checkpoint"
        )
    return model


def _no_safetensors(place: str, files: list[str]) -> str:
    if not files:
        return f"{place} has no weights: it needs model.safetensors (or its index and parts)"
    return (
        f"{place} has its weights only as a pickle ({listing(files)}), which may run code when it "
        "is opened, so kelib does not; if you trust it, load it with AutoModelForCausalLM."
        "from_pretrained, write it with save_pretrained, and give that folder"
    )


def _unloadable(place: str, part: str, error: Exception) -> KelibError:
    if "trust_remote_code" in str(error):
        return KelibError(
            f"the {part} of {place} needs code that comes with the model, which kelib does not "
            "run; use a model whose class is part of transformers"
        )
    return KelibError(
        f"the {part} of {place} cannot be loaded ({_reason(error)}); bring the files again, or "
        "use a causal language model that the installed transformers knows"
    )


def _reason(error: BaseException) -> str:
    """What went wrong in one line, without addresses."""
    line = one_line(error) if isinstance(error, Exception) else type(error).__name__
    return re.sub(r"['\"]?[\w+.-]+://\S+", "<address>", line)[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers report errors alone, and draw its bars in a terminal only."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
