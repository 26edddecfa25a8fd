"""A small lab for the tests of grading, and what a student hands in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from dsmoe_lite.teaching.lab import Lab, read_lab
from dsmoe_lite.teaching.release import release
from dsmoe_lite.teaching.submissions import Submission, read_submission
from dsmoe_lite.teaching.variant import Variant, variant

SECRET = b"a secret of the tests alone"
YAML = """\
title: A toy
minutes: 60
parameters:
  n: [3, 4, 5]
  rule: [up, down]
  seed: 0..999999
questions:
  scale:
    function: scale
    points: 2
    hint: Multiply by n.
    seconds: 4
    memory_mb: 500
  order:
    function: order
    points: 3
    hint: Your rule says in which order.
    seconds: 4
    memory_mb: 500
    forbid: [dsmoe_lite.layers.balance]
"""
SCRIPT = """\
# %% [markdown]
# # A toy lab with n = {{n}}

# %% tags=["parameters"]
n: int = 3  # a number: 1..10
rule: str = "up"  # an order: up | down
seed: int = 0  # of the data: 0..999999

# %% tags=["given"]
import math


def twice(x):
    return 2 * x

# %% [markdown] question="scale"
# Multiply x by {{n}}.

# %% tags=["answer"] question="scale"
def scale(x):
    return None

# %% tags=["check"] question="scale"
from dsmoe_lite.labs import check_exercise


def check(scale):
    assert scale(0) == 0, "nothing stays nothing"


check_exercise(scale, check);

# %% tags=["solution"] question="scale"
def scale(x):
    return n * x

# %% tags=["hidden"] question="scale"
def check(answer, reference, random):
    for _ in range(3):
        x = random.randrange(100)
        assert answer(x) == reference(x)

# %% [markdown] question="order"
# Sort the numbers {{rule}}.

# %% tags=["answer"] question="order"
def order(values):
    return None

# %% tags=["solution"] question="order"
def order(values):
    return sorted(values, reverse=rule == "down")

# %% tags=["hidden"] question="order"
def check(answer, reference, random):
    values = [random.randrange(1000) for _ in range(8)]
    assert answer(values) == reference(values)
"""
RIGHT = {
    "scale": "def scale(x):\n    return n * x",
    "order": "def order(v):\n    return sorted(v, reverse=rule == 'down')",
}


def write_lab(folder: Path, script: str = SCRIPT, settings: str = YAML) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.py").write_text(script)
    (folder / "toy.yml").write_text(settings)
    return folder / "toy.py"


def toy(folder: Path) -> Lab:
    return read_lab(write_lab(folder))


def notebook(lab: Lab, of: Variant, answers: Mapping[str, str]) -> Any:
    """The student's notebook, with answers filled in."""
    found = nbformat.reads(release(lab, of), as_version=4)
    for cell in found.cells:
        if "answer" in cell.metadata.get("tags", []) and cell.metadata.get("question") in answers:
            cell.source = answers[cell.metadata["question"]]
    return found


def submission(lab: Lab, answers: Mapping[str, str], student: str = "ann") -> Submission:
    filled = notebook(lab, variant(lab, student, SECRET), answers)
    return read_submission(f"{lab.name}-{student}.ipynb", nbformat.writes(filled).encode(), lab)
