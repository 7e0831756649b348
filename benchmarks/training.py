"""Full-rank training in bf16 against transformers' LLaMA: tokens a second, peak memory, MFU.

Both keep float32 weights and compute under torch.autocast in bfloat16; ours is `amp-bf16` with
`compile`. Both clip gradients, take a fused AdamW step and fetch loss and norm every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import (
    Row,
    check,
    gemm_rate,
    median,
    ratio,
    relative_error,
    take_turns,
)
from lowrank_lab.config import SIZES, RunConfig, Size
from lowrank_lab.llama import NORM_EPS, ROPE_BASE, Llama
from lowrank_lab.step import gradients, update_

MODELS = {"1M": SIZES["mini"], "5M": Size(256, 688, 4, 4, 4096), "60m": SIZES["60m"]}
PEER = "transformers + AdamW(fused)"
BATCH, LENGTH = 16, 256  # 4096 tokens
LR = 1e-4

Step = Callable[[Tensor, Tensor], float]


def rows(quick: bool = False) -> list[Row]:
    """Three rows of speed, one of peak memory and one of model FLOPs utilisation."""
    models = {"tiny": SIZES["tiny"]} if quick else MODELS
    batch, length = (2, 32) if quick else (BATCH, LENGTH)
    peak = gemm_rate(torch.bfloat16, 256 if quick else 2048)
    found = []
    for name, size in models.items():
        large = name == "60m"
        rounds = 2 if quick else 5 if large else 20
        ours, theirs = pair(size)
        check_same(ours, theirs, size, batch, length)
        tokens = batch * length
        step, peer_step = our_step(ours, batch, length), their_step(theirs)
        inputs: list[Tensor] = []

        def fresh(size: Size = size, inputs: list[Tensor] = inputs) -> None:
            inputs[:] = some_tokens(size, batch, length)

        seconds = take_turns(
            {
                "ours": lambda step=step, inputs=inputs: step(*inputs),
                "peer": lambda step=peer_step, inputs=inputs: step(*inputs),
            },
            rounds,
            before=fresh,
            warm_up=2,
        )
        per_second = {k: tokens / median(v) for k, v in seconds.items()}
        flops = model_flops(size, length)
        found.append(
            Row(
                name=f"training, {name}, full rank, bf16",
                ours=per_second["ours"],
                peer=per_second["peer"],
                floor=peak / flops,
                unit="tokens/s",
                ratio=ratio(seconds["peer"], seconds["ours"]),
                target="≥ 1.3" if large else "≥ 1.6",
                peer_name=PEER,
                note=f"{tokens} tokens a step; amp-bf16 with compile",
            )
        )
    utilisation = per_second["ours"] * flops / peak
    found.append(
        Row(
            name=f"model FLOPs utilisation, {name}, bf16",
            ours=per_second["ours"] * flops / 1e9,
            peer=per_second["peer"] * flops / 1e9,
            floor=peak / 1e9,
            unit="GFLOP/s",
            ratio=utilisation,
            target="≥ 0.4",
            peer_name=PEER,
            note="6 FLOPs a token and matrix weight (embeddings not counted), causal attention",
        )
    )
    found.append(peak_row(name, ours, theirs, batch, length))
    return found


def peak_row(name: str, ours: Llama, theirs: nn.Module, batch: int, length: int) -> Row:
    """Peak bytes of a step, weights and optimizer states included, from the allocator's events."""
    tokens, targets = some_tokens(ours.size, batch, length)
    peaks = [
        peak_bytes(model, lambda step=step: step(tokens, targets))
        for model, step in ((ours, our_step(ours, batch, length)), (theirs, their_step(theirs)))
    ]
    mine, others = (p / 2**20 for p in peaks)
    return Row(
        name=f"training peak memory, {name}, {batch * length} tokens, bf16",
        ours=mine,
        peer=others,
        floor=16 * sum(p.numel() for p in ours.parameters()) / 2**20,
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
        attn_implementation="sdpa",
    )
    theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def some_tokens(size: Size, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Random inputs and targets, each (batch, length)."""
    drawn = torch.randint(size.vocab_size, (batch, length + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def check_same(ours: Llama, theirs: nn.Module, size: Size, batch: int, length: int) -> None:
    """Loss and gradients from the same weights and tokens: exact in float32, near in bfloat16."""
    for half, limit, shape in ((False, 1e-5, (2, min(length, 32))), (True, 5e-2, (batch, length))):
        tokens, targets = some_tokens(size, *shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = ours.loss(tokens, targets), their_loss(theirs, tokens, targets)
        for loss in losses:
            loss.backward()
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
    """transformers' own loss; it is given targets that are shifted already."""
    loss: Tensor = model(tokens, labels=targets, shift_labels=targets).loss
    return loss


def our_step(model: Llama, batch: int, length: int) -> Step:
    """One step as `train` takes it, compiled per block."""
    config = RunConfig(batch=batch, sequence_length=length, precision="amp-bf16", lr=LR)
    model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> float:
        loss, norm = gradients(model, [(tokens, targets)], config)
        values: list[float] = torch.stack([loss, norm]).tolist()
        update_(model, optimizer, config, 0)
        return values[0]

    return step


def their_step(model: nn.Module) -> Step:
    """The loop that people write around transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = their_loss(model, tokens, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        values: list[float] = torch.stack([loss.detach(), norm]).tolist()
        optimizer.step()
        optimizer.zero_grad()
        return values[0]

    return step


def model_flops(size: Size, length: int) -> float:
    """FLOPs of a forward and backward pass a token: 6 N for N matrix weights, and attention.

    The embedding is a lookup and isn't counted; causal attention is half of the square.
    """
    d = size.hidden_size
    in_layers = size.num_layers * (4 * d**2 + 3 * d * size.intermediate_size)
    return 6 * (in_layers + size.vocab_size * d) + 6 * size.num_layers * length * d


def peak_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Largest number of bytes that weights, states and a step's tensors take together."""
    step()  # compiles, and creates the optimizer's states
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        highest = max(highest, allocated)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 3 * weights + highest  # AdamW's two averages are of the weights' size
