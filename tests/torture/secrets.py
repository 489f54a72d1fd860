"""Tokens and credentials in the environment, and commands that might write or say them.

Each command is run in a process of its own, with a temporary folder of its own; everything that it
wrote and said is then searched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kelib.config import repository_root

PLANTED = {
    "HF_TOKEN": "hf_" + "Kq7wLrZt" * 4,
    "AWS_ACCESS_KEY_ID": "AKIA" + "J4QW7RTZ" * 2,
    "AWS_SECRET_ACCESS_KEY": "pG9xWm/3kTq+Vb7" * 2,
    "MY_API_KEY": "plain-words-of-a-key",
    "HF_ENDPOINT": "http://reader:wordofhub@127.0.0.1:9",
    "PIP_INDEX_URL": "http://reader:wordofpip@127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
    "HF_HUB_OFFLINE": "",
}
WORDS = ("Kq7wLrZt", "J4QW7RTZ", "pG9xWm/3", "plain-words", "wordofhub", "wordofpip")
FIGURE, STAGE = "notebooks/fig02_knowledge_entropy.ipynb", "notebooks/stages/1_pretrain.ipynb"
# case -> (arguments of python, with OUT for a folder; the exit status)
FETCH = (
    "from kelib import sources; from pathlib import Path; from kelib.errors import KelibError\n"
    "try: sources.fetch(sources.manifest()['news'], Path('OUT'))\n"
    "except KelibError as error: print(error); raise SystemExit(1)"
)
FICTIONAL = (
    "from kelib.redaction import hide_in_logs; hide_in_logs()\n"
    "from kelib.fictional import load_fictional_knowledge; from kelib.errors import KelibError\n"
    "try: load_fictional_knowledge()\n"
    "except KelibError as error: print(error); raise SystemExit(1)"
)
KELIB = ("-m", "kelib")
CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "a figure": ((*KELIB, "notebook", FIGURE, "OUT/figure.ipynb"), 0),
    "a stage": ((*KELIB, "notebook", STAGE, "OUT/stage.ipynb"), 0),
    "a stage that fails": (
        (*KELIB, "notebook", STAGE, "OUT/failed.ipynb", "-p", "profile=nowhere"),
        1,
    ),
    "an audit without a network": (
        (*KELIB, "audit", "pythia-14m", "--lock", "OUT/lock.yaml", "--folder", "OUT"),
        1,
    ),
    "text without a network": (("-c", FETCH), 1),
    "a data set without a network": (("-c", FICTIONAL), 1),
}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every command; ``options.only`` chooses among them."""
    for case, (arguments, status) in CASES.items():
        if options.only and not any(word in case for word in options.only):
            continue
        folder = options.folder / case.replace(" ", "-")
        found, files, ended = leaked(arguments, folder)
        right = ended == status
        note = f"{files} files and all output searched"
        if found or not right:
            note = f"{'; '.join(found)}; exit status {ended}, expected {status}"
        yield {"case": case, "survived": int(right and not found), "note": note}


def leaked(arguments: tuple[str, ...], folder: Path) -> tuple[list[str], int, int]:
    """(what holds which secret, number of files written, exit status) of a call of Python."""
    folder.mkdir(parents=True)
    root = repository_root()
    given = [argument.replace("OUT", str(folder)) for argument in arguments]
    environment = {**os.environ, **PLANTED, "TMPDIR": str(folder), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *given], cwd=root, env=environment, capture_output=True, check=False
    )
    texts = {"output": done.stdout + done.stderr}
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts |= {str(path.relative_to(folder)): path.read_bytes() for path in files}
    found = [f"{w} in {name}" for name, text in texts.items() for w in WORDS if w.encode() in text]
    return found, len(files), done.returncode
