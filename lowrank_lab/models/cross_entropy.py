"""Cross-entropy of a linear head, without ever forming the logits of a whole batch.

Shapes in this file: N = tokens, d = hidden, V = vocabulary, n = tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from lowrank_lab.device import autocast_dtype, prefers_few_kernels
from lowrank_lab.kernels import operators as kernels
from lowrank_lab.kernels.head import head_losses, takes_head
from lowrank_lab.models.compiled import Compiled

LOGITS_IN_CHUNK = 1 << 26  # bytes; smaller chunks have more partial gradients to add up
LOGITS_ON_CUDA = 1 << 29  # bytes in a chunk there: few kernels, and each of them large
SMALLEST_CHUNK = 256  # tokens; smaller matrix products cost more time than they save memory
LOGITS_IN_FLIGHT = 1 << 18  # elements in float32 at a time: the size of a core's cache


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, fused: FusedLosses | None = None
) -> Tensor:
    """Mean cross-entropy of softmax(hidden @ weightᵀ) against targets, chunked over tokens.

    hidden (N, d), weight (V, d), targets (N,) → a float32 scalar. Logits are computed in the
    compute dtype, their softmax in float32; gradients are formed chunk by chunk in the forward
    pass.

    Args:
        fused: compiled kernels for the softmax of a chunk, its losses and its gradient; by default,
            torch's operators one after another.
    """
    if not len(hidden):
        raise ValueError("hidden: no tokens are not allowed; at least one")
    if dtype := autocast_dtype(hidden):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    apply: Any = _LinearCrossEntropy.apply
    # `needs_input_grad` doesn't depend on the grad mode, and within `forward` there is none.
    loss: Tensor = apply(hidden, weight, targets, torch.is_grad_enabled(), fused or _losses_)
    return loss


def token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, fused: FusedLosses | None = None
) -> Tensor:
    """The cross-entropy of each token (N,), float32, without gradients.

    Shapes and `fused` as in `linear_cross_entropy`, which is its mean.
    """
    if dtype := autocast_dtype(hidden):
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.no_grad():
        return _passes(hidden, weight, targets, fused or _losses_)[0].squeeze(1)


class FusedLosses:
    """Losses of a chunk of logits in one compiled pass, and another one for their gradient.

    `F.linear_cross_entropy` of torch 2.13 doesn't serve here: it rounds the loss of bfloat16
    inputs to bfloat16, takes one pass over the logits per operator, and isn't compiled.
    """

    def __init__(self) -> None:
        self._losses, self._with_slopes_ = Compiled(_losses), Compiled(_losses_and_slopes_)

    def __call__(self, logits: Tensor, targets: Tensor, losses: Tensor, slopes: bool) -> None:
        """As `_losses_`."""
        # torch would compile again for a single row
        if len(logits) == 1 or kernels.takes(logits):
            return _losses_(logits, targets, losses, slopes)
        for t in (logits, targets):  # one kernel for chunks of all lengths
            torch._dynamo.mark_dynamic(t, 0)
        losses.copy_((self._with_slopes_ if slopes else self._losses)(logits, targets))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (n, V), targets (n, 1) → cross-entropies (n, 1), float32."""
    wide = logits.float()
    return (wide - wide.gather(1, targets)).logsumexp(1, keepdim=True)


def _losses_and_slopes_(logits: Tensor, targets: Tensor) -> Tensor:
    """As `_losses`; turns logits into softmax − one_hot(target)."""
    wide = logits.float()
    wide = wide - wide.gather(1, targets)  # large logits would leave few digits of the difference
    losses = wide.logsumexp(1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device) == targets
    logits.copy_((wide - losses).exp() - hit.float())
    return losses


def _passes(
    hidden: Tensor, weight: Tensor, targets: Tensor,
    losses_: Callable[[Tensor, Tensor, Tensor, bool], None],
    wants_hidden: bool = False, wants_weight: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses (N, 1), and the gradients of their sum in hidden and weight where wanted."""
    if takes_head(hidden, weight):
        losses, dh, dW = head_losses(hidden, weight, targets, wants_hidden or wants_weight)
        return losses, dh if wants_hidden else None, dW if wants_weight else None
    count, vocabulary = hidden.shape[0], weight.shape[0]
    size = LOGITS_ON_CUDA if prefers_few_kernels(hidden) else LOGITS_IN_CHUNK
    fitting = size // (vocabulary * hidden.element_size())
    chunk = max(1, min(count, max(SMALLEST_CHUNK, fitting)))
    grad_hidden = torch.empty_like(hidden) if wants_hidden else None
    grad_weight = None
    losses = hidden.new_empty((count, 1), dtype=torch.float32)
    buffer = hidden.new_empty((chunk, vocabulary))
    for start in range(0, count, chunk):
        h, y = hidden[start : start + chunk], targets[start : start + chunk, None]
        logits = torch.mm(h, weight.T, out=buffer[: h.shape[0]])
        losses_(logits, y, losses[start : start + chunk], wants_hidden or wants_weight)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[start : start + chunk])
        if wants_weight:
            product = logits.T @ h
            if chunk == count:
                grad_weight = product
            elif grad_weight is None:
                grad_weight = product.float()
            else:
                grad_weight += product
    return losses, grad_hidden, grad_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, grad_enabled: bool,
        losses_: Callable[[Tensor, Tensor, Tensor, bool], None],
    ) -> Tensor:  # fmt: skip
        wants_hidden, wants_weight = (grad_enabled and needs for needs in ctx.needs_input_grad[:2])
        losses, grad_hidden, grad_weight = _passes(
            hidden, weight, targets, losses_, wants_hidden, wants_weight
        )
        ctx.count = len(hidden)
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        )
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0] / ctx.count
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def _losses_(logits: Tensor, targets: Tensor, losses: Tensor, slopes: bool) -> None:
    """Fill `losses` (n, 1); with `slopes`, turn logits (n, V) into softmax − one_hot(target).

    On a CPU, works on a few rows at a time, so that their float32 copies stay in a core's cache.
    """
    if kernels.takes(logits):
        return kernels.losses_(logits, targets, losses, slopes)
    in_cache = max(1, LOGITS_IN_FLIGHT // logits.shape[1])
    rows = len(logits) if prefers_few_kernels(logits) else in_cache
    if isinstance(logits, FakeTensor):  # a third piece takes as much memory as the second
        logits, targets, losses = logits[: 2 * rows], targets[: 2 * rows], losses[: 2 * rows]
    pieces = (torch.split(t, rows) for t in (logits, targets, losses))
    for piece, y, loss in zip(*pieces, strict=True):
        wide = piece.float()
        own = wide.gather(1, y)
        if not slopes:
            torch.logsumexp(wide - own, 1, keepdim=True, out=loss)
            continue
        top = wide.amax(1, keepdim=True)
        p = wide.softmax(1)
        # log Σ exp(l) = top + log Σ exp(l − top), and the largest p is 1 / Σ exp(l − top). The
        # logarithm comes last, so that large logits leave its digits.
        torch.sub(top, own, out=loss).sub_(p.amax(1, keepdim=True).log_())
        p.scatter_add_(1, y, p.new_full((1, 1), -1.0).expand_as(y))
        piece.copy_(p)
