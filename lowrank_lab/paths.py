"""Locations of corpora, runs, paths in configurations, and the library's own files.

The library ships notebooks, study files and kept studies. In a checkout they are in the top-level
folders `notebooks` and `data/study`; an installed library has both in `lowrank_lab/shipped`.
"""

from __future__ import annotations

import os
from pathlib import Path

DATA = "LOWRANK_LAB_DATA"  # environment variable: the data folder
STARTED_IN = "LOWRANK_LAB_STARTED_IN"  # environment variable, set by the study runner
PACKAGE = Path(__file__).resolve().parent


def data_folder() -> Path:
    """The folder of corpora and runs.

    The first that applies: $LOWRANK_LAB_DATA; in a checkout, its `data`; for an installed library,
    the nearest `data` with a `corpora` folder, at or above the working directory; else ./data.
    """
    given = os.environ.get(DATA)
    if given:
        return Path(given)
    if in_checkout():
        return PACKAGE.parent / "data"
    here = Path.cwd()
    candidates = [folder / "data" for folder in (here, *here.parents)]
    return next((path for path in candidates if (path / "corpora").is_dir()), candidates[0])


def in_checkout() -> bool:
    """Whether the library is imported from a checkout, not from an installed package."""
    return (PACKAGE.parent / "pyproject.toml").exists()


def located(path: Path | str) -> Path:
    """Resolve a path from a configuration or notebook.

    A relative path is looked up in the working directory, the data folder and the library's own
    data, in this order. A path that does not exist resolves to the data folder. In a study, the
    working directory is the one where the study was started, not the folder of the run.
    """
    path = Path(path).expanduser()
    places = [Path(os.environ.get(STARTED_IN, "")), data_folder(), shipped_folder() / "data"]
    return next((place / path for place in places if (place / path).exists()), places[1] / path)


def shipped_folder() -> Path:
    """The folder with the library's own `notebooks` and `data/study`."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def shipped_notebooks() -> Path:
    """The folder of the library's own notebooks, with `solutions` and `studies`."""
    return shipped_folder() / "notebooks"


def kept_folders() -> tuple[Path, Path]:
    """The two folders of kept studies: in the data folder, and in the library's own files."""
    return data_folder() / "study", shipped_folder() / "data" / "study"


def kept_study(name: str) -> Path:
    """The folder of a kept study: in the data folder, else in the library's own files."""
    own, shipped = (folder / name for folder in kept_folders())
    return shipped if shipped.is_dir() and not own.is_dir() else own
