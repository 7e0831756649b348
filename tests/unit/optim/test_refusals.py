"""What every optimizer of the package refuses in one line, and which keys of a group pass."""

import inspect
import math

import pytest
import torch
from optimizer_rows import ROWS
from optimizer_trial import Trial
from small_matrices import TALL, readable
from torch import nn

from lowrank_lab import optim

OWN = [row for row in ROWS if inspect.isclass(row.cls)]  # whose groups and defaults are its own


@pytest.mark.parametrize("row", OWN, ids=str)
@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-9},
                                 {"weight_decay": -0.1}], ids=str)  # fmt: skip
def test_a_bad_hyperparameter_is_refused(row, bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: "):
        row.cls([nn.Parameter(torch.zeros(3))], **bad)


def group_of(row, **keys):
    """A group as its optimizer wants it, changed by some keys."""
    shapes = [(6, 2), (2, 4)] if row.kind == "factors" else [(6, 4)]
    rank = {} if row.kind in ("whole", "marked") else {"rank": 2}
    marked = row.keys if row.kind == "marked" else rank
    return {"params": [nn.Parameter(torch.zeros(shape)) for shape in shapes]} | marked | keys


@pytest.mark.parametrize(
    ("row", "keys", "message"), [(row, *r) for row in ROWS for r in row.refused]
)
def test_a_bad_group_is_refused_in_one_line_and_changes_nothing(row, keys, message):
    optimizer = row.cls([nn.Parameter(torch.zeros(3))])
    optimizer.add_param_group(group_of(row))
    with pytest.raises(ValueError, match=f"^{message}") as refusal:
        optimizer.add_param_group(group_of(row, **keys))
    assert " is not allowed; " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(optimizer.param_groups) == 2


KEYS = {"lrs": "lr", "weight_deacy": "weight_decay", "beta": "betas", "epsilon": "eps"}


@pytest.mark.parametrize("row", OWN, ids=str)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("later", [False, True])
def test_a_misspelt_key_is_refused_with_the_nearest(row, key, later):
    group = {"params": [nn.Parameter(torch.zeros(3))], key: 1}
    optimizer = row.cls([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=rf"^{key}: 1 .*; did you mean '{KEYS[key]}'\?$"):
        optimizer.add_param_group(group) if later else row.cls([group])


@pytest.mark.parametrize("row", [row for row in OWN if row.kind != "whole"], ids=str)
def test_keys_of_the_method_are_refused_without_a_rank(row):
    keys = {k: v for k, v in row.cls.group_defaults.items() if k not in ("seed",)}
    for key, value in keys.items():
        with pytest.raises(ValueError, match=f"^{key}: .* only in a group with {row.cls.marker}$"):
            row.cls([{"params": [nn.Parameter(torch.zeros(3))], key: value}])
    marker = row.cls.marker
    with pytest.raises(ValueError, match=rf"^{marker}s: 4 .* did you mean '{marker}'\?$"):
        row.cls([{"params": [nn.Parameter(torch.zeros(3))], f"{marker}s": 4}])


@pytest.mark.parametrize("row", OWN, ids=str)
def test_switches_of_torchs_adamw_pass_where_they_change_nothing(row):
    p = nn.Parameter(torch.zeros(3))
    (group,) = torch.optim.AdamW([p], fused=True).param_groups
    row.cls([group])
    for key in ("maximize", "amsgrad", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"^{key}: True is not allowed; only False$"):
            row.cls([{"params": [p], key: True}])


@pytest.mark.parametrize("row", OWN, ids=str)
def test_keys_of_other_programs_pass(row):
    keys = ("name", "lr_scale", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum")
    optimizer = row.cls([group_of(row, **dict.fromkeys(keys, 0.1))])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0, last_epoch=3)


def test_a_rank_without_a_method_is_refused():
    with pytest.raises(ValueError, match=r"^rank: 2 .* ProjectedAdamW has no groups with a rank"):
        optim.ProjectedAdamW([{"params": [nn.Parameter(torch.zeros(3, 3))], "rank": 2}])


@pytest.mark.parametrize("row", OWN, ids=str)
def test_a_complex_parameter_is_refused_with_its_number_and_name(row):
    net = nn.Module()
    net.a = nn.Parameter(torch.zeros(4, 4))
    net.c = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^params: 'parameter 1, torch\.complex64' is not allow"):
        row.cls(net.parameters())
    with pytest.raises(ValueError, match=r"^params: 'parameter 1 \(c\), torch"):
        row.cls(net.named_parameters())


@pytest.mark.parametrize(("row", "key"), [(row, key) for row in ROWS for key in row.unknown])
def test_an_unknown_key_of_a_group_is_refused(row, key):
    with pytest.raises(ValueError, match=f"^{key}: 1 is not allowed; no such key"):
        row.cls([group_of(row, **{key: 1})])


@pytest.mark.parametrize("row", [row for row in OWN if row.kind == "ranked"], ids=str)
@pytest.mark.parametrize("shape", [(6,), (4, 4, 3), (1, 5)], ids=readable)
def test_what_is_no_matrix_of_that_rank_is_refused_in_a_ranked_group(row, shape):
    with pytest.raises(ValueError, match=r"^rank: 2 is not allowed"):
        row.cls([group_of(row, params=[nn.Parameter(torch.zeros(shape))])])


@pytest.mark.parametrize("row", OWN, ids=str)
def test_sparse_gradients_are_refused(row):
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        row.cls(table.parameters()).step()


BY_SVD = [(row, {}) for row in OWN if row.name.split()[0] in ("galore", "fira")]
EXACT = [(row, row.soon) for row in OWN if "update_k" in row.keys]


@pytest.mark.parametrize(("row", "keys"), BY_SVD + EXACT, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_decomposition_of_a_gradient_that_is_not_finite_names_the_parameter(row, keys, bad):
    trial = Trial(row, **keys)
    steps = row.gradients(TALL, 2)
    trial.advance(steps[:1] if row.kind == "factors" else [])
    G = steps[1].clone()
    G[3, 2] = bad
    with pytest.raises(RuntimeError, match=r"the gradient of parameter \d is not finite; ") as one:
        trial.advance([G])
    assert "\n" not in str(one.value)
