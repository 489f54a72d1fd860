"""Tiny random models of every architecture to measure, and a float64 reference.

The reference knows nothing of kelib: it runs one unpadded sequence at a time through a float64 copy
with eager attention, takes the input of each feed-forward layer and writes the layer's formula down
by hand. (The norms of transformers go through float32 whatever the dtype; nothing else does.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers

WORDS = 97
COMMON: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": WORDS,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 40,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = COMMON | {"intermediate_size": 40, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 5}
GEMMA = LLAMA | {"head_dim": 8}
QWEN_MOE = LLAMA | {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
# (name in transformers, settings); the shapes of two layers may differ within a model
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("Olmo", LLAMA),
    "olmo2": ("Olmo2", LLAMA),
    "llama": ("Llama", LLAMA | {"mlp_bias": True}),
    "gpt_neox": ("GPTNeoX", COMMON | {"intermediate_size": 40}),
    "gpt2": ("GPT2", GPT2),
    "opt": ("OPT", COMMON | {"ffn_dim": 40, "word_embed_proj_dim": 16}),
    "phi3": ("Phi3", LLAMA | SLIDING),
    "gemma": ("Gemma", GEMMA),
    "gemma2": (
        "Gemma2",
        GEMMA
        | SLIDING
        | {
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | SLIDING
        | {
            "query_pre_attn_scalar": 12,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", GEMMA),
    "mistral": ("Mistral", LLAMA | SLIDING),
    "granite": ("Granite", LLAMA | {"logits_scaling": 0.5}),  # for the scaling of its logits
    "olmoe": ("Olmoe", LLAMA | {"num_experts": 6, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        QWEN_MOE | {"shared_expert_intermediate_size": 28, "norm_topk_prob": True},
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"mlp_only_layers": [0], "head_dim": 8}),
}
# Measured as well, but Eq. 3 does not hold (sinks), or no second reference is written down here.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", GEMMA | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "Glm4Moe",
        GEMMA
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        "Llama4Text",
        GEMMA | {"num_local_experts": 4, "intermediate_size_mlp": 40},
    ),
}
MIXTURES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")


def build(name: str, **changes: Any) -> Any:
    """A float32 model of ``name`` in evaluation mode; the same weights at every call."""
    family, settings = (ZOO | MORE)[name]
    config = getattr(transformers, f"{family}Config")(**settings | changes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # biases too: they start at 0, where leaving them out would go unnoticed
            if parameter.dim() > 1 or "bias" in parameter_name:
                parameter.normal_(0, 0.3)
    return model.eval()


def sequences_of(lengths: Sequence[int]) -> list[list[int]]:
    """Arbitrary token sequences of these lengths."""
    random = np.random.default_rng(3)
    return [random.integers(3, WORDS, size=length).tolist() for length in lengths]


def padded(sequences: Sequence[Sequence[int]], side: str) -> dict[str, torch.Tensor]:
    """One batch, padded on ``side``."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def relative_gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest number of ``other``."""
    return float((one - other).abs().max() / other.abs().max())


@contextmanager
def _softmax_in_float64() -> Iterator[None]:
    """Where transformers asks for a float32 softmax, the reference does without."""
    plain = torch.nn.functional.softmax

    def softmax(x: torch.Tensor, dim: int = -1, dtype: Any = None, **_others: Any) -> torch.Tensor:
        return plain(x.double(), dim=dim)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = plain


class Reference:
    """What a measurement should find: means per layer by definition, entropies."""

    def __init__(self, name: str, sequences: Sequence[Sequence[int]], model: Any = None) -> None:
        exact = build(name, attn_implementation="eager")
        if name in MIXTURES:
            exact.set_experts_implementation("eager")
        if model is not None:
            exact.load_state_dict(model.state_dict())
        exact.double()
        blocks = _blocks(exact)
        found: list[dict[str, list[np.ndarray]]] = []
        attention, words = [], []
        for sequence in sequences:
            inputs: dict[int, torch.Tensor] = {}
            handles = [
                getattr(block, "fc1" if name == "opt" else "mlp").register_forward_pre_hook(
                    lambda _, given, layer=layer, inputs=inputs: inputs.__setitem__(layer, given[0])
                )
                for layer, block in enumerate(blocks)
            ]
            with torch.no_grad(), _softmax_in_float64():
                output = exact(input_ids=torch.tensor([sequence]), output_attentions=True)
                variants = [
                    _layer(name, block, inputs[layer].reshape(len(sequence), -1))
                    for layer, block in enumerate(blocks)
                ]
            for handle in handles:
                handle.remove()
            found.append({key: [variant[key] for variant in variants] for key in variants[0]})
            rows = [_entropy(weights[0]).mean(-1) for weights in output.attentions]
            attention.append(torch.stack(rows).numpy())
            words.append(float(_entropy(output.logits[0].softmax(-1)).mean()))
        self.coefficients = {
            key: [
                np.mean([one[key][layer] for one in found], axis=0) for layer in range(len(blocks))
            ]
            for key in found[0]
        }
        self.attention = np.mean(attention, axis=0)
        self.next_token = float(np.mean(words))

    def knowledge(self, definition: str) -> np.ndarray:
        """Entropy per layer."""
        shares = [torch.tensor(mean / mean.sum()) for mean in self.coefficients[definition]]
        return np.array([float(_entropy(share)) for share in shares])


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0.0).sum(-1)


def _blocks(model: Any) -> Any:
    inner = model.base_model
    inner = getattr(inner, "decoder", inner)
    return inner.h if hasattr(inner, "h") else inner.layers


def _layer(name: str, block: Any, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Means over tokens of one layer under every definition, from its input."""
    parts = _parts(name, block, x)
    norms = torch.cat([norm for *_, norm in parts])

    def mean(index: int, change: Any, routed: bool = True) -> np.ndarray:
        columns = [
            change(part[index]) * (part[2][:, None] if routed else (part[2] != 0).double()[:, None])
            for part in parts
        ]
        return torch.cat(columns, dim=1).mean(0)

    result = {
        "absolute": mean(0, torch.abs),
        "relu": mean(1, torch.abs),
        "contribution": mean(0, torch.abs) * norms,
        "unrouted": mean(0, torch.abs, routed=False),
        "squared": torch.cat([(c * r[:, None]) ** 2 for c, _, r, _ in parts], dim=1).mean(0),
    }
    return {key: value.numpy() for key, value in result.items()}


def _parts(
    name: str, block: Any, x: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(coefficients, with ReLU, weight of each token, norms of V) of each expert."""
    always = torch.ones(len(x), dtype=torch.float64)
    relu = torch.relu
    if name == "opt":
        keys = x @ block.fc1.weight.T + block.fc1.bias
        return [(relu(keys), relu(keys), always, block.fc2.weight.norm(dim=0))]
    mlp = block.mlp
    if name in ("gpt2", "gpt_neox"):
        up, down = (
            (mlp.c_fc.weight, mlp.c_proj.weight.T)
            if name == "gpt2"
            else (mlp.dense_h_to_4h.weight.T, mlp.dense_4h_to_h.weight)
        )
        bias = mlp.c_fc.bias if name == "gpt2" else mlp.dense_h_to_4h.bias
        keys = x @ up + bias
        return [(mlp.act(keys), relu(keys), always, down.norm(dim=0))]
    if hasattr(mlp, "experts"):
        return _experts(name, mlp, x)
    if name == "phi3":
        weight = mlp.gate_up_proj.weight
        half = len(weight) // 2
        gate, up, act = x @ weight[:half].T, x @ weight[half:].T, mlp.activation_fn
    else:
        gate, up, act = mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn
    return [(act(gate) * up, relu(relu(gate) * up), always, mlp.down_proj.weight.norm(dim=0))]


def _experts(name: str, mlp: Any, x: torch.Tensor) -> list[Any]:
    experts = mlp.experts
    odds = (x @ mlp.gate.weight.T).exp()
    odds = odds / odds.sum(-1, keepdim=True)
    chosen = odds.topk(2, dim=-1).indices
    weights = torch.zeros_like(odds).scatter(1, chosen, odds.gather(1, chosen))
    if name in ("mixtral", "qwen2_moe"):
        weights = weights / weights.sum(-1, keepdim=True)
    parts = []
    for expert, (keys, values) in enumerate(
        zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ):
        gate, up = (x @ keys.T).chunk(2, dim=-1)
        relu = torch.relu(torch.relu(gate) * up)
        parts.append((experts.act_fn(gate) * up, relu, weights[:, expert], values.norm(dim=0)))
    if name == "qwen2_moe":
        shared = mlp.shared_expert
        gate, up = x @ shared.gate_proj.weight.T, x @ shared.up_proj.weight.T
        weight = torch.sigmoid(x @ mlp.shared_expert_gate.weight.T)[:, 0]
        relu = torch.relu(torch.relu(gate) * up)
        parts.append((shared.act_fn(gate) * up, relu, weight, shared.down_proj.weight.norm(dim=0)))
    return parts
