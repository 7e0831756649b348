"""The decoder block: RMSNorm, rotary attention, SwiGLU.

Shapes in this file: B = batch, T = sequence, d = hidden, h = heads.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_lab.config import Size
from lowrank_lab.kernels import halves
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.layers.packed import Packed
from lowrank_lab.layers.padded import AlignedLinear, padded_width
from lowrank_lab.models.attention import causal_attention
from lowrank_lab.models.compiled import Compiled
from lowrank_lab.models.fused import fused_weights, is_plain_linear
from lowrank_lab.models.merged import dense_weights, outputs, rotary_heads, swiglu
from lowrank_lab.models.narrow import narrow_block
from lowrank_lab.models.rms_norm import NORM_EPS, RMSNorm
from lowrank_lab.models.rotary import rotate


class Attention(nn.Module):
    """Rotary causal attention; `merges`: layers with the same input may share a product."""

    merges = True

    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.hidden_size
        self.num_heads, self.head_size = size.num_heads, d // size.num_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)
        self.packed = Packed()  # of q, k and v

    def layers(self) -> tuple[nn.Module, ...]:
        """q, k, v and o."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def inputs(self) -> tuple[nn.Module, ...]:
        """q, k and v, which share their input."""
        return self.layers()[:3]

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, fused: list[Tensor] | None = None,
        packed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, d) → (B, T, d); with the `fused` weights of a norm and all layers, the half.

        `packed` is the storage of the weights of q, k and v, if they have one.
        """
        if fused is not None:
            return halves.self_attention(x, fused, cos, sin, self.num_heads, NORM_EPS)
        if (weights := dense_weights(x, self, packed)) is not None:
            heads = rotary_heads(x, weights, cos, sin, self.num_heads, packed)
            mixed = causal_attention(*heads).transpose(1, 2).reshape(x.shape)
        else:
            q, k, v = outputs(x, self)
            mixed = self.mix(q, k, v, cos, sin)
        out: Tensor = self.o_proj(mixed)
        return out

    def fuses(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether a kernel of the whole half has heads of this size, and these angles fit x."""
        angles = (x.shape[-2], self.head_size // 2)
        return self.head_size % kernels.HEAD_SIZE == 0 and cos.shape == angles == sin.shape

    def mix(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary attention of q, k and v (B, T, d) → (B, T, d)."""
        shape = q.shape
        heads = (*shape[:2], self.num_heads, shape[2] // self.num_heads)
        q, k, v = (t.view(heads) for t in (q, k, v))
        if kernels.takes_heads(q, k, v, cos, sin):
            mixed = kernels.rotary_attention(q, k, v, cos, sin)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = causal_attention(q, k, v).transpose(1, 2)
        return mixed.reshape(shape)


class MLP(nn.Module):
    """SwiGLU; `activates` is false where the gate's layer has the activation (CoLA).

    `merges`: layers with the same input may share a product.
    """

    activates = True
    merges = True

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = AlignedLinear(size.hidden_size, size.intermediate_size, bias=False)
        self.up_proj = AlignedLinear(size.hidden_size, size.intermediate_size, bias=False)
        self.down_proj = AlignedLinear(size.intermediate_size, size.hidden_size, bias=False)
        self.packed = Packed()  # of gate and up

    def layers(self) -> tuple[nn.Module, ...]:
        """gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj

    def inputs(self) -> tuple[nn.Module, ...]:
        """gate and up, which share their input."""
        return self.layers()[:2]

    def forward(
        self, x: Tensor, fused: list[Tensor] | None = None, packed: Tensor | None = None
    ) -> Tensor:
        """x (B, T, d) → (B, T, d); with the `fused` weights of a norm and all layers, the half.

        `packed` is the storage of the weights of gate and up, if they have one.
        """
        if fused is not None:
            return halves.mlp(x, fused, NORM_EPS)
        rows = self.padding(x)
        if packed is not None and len(packed) // 2 != self.width(*rows):
            packed = None  # of another padding: the down projection takes none
        if not self.activates or (weights := dense_weights(x, self, packed)) is None:
            hidden = self.gated(*outputs(x, self, *rows))
        else:
            hidden = swiglu(x, weights, self.width(*rows), packed)
        out: Tensor = self.down_proj(hidden)
        return out

    def padding(self, x: Tensor) -> tuple[int, ...]:
        """The further argument of gate and up for an input like x: their padded width, if any."""
        width = padded_width(x, self.gate_proj, self.up_proj, self.down_proj)
        return () if width is None else (width,)  # layers of one's own take x alone

    def width(self, padded: int | None = None) -> int:
        """Columns of the down projection's input."""
        return int(padded or self.gate_proj.out_features)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The input of the down projection."""
        if not self.activates:
            return gate * up
        if gate.shape == up.shape and kernels.takes(gate, up):
            return kernels.swiglu(gate, up)
        return F.silu(gate) * up


class Block(nn.Module):
    """A decoder block; `narrow`: of CoLA layers, it keeps r-wide activations (`narrow_block`)."""

    narrow = False

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden_size)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = RMSNorm(size.hidden_size)
        self.mlp = MLP(size)

        self.compiled: Compiled | None = None  # `run_block`, the same for all blocks of a model

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        packed = packed_of(self.self_attn), packed_of(self.mlp)
        out: Tensor = (self.compiled or run_block)(self, x, cos, sin, *packed)
        return out


def packed_of(half: Any) -> Tensor | None:
    """The storage of the first layers of a half of a block, if they have one."""
    if type(half) not in (Attention, MLP) or not half.packed:
        return None
    layers = half.inputs()
    return half.packed.of([p.weight for p in layers]) if all(map(is_plain_linear, layers)) else None


def run_block(
    block: Block, x: Tensor, cos: Tensor, sin: Tensor,
    qkv: Tensor | None = None, gate_up: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if block.narrow:
        return narrow_block(block, x, cos, sin)
    fused, attention, mlp = None, block.self_attn, block.mlp
    if type(attention) is Attention and attention.fuses(x, cos, sin):
        fused = fused_weights(x, block.input_layernorm, attention, attention.layers())
    if fused is not None:
        x = attention(x, cos, sin, fused)
    else:
        joint = () if qkv is None else (None, qkv)  # layers of one's own take the first three
        x = x + attention(block.input_layernorm(x), cos, sin, *joint)
    fused = None
    if type(mlp) is MLP and mlp.activates:
        fused = fused_weights(x, block.post_attention_layernorm, mlp, mlp.layers())
    if fused is not None:
        return mlp(x, fused)  # type: ignore[no-any-return]
    joint = () if gate_up is None else (None, gate_up)
    out: Tensor = x + mlp(block.post_attention_layernorm(x), *joint)
    return out
