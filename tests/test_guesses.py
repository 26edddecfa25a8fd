"""Questions: what is asked, what is stored, what comes back, and what a reader's copy hides."""

import json
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.labs.guesses import READER, Answer, Guesses, Question
from dsmoe_lite.labs.reader_copies import SUMMARY, hide_answers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "work" / "predictions.json"


def asked(path: Path, *, is_reader: bool = True) -> Guesses:
    guesses = Guesses(str(path.parent) if is_reader else "")
    guesses.ask("02-dropped", "a tenth", "a quarter", "half")
    guesses.answer("02-dropped", "a quarter", "26% of the choices")
    guesses.ask("02-share", low=0, high=1)
    guesses.answer("02-share", 0.603, within=0.1)
    return guesses


def test_without_a_reader_nothing_is_asked_shown_or_written(path: Path, capsys: pytest.CaptureFixture) -> None:
    guesses = asked(path, is_reader=False)
    guesses.score()
    assert capsys.readouterr().out == ""
    assert not path.parent.exists()


def test_only_the_kernels_of_a_readers_lab_have_a_reader(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(READER, str(path.parent))
    assert Guesses().path == path
    for value in ("", None):
        monkeypatch.setenv(READER, value) if value is not None else monkeypatch.delenv(READER)
        assert not Guesses().is_reader


def test_a_guess_is_stored_and_comes_back_beside_the_answer(path: Path) -> None:
    guesses = asked(path)
    guesses._take("02-dropped", "half")
    guesses._take("02-share", 0.55)
    assert json.loads(path.read_text(encoding="utf-8")) == {"02-dropped": "half", "02-share": 0.55}
    assert guesses.reply("02-dropped") == "✗ You said half; it was a quarter: 26% of the choices."
    assert guesses.reply("02-share") == "✓ You said 0.55; it was 0.603."
    assert guesses.summary().splitlines() == [
        "1 of 2 guesses right; questions without a guess: 0.",
        "02-dropped: ✗ You said half; it was a quarter: 26% of the choices.",
        "02-share: ✓ You said 0.55; it was 0.603.",
    ]


def test_a_stored_guess_is_answered_without_a_form(path: Path, capsys: pytest.CaptureFixture) -> None:
    asked(path)._take("02-dropped", "a quarter")
    capsys.readouterr()
    again = asked(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✓ You said a quarter; it was a quarter: 26% of the choices."
    assert set(again._forms) == {"02-share"}


def test_a_skipped_question_shows_the_answer_and_is_not_scored(path: Path) -> None:
    guesses = asked(path)
    guesses._take("02-dropped", None)
    assert guesses.reply("02-dropped") == "It was a quarter: 26% of the choices."
    assert guesses.summary() == "No guesses yet; questions in this chapter: 2."


def test_a_guess_before_the_answer_is_known_is_repeated(path: Path) -> None:
    guesses = Guesses(str(path.parent))
    guesses.ask("02-gap", low=-1, high=1)
    guesses._take("02-gap", 0.25)
    assert guesses.reply("02-gap") == "You said 0.25."
    assert guesses.summary() == "No guesses yet; questions in this chapter: 1."


def test_guesses_of_other_chapters_are_kept_and_a_damaged_file_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"01-loss": 3.5}', encoding="utf-8")
    asked(path)._take("02-dropped", "half")
    assert json.loads(path.read_text(encoding="utf-8")) == {"01-loss": 3.5, "02-dropped": "half"}
    for damaged in ("{", "[1]"):
        path.write_text(damaged, encoding="utf-8")
        asked(path)._take("02-dropped", "half")
        assert json.loads(path.read_text(encoding="utf-8")) == {"02-dropped": "half"}


def test_a_number_out_of_range_is_refused_in_the_form(path: Path) -> None:
    guesses = asked(path)
    form = guesses._forms["02-share"]
    form._try(lambda guess: guesses._take("02-share", guess), 7.0)
    assert "your guess = 7.0: must be a finite number of at least 0 and at most 1" in form._line.value
    assert not path.exists()


def test_the_cell_of_a_question_is_hidden_until_the_guess(path: Path) -> None:
    shell, guesses = InteractiveShell.instance(), Guesses(str(path.parent))
    try:
        shell.user_ns["guesses"] = guesses
        shell.run_cell("guesses.ask('02-a', 'yes', 'no'); guesses.answer('02-a', 'no')")
        form = guesses._forms["02-a"]
        assert form._hidden.layout.display == "none"
        guesses._take("02-a", "yes")
        assert form._hidden.layout.display == ""
        assert form._controls.layout.display == "none"
        assert "You said yes; it was no." in form._line.value

        shell.run_cell("guesses.ask('02-b', 'yes', 'no'); 1 / 0", silent=False)
        assert guesses._forms["02-b"]._hidden.layout.display == ""  # an error is never hidden
    finally:
        InteractiveShell.clear_instance()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": ("yes",)}, "choices = "),
        ({"choices": ("yes", "yes")}, "choices = "),
        ({}, "high = 0.0"),
        ({"low": 2.0, "high": 1.0}, "high = 1.0"),
        ({"low": float("nan"), "high": 1.0}, "low = nan"),
    ],
)
def test_a_question_needs_choices_or_a_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Question(**arguments)


def test_an_answer_must_belong_to_its_question(path: Path) -> None:
    guesses = asked(path, is_reader=False)
    for key, right, message in (
        ("02-else", "half", "question = '02-else'"),
        ("02-dropped", "a third", "02-dropped = 'a third'"),
        ("02-share", 1.5, "02-share = 1.5"),
        ("02-share", "half", "02-share = 'half'"),
    ):
        with pytest.raises(InputError, match=message):
            guesses.answer(key, right)


@pytest.mark.parametrize(("guess", "right"), [(0.5, False), (0.503, True), (0.7, True), (0.704, False)])
def test_a_number_near_the_answer_is_right(guess: float, right: bool) -> None:
    assert Answer(0.603, within=0.1).is_right(guess) is right


def cell(kind: str, source: str) -> dict[str, Any]:
    return {"cell_type": kind, "source": source} | (
        {} if kind == "markdown" else {"outputs": [1], "execution_count": 3}
    )


def test_a_readers_copy_shows_no_answer() -> None:
    cells = [
        cell("markdown", "**Ask.** How many?"),
        cell("code", 'lab.ask("02-a", low=0, high=9)\nprint(4)'),
        cell("code", "claim('four', 4, (3, 5))"),
        cell("markdown", "Four.\n\nReally.\n\n## Next\n\nText.\n\n**Ask.** Why?"),
        cell("code", 'x = 1\nlab.ask("02-b", "yes", "no")'),
        cell("markdown", "Yes.\n\n**Ask.** And now?"),
        cell("code", 'print("lab.ask(")'),
        cell("markdown", "Shown."),
        cell("code", 'lab.ask("02-c", "yes", "no")'),
        cell("markdown", "## Nothing to fold"),
    ]
    hide_answers(cells)
    folded = f"<details><summary>{SUMMARY}</summary>\n\n"
    assert [one["source"] for one in cells if one["cell_type"] == "markdown"] == [
        "**Ask.** How many?",
        f"{folded}Four.\n\nReally.\n\n</details>\n\n## Next\n\nText.\n\n**Ask.** Why?",
        f"{folded}Yes.\n\n</details>\n\n**Ask.** And now?",
        "Shown.",
        "## Nothing to fold",
    ]
    outputs = [(one["outputs"], one["execution_count"]) for one in cells if one["cell_type"] == "code"]
    assert outputs == [([], None), ([1], 3), ([], None), ([1], 3), ([], None)]
