"""Names to write under until a file is whole, and what becomes of them when a process is killed."""

from __future__ import annotations

import glob
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path


def temporary_beside(path: Path, suffix: str = "tmp") -> Path:
    """``.<name>.<process>.<suffix>`` in the folder of ``path``, to be renamed when it is whole.

    What a process that is gone left under such a name is deleted.
    """
    head, tail = f".{path.name}.", f".{suffix}"
    for left in path.parent.glob(f"{glob.escape(head)}*{glob.escape(tail)}"):
        writer = left.name.removeprefix(head).removesuffix(tail)
        if writer.isdigit() and not _is_alive(int(writer)):
            with suppress(OSError):  # another process deletes it too
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f"{head}{os.getpid()}{tail}")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def end_with_parent() -> None:
    """End this process when the one that started it is gone, within a second.

    For what make starts: a make that was killed would leave it running, and the next one would
    meet it at work.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
