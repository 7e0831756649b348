"""The optimizers of the methods, one per file: ordinary torch.optim.Optimizers for any model.

`param_groups` makes their groups from a model.
"""

from lowrank_lab.optim.apollo import Apollo
from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.combined import Combined
from lowrank_lab.optim.fira import Fira
from lowrank_lab.optim.frugal import Frugal
from lowrank_lab.optim.galore import GaLore
from lowrank_lab.optim.golore import GoLore
from lowrank_lab.optim.ldadam import LDAdam
from lowrank_lab.optim.loro import Loro
from lowrank_lab.optim.param_groups import param_groups
from lowrank_lab.optim.spam import Spam
from lowrank_lab.optim.stable_spam import StableSpam

__all__ = [
    "Apollo",
    "Combined",
    "Fira",
    "Frugal",
    "GaLore",
    "GoLore",
    "LDAdam",
    "Loro",
    "ProjectedAdamW",
    "Spam",
    "StableSpam",
    "param_groups",
]
