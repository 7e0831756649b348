"""The build: what pyproject.toml says, and the files that the library ships.

A wheel has the repository's notebooks, study files and kept studies below lowrank_lab/shipped;
lowrank_lab/paths.py finds them there.
"""

from pathlib import Path
from shutil import copyfile, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "notebooks/*.ipynb",
    "notebooks/*.py",
    "notebooks/solutions/*.ipynb",
    "notebooks/studies/*.yaml",
    "data/study/README.md",
    "data/study/*/*.parquet",
)


class BuildWithShipped(build_py):
    """Copies the package, without leftovers of an earlier build, and the shipped files."""

    def run(self) -> None:
        package = Path(self.build_lib) / "lowrank_lab"
        if not self.editable_mode:
            rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for file in shipped():
                target = package / "shipped" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                copyfile(file, target)

    def get_source_files(self) -> list[str]:
        """The files of a source distribution."""
        return [*super().get_source_files(), *map(str, shipped())]


def shipped() -> list[Path]:
    """The shipped files, relative to the repository's root, in which builds run."""
    return sorted(path for pattern in SHIPPED for path in Path().glob(pattern))


setup(cmdclass={"build_py": BuildWithShipped})
