"""One matrix: its errors are what algebra says, methods do what they are for, and panels answer."""

import ipywidgets
import pytest
import torch
from paths import NOTEBOOKS

from lowrank_lab import optim
from lowrank_lab.analysis import matrix_toy
from lowrank_lab.analysis.matrix_toy import Settings, fit
from lowrank_lab.analysis.spectra_recorder import momentum_direction
from lowrank_lab.config import InputError
from lowrank_lab.figures import matrix_toy as figures
from lowrank_lab.figures import png
from lowrank_lab.layers import LowRankLinear
from lowrank_lab.widgets import matrix_toy as view

W = matrix_toy.target()
STRETCHED = Settings("low-rank", period=40, imbalance=1000.0)


@pytest.fixture
def shown(monkeypatch):
    """What panels display, newest last."""
    boxes = []
    monkeypatch.setattr("IPython.display.display", boxes.append)
    return boxes


def widgets_in(box):
    """All widgets inside a box, in order."""
    for child in getattr(box, "children", ()):
        yield child
        yield from widgets_in(child)


def parts_of(box):
    """Knobs by their label, the picture and the text of a panel."""
    found = list(widgets_in(box))
    knobs = {w.description: w for w in found if getattr(w, "description", "")}
    picture, text = [w for w in found if type(w) is ipywidgets.HTML]
    return knobs, picture, text


def test_the_target_has_the_spectrum_that_was_asked_for():
    S = torch.linalg.svdvals(W)
    assert W.square().mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(S / S[0], torch.arange(1, 33) ** -0.75, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 31])
def test_the_tail_is_the_error_of_the_best_approximation(rank):
    best = matrix_toy.best_approximation(W, rank)
    assert torch.linalg.matrix_rank(best) == rank
    assert matrix_toy.share_missing(best, W) == pytest.approx(matrix_toy.tail(W, rank), rel=1e-4)


def test_the_spectrum_sums_to_the_whole_energy():
    table = matrix_toy.spectrum_table(W)
    assert (table["singular_value"] ** 2).sum() == pytest.approx(W.square().sum().item())
    assert table["share"].sum() == pytest.approx(1)
    assert table["tail"].iloc[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("galore", optim.GaLore), ("fira", optim.Fira), ("full-rank", optim.ProjectedAdamW)],
)
def test_methods_are_the_optimizers_of_the_library(method, kind):
    done = fit(W, Settings(method, steps=2))
    assert type(done.optimizer) is kind
    assert ("rank" in done.optimizer.param_groups[0]) == (method != "full-rank")


def test_the_first_step_is_that_of_the_optimizer_on_the_true_gradient():
    p = torch.nn.Parameter(torch.zeros_like(W))
    p.grad = -W
    optim.GaLore([{"params": [p], "rank": 4, "scale": 1.0}], lr=0.2).step()
    torch.testing.assert_close(fit(W, Settings("galore", steps=1)).weight(), p.detach())


def test_gradients_of_the_factors_are_those_of_autograd():
    layer = LowRankLinear(torch.nn.Linear(48, 32, bias=False), 4, alpha=8.0)
    G = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    layer.dense_weight().backward(G)
    wanted = layer.B.grad.clone(), layer.A.grad.clone()
    matrix_toy._give_gradient_(layer, G)
    torch.testing.assert_close((layer.B.grad, layer.A.grad), wanted)


def test_the_same_settings_give_the_same_errors_and_leave_torchs_generator_alone():
    settings = Settings("low-rank", noise=1.0, steps=20)
    state = torch.random.get_rng_state()
    first = fit(W, settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.errors == fit(W, settings).errors
    assert first.errors != fit(W, settings.replace(seed=1)).errors
    assert len(first.errors) == len(first.alignment) + 1 == 21


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_factors_end_on_the_floor_of_their_rank(rank):
    done = fit(W, Settings("low-rank", rank))
    assert done.error == pytest.approx(matrix_toy.tail(W, rank), rel=0.01)
    assert done.error >= matrix_toy.tail(W, rank)


@pytest.mark.parametrize(("period", "ranks"), [(0, 4), (80, 8), (40, 16)])
def test_each_projection_of_galore_adds_its_rank(period, ranks):
    done = fit(W, Settings("galore", 4, period=period))
    assert torch.linalg.matrix_rank(done.weight(), rtol=1e-4) == ranks
    bound = matrix_toy.tail(W, ranks)
    assert bound <= done.error < 1.2 * bound


def test_the_residual_frees_fira_from_a_single_projection():
    assert fit(W, Settings("fira", 1)).error < 1e-3
    assert fit(W, Settings("galore", 1)).error > 0.5


def test_refactorization_and_reset_together_repair_stretched_factors():
    plain = fit(W, STRETCHED.replace(period=0)).error
    reset = fit(W, STRETCHED.replace(refactor=False, strength=1.0))
    balanced = fit(W, STRETCHED).error
    both = fit(W, STRETCHED.replace(strength=1.0))
    assert both.error < 1.01 * matrix_toy.tail(W, 4) < balanced < plain
    assert both.error < reset.error < plain
    assert max(reset.errors[40:]) > 1 > 0.5 > max(both.errors[40:])  # the jump after a reset alone


def test_momentum_that_is_carried_along_is_better_than_momentum_of_other_factors():
    kept, carried = (fit(W, STRETCHED.replace(on_refactor=c)).error for c in ("keep", "transport"))
    assert carried < kept


def test_a_reset_helps_galore_where_refreshes_are_frequent():
    often = Settings("galore", period=10, noise=0.3)
    table = matrix_toy.event_table(
        {str(s): fit(W, often.replace(strength=s)) for s in (0.0, 0.5, 1.0)}
    )
    assert table["error_before"].nunique() == 1
    assert table["first_step"].is_monotonic_increasing
    assert table["error_later"].is_monotonic_decreasing
    assert table["error_end"].iloc[2] < 0.5 * table["error_end"].iloc[0]


def test_balanced_factors_have_equal_spectra_and_the_same_product():
    factors = matrix_toy.factors_table(4, 1000.0)
    values = factors.set_index(["when", "factor"])["singular_value"]
    product = values["after", "B·A"].to_numpy()
    assert values["after", "B"].to_numpy() == pytest.approx(product**0.5, rel=1e-4)
    assert values["after", "A"].to_numpy() == pytest.approx(product**0.5, rel=1e-4)
    assert values["before", "B·A"].to_numpy() == pytest.approx(product, rel=1e-4)
    table = matrix_toy.conditions_table(factors).set_index(["when", "factor"])
    condition = table["condition_number"]
    assert condition["before", "B"] > 500
    assert condition["after", "B"] == pytest.approx(condition["after", "A"], rel=1e-4)


def test_transport_leaves_momentum_alone_where_a_refresh_only_turns_the_basis():
    flat = matrix_toy.best_approximation(matrix_toy.target(power=0.0), 4)
    never = Settings("galore", steps=21)
    ends = {"never": fit(flat, never)}
    for how in ("keep", "transport"):
        ends[how] = fit(flat, never.replace(period=20, on_refresh=how))
    directions = {how: momentum_direction(end.layer, end.optimizer) for how, end in ends.items()}
    cosines = {how: matrix_toy.cosine(directions["never"], D) for how, D in directions.items()}
    assert cosines["transport"] == pytest.approx(1, abs=1e-4)
    assert cosines["keep"] < 0.5


def test_the_cosine_of_a_zero_matrix_is_zero():
    X = torch.ones(2, 3)
    assert matrix_toy.cosine(X, -2 * X) == pytest.approx(-1)
    assert matrix_toy.cosine(X, 0 * X) == 0


def test_a_grid_has_a_row_for_each_point():
    table = matrix_toy.grid_table(W, Settings("galore", steps=5), rank=(2, 4), noise=(0.0, 1.0))
    assert table[["rank", "noise"]].to_numpy().tolist() == [[2, 0], [2, 1], [4, 0], [4, 1]]
    assert table["best_of_rank"].tolist() == [matrix_toy.tail(W, r) for r in (2, 2, 4, 4)]
    assert table["error"].iloc[3] == fit(W, Settings("galore", noise=1.0, steps=5)).error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "muon"), ("rank", 0), ("rank", True), ("period", -1), ("strength", 1.5),
        ("strength", float("nan")), ("noise", -0.1), ("imbalance", 0.5), ("steps", 0),
        ("on_refactor", "reset"), ("on_refresh", "never"), ("lr", -1), ("seed", 0.5), ("rnak", 4),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_allowed_is_named(field, value):
    with pytest.raises(InputError, match=f"^{field}: "):
        Settings().replace(**{field: value})


def test_a_rank_that_the_matrix_does_not_have_is_refused():
    for refused in (
        lambda: fit(W, Settings("galore", 33)),
        lambda: matrix_toy.tail(W, 0),
        lambda: matrix_toy.best_approximation(W, 33),
    ):
        with pytest.raises(InputError, match="a 32×48 matrix takes 1 to 32"):
            refused()


def test_a_table_of_events_needs_an_event():
    with pytest.raises(InputError, match=r"^fits: 'galore' "):
        matrix_toy.event_table({"galore": fit(W, Settings("galore", steps=2))})


def test_curves_are_drawn_with_their_last_errors_beside_them():
    fits = {"fira": fit(W, Settings("fira", steps=30)), "galore": fit(W, Settings("galore"))}
    figure = figures.error_curves(matrix_toy.curves_table(fits), {"floor": 0.2611}, (10, 20))
    texts = [text.get_text() for text in figure.axes[0].texts]
    wanted = [f"{name}  {done.error:.4f}" for name, done in fits.items()]
    assert sorted(texts) == sorted([*wanted, "floor  0.2611"])


def test_headless_panels_are_drawn_beforehand(shown):
    ranks = view.approximate(W, 4)
    assert ranks.texts[2] == f"rank = 4, error {matrix_toy.tail(W, 4):.4f}"
    assert (len(set(ranks.images)), ranks.start) == (6, 2)
    methods = view.explore(W, Settings("galore", steps=5))
    assert [text.split(",")[0] for text in methods.texts] == list(matrix_toy.METHODS)
    assert methods.texts[methods.start].startswith("galore, rank = 4, ")
    assert all("singular value against index" in alt for alt in methods.alts)
    assert not shown


def test_the_rank_slider_writes_the_error_and_changes_the_picture(shown):
    view.approximate(W, 4, headless=False)
    knobs, picture, text = parts_of(shown[0])
    before = picture.value
    knobs["rank"].value = 7
    assert text.value == f"rank = 7, error {matrix_toy.tail(W, 7):.4f}"
    assert picture.value != before


def test_every_knob_has_a_label_and_the_answer_says_what_it_was_set_to(shown):
    view.explore(W, Settings("galore", period=7, steps=20), headless=False)
    knobs, picture, text = parts_of(shown[0])
    assert tuple(knobs) == view.KNOBS
    for name, value in {"rank": 6, "period": 10, "strength": 0.5, "noise": 1.0}.items():
        before = picture.value
        knobs[name].value = value
        assert f"{name} = {value:g}" in text.value
        assert picture.value != before
    settings = Settings("galore", 6, period=10, strength=0.5, noise=1.0, steps=20)
    assert f"error {fit(W, settings).error:.4f}" in text.value


def test_a_picture_drawn_over_another_is_the_same_as_a_new_one():
    old, new = (fit(W, Settings(m, period=5, steps=20)) for m in ("low-rank", "fira"))
    drawn_over = figures.fit_result(W, new, new, figures.fit_result(W, old, new))
    assert png(drawn_over) == png(figures.fit_result(W, new, new))
    assert png(figures.approximation(W, 9, figures.approximation(W, 4))) == png(
        figures.approximation(W, 9)
    )


def test_knobs_that_a_method_does_not_use_are_grey(shown):
    view.explore(W, Settings("full-rank", steps=5), headless=False)
    knobs, _, text = parts_of(shown[0])
    assert {n for n, k in knobs.items() if k.disabled} == {"rank", "refactor", "imbalance"}
    knobs["method"].value = "low-rank"
    assert not [n for n, k in knobs.items() if k.disabled]
    assert text.value.startswith("low-rank, rank = 4")


def test_a_knob_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"^knobs: 'lr' "):
        view.explore(W, Settings(), ("rank", "lr"))


def test_an_answer_fits_what_is_new_once_and_draws_over_the_last_figure(shown, monkeypatch):
    fits, drawn = [], []

    class Counted(figures.Drawing):
        def __init__(self, *args, **options):
            drawn.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(figures, "Drawing", Counted)
    monkeypatch.setattr(matrix_toy, "fit", lambda target, s: fits.append(s) or fit(target, s))
    view.explore(W, Settings("fira", period=40, noise=0.3), headless=False)
    assert (len(fits), len(drawn)) == (2, 1)  # with the reference: full rank
    knobs, *_ = parts_of(shown[0])
    start = knobs["rank"].value
    for rank in (start + 1, start + 2, start + 1, start):
        knobs["rank"].value = rank
    assert [s.rank for s in fits[2:]] == [start + 1, start + 2]
    assert len(drawn) == 1


def test_the_lesson_names_its_solutions_and_they_are_there():
    folder = NOTEBOOKS
    assert "solutions/01_one_matrix.ipynb" in (folder / "01_one_matrix.ipynb").read_text()
    assert (folder / "solutions" / "01_one_matrix.ipynb").exists()
