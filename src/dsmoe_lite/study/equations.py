"""The ledger of equations, data/equations.yml: where each stands, what computes it, what tests it."""

from dataclasses import dataclass
from pathlib import Path

from dsmoe_lite.common.errors import require
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.config import from_dict, read_yaml

PATH = DATA / "equations.yml"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Equation:
    """An equation of a chapter: its label there, the paper's number, the function and the test that stand for it."""

    label: str
    source: str
    function: str  # module and name, below dsmoe_lite
    test: str  # module and name, below tests


def load(path: Path = PATH) -> list[Equation]:
    """Read the ledger, in the order of the chapters. InputError for a schema that is not this package's."""
    values = read_yaml(path)
    version = values.get("schema_version")
    require(version == SCHEMA_VERSION, "schema_version", version, f"{path}: this package reads {SCHEMA_VERSION}")
    return [from_dict(Equation, entry) for entry in values["equations"]]
