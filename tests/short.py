"""Options that make a method's rare events happen within a few steps."""

from lowrank_lab.layers import KINDS
from lowrank_lab.methods.registry import METHODS

# adamw-8bit compiles its step for a quarter of a minute: it has a test file of its own.
QUICK = [name for name in METHODS if name != "adamw-8bit"]
# A kind's initialisation from nothing, and the kinds with a dense weight.
INIT = dict.fromkeys(KINDS, "kaiming") | {"cola": "normal"}
WITH_WEIGHT = [name for name, kind in KINDS.items() if kind.has_dense_weight]
PERIODS = ("update_proj_gap", "merge_every", "update_k", "switch")


def high_rate(method):
    """A high rate; Spectron's bounds the spectral norm of its steps."""
    return 0.1 if method == "spectron" else 1e-2


def usual_rate(method):
    """A rate at which every method trains; defaults come from tuning, and may change."""
    if method == "spectron":
        return high_rate(method)
    dense, ranked = METHODS[method].layers is None, METHODS[method].uses_rank
    return 1e-2 if dense and ranked else 2.5e-3 if dense else 5e-3


def reset_of(method):
    """What resets act on, where a method keeps no averages for its targets."""
    return {} if METHODS[method].target_moments else {"reset_params": "all"}


def short_options(method, period):
    """Refreshes, merges, exact steps and resets every `period` steps, where the method has them."""
    options = METHODS[method].options
    found = {name: period for name in PERIODS if name in options}
    return found | ({"warmup": 2, "grad_accu_steps": 5} if method == "spam" else {})


def per_layer_options(method):
    """Options without which a method refuses updates per layer."""
    return {"error_feedback": False} if "error_feedback" in METHODS[method].options else {}
