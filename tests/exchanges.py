"""What the steps and events of a run in shards exchange between processes, and who solves what."""

from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_lab.training.fsdp import ShardedModel


class Exchanges(TorchDispatchMode):
    """Appends the name of each collective or eigenproblem and the entries of its largest tensor."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sent = func.namespace in ("c10d", "_c10d_functional")
        sent = sent and not any(word in func.name() for word in ("wait", "wrap"))
        if sent or func.name() == "aten::_linalg_eigh":
            sizes = [t.numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.found.append([func.name().partition("::")[2].partition(".")[0], max(sizes)])
        return func(*args, **(kwargs or {}))


@contextmanager
def listed(found):
    """Append a list a step or event in shards: its name, then pairs of a collective and entries."""

    def within(method):
        def run(self, *args):
            found.append([method.__name__])
            with Exchanges(found[-1]):
                return method(self, *args)

        return run

    kept = {name: getattr(ShardedModel, name) for name in ("step_", "refactorize_", "merge_")}
    try:
        for name, method in kept.items():
            setattr(ShardedModel, name, within(method))
        yield
    finally:
        for name, method in kept.items():
            setattr(ShardedModel, name, method)
