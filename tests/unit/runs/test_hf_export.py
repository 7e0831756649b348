"""What is exported is what was trained: transformers computes the same, with the same tokens."""

import json
import os
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from short import QUICK, short_options
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_lab as lab
from lowrank_lab.cli import main
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.hf_export import export
from lowrank_lab.runs.run import Run, find_runs
from lowrank_lab.training.preflight import check
from lowrank_lab.training.trainer import Trainer

TEXTS = ["", " ", "the model of rank 3.\n\n  low", "naïve café 漢字 \u2028\t\0", "a<|endoftext|>b"]


def small(method="full-rank", **values):
    given = {
        "model": "tiny", "num_layers": 1, "corpus": "markov", "steps": 4, "sequence_length": 16,
        "batch": 2, "method": method, "method_options": short_options(method, 2), "lr": 1e-2,
        "eval_tokens": 64, "test_tokens": 64,
    }  # fmt: skip
    return lab.RunConfig(**{**given, **values})


@pytest.fixture(scope="module")
def text_run(text_corpus, tmp_path_factory):
    config = small("low-rank", corpus=text_corpus, vocab_size=300, rank=4)
    return lab.train(config, tmp_path_factory.mktemp("text") / "run")


def logits_of(run, out):
    """Ours and transformers', computed in float32; longer than the sequences of the run."""
    ours, theirs = lab.load(run.folder), AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(0, ours.size.vocab_size, (3, 24), generator=torch.Generator())
    with torch.no_grad():
        return ours.float()(tokens), theirs.float()(tokens).logits


# Weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "method",  # an export doesn't know with what its dense weights were trained
    ["full-rank", "galore", *(name for name in QUICK if METHODS[name].has_products)],
)
def test_transformers_computes_the_logits_that_were_trained(method, precision, tmp_path):
    run = lab.train(small(method, precision=precision), tmp_path / "run")
    ours, theirs = logits_of(run, export(run, tmp_path / "out"))
    assert ours.std() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5


def test_layers_that_llama_does_not_have_are_refused_in_one_line(tmp_path):
    run = lab.train(small("cola"), tmp_path / "run")
    with pytest.raises(lab.InputError, match=r"^run: .*LLaMA has no such layers: ColaL") as caught:
        export(run, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["low-rank", "lora", "sltrain", "loro"])
@pytest.mark.parametrize("rank", [1, 32])
def test_the_smallest_and_the_largest_rank_are_merged(method, rank, tmp_path):
    run = lab.train(small(method, rank=rank), tmp_path / "run")
    ours, theirs = logits_of(run, export(run, tmp_path / "out"))
    assert (ours - theirs).abs().max() <= 1e-5


def test_a_sparse_part_moves_the_logits_it_is_merged_into(tmp_path):
    run = lab.train(small("sltrain"), tmp_path / "run")
    name = "model.layers.0.mlp.up_proj"
    layer = lab.load(run).get_submodule(name)
    weight = load_file(export(run, tmp_path / "out") / "model.safetensors")[f"{name}.weight"]
    low_rank = (layer.scale * layer.B @ layer.A).detach()
    added = (weight - low_rank).flatten()
    assert torch.allclose(added[layer.indices.long()], layer.values.detach(), atol=1e-6)
    added[layer.indices.long()] = 0
    assert added.abs().max() < 1e-6


def test_only_some_layers_factorised_leaves_the_others_as_they_are(tmp_path):
    run = lab.train(small("low-rank", target="up_proj$"), tmp_path / "run")
    weights = load_file(export(run, tmp_path / "out") / "model.safetensors")
    trained = load_file(run.folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[name], trained[name])
    ours, theirs = logits_of(run, tmp_path / "out")
    assert (ours - theirs).abs().max() <= 1e-5


def test_weights_keep_the_dtype_of_the_run_unless_factors_would_be_rounded(tmp_path):
    dense = lab.train(small(precision="bf16"), tmp_path / "dense")
    lora = lab.train(small("lora", precision="bf16"), tmp_path / "lora")
    found = []
    for run, dtype in ((dense, None), (dense, "fp32"), (lora, None), (lora, "bf16")):
        out = export(run, tmp_path / f"{run.folder.name}-{dtype}", dtype)
        stored = {w.dtype for w in load_file(out / "model.safetensors").values()}
        found += stored
        assert AutoModelForCausalLM.from_pretrained(out).dtype in stored
    assert found == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


def test_every_weight_of_the_folder_is_one_that_transformers_knows(tmp_path):
    run = lab.train(small("sltrain", num_layers=2), tmp_path / "run")
    out = export(run, tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_head_stays_untied_as_the_model_has_it(tmp_path):
    run = lab.train(small(), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_exported_model_generates(text_run, tmp_path):
    out = export(text_run, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("the model", return_tensors="pt")
    ids = model.generate(
        **prompt, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    assert tokenizer.decode(ids[0]).startswith("the model")


# Tokenizers


@pytest.mark.parametrize("vocab", [300, "byte"])
def test_text_becomes_the_same_tokens_and_text_again(vocab, text_corpus, tmp_path):
    run = lab.train(small(corpus=text_corpus, vocab_size=vocab), tmp_path / "run")
    ours, theirs = run.tokenizer, AutoTokenizer.from_pretrained(export(run, tmp_path / "out"))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False) == text
    assert theirs.eos_token_id == ours.token_to_id("<|endoftext|>")
    assert len(theirs) == run.config.size.vocab_size


def test_a_run_of_numbers_has_no_tokenizer_and_one_line_says_so(tmp_path):
    run = lab.train(small(), tmp_path / "run")
    done = CliRunner().invoke(main, ["export", str(run.folder), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "without a tokenizer" in done.output
    assert done.output.count("\n") == 1
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_run_needs_no_corpus_to_be_exported(texts_that_go, tmp_path):
    run = lab.train(small(corpus=f"text:{texts_that_go}", vocab_size="byte"), tmp_path / "run")
    shutil.rmtree(texts_that_go)
    assert (export(run, tmp_path / "out") / "tokenizer.json").exists()


def test_a_run_does_not_go_on_with_another_corpus(texts_that_go, tmp_path):
    config, corpus = check(small(corpus=f"text:{texts_that_go}", vocab_size="byte"))
    Trainer(config, corpus, tmp_path / "run").resume()
    (texts_that_go / "more.txt").write_text("something new " * 99)
    with pytest.raises(lab.InputError, match="it has changed since the run in out began"):
        lab.train(config, tmp_path / "run")


def test_another_corpus_does_not_lend_its_tokenizer(texts_that_go, tmp_path):
    run = lab.train(small(corpus=f"text:{texts_that_go}", vocab_size="byte"), tmp_path / "run")
    (run.folder / "tokenizer.json").unlink()  # as runs of before have none
    assert (export(run, tmp_path / "same") / "tokenizer.json").exists()
    (texts_that_go / "more.txt").write_text("something new " * 99)
    with pytest.raises(lab.InputError, match="has changed since the run"):
        export(Run(run.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def texts_that_go(text_folder, tmp_path):
    shutil.copytree(text_folder, tmp_path / "texts")
    return tmp_path / "texts"


# The folder


def test_what_is_exported_is_no_run_to_tables(text_run, tmp_path):
    shutil.copytree(text_run.folder, tmp_path / "run")
    export(text_run, tmp_path / "run" / "out")
    assert [run.folder for run in find_runs(tmp_path)] == [tmp_path / "run"]


def test_an_export_that_fails_leaves_nothing(text_run, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    done = CliRunner().invoke(main, ["export", str(text_run.folder), str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "disk full" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_and_missing_parents_are_places_to_write_to(text_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert (export(text_run, out) / "config.json").exists()
        assert not [p for p in out.parent.iterdir() if p.name.startswith(".")]
        assert os.access(out, os.R_OK | os.X_OK)


def make(folder, kind, text_run):
    """Something that can't be exported."""
    if kind == "empty":
        folder.mkdir()
    elif kind == "unfinished":
        config, corpus = check(small())
        Trainer(config, corpus, folder).resume()
    elif kind == "exported":
        export(text_run, folder)
    elif kind == "not JSON":
        folder.mkdir()
        (folder / "config.json").write_bytes(b"\xff{")
    else:
        shutil.copytree(text_run.folder, folder)
        if kind == "damaged":
            (folder / "model.safetensors").write_bytes(b"\x09" * 99)
        if kind == "another model's":
            other = resolve(small("full-rank", model="micro"))
            write_json(folder / "config.json", {"config": other.model_dump()})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "config.json is missing"),
        ("empty", "config.json is missing"),
        ("unfinished", "has not finished"),
        ("exported", "not a run folder"),
        ("not JSON", "config.json is damaged"),
        ("damaged", "does not hold its model"),
        ("another model's", "does not hold its model"),
    ],
)
def test_what_is_no_finished_run_is_refused_in_one_line(kind, said, text_run, tmp_path):
    folder = tmp_path / "run"
    if kind != "none":
        make(folder, kind, text_run)
    done = CliRunner().invoke(main, ["export", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(lab.InputError):
        lab.load(folder)


@pytest.mark.parametrize("kind", ["file", "full folder", "below a file", "link to nothing"])
def test_a_place_that_is_taken_is_refused_in_one_line(kind, text_run, tmp_path):
    out = tmp_path / "out"
    if kind == "full folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif kind == "link to nothing":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.write_text("mine")
        out = out / "deeper" if kind == "below a file" else out
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(main, ["export", str(text_run.folder), str(out)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert done.stderr.startswith("out: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_dtype_is_refused(text_run, tmp_path):
    with pytest.raises(lab.InputError, match="dtype: 'fp8' is not allowed; one of fp32, bf16"):
        export(text_run, tmp_path / "out", "fp8")


def test_the_configuration_says_what_transformers_needs(text_run, tmp_path):
    facts = json.loads((export(text_run, tmp_path / "out") / "config.json").read_text())
    assert facts["architectures"] == ["LlamaForCausalLM"]
    assert facts["max_position_embeddings"] == 16
    assert (facts["eos_token_id"], facts["vocab_size"]) == (0, 300)


# lab.load


@pytest.mark.parametrize("method", [name for name in QUICK if METHODS[name].layers] + ["galore"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loaded_model_is_the_trained_one_to_the_bit(method, precision, tmp_path):
    config, corpus = check(small(method, precision=precision))
    trainer = Trainer(config, corpus, tmp_path / "run")
    trainer.resume()
    while trainer.updates < config.total_steps:
        trainer.advance()
    trainer.finish()
    loaded, trained = lab.load(tmp_path / "run"), trainer.model.eval()
    assert not loaded.training
    tokens = torch.randint(0, 16, (3, 16))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), trained(tokens))


def test_loading_executes_nothing_from_the_folder(text_run, tmp_path):
    shutil.copytree(text_run.folder, tmp_path / "run")
    torch.save({"weights": 1}, tmp_path / "run" / "model.safetensors")  # a pickle
    with pytest.raises(lab.InputError, match="does not hold its model"):
        lab.load(tmp_path / "run")
