"""Factorised models of transformers: saved, refused by a plain load, and loaded again."""

import json

import pytest
import torch
import transformers
from short import INIT, WITH_WEIGHT
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers import auto

import lowrank_lab as lab
from lowrank_lab.layers import KINDS, FactorizedLinear, SLTrainLinear

TARGETS = {
    "llama": r"_proj$",
    "t5": r"\.(q|k|v|o|wi|wo)$",
    "gpt2": r"c_(attn|proj|fc)$",
}
TOKENS = torch.arange(10)[None]

kinds = pytest.mark.parametrize("kind", KINDS)


def llama():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, vocab_size=64))


def t5():
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**size, vocab_size=64, decoder_start_token_id=0))


def gpt2():
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, vocab_size=64, **ends))


MAKE = {"llama": llama, "t5": t5, "gpt2": gpt2}
architectures = pytest.mark.parametrize("architecture", MAKE)


def factorized(kind, architecture="llama", **options):
    """A model in eval mode whose factors are as after some training."""
    torch.manual_seed(0)
    model = MAKE[architecture]()
    lab.factorize(model, kind, rank=4, target=TARGETS[architecture], init=INIT[kind], **options)
    for layer in model.modules():
        if isinstance(layer, FactorizedLinear):
            nn.init.normal_(layer.B, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model):
    decoder = {"decoder_input_ids": TOKENS} if model.config.model_type == "t5" else {}
    return model(input_ids=TOKENS.to(model.device), **decoder).logits


@architectures
@kinds
def test_a_saved_model_comes_back_with_the_same_layers_and_logits(kind, architecture, tmp_path):
    model = factorized(kind, architecture)
    model.save_pretrained(tmp_path)
    back = lab.load_pretrained(tmp_path)
    assert type(back) is type(model)
    assert torch.equal(logits(back), logits(model))
    assert lab.factorization(back) == lab.factorization(model)
    assert not back.training
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in back.named_parameters() if p.requires_grad} == trains
    again = tmp_path / "again"
    back.save_pretrained(again)
    assert torch.equal(logits(lab.load_pretrained(again)), logits(model))


@architectures
@pytest.mark.parametrize("kind", WITH_WEIGHT)
def test_a_model_made_dense_is_saved_and_loaded_as_any_other(kind, architecture, tmp_path):
    model = factorized(kind, architecture)
    expected = logits(model)
    lab.to_dense_(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "attn_implementation"}
    torch.testing.assert_close(
        logits(type(model).from_pretrained(tmp_path)), expected, rtol=1e-3, atol=1e-4
    )


@kinds
def test_loaded_models_can_be_converted_moved_and_used_without_their_head(kind, tmp_path):
    model = factorized(kind)
    model.save_pretrained(tmp_path)
    half = lab.load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {m.indices.dtype for m in half.modules() if isinstance(m, SLTrainLinear)} <= {
        torch.int32
    }
    half.half().float()
    assert (logits(half) - logits(model)).norm() <= 0.05 * logits(model).norm()
    placed = lab.load_pretrained(tmp_path, AutoModelForCausalLM, device_map={"": "cpu"})
    assert torch.equal(logits(placed), logits(model))
    body = lab.load_pretrained(tmp_path, LlamaModel)
    expected = model.model(input_ids=TOKENS).last_hidden_state
    assert torch.equal(body(input_ids=TOKENS).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    whole = lab.load_pretrained(tmp_path / "body", LlamaForCausalLM)
    assert torch.equal(whole.model(input_ids=TOKENS).last_hidden_state, expected)


def test_a_plain_load_refuses_the_folder_and_says_how(tmp_path, monkeypatch):
    factorized("low-rank").save_pretrained(tmp_path)
    for known in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "lowrank_lab", raising=False)  # as in a process without us
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"lowrank_lab\.load_pretrained"):
            cls.from_pretrained(tmp_path)


def test_a_folder_without_some_of_the_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    factorized("low-rank").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.B"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{name}: the folder has no weights of this name"):
        lab.load_pretrained(tmp_path)


def test_a_class_that_is_not_of_transformers_has_to_be_given(tmp_path):
    model = factorized("lora")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]}))
    with pytest.raises(ValueError, match=r"^model_class: None .* no 'Mine'$"):
        lab.load_pretrained(tmp_path)
    assert torch.equal(logits(lab.load_pretrained(tmp_path, LlamaForCausalLM)), logits(model))


@kinds
def test_what_the_trainer_saves_is_loaded_and_resumed(kind, tmp_path):
    transformers.logging.set_verbosity_error()
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    model = factorized(kind).train()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=1e-2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    back = lab.load_pretrained(tmp_path / "out")
    assert torch.equal(logits(back), logits(model.eval()))
    arguments.max_steps = 5
    for start, resume in ((factorized(kind), True), (back, None)):
        trainer = Trainer(start.train(), arguments, train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 5


def test_other_models_and_configs_are_not_touched():
    model = llama()
    before = model.config.to_dict()
    lab.factorize(nn.Sequential(nn.Linear(4, 4)), rank=2, target="0")
    lab.to_dense_(model)
    assert model.config.to_dict() == before
