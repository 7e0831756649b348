"""Rows of METHODS, `resolve` and `build`, and the golden losses of 20 steps of each method."""

import json
import math
import re

import pytest
import torch
from paths import GOLDEN, ROOT
from short import QUICK
from write_golden import golden_configs, losses_of, tiny

from lowrank_lab.config import FILLED, InputError, ResolvedConfig, RunConfig
from lowrank_lab.layers import FactorizedLinear, target_layers
from lowrank_lab.methods.build import build, partition
from lowrank_lab.methods.options import ByWidth
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.models.llama import Llama
from lowrank_lab.runs.run import find_runs
from lowrank_lab.studies.study_file import load_study

KEPT = ROOT / "data" / "study"
DENSE = [name for name in QUICK if METHODS[name].layers is None]
FACTORIZED = [name for name, method in METHODS.items() if method.layers is not None]
PRODUCTS = [name for name in FACTORIZED if METHODS[name].has_products]
WITHOUT_RANK = [name for name in QUICK if not METHODS[name].uses_rank]
ADAMS = [name for name in QUICK if "beta1" in METHODS[name].options]


def built(*arguments, **values):
    """The model and the optimizer of a tiny run."""
    return build(resolve(tiny(*arguments, **values)))


def refusal(config):
    """The one line that resolving a configuration is refused with."""
    with pytest.raises(InputError) as caught:
        resolve(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state_equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# Rows


@pytest.mark.parametrize("name", QUICK)
def test_each_row_says_what_it_is_and_where_it_comes_from(name):
    method = METHODS[name]
    assert method.name == name == name.lower()
    assert method.summary
    assert "\n" not in method.summary
    assert re.fullmatch(r"\d{4}\.\d{4,5}|LORO \(ICLR 2025\)|Muon \(K. Jordan 2024\)", method.source)
    assert 2014 < method.year < 2100  # Adam's
    assert method.parent is None or METHODS[method.parent].year <= method.year
    assert 20 < len(method.use) <= 60
    for rates in filter(None, (method.lr, method.spectral_lr)):
        assert list(rates) == sorted(rates)
        assert all(0 < rate < 1 for rate in rates.values())


def test_each_method_has_a_colour_of_its_own_and_a_formula_for_its_states():
    colours = [method.colour for method in METHODS.values()]
    assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in colours)
    assert len(set(colours)) == len(colours)
    assert all(method.state_bytes and method.states for method in METHODS.values())


@pytest.mark.parametrize("name", QUICK)
def test_each_default_of_an_option_is_allowed(name):
    for option in METHODS[name].options.values():
        assert option.allowed
        by_width = isinstance(option.default, ByWidth)
        for value in option.default.values() if by_width else [option.default]:
            assert value is None or option.check(value)


@pytest.mark.parametrize("name", FACTORIZED)
def test_a_method_with_factors_has_a_rank_and_an_initialisation(name):
    assert METHODS[name].uses_rank
    assert METHODS[name].init in (("kaiming", "spectral") if name in PRODUCTS else (None,))


# resolve


def test_a_resolved_configuration_has_a_type_of_its_own_until_it_is_changed():
    config = resolve(tiny("galore"))
    assert type(config) is ResolvedConfig
    assert type(config.replace(rank=4)) is RunConfig
    assert type(config.override(seed=4)) is ResolvedConfig
    assert config.override(seed=4).seed == 4


@pytest.mark.parametrize("name", FILLED)
def test_a_resolved_configuration_without_a_value_is_refused(name):
    with pytest.raises(InputError, match=f"^{name}: None is not allowed"):
        resolve(tiny("galore")).override(**{name: None})


def test_the_rank_of_a_method_without_one_is_an_error():
    assert resolve(tiny("galore", rank=3)).method_rank == 3
    with pytest.raises(ValueError, match="rank: full-rank has none"):
        _ = resolve(tiny()).method_rank


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("values", [{}, {"reset_every": 5, "recovery_steps": 3}, {"rank": 1}])
def test_resolving_twice_is_resolving_once(name, values):
    if "reset_every" in values and not METHODS[name].target_moments:
        values = values | {"reset_params": "all"}
    once = resolve(tiny(name, **values))
    assert resolve(once) == once
    assert resolve(once).run_id == once.run_id


@pytest.mark.parametrize("name", QUICK)
def test_resolve_fills_everything_a_run_needs(name):
    config, method = resolve(tiny(name, steps=50)), METHODS[name]
    assert config.lr == method.learning_rate(32, config.init)
    assert config.vocab_size == 512
    assert (config.eval_every, config.spectra_every, config.checkpoint_every) == (5, 10, 5)
    assert config.rank == ((method.rank or 8) if method.uses_rank else None)
    assert config.init == method.init
    assert config.method_options.keys() == method.options.keys()
    assert None not in config.method_options.values()


# The ladder's studies and the rows of each whose rates are tuned at its size.
NAMED = ("full-rank", "muon", "low-rank")
LADDER = {"ladder_s1": (), "others_s1": (), "ladder_s2": (), "ladder_s3": NAMED}
TUNED = ("beta2", "alpha", "scale", "momentum", "rho", "inactive_lr_scale")


@pytest.mark.parametrize("name", LADDER)
def test_defaults_at_the_ladders_widths_are_those_that_its_tuning_found_best(name):
    path = ROOT / "notebooks" / "studies" / f"{name}.yaml"
    rows = load_study(path, corpora=False, seeds=[11], only=LADDER[name]).runs.values()
    compared = 0
    for label, tuned in rows:
        options = tuned.method_options
        techniques = tuned.refactor_every or tuned.reset_every
        # Kaiming factors are those of the controls, see below.
        kaiming = (tuned.method, tuned.init) == ("low-rank", "kaiming")
        if label == "frugal" and name == "ladder_s2":
            continue  # the row beside it, at the best rate that was tried, ends lower on average
        beside = label.startswith("full-rank at")  # ends higher than the row that tuning found
        if techniques or kaiming or beside or options.get("on_refresh") == "transport":
            continue
        given = {"method": tuned.method, "init": tuned.init, "hidden_size": tuned.hidden_size}
        config = resolve(RunConfig(**given))
        assert config.lr == pytest.approx(tuned.lr, rel=0.01), label  # parabolas have three digits
        assert config.rest_lr == tuned.rest_lr, label
        for option in TUNED:
            assert config.method_options.get(option) == options.get(option), (label, option)
        compared += 1
    assert compared >= 3


def test_the_default_rate_and_alpha_of_kaiming_factors_are_the_best_of_their_controls():
    losses = {
        (run.config.lr, run.config.method_options["alpha"]): run.result["validation_loss"]
        for run in find_runs(KEPT / "controls")
        if run.label.startswith("low-rank (Kaiming)")
    }
    assert len(losses) == 16
    config = resolve(RunConfig(method="low-rank", hidden_size=64))
    assert config.init == "kaiming"
    assert (config.lr, config.method_options["alpha"]) == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("method", ["low-rank", "galore"])
def test_one_default_rate_is_within_a_factor_of_two_of_the_best_at_each_rank(method):
    for rank in (3, 6, 24):
        losses = {
            run.config.lr: run.result["validation_loss"]
            for run in find_runs(KEPT / "ranks_rates_s1")
            if run.label.startswith(f"{method}, rank {rank}, ")
        }
        init = "spectral" if method == "low-rank" else None
        given = {"method": method, "hidden_size": 48, "init": init, "rank": rank}
        default = resolve(RunConfig(**given)).lr
        assert default == resolve(RunConfig(**given | {"rank": 12})).lr
        assert 0.5 <= default / min(losses, key=losses.__getitem__) <= 2


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.rest_lr])
def test_what_the_ladder_tunes_at_its_smallest_size_alone_is_the_same_at_the_others(name):
    """`rates_s2` and `rates_s3` try rates, with the scales (of factors: α/r) and β₂ of S1."""
    method = METHODS[name]
    for option, value in method.options.items():
        if isinstance(value.default, ByWidth):
            of_factors = option == "alpha" and option in method.layer_options
            found = {
                value.default.at(width) / (width if of_factors else 1) for width in (48, 64, 96)
            }
            assert len(found) == 1, option


def test_a_rate_that_is_given_holds_for_all_weights_and_the_default_has_one_for_the_rest():
    muon = resolve(RunConfig(method="muon", hidden_size=64))
    assert (muon.lr, muon.rest_lr) == (1.37e-2, 5e-3)
    assert resolve(RunConfig(method="muon", hidden_size=64, lr=1.37e-2)).rest_lr is None
    assert resolve(RunConfig(method="muon", hidden_size=64, rest_lr=1e-3)).rest_lr == 1e-3
    assert resolve(muon) == muon
    wide = RunConfig(method="muon", hidden_size=512, intermediate_size=1376, num_heads=8)
    assert (resolve(wide).lr, resolve(wide).rest_lr) == (2e-3, None)
    assert resolve(RunConfig(hidden_size=64, optimizer="torch.optim.NAdam")).rest_lr is None


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.rest_lr])
def test_the_rate_of_the_rest_turns_into_the_methods_between_the_study_and_the_papers_sizes(name):
    method = METHODS[name]
    for init in (None, "spectral"):
        rest = [method.rest_rate(width, init) for width in (32, 96, 256, 511, 512, 2048)]
        assert rest[:2] == [6.9e-3, 3.1e-3]
        assert rest[4:] == [None, None]
        end = method.learning_rate(512, init)
        assert rest[3] == pytest.approx(end, rel=0.02)
        assert min(3.1e-3, end) <= rest[2] <= max(3.1e-3, end)


@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1b"])
def test_defaults_of_the_papers_sizes_are_those_of_its_study_files(size):
    study = load_study(ROOT / "notebooks" / "studies" / f"paper_{size}.yaml", corpora=False)
    for label, config in study.runs.values():
        defaults = resolve(config.replace(lr=None, method_options={}))
        assert defaults.lr == config.lr, label
        for name in ("scale", "alpha"):
            options = config.method_options
            assert defaults.method_options.get(name) == options.get(name), (label, name)


def test_a_default_between_two_widths_lies_on_the_line_that_joins_them_on_logarithmic_axes():
    rate = ByWidth({64: 8e-3, 512: 1e-3, 1024: 1e-3})
    assert [rate.at(width) for width in (2, 64, 128, 256, 512, 768, 4096)] == [
        8e-3, 8e-3, 4e-3, 2e-3, 1e-3, 1e-3, 1e-3,
    ]  # fmt: skip
    assert ByWidth({64: 5e-3, 512: 1e-3}).at(128) == 2.9e-3
    assert ByWidth({64: 1e-2}).at(300) == 1e-2


def test_resolve_keeps_what_was_given():
    given = {"lr": 1e-4, "rank": 3, "init": "spectral", "eval_every": 7, "vocab_size": "byte"}
    config = resolve(tiny("low-rank", method_options={"alpha": 2.0}, **given))
    assert {name: getattr(config, name) for name in given} == given
    assert config.method_options["alpha"] == 2.0


@pytest.mark.parametrize("name", QUICK)
def test_the_alphabet_of_markov_is_the_vocabulary(name):
    assert resolve(tiny(name, corpus="markov")).vocab_size == 16


@pytest.mark.parametrize("name", WITHOUT_RANK)
def test_a_rank_that_a_method_has_no_use_for_is_dropped(name):
    assert resolve(tiny(name, rank=5)).rank is None
    assert resolve(tiny(name, rank=10**6)).run_id == resolve(tiny(name)).run_id


@pytest.mark.parametrize("name", [name for name in QUICK if name != "relora"])  # it restarts too
@pytest.mark.parametrize("values", [{"reset_every": 0}, {"reset_strength": 0.0, "reset_every": 5}])
def test_a_reset_that_never_happens_leaves_no_trace(name, values):
    recovery = {"recovery_steps": 4, "reset_strength": 0.5}
    config = resolve(tiny(name, **{**recovery, **values}))
    assert config == resolve(tiny(name))
    assert (config.reset_every, config.recovery_steps) == (0, 0)


@pytest.mark.parametrize(
    ("init", "rank", "alpha"),
    [(None, 4, 4.0), ("kaiming", 4, 4.0), ("kaiming", 64, 32.0), ("spectral", 4, 4.0)],
)
def test_alpha_follows_the_initialisation(init, rank, alpha):
    config = resolve(tiny("low-rank", init=init, rank=rank, hidden_size=64))
    assert config.method_options["alpha"] == alpha


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("low-rank", "alpha", 32),
        ("galore", "scale", 1),
        ("fira", "alpha", 1),
        ("full-rank", "eps", 1),
    ],
)
def test_runs_that_are_equal_have_equal_ids(name, option, value):
    whole, fraction = (
        resolve(tiny(name, method_options={option: kind(value)})) for kind in (int, float)
    )
    assert whole == fraction
    assert whole.run_id == fraction.run_id


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("values", [{"refactor_every": 5}, {"init": "spectral"}])
def test_dense_methods_refuse_what_needs_factors(name, values):
    assert refusal(tiny(name, **values)).startswith(f"{next(iter(values))}: ")
    assert name in refusal(tiny(name, **values))


@pytest.mark.parametrize("name", ADAMS)
def test_an_unknown_option_is_refused_with_the_nearest(name):
    message = refusal(tiny(name, method_options={"bta1": 0.9}))
    assert message.startswith("method_options: 'bta1' ")
    assert name in message
    assert "did you mean 'beta1'?" in message


def test_an_option_of_another_method_is_refused():
    assert "'scale' is not allowed" in refusal(tiny("low-rank", method_options={"scale": 1.0}))
    assert "no such option" in refusal(tiny("galore", method_options={"alpha": 1.0}))


@pytest.mark.parametrize("name", QUICK)
def test_every_option_refuses_what_it_cannot_use(name):
    flags = {n for n, o in METHODS[name].options.items() if o.allowed == "true or false"}
    for option in METHODS[name].options:
        junk = ("nonsense", 2 if option in flags else True, -1, math.nan, math.inf, [], {})
        for value in junk:
            message = refusal(tiny(name, method_options={option: value}))
            assert message.startswith(f"method_options.{option}: ")
            assert "must be" in message


@pytest.mark.parametrize("name", ADAMS)
def test_an_epsilon_of_zero_which_makes_nan_of_zero_gradients_is_refused(name):
    assert refusal(tiny(name, method_options={"eps": 0})).startswith("method_options.eps: ")


@pytest.mark.parametrize("name", QUICK)
def test_an_option_left_empty_is_its_default(name):
    empty = dict.fromkeys(METHODS[name].options)
    assert resolve(tiny(name, method_options=empty)) == resolve(tiny(name))


@pytest.mark.parametrize(
    ("given", "said"), [("galor", "did you mean 'galore'?"), ("zzz", ", ".join(sorted(METHODS)))]
)
def test_an_unknown_method_is_refused_with_the_nearest(given, said):
    message = refusal(tiny(given))
    assert message.startswith(f"method: '{given}' ")
    assert said in message


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].uses_rank])
def test_the_rank_must_fit_every_layer_the_method_acts_on(name):
    assert resolve(tiny(name, rank=32)).rank == 32  # q_proj is 32×32
    assert "from 1 to 32" in refusal(tiny(name, rank=33))
    narrow = tiny(name, rank=32, intermediate_size=20)
    assert "model.layers.0.mlp.gate_proj is 20×32" in refusal(narrow)
    assert resolve(narrow.replace(target="q_proj")).rank == 32
    assert resolve(tiny(name, hidden_size=2, num_heads=1)).rank == 1


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("target", ["nothing", "embed_tokens", "layernorm"])
def test_a_target_without_a_linear_layer_is_refused(name, target):
    assert refusal(tiny(name, target=target)).startswith("target: ")


@pytest.mark.parametrize("name", FACTORIZED)
@pytest.mark.parametrize("target", ["lm_head", "_proj|lm_head", "."])
def test_factors_for_the_head_which_stays_full_rank_are_refused(name, target):
    assert refusal(tiny(name, target=target)).startswith("target: ")


@pytest.mark.parametrize("name", QUICK)
def test_a_resolved_configuration_can_be_written_as_json(name):
    config = resolve(tiny(name))
    stored = json.dumps(config.model_dump(), allow_nan=False)
    assert ResolvedConfig(**json.loads(stored)) == config


def test_a_reset_of_targets_without_averages_is_refused():
    resets = {"reset_every": 5, "recovery_steps": 3}
    assert refusal(tiny("scale", **resets)) == (
        "reset_params: 'targets' is not allowed; scale keeps no averages for target weights; all"
    )
    assert resolve(tiny("scale", **resets, reset_params="all")).reset_every == 5


# build and partition


@pytest.mark.parametrize("name", QUICK)
def test_the_seed_decides_the_initial_weights(name):
    torch.manual_seed(1)
    first = built(name, seed=7)[0]
    torch.manual_seed(2)
    assert state_equal(first, built(name, seed=7)[0])
    assert not state_equal(first, built(name, seed=8)[0])


@pytest.mark.parametrize("name", QUICK)
def test_building_leaves_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    built(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_with_one_seed_start_from_the_same_dense_weights():
    full, galore = built()[0], built("galore")[0]
    assert state_equal(full, galore)
    low_rank = built("low-rank")[0]
    assert torch.equal(low_rank.model.embed_tokens.weight, full.model.embed_tokens.weight)
    assert torch.equal(low_rank.lm_head.weight, full.lm_head.weight)


@pytest.mark.parametrize("rank", [1, 32])
def test_spectral_factors_start_at_the_best_approximation_of_the_dense_weight(rank):
    full = built()[0].model.layers[0].mlp.up_proj.weight.double()
    layer = built("low-rank", rank=rank, init="spectral")[0].model.layers[0].mlp.up_proj
    best_error = torch.linalg.svdvals(full)[rank:].norm()  # Eckart and Young
    error = (layer.dense_weight().double() - full).norm()
    assert error <= best_error * (1 + 1e-6) + 1e-6 * full.norm()


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("target", [None, "q_proj"])
def test_each_trainable_parameter_is_in_exactly_one_group(name, target):
    config = resolve(tiny(name, **({"target": target} if target else {})))
    model, optimizer = build(config)
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, groups)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    targets, rest = partition(model, config.target)
    assert [id(p) for group in (targets, rest) for p in group] == [id(p) for p in groups]
    factors = {None: 1, "low-rank": 2, "lora": 2, "sltrain": 3, "cola": 2}[METHODS[name].layers]
    assert len(targets) == factors * len(list(target_layers(model, config.target)))


def test_frozen_parameters_are_in_no_group():
    model = Llama(tiny().size)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    targets, rest = partition(model, tiny().target)
    assert sorted(map(id, [*targets, *rest])) == sorted(
        id(p) for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("name", ADAMS)
def test_the_optimizer_has_the_configured_values(name):
    options = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-5}
    config = resolve(tiny(name, lr=3e-4, weight_decay=0.1, method_options=options))
    for group in build(config)[1].param_groups:
        assert (group["lr"], group["weight_decay"]) == (3e-4, 0.1)
        if "momentum" not in group:  # Muon's matrices have no Adam
            assert (*group["betas"], group["eps"]) == (0.8, 0.95, 1e-5)


@pytest.mark.parametrize("name", ["galore", "fira"])
def test_only_the_targets_of_a_projecting_method_have_a_rank(name):
    options = {"update_proj_gap": 3, "proj_type": "left", "refresh": "randomized"}
    ranked, plain = built(name, rank=5, method_options=options)[1].param_groups
    assert {key: ranked[key] for key in options} == options
    assert ranked["rank"] == 5
    assert "rank" not in plain


@pytest.mark.parametrize("name", FACTORIZED)
def test_only_target_layers_are_factorized(name):
    model = built(name, rank=3, target=r"mlp\.up_proj$")[0]
    found = {n for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    assert found == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert all(m.rank == 3 for m in model.modules() if isinstance(m, FactorizedLinear))


@pytest.mark.parametrize("name", QUICK)
def test_bf16_weights_are_the_rounded_float_weights(name):
    full, half = built(name)[0].state_dict(), built(name, precision="bf16")[0]
    for key, value in half.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, full[key].bfloat16())
        else:  # SLTrain's indices
            assert torch.equal(value, full[key])


@pytest.mark.parametrize("name", QUICK)
def test_mixed_precision_keeps_float_weights(name):
    assert {p.dtype for p in built(name, precision="amp-bf16")[0].parameters()} == {torch.float32}


# Golden losses


@pytest.mark.parametrize("name", golden_configs())
def test_twenty_steps_lose_what_they_lost_before(name):
    losses = losses_of(golden_configs()[name])
    golden = [float(line) for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
    assert losses == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize("name", golden_configs())
def test_golden_losses_start_at_chance_and_fall(name):
    golden = [float(line) for line in (GOLDEN / f"{name}.txt").read_text().splitlines()]
    assert len(golden) == 20
    assert golden[0] == pytest.approx(math.log(512), rel=0.02)
    assert golden[-1] < golden[0] - 0.5


def test_every_golden_file_belongs_to_a_method():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(golden_configs())
