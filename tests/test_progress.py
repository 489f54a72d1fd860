"""Progress is a bar in a terminal and a few lines elsewhere."""

from __future__ import annotations

import io
import sys

from kelib.progress import Progress


def test_progress_without_a_terminal_is_lines(monkeypatch, capsys):
    monkeypatch.delenv("KELIB_PROGRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("stage: measure", 4, interval=0) as bar:
        assert bar.bar is None
        bar.show(0)
        bar.show(1.5)
        bar.show(4)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage: measure: 0.0 of 4, 0 s, starting")
    assert lines[1].startswith("stage: measure: 1.5 of 4, 0 s, ") and lines[1].endswith("s left")
    assert lines[2] == "stage: measure: 4.0 of 4, 0 s, 0 s left"
    assert len(lines) == 3 and sys.stderr.getvalue() == ""


def test_progress_prints_one_line_an_interval(monkeypatch, capsys):
    monkeypatch.setenv("KELIB_PROGRESS", "lines")
    with Progress("stage", 100, interval=1000) as bar:
        for done in range(1, 101):
            bar.show(done)
    assert capsys.readouterr().out == "stage: 100.0 of 100, 0 s, 0 s left\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.delenv("KELIB_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("stage", 4) as bar:
        bar.show(2.5)
    shown = sys.stderr.getvalue()
    assert "stage" in shown and "2.5/4" in shown
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("KELIB_PROGRESS", "lines")
    assert Progress("stage", 4).bar is None
