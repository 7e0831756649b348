"""The paper's techniques (2505.22922): weight refactorization, momentum reset, lr recovery.

They change factors, moments and the learning rate of a running training, with any optimizer.
"""

from lowrank_lab.techniques.momentum import reset_momentum_
from lowrank_lab.techniques.periodic import Periodic
from lowrank_lab.techniques.pruning import prune_moments_
from lowrank_lab.techniques.recovery import RecoveryLR, recovery_factor
from lowrank_lab.techniques.refactorization import NotFiniteError, Refactorization, refactorize_
from lowrank_lab.techniques.transport import transport_moments_

__all__ = [
    "NotFiniteError",
    "Periodic",
    "RecoveryLR",
    "Refactorization",
    "prune_moments_",
    "recovery_factor",
    "refactorize_",
    "reset_momentum_",
    "transport_moments_",
]
