"""Full-rank training in bf16 against transformers' LLaMA: tokens per second, peak memory, MFU.

Both keep float32 weights and compute under torch.autocast in bfloat16; ours is `amp-bf16` with
`compile`. Both clip gradients, take a fused AdamW step and fetch loss and norm every step. Each
trains in a process of its own, as in practice: ours keeps freed memory, as `train` does. The note
has the ratio to a peer that keeps freed memory, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import (
    PRODUCTS,
    Row,
    check,
    contestant_apart,
    gemm_rate,
    median,
    peak_bytes,
    ratio,
    relative_error,
    take_turns,
    where_time_goes,
)
from lowrank_lab.config import SIZES, RunConfig, Size
from lowrank_lab.memory.formulas import flops_per_token
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models.llama import Llama
from lowrank_lab.models.rms_norm import NORM_EPS
from lowrank_lab.models.rotary import ROPE_BASE
from lowrank_lab.training.gradients import gradients
from lowrank_lab.training.loop import fast_process
from lowrank_lab.training.step import update_

MODELS = {"1M": SIZES["mini"], "5M": Size(256, 688, 4, 4, 4096), "60m": SIZES["60m"]}
ROUNDS = {"1M": 20, "5M": 15, "60m": 5}
PEER = "transformers + AdamW(fused)"
BATCH, LENGTH = 16, 256  # 4096 tokens
UNTIL_THE_END = ExitStack()  # contexts that end with the process
LR = 1e-4

Shape = tuple[int, int]  # sequences in a batch, tokens in a sequence
Step = Callable[[Tensor, Tensor], float]


def rows(quick: bool = False) -> list[Row]:
    """Speed of each size, then model FLOPs utilisation and peak memory of the largest."""
    models = {"tiny": SIZES["tiny"]} if quick else MODELS
    shape = (2, 32) if quick else (BATCH, LENGTH)
    peak = gemm_rate(torch.bfloat16, quick)
    found = []
    for name, size in models.items():
        ours, theirs = pair(size)
        check_same(ours, theirs, shape)
        found.append(
            speed_row(name, ours, theirs, shape, peak, rounds=2 if quick else ROUNDS[name])
        )
    found.append(utilisation_row(name, found[-1], size, shape[1], peak))
    found.append(peak_row(name, ours, theirs, shape))
    return found


def speed_row(
    name: str, ours: Llama, theirs: nn.Module, shape: Shape, peak: float, rounds: int
) -> Row:
    """Tokens per second; the floor is the model's FLOPs at the measured matmul peak (FLOP/s)."""
    inputs: list[Tensor] = []

    def fresh() -> None:
        inputs[:] = some_tokens(ours.size, shape)

    with (
        contestant_apart(training_apart, ours.size, shape, "ours", True) as mine,
        contestant_apart(training_apart, ours.size, shape, "peer", False) as other,
        contestant_apart(training_apart, ours.size, shape, "peer", True) as keeping,
    ):
        contestants = {"ours": mine, "peer": other, "peer keeping": keeping}
        calls = {who: partial(_on, call, inputs) for who, call in contestants.items()}
        seconds = take_turns(calls, rounds, before=fresh, warm_up=2)
    step, tokens = our_step(ours, shape), shape[0] * shape[1]
    fresh()
    step(*inputs)
    kept = ratio(seconds["peer keeping"], seconds["ours"])
    return Row(
        name=f"training, {name}, full rank, bf16",
        ours=tokens / median(seconds["ours"]),
        peer=tokens / median(seconds["peer"]),
        floor=peak / model_flops(ours.size, shape[1]),
        unit="tokens/s",
        ratio=ratio(seconds["peer"], seconds["ours"]),
        target="≥ 1.3" if name == "60m" else "≥ 1.6",
        peer_name=PEER,
        note=f"{tokens} tokens per step; amp-bf16 with compile; floor: FLOPs at the matmul peak; "
        f"against a peer that keeps freed memory, too: {kept:.2f}; "
        f"our time: {where_time_goes(lambda: step(*inputs), PARTS)}",
    )


def training_apart(size: Size, shape: Shape, who: str, keep: bool) -> Step:
    """The step of one of the two, in a process that keeps freed memory if asked."""
    if keep:
        UNTIL_THE_END.enter_context(fast_process())
    ours, theirs = pair(size)
    return our_step(ours, shape) if who == "ours" else their_step(theirs)


def _on(call: Callable[..., float], inputs: list[Tensor]) -> float:
    return call(*inputs)


PARTS = {
    "attention": ("lowrank_lab::causal_attention",),
    "optimizer": ("optimizer", "clip"),
    "loss": ("loss", "_LinearCrossEntropy"),
    "products": PRODUCTS,
}


def utilisation_row(name: str, speed: Row, size: Size, length: int, peak: float) -> Row:
    """Model FLOP/s as a share of the measured matmul peak."""
    flops = model_flops(size, length)
    assert speed.peer is not None
    return Row(
        name=f"model FLOPs utilisation, {name}, bf16",
        ours=speed.ours * flops / 1e9,
        peer=speed.peer * flops / 1e9,
        floor=peak / 1e9,
        unit="GFLOP/s",
        ratio=speed.ours * flops / peak,
        target="≥ 0.4",
        peer_name=PEER,
        note="6 FLOPs per token and matrix entry (without embeddings), causal attention",
    )


def peak_row(name: str, ours: Llama, theirs: nn.Module, shape: Shape) -> Row:
    """Peak bytes of a step, weights and optimizer states included, from the allocator's events."""
    tokens, targets = some_tokens(ours.size, shape)
    steps = (
        partial(our_step(ours, shape), tokens, targets),
        partial(their_step(theirs), tokens, targets),
    )
    for step in steps:
        step()  # compiles, and creates the optimizer's states
    weights = sum(p.numel() * p.element_size() for p in ours.parameters())
    # Allocated before the step: the weights, and AdamW's two averages of their size.
    mine, others = ((3 * weights + peak_bytes(step)) / 2**20 for step in steps)
    return Row(
        name=f"training peak memory, {name}, {shape[0] * shape[1]} tokens, bf16",
        ours=mine,
        peer=others,
        floor=4 * weights / 2**20,
        unit="MiB",
        ratio=mine / others,
        target="≤ 0.6",
        peer_name=PEER,
        note="allocator events of torch.profiler; floor: weights, gradients and states",
    )


def pair(size: Size) -> tuple[Llama, LlamaForCausalLM]:
    """Our model and transformers' with the same weights, in float32."""
    torch.manual_seed(0)
    ours = Llama(size)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=LENGTH,
        rope_theta=ROPE_BASE,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def some_tokens(size: Size, shape: Shape) -> tuple[Tensor, Tensor]:
    """Random inputs and targets, each of that shape."""
    drawn = torch.randint(size.vocab_size, (shape[0], shape[1] + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def check_same(ours: Llama, theirs: nn.Module, shape: Shape) -> None:
    """Loss and gradients from the same weights and tokens: exact in float32, near in bfloat16."""
    small = (2, min(shape[1], 32))
    for half, limit, piece in ((False, 1e-5, small), (True, 5e-2, shape)):
        tokens, targets = some_tokens(ours.size, piece)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = ours.loss(tokens, targets), their_loss(theirs, tokens, targets)
        for loss in losses:
            torch.autograd.backward(loss)
        check("loss", relative_error(losses[0].detach(), losses[1].detach()), limit / 50)
        theirs_by_name = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            other = theirs_by_name[name]
            assert p.grad is not None
            assert other.grad is not None
            check(f"gradient of {name}", relative_error(p.grad, other.grad), limit)
        ours.zero_grad()
        theirs.zero_grad()


def their_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """transformers' own loss, with targets that are already shifted."""
    loss: Tensor = model(tokens, labels=targets, shift_labels=targets).loss
    return loss


def our_step(model: Llama, shape: Shape) -> Step:
    """One step as `train` takes it, compiled per block."""
    config = RunConfig(batch=shape[0], sequence_length=shape[1], precision="amp-bf16", lr=LR)
    model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> float:
        loss, norm = gradients(model, [(tokens, targets)], config)
        values: list[float] = torch.stack([loss, norm]).tolist()
        update_(model, optimizer, config, 0)
        return values[0]

    return step


def their_step(model: nn.Module) -> Step:
    """The usual training loop around transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = their_loss(model, tokens, targets)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        values: list[float] = torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
        optimizer.zero_grad()
        return values[0]

    return step


def model_flops(size: Size, length: int) -> float:
    """FLOPs of a forward and backward pass per token, full rank."""
    return flops_per_token(resolve(RunConfig(**size._asdict(), sequence_length=length)))
