"""Studies and notebooks that come with the library: found by name, and copied for one's own use."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lowrank_lab.config import InputError, nearest
from lowrank_lab.paths import DATA, data_folder, in_checkout, shipped_notebooks

# HTML and not Markdown: Voilà reads the files of Markdown's pictures, and hangs at those outside
# its folder.
PICTURE = re.compile(r'^<img [^>]*src="(?:\.\./)+figures/[^>]*>\n\n?', re.MULTILINE)
COPIED = ("*.ipynb", "*.py", "solutions/*.ipynb", "studies/*.yaml")


def shipped_studies() -> dict[str, Path]:
    """The study files of the library by name."""
    return {path.stem: path for path in sorted((shipped_notebooks() / "studies").glob("*.yaml"))}


def find_study(study: Path | str) -> Path:
    """The study file at a path, else the library's own study of that name.

    Raises:
        InputError: there is neither; the line lists the names.
    """
    path, shipped = Path(study), shipped_studies()
    if path.is_file():
        return path
    if str(study) in shipped:
        return shipped[str(study)]
    allowed = f"there is no such file; studies of the library: {', '.join(shipped)}"
    raise InputError("study", str(study), allowed)


def find_notebook(study: Path, key: str, name: str) -> Path:
    """The notebook that a study file names, without its suffix.

    It is looked for beside the file, in the folder above, and among the library's own.

    Raises:
        InputError: there is none, or the name leads out of these folders.
    """
    folders = [study.resolve().parent, study.resolve().parent.parent, shipped_notebooks().resolve()]
    for folder in folders:
        path = (folder / f"{name.replace(chr(0), '')}.ipynb").resolve()
        if path.is_file() and path.is_relative_to(folder):
            return path
    known = {path.stem for folder in folders for path in folder.glob("*.ipynb")}
    raise InputError(f"{study.name}: {key}", name, f"no such notebook; {nearest(name, known)}")


@dataclass(frozen=True)
class Copied:
    """What `copy_notebooks` wrote, and where the notebooks will keep corpora and runs."""

    files: list[Path]
    data: Path


def copy_notebooks(folder: Path) -> Copied:
    """Copy the library's notebooks, their solutions, own_method.py and the study files.

    Links to pictures in the checkout are left out.

    Outside a checkout the data folder is created as well, so that the notebooks and the command
    line share it.

    Raises:
        InputError: one of the files is there already; nothing is copied then.
    """
    source = shipped_notebooks()
    names = [p.relative_to(source) for pattern in COPIED for p in sorted(source.glob(pattern))]
    if folder.exists() and not folder.is_dir():
        raise InputError("folder", str(folder), "it is not a folder")
    for name in names:
        if (folder / name).exists():
            raise InputError("folder", str(folder), f"it has {name} already; name a new folder")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = (source / name).read_text("utf-8")
        if name.suffix == ".ipynb":
            text = _without_pictures(text)
        (folder / name).write_text(text, "utf-8")
    data = data_folder()
    if not in_checkout() and not os.environ.get(DATA):
        if not folder.resolve().is_relative_to(data.resolve().parent):
            data = folder / "data"
        (data / "corpora").mkdir(parents=True, exist_ok=True)
    return Copied([folder / name for name in names], data)


def _without_pictures(notebook: str) -> str:
    """A notebook without its links to pictures of the checkout, which a copy would not find."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        cell["source"] = PICTURE.sub("", "".join(cell["source"])).splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def titles() -> dict[Path, str]:
    """The library's notebooks with their first headings."""
    found = {}
    for path in sorted(shipped_notebooks().glob("*.ipynb")):
        first = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
        found[path] = first.splitlines()[0].lstrip("# ")
    return found
