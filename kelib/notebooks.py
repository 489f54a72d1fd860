"""Run a notebook with parameters: checked before, whole or not at all, a failed copy kept for
reading.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kelib.errors import KelibError, first_line, lacks_memory, listing
from kelib.redaction import hidden
from kelib.temporary import temporary_beside


def run_notebook(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute ``notebook`` by papermill and keep the executed copy as ``output``.

    Written under a temporary name first. If a cell fails, the copy goes to
    ``<output>.failed.ipynb`` and a KelibError names the cell's error; ``output`` is then left as
    it was. An unknown parameter is an error (papermill itself only warns).
    """
    skip_address_grammar()
    import papermill
    from papermill.exceptions import PapermillExecutionError

    if not notebook.exists():
        there = [path.name for path in notebook.parent.glob("*.ipynb")]
        raise KelibError(f"no notebook {notebook}; {notebook.parent} has {listing(there)}")
    known = papermill.inspect_notebook(str(notebook))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise KelibError(
            f"{notebook.name} has no parameter {listing(unknown)}; "
            f"its parameters are {listing(known)}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(output, "ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    failed.unlink(missing_ok=True)
    os.environ.setdefault("KELIB_PROGRESS", "lines")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(temporary),
            dict(parameters),
            kernel_name="python3",
            cwd=str(notebook.parent),
            progress_bar=False,
            log_output=False,
            stdout_file=_Terminal(),
            extra_arguments=["--IPKernelApp.log_level=50"],  # no word about transports
        )
    except PapermillExecutionError as error:
        _hide_secrets(temporary)
        temporary.replace(failed)
        reason = re.sub(r"\x1b\[[0-9;]*m", "", f"{error.ename}: {error.evalue}")
        raise KelibError(f"{notebook.name} failed: {reason}\nthe failed copy: {failed}") from None
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # nbclient has no class of its own for a kernel that does not start
        if isinstance(error, OSError) and not lacks_memory(error):
            raise KelibError(
                f"cannot write {error.filename or output}: {error.strerror or error}; free space "
                "or choose a folder that can be written, then run again"
            ) from error
        if isinstance(error, RuntimeError) and "ernel" in str(error):
            raise KelibError(
                f"{notebook.name} stopped, its kernel was ended or did not start in time "
                f"({first_line(error)}); most often memory is lacking or the machine is crowded: "
                "free some memory, stop other jobs or lower workers, then run again; runs that are "
                "finished are kept"
            ) from error
        raise
    _hide_secrets(temporary)
    temporary.replace(output)


def skip_address_grammar() -> None:
    """Keep jsonschema from compiling a grammar of international addresses (``rfc3987_syntax``, a
    package that JupyterLab brings): most of the time that importing papermill or nbformat takes,
    for a format that no schema of notebooks has. Where the module is missing it goes without.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def _hide_secrets(notebook: Path) -> None:
    """What cells printed of tokens, and of credentials in the addresses of errors."""
    written = notebook.read_text("utf-8")
    if (shown := hidden(written)) != written:
        notebook.write_text(shown, "utf-8")


class _Terminal:
    """Passes progress lines of the running notebook on to the terminal; tables stay in the
    notebook.
    """

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if re.search(r"\d+ s(, | left|$)", line) or line.startswith("fetching"):
                print(f"  {line}", flush=True)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""
