"""The book's Sphinx extension: directives that write tables from the library, and its hooks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import kept_studies
import page_hooks
from markdown_directive import MarkdownDirective
from markdown_tables import markdown_table
from sphinx.application import Sphinx

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


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("run-config-fields", RunConfigFields)
    app.add_directive("methods-table", MethodsTable)
    app.add_directive("states-table", StatesTable)
    app.add_directive("family-tree", FamilyTree)
    app.add_directive("more-methods", MoreMethods)
    app.add_directive("method-options", MethodOptions)
    kept_studies.add_directives(app)
    app.connect("autodoc-process-docstring", page_hooks.plain_properties, priority=100)
    app.connect("autodoc-process-docstring", page_hooks.escape_bars, priority=900)
    app.connect("doctree-read", page_hooks.set_alt_texts)
    app.connect("doctree-read", page_hooks.scrolling)
    sources = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    own = int(hashlib.sha256(sources).hexdigest()[:8], 16)
    return {"env_version": own, "parallel_read_safe": True, "parallel_write_safe": True}
