"""The page "Teaching with it": its first section works by copy and paste, and it names what there is."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs_bwrap

from dsmoe_lite.common.paths import NOTEBOOKS
from dsmoe_lite.teaching.lab import labs, read_lab
from dsmoe_lite.training.job import read_job

PAGE = (NOTEBOOKS / "pages" / "teaching.md").read_text(encoding="utf-8")


def blocks(language: str, heading: str) -> list[str]:
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(heading))
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@needs_bwrap
def test_from_an_empty_machine_to_a_graded_class_by_copy_and_paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    setup, *commands = blocks("sh", "From an empty machine")
    assert setup == "make setup\n"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"  # that of `make setup`, which these tests run in
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    printed = ""
    for command in commands:
        done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr)
        printed += done.stdout
    assert "submissions: 3 notebooks filled in" in printed
    assert "hardest: loss, 33% of 3 submissions are right" in printed
    rows = list(csv.DictReader((tmp_path / "points.csv").open(encoding="utf-8")))
    assert [row["balance (of 10)"] for row in rows] == ["10", "4", "0"]
    assert "loads: time" in rows[2]["Feedback comments"]
    assert len(list((tmp_path / "graded" / "balance" / "feedback").glob("*.html"))) == 3


def test_the_page_lists_the_labs_as_they_are() -> None:
    found = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|", PAGE, flags=re.MULTILINE))
    assert found == {path.stem: str(read_lab(path).minutes) for path in labs()}
    weeks = re.findall(r"^\| \d+ \|.*\|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert len(weeks) == 4 + 10
    for name in found:
        assert any(name in lab for lab in weeks), name


def test_its_config_is_read(tmp_path: Path) -> None:
    (config,) = blocks("yaml", "Your own text")
    path = tmp_path / "config.yml"
    path.write_text(config, encoding="utf-8")
    assert read_job(path).corpus.path == "my_texts"
