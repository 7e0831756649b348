"""DDP: replicated weights, gradients that are averaged during the backward pass.

torch's DistributedDataParallel wraps `forward`, but the loss is another method of the model. So it
wraps a module whose forward is the loss. The model keeps its names and parameters: checkpoints,
events and optimizers do not depend on the wrapper.

Gradients are views of DDP's buckets, which stay allocated between steps. After the first backward
pass, torch arranges the buckets anew, in the order in which gradients were computed. That pass is
run in advance (`gradients.replicate`), so that a resumed run adds the same numbers in the same
order as one that was not interrupted.

Two cases average their gradients after the backward pass instead (`distributed.all_reduce_mean_`):
updates per layer, which free each gradient at once, and warm starts, which change what is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_lab import distributed
from lowrank_lab.config import ResolvedConfig
from lowrank_lab.distributed.processes import BUCKET_BYTES
from lowrank_lab.models.llama import Llama
from lowrank_lab.training.schedule import warm_start


class Loss(nn.Module):
    """The loss of a model as a module."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


class ReplicatedLoss(DistributedDataParallel):
    """The loss of a model whose gradients are means over all processes after the backward pass.

    Args:
        model: the same in all processes, on its device.
        some_unused: some trained parameters get no gradient.

    Attributes:
        buckets: a gradient of each bucket, whose memory is that of the bucket.
    """

    buckets: Sequence[Tensor] = ()

    def __init__(self, model: Llama, some_unused: bool = False) -> None:
        with warnings.catch_warnings():
            # The new name of `broadcast_buffers` isn't in every torch that is supported.
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(
                Loss(model), broadcast_buffers=False, bucket_cap_mb=BUCKET_BYTES >> 20,
                gradient_as_bucket_view=True, find_unused_parameters=some_unused,
            )  # fmt: skip


def averages_in_backward(config: ResolvedConfig) -> bool:
    """Whether several processes average gradients during the backward pass."""
    several = config.parallel == "ddp" and distributed.world_size() > 1
    return several and not config.per_layer and not warm_start(config)
