"""Dense layers that can be factorised: nn.Linear, subclasses that compute as it does, and Conv1D.

Conv1D is GPT-2's linear layer in transformers; its weight is in×out, transposed.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy

from lowrank_lab.layers.padded import AlignedLinear

NOT_LINEAR = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a Conv1D of transformers; does not import transformers."""
    return isinstance(module, dense_kinds()[1:])


def dense_kinds() -> tuple[type[nn.Module], ...]:
    """nn.Linear, and Conv1D if transformers is in use."""
    source = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear,) if source is None else (nn.Linear, source.Conv1D)


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer."""
    return isinstance(module, dense_kinds())


def dense_weight_of(linear: nn.Module) -> Tensor:
    """The weight (m×n: out×in) of an nn.Linear or Conv1D, not copied."""
    W: Any = linear.weight
    found: Tensor = W.T if is_conv1d(linear) else W
    return found


def why_not(module: nn.Module) -> str | None:
    """Why a module can't be factorised, in a few words; None if it can be.

    Modules other than linear layers need a weight of two or more dimensions.
    """
    kind = type(module).__name__
    own = dict(module.named_parameters(recurse=False))
    if not is_dense(module):
        shapes = ", ".join(f"{name} {_shape(p)}" for name, p in own.items() if p.ndim > 1)
        return f"{kind} is no nn.Linear ({shapes})"
    if hasattr(module, "parametrizations") or "weight" not in own:
        return "its weight is computed by a parametrisation or a hook"
    W: Any = own["weight"]
    if is_lazy(W):
        return "its shape is unknown before the first call"
    if not W.is_floating_point() or type(W.data) not in (Tensor, FakeTensor):
        return f"its weight is {W.dtype} in a {type(W.data).__name__}"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, e.g. by a hook of accelerate"
    base = nn.Linear if isinstance(module, nn.Linear) else type(module)
    others = [*own.keys() - {"weight", "bias"}, *module.buffers(), *module.children()]
    if type(module).forward not in (base.forward, AlignedLinear.forward) or others:
        return f"{kind} has a forward or parameters of its own"
    if W._backward_hooks or W._post_accumulate_grad_hooks:
        return "its weight has tensor hooks"
    if module._state_dict_hooks or module._load_state_dict_pre_hooks:
        return "it has state-dict hooks, which expect its weight"
    return None


def has_matrix(module: nn.Module) -> bool:
    """Whether a module has a matrix and could be a linear layer of another class."""
    if isinstance(module, NOT_LINEAR):
        return False
    if is_dense(module):
        return True
    return any(p.ndim > 1 for p in module.parameters(recurse=False))


def check_weight(W: Tensor) -> None:
    """Refuse a weight that is not real floating point."""
    if not W.is_floating_point():
        raise ValueError(f"linear: a {W.dtype} weight is not allowed; real floating point")


def reset_linear_(W: Tensor | None, bias: Tensor | None, in_features: int) -> None:
    """Draw a weight (m×n) and a bias within ±1/√n, as nn.Linear does, in place."""
    bound = in_features**-0.5
    for t in (W, bias):
        if t is not None:
            nn.init.uniform_(t, -bound, bound)


def _shape(p: Tensor) -> str:
    return "×".join(map(str, p.shape))


def is_fake_or_meta(t: Tensor) -> bool:
    """Whether a tensor has a shape but no values."""
    return t.is_meta or isinstance(t, FakeTensor)
