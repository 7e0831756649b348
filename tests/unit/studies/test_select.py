"""What a study takes over from an earlier one."""

import math

import pytest

from lowrank_lab.config import InputError, RunConfig
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.methods.resolve import resolve
from lowrank_lab.runs.files import write_json
from lowrank_lab.studies.study_file import load_study

BY = ["method", "refactor_every"]


@pytest.fixture
def tried(data, request, study_file):
    """Writes finished runs of a study named after the test, and gives its name."""
    name = request.node.name.replace("[", "-").rstrip("]")

    def write(*runs, place="runs"):
        for index, (fields, loss) in enumerate(runs):
            folder = data / place / name / f"{index}"
            folder.mkdir(parents=True)
            fields = {"model": "tiny", "vocab_size": 300, "steps": 10, "rank": 4, **fields}
            config = resolve(RunConfig(**fields)).model_dump()
            write_json(folder / "config.json", {"config": config})
            if loss is not None:
                write_json(folder / "result.json", {"validation_loss": loss})
        return name

    return write


def low_rank(lr, **fields):
    return {"method": "low-rank", "lr": lr, **fields}


def test_each_variant_takes_the_rate_with_the_lowest_validation_loss(study_file, tried):
    name = tried(
        *((low_rank(lr), loss) for lr, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 2.5))),
        *(({"method": "galore", "lr": lr}, loss) for lr, loss in ((1e-3, 3), (2e-3, 2), (4e-3, 4))),
    )
    path = study_file(
        select={"from": name, "by": "method", "best": "lr"},
        variants={"a": {"method": "low-rank"}, "b": {"method": "galore"}, "c": low_rank(0.5)},
    )
    assert [(label, c.lr) for label, c in load_study(path).runs.values()] == [
        ("a", 2e-3), ("b", 2e-3), ("c", 0.5),
    ]  # fmt: skip


def test_variants_may_take_what_is_best_in_any_of_several_studies(study_file, tried, data):
    name = tried((low_rank(1e-3), 1.0))
    other = tried(({"method": "galore", "lr": 2e-3}, 1.0), place="runs/other")
    path = study_file(
        select={"from": [name, f"other/{other}"]},
        variants={"a": {"method": "low-rank"}, "b": {"method": "galore"}},
    )
    with pytest.raises(InputError, match="without folders"):
        load_study(path)
    (data / "runs" / "other" / other).rename(data / "runs" / "later")
    path = study_file(
        select={"from": [name, "later"]},
        variants={"a": {"method": "low-rank"}, "b": {"method": "galore"}},
    )
    assert [c.lr for _, c in load_study(path).runs.values()] == [1e-3, 2e-3]
    path = study_file(select={"from": [name, "later"]}, variants={"a": {"method": "apollo"}})
    with pytest.raises(InputError, match=f"no such run in {name}, later"):
        load_study(path)


@pytest.mark.parametrize("wrong", [[], [1], ["a", None], 3, None])
def test_a_source_that_is_no_name_is_refused(study_file, wrong):
    path = study_file(select={"from": wrong}, variants={"a": {"method": "galore"}})
    with pytest.raises(InputError, match="a study's name, or a list of names"):
        load_study(path)


def test_each_point_of_a_grid_takes_what_is_best_for_it(study_file, tried):
    name = tried((low_rank(1e-3), 1.0), ({"method": "galore", "lr": 2e-3}, 1.0))
    path = study_file(select={"from": name}, grid={"method": ["low-rank", "galore"]})
    assert [(c.method, c.lr) for _, c in load_study(path).runs.values()] == [
        ("low-rank", 1e-3), ("galore", 2e-3),
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", [{"method": "low-rnak"}, {"method_options": None}])
def test_a_wrong_variant_is_named_before_anything_is_chosen_for_it(study_file, tried, wrong):
    name = tried((low_rank(1e-3), 1.0))
    best = ["lr", "method_options.alpha"]
    path = study_file(select={"from": name, "best": best}, variants={"a": wrong})
    with pytest.raises(InputError, match=r"mine\.yaml: select: a: method"):
        load_study(path)


def test_several_seeds_decide_together(study_file, tried):
    name = tried(
        (low_rank(1e-3, seed=0), 1.0), (low_rank(1e-3, seed=1), 4.0),
        (low_rank(2e-3, seed=0), 2.0), (low_rank(2e-3, seed=1), 2.0),
    )  # fmt: skip
    select = {"from": name, "edges": "allow"}
    path = study_file(select=select, variants={"a": {"method": "low-rank"}})
    assert [c.lr for _, c in load_study(path).runs.values()] == [2e-3]


def test_options_of_a_method_are_chosen_with_its_rate_and_around_makes_a_grid(study_file, tried):
    def galore(lr, scale):
        return {"method": "galore", "lr": lr, "method_options": {"scale": scale}}

    name = tried(
        (galore(1e-3, 0.25), 3.0), (galore(2e-3, 1.0), 2.0), (galore(2e-3, 0.25), 4.0),
        (low_rank(1e-3), 1.0),
    )  # fmt: skip
    best = ["lr", "method_options.scale"]
    path = study_file(
        select={"from": name, "best": best, "around": {"lr": [0.5, 1]}, "edges": best},
        variants={
            "g": {"method": "galore", "method_options": {"update_proj_gap": 7}},
            "l": {"method": "low-rank"},
        },
    )
    found = [(label, c.lr, c.method_options) for label, c in load_study(path).runs.values()]
    assert [(label, lr) for label, lr, _ in found] == [
        ("g, lr 0.001", 1e-3), ("g, lr 0.002", 2e-3), ("l, lr 0.0005", 5e-4), ("l, lr 0.001", 1e-3),
    ]  # fmt: skip
    assert all((o["scale"], o["update_proj_gap"]) == (1.0, 7) for _, _, o in found[:2])


def test_an_option_whose_best_value_follows_from_the_rank_is_left_to_the_variant(study_file, tried):
    spectral = {"method": "low-rank", "init": "spectral"}
    kaiming = {"method": "low-rank", "init": "kaiming", "method_options": {"alpha": 8.0}}
    name = tried(
        ({**spectral, "lr": 1e-3}, 2.0),
        ({**spectral, "lr": 2e-3}, 1.0),
        ({**kaiming, "lr": 3e-3}, 1.0),
    )
    select = {"from": name, "by": ["method", "init"], "best": ["lr", "method_options.alpha"]}
    select["edges"] = ["lr"]
    variants = {"a": {**spectral, "rank": 8}, "b": {"method": "low-rank", "init": "kaiming"}}
    found = [c for _, c in load_study(study_file(select=select, variants=variants)).runs.values()]
    # that of spectral factors is the rank: with another rank it is another one
    assert [(c.lr, c.method_options["alpha"]) for c in found] == [(2e-3, 8.0), (3e-3, 8.0)]


def test_a_best_value_that_is_the_default_of_its_width_is_taken_over_at_another(study_file, tried):
    scales = METHODS["galore"].options["scale"].default
    galore = {"method": "galore", "model": "micro", "lr": 1e-3}
    name = tried(({**galore, "method_options": {"scale": scales.at(64)}}, 1.0))
    select = {"from": name, "best": ["lr", "method_options.scale"]}
    variants = {"a": {"method": "galore", "model": "mini"}}
    (found,) = (
        c for _, c in load_study(study_file(select=select, variants=variants)).runs.values()
    )
    assert found.method_options["scale"] == scales.at(64) != scales.at(128)


def test_a_variant_can_take_the_values_of_another(study_file, tried):
    name = tried((low_rank(1e-3, refactor_every=4), 1.0), (low_rank(2e-3), 1.0))
    path = study_file(
        select={"from": name, "by": BY},
        variants={
            "own": {"method": "low-rank", "refactor_every": 4},
            "other": {"method": "low-rank", "refactor_every": 2, "select": {"refactor_every": 4}},
        },
    )
    assert [c.lr for _, c in load_study(path).runs.values()] == [1e-3, 1e-3]


def test_this_machine_s_runs_come_before_the_kept_ones(study_file, tried):
    name = tried((low_rank(1e-3), 1.0), place="study")
    path = study_file(select={"from": name}, variants={"a": {"method": "low-rank"}})
    assert [c.lr for _, c in load_study(path).runs.values()] == [1e-3]
    tried((low_rank(2e-3), 1.0))
    assert [c.lr for _, c in load_study(path).runs.values()] == [2e-3]


def test_kept_runs_count_for_what_this_machine_has_not_tried(study_file, tried):
    name = tried((low_rank(1e-3), 1.0), ({"method": "galore", "lr": 4e-3}, 1.0), place="study")
    tried((low_rank(2e-3), 2.0))
    variants = {"a": {"method": "low-rank"}, "b": {"method": "galore"}}
    path = study_file(select={"from": name}, variants=variants)
    assert [c.lr for _, c in load_study(path).runs.values()] == [2e-3, 4e-3]


@pytest.mark.parametrize("other", [{"steps": 20}, {"num_layers": 1}, {"batch": 2}])
def test_kept_runs_of_another_model_or_length_do_not_count_beside_own_ones(
    study_file, tried, other
):
    name = tried(({"method": "galore", "lr": 4e-3, **other}, 1.0), place="study")
    tried((low_rank(2e-3), 2.0))
    path = study_file(select={"from": name}, variants={"b": {"method": "galore"}})
    with pytest.raises(InputError, match="no such run in"):
        load_study(path)


def test_an_unfinished_study_chooses_nothing(study_file, tried):
    name = tried((low_rank(1e-3), 1.0), (low_rank(2e-3), None))
    with pytest.raises(InputError, match=r"no finished study.*ignored until 1 has finished"):
        load_study(study_file(select={"from": name}, variants={"a": {"method": "low-rank"}}))


def test_it_is_said_that_an_unfinished_study_left_its_runs_to_the_kept_ones(study_file, tried):
    name = tried((low_rank(1e-3), 1.0), (low_rank(2e-3), None))
    tried(({"method": "galore", "lr": 4e-3}, 1.0), place="study")
    path = study_file(select={"from": name}, variants={"a": {"method": "low-rank"}})
    with pytest.raises(InputError, match=f"no such run in {name}; .*ignored until 1 has finished"):
        load_study(path)


@pytest.mark.parametrize("losses", [(1.0, 2.0, 3.0), (3.0, 2.0, 1.0)])
def test_a_best_value_at_the_edge_of_its_grid_is_refused_unless_allowed(study_file, tried, losses):
    rates = (1e-3, 2e-3, 4e-3)
    name = tried(*((low_rank(lr), loss) for lr, loss in zip(rates, losses, strict=True)))
    variants = {"a": {"method": "low-rank"}}
    with pytest.raises(InputError, match=r"a: lr: 0.00\d is not allowed; it lies at the edge"):
        load_study(study_file(select={"from": name}, variants=variants))
    select = {"from": name, "edges": "allow"}
    assert len(load_study(study_file(select=select, variants=variants)).runs) == 1


def test_the_best_of_two_values_is_at_an_edge_and_a_single_value_is_not(study_file, tried):
    name = tried((low_rank(1e-3), 1.0), (low_rank(2e-3), 2.0), ({"method": "muon"}, 1.0))
    with pytest.raises(InputError, match="at the edge of the values"):
        load_study(study_file(select={"from": name}, variants={"a": {"method": "low-rank"}}))
    variants = {"a": {"method": "muon"}}
    assert len(load_study(study_file(select={"from": name}, variants=variants)).runs) == 1


def test_a_fit_takes_the_lowest_point_of_a_parabola_in_the_logarithm(study_file, tried):
    def loss(lr):
        return 2 + 0.1 * math.log2(lr / 3e-3) ** 2

    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    far = [(low_rank(0.5), 90.0), (low_rank(1e-5), 40.0)]  # diverged: they don't bend the curve
    name = tried(*((low_rank(lr), loss(lr)) for lr in rates), *far)
    select = {"from": name, "fit": "lr"}
    path = study_file(select=select, variants={"a": {"method": "low-rank"}})
    assert [c.lr for _, c in load_study(path).runs.values()] == [3e-3]
    path = study_file(select={**select, "around": {"lr": [1, 2]}}, grid={"method": ["low-rank"]})
    assert [c.lr for _, c in load_study(path).runs.values()] == [3e-3, 6e-3]


def test_a_diverged_run_bends_no_curve_and_next_to_one_the_best_rate_is_taken(study_file, tried):
    losses = {1e-3: 2.1, 2e-3: 2.0, 4e-3: 2.1, 8e-3: 5.0}
    beside = {1e-3: 2.1, 2e-3: 2.0, 4e-3: 5.0}
    name = tried(
        *((low_rank(lr), loss) for lr, loss in losses.items()),
        *(({"method": "muon", "lr": lr}, loss) for lr, loss in beside.items()),
    )
    variants = {"a": {"method": "low-rank"}, "b": {"method": "muon"}}
    path = study_file(select={"from": name, "fit": "lr"}, variants=variants)
    assert [c.lr for _, c in load_study(path).runs.values()] == [2e-3, 2e-3]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({1e-3: 1.0, 2e-3: 2.0}, "a fit needs three values near it"),
        ({1e-3: 3.0, 2e-3: 2.0, 0.1: 2.1}, "a fit needs three values near it"),
        ({1e-3: 2.1, 2e-3: 2.0, 3e-3: 2.05, 4e-3: 2.04, 6e-3: 1.99}, "have no lowest point"),
    ],
)
def test_a_fit_without_a_lowest_point_is_one_line(study_file, tried, losses, message):
    name = tried(*((low_rank(lr), loss) for lr, loss in losses.items()))
    select = {"from": name, "fit": "lr", "edges": "allow"}
    with pytest.raises(InputError, match=f"a: fit: lr: 0.00. is not allowed; .*{message}"):
        load_study(study_file(select=select, variants={"a": {"method": "low-rank"}}))


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"from": "nothing", "fit": "rank"}, "fit: 'rank' is not allowed; one of best: lr"),
        ("tune", "select: 'tune' is not allowed; a mapping with from"),
        ({"by": "method"}, "a mapping with from"),
        ({"from": "../x"}, "select: from: '../x' is not allowed; the name of a study"),
        ({"from": "nothing"}, "select: from: 'nothing' is not allowed; no finished study"),
        ({"from": "nothing", "by": "metod"}, "by: 'metod' is not allowed; .*'method'"),
        ({"from": "nothing", "by": "lr.x"}, "by: 'lr.x' is not allowed"),
        ({"from": "nothing", "best": []}, r"best: \[\] is not allowed"),
        ({"from": "nothing", "bets": "lr"}, "select: bets: 'lr' is not allowed; .*'best'"),
        ({"from": "nothing", "around": {"lr": [0]}}, "around: .* is not allowed"),
        ({"from": "nothing", "around": {"rank": [1]}}, "around: .* is not allowed"),
        (
            {"from": "nothing", "edges": True},
            "edges: True is not allowed; refuse, allow, or a list",
        ),
        ({"from": "nothing", "edges": ["rank"]}, r"edges: \['rank'\] is not allowed"),
    ],
)
def test_a_selection_that_means_nothing_is_one_line(study_file, select, message):
    with pytest.raises(InputError, match=f"mine.yaml: .*{message}"):
        load_study(study_file(select=select, variants={"a": {"method": "low-rank"}}))


def test_a_variant_like_nothing_that_was_tried_is_named(study_file, tried):
    name = tried((low_rank(1e-3), 1.0))
    with pytest.raises(InputError, match="select: a: 'method galore' is not allowed; no such run"):
        load_study(study_file(select={"from": name}, variants={"a": {"method": "galore"}}))
    variants = {"a": {"method": "low-rank", "select": {"rank": 4}}}
    with pytest.raises(InputError, match="select: a: rank: 4 is not allowed"):
        load_study(study_file(select={"from": name, "by": BY}, variants=variants))
