"""The factorisation of a model as JSON: which layers, of which kind and rank; no weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lowrank_lab.config import nearest
from lowrank_lab.layers.base import FactorizedLinear
from lowrank_lab.layers.cola import ColaLinear
from lowrank_lab.layers.lora import LoRALinear
from lowrank_lab.layers.low_rank import LowRankLinear
from lowrank_lab.layers.sltrain import SLTrainLinear

KINDS: dict[str, type[Any]] = {
    "low-rank": LowRankLinear,
    "lora": LoRALinear,
    "sltrain": SLTrainLinear,
    "cola": ColaLinear,
}

VERSION = 1
QUANT_METHOD = "lowrank_lab"  # of the quantization_config in a transformers config.json
# Also in config.json: an attention implementation that transformers doesn't have. Without
# `pretrained.register` it then refuses the folder instead of loading a dense random model.
REFUSED_ATTENTION = "load-with-lowrank_lab.load_pretrained"


def factorization(model: nn.Module) -> dict[str, Any]:
    """The factorised layers of a model by name, as a JSON-serialisable dictionary without weights.

    `factorize(dense_model, factorization(model))` makes the same layers in a dense model of the
    same architecture; the weights then come from `load_state_dict`.

    Returns:
        `version`, and `groups`: layers of the same kind, rank, scale and options, each with the
        list `layers` of their names. No groups if no layer is factorised.
    """
    groups: dict[str, dict[str, Any]] = {}
    names = {kind: name for name, kind in KINDS.items()}
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear) and type(layer) in names:
            facts: dict[str, Any] = {"kind": names[type(layer)], "rank": layer.rank}
            facts |= {"scale": layer.scale}
            if isinstance(layer, SLTrainLinear):
                facts |= {"sparsity": layer.sparsity, "keep_weight": layer.keep_weight}
            groups.setdefault(str(facts), facts | {"layers": []})["layers"].append(name)
    return {"version": VERSION, "groups": list(groups.values())}


def layers_of(spec: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The layers' names in a factorisation, each with its kind, rank, scale and options.

    Raises:
        ValueError: not a factorisation, or of another version.
    """
    if spec.get("version") != VERSION:
        allowed = f"{VERSION}, as `factorization` writes it"
        raise ValueError(f"version: {spec.get('version')!r} is not allowed; {allowed}")
    for group in spec.get("groups", ()):
        facts = {key: value for key, value in group.items() if key != "layers"}
        if missing := {"kind", "rank", "scale"} - facts.keys():
            raise ValueError(f"groups: one has no {min(missing)}")
        if facts["kind"] not in KINDS:
            raise ValueError(
                f"kind: {facts['kind']!r} is not allowed; {nearest(facts['kind'], KINDS)}"
            )
        for name in group.get("layers", ()):
            yield name, facts


def record_(model: nn.Module) -> None:
    """Write the factorisation of a transformers model into its config; remove it if it has none.

    The model's `save_pretrained`, and the Trainer's `save_model`, then store it in config.json.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return
    spec, config = factorization(model), model.config
    if spec["groups"]:
        config.quantization_config = {"quant_method": QUANT_METHOD, **spec}
        config.attn_implementation = REFUSED_ATTENTION
    elif getattr(config, "attn_implementation", None) == REFUSED_ATTENTION:
        del config.quantization_config, config.attn_implementation
