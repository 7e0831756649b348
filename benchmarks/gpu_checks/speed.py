"""Training as `train` does it: tokens per second, utilisation, kernels and waits per step.

Compiled are full rank and low rank at 60m; each costs half a minute of compiling. 350m has the
methods that differ most: full rank and GaLore.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks.counting import counted
from benchmarks.gpu_checks.results import at_most
from benchmarks.gpu_checks.session import ONE_LAYER, Item, Session, relative_error, training_on
from lowrank_lab import RunConfig, train
from lowrank_lab.config import SIZES
from lowrank_lab.device import cuda_path
from lowrank_lab.memory.formulas import flops_per_token
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models import cross_entropy

SEVEN = ("full-rank", "low-rank", "galore", "fira", "apollo", "sltrain", "muon")
COMPILED = ("full-rank", "low-rank")
LARGER = ("full-rank", "galore")
BATCHES = {"60m": 512, "350m": 128}
WARM_UP, TIMED, COUNTED_STEPS = 3, 6, 2
NEVER = 100_000  # steps of a run that is ended early, and of everything periodic in it
MOST_SYNCS, MOST_LOSS_KERNELS = 1, 300


def items(session: Session) -> Iterator[Item]:
    sizes = ("tiny", "tiny") if session.tiny else ("60m", "350m")
    for method in SEVEN[:3] if session.tiny else SEVEN:
        yield f"{sizes[0]}, {method}, eager", partial(speed, session, sizes[0], method, False)
    yield "cross-entropy", partial(cross_entropies, session, sizes[0])
    for method in () if session.tiny else COMPILED:
        yield f"{sizes[0]}, {method}, compiled", partial(speed, session, sizes[0], method, True)
    for method in () if session.tiny else LARGER:
        yield f"{sizes[1]}, {method}, eager", partial(speed, session, sizes[1], method, False)


class Enough(Exception):
    """Ends a run when its steps are counted."""


class Probe:
    """Called after every step of a run: times some steps, counts others, then ends the run."""

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self.seconds = 0.0
        self.counts: Counter[str] = Counter()
        self.uncounted: RuntimeError | None = None
        self._session, self._stack, self._step, self._begun = session, stack, 0, 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        self._step += 1
        if self._step == WARM_UP:
            self._session.synchronize()
            self._begun = time.perf_counter()
        elif self._step == WARM_UP + TIMED:
            self._session.synchronize()
            self.seconds = (time.perf_counter() - self._begun) / TIMED
            self.counts = self._stack.enter_context(counted(self._session))
        elif self._step == WARM_UP + TIMED + COUNTED_STEPS:
            try:
                self._stack.close()
            except RuntimeError as error:  # no counts; what was timed is still true
                self.uncounted = error
            raise Enough


def configuration(session: Session, size: str, method: str, compiled: bool) -> RunConfig:
    """A run in which nothing is due in the steps that are measured."""
    batch, length = (8, 32) if session.tiny else (BATCHES[size], 256)
    return RunConfig(
        model=size, method=method, precision="bf16",
        compile=compiled, vocab_size=session.corpus.vocab_size, batch=batch,
        sequence_length=length, device=session.device.type, repeat=True, steps=NEVER,
        eval_every=NEVER, spectra_every=NEVER, checkpoint_every=NEVER, spectra_layers=ONE_LAYER,
    )  # fmt: skip


def speed(session: Session, size: str, method: str, compiled: bool) -> None:
    """One row of figures per method: seconds, tokens/s, utilisation, kernels and waits."""
    config = configuration(session, size, method, compiled)
    what = f"{size}, {method}, {'compiled' if compiled else 'eager'}"
    folder = session.scratch / "speed" / what.replace(", ", "-")
    with training_on(session.corpus), ExitStack() as stack:
        probe = Probe(session, stack)
        with suppress(Enough):
            train(config, folder, on_step=probe)
    report, tokens = session.results.fact, config.tokens_per_step / probe.seconds
    flops = tokens * flops_per_token(resolve(config))
    session.known[f"step/{size}/{method}"] = probe.seconds
    report(f"{what}: tokens per second", tokens, "tokens/s")
    if peak := session.known.get("matmul_flops"):
        report(f"{what}: utilisation", flops / peak, "of the product's FLOP/s")
    if probe.uncounted is not None:
        raise probe.uncounted
    counts = {name: probe.counts[name] / COUNTED_STEPS for name in probe.counts}
    report(f"{what}: kernels per step", counts.get("kernels", 0.0), "kernels",
           of_optimizer=counts.get("optimizer kernels", 0.0))  # fmt: skip
    report(
        f"{what}: host synchronisations per step", counts.get("syncs", 0.0), "waits",
        at_most(MOST_SYNCS), copies_to_host=counts.get("copies to host", 0.0),
    )  # fmt: skip
    if not compiled:
        report(f"{what}: kernels of the loss", counts.get("loss kernels", 0.0), "kernels",
               at_most(MOST_LOSS_KERNELS))  # fmt: skip


def cross_entropies(session: Session, size: str) -> None:
    """Loss and gradients of a bf16 head: ours, and torch's own where this torch has it."""
    dims = SIZES[size]
    count = 256 if session.tiny else BATCHES[size] * 256
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(shape, generator=generator)
        .mul_(0.05)
        .to(session.device, torch.bfloat16)
        .requires_grad_()
        for shape in ((count, dims.hidden_size), (dims.vocab_size, dims.hidden_size))
    )
    targets = torch.randint(dims.vocab_size, (count,), generator=generator).to(session.device)
    found = {}
    for name, way in ways_of_the_loss().items():
        run = partial(_both_passes, way, hidden, head, targets)
        with cuda_path():
            loss, grads = run()
            taken = session.seconds(run, rounds=3, warm_up=1)
        found[name] = loss, grads
        session.results.fact(f"cross-entropy, {name}: forward and backward", 1e3 * taken, "ms",
                             loss=float(loss), tokens=count)  # fmt: skip
    if "torch" not in found:
        session.results.fact("cross-entropy, torch", "this torch has no F.linear_cross_entropy")
    names = ("hidden states", "head")
    for other in sorted(found.keys() - {"ours"}):
        for what, ours, theirs in zip(names, found["ours"][1], found[other][1], strict=True):
            session.results.fact(
                f"cross-entropy, gradient of {what}, ours and {other}",
                relative_error(ours, theirs), "relative error", at_most(3e-2),
            )  # fmt: skip


def ways_of_the_loss() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Cross-entropies of (hidden, head, targets), by name."""
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": cross_entropy.linear_cross_entropy
    }
    compiled = cross_entropy.FusedLosses()
    ways["ours, compiled"] = partial(cross_entropy.linear_cross_entropy, fused=compiled)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.modules.linear_cross_entropy_options.LinearCrossEntropyOptions()
        ways["torch"] = partial(F.linear_cross_entropy, options=options)
    return ways


def _both_passes(
    way: Callable[..., Tensor], hidden: Tensor, head: Tensor, targets: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = way(hidden, head, targets)
    return loss.detach(), torch.autograd.grad(loss, (hidden, head))
