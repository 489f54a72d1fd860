"""Which code the numbers of each kind of run rest on, and its digest.

A run made with other code is another run. Code that no stored number rests on (plots, statistics
of finished runs, handing out of runs) is not listed, so that changing it makes nothing run again.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from pathlib import Path

from kelib.config import digest

# Modules of each kind of run whose code its numbers rest on (beside those of its inputs), or one
# function of a module that also holds what no run rests on, with the private ones that it calls.
_ENTROPY = (
    *("architectures", "watching", "jackknife", "entropy", "accumulation", "attention"),
    *("batches", "logits", "measurement", "processes"),
)
_EVALUATION = (
    *("scoring", "requests", "evaluation", "batches"),
    *("metrics:knowledge_score", "metrics:knowledge_by"),
)
_CHANGED = (
    *("interventions", "alternatives", "ffn", "panel"),
    *_ENTROPY,
    *_EVALUATION,
)
_MODEL = (
    *("model_import", "archives", "sources", "parsing", "checkpoints", "packing", "pretrained"),
    *("world", "entries", "dice", "wordings"),
)
_TRAJECTORY = (
    *("trajectory_jobs", "published_jobs", "source_text", "convergence", "corpus"),
    *_MODEL,
    *_ENTROPY,
    *_EVALUATION,
)
_LEARNING_TEXT = ("learning_text", "packed_text", "hub_text", "source_text", *_MODEL)
_KNOWN = (
    *("known", "continued_profile", "fictional", "published_questions", "questions"),
    *("tasks", "task_files", "tables:write_atomically"),
    *_LEARNING_TEXT,
    *_EVALUATION,
)
_MECHANISM = ("mechanism_inputs", "attribution", "decomposition", "sensitivity")
CODE = {
    "corpus": (
        *("jobs:corpus", "sources", "source_text", "parsing", "corpus", "packing"),
        *("world", "entries", "dice", "wordings"),
    ),
    "hub_text": ("hub_text", "parsing"),
    "packed_text": ("packed_text", "hub_text", "parsing", "pretrained"),
    "pretrain": ("jobs:pretrain", "training", "checkpoints"),
    "entropy": ("jobs:entropy", "convergence", "panel", *_ENTROPY),
    "evaluate": ("jobs:evaluate", *_EVALUATION),
    "entities": ("jobs:entities", "entities", "gazetteer", "batches"),
    "intervene": ("jobs:intervene", *_CHANGED),
    "import_model": _MODEL,
    "own_model": ("own_model_jobs", "architectures", *_MODEL),
    "published": (
        *("published_jobs", "source_text", "convergence", "corpus"),
        *_ENTROPY,
        *_EVALUATION,
    ),
    "asked": (
        *("published_questions", "questions", "tasks", "task_files", "scoring"),
        *("requests", "pretrained", "sources", "world", "entries", "dice", "wordings"),
        "tables:write_atomically",
    ),
    "untrained": _TRAJECTORY,
    "trajectory": _TRAJECTORY,
    "learning_text": _LEARNING_TEXT,
    "known": _KNOWN,
    "continued": (
        *("continued_jobs", "learning", "learning_inputs", "launching"),
        *("sharding", "sharded_states", "training", "injection", "continual", "processes"),
        *("architectures", *_KNOWN),
    ),
    "continual": (
        *("jobs:continual", "training", "injection", "continual", "tables:write_atomically"),
        *_CHANGED,
    ),
    # the continual learning that they look into brings all the rest
    "mechanism": ("mechanism", *_MECHANISM),
    "later": ("jobs:later", "retention", *_MECHANISM),
    "reactivation": ("jobs:reactivation", "reactivation", *_MECHANISM),
    "branch": ("branches", "training", "checkpoints"),
}


# Functions that do the runs of a kind, where these are not functions of ``jobs`` named as the kind
# is. All take (settings, inputs, folder, progress), see :mod:`kelib.jobs`.
WORK = {
    "hub_text": "hub_text:keep_documents",
    "packed_text": "packed_text:pack_hub_text",
    "import_model": "model_import:import_model",
    "own_model": "own_model_jobs:own_model",
    "published": "published_jobs:published",
    "asked": "published_questions:asked",
    "untrained": "trajectory_jobs:untrained",
    "trajectory": "trajectory_jobs:trajectory",
    "learning_text": "learning_text:learning_text",
    "known": "known:known",
    "continued": "continued_jobs:continued",
    "mechanism": "mechanism:mechanism",
    "branch": "branches:branch",
}


def work_of(kind: str) -> Callable[..., None]:
    """What does a run of this kind, imported now: with torch, as a rule."""
    module, _, function = WORK.get(kind, f"jobs:{kind}").partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(f"kelib.{module}"), function)
    return found


@functools.cache
def code_digest(kind: str) -> str:
    """Digest of the code a kind of run rests on, without comments, docstrings and layout."""
    return digest({name: _plain_code(name, Path(__file__).parent) for name in CODE[kind]})


def _plain_code(name: str, folder: Path) -> list[str]:
    module, _, function = name.partition(":")
    tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
    parts: list[ast.AST] = _with_private(tree, function) if function else [tree]
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return [ast.dump(part) for part in parts]


def _with_private(tree: ast.Module, function: str) -> list[ast.AST]:
    """A function of a module and the private ones of that module that it calls, also through each
    other, by name.
    """
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    private = {name for name in defined if name.startswith("_")}
    found: dict[str, ast.AST] = {}
    todo = {function}
    while todo:
        name = todo.pop()
        found[name] = defined[name]
        used = {node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name)}
        todo |= (used & private) - found.keys()
    return [found[name] for name in sorted(found)]
