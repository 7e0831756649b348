"""Every way to save memory, precision and refresh is simulated as it is measured."""

import shutil

import pytest
from short import QUICK, per_layer_options

from lowrank_lab.config import RunConfig
from lowrank_lab.memory.formulas import by_formula
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning.simulate import measure, simulate

AT_REST = ("weights", "frozen", "indices", "gradients", "optimizer_states", "projections")
FRUGAL = {
    "plain": {},
    "checkpointing": {"activation_checkpointing": True},
    "per layer": {"per_layer": True, "clip": 0.0},
    "accumulation": {"gradient_accumulation": 2},
}


def configured(method, model="tiny", **fields):
    techniques = {"refactor_every": 200, "reset_every": 200} if METHODS[method].has_products else {}
    return RunConfig(**{
        "model": model, "method": method, "batch": 2, "sequence_length": 32, "steps": 10_000,
        **techniques, **fields,
    })  # fmt: skip


def at_rest(breakdown):
    return {name: getattr(breakdown, name) for name in AT_REST}


@pytest.mark.parametrize("how", FRUGAL)
@pytest.mark.parametrize("method", QUICK)
def test_the_simulated_step_is_the_measured_one(method, how):
    if how == "per layer" and not METHODS[method].per_layer:
        pytest.skip("updates its factors in pairs")
    options = {"method_options": per_layer_options(method)} if how == "per layer" else {}
    config = configured(method, **FRUGAL[how], **options)
    simulated, measured = simulate(config), measure(config)
    assert (
        at_rest(simulated.persistent)
        == at_rest(measured.persistent)
        == at_rest(by_formula(resolve(config)))
    )
    assert simulated.steps.keys() == measured.steps.keys()
    for kind, trace in simulated.steps.items():
        assert trace.peak == measured.steps[kind].peak
        assert abs(trace.peak.total / measured.allocated[kind] - 1) < 0.03


@pytest.mark.parametrize("precision", ["bf16", "amp-bf16"])
@pytest.mark.parametrize("method", ["full-rank", "low-rank", "sltrain", "galore", "relora"])
def test_half_precision_is_simulated_as_it_is_measured(method, precision):
    config = configured(method, precision=precision)
    simulated, measured = simulate(config), measure(config)
    for kind, trace in simulated.steps.items():
        assert trace.peak == measured.steps[kind].peak
        assert abs(trace.peak.total / measured.allocated[kind] - 1) < 0.03


@pytest.mark.parametrize("method", ["galore", "fira", "golore", "loro", "muon", "apollo"])
def test_where_the_optimizer_decides_the_peak_the_allocator_agrees(method):
    config = configured(method, "mini", vocab_size=100, batch=1, sequence_length=4)
    simulated, measured = simulate(config), measure(config)
    assert simulated.peak.temporaries > 0
    for kind, trace in simulated.steps.items():
        assert abs(trace.peak.total / measured.allocated[kind] - 1) < 0.03


@pytest.mark.parametrize("refresh", ["svd", "subspace", "randomized", "gram"])
def test_refreshes_spread_or_at_once_are_simulated_as_measured(refresh):
    options = {"refresh": refresh, "spread_refresh": True}
    config = configured("galore", method_options=options, batch=1, sequence_length=4)
    simulated, measured = simulate(config), measure(config)
    for kind, trace in simulated.steps.items():
        assert abs(trace.peak.total / measured.allocated[kind] - 1) < 0.03


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_8_bit_states_are_simulated_by_formula_and_measured():
    pytest.importorskip("torchao")
    config = configured("adamw-8bit")
    simulated, measured = simulate(config), measure(config)
    assert (
        at_rest(simulated.persistent)
        == at_rest(measured.persistent)
        == at_rest(by_formula(resolve(config)))
    )
    assert "formula" in simulated.excluded[0]
    assert abs(simulated.peak.total / max(measured.allocated.values()) - 1) < 0.03


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", QUICK)
def test_formula_and_simulation_of_a_larger_model_agree_to_the_byte(method, precision):
    config = configured(method, "9m", precision=precision)
    assert at_rest(simulate(config).persistent) == at_rest(by_formula(resolve(config)))
