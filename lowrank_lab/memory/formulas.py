"""Bytes and FLOPs by formula: what a configuration alone tells, without a model or a step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowrank_lab.config import InputError, ResolvedConfig
from lowrank_lab.layers.association import association_flops
from lowrank_lab.memory.breakdown import Breakdown
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.optim.projection import sides

MIB, GB = 2**20, 10**9  # bytes


class Weight(NamedTuple):
    """A weight of the model: its shape, whether the method acts on it, and whether it trains."""

    shape: tuple[int, ...]
    target: bool = False
    trains: bool = True

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)


def by_formula(config: ResolvedConfig) -> Breakdown:
    """Weights, gradients and states of a run, and the activations where `activation_bytes` can.

    Gradients are all of them, or with `per_layer` the largest, and states those of a run that is
    under way, after a warm start.

    Raises:
        InputError: a method of one's own or an optimizer by import path: states aren't known.
    """
    b = element_bytes(config)
    found = list(weights(config))
    sparse = [sparse_entries(config, m, n) for m, n, target in matrices(config) if target]
    gradients = [b * w.numel() for w in found if w.trains]
    indices = 4 * sum(sparse)
    return Breakdown(
        weights=b * sum(w.numel() for w in found) + indices,
        frozen=b * sum(w.numel() for w in found if not w.trains),
        indices=indices,
        gradients=max(gradients) if config.per_layer else sum(gradients),
        optimizer_states=optimizer_state_bytes(config),
        projections=sum(projection_bytes(w, config) for w in found),
        activations=activation_bytes(config) or 0,
    )


def element_bytes(config: ResolvedConfig) -> int:
    """Bytes of an entry of the weights."""
    return 2 if config.precision == "bf16" else 4


def matrices(config: ResolvedConfig) -> Iterator[tuple[int, int, bool]]:
    """The linear layers of the blocks and the head: out features, in features, is it a target."""
    d, i = config.size.hidden_size, config.size.intermediate_size
    shapes = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (i, d), "mlp.up_proj": (i, d), "mlp.down_proj": (d, i)}
    for layer in range(config.size.num_layers):
        for name, (m, n) in shapes.items():
            yield m, n, bool(re.search(config.target, f"model.layers.{layer}.{name}"))
    yield config.size.vocab_size, d, bool(re.search(config.target, "lm_head"))


def weights(config: ResolvedConfig) -> Iterator[Weight]:
    """The weights of a configuration's model, sparse positions left out."""
    for layer in layers(config):
        yield from layer


def layers(config: ResolvedConfig) -> Iterator[list[Weight]]:
    """The weights layer by layer: embeddings, norms, linear layers in the model's order."""
    size, kind, r = config.size, METHODS[config.method].layers, config.rank or 0
    yield [Weight((size.vocab_size, size.hidden_size))]
    for _ in range(2 * size.num_layers + 1):
        yield [Weight((size.hidden_size,))]
    for m, n, target in matrices(config):
        if kind is None or not target:
            yield [Weight((m, n), target)]
            continue
        layer = [Weight((m, r), True), Weight((r, n), True)]
        if kind == "lora":
            layer.append(Weight((m, n), True, trains=False))
        elif kind == "sltrain":
            layer.append(Weight((sparse_entries(config, m, n),), True))
        yield layer


def sparse_entries(config: ResolvedConfig, m: int, n: int) -> int:
    """Entries of SLTrain's sparse part of an m × n weight."""
    sparsity: float = config.method_options.get("sparsity", 0)
    return math.floor(sparsity * m * n)


def activation_bytes(config: ResolvedConfig) -> int | None:
    """Bytes that wait for the backward pass at the end of a forward pass; None if there is no rule.

    There is one for methods with dense weights.
    """
    dense = METHODS[config.method].layers is None
    return dense_activation_bytes(config) if dense else None


def dense_activation_bytes(config: ResolvedConfig) -> int:
    """`activation_bytes` of the configuration's model with dense weights, whatever its method.

    With d the hidden size, i that of the MLP, h heads and L layers, each
    block keeps its input, two normalised inputs, q, k, v, their mixture and what the MLP is added
    to (8 d a token), and 4 i of the MLP; its two norms keep a scalar each, flash attention h sums
    in float32. Checkpointing keeps the inputs of blocks alone. Mixed precision also keeps copies of
    the blocks' weights.
    """
    size, length = config.size, config.sequence_length
    d, i, heads, layers = (
        size.hidden_size, size.intermediate_size, size.num_heads, size.num_layers,
    )  # fmt: skip
    full = config.precision == "fp32"
    c = 4 if full else 2
    of_a_block = c * d if config.activation_checkpointing else c * (8 * d + 4 * i + 2)
    if full and not config.activation_checkpointing:
        of_a_block += 4 * heads
    tokens = config.batch // config.gradient_accumulation * length
    copies = config.precision == "amp-bf16" and not config.activation_checkpointing
    of_weights = c * layers * (4 * d * d + 3 * d * i) * copies
    # the output of the last block and its norm; the batch itself; angles in bfloat16; the loss
    rest = c * (d + 1) * tokens + 16 * config.batch * length
    rest += (0 if full else c * length * (d // heads)) + 4
    return tokens * layers * of_a_block + of_weights + rest


def flops_per_token(config: ResolvedConfig) -> float:
    """FLOPs of a forward and backward pass a token: of matrix products and causal attention.

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
    if kind == "lora" and config.precision != "fp32":  # it forms W in float32 only
        return costs["factors"]
    return min(costs.values())


def optimizer_state_bytes(config: ResolvedConfig) -> int:
    """Bytes of a run's optimizer states: the sum over its weights.

    Raises:
        InputError: a method of one's own or an optimizer by import path: states aren't known.
    """
    return sum(state_bytes(w, config) for w in weights(config) if w.trains)


def state_bytes(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of the states of one weight that trains.

    Raises:
        InputError: as `optimizer_state_bytes`.
    """
    if config.method not in STATE_BYTES or config.optimizer is not None:
        name = "method" if config.optimizer is None else "optimizer"
        raise InputError(name, getattr(config, name), "there is no formula for its states")
    return STATE_BYTES[config.method](w, w.target, element_bytes(config), config)


def embedding_bytes(config: ResolvedConfig) -> int:
    """Bytes of the embedding, the head and their optimizer states.

    Raises:
        InputError: as `optimizer_state_bytes`.
    """
    if config.method not in STATE_BYTES:
        raise InputError("method", config.method, "there is no formula for its states")
    first, *_, last = layers(config)
    b = element_bytes(config)
    return sum(b * w.numel() + state_bytes(w, config) * w.trains for w in (*first, *last))


def projection_bytes(w: Weight, config: ResolvedConfig) -> int:
    """Bytes of them that are stored projections."""
    if not w.target or config.method not in PROJECTING:
        return 0
    return _projections(w, config) * element_bytes(config)


# (weight, whether it is a target, bytes of its entries, resolved configuration) → bytes of states
StateRule = Callable[[Weight, bool, int, ResolvedConfig], int]
SCALAR = 4  # a step count or a norm, float32


def _adamw(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """torch's AdamW: m, v and a step count."""
    return 2 * p.numel() * b + SCALAR


def _projected(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """m and v of the projected gradient, and the projections; plain Adam for the other weights."""
    of_states = 4 if config.state_precision == "fp32" else b
    if not target:
        return 2 * p.numel() * of_states
    m, n = p.shape
    left, right = sides(config.method_options["proj_type"], (m, n))
    rows, columns = (config.method_rank if left else m), (config.method_rank if right else n)
    return 2 * rows * columns * of_states + _projections(p, config) * b


def _projections(p: Weight, config: ResolvedConfig) -> int:
    """Entries of the stored projections of a target."""
    m, n = p.shape
    left, right = sides(config.method_options["proj_type"], (m, n))
    stored: bool = config.method_options.get("store_projection", True)
    return config.method_rank * (m * left + n * right) * stored


def _limited(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """A projected method with the norm that its growth limiter compares with."""
    return _projected(p, target, b, config) + SCALAR * target


def _plain(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """m and v; counts are Python numbers."""
    return 2 * p.numel() * b


def _spam(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """m and v of the entries in the mask, and the mask, a byte an entry."""
    density = config.method_options["density"]
    if density == 1 or p.ndim != 2:
        return 2 * p.numel() * b
    return 2 * int(density * p.numel()) * b + p.numel()


def _stable_spam(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """m, v and the running maximum, norm and squared norm."""
    return 2 * p.numel() * b + 3 * SCALAR


def _muon(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """One momentum for the matrices, AdamW for the rest."""
    return p.numel() * b if target else _adamw(p, target, b, config)


def _adamw_8bit(p: Weight, target: bool, b: int, config: ResolvedConfig) -> int:
    """A byte an entry, a float32 scale a block of 256 and a table of 256, where blocks fit."""
    n = p.numel()
    if n < 4096 or n % 256:
        return 2 * n * b + SCALAR
    return 2 * (n + 4 * (n // 256) + 4 * 256) + SCALAR


PROJECTING = ("galore", "golore", "fira", "apollo", "apollo-mini")
STATE_BYTES: dict[str, StateRule] = {
    **dict.fromkeys(("full-rank", "low-rank", "lora", "relora", "sltrain"), _adamw),
    **dict.fromkeys(("galore", "golore"), _projected),
    **dict.fromkeys(("fira", "apollo", "apollo-mini"), _limited),
    "loro": _plain,
    "spam": _spam,
    "stable-spam": _stable_spam,
    "muon": _muon,
    "adamw-8bit": _adamw_8bit,
}
