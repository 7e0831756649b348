"""One matrix problem, small enough to watch: find W (m×n) from noisy gradients, by any method.

The loss is ½‖W − W*‖², so the gradient is G = W − W*, to which noise is added as a small batch
would. All errors are shares of the energy ‖W*‖²: 1 is where W = 0 starts, 0 is W = W*. The
optimizers, layers and techniques are those that train language models in this library.
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
from lowrank_lab.techniques import refactorize_, reset_momentum_

ROWS, COLUMNS = 32, 48
METHODS = ("full-rank", "low-rank", "galore", "fira")
ON_REFACTOR = ("keep", "transport")


@dataclass(frozen=True)
class Settings:
    """How to look for W.

    Args:
        method: full-rank | low-rank | galore | fira.
        rank: of the factors or of the projection; full-rank has none.
        period: steps between two events, 0 for never. An event is a new projection (galore, fira)
            or a refactorization (low-rank), and a momentum reset with it.
        strength: of the momentum reset at each event, from 0 (none) to 1 (Adam starts anew).
        noise: standard deviation of the noise in each entry of the gradient; W*'s entries have a
            mean square of 1.
        refactor: whether the factors are balanced at each event; False leaves only the reset.
        on_refactor: keep | transport: what becomes of the moments before the reset.
        imbalance: largest over smallest of the factors by which the columns of B are longer and
            the rows of A shorter at the start; the product doesn't depend on it.
        steps: of Adam; the learning rate falls linearly to 0.
        lr: the learning rate at the start.
        seed: of the starting factors and of the noise.

    Raises:
        InputError: a value that is not allowed.
    """

    method: str = "full-rank"
    rank: int = 4
    period: int = 0
    strength: float = 0.0
    noise: float = 0.0
    refactor: bool = True
    on_refactor: str = "keep"
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
            "imbalance": (_within(self.imbalance, 1, 1e6), "from 1 to 1e6"),
            "steps": (_whole(self.steps, 1), "a whole number from 1"),
            "lr": (_within(self.lr, 0, math.inf), "at least 0"),
            "seed": (_whole(self.seed, 0), "a whole number from 0"),
        }
        for field, (holds, allowed) in checks.items():
            if not holds:
                raise InputError(field, getattr(self, field), allowed)

    def events(self) -> list[int]:
        """The steps before which something happens."""
        return list(range(self.period, self.steps, self.period)) if self.period else []

    def replace(self, **changes: Any) -> Settings:
        """The same settings but for some; unknown names are refused."""
        for name in changes.keys() - {field.name for field in dataclasses.fields(self)}:
            raise InputError(name, changes[name], "no such setting")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Fit:
    """What came of some settings."""

    settings: Settings
    errors: list[float]  # steps + 1: before each step and at the end, as shares of ‖W*‖²
    alignment: list[float]  # steps: cosine between the change of W and W* − W, 1 = straight there
    layer: nn.Linear | FactorizedLinear
    optimizer: ProjectedAdamW

    @property
    def error(self) -> float:
        """The share of W*'s energy that is missing at the end."""
        return self.errors[-1]

    def weight(self) -> Tensor:
        """W (m×n) at the end."""
        return _weight(self.layer)

    def effective_rank(self) -> float:
        """Effective rank of W at the end."""
        return float(effective_rank(singular_values(self.layer)))


def target(rows: int = ROWS, columns: int = COLUMNS, power: float = 0.75, seed: int = 0) -> Tensor:
    """W* (rows×columns): σᵢ ∝ i^(−power), smooth singular vectors, entries of mean square 1.

    Singular vector i is a disturbed wave with about i half-periods, so that what a low-rank
    approximation loses can be seen: the fine detail.
    """
    r = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    U, V = (_waves(side, r, generator) for side in (rows, columns))
    S = torch.arange(1, r + 1, dtype=torch.float32) ** -power
    S *= math.sqrt(rows * columns) / S.norm()
    W: Tensor = (U * S) @ V.T
    return W


def _waves(side: int, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (side×count), from slow to fast."""
    place = (torch.arange(side) + 0.5) / side
    waves = torch.cos(math.pi * place[:, None] * torch.arange(1, count + 1))
    noise = torch.randn(side, count, generator=generator)
    Q: Tensor = torch.linalg.qr(waves + 0.4 * noise)[0]
    return Q


def best_approximation(W: Tensor, rank: int) -> Tensor:
    """The matrix of that rank which is closest to W (Eckart and Young 1936)."""
    _check_rank(rank, W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return best


def share_missing(W: Tensor, target: Tensor) -> float:
    """‖W − W*‖² / ‖W*‖²."""
    return float((W - target).square().sum() / target.square().sum())


def spectrum_table(W: Tensor) -> pd.DataFrame:
    """A row a singular value: index from 1, singular_value, its share of ‖W‖², tail.

    `tail` is the share of all smaller ones: the error of the best approximation of that rank.
    """
    S = torch.linalg.svdvals(W.double())
    share = S.square() / S.square().sum()
    tail = (1 - share.cumsum(0)).clamp(min=0)
    columns = {"singular_value": S, "share": share, "tail": tail}
    table = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
    table.insert(0, "index", range(1, len(table) + 1))
    return table


def tail(W: Tensor, rank: int) -> float:
    """The share of W's energy that no matrix of that rank can have."""
    _check_rank(rank, W)
    return float(spectrum_table(W)["tail"].iloc[rank - 1])


def fit(target: Tensor, settings: Settings) -> Fit:
    """Look for `target` (m×n) as the settings say. The same settings give the same result.

    Raises:
        InputError: a rank that the matrix doesn't have.
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
        done.alignment.append(_cosine(W - before, missing))
    done.errors.append(share_missing(W, target))
    return done


def _start(
    target: Tensor, settings: Settings
) -> tuple[nn.Linear | FactorizedLinear, ProjectedAdamW]:
    """The layer (W = 0, or factors of a product near 0) and its optimizer."""
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
    if settings.method == "fira":
        return linear, Fira([group], lr=settings.lr)
    return linear, GaLore([group | {"scale": 1.0}], lr=settings.lr)


@torch.no_grad()
def unbalance_(layer: FactorizedLinear, imbalance: float) -> None:
    """Stretch the columns of B and shrink the rows of A to match; the product stays the same."""
    B, A = layer.factors()
    d = torch.logspace(-0.5, 0.5, layer.rank, base=imbalance)
    B.mul_(d)
    A.div_(d[:, None])


def _event_(done: Fit) -> None:
    """Refactorization and reset. New projections are made by the optimizer, by the same period."""
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
    """The gradient G of the weight (m×n) as gradients of what is trained."""
    if isinstance(layer, FactorizedLinear):
        B, A = layer.factors()  # W = scale · B A  ⇒  G_B = scale · G Aᵀ,  G_A = scale · Bᵀ G
        B.grad, A.grad = layer.scale * (G @ A.T), layer.scale * (B.T @ G)
    else:
        layer.weight.grad = G


def _cosine(X: Tensor, Y: Tensor) -> float:
    return float((X * Y).sum() / (X.norm() * Y.norm()).clamp(min=1e-30))


def curves_table(fits: Mapping[str, Fit]) -> pd.DataFrame:
    """A row a label and step: error before the step, alignment of the step (NaN at the end)."""
    parts = [
        pd.DataFrame({
            "label": label, "step": range(len(done.errors)), "error": done.errors,
            "alignment": [*done.alignment, math.nan],
        })
        for label, done in fits.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def event_table(fits: Mapping[str, Fit], later: int = 10) -> pd.DataFrame:
    """What followed the first event of each fit: a row a label.

    Columns: label, error_before, first_step (its alignment), error_after_first_step, error_later
    (`later` steps after the event) and error_end.
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
    """The error at the end, and the best that its rank allows, at each point of a grid of settings.

    Args:
        values: names of settings with the values of each; they are columns of the table, beside
            `error` and `best_of_rank`.
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

    They start as the low-rank method starts, stretched by `imbalance`.
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
        factors: `factors_table`.
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
