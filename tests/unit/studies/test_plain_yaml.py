"""YAML is read as people mean it, in study files and on the command line."""

import datetime
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.cli import _resolve_type
from papermill.iorw import read_yaml_file
from paths import NOTEBOOKS

from lowrank_lab.commands.flags import config_of
from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.studies.plain_yaml import read_value, read_yaml
from lowrank_lab.studies.study_file import load_study

BASE = "base: {model: tiny, corpus: markov, steps: 20}\n"


def reading(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    return read_yaml(tmp_path / "mine.yaml", "study")


def refusal(tmp_path, text):
    with pytest.raises(InputError) as caught:
        reading(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e6", 4e6), ("3e-3", 3e-3), ("1.5E+3", 1500.0), (".5", 0.5), ("5.", 5.0), ("-2.5", -2.5),
        ("1_000", 1000), ("0", 0), ("+4", 4), ("0x1F", 31), (".inf", math.inf),
        ("-.inf", -math.inf),
        ("no", "no"), ("Yes", "Yes"), ("on", "on"), ("OFF", "OFF"), ("true", True),
        ("False", False),
        ("~", None), ("", None), ("null", None), ("2026-11-28", "2026-11-28"), ("=", "="),
        ("'010'", "010"), ('"1:30"', "1:30"), ("30m", "30m"), ("1h30m", "1h30m"), ("e6", "e6"),
        ("1e", "1e"), ("1.2.3", "1.2.3"), ("0.1", 0.1), ("00:ab", "00:ab"),
    ],
)  # fmt: skip
def test_a_value_is_what_people_mean(text, value, tmp_path):
    (found,) = reading(tmp_path, f"a: {text}").values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["010", "-08", "0_1", "00", "1:30", "12:30:45", "1:30.5"])
def test_a_number_that_can_be_meant_in_two_ways_is_refused_with_a_hint(text, tmp_path):
    for content in (f"a: {text}", f"a: [{{b: {text}}}]", f"{text}: a"):
        line = refusal(tmp_path, content)
        assert line.startswith(f"mine.yaml, line 1: '{text}' is not allowed")
        assert f"quote it, '{text}'" in line


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: 1\nb: 2\na: 3", "1 and line 3"),
        ("v:\n  x: {lr: 1}\n  y: 2\n  x: 3", "2 and line 4"),
        ("v: [{a: 1}, {b: 1,\n c: 2,\n b: 3}]", "1 and line 3"),
        ("a: {b: {c: {d: 1, d: 1}}}", "1:"),
        ("x: &k {a: 1}\ny: &l {a: 2}\nz:\n  <<: *k\n  <<: *l", "4 and line 5"),
        ("'a': 1\na: 2", "1 and line 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text, lines, tmp_path):
    assert refusal(tmp_path, text).startswith(f"mine.yaml, line {lines}")


def test_a_merged_mapping_may_be_changed(tmp_path):
    content = reading(tmp_path, "x: &k {a: 1, b: 2}\ny: {<<: *k, a: 3}")
    assert content["y"] == {"a": 3, "b": 2}


@pytest.mark.parametrize("key", ["8", "1.5", "true", "null", "~", "4e6"])
def test_a_label_that_is_no_text_asks_for_quotes(key, tmp_path):
    assert f"quote it, '{key}'" in refusal(tmp_path, f"variants: {{{key}: {{}}}}")


def test_a_label_that_is_a_word_of_yaml_stays_that_word(tmp_path):
    (tmp_path / "mine.yaml").write_text(BASE + "variants: {no: {}, on: {lr: 3e-3}}\n")
    runs = load_study(tmp_path / "mine.yaml", corpora=False).runs
    assert [label for label, _ in runs.values()] == ["no", "on"]
    (tmp_path / "mine.yaml").write_text(BASE + "variants: {no: {}}\npairs: [[1, 2]]\n")
    with pytest.raises(InputError, match="pairs: \\[1, 2\\] is not allowed; a label is text"):
        load_study(tmp_path / "mine.yaml", corpora=False)


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "a: &x [*x]", "a: !!int '1e'", "a: !!python/object:os.x 1", "a: 1\n---\nb: 1",
     "? [a]\n: 1", "a: !!float x", "a: &b [" + "x," * 999 + "]\nc: [" + "*b," * 999 + "]"],
)  # fmt: skip
def test_what_no_study_needs_is_refused_in_one_line(text, tmp_path):
    refusal(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("a: größer".encode("latin-1"))
    for name, why in {"folder": "directory", "latin": "not UTF-8", "none": "No such"}.items():
        with pytest.raises(InputError, match=why):
            read_yaml(tmp_path / f"{name}.yaml", "study")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert reading(tmp_path, "\ufeffa: 1") == {"a": 1}


@pytest.mark.parametrize("path", sorted((NOTEBOOKS / "studies").glob("*.yaml")), ids=str)
def test_the_librarys_own_studies_mean_what_they_did(path):
    assert read_yaml(path, "study") == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("word", ["no", "Off", "yes", "ON"])
def test_a_word_is_a_flag_where_one_is_meant(word):
    flag = word.lower() in ("yes", "on")
    assert RunConfig(model="tiny", repeat=word).repeat is flag
    config = config_of({"method": "galore", "method_options": (f"spread_refresh={word}",)})
    assert resolve(config).method_options["spread_refresh"] is flag
    with pytest.raises(InputError, match=f"proj_type: '{word}' is not allowed"):
        resolve(config_of({"method": "galore", "method_options": (f"proj_type={word}",)}))
    own = {"optimizer": "torch.optim.SGD", "optimizer_options": {"nesterov": word}}
    with pytest.raises(InputError, match=f"optimizer_options.nesterov: '{word}' is not allowed"):
        resolve(RunConfig(model="tiny", **own))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("scale=010",), "write 10"),
        (("scale=1:30",), "base of 60"),
        (("scale=1", "scale=2"), "given twice"),
    ],
)
def test_options_on_the_command_line_follow_the_same_rules(options, said):
    with pytest.raises(InputError, match=said):
        config_of({"method": "galore", "method_options": options})


def test_numbers_with_exponents_are_numbers_from_everywhere():
    assert config_of({"model": "tiny", "tokens": "4e6"}).tokens == 4_000_000
    assert config_of({"method_options": ("scale=1e-1",)}).method_options == {"scale": 0.1}
    # papermill gives `-p` as numbers, and what its YAML (`-f`, `-y`) doesn't take for one as text
    for tokens in (_resolve_type("4e6"), yaml.safe_load("4e6")):
        assert RunConfig(model="tiny", tokens=tokens).tokens == 4_000_000
    more = RunConfig(model="tiny", method_options={"scale": "3e-3"}, corpus="text:1e3")
    assert (more.method_options, more.corpus) == ({"scale": 0.003}, "text:1e3")
    with pytest.raises(InputError, match="steps: '1e-3' is not allowed"):
        RunConfig(model="tiny", steps="1e-3")
    assert read_value("a: b: c", "option") == "a: b: c"


def test_dates_are_text():
    assert not isinstance(read_value("2026-11-28", "option"), datetime.date)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8
)  # fmt: skip


@given(st.dictionaries(st.text(min_size=1), VALUES | st.sampled_from(["no", "010", "1:30", "4e6"])))
@settings(max_examples=60, deadline=None)
def test_a_notebook_gets_the_parameters_that_a_study_gives_it(tmp_path_factory, parameters):
    file = tmp_path_factory.getbasetemp() / "parameters.yaml"
    file.write_text(yaml.safe_dump(parameters))
    assert read_yaml_file(str(file)) == parameters
