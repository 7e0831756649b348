"""States that other packages saved: converted, so that the next steps are theirs, or refused."""

import io

import pytest
import pytorch_optimizer
import torch
from apollo_torch import APOLLOAdamW
from fira import FiraAdamW
from galore_torch import GaLoreAdamW
from optimizer_rows import APOLLO, FIRA, GALORE, SPAM, STABLE_SPAM
from optimizer_trial import Trial, refuse
from small_matrices import ONE_SIDED, SQUARE, TALL, WIDE, readable, relative
from torch import nn

from lowrank_lab import optim

NEXT = 12  # steps after the load, across a refresh: a gap is ten steps


def saved_and_loaded(state_dict):
    """What a checkpoint file gives back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def continue_both(theirs, ours, stop, dtype=torch.float32):
    """The errors of both parameters' moves, ours against theirs, in the steps after the load."""
    grads = theirs.row.gradients(tuple(theirs.matrices[0].shape), stop + NEXT, dtype)
    theirs.advance(grads[:stop])
    ours.copy_from(theirs)
    ours.optimizer.load_state_dict(saved_and_loaded(theirs.optimizer.state_dict()))
    start, b = theirs.result(), theirs.b.detach().clone()
    theirs.advance(grads[stop:])
    ours.advance(grads[stop:])
    return (
        relative(ours.result() - start, theirs.result() - start),
        relative(ours.b.detach() - b, theirs.b.detach() - b),
    )


PROJECTED = [
    *((GALORE, GaLoreAdamW, {"proj_type": p}) for p in (*ONE_SIDED, "full")),
    *((FIRA, FiraAdamW, {"proj_type": p}) for p in ONE_SIDED),
    *((APOLLO, APOLLOAdamW, {"proj": p, "scale_type": t})
      for p in ("random", "svd") for t in ("channel", "tensor")),
    (APOLLO, APOLLOAdamW, {"proj_type": "left", "scale_type": "tensor"}),
]  # fmt: skip


FOLLOWED = [
    (*case, shape, stop, rank)
    for case in PROJECTED for shape in (SQUARE, TALL, WIDE)
    for stop, rank in ((1, 1), (14, 4), (20, 4), (9, min(shape)))
    if case[0].package_is_right(shape, rank, case[2])
]  # fmt: skip


@pytest.mark.parametrize(("row", "package", "keys", "shape", "stop", "rank"), FOLLOWED, ids=str)
def test_the_next_steps_are_those_of_the_package(row, package, keys, shape, stop, rank):
    # Two sides by SVD: after a refresh, entries off the diagonal are rounding noise to Adam.
    quiet = {"update_proj_gap": 1000} if keys.get("proj_type") == "full" else {}
    theirs = Trial(row, shape, rank, cls=package, weight_decay=0.1, **keys, **quiet)
    published = {"forgive_zero": False} if row is FIRA else {}
    # The saved groups replace the learning rate.
    ours = Trial(row, shape, rank, lr=1.0, **keys, **published)
    assert max(continue_both(theirs, ours, stop)) <= 2e-5


@pytest.mark.parametrize(("row", "package", "keys"), PROJECTED, ids=str)
def test_a_converted_state_is_what_the_optimizer_itself_would_have(row, package, keys):
    shape = TALL if row.package_is_right(TALL, 4, keys) else WIDE
    grads = row.gradients(shape, 11)
    theirs = Trial(row, shape, cls=package, **keys).advance(grads)
    ours, loaded = Trial(row, shape, **keys).advance(grads), Trial(row, shape, **keys)
    loaded.optimizer.load_state_dict(theirs.optimizer.state_dict())
    for one, other in zip(ours.states, loaded.states, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[key].dtype
                assert value.untyped_storage().nbytes() == other[key].untyped_storage().nbytes()
                torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6)
            else:
                assert value == pytest.approx(other[key], rel=1e-12)


@pytest.mark.parametrize(("row", "package"), [(GALORE, GaLoreAdamW), (FIRA, FiraAdamW)], ids=str)
def test_bfloat16_states_load_in_the_dtypes_that_they_have_here(row, package):
    half = {"dtype": torch.bfloat16}
    theirs, ours = Trial(row, **half, cls=package), Trial(row, **half)
    W0, grads = ours.result(), row.gradients(TALL, 14 + NEXT, **half)
    error = max(continue_both(theirs, ours, 14, **half))
    without_load = Trial(row, **half).advance(grads).result()
    assert error <= 3 * relative(without_load - W0, theirs.result() - W0)
    own = Trial(row, dtype=torch.bfloat16).advance(row.gradients(TALL, 2, torch.bfloat16))
    dtypes = [{k: getattr(v, "dtype", None) for k, v in s.items()} for s in own.states]
    assert [{k: getattr(v, "dtype", None) for k, v in s.items()} for s in ours.states] == dtypes


def test_a_seed_can_stand_for_apollos_projection():
    theirs, ours = Trial(APOLLO, cls=APOLLOAdamW), Trial(APOLLO, store_projection=False)
    assert max(continue_both(theirs, ours, 23)) <= 1e-5
    assert not any("projection_right" in state for state in ours.states)


@pytest.mark.parametrize("stop", [3, 24, 25, 33, 50])
@pytest.mark.parametrize("shape", [TALL, (9,), (3, 4, 2)], ids=readable)
@pytest.mark.parametrize("row", [SPAM, STABLE_SPAM], ids=str)
def test_spams_go_on_as_in_pytorch_optimizer(row, shape, stop):
    package = row.theirs(**row.keys)
    theirs = Trial(row, shape, cls=lambda p, **o: row.package(p, lr=o["lr"], **package))
    ours = Trial(row, shape, lr=1.0)
    assert max(continue_both(theirs, ours, stop)) <= 2e-5


@pytest.mark.parametrize("stop", [1, 9, 10, 14])
@pytest.mark.parametrize("shape", [TALL, WIDE], ids=readable)
def test_galore_goes_on_as_in_pytorch_optimizer(shape, stop):
    def package(groups, lr):
        groups[1]["projection_type"] = groups[1].pop("proj_type")
        return pytorch_optimizer.GaLore(groups, lr=lr, weight_decay=0.1)

    theirs, ours = Trial(GALORE, shape, cls=package), Trial(GALORE, shape)
    assert max(continue_both(theirs, ours, stop)) <= 2e-5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cls", [optim.ProjectedAdamW, optim.GaLore, optim.Fira, optim.Loro])
def test_plain_groups_go_on_from_torchs_adamw(cls, fused):
    grads = [torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(30)]

    def run(p, optimizer, grads):
        for g in grads:
            p.grad = g.clone()
            optimizer.step()

    p = nn.Parameter(torch.zeros(6))
    theirs = torch.optim.AdamW([p], lr=0.01, weight_decay=0.0, fused=fused)
    torch.optim.lr_scheduler.OneCycleLR(theirs, 0.01, 100)
    run(p, theirs, grads[:18])
    q = nn.Parameter(p.detach().clone())
    ours = cls([q], lr=1.0)
    ours.load_state_dict(saved_and_loaded(theirs.state_dict()))
    assert ours.param_groups[0]["max_lr"] == 0.01
    before = p.detach().clone()
    run(p, theirs, grads[18:])
    run(q, ours, grads[18:])
    assert relative(q.detach() - before, p.detach() - before) <= 1e-5


def test_plain_groups_of_galore_torch_load_into_every_projected_optimizer():
    b = nn.Parameter(torch.zeros(5))
    theirs = GaLoreAdamW([b], no_deprecation_warning=True)
    b.grad = torch.ones(5)
    theirs.step()
    for cls in (optim.ProjectedAdamW, optim.GaLore, optim.Fira, optim.Apollo, optim.GoLore):
        ours = cls([nn.Parameter(torch.zeros(5))])
        ours.load_state_dict(theirs.state_dict())
        assert ours.state_dict()["state"][0]["exp_avg_weight"] == pytest.approx(0.1)


# Refusals


def stepped(row, cls=None, shape=TALL, **keys):
    return (
        Trial(row, shape, cls=cls, **keys).advance(row.gradients(shape, 3)).optimizer.state_dict()
    )


def torchs(cls, **options):
    W, b = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(TALL[0]))
    optimizer = cls([{"params": [b]}, {"params": [W]}], **options)
    W.grad, b.grad = torch.ones_like(W), torch.ones_like(b)
    optimizer.step()
    return optimizer.state_dict()


def other_settings():
    state = stepped(GALORE, GaLoreAdamW)
    state["state"][1]["projector"].scale = 0.5
    return state


def lost_seed():
    state = stepped(APOLLO, APOLLOAdamW)
    state["state"][1]["projector"].seed = 17
    return state


def without_step():
    state = stepped(FIRA, FiraAdamW)
    del state["state"][0]["step"]
    return state


def without_projector():
    state = stepped(GALORE, GaLoreAdamW)
    del state["state"][1]["projector"]
    return state


def ranked_where_it_is_plain():
    state = stepped(GALORE, GaLoreAdamW)
    return {**state, "param_groups": state["param_groups"][::-1]}


def without_norm():
    state = stepped(FIRA, FiraAdamW)
    del state["state"][1]["scaling_grad"]
    return state


REFUSED = {
    "galore-torch to Fira": (FIRA, lambda: stepped(GALORE, GaLoreAdamW), "state_dict: 'galore_to"),
    "fira to GaLore": (GALORE, lambda: stepped(FIRA, FiraAdamW), "state_dict: 'fira'"),
    "apollo-torch to Fira": (FIRA, lambda: stepped(APOLLO, APOLLOAdamW), "state_dict: 'apollo_to"),
    "another rank": (GALORE, lambda: stepped(GALORE, GaLoreAdamW, rank=3), "state_dict: rank: 3"),
    "another shape": (
        GALORE, lambda: stepped(GALORE, GaLoreAdamW, shape=(26, 10)), "state_dict: exp_avg of para"
    ),
    "its groups swapped": (GALORE, ranked_where_it_is_plain, "state_dict: rank: 4"),
    "without a step": (FIRA, without_step, "state_dict: parameter 0 is saved without 'step'"),
    "without a projector": (GALORE, without_projector, "state_dict: projector of parameter 1: "),
    "another side": (
        GALORE, lambda: stepped(GALORE, GaLoreAdamW, proj_type="left"), "state_dict: proj_type: "
    ),
    "a projector's scale": (GALORE, other_settings, "state_dict: projector of parameter 1: scale"),
    "a lost seed": (APOLLO, lost_seed, "state_dict: seed 17 of parameter 1"),
    "without its norm": (FIRA, without_norm, "state_dict: parameter 1: 'without residual_norm'"),
    "no limiter": (
        APOLLO, lambda: stepped(APOLLO, lambda g, **o: APOLLOAdamW(g, disable_nl=True, **o)),
        "disable_nl: False",
    ),
    "torch's AdamW": (GALORE, lambda: torchs(torch.optim.AdamW), "state_dict: rank: None"),
    "Adam with decay": (
        GALORE, lambda: torchs(torch.optim.Adam, weight_decay=0.1),
        "state_dict: decoupled_weight_decay: False",
    ),
    "amsgrad": (GALORE, lambda: torchs(torch.optim.AdamW, amsgrad=True), "state_dict: amsgrad: T"),
    "maximize": (GALORE, lambda: torchs(torch.optim.AdamW, maximize=True), "state_dict: maximize"),
    "RAdam": (GALORE, lambda: torchs(torch.optim.RAdam), "state_dict: 'groups of betas"),
    "SGD": (GALORE, lambda: torchs(torch.optim.SGD, momentum=0.9), "state_dict: 'groups of "),
    "pytorch-optimizer's APOLLO": (
        APOLLO, lambda: torchs(pytorch_optimizer.APOLLO), "state_dict: 'pytorch_optimizer.other'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_cannot_go_on_is_refused_in_one_line_and_nothing_changes(case):
    row, make, message = REFUSED[case]
    trial = Trial(row).advance(row.gradients(TALL, 3))
    refuse(trial, make(), f"^{message}")


SPAMS = [
    (SPAM, {"density": 0.5}, "state_dict: mask of parameter 0: 'sparse'"),
    (SPAM, {"update_proj_gap": 7}, "update_proj_gap: 25"),
    (STABLE_SPAM, {"update_proj_gap": 7}, "update_proj_gap: 25"),
    (STABLE_SPAM, {"t_max": 9}, "state_dict: 't_max'"),
]


@pytest.mark.parametrize(("row", "keys", "message"), SPAMS)
def test_spams_with_other_settings_are_refused(row, keys, message):
    W, b = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(TALL[0]))
    theirs = row.package([W, b], **keys)
    for _ in range(9):
        W.grad, b.grad = torch.ones_like(W), torch.ones_like(b)
        theirs.step()
    with pytest.raises(ValueError, match=f"^{message}"):
        Trial(row).optimizer.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("row", [SPAM, STABLE_SPAM], ids=str)
def test_spams_of_a_transposed_model_are_refused(row):
    theirs = Trial(row, WIDE, cls=lambda p, **o: row.package(p, **row.theirs(**row.keys)))
    theirs.advance(row.gradients(WIDE, 3))
    with pytest.raises(ValueError, match=r"^state_dict: exp_avg of parameter 0: .10, 24. is not"):
        Trial(row).optimizer.load_state_dict(theirs.optimizer.state_dict())
