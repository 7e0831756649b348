"""A toy problem: recover one matrix W* (m×n) from noisy gradients.

The loss is ½‖W − W*‖², so the gradient is G = W − W*. Added Gaussian noise stands for the noise of
a small batch. Errors are relative, ‖W − W*‖² / ‖W*‖²: 1 at the start (W = 0), 0 at W = W*. The
optimizers, layers and techniques are the ones that train this library's language models.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lowrank_lab.analysis.spectra import effective_rank, singular_values
from lowrank_lab.config import InputError
from lowrank_lab.layers import FactorizedLinear, LowRankLinear
from lowrank_lab.optim import Fira, GaLore, ProjectedAdamW
from lowrank_lab.optim.carried import ON_REFRESH
from lowrank_lab.techniques import refactorize_, reset_momentum_

ROWS, COLUMNS = 32, 48
METHODS = ("full-rank", "low-rank", "galore", "fira")
ON_REFACTOR = ("keep", "transport")


@dataclass(frozen=True)
class Settings:
    """Settings of one fit.

    Args:
        method: full-rank | low-rank | galore | fira.
        rank: rank of the factors or the projection; unused by full-rank.
        period: steps between events; 0 = never. An event is a new projection (galore, fira) or a
            refactorization (low-rank), together with a momentum reset.
        strength: strength of the momentum reset, from 0 (none) to 1 (Adam restarts).
        noise: standard deviation of the gradient noise per entry; W*'s entries have mean square 1.
        refactor: balance the factors at each event; False only resets momentum.
        on_refactor: keep | transport: the treatment of the moments before the reset.
        on_refresh: keep | reset | transport: what a new projection does to the moments.
        imbalance: spread of the initial factors. The columns of B are scaled by d and the rows of
            A by 1/d, with max(d) / min(d) = imbalance; the product B A does not change.
        steps: number of Adam steps; the learning rate decays linearly to 0.
        lr: initial learning rate.
        seed: seed of the initial factors and the noise.

    Raises:
        InputError: a value is not allowed.
    """

    method: str = "full-rank"
    rank: int = 4
    period: int = 0
    strength: float = 0.0
    noise: float = 0.0
    refactor: bool = True
    on_refactor: str = "keep"
    on_refresh: str = "keep"
    imbalance: float = 1.0
    steps: int = 160
    lr: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "method": (self.method in METHODS, " | ".join(METHODS)),
            "rank": (_whole(self.rank, 1), "a whole number from 1"),
            "period": (_whole(self.period, 0), "a whole number of steps, 0 = never"),
            "strength": (_within(self.strength, 0, 1), "from 0 to 1"),
            "noise": (_within(self.noise, 0, math.inf), "at least 0"),
            "on_refactor": (self.on_refactor in ON_REFACTOR, " | ".join(ON_REFACTOR)),
            "on_refresh": (self.on_refresh in ON_REFRESH, " | ".join(ON_REFRESH)),
            "imbalance": (_within(self.imbalance, 1, 1e6), "from 1 to 1e6"),
            "steps": (_whole(self.steps, 1), "a whole number from 1"),
            "lr": (_within(self.lr, 0, math.inf), "at least 0"),
            "seed": (_whole(self.seed, 0), "a whole number from 0"),
        }
        for field, (holds, allowed) in checks.items():
            if not holds:
                raise InputError(field, getattr(self, field), allowed)

    def events(self) -> list[int]:
        """The steps before which an event takes place."""
        return list(range(self.period, self.steps, self.period)) if self.period else []

    def replace(self, **changes: Any) -> Settings:
        """A copy with changed settings; unknown names raise InputError."""
        for name in changes.keys() - {field.name for field in dataclasses.fields(self)}:
            raise InputError(name, changes[name], "no such setting")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Fit:
    """The result of one fit."""

    settings: Settings
    errors: list[float]  # steps + 1 relative errors: before each step, and at the end
    alignment: list[float]  # per step: cosine between the change of W and W* − W
    layer: nn.Linear | FactorizedLinear
    optimizer: ProjectedAdamW

    @property
    def error(self) -> float:
        """Relative error at the end."""
        return self.errors[-1]

    def weight(self) -> Tensor:
        """W (m×n) at the end."""
        return _weight(self.layer)

    def effective_rank(self) -> float:
        """Effective rank of W at the end."""
        return float(effective_rank(singular_values(self.layer)))


def target(rows: int = ROWS, columns: int = COLUMNS, power: float = 0.75, seed: int = 0) -> Tensor:
    """W* (rows×columns): σᵢ ∝ i^(−power), smooth singular vectors, entries of mean square 1.

    Singular vector i is a perturbed wave with about i half-periods. A low-rank approximation thus
    visibly loses fine detail.
    """
    r = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    U, V = (_waves(side, r, generator) for side in (rows, columns))
    S = torch.arange(1, r + 1, dtype=torch.float32) ** -power
    S *= math.sqrt(rows * columns) / S.norm()
    W: Tensor = (U * S) @ V.T
    return W


def _waves(side: int, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal waves as columns (side×count), from low to high frequency."""
    place = (torch.arange(side) + 0.5) / side
    waves = torch.cos(math.pi * place[:, None] * torch.arange(1, count + 1))
    noise = torch.randn(side, count, generator=generator)
    Q: Tensor = torch.linalg.qr(waves + 0.4 * noise)[0]
    return Q


def best_approximation(W: Tensor, rank: int) -> Tensor:
    """The closest matrix to W of the given rank (Eckart and Young 1936)."""
    _check_rank(rank, W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return best


def share_missing(W: Tensor, target: Tensor) -> float:
    """‖W − W*‖² / ‖W*‖²."""
    return float((W - target).square().sum() / target.square().sum())


def spectrum_table(W: Tensor) -> pd.DataFrame:
    """One row per singular value: index (from 1), singular_value, share (of ‖W‖²) and tail.

    `tail` is the share of all smaller singular values. It equals the relative error of the best
    approximation of rank `index`.
    """
    S = torch.linalg.svdvals(W.double())
    share = S.square() / S.square().sum()
    tail = (1 - share.cumsum(0)).clamp(min=0)
    columns = {"singular_value": S, "share": share, "tail": tail}
    table = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
    table.insert(0, "index", range(1, len(table) + 1))
    return table


def tail(W: Tensor, rank: int) -> float:
    """Relative error of the best approximation of W of the given rank."""
    _check_rank(rank, W)
    return float(spectrum_table(W)["tail"].iloc[rank - 1])


def fit(target: Tensor, settings: Settings) -> Fit:
    """Fit `target` (m×n) with the given settings; deterministic.

    Raises:
        InputError: the rank exceeds min(m, n).
    """
    _check_rank(settings.rank, target)
    layer, optimizer = _start(target, settings)
    noise = torch.Generator().manual_seed(settings.seed)
    done = Fit(settings, [], [], layer, optimizer)
    energy = float(target.square().sum())
    W, events = _weight(layer), settings.events()
    for step in range(settings.steps):
        missing = target - W
        done.errors.append(float(missing.square().sum()) / energy)
        if step in events:
            _event_(done)
        G = torch.randn(W.shape, generator=noise).mul_(settings.noise).sub_(missing)
        _give_gradient_(layer, G)
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / settings.steps)
        optimizer.step()
        before, W = W, _weight(layer)
        done.alignment.append(cosine(W - before, missing))
    done.errors.append(share_missing(W, target))
    return done


def _start(
    target: Tensor, settings: Settings
) -> tuple[nn.Linear | FactorizedLinear, ProjectedAdamW]:
    """The initial layer (W = 0, or factors with a product near 0) and its optimizer."""
    rows, columns = target.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        linear = nn.Linear(columns, rows, bias=False)
        nn.init.zeros_(linear.weight)
        if settings.method == "low-rank":
            factors = LowRankLinear(linear, settings.rank, alpha=float(settings.rank))
            unbalance_(factors, settings.imbalance)
            return factors, ProjectedAdamW(factors.parameters(), lr=settings.lr)
    group: dict[str, Any] = {"params": [linear.weight]}
    if settings.method == "full-rank":
        return linear, ProjectedAdamW([group], lr=settings.lr)
    group |= {"rank": settings.rank, "update_proj_gap": settings.period or settings.steps}
    group["on_refresh"] = settings.on_refresh
    if settings.method == "fira":
        return linear, Fira([group], lr=settings.lr)
    return linear, GaLore([group | {"scale": 1.0}], lr=settings.lr)


@torch.no_grad()
def unbalance_(layer: FactorizedLinear, imbalance: float) -> None:
    """Scale the columns of B by d and the rows of A by 1/d; the product B A does not change."""
    B, A = layer.factors()
    d = torch.logspace(-0.5, 0.5, layer.rank, base=imbalance)
    B.mul_(d)
    A.div_(d[:, None])


def _event_(done: Fit) -> None:
    """Refactorize and reset momentum. The optimizer itself renews projections at this period."""
    settings = done.settings
    if settings.refactor and isinstance(done.layer, FactorizedLinear):
        refactorize_(done.layer, done.optimizer, settings.on_refactor)  # type: ignore[arg-type]
    reset_momentum_(done.optimizer, settings.strength)


@torch.no_grad()
def _weight(layer: nn.Linear | FactorizedLinear) -> Tensor:
    if isinstance(layer, FactorizedLinear):
        return layer.dense_weight()
    return layer.weight.detach().clone()


@torch.no_grad()
def _give_gradient_(layer: nn.Linear | FactorizedLinear, G: Tensor) -> None:
    """Set the gradients of the trained parameters from the gradient G of the weight (m×n)."""
    if isinstance(layer, FactorizedLinear):
        B, A = layer.factors()  # W = scale · B A  ⇒  G_B = scale · G Aᵀ,  G_A = scale · Bᵀ G
        B.grad, A.grad = layer.scale * (G @ A.T), layer.scale * (B.T @ G)
    else:
        layer.weight.grad = G


def cosine(X: Tensor, Y: Tensor) -> float:
    """⟨X, Y⟩ / (‖X‖ ‖Y‖) of two matrices of one shape: 1 for one direction; 0 if one is zero."""
    return float((X * Y).sum() / (X.norm() * Y.norm()).clamp(min=1e-30))


def curves_table(fits: Mapping[str, Fit]) -> pd.DataFrame:
    """One row per label and step: error before the step, its alignment (NaN at the end)."""
    parts = [
        pd.DataFrame({
            "label": label, "step": range(len(done.errors)), "error": done.errors,
            "alignment": [*done.alignment, math.nan],
        })
        for label, done in fits.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def event_table(fits: Mapping[str, Fit], later: int = 10) -> pd.DataFrame:
    """The errors around the first event of each fit: one row per label.

    Columns: label, error_before, first_step (alignment of the first step after the event),
    error_after_first_step, error_later (`later` steps after the event) and error_end.
    """
    rows = []
    for label, done in fits.items():
        events = done.settings.events()
        if not events:
            raise InputError("fits", label, "with an event: a period from 1 and below the steps")
        at = events[0]
        soon, last = done.errors[at + 1], min(at + later, len(done.errors) - 1)
        numbers = done.errors[at], done.alignment[at], soon, done.errors[last], done.error
        rows.append((label, *numbers))
    names = ["error_before", "first_step", "error_after_first_step", "error_later", "error_end"]
    return pd.DataFrame(rows, columns=["label", *names])


def grid_table(target: Tensor, settings: Settings, **values: Iterable[Any]) -> pd.DataFrame:
    """Final error over a grid of settings, with the lowest error possible at each rank.

    Args:
        values: the grid, as setting=values. Each setting is a column of the table, beside `error`
            and `best_of_rank`.
    """
    rows = []
    for point in itertools.product(*values.values()):
        changes = dict(zip(values, point, strict=True))
        asked = settings.replace(**changes)
        best = tail(target, asked.rank)
        rows.append({**changes, "error": fit(target, asked).error, "best_of_rank": best})
    return pd.DataFrame(rows)


@torch.no_grad()
def factors_table(rank: int = 4, imbalance: float = 1000.0, seed: int = 0) -> pd.DataFrame:
    """Factors before and after `refactorize_`: when, factor, index, singular_value.

    The factors are initialised as in the low-rank method, with the given imbalance.
    """
    asked = Settings("low-rank", rank=rank, imbalance=imbalance, seed=seed)
    layer, _ = _start(torch.ones(ROWS, COLUMNS), asked)
    assert isinstance(layer, FactorizedLinear)
    parts = []
    for when in ("before", "after"):
        if when == "after":
            refactorize_(layer)
        factors = {"B": layer.B, "A": layer.A, "B·A": layer.dense_weight()}
        for name, factor in factors.items():
            values = torch.linalg.svdvals(factor.double())[:rank].tolist()
            rows = {"index": range(1, rank + 1), "singular_value": values}
            parts.append(pd.DataFrame({"when": when, "factor": name, **rows}))
    return pd.concat(parts, ignore_index=True)


def conditions_table(factors: pd.DataFrame) -> pd.DataFrame:
    """Norm and condition number (largest over smallest singular value) of each factor.

    Args:
        factors: returned by `factors_table`.
    """
    values = factors.groupby(["factor", "when"], sort=False)["singular_value"]
    table = pd.DataFrame({
        "norm": values.apply(lambda s: math.sqrt((s**2).sum())),
        "condition_number": values.max() / values.min(),
    })  # fmt: skip
    return table.reset_index()


def _check_rank(rank: int, W: Tensor) -> None:
    shape = f"{W.shape[0]}×{W.shape[1]}"
    if not _whole(rank, 1) or rank > min(W.shape):
        raise InputError("rank", rank, f"a {shape} matrix takes 1 to {min(W.shape)}")


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
