"""The LLaMA model in plain torch: RMSNorm, RoPE, SwiGLU, no biases, untied head.

Parameter names equal those of transformers' LlamaForCausalLM, and so do the logits.
Shapes in this file: B = batch, T = sequence, d = hidden, h = heads, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from lowrank_lab.config import Size
from lowrank_lab.device import autocast_dtype, prefers_few_kernels
from lowrank_lab.models.block import MLP, Attention, Block, run_block
from lowrank_lab.models.compiled import Compiled
from lowrank_lab.models.cross_entropy import FusedLosses, linear_cross_entropy, token_losses
from lowrank_lab.models.fused import is_plain_linear
from lowrank_lab.models.rms_norm import RMSNorm, rms_norm
from lowrank_lab.models.rotary import rotary_tables


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
            block.compiled = kinds.setdefault((*layers, *shapes), Compiled(run_block))
        self.model.norm.compiled = Compiled(rms_norm)
        self._fused = FusedLosses()

    def pack_(self, aligned: bool) -> None:
        """Store dense q, k and v as one tensor, and gate and up, so that products read it at once.

        Call it on the model's final device. It changes no value, shape or name, and nothing off
        CUDA's path.

        Args:
            aligned: with the zero rows that products in half precision need on CUDA.
        """
        parts: list[Any] = [h for b in self.model.layers for h in (b.self_attn, b.mlp)]
        for half in parts:
            if type(half) in (Attention, MLP) and all(map(is_plain_linear, half.inputs())):
                weights = [p.weight for p in half.inputs()]
                if half.merges and prefers_few_kernels(weights[0]):
                    half.packed.pack_(weights, aligned)

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
