"""The command line that make calls: refusals are one line on stderr and exit status 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kelib.__main__ import main
from kelib.config import profiles, repository_root


@pytest.mark.parametrize("command", ["profile", "status", "data", "clean"])
def test_unknown_profile_lists_what_exists(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "smal"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kelib: unknown profile 'smal'") and error.count("\n") == 1
    assert all(name in error for name in profiles())


def test_profile_prints_its_digest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "smoke"]) == 0
    assert "digest" in capsys.readouterr().out


def test_missing_notebook_and_malformed_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["notebook", str(tmp_path / "no.ipynb"), str(tmp_path / "out.ipynb")]) == 1
    assert "no notebook" in capsys.readouterr().err
    assert main(["notebook", "a", "b", "-p", "oops"]) == 1
    assert "must look like name=value" in capsys.readouterr().err


def test_reference_of_an_unfinished_profile_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", "nowhere"]) == 1
    assert "nothing was measured in" in capsys.readouterr().err


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Make with the environment that runs this test, so that nothing is set up."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "USE_ENV=1", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(
        command, cwd=repository_root(), env=environment, capture_output=True, text=True, check=False
    )


def test_make_help_lists_targets_and_a_plain_make_is_help() -> None:
    listed = make("help").stdout
    for target in ("figures", "test", "check", "reference", "status", "search"):
        assert f"  {target} " in listed
    assert make().stdout == listed


def test_make_stops_at_an_unknown_profile_before_any_work() -> None:
    done = make("figures", "PROFILE=nope")
    assert done.returncode != 0
    assert "unknown profile 'nope'" in done.stderr and "smoke" in done.stderr
    assert not (repository_root() / "data" / "measurements" / "nope").exists()
