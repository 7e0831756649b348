"""The published packages, also where bitsandbytes, which two of them import, isn't installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

# package → the module and the class in it that the package exports, under the exported name
EXPORTED = {
    "galore_torch": ("adamw", "AdamW", "GaLoreAdamW"),
    "apollo_torch": ("apollo", "AdamW", "APOLLOAdamW"),
    "fira": ("fira_adamw", "AdamW", "FiraAdamW"),
}


def published(package: str) -> Any:
    """The AdamW of a package.

    galore-torch and apollo-torch import their 8-bit optimizers, and with them bitsandbytes, which
    is larger than all else that a check needs. Without it the one module is imported alone.

    Raises:
        ImportError: the package is not installed.
    """
    module, name, exported = EXPORTED[package]
    try:
        return getattr(importlib.import_module(package), exported)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "bitsandbytes":
            raise
    spec = importlib.util.find_spec(package)
    assert spec is not None
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = bare
    made = getattr(importlib.import_module(f"{package}.{module}"), name)
    setattr(bare, exported, made)
    return made
