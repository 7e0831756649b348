"""Dense matrices are decomposed by their Gram matrices: as exactly as by SVDs, where they are."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_lab.analysis.spectra_recorder import SpectraRecorder
from lowrank_lab.config import RunConfig
from lowrank_lab.layers import dense_singular_values, low_rank, truncated_svd
from lowrank_lab.methods.build import build, build_to_load
from lowrank_lab.methods.resolve import resolve

CONFIG = {"model": "tiny", "vocab_size": "byte", "steps": 10}
shapes = pytest.mark.parametrize(("m", "n"), [(9, 9), (12, 5), (5, 12), (1, 6), (6, 1)])


class Decompositions(TorchDispatchMode):
    """Counts decompositions by operator."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_linalg_svd", "_linalg_eigh"):
            self.found.setdefault(name, []).append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def weight(m, n, dtype=torch.float32):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m * n)).to(dtype)


@shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_vectors_and_values_are_those_of_an_svd(m, n, dtype):
    W = weight(m, n, dtype)
    for rank in {1, min(m, n)}:
        U, S, Vh = truncated_svd(W, rank)
        exact_U, exact_S, exact_Vh = torch.linalg.svd(W.double(), full_matrices=False)
        assert torch.allclose(S, exact_S, atol=1e-8 * exact_S[0])
        signs = (U * exact_U[:, :rank]).sum(0)
        assert torch.allclose(signs.abs(), torch.ones_like(signs))
        assert torch.allclose(U, exact_U[:, :rank] * signs, atol=1e-7)
        assert torch.allclose(Vh, exact_Vh[:rank] * signs[:, None], atol=1e-7)


@shapes
def test_signs_follow_from_the_matrix_so_that_devices_agree(m, n):
    U, _, Vh = truncated_svd(weight(m, n), 1)
    shorter = U if m <= n else Vh.T
    assert shorter.gather(0, shorter.abs().argmax(0, keepdim=True)) > 0


@pytest.mark.parametrize("found", [0, 1, 3])
def test_of_a_weight_of_low_rank_singular_values_are_zero_to_rounding(found):
    W = weight(8, found) @ weight(found, 10)
    exact = torch.linalg.svdvals(W.double())
    U, S, Vh = truncated_svd(W, 5)
    for values in (S, dense_singular_values(W).double()):
        assert (values - exact).abs().max() <= 1e-7 * exact[0]
    assert torch.allclose((U * S[:5]) @ Vh, W.double(), atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_a_weight_does_not_matter(size):
    W = weight(6, 9)
    _, S, Vh = truncated_svd(W * size, 3)
    assert torch.allclose(S, size * torch.linalg.svdvals(W.double()), rtol=1e-5)
    assert torch.allclose(Vh @ Vh.T, torch.eye(3, dtype=Vh.dtype))


def test_a_spectral_start_is_computed_on_the_device_of_the_run(monkeypatch):
    seen = []

    def noted(W, rank, device=None):
        seen.append(device)
        return truncated_svd(W, rank)

    monkeypatch.setattr(low_rank, "truncated_svd", noted)
    config = resolve(RunConfig(method="low-rank", init="spectral", **CONFIG))
    model, _ = build(config, torch.device("cuda", 1))
    assert set(seen) == {torch.device("cuda", 1)}
    assert len(seen) == 14
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_spectral_start_and_recorded_spectra_take_no_svd_of_a_dense_matrix():
    for method, init in (("low-rank", "spectral"), ("galore", None), ("sltrain", None)):
        with Decompositions() as count:
            config = resolve(RunConfig(method=method, init=init, **CONFIG))
            model, optimizer = build(config)
            recorder = SpectraRecorder(model, optimizer, config.spectra_layers)
            model.loss(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8).long()).backward()
            recorder.see_gradients()
            recorder.rows(0)
        dense = {(m.weight.shape[0], m.weight.shape[1]) for m in model.modules()
                 if isinstance(m, nn.Linear)} | {(32, 32), (88, 32), (32, 88)}  # fmt: skip
        assert not dense & set(count.found.get("_linalg_svd", []))


def test_a_model_for_loaded_weights_is_built_without_decompositions():
    config = resolve(RunConfig(method="low-rank", init="spectral", **CONFIG))
    whole = build(config)[0]
    with Decompositions() as count:
        empty = build_to_load(config)
    assert not count.found
    empty.load_state_dict(whole.state_dict())
    tokens = torch.arange(8)[None]
    assert torch.equal(empty.loss(tokens, tokens), whole.loss(tokens, tokens))
    layer = empty.model.layers[0].mlp.up_proj
    assert (layer.init, layer.scale) == ("spectral", 1.0)
