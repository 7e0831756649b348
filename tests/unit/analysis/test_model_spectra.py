"""`lowrank_lab.spectra`: the table of any model's singular values."""

import copy

import pytest
import torch
import transformers
from torch import nn

import lowrank_lab as lab
from lowrank_lab.analysis.spectra import effective_rank


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=20, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def weight_of(model, name):
    layer = model.get_submodule(name)
    return layer.dense_weight() if hasattr(layer, "dense_weight") else layer.weight


@pytest.mark.parametrize("kind", ["low-rank", "lora", "sltrain"])
def test_rows_are_singular_values_of_each_layer_of_a_factorised_model(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 9), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
    lab.factorize(model, kind, rank=3, target="^1$")
    model[1].B.data.normal_()
    table = lab.spectra(model).set_index("layer")
    assert list(table.index) == ["1", "3"]
    for name, row in table.iterrows():
        exact = torch.linalg.svdvals(weight_of(model, name).detach().double())
        found = torch.from_numpy(row["singular_values"]).double()
        torch.testing.assert_close(found, exact[: len(found)], rtol=1e-5, atol=1e-6)
        assert row["effective_rank"] == pytest.approx(float(effective_rank(exact)), rel=1e-4)
        assert row["shape"] == tuple(weight_of(model, name).shape)
    assert table.loc["1", "rank"] == 3
    assert table["imbalance"].notna().to_dict() == {"1": True, "3": False}


def test_every_matrix_of_a_hugging_face_model_but_its_embeddings_has_a_row():
    model = gpt2()
    table = lab.spectra(model)
    expected = {
        name for name, module in model.named_modules()
        if type(module).__name__ in ("Conv1D", "Linear")
    }  # fmt: skip
    assert set(table["layer"]) == expected
    assert len(lab.spectra(model, target="attn.c_attn$")) == 2


def test_the_update_since_a_state_dict_and_the_gradient_have_columns():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).double()
    lab.factorize(model, rank=2, target="^0$")
    start = copy.deepcopy(model.state_dict())
    before = [weight_of(model, name).detach().clone() for name in ("0", "1")]
    model(torch.randn(8, 6).double()).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    table = lab.spectra(model, start=start)
    for i, name in enumerate(("0", "1")):
        moved = torch.linalg.svdvals((weight_of(model, name) - before[i]).detach())
        found = torch.from_numpy(table["update"][i])
        size = min(len(found), len(moved))
        torch.testing.assert_close(found[:size], moved[:size].float())
    G = torch.linalg.svdvals(model[1].weight.grad.float())
    torch.testing.assert_close(torch.from_numpy(table["gradient"][1]), G)
    assert lab.spectra(nn.Linear(3, 2))["gradient"][0] is None


def test_a_layer_that_is_not_finite_has_nan_and_the_others_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data[0, 0] = torch.inf
    table = lab.spectra(model)
    assert table["effective_rank"].isna().tolist() == [True, False]


def test_one_row_per_singular_value_by_explode():
    long = lab.spectra(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).explode("singular_values")
    assert long["layer"].tolist() == ["0"] * 4 + ["1"] * 3


def test_weights_tied_wrapped_or_parametrised_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[0])
    assert lab.spectra(model)["layer"].tolist() == ["0", "1"]


def test_a_parametrised_layer_has_its_spectrum_and_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.EmbeddingBag(5, 4))
    nn.utils.parametrizations.spectral_norm(model[0])
    before = copy.deepcopy(model.state_dict())
    table = lab.spectra(model, start=before)
    assert table["layer"].tolist() == ["0", "1"]
    assert table["update"].isna().tolist() == [True, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_update_of_a_bare_layer():
    layer = nn.Linear(3, 2)
    assert lab.spectra(layer, start=copy.deepcopy(layer.state_dict()))["update"][0].max() == 0


def test_what_has_no_values_or_no_layer_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"model: 0 is not allowed; .*meta"):
        lab.spectra(nn.Sequential(nn.Linear(3, 3, device="meta")))
    with pytest.raises(ValueError, match="target: 'x' is not allowed"):
        lab.spectra(nn.Sequential(nn.Linear(3, 3)), target="x")
    with pytest.raises(ValueError, match=r"start: no 0\.weight"):
        lab.spectra(nn.Sequential(nn.Linear(3, 3)), start={})
