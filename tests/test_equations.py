"""The ledger of equations: every numbered equation is in it, and every link leads somewhere."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.study import equations
from dsmoe_lite.study.equations import Equation

EQUATIONS = equations.load()
TESTS = Path(__file__).parent


def test_every_numbered_equation_of_the_chapters_is_in_the_ledger_in_order() -> None:
    chapters = [path.read_text(encoding="utf-8") for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.py"))]
    labels = [label for text in chapters for label in re.findall(r"\$\$ \(eq:([\w-]+)\)", text)]
    assert [equation.label for equation in EQUATIONS] == labels


@pytest.mark.parametrize("equation", EQUATIONS, ids=lambda equation: equation.label)
def test_its_function_and_its_test_exist(equation: Equation) -> None:
    module, name = equation.function.rsplit(".", 1)
    assert getattr(import_module(f"dsmoe_lite.{module}"), name).__doc__
    file, test = equation.test.split(".")
    assert f"\ndef {test}(" in (TESTS / f"{file}.py").read_text(encoding="utf-8")


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "equations.yml"
    path.write_text("schema_version: 9\nequations: []\n", encoding="utf-8")
    with pytest.raises(InputError, match="schema_version = 9"):
        equations.load(path)
