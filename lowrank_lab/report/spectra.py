"""The figures of recorded singular values: at the end, and while they grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank_lab import figures
from lowrank_lab.analysis.spectra import is_factor, middle_layers
from lowrank_lab.methods.registry import METHODS
from lowrank_lab.report.picture import Picture
from lowrank_lab.runs.run import Run, first_runs, spectra_of

MOST_SPECTRA = 6  # labels per figure: more lines or heat maps can't be told apart
GROWTH = ("largest", "stable_rank")


def spectra_pictures(ranked: Sequence[Run]) -> Iterator[Picture]:
    """Spectra of one seed of a few labels; factors that form no weight (CoLA's) are left out.

    Args:
        ranked: finished runs, best label first.
    """
    recorded = first_runs(run for run in ranked if run.has_spectra)
    recorded = [run for run in recorded if _has_weights(run)]
    runs = _few(recorded)
    spectra = spectra_of(runs)
    if spectra.empty:
        return
    which = f" {len(runs)} of {len(recorded)} variants." if len(runs) < len(recorded) else ""
    if len(runs) > 1:
        last = figures.last_spectra(spectra)
        yield Picture(
            "spectra", figures.compared_spectra(last), last,
            "Singular values of the weights at the end of training "
            f"(one layer of each kind; one seed).{which}",
        )  # fmt: skip
    if spectra["step"].nunique() < 2:
        return
    layer = middle_layers(spectra["layer"])[0]
    of_layer = spectra[spectra["layer"] == layer]
    maps = figures.spectra_over_training(of_layer.rename(columns={"label": "title"}), layer)
    yield Picture(
        "spectra_over_training", maps, of_layer,
        f"Singular values of one layer over training (one seed).{which}",
    )  # fmt: skip
    facts = figures.layer_facts(runs)
    yield Picture(
        "spectra_growth", figures.fact_curves(facts, GROWTH),
        facts[["label", "step", "layer", *GROWTH]],
        "Largest singular value and stable rank over training, mean of the recorded layers (one "
        f"seed).{which}",
    )  # fmt: skip


def _few(runs: Sequence[Run]) -> list[Run]:
    """At most MOST_SPECTRA runs in their order, as different as they can be.

    Full rank goes first, then one run of each kind of layer, one of each method, and the others;
    runs without refactorizations and resets before those with them.
    """
    plain_first = sorted(
        runs, key=lambda run: run.config.refactor_every + run.config.reset_every > 0
    )
    methods = [run.config.method for run in plain_first]
    kinds = [METHODS[name].layers if name in METHODS else name for name in methods]
    places = sorted(
        range(len(runs)),
        key=lambda i: (methods[i] != "full-rank", kinds[i] in kinds[:i], methods[i] in methods[:i]),
    )
    chosen = [plain_first[i] for i in places[:MOST_SPECTRA]]
    return [run for run in runs if run in chosen]


def _has_weights(run: Run) -> bool:
    return any(not is_factor(layer["layer"]) for layer in run.last_layers)
