"""Tables of finished runs: results per variant, and paired differences between variants."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lowrank_lab.analysis.spectra import effective_rank, is_factor
from lowrank_lab.analysis.stats import (
    corrected,
    mean_interval,
    mean_intervals,
    p_below,
    p_within,
    seed_document_interval,
)
from lowrank_lab.memory.formulas import MIB
from lowrank_lab.runs.run import LAYER_FACTS, Run, stacked

MARGIN = 0.01  # nats per token


def summary(finals: pd.DataFrame) -> pd.DataFrame:
    """One row per label, lowest loss first: n, test loss, perplexity, sizes and time.

    Args:
        finals: returned by `runs.final_table`.
    """
    rows = []
    for label, group in finals.groupby("label", sort=False):
        loss = mean_interval(group["test_loss"].tolist())
        rows.append(
            {
                "label": label,
                "n": loss.n,
                "lr": "/".join(f"{lr:g}" for lr in sorted(group["lr"].unique())),
                "test loss": loss.mean,
                "±": loss.half_width,
                "test perplexity": group["test_perplexity"].mean(),
                "parameters": int(group["parameters"].mean()),
                "without embeddings": int(group["parameters_without_embeddings"].mean()),
                "weights + states (MiB)": (
                    group["weight_bytes"] + group["optimizer_state_bytes"]
                ).mean() / MIB,
                "without embeddings (MiB)": group["bytes_without_embeddings"].mean()
                / MIB,
                "tokens": int(group["tokens_seen"].mean()),
                "seconds": group["seconds"].mean(),
            }
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values("test loss", ignore_index=True)


def intervals(table: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean of a column with its 95 % interval (Student's t) per group, in the table's order.

    Returns:
        The columns `by`, then mean, ± (half the width; NaN for one value) and n.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(table[column]).all():
        raise ValueError(f"{column}: a value is not finite")
    return mean_intervals(table, by, column).rename(columns={"half_width": "±"})


def differences(finals: pd.DataFrame, labels: Iterable[str] | None = None) -> pd.DataFrame:
    """Paired differences in test loss, A − B per seed, for every pair of labels.

    One row per pair with at least two common seeds: n, the mean and the half-width of its 95 %
    Student-t interval. `separated` is true if the interval excludes 0. The intervals are not
    corrected for multiple comparisons. Labels with several configurations are excluded.

    Args:
        finals: returned by `runs.final_table`.
        labels: the labels to compare, in order; by default those of `summary`.
    """
    labels = summary(finals)["label"] if labels is None else labels
    return _differences(finals, itertools.combinations(comparable(finals, labels), 2))


def claims(finals: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The claims of a study, A < B for each pair (A, B), tested in the given order.

    The columns are those of `differences`, and `p (A < B)` from a one-sided paired t-test. The
    interval and p are NaN for pairs with fewer than two common seeds, or if a label has several
    configurations.

    Args:
        finals: returned by `runs.final_table`.
    """
    below = [p_below(row[~np.isnan(row)].tolist()) for row in paired(finals, pairs).to_numpy()]
    return _differences(finals, pairs, fewest=0).assign(**{"p (A < B)": below})


def verdicts(
    finals: pd.DataFrame, pairs: Sequence[tuple[str, str]], margin: float = MARGIN
) -> pd.DataFrame:
    """`claims`, corrected for their number, with an equivalence test of each.

    Further columns: `p (BH)`, of A < B, corrected by Benjamini and Hochberg's method; `p (equal)`,
    by two one-sided tests within ±margin; and `verdict`: *below* (p (BH) < 0.05), *above* (the same
    of B < A), *equal* (p (equal) < 0.05, uncorrected), or *open*.

    Args:
        margin: nats per token within which two losses count as equal.
    """
    table = claims(finals, pairs)
    values = [row[~np.isnan(row)].tolist() for row in paired(finals, pairs).to_numpy()]
    table["p (BH)"] = corrected(table["p (A < B)"].tolist(), "fdr_bh")
    p_above = corrected((1 - table["p (A < B)"]).tolist(), "fdr_bh")
    table["p (equal)"] = [p_within(row, margin) for row in values]
    kinds = [
        (table["p (BH)"] < 0.05, "below"),
        (np.array(p_above) < 0.05, "above"),
        (table["p (equal)"] < 0.05, "equal"),
    ]
    conditions, names = zip(*kinds, strict=True)
    table["verdict"] = np.select(conditions, names, "open")
    return table


def by_documents(runs: Iterable[Run], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Differences in test loss over seeds and documents, with bootstrap intervals of both.

    Columns: A, B, seeds, documents, `A − B`, low, high, and `share`, the share of documents on
    which A's loss is lower. Pairs without two common seeds and documents are left out.
    """
    rows = stacked(
        run.documents.assign(label=run.label, seed=run.config.seed) for run in runs if run.finished
    )
    found: list[tuple[Any, ...]] = []
    for a, b in pairs if len(rows) else ():
        wide = [
            rows[rows["label"] == label].pivot(index="seed", columns="document", values="loss")
            for label in (a, b)
        ]
        both = (wide[0] - wide[1]).dropna(how="all").dropna(axis=1)
        if min(both.shape) < 2:
            continue
        tokens = rows.drop_duplicates("document").set_index("document")["tokens"][both.columns]
        interval = seed_document_interval(both.to_numpy(), tokens.to_numpy())
        found.append((a, b, *both.shape, *interval, float((both.mean() < 0).mean())))
    names = ["A", "B", "seeds", "documents", "A − B", "low", "high", "share"]
    return pd.DataFrame(found, columns=names)


def paired(finals: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Test loss of A minus test loss of B: one row per pair, one column per seed.

    NaN if A or B has no run with that seed, is not in the table, or has several configurations.

    Args:
        finals: returned by `runs.final_table`.
    """
    pairs = list(pairs)
    labels = dict.fromkeys(itertools.chain(*pairs))
    wanted = finals[finals["label"].isin(comparable(finals, labels))]
    losses = wanted.pivot(index="seed", columns="label", values="test_loss")
    of = losses.reindex(columns=list(labels)).to_numpy(float).T
    at = {label: i for i, label in enumerate(labels)}
    a, b = ([at[pair[side]] for pair in pairs] for side in (0, 1))
    values = of[a] - of[b] if pairs else np.empty((0, len(losses)))
    return pd.DataFrame(values, columns=losses.index)


def structure(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per label: final structure of the recorded layers, averaged over layers and seeds.

    Columns: effective ranks of W and W − W₀; condition numbers and imbalance of the factors; the
    gradient energy captured by the projection, and its overlap with the top singular vectors.
    Columns that no run has recorded are dropped. Only layers recorded in every run with spectra
    are averaged; factors without a weight (CoLA) are left out.
    """
    ends = []
    recorded = [
        (run, {r["layer"]: r for r in run.last_layers if not is_factor(r["layer"])}) for run in runs
    ]
    names = [set(layers) for _, layers in recorded if layers]
    common = set.intersection(*names) if names else set()
    for run, by_name in recorded:
        layers = [layer for name, layer in by_name.items() if name in common]
        ranks = {
            f"effective rank of {what}": _mean(
                float(effective_rank(torch.tensor(layer[kind])))
                for layer in layers
                if None not in layer.get(kind, [None])  # not recorded, or not finite
            )
            for what, kind in (("W", "singular_values"), ("W − W₀", "update"))
        }
        facts = {
            name.replace("_", " "): _mean(layer.get(name) for layer in layers)
            for name in LAYER_FACTS
        }
        ends.append({"label": run.label, **ranks, **facts})
    means = pd.DataFrame(ends).groupby("label", sort=False).mean()
    return means.dropna(axis=1, how="all").reset_index()


def _mean(values: Iterable[float | None]) -> float:
    """The mean without None values; NaN if there are no others."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else np.nan


def _differences(
    finals: pd.DataFrame, pairs: Iterable[tuple[str, str]], fewest: int = 2
) -> pd.DataFrame:
    """Paired differences for pairs with at least `fewest` common seeds."""
    pairs = list(pairs)
    rows: list[tuple[Any, ...]] = []
    for (a, b), row in zip(pairs, paired(finals, pairs).to_numpy(), strict=True):
        there = row[~np.isnan(row)].tolist()
        if len(there) >= max(1, fewest):
            mean, half_width, n = mean_interval(there)
            rows.append((a, b, n, mean, half_width, abs(mean) > half_width))
        elif not fewest:
            rows.append((a, b, 0, np.nan, np.nan, False))
    return pd.DataFrame(rows, columns=["A", "B", "n", "A − B", "±", "separated"])


def comparable(finals: pd.DataFrame, labels: Iterable[str]) -> list[str]:
    """The labels with a single configuration, i.e. at most one run per seed."""
    repeated = set(finals.loc[finals.duplicated(["label", "seed"]), "label"])
    return [label for label in labels if label not in repeated]


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text, with significant digits only."""
    digits = {
        "test loss": ".4f", "±": ".4f", "A − B": "+.4f", "p (A < B)": ".2g",
        "p (equal)": ".2g", "p (BH)": ".2g", "p (above 0)": ".2g",
        "best rate": "g", "validation loss": ".4f", "down": ".2f", "up": ".2f", "width": ".2f",
        "diverges at": "g", "dense": ".4f", "A − dense": "+.4f",
        "gap": "+.4f", "slope": "+.4f", "predicted": "+.3f",
        "± predicted": ".3f", "share": ".0%",
        "test perplexity": ".3f", "seconds": ".0f",
        "weights + states (MiB)": ".2f", "without embeddings (MiB)": ".2f",
        "parameters": ",", "without embeddings": ",", "tokens": ",",
        "effective rank of W": ".2f", "effective rank of W − W₀": ".2f",
        "condition B": ".2f", "condition A": ".2f", "imbalance": ".3f",
        "captured energy": ".3f", "overlap": ".3f",
    }  # fmt: skip
    text = table.copy().astype(object)
    for column, digit in ((c, d) for c, d in digits.items() if c in table):
        text[column] = ["–" if pd.isna(v) else format(v, digit) for v in table[column]]
    return text.astype(str)
