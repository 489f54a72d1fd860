"""Continual learning of a published checkpoint, and what it knows then: run ``continued``.

The training is that of :mod:`kelib.learning`, in this process or, where ``launch.json`` asks for
several, in those of torch's launcher, each of which runs this module with the request of the run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kelib.continued_profile import GENERATED_ENTRIES, protocol
from kelib.errors import KelibError
from kelib.fetching import checkpoint
from kelib.known import knowledge_of, write_knowledge
from kelib.learning import RESULT, learn
from kelib.learning_inputs import Settings
from kelib.learning_text import require_tokenizer
from kelib.pretrained import quiet

Progress = Callable[[float], None]


def continued(
    settings: Mapping[str, Any], inputs: Mapping[str, Path], folder: Path, progress: Progress
) -> None:
    """Continue a checkpoint, and what it knows then; adds ``exposures.csv``, what was shown when.

    The weights are gone at the end. Interrupted, it goes on from the last state of the training.
    """
    out = folder / "learned"
    if not (folder / "result.json").exists():  # else killed while the weights were deleted
        with ExitStack() as undo:
            place = checkpoint(settings, inputs, undo)
            undo.enter_context(quiet())
            require_tokenizer(place, settings, inputs)
            _train(place, out, settings, inputs, lambda share: progress(0.9 * share))
            gc.collect()  # the training held four times the weights
            found, more = knowledge_of(out / "model", settings, inputs)
        shutil.copyfile(out / "exposures.csv", folder / "exposures.csv")
        more["losses"] = json.loads((out / "losses.json").read_text())
        note = json.loads((out / RESULT).read_text())
        more |= {"processes": note["processes"], "bytes": note["bytes"]}
        write_knowledge(folder, found, more)
    shutil.rmtree(out, ignore_errors=True)


# --- training -----------------------------------------------------------------------------------


def _train(
    place: Path, out: Path, settings: Mapping[str, Any], inputs: Mapping[str, Path], progress: Any
) -> None:
    launch = _launch_of(inputs)
    generated = settings["entries"] == GENERATED_ENTRIES
    request = {
        "protocol": dict(settings["protocol"]),
        "model": str(place),
        "corpus": str(inputs["text"]),
        "seed": settings["seed"],
        "cl_seed": settings["cl_seed"],
        "learning_rate": settings["learning_rate"],
        "entries": None if generated else str(inputs.get("entries", settings["entries"])),
        "paraphrase_entries": settings["paraphrase_entries"],
        "injected": settings["injected"],
        "out": str(out),
        "save_every": launch.get("save_every"),
        "parallel": launch.get("parallel", "ddp"),
        "recompute": launch.get("recompute", False),
    }
    if (processes := launch.get("processes", 1)) > 1:
        file = out.parent / "request.json"
        file.write_text(json.dumps(request))
        _in_processes(processes, file, progress)
    else:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            learn_as_asked(request, progress)


def learn_as_asked(request: Mapping[str, Any], progress: Progress | None = None) -> None:
    """:func:`kelib.learning.learn` with the values of a request."""
    given = dict(request)
    values, out = given.pop("protocol"), Path(given.pop("out"))
    how = {name: given.pop(name) for name in ("save_every", "parallel", "recompute")}
    plan = protocol(values, given["learning_rate"], given["cl_seed"])
    learn(Settings(plan, **given), out, progress=progress, **how)


def _launch_of(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """How the work is shared out, as the profile says: no part of what names a run."""
    path = inputs["launch"]
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _in_processes(count: int, request: Path, progress: Progress) -> None:
    """Learn as ``request`` says in ``count`` processes; they end when this one does.

    Raises KelibError with what the first of them refused, or the end of what they said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "-m", "kelib.continued_jobs", str(request)]
    said: list[str] = []
    # their standard input ends with this process, however it ends: see _end_with_the_first
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as launched:
        assert launched.stdout is not None
        try:
            for line in launched.stdout:
                said = [*said[-200:], line.strip()]
                if told := re.match(r"step (\d+) of (\d+),", line):
                    progress(int(told[1]) / int(told[2]))
        except BaseException:
            launched.kill()
            raise
    if launched.returncode:
        refused = [line.removeprefix("kelib: ") for line in said if line.startswith("kelib: ")]
        raise KelibError(refused[0] if refused else f"{count} processes failed: {said[-20:]}")


def _end_with_the_first() -> None:
    """End this process when whoever launched it is gone, so that nobody writes a run twice."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_the_first()
    learn_as_asked(json.loads(Path(sys.argv[1]).read_text()))
