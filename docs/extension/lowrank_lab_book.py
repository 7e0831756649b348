"""Sphinx directives that write tables from the library and the kept records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import page_hooks
import pandas as pd
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks" / "results.json"

# Types in signatures that have no entry: those of other libraries, whose documentation lies on a
# network, and those of modules behind the public names.
OUTSIDE = [
    (r"py:.*", r"(torch|nn|pandas|pd|numpy|np|pathlib|collections|typing|pydantic|matplotlib)\..*"),
    (r"py:.*", r"(Tensor|Path|Callable|Iterable|Sequence|Mapping|Any|Literal|DataFrame|Module)"),
    (r"py:class", r"(int|float|str|bool|dict|list|tuple|set|None|object|type|bytes|optional)"),
    (r"py:exc", r"(ValueError|RuntimeError|KeyError|OSError|FileNotFoundError|TypeError)"),
    (r"py:.*", r"(annotated_types|types)\..*|Llama|Tokenizer"),
    (r"py:class", r"lowrank_lab(\.\w+){2,}"),
]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table in Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_cell(c) for c in row)} |" for row in cells]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("*", "\\*")


class MarkdownDirective(SphinxDirective):
    """A directive whose content is Markdown that `lines` makes."""

    has_content = False
    classes: ClassVar[list[str]] = ["generated"]

    def lines(self) -> list[str]:
        raise NotImplementedError

    def sources(self) -> Iterable[Path]:
        """Files from which the lines are made: the page is read again when they change."""
        return [
            ROOT / "lowrank_lab" / "config.py",
            *(ROOT / "lowrank_lab" / "methods").glob("*.py"),
        ]

    def run(self) -> list[nodes.Node]:
        for path in self.sources():
            self.env.note_dependency(str(path))
        holder = nodes.container(classes=self.classes)
        source = self.get_source_info()[0]
        self.state.nested_parse(StringList(self.lines(), source), self.content_offset, holder)
        return [holder]


class RunConfigFields(MarkdownDirective):
    """The fields of RunConfig between two of them, as a table: name, type, default, meaning."""

    required_arguments = 1  # the first field of a group
    optional_arguments = 1  # the last one

    def lines(self) -> list[str]:
        from lowrank_lab import RunConfig

        names = list(RunConfig.model_fields)
        first, last = self.arguments[0], self.arguments[-1]
        rows = []
        for name in names[names.index(first) : names.index(last) + 1]:
            field = RunConfig.model_fields[name]
            rows.append((f"`{name}`", f"`{type_name(field.annotation)}`", f"`{field.default!r}`",
                         field.description or ""))  # fmt: skip
        rows = [(n, t, _short(d), m) for n, t, d, m in rows]
        return markdown_table(("field", "type", "default", "meaning"), rows)


def _short(default: str) -> str:
    return default if len(default) < 40 else "see `lowrank_lab.config`"


def type_name(annotation: Any) -> str:
    """A type as it is written: `int | None`, `kaiming | spectral`."""
    if get_origin(annotation) is not None and annotation.__class__.__name__ != "GenericAlias":
        return " | ".join(type_name(part) for part in get_args(annotation))
    if isinstance(annotation, str):
        return repr(annotation).strip("'")
    if annotation is type(None):
        return "None"
    return str(annotation) if get_args(annotation) else getattr(annotation, "__name__", "any")


class MethodsTable(MarkdownDirective):
    """METHODS as a table: what each is, its source, its weights, its states."""

    def lines(self) -> list[str]:
        rows = [
            (f"[`{m.name}`](../explanation/methods.md#{m.name})", m.summary, source_link(m.source),
             m.layers or "dense", m.states)
            for m in built_in()
        ]  # fmt: skip
        head = ("method", "what it does", "source", "layers", "optimizer states of an m×n weight")
        return markdown_table(head, rows)


class StatesTable(MarkdownDirective):
    """Weights and optimizer states of every method at two sizes, with moments in 8 bits as well."""

    def lines(self) -> list[str]:
        from lowrank_lab import RunConfig
        from lowrank_lab.planning.states import in_gigabytes, states

        names = [m.name for m in built_in()]
        columns = ("weights", "optimizer_states", "states_8bit")
        cells: dict[str, list[str]] = {name: [] for name in names}
        for model, rank in (("1b", 512), ("7b", 1024)):
            config = RunConfig(model=model, rank=rank, precision="bf16")
            for row in states(config, names):
                cells[row["method"]] += [in_gigabytes(row.get(column)) for column in columns]
        head = ("method", *(f"{title}, {model}" for model in ("1b", "7b")
                            for title in ("weights", "states", "in 8 bits")))  # fmt: skip
        return markdown_table(head, [(f"`{name}`", *row) for name, row in cells.items()])


class FamilyTree(MarkdownDirective):
    """METHODS as nested lists: what grew out of what, when, what it stores, when to use it."""

    classes: ClassVar[list[str]] = ["generated", "family-tree"]

    def lines(self) -> list[str]:
        from lowrank_lab.methods.family import family_tree

        return [
            f"{'  ' * (len(branches) // 3)}- **[{m.name}](../explanation/methods.md#{m.name})** "
            f"({m.year}), {m.states.split(';')[0]}: {m.use}"
            for branches, m in family_tree(built_in())
        ]


class MoreMethods(MarkdownDirective):
    """The methods that have no section with equations on the page yet."""

    def lines(self) -> list[str]:
        page = Path(self.env.doc2path(self.env.docname)).read_text()
        rest = [m for m in built_in() if f"\n({m.name})=\n" not in page]
        return [
            line
            for m in rest
            for line in (
                f"({m.name})=",
                "",
                f"**{m.name}**: {m.summary} ({source_link(m.source)}).",
                "",
            )
        ]


class MethodOptions(MarkdownDirective):
    """The options of every method, with learning rates at the widths 48 and 512."""

    def lines(self) -> list[str]:
        rows = []
        for m in built_in():
            rates = [f"{m.lr.at(width):g}" for width in (48, 512)]
            options = ", ".join(f"`{name}`" for name in m.options)
            rows.append((f"`{m.name}`", *rates, options))
        return markdown_table(("method", "lr, width 48", "lr, width 512", "options"), rows)


def built_in() -> list[Any]:
    """The rows of METHODS that the library itself has."""
    from lowrank_lab.methods.registry import ROWS

    return list(ROWS)


def source_link(source: str) -> str:
    """An arXiv id as a link; other sources as they are."""
    plain = source.replace(".", "").isdigit()
    return f"[arXiv {source}](https://arxiv.org/abs/{source})" if plain else source


class KeptStudy(MarkdownDirective):
    """The tables of a kept study: its rows, the answers to its questions, its recorded layers."""

    required_arguments = 1
    classes: ClassVar[list[str]] = ["kept"]

    def sources(self) -> Iterable[Path]:
        return records_of(self.arguments[0])

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.tables import claims, formatted, structure, summary
        from lowrank_lab.report import asked_in
        from lowrank_lab.runs.run import complete_runs

        name = self.arguments[0]
        folder = ROOT / "data" / "study" / name
        finals = finals_of(name)
        what, pairs = asked_in(ROOT / "notebooks" / "studies" / f"{name}.yaml")
        found = [f"`notebooks/studies/{name}.yaml`, {len(finals)} runs. {' '.join(what.split())}"]
        found += ["", "**How each variant ended**", "", *frame(formatted(summary(finals)))]
        if pairs:
            found += ["", "**Differences in test loss, A − B, seed by seed**", ""]
            found += frame(formatted(claims(finals, pairs)))
        ends = structure(complete_runs(folder))
        if len(ends.columns) > 1:
            found += ["", "**Recorded layers at the end of training**", "", *frame(formatted(ends))]
        return found


def finals_of(name: str) -> pd.DataFrame:
    """How each run of a kept study ended."""
    from lowrank_lab.runs.run import final_table, load_runs

    return final_table(load_runs(ROOT / "data" / "study" / name))


def records_of(name: str) -> list[Path]:
    """The files of a kept study, and its study file."""
    kept = ROOT / "data" / "study"
    found = [*kept.glob(f"{name}/**/*"), *kept.glob(f"{name}[._-]*")]
    return [*(p for p in found if p.is_file()), ROOT / "notebooks" / "studies" / f"{name}.yaml"]


SHARED = 0.25  # share of filled cells; an emptier table lists each row's own values


class KeptRates(MarkdownDirective):
    """Validation loss over the values of a setting, one row per variant of a kept study.

    The setting is the learning rate; a second argument names another, as it stands in labels.
    """

    required_arguments = 1
    optional_arguments = 1

    def sources(self) -> Iterable[Path]:
        return records_of(self.arguments[0])

    def lines(self) -> list[str]:
        from lowrank_lab.figures import rate_table

        name, *setting = self.arguments
        finals = finals_of(name)
        if setting:
            parts = finals["label"].str.rpartition(f", {setting[0]} ")
            table = finals.assign(variant=parts[0], at=parts[2].astype(float)).pivot_table(
                index="variant", columns="at", values="validation_loss"
            )
        else:
            table = rate_table(finals).pivot_table(index="label", columns="lr", values="mean")
        table = table.loc[table.min(axis=1).sort_values().index]
        if table.notna().to_numpy().mean() < SHARED:
            return self.by_row(table)
        shown = table.map(lambda loss: f"{loss:.3f}").where(table.notna(), "")
        head = ["variant", *(f"{value:g}" for value in shown.columns)]
        return markdown_table(head, shown.reset_index().to_numpy().tolist())

    @staticmethod
    def by_row(table: pd.DataFrame) -> list[str]:
        """The table for rows that share few values: each row lists its own, in ascending order."""
        cells = [[f"{loss:.3f} at {value:.3g}" for value, loss in row.dropna().items()]
                 for _, row in table.iterrows()]  # fmt: skip
        most = max(map(len, cells))
        filled = ([label, *own, *[""] * (most - len(own))]
                  for label, own in zip(table.index, cells, strict=True))  # fmt: skip
        return markdown_table(["variant", "lowest", *["…"] * (most - 1)], filled)


class KeptRobustness(KeptRates):
    """Each variant of a kept study at its best setting, and how far its rate may be off there."""

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.rates import robustness

        found = robustness(finals_of(self.arguments[0]))
        named = found["label"].str.partition(", ")
        best = found.assign(variant=named[0], setting=named[2]).drop_duplicates("variant")
        head = ["variant", "setting", "best rate", "validation loss", "÷", "×", "diverges at"]
        rows = []
        for _, row in best.iterrows():
            reach = [row["down"], row["up"], row["diverges at"]]
            shown = ["" if math.isnan(value) else f"{value:.3g}" for value in reach]
            found_at = (f"{row['best rate']:g}", f"{row['validation loss']:.3f}")
            rows.append([row["variant"], row["setting"], *found_at, *shown])
        if not best["setting"].any():
            head, rows = head[:1] + head[2:], [row[:1] + row[2:] for row in rows]
        return markdown_table(head, rows)


class KeptGaps(MarkdownDirective):
    """Each row's gap to full rank in kept studies of the ladder, one column per size.

    Two or more sizes add the slope of the gap over log₁₀ of the parameters, and the p-value of a
    one-sided test that the slope is above 0.
    """

    required_arguments = 1
    optional_arguments = 3

    def sources(self) -> Iterable[Path]:
        return [path for name in self.arguments for path in records_of(name)]

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.ladder import gap_table, gaps_of, slopes

        gaps = gaps_of([ROOT / "data" / "study" / name for name in self.arguments])
        table = gap_table(gaps)
        means = table.pivot_table(index="label", columns="parameters", values="gap")
        table["shown"] = table.apply(
            lambda row: f"{with_interval(row['gap'], row['±'])} ({row['n']})", axis=1
        )
        shown = table.pivot_table(
            index="label", columns="parameters", values="shown", aggfunc="first"
        )
        head = ["row", *(f"{size:,}" for size in shown.columns)]
        if len(shown.columns) > 1:
            steep = slopes(gaps).set_index("label")
            shown["slope"] = steep.apply(lambda x: with_interval(x["slope"], x["±"]), axis=1)
            shown["p"] = steep["p (above 0)"].map(lambda p: "" if math.isnan(p) else f"{p:.3g}")
            head += ["slope", "p"]
        shown = shown.loc[means.iloc[:, 0].sort_values().index].fillna("")
        return markdown_table(head, shown.reset_index().to_numpy().tolist())


class KeptCosts(KeptGaps):
    """Each row of kept ladders against a dense model of the same bytes, FLOPs and time.

    Time is the steps of a run times what `lowrank-lab bench steps` measured; rows that it has not
    measured have none. At the smallest size there is no smaller dense model: its rows are left out.
    """

    def sources(self) -> Iterable[Path]:
        return [*super().sources(), BENCHMARKS]

    def lines(self) -> list[str]:
        from lowrank_lab.analysis.costs import at_equal_cost, costs_of

        costs = costs_of([ROOT / "data" / "study" / name for name in self.arguments])
        sizes = dict(zip(costs["parameters"].unique(), self.arguments, strict=True))
        taken = step_times()
        costs["time"] = costs["steps"] * [
            taken.get(f"step at {sizes[size].rpartition('_')[2].upper()}, {label}", math.nan)
            for label, size in zip(costs["label"], costs["parameters"], strict=True)
        ]
        both = costs[["parameters", "label"]].drop_duplicates()
        both = both[both["parameters"] > min(sizes)]
        head = ["parameters at full rank", "row"]
        for cost, title in (("bytes", "bytes"), ("flops", "FLOPs"), ("time", "time")):
            table = at_equal_cost(costs.dropna(subset=[cost]), cost)
            shown = {
                f"share of {title}": table["share"].map("{:.0%}".format),
                f"A − dense, equal {title}": table.apply(
                    lambda row: with_interval(row["A − dense"], row["±"]), axis=1
                ),
            }
            head += shown
            found = table[["label", "parameters"]].assign(**shown)
            both = both.merge(found, on=["label", "parameters"], how="left")
        both = both.dropna(subset=head[2:], how="all").fillna("")
        both["parameters"] = both["parameters"].map("{:,}".format)
        return markdown_table(head, both[["parameters", "label", *head[2:]]].to_numpy().tolist())


def step_times() -> dict[str, float]:
    """Milliseconds by row of the benchmark `steps`, of the kind of machine that has them.

    Full rank's are the mean over the rounds that it took beside other rows.
    """
    kept = json.loads(BENCHMARKS.read_text())
    found: dict[str, list[float]] = {}
    for kind in (kept, *kept.get("machines", {}).values()):
        for row in kind["rows"]:
            if row["name"].startswith("step at S"):
                title, _, _ = row["name"].partition(", ")
                found.setdefault(row["name"], []).append(row["ours"])
                found.setdefault(f"{title}, full-rank", []).append(row["peer"])
        if found:
            break
    return {name: sum(taken) / len(taken) for name, taken in found.items()}


def with_interval(mean: float, half_width: float) -> str:
    """A signed number ± its interval, with minus signs."""
    width = "" if math.isnan(half_width) else f" ± {half_width:.3f}"
    return f"{mean:+.3f}{width}".replace("-", "−")


def frame(table: pd.DataFrame) -> list[str]:
    """A table of pandas as Markdown."""
    shown = table.astype(object).where(table.notna(), "")
    return markdown_table([str(c) for c in shown.columns], shown.to_numpy().tolist())


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("run-config-fields", RunConfigFields)
    app.add_directive("methods-table", MethodsTable)
    app.add_directive("states-table", StatesTable)
    app.add_directive("family-tree", FamilyTree)
    app.add_directive("more-methods", MoreMethods)
    app.add_directive("method-options", MethodOptions)
    app.add_directive("kept-study", KeptStudy)
    app.add_directive("kept-rates", KeptRates)
    app.add_directive("kept-robustness", KeptRobustness)
    app.add_directive("kept-gaps", KeptGaps)
    app.add_directive("kept-costs", KeptCosts)
    app.connect("autodoc-process-docstring", page_hooks.plain_properties, priority=100)
    app.connect("autodoc-process-docstring", page_hooks.escape_bars, priority=900)
    app.connect("doctree-read", page_hooks.set_alt_texts)
    app.connect("doctree-read", page_hooks.scrolling)
    sources = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    own = int(hashlib.sha256(sources).hexdigest()[:8], 16)
    return {"env_version": own, "parallel_read_safe": True, "parallel_write_safe": True}
