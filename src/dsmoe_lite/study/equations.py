"""The ledger of equations, data/equations.yml: each with its source, the code that computes it and its test."""

from dataclasses import dataclass
from pathlib import Path

from dsmoe_lite.common.paths import DATA
from dsmoe_lite.common.schema import require_schema
from dsmoe_lite.common.yaml_files import read_yaml
from dsmoe_lite.config import from_dict

PATH = DATA / "equations.yml"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Equation:
    """A numbered equation of a chapter: its label, its source, the function that computes it and the test of that."""

    label: str
    source: str
    function: str  # module and name, below dsmoe_lite
    test: str  # module and name, below tests


def load(path: Path = PATH) -> list[Equation]:
    """Read the ledger, in the order of the chapters. Raises InputError if its schema version is unknown."""
    values = read_yaml(path)
    require_schema(values.get("schema_version"), {SCHEMA_VERSION}, "restore the file from the repository", path)
    return [from_dict(Equation, entry) for entry in values["equations"]]
