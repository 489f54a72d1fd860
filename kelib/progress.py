"""How far a level of runs is: a bar where somebody watches, lines where a log is kept."""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm


class Progress:
    """A bar with rate and time left in a terminal or an open notebook, else a line per interval."""

    def __init__(self, title: str, total: int, interval: float = 20.0) -> None:
        self.title, self.total, self.interval = title, total, interval
        self.start = self.last = time.monotonic()
        lines = os.environ.get("KELIB_PROGRESS") == "lines"
        interactive = not lines and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        self.bar = tqdm(total=total, desc=title, unit="run") if interactive else None

    def __enter__(self) -> Progress:
        return self

    def show(self, done: float) -> None:
        """Show that ``done`` (a fraction counts) of the runs are finished."""
        if self.bar is not None:
            self.bar.n = round(done, 2)
            self.bar.refresh()
        elif time.monotonic() - self.last > self.interval or done == self.total:
            self.last = time.monotonic()
            passed = self.last - self.start
            left = f"{passed * (self.total - done) / done:.0f} s left" if done > 0 else "starting"
            print(f"{self.title}: {done:.1f} of {self.total}, {passed:.0f} s, {left}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
