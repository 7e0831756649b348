"""A configuration is one frozen, validated value, and refuses what is wrong in one line."""

import json
import math
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lowrank_lab import config as config_module
from lowrank_lab.config import SIZES, InputError, ResolvedConfig, RunConfig, nearest
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.run import Run

ONE_LINE = re.compile(r"[\w.]+: .+ is not allowed; .+")  # without DOTALL, `.` stops at a line end


def refusal(**values):
    """The one line that a configuration with these values is refused with."""
    with pytest.raises(InputError) as caught:
        RunConfig(**values)
    assert ONE_LINE.fullmatch(str(caught.value))
    return str(caught.value)


def test_the_defaults_are_valid_and_documented():
    config = RunConfig()
    assert (config.model, config.method, config.corpus, config.seed) == (
        "micro", "full-rank", "python", 0
    )  # fmt: skip
    assert (config.warmup, config.schedule, config.min_lr_ratio) == (0.1, "cosine", 0.1)
    assert (config.refactor_every, config.reset_every, config.recovery_steps) == (0, 0, 10)
    assert (config.weight_decay, config.clip, config.precision) == (0.0, 1.0, "fp32")
    assert all(field.description for field in RunConfig.model_fields.values())


@pytest.mark.parametrize("field", sorted(RunConfig.model_fields))
def test_no_field_can_be_assigned(field):
    with pytest.raises(ValidationError, match="frozen"):
        setattr(RunConfig(), field, getattr(RunConfig(), field))


def test_two_configurations_do_not_share_their_options():
    given_options = {"alpha": 1.0}
    first, second = RunConfig(method_options=given_options), RunConfig()
    given_options["alpha"] = 2.0
    assert first.method_options == {"alpha": 1.0}
    assert second.method_options == {}


def test_replace_changes_one_field_and_leaves_the_original():
    config = RunConfig(lr=1e-3, method_options={"alpha": 4.0})
    other = config.replace(lr=2e-3)
    assert (config.lr, other.lr) == (1e-3, 2e-3)
    assert other.replace(lr=1e-3) == config


@pytest.mark.parametrize(
    "changes", [{"lr": -1.0}, {"nonsense": 1}, {"reset_every": 200}, {"tokens": 10**6}]
)
def test_replace_validates_again(changes):
    with pytest.raises(InputError):
        RunConfig(steps=200).replace(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", 128), ("intermediate_size", 7), ("num_heads", 1), ("num_layers", 3)],
)
def test_a_dimension_overrides_that_of_the_named_size_alone(name, value):
    size = RunConfig(model="tiny", **{name: value}).size
    assert size == SIZES["tiny"]._replace(**{name: value})


@pytest.mark.parametrize(("vocab", "entries"), [(None, 512), (300, 300), ("byte", 257)])
def test_the_vocabulary_is_the_sizes_unless_given(vocab, entries):
    assert RunConfig(model="tiny", vocab_size=vocab).size.vocab_size == entries


def test_the_sizes_are_those_of_the_paper():
    assert SIZES["60m"][:4] == (512, 1376, 8, 8)
    assert SIZES["1b"] == (2048, 5461, 32, 24, 32000)
    assert SIZES["7b"] == (4096, 11008, 32, 32, 32000)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, 200),
        ({"steps": 7}, 7),
        ({"tokens": 1024}, 1),
        ({"tokens": 2047}, 1),
        ({"tokens": 2048}, 2),
        ({"tokens": 10 * 1024 + 1}, 10),
    ],
)
def test_the_token_budget_binds_and_steps_follow(values, steps):
    config = RunConfig(batch=8, sequence_length=128, **values)
    assert config.tokens_per_step == 1024
    assert config.total_steps == steps


@pytest.mark.parametrize(
    ("steps", "expected"), [(200, (20, 40, 20)), (15, (1, 3, 1)), (1, (1, 1, 1))]
)
def test_records_follow_the_length_of_the_run(steps, expected):
    names = ("eval_every", "spectra_every", "checkpoint_every")
    assert tuple(RunConfig(steps=steps).cadence(name) for name in names) == expected
    assert [RunConfig(steps=steps, **{n: 3}).cadence(n) for n in names] == [3, 3, 3]


@pytest.mark.parametrize("change", [{"checkpoint_every": 3}, {"device": "cpu"}])
def test_how_a_run_is_executed_does_not_change_its_id(change):
    assert RunConfig().replace(**change).run_id == RunConfig().run_id


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-3},
        {"seed": 1},
        {"batch": 8},
        {"target": "q_proj"},
        {"method_options": {"alpha": 1.0}},
        {"steps": 201},
        {"corpus": "markov"},
        {"weight_decay": 0.1},
        {"vocab_size": "byte"},
    ],
)
def test_what_decides_the_result_changes_the_id(change):
    assert RunConfig().replace(**change).run_id != RunConfig().run_id


def test_records_without_a_field_have_what_earlier_versions_did_and_keep_their_id():
    """Windows spread over a split became the default after runs had been kept."""
    now, first = (resolve(RunConfig(**given)) for given in ({}, {"eval_windows": "first"}))
    stored = first.model_dump()
    del stored["eval_windows"]
    assert ResolvedConfig(**stored) == first
    assert (now.eval_windows, first.eval_windows) == ("spread", "first")
    assert now.run_id != first.run_id


def test_learning_rates_that_look_alike_have_two_ids():
    first, second = (RunConfig(lr=lr).run_id for lr in (1e-3, 1e-3 + 1e-12))
    assert first != second
    assert first.rpartition("-")[0] == second.rpartition("-")[0]


def test_the_id_says_what_the_run_is_and_ends_in_a_hash():
    config = RunConfig(
        model="tiny", method="low-rank", rank=8, refactor_every=20, reset_every=40, lr=3e-3, seed=2
    )
    readable, _, digest = config.run_id.rpartition("-")
    assert readable == "tiny-low-rank-r8-refactor20-reset40-lr0.003-s2"
    assert re.fullmatch("[0-9a-f]{10}", digest)
    assert RunConfig(**config.model_dump()).run_id == config.run_id


def test_steps_and_the_tokens_they_come_from_have_one_id():
    by_steps = RunConfig(steps=5, batch=2, sequence_length=10)
    by_tokens = RunConfig(tokens=105, batch=2, sequence_length=10)
    assert by_steps.run_id == by_tokens.run_id


def test_options_in_another_order_have_one_id():
    first = RunConfig(method_options={"a": 1, "b": 2})
    assert first.run_id == RunConfig(method_options={"b": 2, "a": 1}).run_id


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("galor", "did you mean 'galore'?"),
        ("fria", "did you mean 'fira'?"),
        ("zzzz", "known: fira, galore, low-rank"),
        (17, "known: fira, galore, low-rank"),
        ("", "known: fira, galore, low-rank"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_one_or_all(name, said):
    assert nearest(name, ["low-rank", "galore", "fira"]) == said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method_options", "two\nlines"),
        ("x", "y" * 1000),
        ("x", [[1, 2], "\r\n"]),
        ("x", None),
        ("x", object()),
    ],
)
def test_a_refusal_is_one_short_line(field, value):
    message = str(InputError(field, value, "must be\n  something   else"))
    assert ONE_LINE.fullmatch(message)
    assert message.endswith("is not allowed; must be something else")
    assert len(message) < 160


def test_a_refusal_names_field_value_and_what_is_allowed():
    assert refusal(lr=-1) == "lr: -1 is not allowed; must be greater than 0"
    assert refusal(model="7bb").startswith("model: '7bb' is not allowed; did you mean '7b'?")
    assert "did you mean 'model'?" in refusal(modle="tiny")
    assert "'auto', 'cpu' or 'cuda'" in refusal(device="gpu")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tokens", {"steps": 5, "tokens": 10**6}),
        ("tokens", {"tokens": 1023, "batch": 8, "sequence_length": 128}),
        ("gradient_accumulation", {"batch": 6, "gradient_accumulation": 4}),
        ("num_heads", {"model": "tiny", "num_heads": 3}),
        ("num_heads", {"model": "tiny", "num_heads": 32}),
        ("refactor_every", {"steps": 10, "refactor_every": 10}),
        ("reset_every", {"steps": 10, "reset_every": 11}),
        ("recovery_steps", {"recovery_steps": 1}),
        ("recovery_steps", {"reset_every": 5, "recovery_steps": 6}),
        ("target", {"target": "("}),
        ("spectra_layers", {"spectra_layers": "[z-a]"}),
        ("vocab_size", {"vocab_size": 1}),
        ("vocab_size", {"vocab_size": 65537}),
        ("checkpoint_every", {"checkpoint_every": 0}),
    ],
)
def test_fields_that_do_not_agree_are_refused_by_name(field, values):
    assert refusal(**values).startswith(f"{field}: ")


def test_what_just_fits_is_accepted():
    RunConfig(tokens=1024, batch=8, sequence_length=128)
    RunConfig(steps=10, refactor_every=9, reset_every=9, recovery_steps=9)
    RunConfig(recovery_steps=0)
    RunConfig(model="tiny", hidden_size=2, num_heads=1, vocab_size=2)
    RunConfig(vocab_size=65536, seed=(1 << 32) - 1)


@pytest.mark.parametrize("text", ["3e-3", "0.003", ".003", "3E-3"])
def test_numbers_that_yaml_leaves_as_text_are_read(text):
    assert RunConfig(lr=text).lr == 3e-3


def test_text_becomes_the_type_of_its_field():
    config = RunConfig(steps="40", vocab_size="1024", repeat="true", rank="8")
    assert (config.steps, config.vocab_size, config.repeat, config.rank) == (40, 1024, True, 8)


@pytest.mark.parametrize("field", ["steps", "lr", "model", "rank", "vocab_size", "method_options"])
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers_and_no_names(field, value):
    assert refusal(**{field: value}).startswith(f"{field}: {value} ")


VALID = {
    "model": st.sampled_from(sorted(SIZES)),
    "corpus": st.sampled_from(["python", "markov", "text:/a b"]),
    "vocab_size": st.one_of(st.none(), st.just("byte"), st.integers(2, 65536)),
    "sequence_length": st.integers(2, 512),
    "batch": st.integers(1, 64),
    "steps": st.one_of(st.none(), st.integers(41, 10**9)),
    "rank": st.one_of(st.none(), st.integers(1, 10**6)),
    "init": st.sampled_from([None, "kaiming", "spectral"]),
    "method_options": st.dictionaries(st.text(max_size=5), st.floats(-9, 9), max_size=3),
    "refactor_every": st.integers(0, 40),
    "reset_every": st.one_of(st.just(0), st.integers(10, 40)),
    "reset_strength": st.floats(0, 1),
    "lr": st.one_of(st.none(), st.floats(1e-9, 100)),
    "schedule": st.sampled_from(["cosine", "linear", "constant"]),
    "precision": st.sampled_from(["fp32", "bf16", "amp-bf16"]),
    "repeat": st.booleans(),
    "seed": st.integers(0, (1 << 32) - 1),
    "eval_every": st.one_of(st.none(), st.integers(1, 10**6)),
}


@given(st.fixed_dictionaries({}, optional=VALID))
@settings(max_examples=150, deadline=None)
def test_every_valid_configuration_survives_a_round_trip(values):
    config = RunConfig(**values)
    assert all(getattr(config, name) == value for name, value in values.items())
    for copy in (
        RunConfig(**config.model_dump()),
        RunConfig(**json.loads(json.dumps(config.model_dump()))),
        RunConfig(**json.loads(config.model_dump_json())),
    ):
        assert copy == config
        assert copy.run_id == config.run_id


JUNK = st.one_of(
    st.text(max_size=20),
    st.binary(max_size=5),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.none(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.one_of(st.text(), st.integers()), st.none(), max_size=2),
    st.complex_numbers(),
    st.builds(object),
)


def complaint(**values):
    """What a configuration says about these values, None if it takes them."""
    try:
        config = RunConfig(**values)
    except InputError as error:
        return str(error)
    assert RunConfig(**config.model_dump()) == config
    return None


@given(st.sampled_from([*sorted(RunConfig.model_fields), "lrr", "run_id"]), JUNK)
@settings(max_examples=400, deadline=None)
def test_one_junk_value_is_taken_or_refused_in_one_line(field, value):
    message = complaint(**{field: value})
    assert message is None or ONE_LINE.fullmatch(message)


def test_a_field_called_self_is_unknown_like_any_other():
    assert ONE_LINE.fullmatch(complaint(**{"self": 1}))


@pytest.mark.parametrize("field", ["steps", "tokens", "rank", "batch", "clip", "eval_every"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [int, str])
def test_a_number_too_large_for_a_float_is_refused(field, kind, sign):
    refusal(**{field: kind(sign * 10**400)})


@pytest.mark.parametrize("field", ["lr", "clip", "warmup", "initializer_range", "weight_decay"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "nan", "inf"])
def test_infinity_and_nan_are_refused(field, value):
    refusal(**{field: value})


@pytest.mark.parametrize("field", ["target", "spectra_layers"])
@pytest.mark.parametrize(
    "value", ["a{99999999999999999999}", "(" * 5000 + ")" * 5000], ids=["repetition", "nesting"]
)
def test_a_pattern_too_large_to_compile_is_refused(field, value):
    refusal(**{field: value})


# Earlier names


EARLIER = {"checkpoints_kept": 5, "keep_checkpoints": True}


@pytest.fixture
def nothing_said(monkeypatch):
    """No warning of an earlier name has been given in this process."""
    monkeypatch.setattr(config_module, "_warned", set())


def test_earlier_names_of_fields_warn_a_person_once(nothing_said):
    with pytest.warns(FutureWarning) as caught:
        config, _ = RunConfig(**EARLIER), RunConfig(**EARLIER)
    assert (config.keep_latest, config.keep_after_finish) == (5, True)
    assert [str(w.message) for w in caught] == [
        "checkpoints_kept is called keep_latest now",
        "keep_checkpoints is called keep_after_finish now",
    ]


def test_earlier_names_in_records_are_read_without_a_warning(nothing_said, tmp_path):
    stored = resolve(RunConfig(model="tiny", corpus="markov")).model_dump()
    for old, new in config_module.RENAMED.items():
        stored[old] = stored.pop(new)
    (tmp_path / "config.json").write_text(json.dumps({"config": {**stored, **EARLIER}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = Run(tmp_path).config
    assert (config.keep_latest, config.keep_after_finish) == (5, True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_earlier_name_beside_its_new_one_is_refused():
    with pytest.raises(InputError, match=r"^checkpoints_kept: 5 is not allowed; it is called keep"):
        RunConfig(checkpoints_kept=5, keep_latest=5)
