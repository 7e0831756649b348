"""Kernels that a training step launches on CUDA, counted without a card.

Operators are counted as torch dispatches them, on tensors without values and on the path of CUDA
(`lowrank_lab.device.cuda_path`). Views and allocations launch nothing and don't count; a fused
operator on many tensors counts once, a compiled graph by what inductor's scheduler leaves of it
(`graph_kernels.py`). `python -m benchmarks.kernels` prints the counts of the loss,
of a block, and of all that is queued between the backward pass and the next step: the gradient norm
with its clipping, the check for NaN and infinity, and the optimizer's update. Weights are bf16;
`--precision amp-bf16`, `--state-precision` and `--stochastic-rounding` count updates of others.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.graph_kernels import GRAPH, counted_graphs
from lowrank_lab.config import SIZES, InputError, RunConfig, Size
from lowrank_lab.device import cuda_path
from lowrank_lab.layers import factorize
from lowrank_lab.methods.build import build
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models import merged as merging
from lowrank_lab.models.cross_entropy import linear_cross_entropy
from lowrank_lab.models.llama import Llama
from lowrank_lab.models.rotary import rotary_tables
from lowrank_lab.techniques.states import unwrapped
from lowrank_lab.training.finite import FiniteCheck, off_where
from lowrank_lab.training.gradients import clip_
from lowrank_lab.training.kinds import set_clock_

COUNTED = ("60m", "130m", "350m", "1b")
# Methods and options; GoLore before its switch and after it.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        "full-rank", "low-rank", "galore", "fira", "apollo", "apollo-mini", "spam", "stable-spam",
        "muon", "loro", "scale", "normuon", "spectron", "frugal", "ldadam",
    )
} | {"golore, SVD": ("golore", {"switch": 10**6}), "golore, random": ("golore", {})}  # fmt: skip
QUIET_STEP = 60  # nothing is due; SPAM clips since step 20

NO_KERNEL = {
    "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "set_", "lift_fresh", "_unsafe_view", "resize_", "is_same_size", "_local_scalar_dense",
    "scalar_tensor", "device", "promote_types",
}  # fmt: skip


class KernelCount(TorchDispatchMode):
    """Counts the operators within its block that launch a kernel.

    Attributes:
        kernels: counts by operator.
        waits: operators for which the host waits: the value of a tensor is read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero")
        if name not in NO_KERNEL and not func.is_view and func.namespace != "profiler":
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())


def loss_kernels(
    size: Size, tokens: int, *, gradients: bool = True, dtype: torch.dtype = torch.bfloat16
) -> KernelCount:
    """Kernels of a loss of so many tokens on CUDA, with its gradients or without."""
    empty = partial(torch.empty, dtype=dtype, device="meta", requires_grad=True)
    hidden, head = empty(tokens, size.hidden_size), empty(size.vocab_size, size.hidden_size)
    targets = torch.empty(tokens, dtype=torch.long, device="meta")
    with cuda_path(), torch.set_grad_enabled(gradients), KernelCount() as count:
        loss = linear_cross_entropy(hidden, head, targets)
        if gradients:
            loss.backward()
    return count


def block_kernels(size: Size, kind: str | None = None, *, merged: bool = True) -> KernelCount:
    """Kernels of one block, forward and backward, in bf16 with 16 × 256 tokens.

    Attention is counted as torch's own operators on tensors without values; on CUDA it is one.

    Args:
        kind: of its layers, of a quarter of the width as rank; None: dense.
        merged: products of q, k, v and of gate, up as one, where that pays.
    """
    with torch.device("meta"):
        model = Llama(size._replace(num_layers=1, vocab_size=8)).bfloat16()
        if kind is not None:
            factorize(model, kind, rank=size.hidden_size // 4)
        x = torch.empty(16, 256, size.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        tables = [t.bfloat16() for t in rotary_tables(256, size.hidden_size // size.num_heads)]
    apart = nullcontext() if merged else patch.object(merging, "pays", lambda *_: False)
    with cuda_path():
        if merged:
            model.pack_(aligned=True)
    with cuda_path(), apart, KernelCount() as count:
        y = model.model.layers[0](x, *tables)
        y.backward(torch.empty_like(y))
    return count


class StepKernels(NamedTuple):
    """Kernels after the backward pass.

    Attributes:
        norm: the global gradient norm, and clipping to it.
        check: the flag that turns an update off. Loss and norm are also copied to the host, by the
            copy engine, 4 bytes each.
        update: the optimizer's step, under the flag.
    """

    norm: KernelCount
    check: KernelCount
    update: KernelCount


def step_kernels(
    method: str,
    size: str,
    options: dict[str, Any],
    *,
    stacked: bool = True,
    compiled: bool = False,
    **fields: Any,
) -> StepKernels:
    """Kernels of a step with nothing due.

    Args:
        method: a name of METHODS.
        size: of the model.
        options: of the method.
        stacked: on CUDA's path; False: as off it, one parameter after the other.
        compiled: with `compile`; stacked.
        fields: further ones of the run's configuration; `precision` is bf16 by default.
    """
    fields = {"precision": "bf16"} | fields
    config = RunConfig(model=size, method=method, method_options=options, corpus="markov", **fields)
    resolved = resolve(config).model_copy(update={"vocab_size": SIZES[size].vocab_size})
    with FakeTensorMode(), cuda_path() if stacked else nullcontext(), counted_graphs():
        model, optimizer = build(resolved)
        for inner in unwrapped(optimizer):
            inner.compile_chains = compiled  # type: ignore[attr-defined]
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        set_clock_(optimizer, QUIET_STEP)
        finite = FiniteCheck(lambda *numbers: (1.0, 1.0))
        for _ in range(2):  # the flag is made in the first step
            counts = StepKernels(KernelCount(), KernelCount(), KernelCount())
            with counts.norm:
                norm = clip_(model.parameters(), clip=1.0)
            with counts.check:
                finite.start(torch.empty(()), norm)
                flag = finite.found_inf()
            with counts.update, off_where(optimizer, flag):
                optimizer.step()
    return counts


@click.command()
@click.option("--precision", default="bf16", type=click.Choice(["fp32", "bf16", "amp-bf16"]))
@click.option("--state-precision", default="same", type=click.Choice(["same", "fp32"]))
@click.option("--stochastic-rounding", is_flag=True)
def main(**fields: Any) -> None:
    """Print the kernels of losses, blocks and updates."""
    usual = fields == {"precision": "bf16", "state_precision": "same", "stochastic_rounding": False}
    dtype = torch.float32 if fields["precision"] == "fp32" else torch.bfloat16
    for name in COUNTED:
        counts = (
            loss_kernels(SIZES[name], 512 * 256, gradients=g, dtype=dtype).total
            for g in (True, False)
        )
        click.echo("{}: {} kernels with gradients, {} without".format(name, *counts))
        for kind in (None, "low-rank", "lora", "cola", "sltrain") if usual else ():
            counts = (block_kernels(SIZES[name], kind, merged=m).total for m in (True, False))
            click.echo(
                "{}, {} block: {} kernels, {} unmerged".format(name, kind or "dense", *counts)
            )
    for label, (method, options) in OPTIMIZERS.items():
        for name in COUNTED:
            try:
                norm, check, now = (c.total for c in step_kernels(method, name, options, **fields))
            except InputError as error:
                click.echo(f"{label}: {error}")
                break
            single = step_kernels(method, name, options, stacked=False, **fields).update.total
            compiled = step_kernels(method, name, options, compiled=True, **fields).update
            click.echo(
                f"{label}, {name}: {norm} kernels for norm and clipping, {check} for the check, "
                f"{now} for the update ({single} one by one; {compiled.total} compiled, of which "
                f"{compiled.kernels[GRAPH]} in graphs)"
            )


if __name__ == "__main__":
    main()
