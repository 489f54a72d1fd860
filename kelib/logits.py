"""Next-token entropy (A.4 of the paper) from hidden states, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kelib.attention import softmax_entropy_
from kelib.errors import KelibError

# Logits held at once. Fewer would read the vocabulary projection from memory too often.
CPU_LOGITS, GPU_LOGITS = 2**22, 2**26


def require_head(model: Any) -> None:
    """Raise KelibError if ``model`` has no vocabulary projection."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise KelibError(
            f"{type(model).__name__} has no vocabulary projection, so no next-token entropy; load "
            "it with AutoModelForCausalLM"
        )


def next_token_entropies(
    model: Any, trunk: Any, output_type: type, hidden: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Next-token entropy in nats of ``hidden`` ``(n, d)``, last states of the trunk.

    Yields (rows, entropy of these rows) until all n are done; never are the logits of all rows
    held. Logits are the model's own: its forward function runs with the trunk replaced by one that
    returns the given states, so that scaling, soft-capping, biases and the like are what the model
    makes of them. Entropies are float32, of a float64 model float64.
    """
    words = model.get_output_embeddings().weight.shape[0]
    budget = CPU_LOGITS if hidden.device.type == "cpu" else GPU_LOGITS
    step = max(16, budget // words)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        logits = _logits(model, trunk, output_type, hidden[rows])
        kind = torch.promote_types(logits.dtype, torch.float32)
        yield rows, softmax_entropy_(logits.to(kind))[0]


def _logits(model: Any, trunk: Any, output_type: type, hidden: torch.Tensor) -> torch.Tensor:
    before = trunk.__dict__.get("forward")  # set by those who wrap a module in place

    def forward(*_inputs: Any, **_others: Any) -> Any:
        return output_type(last_hidden_state=hidden[None])

    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    trunk.forward = forward
    try:
        return model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
    finally:
        del trunk.forward
        if before is not None:
            trunk.forward = before
