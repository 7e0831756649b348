"""Optimizers: ordinary `torch.optim.Optimizer`s, usable on any model."""

from lowrank_lab.optim.base import ProjectedAdamW
from lowrank_lab.optim.fira import Fira
from lowrank_lab.optim.galore import GaLore

__all__ = ["Fira", "GaLore", "ProjectedAdamW"]
