"""kelib: measure, test and extend the knowledge entropy of language models.

Names are loaded when first used, so that ``import kelib`` costs nothing and drawing needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "measure_entropy": "entropy",
    "EntropyMeasurement": "entropy",
    "shannon_entropy": "entropy",
    "self_test": "ffn",
    "register_architecture": "ffn",
    "plasticity_panel": "panel",
    "EntropyCallback": "monitor",
    "resuscitate": "interventions",
    "score_continuations": "scoring",
    "KelibError": "errors",
    "load_profile": "config",
    "Study": "study",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kelib' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kelib.{_PUBLIC[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value
