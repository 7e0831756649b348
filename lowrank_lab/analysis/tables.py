"""Tables of finished runs: how each variant ended, and differences between them, seed by seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from lowrank_lab.analysis.spectra import effective_rank
from lowrank_lab.analysis.stats import mean_interval, p_below
from lowrank_lab.memory.formulas import MIB
from lowrank_lab.runs.run import LAYER_FACTS, Run


def summary(finals: pd.DataFrame) -> pd.DataFrame:
    """One row a label, best first: n, test loss with interval, perplexity, sizes and time.

    Args:
        finals: `runs.final_table`.
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


def differences(finals: pd.DataFrame, labels: Iterable[str] | None = None) -> pd.DataFrame:
    """Paired differences of the test loss, A − B seed by seed, for every two labels.

    A row a pair with at least two seeds in common: n, mean and half the width of its 95 % interval
    (Student's t); `separated` where the interval leaves out 0. Pairs are not corrected for how many
    there are. Labels that stand for several configurations are left out.

    Args:
        finals: `runs.final_table`.
        labels: in their order; those of `summary` if None.
    """
    labels = summary(finals)["label"] if labels is None else labels
    return _differences(finals, itertools.combinations(comparable(finals, labels), 2))


def claims(finals: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """What a study asked: for each (A, B) whether A is below B, in the order of the questions.

    The columns of `differences`, and `p (A < B)` of a one-sided paired t-test. A pair that has not
    two seeds in common, or a label of several configurations, has a row without interval and p.

    Args:
        finals: `runs.final_table`.
    """
    below = [p_below(row[~np.isnan(row)].tolist()) for row in paired(finals, pairs).to_numpy()]
    return _differences(finals, pairs, fewest=0).assign(**{"p (A < B)": below})


def paired(finals: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Test loss of A less that of B: a row a pair, in their order, a column a seed.

    NaN where one of the two has no run with that seed, and for labels that aren't there or stand
    for several configurations.

    Args:
        finals: `runs.final_table`.
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
    """One row a label: how its recorded layers ended, as means over layers and seeds.

    Effective ranks of W and of W − W₀, condition numbers of the factors and their imbalance, the
    energy of the gradient that a projection captures and its overlap with the one before: those of
    them that some run has recorded. Only layers that every run with spectra has recorded count.
    """
    ends = []
    recorded = [(run, {layer["layer"]: layer for layer in run.last_layers}) for run in runs]
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
    """The mean of those that there are; NaN of none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else np.nan


def _differences(
    finals: pd.DataFrame, pairs: Iterable[tuple[str, str]], fewest: int = 2
) -> pd.DataFrame:
    """Paired differences of those pairs that have at least `fewest` seeds in common."""
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
    """Those of the labels that stand for one configuration each: one run a seed."""
    repeated = set(finals.loc[finals.duplicated(["label", "seed"]), "label"])
    return [label for label in labels if label not in repeated]


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """A summary or differences as text, with the digits that mean something."""
    digits = {
        "test loss": ".4f", "±": ".4f", "A − B": "+.4f", "p (A < B)": ".2g",
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
