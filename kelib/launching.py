"""The command under a launcher: joining the other processes, and ending together with them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kelib.errors import KelibError
from kelib.processes import Processes

Result = TypeVar("Result")
# Seconds in which gloo's threads let go of the tensors of the last exchange. They need the
# interpreter for it, and DDP's reducer, when it is deleted, waits for them without giving it up:
# both then wait for ever (torch 2.13).
SETTLE = 0.3


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that ``accelerate launch`` or ``torchrun`` started; else this one alone.

    accelerate's PartialState reads what the launcher left in the environment and initialises
    torch.distributed: nccl where there is a GPU, gloo on a CPU. At the end of the scope the group
    is gone, unless it was there before.

    A refusal (KelibError or OSError) must be one that every process knows of, see :func:`agreed`.
    The first process prints it, in one line, and all exit with status 1. Alone, it is raised.
    """
    from accelerate import PartialState

    before = dist.is_available() and dist.is_initialized()
    state = PartialState(cpu=not torch.cuda.is_available())
    processes = Processes("world")
    try:
        yield processes
    except (KelibError, OSError) as error:
        if not processes.together:
            raise
        if processes.rank == 0:
            print(f"kelib: {error}", file=sys.stderr, flush=True)
        # a launcher ends the others as soon as one has exited: not before it is said
        dist.barrier()
        raise SystemExit(1) from None
    finally:
        if processes.together and not before:
            time.sleep(SETTLE)
            state.destroy_process_group()


def agreed(processes: Processes, do: Callable[[], Result], *, by_first: bool = False) -> Result:
    """What ``do()`` returns in this process; raised in all of them if it fails in one.

    ``by_first``: only the first process does it, and all return what it got.
    """
    error: Exception | None = None
    found: Any = None
    if processes.rank == 0 or not by_first:
        try:
            found = do()
        except Exception as caught:  # the others are told before it is raised here
            error = caught
    told = processes.agree(error, found if by_first else None)
    return told[0] if by_first else found
