"""SCALE (2506.16659): normalized gradients, with momentum for the last layer alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_lab.config import ResolvedConfig
from lowrank_lab.optim.chains import Chain
from lowrank_lab.optim.channels import channels_along
from lowrank_lab.optim.checked import Shapes
from lowrank_lab.optim.checks import require
from lowrank_lab.optim.found_inf import zero_if_off_
from lowrank_lab.optim.momentum import MomentumOptimizer, averaged
from lowrank_lab.optim.stacks import Stacks
from lowrank_lab.optim.state_bytes import Weight, two_moments

LEAST = 1e-8  # root mean square by which a gradient is divided


class Scale(MomentumOptimizer):
    """SCALE on the groups with `norm_dim`, and AdamW on all others.

    Each channel of the gradient is divided by its root mean square; nothing is stored for it:

        G ← M ← βM + (1−β)G   (only with a momentum β above 0)
        W ← W − lr · G / max(√mean(G², norm_dim), 1e-8)

    Keys of a group of matrices (default):

    * `norm_dim`: 1, along the inputs of each output: hidden layers and the head. 0, along the rows
      of each column: embeddings (vocabulary×width).
    * `momentum` (0): β. The authors give the head 0.9 and all others none.

    A group without `norm_dim` is AdamW with the learning rate lr · `adam_scale`; the authors put
    the 1-D parameters there. Conventions are those of their code: ε is added before the bias
    correction, and weight decay is decoupled and applied before the update.

    DTensors are updated in shards along dimension 0. With `norm_dim` 1 nothing is communicated,
    with 0 the n sums of squares of an m×n matrix; matrices sharded along dimension 1 are
    redistributed (all-to-all).

    Args:
        params: tensors or groups. `scale_groups` makes them from a model.
        lr: learning rate, absolute.
        betas: decay rates of AdamW's moments.
        eps: added to √v before bias correction.
        weight_decay: decoupled, applied before the update with lr · weight_decay.
        adam_scale: learning rate of AdamW's groups as a multiple of lr; also a key of a group. The
            authors: 1 up to 350m, 5 at 1b, 10 at 7b.

    Raises:
        ValueError: a hyperparameter out of range, an unknown key, or a tensor that is no matrix in
            a group with `norm_dim`.
    """

    marker: ClassVar[str] = "norm_dim"
    group_defaults: ClassVar[dict[str, Any]] = {"momentum": 0.0}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_scale: float = 1.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, adam_scale)

    def check_group(self, group: dict[str, Any]) -> None:
        norm_dim = group["norm_dim"]
        fits = isinstance(norm_dim, int) and not isinstance(norm_dim, bool) and norm_dim in (0, 1)
        require("norm_dim", norm_dim, fits, "0 or 1")
        super().check_group(group)

    def shard_dim(self, group: dict[str, Any], shape: torch.Size) -> int | None:
        return 0

    def state_shapes(self, group: dict[str, Any], shape: tuple[int, ...]) -> Shapes:
        shapes = super().state_shapes(group, shape)
        if self.acts_on(group) and not group["momentum"]:
            del shapes["exp_avg"]
        return shapes

    def update_(self, W: Any, G: Any, state: Any, group: dict[str, Any], step_size: float) -> None:
        channels: Any = channels_along(G, group["norm_dim"], self.placement)
        if group["momentum"]:
            averages = averaged(state, G, group["momentum"])
            if isinstance(G, Tensor):
                (G,) = averages
            else:
                G = W.G = Stacks.of(averages)
        # W ← W − lr · G / max(rms, 1e-8)
        inverse = _normalize_(G, channels)
        if isinstance(G, Tensor):
            zero_if_off_(inverse)
        channels.add_scaled_(W, G, inverse, alpha=-float(group["lr"]))


@Chain
def _normalize_(G: Any, channels: Any) -> Tensor:
    """1 / max(rms, 1e-8) of each channel, by which stacks are multiplied."""
    inverse: Tensor = channels.rms(G).clamp_(min=LEAST).reciprocal_()
    channels.scale_(G, inverse.to(G.dtype))
    return inverse


def scale_states(w: Weight, config: ResolvedConfig) -> int:
    """Bytes: M of the head, nothing for the targets and the embedding, m and v of the rest."""
    if w.role == "head":
        return w.nbytes
    return 0 if w.target or w.role == "embedding" else two_moments(w, config)
