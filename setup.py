"""Puts the files that a reader opens and loads into the wheel, as dsmoe_lite/_course/. pyproject.toml has all else."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
COURSE = (  # at the same places below _course/ as here
    "book.yml",
    "constraints.txt",
    "notebooks/[0-9]*.ipynb",
    "notebooks/[0-9]*.md",
    "notebooks/claims.md",
    "notebooks/references.bib",
    "notebooks/images/*.svg",
    "data/*.json",
    "data/*.yml",
    "data/models/*.safetensors",
    "data/models/*.yaml",
    "data/runs/**/*.json",
)


class BuildWithCourse(build_py):
    """Copies COURSE beside the modules. An editable install reads the clone itself and copies nothing."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in self._course():
                target = self._carried(source)
                self.mkpath(str(target.parent))
                self.copy_file(str(ROOT / source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        carried = [] if self.editable_mode else [str(self._carried(source)) for source in self._course()]
        return super().get_outputs(include_bytecode) + carried

    def get_source_files(self) -> list[str]:  # what a source distribution has to hold
        return super().get_source_files() + list(map(str, self._course()))

    def _course(self) -> list[Path]:
        found = {pattern: sorted(ROOT.glob(pattern)) for pattern in COURSE}
        missing = [pattern for pattern, paths in found.items() if not paths]
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)}: no such file in {ROOT}; the wheel would lack it")
        return [path.relative_to(ROOT) for paths in found.values() for path in paths]

    def _carried(self, source: Path) -> Path:
        return Path(self.build_lib) / "dsmoe_lite" / "_course" / source


setup(cmdclass={"build_py": BuildWithCourse})
