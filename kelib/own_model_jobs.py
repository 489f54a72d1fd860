"""What the run of a reader's own model does: refuse what cannot be measured, before any text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kelib.architectures import feed_forwards
from kelib.fetching import fetch
from kelib.model_import import MODEL
from kelib.pretrained import load_model, quiet, read_tokenizer


def own_model(
    settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Any
) -> None:
    """Make ``folder/model`` a link to the given folder, or fetch the commit of the hub to there.

    The model is loaded once, so that one whose weights are pickles only or lack a part, whose
    tokenizer is not there, or whose feed-forward layers are not found is refused here (KelibError).
    Writes ``result.json``: class and number of parameters.
    """
    place = folder / MODEL
    given = inputs.get("given")
    if given is None and not place.exists():
        commit = settings["commit"]
        fetch(settings["repo"], commit, folder).rename(place)
        (folder / f"{commit}.lock").unlink()
    named = str(place if given is None else given)  # refusals name what the reader knows
    with quiet():
        read_tokenizer(named, None)
        model = load_model(named, None, torch.float32, head=True)
    feed_forwards(model)
    if given is not None:
        place.unlink(missing_ok=True)
        place.symlink_to(given, target_is_directory=True)  # nothing of gigabytes is copied
    parameters = sum(parameter.numel() for parameter in model.parameters())
    note = {"class": type(model).__name__, "parameters": parameters}
    (folder / "result.json").write_text(json.dumps(note, indent=1))
