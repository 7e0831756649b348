"""Scratch memory of CUDA's kernels, by the sizes that torch asks for."""

import pytest
import torch

from lowrank_lab.config import RunConfig
from lowrank_lab.memory.hidden import CUDA_KERNELS, cublas_bytes
from lowrank_lab.planning.simulate import simulate

KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
CONFIG = RunConfig(model="tiny", batch=2, sequence_length=128, steps=10, vocab_size="byte")


@pytest.mark.parametrize(
    ("shape", "rows", "width"),
    [((512, 8, 256, 64), 256, 64), ((2, 3, 100, 16), 128, 32), ((1, 1, 129, 136), 256, 192)],
)
def test_flash_attention_sums_gradients_in_float32_in_rounded_rows_and_widths(shape, rows, width):
    q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    sums, per_row = shape[0] * shape[1] * rows * width, shape[0] * shape[1] * rows
    for kernel in CUDA_KERNELS.values():
        assert kernel(q, q, q, q) == 4 * (sums + per_row)


def test_attention_in_float32_keeps_one_number_a_row():
    q = torch.empty(2, 3, 100, 16, device="meta")
    assert CUDA_KERNELS[KERNEL](q, q, q, q) == 4 * 2 * 3 * 100


@pytest.mark.parametrize(
    ("config", "bytes_"),
    [(None, 32 << 20), (":4096:8", 32 << 20), (":4096:2:16:8", 8_519_680), (":16:8", 1 << 17)],
)
def test_cublas_has_a_workspace_per_thread_of_the_size_that_its_variable_sets(
    monkeypatch, config, bytes_
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    assert cublas_bytes() == 2 * bytes_


def test_where_there_is_a_card_its_own_size_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cublas_workspace_size", lambda: 1000)
    assert cublas_bytes() == 2000


@pytest.mark.parametrize("precision", ["bf16", "amp-bf16", "fp32"])
def test_workspaces_are_a_category_of_steps_on_cuda_and_of_none_on_a_cpu(precision):
    config = CONFIG.replace(precision=precision)
    cuda, cpu = simulate(config, "cuda"), simulate(config)
    trace = cuda.steps["next"]
    course = trace.timeline()["workspaces"]
    flash = 4 * 2 * 2 * 128 * (32 + 1 if precision != "fp32" else 1)
    assert course[0] == cublas_bytes()
    assert course.max() == cublas_bytes() + flash
    assert trace.phase_of(int(course.argmax())) == "backward"
    assert cuda.peak.workspaces >= cublas_bytes()
    assert not any(t.timeline()["workspaces"].any() for t in cpu.steps.values())


def test_a_model_of_ones_own_has_them_too():
    model = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    report = simulate(
        device="cuda", model=model, optimizer=torch.optim.AdamW(model.parameters()),
        batch=torch.empty(2, 128, 32),
    )  # fmt: skip
    assert report.peak.workspaces >= cublas_bytes()
    assert "workspaces" in report.steps["next"].table().columns
