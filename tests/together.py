"""Several processes at once, joined by gloo; what each found comes back as JSON.

They are forked from a server that has the libraries loaded and nothing else, so that a test of
eight processes pays for one import.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = ["pytest", "torch._dynamo", "torch.distributed.fsdp", "kelib.learning"]
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt_neox", "olmo")]
CONTEXT.set_forkserver_preload(LIBRARIES)
PATIENCE = 300  # seconds, on a machine that does something else


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(world: int, function: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """``function(*arguments)`` in each of ``world`` processes, as a launcher starts them."""
    place = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{**place, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    started = [CONTEXT.Process(target=_one, args=(at, function, arguments)) for at in places]
    for process in started:
        process.start()
    return started


def _one(place: dict[str, Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE - 10)  # where it hangs, before it is killed
    function(*arguments)


def end(started: list[BaseProcess]) -> list[int | None]:
    """Their exit statuses."""
    for process in started:
        process.join(PATIENCE)
        process.kill()  # nothing, if it has ended
        process.join()
    return [process.exitcode for process in started]


def together(world: int, function: Callable[..., Any], folder: Path, *more: Any) -> list[Any]:
    """What ``function(folder, *more)`` returns in each process, by rank; all must succeed."""
    statuses = end(start(world, _keep, function, folder, *more))
    assert statuses == [0] * world, statuses
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


def drift(losses: list[float], reference: list[float]) -> float:
    """The largest difference between two runs at any step."""
    assert len(losses) == len(reference)
    return float(np.abs(np.subtract(losses, reference)).max())


def _keep(function: Callable[..., Any], folder: Path, *more: Any) -> None:
    found = function(folder, *more)
    name = f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json"
    (folder / name).write_text(json.dumps(found))
