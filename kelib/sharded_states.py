"""States of a training that any number of processes writes and any other number goes on from.

Every process writes and reads its own share (``torch.distributed.checkpoint``), so that no process
ever needs room for the whole. A state is a folder ``stepNNNNNNN``; it appears whole or not at all,
and the one before it goes when it is there.
"""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from kelib import seals
from kelib.checkpoints import step_folder
from kelib.errors import KelibError
from kelib.launching import agreed
from kelib.processes import Processes

# what an index of shares is made of
_OF_INDEX = {
    *(("torch", "Size"), ("torch.serialization", "_get_layout")),
    *(("torch.distributed.checkpoint.filesystem", n) for n in ("_StorageInfo", "_StoragePrefix")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
            *("TensorProperties", "TensorStorageMetadata", "ChunkStorageMetadata"),
            "BytesStorageMetadata",
        )
    ),
}
NOTES = "progress.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
# what reading a file that was cut or changed can raise
_BROKEN = (
    *(OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError),
    pickle.UnpicklingError,
)


def save_state(trainer: Any, folder: Path, notes: Mapping[str, Any] | None = None) -> Path:
    """Write weights, moments, step, losses and ``notes`` (fit for JSON) under ``folder``.

    All processes call it at the same step; it works for a plain :class:`kelib.training.Trainer`,
    under DistributedDataParallel and for divided weights alike. Returns the folder of the state.
    A process killed at any moment leaves the state before it whole. Raises KelibError, in every
    process, if one cannot write.
    """
    trainer.read_losses()
    processes = Processes("world")
    final = step_folder(folder, trainer.step)
    temporary = folder / f".{final.name}.tmp"
    written = {"step": trainer.step, "losses": trainer.losses, "notes": dict(notes or {})}

    def begin() -> None:
        for rest in folder.glob(".step*.tmp"):  # of a process that was killed
            shutil.rmtree(rest)
        temporary.mkdir(parents=True)

    def end() -> None:
        sealed = seals.sealed({**written, "files": seals.seal(temporary)})
        (temporary / NOTES).write_text(json.dumps(sealed))
        if final.exists():
            shutil.rmtree(final)
        temporary.replace(final)
        for older in _states(folder):
            if older != final:
                shutil.rmtree(older)

    agreed(processes, begin, by_first=True)
    try:
        with _quiet():
            dcp.save(_tensors(trainer), checkpoint_id=temporary)
    except dcp.CheckpointException as error:  # torch tells every process, and it is no Exception
        raise KelibError(
            f"cannot write {temporary} ({_reason(error)}); free space or choose another folder"
        ) from None
    agreed(processes, end, by_first=True)
    return final


def load_state(trainer: Any, folder: Path) -> dict[str, Any] | None:
    """Go on from the latest state under ``folder``; its notes, or None if there is none.

    The state may come from any number of processes, with whole or divided weights. Raises
    KelibError, in every process, for one that is broken or of another model.
    """
    processes = Processes("world")

    def find() -> tuple[Path, dict[str, Any]] | None:
        states = _states(folder)
        if not states:
            return None
        try:
            written = seals.unsealed(json.loads((states[-1] / NOTES).read_text()))
            seals.check(states[-1], written.get("files", {}), remedy="nothing of it is used")
        except (OSError, ValueError, TypeError, KelibError) as error:
            raise _refusal(states[-1], error) from error
        return states[-1], written

    found = agreed(processes, find, by_first=True)
    if found is None:
        return None
    state, written = found
    try:
        reader = _Reader(state)
        stored = agreed(processes, lambda: set(reader.read_metadata().state_dict_metadata))
        _make_moments(trainer, stored)
        with _quiet():
            dcp.load(_tensors(trainer), storage_reader=reader)
        trainer.step, trainer.losses = int(written["step"]), list(written["losses"])
        return dict(written["notes"])
    except dcp.CheckpointException as error:
        raise _refusal(state, _reason(error)) from None
    except _BROKEN as error:
        raise _refusal(state, error) from error


def whole_weights(model: Any) -> dict[str, Any]:
    """The whole state dict on the CPU, in the first process; an empty one in the others.

    Divided weights are gathered one after the other: all processes call it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    first = not dist.is_initialized() or dist.get_rank() == 0
    return dict(weights) if first else {}


class _Reader(dcp.FileSystemReader):
    """torch's reader, whose index of the shares is a pickle: of that no more than the index is
    made, so that a planted file runs nothing. The shares themselves are read as weights only.
    """

    def read_metadata(self, *_: Any, **options: Any) -> Any:
        with Path(self._get_metadata_path(options.get("rank"))).open("rb") as file:
            found = _Index(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f".metadata holds a {type(found).__name__}")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _OF_INDEX or (module.split(".")[0], name) == ("pathlib", "PosixPath"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is no part of it")


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step*"))


def _tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights and moments by name, the tensors themselves: loading fills them."""
    found = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        found[f"model.{name}"] = parameter.detach()
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            found[f"{key}.{name}"] = value
    return found


def _make_moments(trainer: Any, stored: set[str]) -> None:
    """Room for the moments that are stored, divided as the weights are here."""
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if f"step.{name}" in stored:  # not if it is frozen
            made = {key: torch.zeros_like(parameter) for key in MOMENTS}
            # fused AdamW counts in float32, beside the weights
            made["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            trainer.optimizer.state[parameter] = made


def _quiet() -> Any:
    """torch warns where there is one process only, which is meant here."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _reason(error: dcp.CheckpointException) -> str:
    return "; ".join(
        f"process {rank}: {' '.join(str(failure).split())[:200]}"
        for rank, (failure, _) in error.failures.items()
    )


def _refusal(state: Path, reason: object) -> KelibError:
    said = " ".join(str(reason).split())[:400]
    return KelibError(f"{state} is not a state of this run ({said}); delete it")
