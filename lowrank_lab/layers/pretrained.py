"""Load factorised models that transformers saved (`save_pretrained`, the Trainer's `save_model`).

`spec.record_` writes the factorisation into config.json as `quantization_config`, where
transformers looks for layers to replace before it loads weights. After `register`,
`from_pretrained` makes the factorised layers. Without it, `from_pretrained` refuses the folder,
because config.json names an attention implementation that transformers doesn't have.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from lowrank_lab.layers.base import FactorizedLinear
from lowrank_lab.layers.lora import LoRALinear
from lowrank_lab.layers.replace import factorize
from lowrank_lab.layers.spec import QUANT_METHOD, REFUSED_ATTENTION, record_


def load_pretrained(folder: Path | str, model_class: Any = None, **options: Any) -> Any:
    """Load a factorised model that transformers saved.

    After the first call, `from_pretrained` of transformers loads such folders too, in this process.

    Args:
        folder: a folder that `save_pretrained` or the Trainer wrote, or a name on the Hub.
        model_class: a class with `from_pretrained`; by default the class that was saved.
        options: passed on to `from_pretrained`.

    Returns:
        The model, in eval mode; its logits are those of the saved model.

    Raises:
        ValueError: the folder lacks weights of a factorised layer or has layers of another model,
            or transformers has no class of the saved name: pass `model_class`.
        ImportError: transformers is not installed.
    """
    register()
    if model_class is None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        name = (config.architectures or [""])[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ValueError(f"model_class: None is not allowed; transformers has no {name!r}")
    return model_class.from_pretrained(folder, **options)


@cache
def register() -> None:
    """Let `from_pretrained` of transformers make factorised layers; a second call does nothing."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(QUANT_METHOD)
    class Factorization(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
        """A `factorization`, as transformers passes it around."""

        def __init__(self, quant_method: str = QUANT_METHOD, **spec: Any) -> None:
            self.quant_method = quant_method  # type: ignore[assignment, unused-ignore]
            self.spec = spec

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": QUANT_METHOD, **self.spec}

    @register_quantizer(QUANT_METHOD)
    class Factorizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
        """Makes factorised layers before the weights are loaded."""

        is_trainable = is_qat_trainable = True

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def update_attn_implementation(self, config: Any) -> Any:
            """The first call with the config: take transformers' default attention."""
            if config._attn_implementation == REFUSED_ATTENTION:
                config._attn_implementation = None
            return config

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            _make_layers_(model, vars(self.quantization_config)["spec"])
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            _finish_(model)
            return model


def _make_layers_(model: Any, spec: dict[str, Any]) -> None:
    """Make the layers of a factorisation in a model without weights."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

    def here(name: str) -> str:
        """The name in this model: the saved one may have had a head where this has none."""
        others = (name, prefix + name, name.removeprefix(prefix))
        return next((other for other in others if other in modules), name)

    groups = [g | {"layers": [here(n) for n in g["layers"]]} for g in spec.get("groups", ())]
    factorize(model, spec | {"groups": groups})


def _finish_(model: Any) -> None:
    """Restore what loading changed in a model; refuse it if weights were missing."""
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            for part, t in [*layer.named_parameters(), *layer.named_buffers()]:
                if not getattr(t, "_is_hf_initialized", False):
                    raise ValueError(f"{name}.{part}: the folder has no weights of this name")
            if isinstance(layer, LoRALinear):  # transformers makes all weights trainable
                layer.base_weight.requires_grad_(False)
    # Not a quantised model: `half` and others, and the Trainer, treat quantised ones differently.
    model.is_quantized = False
    del model.hf_quantizer, model.quantization_method
    for module in model.modules():
        if isinstance(module, nn.Module) and hasattr(module, "config"):
            vars(module.config).pop("_is_quantized", None)
    record_(model)
