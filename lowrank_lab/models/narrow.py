"""CoLA-M (2502.10940): a block of CoLA layers that keeps their r-wide activations alone.

For the backward pass it keeps two inputs of its norms (d entries per token each) and silu(A x) of
its seven layers (7 r). Everything else is computed again, from these, by the same operations:
gradients are the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowrank_lab.models.merged import inner_products


def narrow_block(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The output of a block with CoLA layers only; arguments as for `block.run_block`."""
    attention, mlp = block.self_attn, block.mlp

    def narrow_inputs(x: Tensor) -> tuple[Tensor, ...]:
        return narrowed(block.input_layernorm(x), attention)

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        wide = (p.widen(h) for p, h in zip(layers, (q, k, v), strict=True))
        out: Tensor = attention.o_proj.narrow(attention.mix(*wide, cos, sin))
        return out

    def narrow_hidden(x: Tensor) -> tuple[Tensor, ...]:
        return narrowed(block.post_attention_layernorm(x), mlp)

    def gated(g: Tensor, u: Tensor) -> Tensor:
        rows = mlp.padding(g)
        hidden = mlp.gated(mlp.gate_proj.widen(g, *rows), mlp.up_proj.widen(u, *rows))
        out: Tensor = mlp.down_proj.narrow(hidden)
        return out

    # widening and adding keep nothing but what the checkpoints keep anyway
    x = x + attention.o_proj.widen(_kept(mixed, *_kept(narrow_inputs, x)))
    out: Tensor = x + mlp.down_proj.widen(_kept(gated, *_kept(narrow_hidden, x)))
    return out


def narrowed(x: Tensor, half: Any) -> tuple[Tensor, ...]:
    """silu(A x) of each layer of a half with the input x."""
    inner = inner_products(x, half)
    return tuple(p.narrow(x) for p in half.inputs()) if inner is None else tuple(map(F.silu, inner))


def _kept(function: Any, *inputs: Tensor) -> Any:
    """The result of a function, of whose backward pass the inputs alone are kept."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
