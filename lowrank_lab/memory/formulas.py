"""Bytes and FLOPs by formula: what a configuration alone tells, without a model or a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.layers.association import association_flops
from lowrank_lab.memory.breakdown import Breakdown
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.optim.state_bytes import StateRule, Weight

MIB, GB = 2**20, 10**9  # bytes


def by_formula(config: ResolvedConfig) -> Breakdown:
    """Bytes of weights, gradients and states of a run; activations where there is a rule for them.

    Gradients are those of all weights, or of the largest one with `per_layer`. States are those
    after a warm start.

    Raises:
        InputError: the row of the method has no `state_bytes`, or the optimizer is another one.
    """
    found = list(weights(config))
    sparse = [sparse_entries(config, m, n) for m, n, target in matrices(config) if target]
    gradients = [w.nbytes for w in found if w.trains]
    indices = 4 * sum(sparse)
    return Breakdown(
        weights=sum(w.nbytes for w in found) + indices,
        frozen=sum(w.nbytes for w in found if not w.trains),
        indices=indices,
        gradients=max(gradients) if config.per_layer else sum(gradients),
        optimizer_states=optimizer_state_bytes(config),
        projections=sum(projection_bytes(w, config) for w in found),
        activations=activation_bytes(config) or 0,
    )


def element_bytes(config: ResolvedConfig) -> int:
    """Bytes per entry of the weights."""
    return 2 if config.precision == "bf16" else 4


def matrices(config: ResolvedConfig) -> Iterator[tuple[int, int, bool]]:
    """Out features, in features and whether it is a target, for each linear layer and the head."""
    d, i = config.size.hidden_size, config.size.intermediate_size
    shapes = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (i, d), "mlp.up_proj": (i, d), "mlp.down_proj": (d, i)}
    for layer in range(config.size.num_layers):
        for name, (m, n) in shapes.items():
            yield m, n, bool(re.search(config.target, f"model.layers.{layer}.{name}"))
    yield config.size.vocab_size, d, bool(re.search(config.target, "lm_head"))


def weights(config: ResolvedConfig) -> Iterator[Weight]:
    """The weights of the model, without the positions of sparse entries."""
    for layer in layers(config):
        yield from layer


def layers(config: ResolvedConfig) -> Iterator[list[Weight]]:
    """The weights layer by layer: embeddings, norms, linear layers in the model's order."""
    size, kind, r = config.size, METHODS[config.method].layers, config.rank or 0
    weight = partial(Weight, itemsize=element_bytes(config))
    yield [weight((size.vocab_size, size.hidden_size), role="embedding")]
    for _ in range(2 * size.num_layers + 1):
        yield [weight((size.hidden_size,))]
    *hidden, (vocabulary, d, on_head) = matrices(config)
    for m, n, target in hidden:
        if kind is None or not target:
            yield [weight((m, n), target=target)]
            continue
        layer = [weight((m, r), target=True), weight((r, n), target=True)]
        if kind == "lora":
            layer.append(weight((m, n), target=True, trains=False))
        elif kind == "sltrain" and sparse_entries(config, m, n):
            layer.append(weight((sparse_entries(config, m, n),), target=True))
        yield layer
    yield [weight((vocabulary, d), target=on_head, role="head")]


def sparse_entries(config: ResolvedConfig, m: int, n: int) -> int:
    """Entries of SLTrain's sparse part of an m × n weight."""
    sparsity: float = config.method_options.get("sparsity", 0)
    return math.floor(sparsity * m * n)


def activation_bytes(config: ResolvedConfig) -> int | None:
    """Bytes kept for the backward pass at the end of a forward pass; None for factorised layers.

    CoLA has a rule: with r the rank, a block keeps A x and silu(A x) of its seven layers (14 r
    entries per token) beside what a dense one keeps; without the silu of its MLP at most 3 i for
    that. With `recompute` (CoLA-M) it keeps two inputs of its norms and silu(A x) alone, 2 d + 7 r.
    """
    kind = METHODS[config.method].layers
    if kind is None:
        return dense_activation_bytes(config)
    whole = kind == "cola" and all(target for *_, target in list(matrices(config))[:-1])
    return _cola_activation_bytes(config) if whole else None


def dense_activation_bytes(config: ResolvedConfig) -> int:
    """`activation_bytes` of the configuration's model with dense weights, whatever its method.

    With d the hidden size, i that of the MLP and h heads, a block keeps per token its input, two
    normalised inputs, q, k, v, their mixture and the input of the MLP (8 d entries), and 4 i of the
    MLP; 3 i where float32 has the kernels of a CPU (`kernels.operators.swiglu`). Each of its two
    norms keeps a scalar, flash attention h float32 sums. With checkpointing a block keeps its input
    alone. Mixed precision also keeps copies of the blocks' weights.
    """
    d, i = config.size.hidden_size, config.size.intermediate_size
    entries = 8 * d + _of_mlp(config) * i + 2
    return _kept_bytes(config, entries, copied=4 * d * d + 3 * d * i)


def _cola_activation_bytes(config: ResolvedConfig) -> int:
    d, i, r = config.size.hidden_size, config.size.intermediate_size, config.rank or 0
    options = config.method_options
    if options.get("recompute"):
        return _kept_bytes(config, 2 * d + 7 * r, copied=2 * r * d, sums=False)
    of_mlp = 3 if options.get("only_lr_act") else _of_mlp(config)
    return _kept_bytes(config, 8 * d + of_mlp * i + 2 + 14 * r, copied=r * (11 * d + 3 * i))


def _of_mlp(config: ResolvedConfig) -> int:
    """How many tensors as wide as the MLP it keeps."""
    on_cpu = config.precision == "fp32" and config.device != "cuda"
    return 3 if on_cpu and kernels.available() else 4


def _kept_bytes(config: ResolvedConfig, entries: int, copied: int, sums: bool = True) -> int:
    """Bytes kept by all blocks and the rest of the model, for the tokens of a piece.

    Args:
        entries: per token and block; with activation checkpointing they are the hidden size.
        copied: entries of a block's weights that mixed precision copies.
        sums: whether float32 attention keeps its sums.
    """
    size, length = config.size, config.sequence_length
    d, heads, layers = size.hidden_size, size.num_heads, size.num_layers
    full, whole = config.precision == "fp32", not config.activation_checkpointing
    c = 4 if full else 2
    of_a_block = c * (entries if whole else d)
    size_of_head = d // heads  # small ones have a kernel on a CPU in half precision, too
    small = size_of_head <= kernels.largest_bf16_head() and size_of_head % kernels.HEAD_SIZE == 0
    on_cpu = config.device != "cuda" and kernels.available()
    if (full or (small and on_cpu)) and whole and sums:
        of_a_block += 4 * heads
    tokens = config.batch // config.gradient_accumulation * length
    of_weights = c * layers * copied * (config.precision == "amp-bf16" and whole)
    # the output of the last block and its norm; the batch itself; angles in bfloat16; the loss
    rest = c * (d + 1) * tokens + 16 * config.batch * length
    rest += (0 if full else c * length * (d // heads)) + 4
    return tokens * layers * of_a_block + of_weights + rest


def flops_per_token(config: ResolvedConfig) -> float:
    """FLOPs per token of a forward and backward pass: matrix products and causal attention.

    6 for each entry of a dense matrix (the embedding is a lookup, the head a matrix); for factors
    those of the order of products that their layers take, which the tokens of a piece decide.
    Optimizers and what activation checkpointing computes again aren't counted.
    """
    size, kind = config.size, METHODS[config.method].layers
    tokens = config.tokens_per_step // config.gradient_accumulation
    total = 6 * size.num_layers * config.sequence_length * size.hidden_size * tokens
    for m, n, target in matrices(config):
        total += _layer_flops(config, kind if target else None, tokens, m, n)
    return total / tokens


def _layer_flops(config: ResolvedConfig, kind: str | None, tokens: int, m: int, n: int) -> int:
    """FLOPs of a forward and backward pass of an m×n layer, of the association that it takes."""
    if kind is None:
        return 6 * tokens * m * n
    costs = association_flops(tokens, m, n, config.rank or 0, base=kind == "lora")
    if kind == "sltrain":  # S is a part of the weight, and its gradient one of the weight's
        return costs["gradient"]
    if kind == "cola" or (kind == "lora" and config.precision != "fp32"):  # these form no W
        return costs["factors"]
    return min(costs.values())


def optimizer_state_bytes(config: ResolvedConfig) -> int:
    """Bytes of a run's optimizer states: the sum over its weights.

    Raises:
        InputError: as `by_formula`.
    """
    return sum(state_bytes(w, config) for w in weights(config) if w.trains)


def state_bytes(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of the optimizer states of one weight that trains.

    Raises:
        InputError: as `by_formula`.
    """
    return _rule(config)(w, config)


def projection_bytes(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of stored projections among `state_bytes`."""
    rule = METHODS[config.method].projection_bytes
    return 0 if rule is None else rule(w, config)


def embedding_bytes(config: ResolvedConfig) -> int:
    """Bytes of the embedding, the head and their optimizer states.

    Raises:
        InputError: as `by_formula`.
    """
    rule = _rule(config)
    first, *_, last = layers(config)
    return sum(w.nbytes + rule(w, config) * w.trains for w in (*first, *last))


def _rule(config: ResolvedConfig) -> StateRule:
    """The rule for the states, from the row of the method."""
    row = METHODS.get(config.method)  # records are read where their method isn't registered, too
    if config.optimizer is not None:
        raise InputError("optimizer", config.optimizer, "there is no formula for its states")
    if row is None or row.state_bytes is None:
        raise InputError("method", config.method, "there is no formula for its states")
    rule = row.in_precision(config.state_precision).state_bytes
    assert rule is not None
    return rule
