"""Export a trained run as a Hugging Face LLaMA folder, with factors and sparse parts merged."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_lab.config import InputError
from lowrank_lab.data.tokenizer import end_of_text
from lowrank_lab.layers import FactorizedLinear, require_dense_weights
from lowrank_lab.models.rms_norm import NORM_EPS
from lowrank_lab.models.rotary import ROPE_BASE
from lowrank_lab.runs.files import write_json
from lowrank_lab.runs.run import Run

ExportDtype = Literal["fp32", "bf16"]
DTYPES: dict[ExportDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(run: Run | Path | str, out: Path | str, dtype: ExportDtype | None = None) -> Path:
    """Write a run as a transformers folder: weights, configuration and tokenizer, if any.

    Args:
        run: a finished run, or its folder.
        out: a new or empty folder; it is written atomically.
        dtype: dtype of the weights; by default the run's, or float32 if the run has factors.
            Rounding merged factors to bfloat16 would lose small updates such as LoRA's.

    Raises:
        InputError: `run` is not a run folder or has not finished, has layers that LLaMA hasn't
            (CoLA), or `out` is not empty.
    """
    run, out = run if isinstance(run, Run) else Run(run), Path(out)
    config = run.config
    if not run.finished:
        raise InputError("run", str(run.folder), "it has not finished: result.json is missing")
    _check_place(out)
    if dtype is not None and dtype not in DTYPES:
        raise InputError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    try:
        weights = dense_weights(run.model, DTYPES[dtype] if dtype else None)
    except ValueError as error:
        why = str(error).partition("; ")[2]
        raise InputError("run", str(run.folder), f"LLaMA has no such layers: {why}") from None
    tokenizer = None if config.corpus == "markov" else run.tokenizer
    end = "" if tokenizer is None else end_of_text(tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_model(
            partial, run, weights, None if tokenizer is None else tokenizer.token_to_id(end)
        )
        if tokenizer is not None:
            tokenizer.save(str(partial / "tokenizer.json"))
            facts = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": end,
                "eos_token": end,
                "clean_up_tokenization_spaces": False,
            }
            write_json(partial / "tokenizer_config.json", facts)
        partial.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check_place(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise InputError("out", str(out), "it is a folder with files in it; name another one")
    elif out.exists() or out.is_symlink():
        raise InputError("out", str(out), "it is a file; name a folder")
    for parent in out.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise InputError("out", str(out), f"{parent} is a file")


@torch.no_grad()
def dense_weights(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights of a model by name, with each factorised layer merged into one `weight`.

    Factors are multiplied in float64 and rounded once.

    Args:
        dtype: dtype of the result; by default float32 if a layer is factorised, else the model's.

    Raises:
        ValueError: a layer has no dense weight.
    """
    require_dense_weights(model)
    weights = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, FactorizedLinear):
            dtype = dtype or torch.float32
            for part in layer.state_dict():
                if part != "bias":
                    del weights[f"{name}.{part}"]
            weights[f"{name}.weight"] = layer.merged_weight(dtype)
    return {name: t.to(dtype or t.dtype).contiguous() for name, t in weights.items()}


def _write_model(folder: Path, run: Run, weights: dict[str, Tensor], end: int | None) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size, config = run.config.size, run.config
    dtype = str(weights["lm_head.weight"].dtype).removeprefix("torch.")
    facts: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads,
        "head_dim": size.hidden_size // size.num_heads,
        "num_hidden_layers": size.num_layers,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": config.sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": config.initializer_range,
        "torch_dtype": dtype,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    write_json(folder / "config.json", facts)
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
