"""The paper's own tables as study files: they resolve and train, and their heads are right."""

import re

import pytest
import yaml
from click.testing import CliRunner
from paper_studies import (
    COLUMNS,
    PUBLISHED,
    ROW,
    agrees,
    assert_head_says,
    command_in,
    facts_of,
    head_of,
    path_of,
)
from paths import NOTEBOOKS

from lowrank_lab.cli import main
from lowrank_lab.commands.flags import config_of, given_flags
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.planning import resources
from lowrank_lab.studies.plan import plan_study
from lowrank_lab.studies.progress import plan_facts
from lowrank_lab.studies.study_file import load_study

METHODS = "full-rank spam stable-spam galore fira apollo low-rank lora relora sltrain loro".split()
CARD = 80e9


def flags_of(command, words):
    """The fields of RunConfig, the label and the folder that a command is given."""
    with main.commands[command].make_context(command, words) as context:
        names = {*RunConfig.model_fields, "label", "out"}
        return {name: value for name, value in context.params.items() if name in names}


def test_the_recipe_of_colas_authors_resolves_with_their_learning_rate_as_the_default():
    path = NOTEBOOKS / "studies" / "cola_60m.yaml"
    runs = {name: config for name, (_, config) in load_study(path, corpora=False).runs.items()}
    found = [config for config in runs.values() if config.method == "cola"]
    assert [c.method_options["recompute"] for c in found] == [False, True]
    for c in found:
        assert (c.weight_decay, c.clip, c.warmup, c.total_steps) == (0.01, 0.5, 0.2, 10_000)
        assert not c.method_options["only_lr_act"]
        default = resolve(RunConfig(model="60m", method="cola", corpus="markov"))
        assert (c.lr, c.rank) == (default.lr, default.rank)


def test_every_file_is_tested_here():
    assert {p.stem for p in (NOTEBOOKS / "studies").glob("paper_*")} == {
        f"paper_{size}" for size in PUBLISHED
    }


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_run_resolves_to_the_papers_recipe_without_a_corpus(size):
    runs = load_study(path_of(size), corpora=False).runs.values()
    configs = [config for _, config in runs]
    assert {config.method for config in configs} == set(METHODS)
    both = [c.method for c in configs if c.refactor_every and c.refactor_every == c.reset_every]
    assert both == ["low-rank", "sltrain"]
    rank, tokens = PUBLISHED[size]
    for config in configs:
        assert (config.model, config.size.vocab_size) == (size, 32000)
        assert config.rank in (rank, None)
        assert (config.batch, config.sequence_length) == (512, 256)
        assert 0 <= tokens - config.total_steps * config.tokens_per_step < config.tokens_per_step
        assert (config.precision, config.weight_decay, config.clip) == ("bf16", 0, 0)
        assert config.compile  # the hours in the head assume it
        assert (config.warmup, config.schedule, config.min_lr_ratio) == (0.1, "cosine", 0.1)
        assert config.init in ("kaiming", None)


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_head_says_what_formulas_say(size, monkeypatch):
    monkeypatch.setattr(resources, "QUICK_BYTES", float("inf"))
    assert_head_says(size, facts_of(size), [n for n in COLUMNS if n != "device_memory_bytes"])


def test_the_book_says_what_the_head_says():
    section = (NOTEBOOKS.parent / "docs" / "how-to" / "gpus.md").read_text()
    rows = re.findall(r"^\| ([a-z].+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) \|$", section, re.M)
    assert len(rows) == 5
    shown = {label: values for label, *values in re.findall(f"^{ROW}$", head_of("60m"), re.M)}
    for label, held, peak, hours in rows:
        assert [held, peak, hours] == [shown[label][i] for i in (0, 1, 3)]


def test_a_dry_run_with_flops_prints_such_rows_without_corpus_or_card(study_file):
    path = study_file(base={"model": "mini", "vocab_size": 2048, "corpus": "c4:nowhere"})
    result = CliRunner().invoke(main, ["study", str(path), "--dry-run", "--flops", "1e6"])
    assert result.exit_code == 0, result.stderr
    ((label, held, peak, _, hours, _),) = re.findall(f"^{ROW}$", result.stdout, re.M)
    assert label == "full-rank"
    assert 0 < float(held) < float(peak) < 1
    (run,) = plan_facts(plan_study(path, elsewhere=True), 1e6)["runs"]
    assert agrees(hours, run["flops"] / 1e6 / 3600)
    assert float(hours) > 1
    assert result.stdout.splitlines()[-1].startswith("1 runs, ")


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_card_holds_every_run_of_a_head(size):
    peaks = [float(peak) for _, _, peak, *_ in re.findall(f"^{ROW}$", head_of(size), re.M)]
    assert len(peaks) == 13
    assert max(peaks) * 1e9 < 0.9 * CARD


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_other_commands_of_a_head_are_about_its_runs(size):
    head = head_of(size)
    runs = load_study(path_of(size), corpora=False).runs
    ((run_id, (_, galore)),) = [item for item in runs.items() if item[1][0] == "galore"]
    flags = flags_of("train", command_in(head, "-m lowrank_lab train"))
    assert flags.pop("label") == "galore"
    assert flags.pop("out").parent.as_posix() == f"data/runs/paper_{size}"
    config = resolve(config_of(flags))
    assert config.run_id == run_id
    assert config.batch % (8 * config.gradient_accumulation) == 0  # for eight processes
    asked = config_of(
        {"steps": 1000} | given_flags(flags_of("memory", command_in(head, "lowrank-lab memory")))
    )
    for name in ("model", "method", "rank", "batch", "gradient_accumulation", "clip"):
        assert getattr(asked, name) == getattr(galore, name), name


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_study_loads_with_shards_and_a_tokenizer_in_the_data_folder(size, c4_names, study_file):
    path = study_file()
    content = yaml.safe_load(path_of(size).read_text())
    assert content["base"]["corpus"] == c4_names["corpus"]
    content["base"] |= c4_names | {"repeat": True, "eval_tokens": 512, "test_tokens": 512}
    path.write_text(yaml.safe_dump(content))
    assert len(load_study(path).runs) == len(content["variants"])


def test_missing_shards_are_one_line_that_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_LAB_DATA", str(tmp_path))
    said = []
    for _ in range(2):
        result = CliRunner().invoke(main, ["study", str(path_of("60m")), "--dry-run"])
        assert result.exit_code == 2
        said += result.stderr.splitlines()
        (tmp_path / "c4" / "en").mkdir(parents=True, exist_ok=True)
    missing, empty = said
    assert missing.startswith("paper_60m.yaml: full-rank: corpus: 'c4:c4/en' is not allowed")
    assert f"here or in {tmp_path}; put .json.gz shards of C4 there" in missing
    assert "c4/en' is not allowed; there is no shard in it: .json .json.gz" in empty
