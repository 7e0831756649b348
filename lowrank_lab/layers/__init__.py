"""Linear layers with a factorised weight, W = scale · B A (+ W₀ or S), for any model; and CoLA's.

`factorize` replaces the linear layers of a model, and `to_dense_` brings them back; each kind of
layer is one file.
"""

from lowrank_lab.layers.balance import Balance, balance, imbalance, product_singular_values
from lowrank_lab.layers.base import FactorizedLinear, require_dense_weights
from lowrank_lab.layers.cola import ColaLinear
from lowrank_lab.layers.lora import (
    LoRALinear,
    current_name,
    generator_of,
    lora_layers,
    merge_,
    train_dense_,
)
from lowrank_lab.layers.low_rank import LowRankLinear
from lowrank_lab.layers.replace import factorize, to_dense_
from lowrank_lab.layers.skipped import skipped_layers
from lowrank_lab.layers.sltrain import SLTrainLinear
from lowrank_lab.layers.spec import KINDS, factorization
from lowrank_lab.layers.svd import dense_singular_values, truncated_svd
from lowrank_lab.layers.targets import target_layers

__all__ = [
    "KINDS",
    "Balance",
    "ColaLinear",
    "FactorizedLinear",
    "LoRALinear",
    "LowRankLinear",
    "SLTrainLinear",
    "balance",
    "current_name",
    "dense_singular_values",
    "factorization",
    "factorize",
    "generator_of",
    "imbalance",
    "lora_layers",
    "merge_",
    "product_singular_values",
    "require_dense_weights",
    "skipped_layers",
    "target_layers",
    "to_dense_",
    "train_dense_",
    "truncated_svd",
]
