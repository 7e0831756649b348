"""One table of bad inputs: each gets one line on stderr and status 2, and leaves nothing behind."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lowrank_lab.cli import main
from lowrank_lab.config import RunConfig
from lowrank_lab.methods.resolve import resolve

TRAIN = "train --corpus {text} --vocab-size 300 --model tiny --sequence-length 16 --batch 2"
BAD = {
    # what is wrong: (command line, words that the one line must hold)
    "unknown field": ("train --rnak 3", ["--rnak", "--rank"]),
    "unknown command": ("trian", ["trian"]),
    "methods from no file": ("--methods-from none.py methods", ["METHODS", "none.py", "no such"]),
    "kaiming only": (f"{TRAIN} --method lora --init spectral", ["init", "spectral", "kaiming"]),
    "nothing refactorized": (f"{TRAIN} --on-refactor reset", ["on_refactor", "refactor_every"]),
    "nothing to turn": (f"{TRAIN} --refactor-basis nearest", ["refactor_basis", "refactor_every"]),
    "a threshold alone": (f"{TRAIN} --refactor-above 0.1", ["refactor_above", "refactor_every"]),
    "imbalance above one": (f"{TRAIN} --refactor-above 1", ["refactor_above", "less than 1"]),
    "transport undone by a reset": (
        f"{TRAIN} --method low-rank --steps 40 --refactor-every 10 --reset-every 20 "
        "--on-refactor transport", ["on_refactor", "transport", "step 20"],
    ),
    "per-layer with clipping": (f"{TRAIN} --per-layer", ["clip", "1.0", "per_layer"]),
    "per-layer with pairs": (f"{TRAIN} --method loro --per-layer --clip 0", ["per_layer", "loro"]),
    "unknown optimizer": (f"{TRAIN} --optimizer torch.optim.Adom", ["optimizer", "Adom"]),
    "optimizer of a method that has one": (
        f"{TRAIN} --method galore --optimizer torch.optim.NAdam", ["optimizer", "galore"],
    ),
    "reset of an unknown optimizer": (
        f"{TRAIN} --optimizer pytorch_optimizer.SaRA --reset-every 20", ["reset_every", "20"],
    ),
    "reset without moments": (
        f"{TRAIN} --optimizer torch.optim.SGD --reset-every 20", ["reset_every", "no moments"],
    ),
    "merge beyond the run": (
        f"{TRAIN} --method relora --steps 9 --option merge_every=9", ["merge_every", "9"],
    ),
    "rank above a layer": (f"{TRAIN} --method low-rank --rank 99", ["rank", "99", "1 to 32"]),
    "rank 0": (f"{TRAIN} --method low-rank --rank 0", ["rank", "0", "1"]),
    "rank not a number": (f"{TRAIN} --rank many", ["rank", "many", "integer"]),
    "rank fractional": (f"{TRAIN} --rank 2.5", ["rank", "2.5", "integer"]),
    "unknown method": (f"{TRAIN} --method galor", ["method", "galor", "galore"]),
    "unknown model": ("train --model micr", ["model", "micr", "micro"]),
    "unknown corpus": ("train --corpus pyhton", ["corpus", "pyhton", "python"]),
    "unknown precision": (f"{TRAIN} --precision fp8", ["precision", "fp8", "bf16"]),
    "unknown schedule": (f"{TRAIN} --schedule wavy", ["schedule", "wavy", "cosine"]),
    "unknown init": (f"{TRAIN} --method low-rank --init zeros", ["init", "zeros", "spectral"]),
    "unknown device": (f"{TRAIN} --device tpu", ["device", "tpu", "cuda"]),
    "no CUDA here": (f"{TRAIN} --device cuda", ["device", "cuda"]),
    "negative lr": (f"{TRAIN} --lr -1", ["lr", "-1", "greater than 0"]),
    "lr nan": (f"{TRAIN} --lr nan", ["lr", "nan", "finite"]),
    "lr inf": (f"{TRAIN} --lr inf", ["lr", "inf"]),
    "lr not a number": (f"{TRAIN} --lr fast", ["lr", "fast", "number"]),
    "zero steps": (f"{TRAIN} --steps 0", ["steps", "0"]),
    "steps and tokens": (f"{TRAIN} --steps 9 --tokens 900", ["tokens", "900", "not both"]),
    "tokens below one step": (f"{TRAIN} --tokens 9", ["tokens", "9", "32"]),
    "more tokens than text": (f"{TRAIN} --tokens 999999999", ["tokens", "999999999", "repeat"]),
    "more steps than text": (f"{TRAIN} --steps 9999999", ["steps", "9999999", "repeat"]),
    "sequence longer than held-out": (
        "train --corpus {text} --vocab-size 300 --model tiny --sequence-length 900000 --batch 1",
        ["sequence_length", "900000", "validation"],
    ),
    "batch not divisible": (f"{TRAIN} --gradient-accumulation 3", ["gradient_accumulation", "3"]),
    "refactor period beyond the run": (
        f"{TRAIN} --method low-rank --steps 9 --refactor-every 9", ["refactor_every", "9"],
    ),
    "reset period beyond the run": (f"{TRAIN} --steps 9 --reset-every 50", ["reset_every", "50"]),
    "negative period": (f"{TRAIN} --reset-every -5", ["reset_every", "-5"]),
    "recovery of one step": (f"{TRAIN} --recovery-steps 1", ["recovery_steps", "1", "2"]),
    "recovery longer than the period": (
        f"{TRAIN} --reset-every 5 --recovery-steps 8", ["recovery_steps", "8", "5"],
    ),
    "strength above 1": (f"{TRAIN} --reset-strength 1.5", ["reset_strength", "1.5", "1"]),
    "nothing to refactorize": (
        f"{TRAIN} --method galore --refactor-every 5", ["refactor_every", "5", "galore"],
    ),
    "nothing to initialise": (f"{TRAIN} --init spectral", ["init", "spectral", "full-rank"]),
    "unknown option": (f"{TRAIN} --method galore --option scal=1", ["scal", "scale"]),
    "option out of range": (f"{TRAIN} --method galore --option scale=-1", ["scale", "-1", "0"]),
    "option of another type": (
        f"{TRAIN} --method galore --option update_proj_gap=often", ["update_proj_gap", "often"],
    ),
    "option without a value": (f"{TRAIN} --method galore --option scale", ["scale", "NAME=VALUE"]),
    "Fira on both sides": (f"{TRAIN} --method fira --option proj_type=full", ["proj_type", "full"]),
    "target matches nothing": (f"{TRAIN} --method low-rank --target nope", ["target", "nope"]),
    "target not a pattern": (f"{TRAIN} --target (", ["target", "regular expression"]),
    "heads that don't divide": (f"{TRAIN} --num-heads 5", ["num_heads", "5", "32"]),
    "vocabulary below the bytes": (
        "train --corpus {text} --vocab-size 100", ["vocab_size", "100", "257"],
    ),
    "vocabulary above uint16": ("train --vocab-size 70000", ["vocab_size", "70000", "65536"]),
    "vocabulary not a number": ("train --vocab-size some", ["vocab_size", "some"]),
    "vocabulary too large for the text": (
        "train --corpus {text} --vocab-size 60000", ["vocab_size", "60000", "too short"],
    ),
    "markov alphabet": ("data --corpus markov --vocab-size 100", ["vocab_size", "100", "64"]),
    "missing text": ("data --corpus text:{tmp}/none", ["corpus", "none", "no such file"]),
    "text without a path": ("data --corpus text:", ["corpus", "no such file"]),
    "missing shards": ("data --corpus c4:{tmp}/none", ["corpus", "none", "no such file"]),
    "folder without shards": ("data --corpus c4:{tmp}/folder", ["corpus", "folder", ".jsonl"]),
    "shard that is no JSON": (
        "data --corpus c4:{tmp}/short.txt", ["corpus", "short.txt line 1", "not JSON"],
    ),
    "dataset that isn't there": ("data --corpus hub:/none/here", ["corpus", "/none/here"]),
    "dataset without a name": ("data --corpus hub:", ["corpus", "hub:", "hub:NAME"]),
    "missing tokenizer": (f"{TRAIN} --tokenizer {{tmp}}/none", ["tokenizer", "no such file"]),
    "tokenizer of numbers": (
        "data --corpus markov --tokenizer {tmp}/short.txt", ["tokenizer", "short.txt", "numbers"],
    ),
    "not a tokenizer": (
        "data --corpus text:{tmp} --tokenizer {tmp}/short.txt", ["short.txt", "tokenizer.json"],
    ),
    "export of nothing": ("export {tmp}/folder {tmp}/out", ["run", "folder", "config.json"]),
    "export onto a file": ("export {tmp}/run {tmp}/short.txt", ["out", "short.txt", "file"]),
    "export among files": ("export {tmp}/run {tmp}/studies", ["out", "studies", "files in it"]),
    "empty text": ("data --corpus text:{tmp}/empty.txt", ["corpus", "empty.txt", "no text"]),
    "binary text": ("data --corpus text:{tmp}/binary.txt", ["corpus", "binary.txt", "binary"]),
    "text not UTF-8": ("data --corpus text:{tmp}/latin.txt", ["corpus", "latin.txt", "UTF-8"]),
    "text too short": ("data --corpus text:{tmp}/short.txt", ["corpus", "short.txt", "too short"]),
    "folder without text": ("data --corpus text:{tmp}/folder", ["corpus", "folder", "no text"]),
    "out is a file": (f"{TRAIN} --out {{tmp}}/short.txt", ["out", "short.txt", "file"]),
    "out holds other files": (f"{TRAIN} --out {{tmp}}", ["out", "not a run"]),
    "unknown answer to what isn't finite": (
        f"{TRAIN} --on-nonfinite ignore", ["on_nonfinite", "ignore", "skip"],
    ),
    "left out but per layer": (
        f"{TRAIN} --on-nonfinite skip --per-layer --clip 0", ["on_nonfinite", "per_layer"],
    ),
    "no checkpoint kept": (f"{TRAIN} --keep-latest 0", ["keep_latest", "0", "1"]),
    "checkpoints never": (f"{TRAIN} --checkpoint-every 0", ["checkpoint_every", "0", "1"]),
    "evaluations never": (f"{TRAIN} --eval-every 0", ["eval_every", "0", "1"]),
    "spectra of no pattern": (f"{TRAIN} --spectra-layers [", ["spectra_layers", "expression"]),
    "warm-up of the whole run": (f"{TRAIN} --warmup 1", ["warmup", "1"]),
    "negative clipping": (f"{TRAIN} --clip -1", ["clip", "-1", "0"]),
    "negative decay": (f"{TRAIN} --weight-decay -0.1", ["weight_decay", "-0.1", "0"]),
    "final rate above the peak": (f"{TRAIN} --min-lr-ratio 2", ["min_lr_ratio", "2", "1"]),
    "negative seed": (f"{TRAIN} --seed -1", ["seed", "-1", "0"]),
    "seed of more than 32 bits": (f"{TRAIN} --seed 4294967296", ["seed", "4294967296"]),
    "no batch": (f"{TRAIN} --batch 0", ["batch", "0", "1"]),
    "sequence of one token": ("train --sequence-length 1", ["sequence_length", "1", "2"]),
    "unknown reset": (f"{TRAIN} --reset-how forget", ["reset_how", "forget", "scale"]),
    "unknown moments": (f"{TRAIN} --reset-moments first", ["reset_moments", "first", "both"]),
    "unknown parameters": (f"{TRAIN} --reset-params some", ["reset_params", "some", "targets"]),
    "unknown state precision": (
        f"{TRAIN} --state-precision fp64", ["state_precision", "fp64", "same"],
    ),
    "no layers": (f"{TRAIN} --num-layers 0", ["num_layers", "0", "1"]),
    "no spread of initial weights": (
        f"{TRAIN} --initializer-range 0", ["initializer_range", "0", "greater"],
    ),
    "damaged configuration": (f"{TRAIN} --out {{tmp}}/damaged", ["config.json", "damaged"]),
    "report on a damaged run": ("report {tmp}/damaged", ["damaged", "not finished"]),
    "sample of a damaged run": ("sample {tmp}/damaged", ["config.json", "damaged"]),
    "memory of an unknown size": ("memory --model 8x", ["model", "8x"]),
    "card of no size": ("memory --model tiny --fits big", ["fits", "big"]),
    "memory at a rank above the layers": (
        "memory --model tiny --method low-rank --rank 99", ["rank", "99", "32"],
    ),
    "a world size of 0": ("memory --model tiny --world-size 0", ["world_size", "0", "1 or more"]),
    "a world size that is no number": (
        "memory --model tiny --world-size many", ["--world-size", "many", "integer"],
    ),
    "ranks that don't divide the batch": (
        "memory --model tiny --batch 8 --world-size 3 --all", ["world_size", "3", "batch 8"],
    ),
    "ranks that don't divide a piece": (
        "memory --model tiny --batch 8 --gradient-accumulation 4 --world-size 4",
        ["world_size", "4", "gradient_accumulation 4"],
    ),
    "ranks with updates per layer": (
        "memory --model tiny --batch 8 --world-size 2 --per-layer --all", ["per_layer", "fsdp2"],
    ),
    "ranks of merges": (
        "memory --model tiny --method relora --batch 8 --world-size 2 --option warm_start=9",
        ["warm_start", "9"],
    ),
    "more ranks than layers": (
        "memory --model tiny --method muon --batch 40 --world-size 40",
        ["world_size", "40", "14 layers"],
    ),
    "ranks to measure": (
        "memory --model tiny --batch 8 --world-size 2 --measure", ["measure", "world_size"],
    ),
    "unknown benchmark": ("bench speed", ["speed"]),
    "sample of nothing": ("sample {tmp}/folder", ["run", "folder", "config.json"]),
    "report on nothing": ("report {tmp}/folder", ["folder", "no runs"]),
    "report on no folder": ("report {tmp}/none", ["folder", "none", "no such folder"]),
    "report on no folder here": (
        "report no/such", ["folder: 'no/such' is", "no such folder, here or in"],
    ),
    "a value after a switch": (
        "train --model tiny --compile false", ["compile: 'false' is", "--no-compile for false"],
    ),
    "a switch with a value": ("train --no-per-layer=yes", ["per_layer: 'yes' is", "--per-layer"]),
    "a recovery beyond the next reset": (
        "train --model tiny --corpus markov --steps 20 --reset-every 5",
        ["recovery_steps: 10 is", "recovery_steps 5, or reset_every 10, is allowed"],
    ),
    "study with a key twice": (
        "study {tmp}/studies/twice.yaml", ["twice.yaml, line 2 and line 4", "lr", "once"],
    ),
    "study with an octal number": (
        "study {tmp}/studies/octal.yaml", ["octal.yaml, line 1", "010", "quote"],
    ),
    "study with a time as a number": (
        "study {tmp}/studies/clock.yaml", ["clock.yaml, line 1", "1:30", "quote"],
    ),
    "study with a label that is a number": (
        "study {tmp}/studies/label.yaml", ["label.yaml, line 1", "8", "quote"],
    ),
    "study that is a folder": ("study {tmp}/studies/folder.yaml", ["folder.yaml", "no such file"]),
    "option with an octal number": (
        f"{TRAIN} --method galore --option scale=010", ["method_options.scale", "010", "quote"],
    ),
    "option given twice": (
        f"{TRAIN} --method galore --option scale=1 --option scale=2", ["scale=2", "twice"],
    ),
    "optimizer that needs a closure": (f"{TRAIN} --optimizer torch.optim.LBFGS", ["LBFGS"]),
    "link to nothing": ("data --corpus text:{tmp}/links", ["gone.txt", "link to nothing"]),
    "corpus that is no file": ("data --corpus text:/dev/null", ["null", "no file"]),
    "text in UTF-16": ("data --corpus text:{tmp}/wide.txt", ["wide.txt", "UTF-16"]),
    "missing study": ("study {tmp}/none.yaml", ["study", "none.yaml", "no such file"]),
    "study not YAML": ("study {tmp}/studies/broken.yaml", ["study", "broken.yaml", "YAML"]),
    "study not a mapping": ("study {tmp}/studies/list.yaml", ["study", "list.yaml", "mapping"]),
    "study with an unknown key": ("study {tmp}/studies/key.yaml", ["gird", "grid"]),
    "study with unknown field": ("study {tmp}/studies/field.yaml", ["field.yaml", "rnak", "rank"]),
    "study, bad value": ("study {tmp}/studies/value.yaml", ["value.yaml", "mine", "rank", "99"]),
    "study with an empty grid": ("study {tmp}/studies/grid.yaml", ["grid.yaml", "rank", "list"]),
    "seeds that aren't numbers": (
        "study {tmp}/studies/nb.yaml --seeds 0;1", ["seeds", "0;1", "whole numbers"],
    ),
    "study with an unknown notebook": ("study {tmp}/studies/nb.yaml", ["nb.yaml", "02_rum"]),
    "study with a notebook elsewhere": ("study {tmp}/studies/up.yaml", ["up.yaml", "secret"]),
    "study with a time limit in words": (
        "study {tmp}/studies/limit.yaml", ["limit.yaml: time_limit", "soon", "30m"],
    ),
    "time limit of nothing": ("study {tmp}/studies/x.yaml --time-limit 0m", ["time_limit", "0m"]),
    "FLOP/s without a dry run": ("study {tmp}/studies/x.yaml --flops 1e12", ["flops", "--dry-run"]),
    "no FLOP/s": ("study {tmp}/studies/x.yaml --dry-run --flops 0", ["flops", "0", "400e12"]),
    "FLOP/s in words": ("study {tmp}/studies/x.yaml --dry-run --flops many", ["flops", "many"]),
    "merge of nothing": ("merge {tmp}/new {tmp}/folder", ["folder", "no runs"]),
    "study with a name of other signs": ("study {tmp}/studies/a;b.yaml", ["a;b.yaml", "letters"]),
}  # fmt: skip

STUDIES = {
    "broken": "base: [",
    "list": "- base",
    "twice": "base:\n  lr: 0.1\n  steps: 9\n  lr: 0.2",
    "octal": "base: {steps: 010}",
    "clock": "{time_limit: 1:30, base: {corpus: markov}}",
    "label": "{base: {corpus: markov}, variants: {8: {rank: 8}}}",
    "key": "gird: {rank: [1]}",
    "field": "base: {rnak: 3}",
    "value": "variants: {mine: {method: low-rank, model: tiny, rank: 99}}",
    "grid": "grid: {rank: []}",
    "limit": "{time_limit: soon, base: {corpus: markov}}",
    "nb": "{notebook: 02_rum, base: {corpus: markov}}",
    "up": "{notebook: ../../secret, base: {corpus: markov}}",
    "a;b": "base: {}",
}


@pytest.fixture
def places(tmp_path, text_corpus):
    (tmp_path / "folder").mkdir()
    (tmp_path / "studies").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "latin.txt").write_bytes("größer ".encode("latin-1") * 99)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "wide.txt").write_text("größer " * 99, "utf-16")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.txt").symlink_to(tmp_path / "none")
    (tmp_path / "studies" / "folder.yaml").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"config": {"mod')
    (tmp_path / "run").mkdir()
    config = resolve(RunConfig(model="tiny", corpus="markov")).model_dump()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": config}))
    (tmp_path / "run" / "result.json").write_text("{}")
    for name, text in STUDIES.items():
        (tmp_path / "studies" / f"{name}.yaml").write_text(text)
    return {"tmp": str(tmp_path), "text": text_corpus}


def everything(*folders):
    return {path for folder in folders for path in folder.rglob("*")}


def is_of_whole_corpus(path):
    """A corpus that was prepared on the way stays, for the corrected command to use."""
    parts = path.parts
    if "corpora" not in parts:
        return False
    inside = parts[parts.index("corpora") + 1 :]
    folder = path if len(inside) < 2 else path.parents[len(inside) - 2]
    whole = (folder / "corpus.json").exists() and not folder.name.startswith(".")
    return not inside or whole


def test_the_table_has_more_than_a_hundred_rows():
    assert len(BAD) >= 100


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_gets_one_line_and_status_2_and_leaves_nothing(wrong, places, tmp_path, data):
    line, words = BAD[wrong]
    before = everything(tmp_path, data)
    result = CliRunner().invoke(main, line.format(**places).split())
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert all(is_of_whole_corpus(path) for path in everything(tmp_path, data) - before)


def test_bad_input_in_a_real_process_prints_no_traceback():
    command = [sys.executable, "-m", "lowrank_lab.cli", "train", "--method", "galor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "galore" in done.stderr


def test_methods_lists_names_as_json():
    result = CliRunner().invoke(main, ["methods", "--json"])
    assert result.exit_code == 0
    names = {row["name"] for row in json.loads(result.stdout)}
    assert {"full-rank", "low-rank", "galore", "fira"} <= names
