"""The labs of the course: their keys are right, and their checks refuse wrong answers."""

import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmoe_lite.labs.exercises import check_exercise
from dsmoe_lite.teaching.lab import Lab, Question, hidden_check, labs, read_lab, reference, run_trusted
from dsmoe_lite.teaching.plain import decode, encode
from dsmoe_lite.teaching.variant import Variant, variant

SECRET = b"of the tests, not of a course"
STUDENTS = [f"s{number}" for number in range(6)]
LABS = {path.stem: read_lab(path) for path in labs()}
ANSWERS = {name: importlib.import_module(f"lab_answers.{name}") for name in LABS}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


QUESTIONS = [
    pytest.param(lab, question, id=f"{lab.name} {question.name}")
    for lab in LABS.values()
    for question in lab.questions.values()
]


def variants(lab: Lab) -> list[Variant]:
    return [variant(lab, student, SECRET) for student in STUDENTS]


def define(lab: Lab, question: Question, source: str, of: Variant) -> Callable[..., Any]:
    return run_trusted(lab, of.values, source)[question.settings.function]


def wrong_answers(lab: Lab, question: Question) -> dict[str, tuple[str, bool]]:
    """What is wrong -> source, and whether the visible check refuses it."""
    key, answers = question.cells["solution"], {}
    for what, (old, new, seen) in ANSWERS[lab.name].WRONG[question.name].items():
        assert old is None or key.count(old) == 1, (lab.name, question.name, what)
        answers[what] = (new if old is None else key.replace(old, new)), seen
    return answers


def passes_hidden(lab: Lab, question: Question, source: str, of: Variant, seed: int = 0) -> bool:
    """The hidden check as `grade` takes it: copies cross the sandbox's wall; an assertion or an error is wrong."""
    check, exact = hidden_check(lab, question, of.values), reference(lab, question, of.values)
    try:
        function = define(lab, question, source, of)
        check(lambda *arguments: copied(function(*copied(list(arguments)))), exact, random.Random(seed))
    except Exception:
        return False
    return True


def copied(value: Any) -> Any:
    return decode(encode(value))


def visible(lab: Lab, question: Question, source: str, of: Variant, capsys: pytest.CaptureFixture[str]) -> str:
    """What the visible check prints for an answer."""
    run_trusted(lab, of.values, f"{source}\n{IMPORT}\n{question.cells['check']}")
    return capsys.readouterr().out.strip()


IMPORT = f"from {check_exercise.__module__} import check_exercise"


def test_there_are_labs_and_each_has_its_answers() -> None:
    assert {"balance"} <= set(LABS)
    for name, lab in LABS.items():
        for answers in (ANSWERS[name].RIGHT, ANSWERS[name].WRONG):
            assert answers.keys() == lab.questions.keys()
        for question, wrong in ANSWERS[name].WRONG.items():
            assert len(wrong) >= 3, (name, question)
            assert any(seen for *_, seen in wrong.values()), (name, question, "nothing that the visible check refuses")


@pytest.mark.parametrize(("lab", "question"), QUESTIONS)
def test_the_key_and_answers_in_other_styles_are_right(
    lab: Lab, question: Question, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"the key": question.cells["solution"], **ANSWERS[lab.name].RIGHT[question.name]}
    for style, source in sources.items():
        for of in variants(lab):
            assert visible(lab, question, source, of, capsys) == "right", (style, of)
            for seed in range(3):
                assert passes_hidden(lab, question, source, of, seed), (style, of)


@pytest.mark.parametrize(("lab", "question"), QUESTIONS)
def test_wrong_answers_are_refused(lab: Lab, question: Question, capsys: pytest.CaptureFixture[str]) -> None:
    """By the hidden check for one student at least: what is wrong by one student's rule may be right by another's."""
    for what, (source, seen) in wrong_answers(lab, question).items():
        assert not all(passes_hidden(lab, question, source, of) for of in variants(lab)), what
        printed = [visible(lab, question, source, of, capsys) for of in variants(lab)]
        assert any(line.startswith("not right yet") for line in printed) == seen, (what, printed)


@pytest.mark.parametrize(("lab", "question"), QUESTIONS)
def test_the_stub_is_not_solved_yet(lab: Lab, question: Question, capsys: pytest.CaptureFixture[str]) -> None:
    """In the museum the stub is code with a bug, which the check refuses."""
    expected = "not right yet: " if lab.name == "bug_museum" else "not solved yet"
    for of in variants(lab):
        assert visible(lab, question, question.cells["answer"], of, capsys).startswith(expected)


def test_students_differ() -> None:
    for lab in LABS.values():
        values = [str(variant(lab, f"s{n}", SECRET).values) for n in range(30)]
        assert len(set(values)) > 20, lab.name
