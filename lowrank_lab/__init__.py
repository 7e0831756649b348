"""Methods that pretrain language models with less memory: run, inspect and compare them."""

from lowrank_lab.commands.interrupts import exit_quietly_until_handled

exit_quietly_until_handled()  # before torch, which takes seconds to import

# ruff: noqa: E402
import importlib
from typing import TYPE_CHECKING, Any

from lowrank_lab import optim
from lowrank_lab.analysis.model_spectra import spectra
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.cpu.products import fast_products
from lowrank_lab.layers import factorization, factorize, to_dense_
from lowrank_lab.layers.pretrained import load_pretrained
from lowrank_lab.methods.own import load_own_methods, register_method
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.runs.run import Run, load, load_runs
from lowrank_lab.techniques import refactorize_, reset_momentum_
from lowrank_lab.training.errors import TrainingError

if TYPE_CHECKING:
    from lowrank_lab.planning.simulate import simulate as simulate_memory
    from lowrank_lab.training.loop import train

__version__ = "0.1.0"  # read by pyproject.toml; CITATION.cff repeats it

__all__ = [
    "METHODS",
    "InputError",
    "Run",
    "RunConfig",
    "TrainingError",
    "__version__",
    "factorization",
    "factorize",
    "fast_products",
    "load",
    "load_pretrained",
    "load_runs",
    "optim",
    "refactorize_",
    "register_method",
    "reset_momentum_",
    "simulate_memory",
    "spectra",
    "to_dense_",
    "train",
]

load_own_methods()


# Imported at their first use: together they take 0.07 s.
_LATER = {
    "simulate_memory": ("lowrank_lab.planning.simulate", "simulate"),
    "train": ("lowrank_lab.training.loop", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, own_name = _LATER[name]
    globals()[name] = getattr(importlib.import_module(place), own_name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
