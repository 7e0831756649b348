"""Method: all facts about one method, in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from lowrank_lab.layers import KINDS
from lowrank_lab.methods.optimizers import OptimizerBuilder, adamw, adamw_8bit
from lowrank_lab.methods.options import ByWidth, Option
from lowrank_lab.optim.eight_bit import EIGHT_BIT
from lowrank_lab.optim.state_bytes import StateRule, adamw_8bit_states

FullWeights = Literal["none", "targets", "all"]
# Learning rate of what is no target layer, shared by all methods (data/study/README.md, "Tuning",
# rule 1).
REST_LR = ByWidth({48: 6.9e-3, 64: 5.0e-3, 96: 3.1e-3})


@dataclass(frozen=True)
class Method:
    """A row of METHODS: what a method trains, with which optimizer and defaults, at which cost.

    Attributes:
        source: arXiv id, or where else it was published.
        year: when it was first published.
        parent: the method that it grew out of, by name.
        use: when to use it, in one line.
        lr: default peak learning rate.
        spectral_lr: the same for factors that start from an SVD.
        rest_lr: default peak learning rate of what is no target layer, used with the default `lr`.
            Above its largest width it is interpolated to `lr` at the next wider one. None: `lr`.
        layers: kind of factorised layer (`layers.KINDS`), None for dense weights.
        rank: default rank; None is a quarter of the hidden size.
        init: default initialisation of the factors; None: they have one alone, or there are none.
        layer_options: names of the options that the layers take, and not the optimizer.
        per_layer: whether each weight can be updated by itself within the backward pass.
        needs_full: which weights the optimizer can't update as DTensors: with fsdp2 they are
            gathered for it.
        target_moments: whether the optimizer keeps averages of the gradients of target weights;
            without them a momentum reset of the targets is refused.
        states: elements of optimizer state of an m×n target weight, in words.
        eight_bit: whether `state_precision` 8bit is allowed.
        state_bytes: bytes of a weight's optimizer states; None: not known.
        projection_bytes: the share of them that is stored projections; None: there are none.
        fake_steps: whether the optimizer's step runs on fake tensors; otherwise a simulation takes
            its states from `state_bytes`.
        colour: of its curves, as #RRGGBB; None: one of those for unknown methods.
    """

    name: str
    summary: str
    source: str
    optimizer: OptimizerBuilder
    lr: ByWidth
    year: int | None = None
    parent: str | None = None
    use: str = ""
    spectral_lr: ByWidth | None = None
    rest_lr: ByWidth | None = None
    layers: str | None = None
    uses_rank: bool = False
    rank: int | None = None
    init: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    layer_options: tuple[str, ...] = ()
    per_layer: bool = True
    needs_full: FullWeights = "all"
    target_moments: bool = True
    states: str = ""
    eight_bit: bool = False
    state_bytes: StateRule | None = None
    projection_bytes: StateRule | None = None
    fake_steps: bool = True
    colour: str | None = None

    @property
    def has_products(self) -> bool:
        """Whether its layers have a product B A, which refactorization balances."""
        return self.layers is not None and bool(KINDS[self.layers].has_dense_weight)

    def in_precision(self, precision: str) -> Method:
        """The row with moments of this `state_precision`: AdamW in 8 bits is torchao's."""
        if precision != EIGHT_BIT or self.optimizer is not adamw:
            return self
        return replace(
            self, optimizer=adamw_8bit, state_bytes=adamw_8bit_states, needs_full="all",
            fake_steps=False,
        )  # fmt: skip

    def learning_rate(self, width: int, init: str | None) -> float:
        """The default peak learning rate for a model of this hidden size."""
        return self._rates(init).at(width)

    def rest_rate(self, width: int, init: str | None) -> float | None:
        """The default of `rest_lr` beside the default learning rate; None: the same rate."""
        if self.rest_lr is None:
            return None
        tuned = max(self.rest_lr)
        wider = {w: lr for w, lr in self._rates(init).items() if w > tuned}
        return None if width >= min(wider) else ByWidth({**self.rest_lr, **wider}).at(width)

    def _rates(self, init: str | None) -> ByWidth:
        return (init == "spectral" and self.spectral_lr) or self.lr
