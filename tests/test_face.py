"""The package's face: what can be imported from `dsmoe_lite` itself, each name loaded when it is first used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsmoe_lite

PROMISED = [
    "Transformer",
    "ModelConfig",
    "MoEConfig",
    "MLAConfig",
    "AttentionConfig",
    "MoELayer",
    "Router",
    "Routing",
    "preset",
    "train",
    "TrainConfig",
    "load_model",
    "save_model",
    "RoutingTrace",
]


@pytest.mark.parametrize("name", PROMISED)
def test_a_name_is_the_object_that_its_module_defines(name: str) -> None:
    value = getattr(dsmoe_lite, name)
    assert value.__name__ == name
    assert value is getattr(sys.modules[value.__module__], name)
    assert name in dsmoe_lite.__all__
    assert name in dir(dsmoe_lite)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(dsmoe_lite.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.asname: node.module for node in block.body for alias in node.names}
    assert declared == {name: f"dsmoe_lite.{module}" for name, module in dsmoe_lite._MODULES.items()}
    assert {"__version__", *declared} == set(dsmoe_lite.__all__)


def test_nothing_is_loaded_before_it_is_used() -> None:
    program = "import sys, dsmoe_lite; print(sorted(m for m in sys.modules if m.startswith(('torch', 'dsmoe_lite.'))))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Experts'"):
        _ = dsmoe_lite.Experts  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="Experts"):
        exec("from dsmoe_lite import Experts")
