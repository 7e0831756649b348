"""The LLaMA model in plain torch: RMSNorm, RoPE, SwiGLU, no biases, untied head.

Parameter names equal those of transformers' LlamaForCausalLM, and so do the logits.
Shapes in this file: B = batch, T = sequence, d = hidden, h = heads, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from lowrank_lab.config import Size
from lowrank_lab.device import autocast_dtype
from lowrank_lab.kernels import halves
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.layers.padded import AlignedLinear, padded_width
from lowrank_lab.models.attention import causal_attention
from lowrank_lab.models.compiled import Compiled
from lowrank_lab.models.cross_entropy import FusedLosses, linear_cross_entropy, token_losses
from lowrank_lab.models.fused import fused_weights
from lowrank_lab.models.merged import dense_weights, outputs, rotary_heads, swiglu
from lowrank_lab.models.narrow import narrow_block
from lowrank_lab.models.rms_norm import NORM_EPS, RMSNorm, rms_norm
from lowrank_lab.models.rotary import rotary_tables, rotate


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.hidden_size
        self.num_heads, self.head_size = size.num_heads, d // size.num_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def layers(self) -> tuple[nn.Module, ...]:
        """q, k, v and o."""
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, fused: list[Tensor] | None = None
    ) -> Tensor:
        """x (B, T, d) → (B, T, d); with the `fused` weights of a norm and all layers, the half."""
        if fused is not None:
            return halves.self_attention(x, fused, cos, sin, self.num_heads, NORM_EPS)
        three = self.layers()[:3]
        if (weights := dense_weights(x, three)) is not None:
            heads = rotary_heads(x, weights, cos, sin, self.num_heads)
            mixed = causal_attention(*heads).transpose(1, 2).reshape(x.shape)
        else:
            q, k, v = outputs(x, three)
            mixed = self.mix(q, k, v, cos, sin)
        out: Tensor = self.o_proj(mixed)
        return out

    def mix(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary attention of q, k and v (B, T, d) → (B, T, d)."""
        shape = q.shape
        heads = (*shape[:2], self.num_heads, shape[2] // self.num_heads)
        q, k, v = (t.view(heads) for t in (q, k, v))
        if kernels.takes_heads(q, k, v):
            mixed = kernels.rotary_attention(q, k, v, cos, sin)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = causal_attention(q, k, v).transpose(1, 2)
        return mixed.reshape(shape)


class MLP(nn.Module):
    """SwiGLU; `activates` is false where the gate's layer has the activation (CoLA)."""

    activates = True

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj = AlignedLinear(size.hidden_size, size.intermediate_size, bias=False)
        self.up_proj = AlignedLinear(size.hidden_size, size.intermediate_size, bias=False)
        self.down_proj = AlignedLinear(size.intermediate_size, size.hidden_size, bias=False)

    def layers(self) -> tuple[nn.Module, ...]:
        """gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor, fused: list[Tensor] | None = None) -> Tensor:
        """x (B, T, d) → (B, T, d); with the `fused` weights of a norm and all layers, the half."""
        if fused is not None:
            return halves.mlp(x, fused, NORM_EPS)
        rows, two = self.padding(x), self.layers()[:2]
        weights = dense_weights(x, two) if self.activates else None
        hidden = (
            self.gated(*outputs(x, two, *rows)) if weights is None else swiglu(x, weights, *rows)
        )
        out: Tensor = self.down_proj(hidden)
        return out

    def padding(self, x: Tensor) -> tuple[int, ...]:
        """The further argument of gate and up for an input like x: their padded width, if any."""
        width = padded_width(x, self.gate_proj, self.up_proj, self.down_proj)
        return () if width is None else (width,)  # layers of one's own take x alone

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The input of the down projection."""
        if not self.activates:
            return gate * up
        return kernels.swiglu(gate, up) if kernels.takes(gate, up) else F.silu(gate) * up


class Block(nn.Module):
    """A decoder block; `narrow`: of CoLA layers, it keeps r-wide activations (`narrow_block`)."""

    narrow = False

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden_size)
        self.self_attn = Attention(size)
        self.post_attention_layernorm = RMSNorm(size.hidden_size)
        self.mlp = MLP(size)

        self.compiled: Compiled | None = None  # `_block`, the same for all blocks of a model

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = (self.compiled or _block)(self, x, cos, sin)
        return out


def _block(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if block.narrow:
        return narrow_block(block, x, cos, sin)
    fused, attention, mlp = None, block.self_attn, block.mlp
    if type(attention) is Attention and attention.head_size % kernels.HEAD_SIZE == 0:
        fused = fused_weights(x, block.input_layernorm, attention, attention.layers())
    if fused is not None:
        x = attention(x, cos, sin, fused)
    else:
        x = x + attention(block.input_layernorm(x), cos, sin)
    fused = None
    if type(mlp) is MLP:
        fused = fused_weights(x, block.post_attention_layernorm, mlp, mlp.layers())
    out: Tensor = x + mlp(block.post_attention_layernorm(x)) if fused is None else mlp(x, fused)
    return out


class Decoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab_size, size.hidden_size)
        self.layers = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        self.norm = RMSNorm(size.hidden_size)


class Llama(nn.Module):
    """A LLaMA language model.

    Args:
        size: its dimensions.
        initializer_range: standard deviation of linear and embedding weights.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        size: Size,
        initializer_range: float = 0.02,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.activation_checkpointing = activation_checkpointing
        self.model = Decoder(size)
        self.lm_head = nn.Linear(size.hidden_size, size.vocab_size, bias=False)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._fused: FusedLosses | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)

    def compile_blocks(self) -> None:
        """Compile blocks, last norm and the loss's softmax, each at its first call.

        Blocks with the same kinds of layers share one graph, and one for evaluation.
        """
        kinds: dict[Any, Compiled] = {}
        for block in self.model.layers:
            assert isinstance(block, Block)
            layers = ((name, type(layer)) for name, layer in block.named_modules())
            shapes = (p.shape for p in block.parameters())
            block.compiled = kinds.setdefault((*layers, *shapes), Compiled(_block))
        self.model.norm.compiled = Compiled(rms_norm)
        self._fused = FusedLosses()

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → normalised hidden states (B, T, d)."""
        x: Tensor = self.model.embed_tokens(tokens)
        if dtype := autocast_dtype(x):
            x = x.to(dtype)
        cos, sin = (table.to(x.dtype) for table in self._rotary(tokens.shape[1], x.device))
        for block in self.model.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, V)."""
        out: Tensor = self.lm_head(self.hidden_states(tokens))
        return out

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, float32; full logits are never formed.

        Tokens may have more sequences than targets: the last ones then don't count.
        """
        hidden = self.hidden_states(tokens)[: len(targets)].flatten(0, 1)
        with record_function("loss"):
            return linear_cross_entropy(hidden, self.lm_head.weight, targets.flatten(), self._fused)

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of each target (B, T), float32, without gradients; as `loss`."""
        with torch.no_grad():
            hidden = self.hidden_states(tokens)[: len(targets)].flatten(0, 1)
            losses = token_losses(hidden, self.lm_head.weight, targets.flatten(), self._fused)
        return losses.view(targets.shape)

    def _rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if tables is None or tables[0].shape[0] < length or tables[0].device != device:
            head_size = self.size.hidden_size // self.size.num_heads
            with torch.inference_mode(False):  # the tables are cached, and training may follow
                tables = self._tables = rotary_tables(length, head_size, device)
        return tables[0][:length], tables[1][:length]
