"""How much a model suffers from a change of its weights: noise by parameter group, or a step.

A rival explanation of the paper's trend is that longer trained models are more sensitive to any
change. Noise has a size relative to each matrix, so that models of different weight norms can be
compared; a step is that of the optimizer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch

from kelib.architectures import decoder_layers, unwrap
from kelib.attribution import micro_batches, predicted_tokens, read_tokens, summed_loss
from kelib.config import Optimizer
from kelib.decomposition import dense_layers, parts_of, rows_of, weight_of
from kelib.errors import KelibError, listing
from kelib.evaluation import heldout_loss
from kelib.watching import evaluating

Accuracy = Callable[[Any], float | Mapping[str, float]]
Moments = Mapping[str, Mapping[str, torch.Tensor]]


def parameter_groups(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The matrices of ``model`` by group and name, as views of its weights.

    * ``gate`` (gated layers only), ``up``: the halves of K; ``V``: the memory vectors;
    * ``attention``: every other matrix inside the blocks;
    * ``embedding``: every matrix outside the blocks: token and position embeddings, a vocabulary
      projection that is not tied to them;
    * ``all``: the above together.

    A projection that holds gate and up at once appears as two halves, ``name[gate]`` and
    ``name[up]``; tied weights appear once. Vectors (norms, biases) are in no group. Raises
    KelibError as :func:`kelib.decomposition.dense_layers`.
    """
    model = unwrap(model)
    groups: dict[str, dict[str, torch.Tensor]] = {
        name: {} for name in ("gate", "up", "V", "attention", "embedding")
    }
    memory: dict[int, list[tuple[str, Any]]] = {}
    for ffn in dense_layers(model):
        for part in parts_of(ffn):
            memory.setdefault(id(weight_of(ffn, part)), []).append((part, ffn))
    inside = {id(weight) for weight in decoder_layers(model).parameters()}
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        held = memory.get(id(weight), [])
        for part, ffn in held:
            label = name if len(held) == 1 else f"{name}[{part}]"
            groups[part][label] = rows_of(ffn, part, weight.detach())
        if not held:
            groups["attention" if id(weight) in inside else "embedding"][name] = weight.detach()
    groups = {group: tensors for group, tensors in groups.items() if tensors}
    groups["all"] = {name: w for tensors in list(groups.values()) for name, w in tensors.items()}
    return groups


@contextmanager
def noisy(model: Any, group: str, size: float, seed: int) -> Iterator[None]:
    """While the scope lasts, ``W + size * rms(W) * ε`` in place of each matrix W of ``group``.

    ``rms(W) = sqrt(mean of W²)``, ε standard normal, independent for every entry. ε depends on
    ``seed``, the number of the matrix in the model and its shape alone: sizes scale one direction,
    "all" is the sum of the groups, and two stages of a run get the same noise. Afterwards, also
    after an exception, the weights are bit for bit what they were (they are copied, not
    subtracted). Raises KelibError for an unknown group, listing those there are, and for a size
    that is negative or not finite.
    """
    _require_size(size)
    groups = parameter_groups(model)
    if group not in groups:
        raise KelibError(
            f"group {group!r} does not exist in {type(unwrap(model)).__name__}; there are "
            f"{listing(groups)}"
        )
    numbers = {name: number for number, name in enumerate(groups["all"])}
    with _restored(groups[group]):
        for name, weight in groups[group].items():
            entropy = np.random.SeedSequence([seed, numbers[name]]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(entropy[0]))
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            scale = size * float(weight.double().square().mean().sqrt())
            weight.copy_(weight.double() + scale * noise.to(weight.device).double())
        yield


def noise_table(
    model: Any,
    blocks: np.ndarray,
    sizes: Sequence[float],
    seeds: Sequence[int],
    *,
    groups: Sequence[str] | None = None,
    accuracy: Accuracy | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Loss and accuracy under Gaussian weight noise, see :func:`noisy`.

    Args:
        blocks: token ids ``(n, T)`` on which the loss is measured.
        sizes: noise relative to each matrix's root mean square, 0 for none.
        seeds: one draw of noise each.
        groups: of :func:`parameter_groups`; None for all of them.
        accuracy: is given the noisy model and returns a number (column ``accuracy``) or a mapping
            of columns to numbers.

    Returns one row per group, size and seed: group, size, seed, loss (nats per predicted token,
    :func:`kelib.evaluation.heldout_loss`; not finite where the model overflows), the columns of
    ``accuracy``, ``loss_before`` (without noise) and ``loss_increase``, their difference. The model
    is left as it was, also after an exception.

    Raises KelibError for empty or unfit blocks, no size or seed, an unknown group, and as
    :func:`kelib.decomposition.dense_layers`.
    """
    chosen = list(parameter_groups(model)) if groups is None else list(groups)
    if not (chosen and len(sizes) and len(seeds)):
        raise KelibError("groups, sizes and seeds must hold one value each at least")
    ask = _question(model, blocks, accuracy, batch_size)
    before = ask()["loss"]
    rows = []
    for group in chosen:
        for size in sizes:
            for seed in seeds:
                with noisy(model, group, size, seed):
                    rows.append({"group": group, "size": size, "seed": seed, **ask()})
    return _with_increase(rows, before)


def step_table(
    model: Any,
    stepped: Any,
    blocks: np.ndarray,
    sizes: Sequence[float],
    *,
    groups: Sequence[str] = ("all",),
    accuracy: Accuracy | None = None,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Loss and accuracy at ``W + size (W' - W)`` with W' the matrices of ``stepped``.

    ``stepped`` is a later state of ``model``, for instance after :func:`adamw_step`: as that step
    is proportional to the learning rate, size s is the step of s times that rate. Vectors (norms,
    biases) stay those of ``model``. Rows, columns and refusals as :func:`noise_table`, without
    seeds; besides KelibError if the two models differ in their matrices.
    """
    if not (len(groups) and len(sizes)):
        raise KelibError("groups and sizes must hold one value each at least")
    starts, ends = parameter_groups(model), parameter_groups(stepped)
    shapes = [{n: tuple(w.shape) for n, w in held["all"].items()} for held in (starts, ends)]
    if shapes[0] != shapes[1]:
        raise KelibError("the two models differ in their matrices; give two states of one model")
    if unknown := [group for group in groups if group not in starts]:
        raise KelibError(f"group {unknown[0]!r} does not exist; there are {listing(starts)}")
    ask = _question(model, blocks, accuracy, batch_size)
    before = ask()["loss"]
    rows = []
    for group in groups:
        for size in sizes:
            _require_size(size)
            with _restored(starts[group]):
                for name, weight in starts[group].items():
                    end = ends[group][name].to(weight.device).double()
                    weight.copy_(weight.double() + size * (end - weight.double()))
                rows.append({"group": group, "size": size, **ask()})
    return _with_increase(rows, before)


def adamw_step(
    model: Any,
    batch: Any,
    settings: Optimizer,
    learning_rate: float,
    *,
    moments: Moments | None = None,
    micro_batch_size: int | None = None,
) -> Any:
    """A copy of ``model`` after one AdamW step on ``batch``; the model itself is left as it was.

    The step of :class:`kelib.training.Trainer`: clipped to a global gradient norm, weight decay on
    matrices alone, epsilon 1e-8, parameters that require gradients. Departures: no dropout, and
    ``learning_rate`` is taken as it is, without a schedule.

    ``moments`` (see :func:`moments_of`) is the optimizer's state before the step. Without it the
    step is the first of a fresh optimizer, whose update is nearly ``-learning_rate * sign`` of the
    gradient: equal for all weights, so that no concentration can survive it.

    Raises KelibError for an empty batch, for moments of another model and for a model
    without a parameter to train.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise KelibError(f"learning_rate = {learning_rate} must be finite and above 0")
    copied = copy.deepcopy(unwrap(model))
    dense_layers(copied)
    read = read_tokens(copied, batch)
    named = {name: p for name, p in copied.named_parameters() if p.requires_grad}
    if not named:
        raise KelibError("no parameter requires gradients, so that no step can be taken")
    matrices = [p for p in named.values() if p.ndim >= 2]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=settings.betas,
        fused=True,
    )
    for name, state in (moments or {}).items():
        if name not in named or state["exp_avg"].shape != named[name].shape:
            raise KelibError(
                f"moments of {name} do not fit this model, which trains {listing(named)}; take "
                "those of its own optimizer"
            )
        optimizer.state[named[name]] = {
            key: torch.as_tensor(state[key]).detach().clone().to(named[name].device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
    predicted = predicted_tokens(read)
    with evaluating(copied), torch.enable_grad():
        for part in micro_batches(read, micro_batch_size):
            (summed_loss(copied, part) / predicted).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(named.values(), settings.clip))
    if not math.isfinite(norm):
        raise KelibError(f"the gradient norm is {norm} with finite weights; use float32")
    optimizer.step()
    optimizer.zero_grad()
    return copied


def moments_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Moments of an Adam-like optimizer by the name of the parameter, copied."""
    states = optimizer.state
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in states[parameter].items()}
        for name, parameter in unwrap(model).named_parameters()
        if states.get(parameter)
    }


def _require_size(size: float) -> None:
    if not (size >= 0 and math.isfinite(size)):
        raise KelibError(f"size = {size} must be finite and not negative; 0 changes nothing")


@contextmanager
def _restored(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Afterwards the tensors hold, bit for bit, what they held."""
    kept = {name: weight.clone() for name, weight in tensors.items()}
    try:
        yield
    finally:
        for name, weight in tensors.items():
            weight.copy_(kept[name])


def _question(
    model: Any, blocks: np.ndarray, accuracy: Accuracy | None, batch_size: int
) -> Callable[[], dict[str, float]]:
    """A function that gives the loss and the accuracies of the model as it is then."""
    model = unwrap(model)
    blocks = np.asarray(blocks)
    if batch_size < 1:
        raise KelibError(f"batch_size = {batch_size} must be at least 1")
    if blocks.ndim != 2 or len(blocks) == 0 or blocks.shape[1] < 2:
        raise KelibError(
            f"blocks of shape {blocks.shape} hold no token to predict; give token ids (n, T) with "
            "T of 2 at least"
        )
    read_tokens(model, blocks)

    def ask() -> dict[str, float]:
        with evaluating(model):
            row = {"loss": heldout_loss(model, blocks, batch_size)}
            found = {} if accuracy is None else accuracy(model)
        if not isinstance(found, Mapping):
            found = {"accuracy": found}
        if taken := {"group", "size", "seed", "loss"} & found.keys():
            raise KelibError(f"accuracy returned the column {listing(taken)}, which is taken")
        return row | {name: float(value) for name, value in found.items()}

    return ask


def _with_increase(rows: list[dict[str, Any]], before: float) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table["loss_before"] = before
    table["loss_increase"] = table["loss"] - before
    return table
