"""Tokens and credentials are in nothing that is written or said."""

from __future__ import annotations

import logging
from pathlib import Path

import nbformat
import pytest
from torture.secrets import PLANTED

from kelib.__main__ import main
from kelib.errors import KelibError
from kelib.notebooks import run_notebook
from kelib.redaction import hidden, hide_in_logs
from kelib.run import Run
from kelib.runs import attempt

NO_SECRETS = ("PIP_RETRIES", "HF_HUB_OFFLINE")
SECRETS = {"HUGGING_FACE_HUB_TOKEN": "hf_" + "Zz9mQaYc" * 4}
SECRETS |= {name: value for name, value in PLANTED.items() if name not in NO_SECRETS}
WORDS = [*list(SECRETS.values())[:5], "wordofhub", "wordofpip"]


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def leaked(*texts: str) -> list[str]:
    return [word for word in WORDS for text in texts if word in text]


def written(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: path.read_bytes().decode("latin-1") for path in files}


def notebook(path: Path, *cells: str) -> Path:
    parameters = nbformat.v4.new_code_cell("number = 1", metadata={"tags": ["parameters"]})
    code = [parameters, *map(nbformat.v4.new_code_cell, cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel}), path)
    return path


TELL = "import os\nfor name in {names}: print('it is', os.environ[name])"


def test_the_search_would_find_them(planted, tmp_path):
    (tmp_path / "log").write_text("token " + SECRETS["HF_TOKEN"])
    assert leaked(*written(tmp_path).values()) == [SECRETS["HF_TOKEN"]]


def test_a_notebook_that_prints_them_is_kept_without(planted, tmp_path, capsys):
    given, failing = tmp_path / "given.ipynb", tmp_path / "failing.ipynb"
    tell = TELL.format(names=sorted(SECRETS))
    run_notebook(notebook(given, tell), tmp_path / "out.ipynb", {"number": 2})
    assert "it is <hidden>" in (tmp_path / "out.ipynb").read_text()
    cell = tell + "\nraise OSError(f\"no answer from {os.environ['HF_ENDPOINT']}/api\")"
    with pytest.raises(KelibError, match=r"no answer from http://<hidden>@127.0.0.1:9/api") as said:
        run_notebook(notebook(failing, cell), tmp_path / "other.ipynb", {})
    assert "OSError" in (tmp_path / "other.failed.ipynb").read_text()
    nbformat.read(tmp_path / "other.failed.ipynb", as_version=4)  # still a notebook
    shown = capsys.readouterr()
    assert leaked(*written(tmp_path).values(), str(said.value), shown.out, shown.err) == []


@pytest.mark.parametrize("error", [OSError, KelibError, RuntimeError])
def test_what_a_failed_run_leaves_names_none(planted, tmp_path, error):
    def work(run: Run) -> float:
        run.partial.mkdir(parents=True)
        raise error(f"{SECRETS['HF_ENDPOINT']} refuses {SECRETS['HF_TOKEN']}, {' '.join(WORDS)}")

    run = Run("corpus", tmp_path, {})
    _, reason = attempt(run, work)
    assert "refuses <hidden>" in reason
    left = (run.partial / "error.txt").read_text()
    assert left == reason and leaked(reason) == []


def test_no_library_logs_them(planted, caplog, monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    hide_in_logs()
    made_by = logging.getLogRecordFactory()
    hide_in_logs()
    assert logging.getLogRecordFactory() is made_by  # once is enough
    client = logging.getLogger("client.of.the.hub")  # says where it tries again
    client.warning("'%s' thrown while requesting HEAD %s", "refused", SECRETS["HF_ENDPOINT"])
    client.warning("%d of %s", 3, "four")
    said = [record.getMessage() for record in caplog.records]
    asked = "'refused' thrown while requesting HEAD http://<hidden>@127.0.0.1:9"
    assert said == [asked, "3 of four"]


def test_the_command_hides_them_in_what_it_says(planted, monkeypatch, capsys):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    secret = SECRETS["AWS_SECRET_ACCESS_KEY"]
    assert main(["profile", f"{SECRETS['PIP_INDEX_URL']}?{secret}"]) == 1
    logging.getLogger("any").error("word %s", secret)
    shown = capsys.readouterr()
    assert "<hidden>@127.0.0.1" in shown.err and leaked(shown.out, shown.err) == []


def test_words_that_are_no_secret_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-and-long")
    monkeypatch.setenv("A_KEY", "short")
    monkeypatch.setenv("PWD", "/home/reader/kelib")
    text = "false-and-long short /home/reader/kelib https://host/a@b hf_1 mail me@host.org"
    assert hidden(text) == text
