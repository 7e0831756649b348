"""What travels between the processes of an FSDP2 run, counted from a step on fake tensors."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_lab.config import RunConfig
from lowrank_lab.device import cuda_path
from lowrank_lab.memory.breakdown import tensor_bytes
from lowrank_lab.memory.tracker import COLLECTIVES
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.fsdp import check_world_size, fake_rank
from lowrank_lab.planning.simulate import Stepping

# Times that a message passes through a process, by the ring algorithms: a share (n − 1)/n of it.
PASSES = {"all reduce": 2, "all gather": 1, "reduce scatter": 1, "all to all": 1}


def traffic(config: RunConfig, world_size: int) -> pd.DataFrame:
    """Bytes that one process sends in each kind of step, by collective operation.

    Counted by ring algorithms: an all-gather or a reduce-scatter of s bytes among n processes sends
    s (n − 1)/n, an all-reduce twice that; a broadcast counts in full. Columns: step, collective,
    count, bytes.

    Raises:
        InputError: the configuration, or a world size that doesn't suit it.
    """
    resolved = check_world_size(resolve(config), world_size).override(compile=False)
    rows = []
    with fake_rank(world_size, 0), cuda_path(), FakeTensorMode():
        stepping = Stepping(resolved, torch.device("cpu"), "cuda", in_shards=True)
        for step, run in stepping.kinds():
            with _Collectives() as found:
                run()
            rows += [
                (step, name, len(sizes), _sent(name, sum(sizes), world_size))
                for name, sizes in sorted(found.sizes.items())
            ]
        stepping.tracker.close()
    return pd.DataFrame(rows, columns=["step", "collective", "count", "bytes"])


def _sent(collective: str, size: int, world_size: int) -> int:
    if collective not in PASSES:
        return size
    return PASSES[collective] * size * (world_size - 1) // world_size


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of each collective operation in this block, by name: those of its full message."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace in COLLECTIVES and (name := collective_of(func)):
            ends = [[t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (*args, out)]
            self.sizes[name].append(max(map(tensor_bytes, ends)))  # the end with the full message
        return out


def collective_of(func: Any) -> str:
    """The name of a collective operation, as torch's users know it; empty for waiting."""
    name = func.overloadpacket.__name__.strip("_").replace("_", "")
    known = {
        "allgather": "all gather", "reducescatter": "reduce scatter", "allreduce": "all reduce",
        "alltoall": "all to all", "broadcast": "broadcast", "reduce": "reduce",
        "gather": "gather", "scatter": "scatter", "send": "send",
    }  # fmt: skip
    return next((word for start, word in known.items() if name.startswith(start)), "")
