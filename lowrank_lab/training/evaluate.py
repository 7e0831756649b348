"""The loss on held-out text: of each token, position and document, and on repeated random text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.data.corpus import Corpus
from lowrank_lab.data.splits import Split
from lowrank_lab.models.llama import Llama
from lowrank_lab.techniques.states import switching
from lowrank_lab.training.gradients import autocast

COPIES = 8  # sequences of the copying probe


@contextmanager
def evaluation_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, the weights that the optimizer wants to be evaluated and published.

    Schedule-free optimizers train at one point and average at another; their `eval()` and `train()`
    switch between the two. The training weights come back bit by bit, which `train()` alone would
    round. A no-op for all other optimizers.
    """
    switches = switching(optimizer)
    kept = [p.detach().clone() for p in model.parameters()] if switches else []
    for switch in switches:
        switch.eval()
    try:
        yield
    finally:
        for switch in switches:
            switch.train()
        with torch.no_grad():
            for p, before in zip(model.parameters() if switches else (), kept, strict=True):
                p.copy_(before)


@dataclass(frozen=True)
class Evaluation:
    """Losses in nats of the windows of a split.

    Attributes:
        losses: (windows, sequence_length), float64.
        documents: which document of the split each target belongs to, of the same shape; None if
            it wasn't asked for, or for a corpus without documents.
    """

    losses: np.ndarray
    documents: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Mean over tokens."""
        return float(self.losses.mean())

    @property
    def by_position(self) -> list[float]:
        """Mean of the positions 1, 2–3, 4–7, 8–15 … in the window."""
        starts = position_starts(self.losses.shape[1])
        sums = np.add.reduceat(self.losses.mean(0), starts)
        return rounded(sums / np.diff([*starts, self.losses.shape[1]]))

    @property
    def by_document(self) -> dict[str, list[Any]]:
        """`documents` (numbers in the split), `document_tokens`, `document_losses` (means)."""
        if self.documents is None:
            return {}
        numbers, inverse, tokens = np.unique(
            self.documents, return_inverse=True, return_counts=True
        )
        losses = np.bincount(inverse.ravel(), weights=self.losses.ravel()) / tokens
        return {
            "documents": numbers.tolist(),
            "document_tokens": tokens.tolist(),
            "document_losses": rounded(losses),
        }


def rounded(values: np.ndarray) -> list[float]:
    """Seven significant digits of each, which float32 holds."""
    return [float(f"{value:.7g}") for value in values]


def position_starts(length: int) -> list[int]:
    """The first position (from 0) of each group of positions: 0, 1, 3, 7, 15 … below `length`.

    A last group of less than half its positions joins the one before.
    """
    starts = [2**k - 1 for k in range(length.bit_length())]
    return [start for start in starts if start + (start + 2) // 2 <= length]


def evaluated_windows(
    corpus: Corpus, split: Split, tokens: int, config: ResolvedConfig
) -> np.ndarray:
    """The windows of a split with about so many tokens, the same at each call.

    `eval_windows` "first": those the split begins with; "spread": at equal distances over all of
    it.
    """
    length = config.sequence_length
    windows = corpus.num_windows(split, length)
    count = min(windows, max(1, tokens // length))
    if config.eval_windows == "first":
        return np.arange(count)
    return np.arange(count) * windows // count


def evaluate(
    model: Llama, corpus: Corpus, split: Split, tokens: int, config: ResolvedConfig,
    *, documents: bool = False,
) -> Evaluation:  # fmt: skip
    """The loss of each token in `evaluated_windows`, which several processes share among them.

    Args:
        documents: also find the document of each token, for which the whole split is read.
    """
    length = config.sequence_length
    windows = evaluated_windows(corpus, split, tokens, config)
    count, device = len(windows), next(model.parameters()).device
    losses = torch.zeros(count, length, device=device)
    rank, processes = distributed.rank(), distributed.world_size()
    for start in range(0, count, config.batch):
        own = np.arange(start + rank, min(start + config.batch, count), processes)
        # Every process computes in every turn, as a sharded model needs all of them; and compiled
        # blocks take batches of one size only.
        size = config.batch // processes if config.compile else max(1, len(own))
        indices = windows[np.pad(own, (0, size - len(own)), constant_values=start)]
        inputs, targets = (t.to(device) for t in corpus.windows(split, indices, length))
        losses[own] = _token_losses(model, inputs, targets[: max(1, len(own))], config)[: len(own)]
    distributed.all_reduce_sum_(losses)
    of_documents = corpus.documents(split, windows, length) if documents else None
    return Evaluation(losses.double().cpu().numpy(), of_documents)


def copying_loss(model: Llama, vocab_size: int, config: ResolvedConfig) -> float:
    """Mean loss of a segment of uniformly random tokens when it comes for the second time.

    At least ln(vocabulary) on average for a model that can't copy from its context, near 0 for one
    that can. The same tokens in each call and in all processes.
    """
    half = config.sequence_length // 2
    size = config.batch // distributed.world_size() if config.compile else COPIES
    draw = torch.randint(vocab_size, (COPIES, half), generator=torch.Generator().manual_seed(0))
    repeats = -(-(config.sequence_length + 1) // half)
    text = draw.repeat(1, repeats)[torch.arange(size) % COPIES, : config.sequence_length + 1]
    text = text.to(next(model.parameters()).device)
    losses = _token_losses(model, text[:, :-1], text[:COPIES, 1:], config)
    return float(losses[:, half:].double().mean())


def _token_losses(model: Llama, inputs: Tensor, targets: Tensor, config: ResolvedConfig) -> Tensor:
    training = model.training
    model.eval()
    try:
        with autocast(config, inputs.device):
            return model.token_losses(inputs, targets)
    finally:
        model.train(training)
