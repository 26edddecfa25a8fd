"""A chapter's questions: in a reader's JupyterLab, the answer below a question is shown after a guess, which is scored.

Everywhere else, as in the reference outputs, a chapter runs as if there were no questions.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import filelock

from dsmoe_lite.common.errors import InputError, require, require_choice, require_number
from dsmoe_lite.common.files import read_json, write_json

READER = "DSMOE_READER"  # in the kernels of `dsmoe lab`: the folder of the reader's copies
Guess = str | float


@dataclass(frozen=True)
class Question:
    """A question with choices, or one that asks for a number between `low` and `high`."""

    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.choices:
            require(len(set(self.choices)) >= 2, "choices", self.choices, "must be at least two different ones")
        else:
            require_number("low", self.low, -math.inf)
            require_number("high", self.high, self.low, open_low=True)

    def check(self, name: str, value: Guess) -> None:
        """Raise InputError if `value` is no answer to this question."""
        if self.choices:
            require_choice(name, value, self.choices)
        else:
            require_number(name, value, self.low, self.high)


@dataclass(frozen=True)
class Answer:
    """The right answer, in words if that needs any; a guess `within` this distance of a number counts as right."""

    right: Guess
    words: str = ""
    within: float = 0.0

    def is_right(self, guess: Guess) -> bool:
        """Whether a guess counts as right."""
        if isinstance(guess, str) or isinstance(self.right, str):
            return guess == self.right
        return abs(guess - self.right) <= self.within

    def reply(self, guess: Guess | None) -> str:
        """One line: the guess, if there was one, beside the answer."""
        it_was = f"{_shown(self.right)}{': ' + self.words if self.words else ''}"
        if guess is None:
            return f"It was {it_was}."
        mark = "✓" if self.is_right(guess) else "✗"
        return f"{mark} You said {_shown(guess)}; it was {it_was}."


@dataclass
class Guesses:
    """The questions of one session of a chapter, the reader's guesses and the answers.

    folder: where predictions.json keeps the guesses, {question: guess, or null if it was skipped}. If it is empty, no
    reader is there, and `ask`, `answer` and `score` only check their arguments.
    """

    folder: str = field(default_factory=lambda: os.environ.get(READER, ""))
    questions: dict[str, Question] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    _forms: dict[str, "_Form"] = field(default_factory=dict)
    _score: Any = None  # the handle of what `score` displays

    @property
    def is_reader(self) -> bool:
        """Whether a reader is there to be asked."""
        return self.folder != ""

    @property
    def path(self) -> Path:
        """The file of the guesses."""
        return Path(self.folder) / "predictions.json"

    def ask(self, key: str, *choices: str, low: float = 0.0, high: float = 0.0) -> None:
        """Ask for one of `choices`, or for a number from `low` to `high`, at the top of the cell that has the answer.

        Without a guess, all output of this cell is hidden until the reader guesses, or skips the question.
        """
        self.questions[key] = Question(choices, low, high)
        self.answers.pop(key, None)
        self._forms.pop(key, None)
        if self.is_reader and key not in self.guesses():
            self._forms[key] = _Form(self.questions[key], lambda guess: self._take(key, guess))

    def answer(self, key: str, right: Guess, words: str = "", *, within: float = 0.0) -> None:
        """Give the answer to a question that was asked; `words` say more than `right` can.

        Raises InputError for a question that was not asked, and for an answer that is none of its choices.
        """
        require_choice("question", key, self.questions)
        self.questions[key].check(key, right)
        self.answers[key] = Answer(right, words, within)
        if self.is_reader and key in self.guesses():
            print(self.reply(key))

    def score(self) -> None:
        """Show how many guesses of this session were right; later guesses update it."""
        from IPython.display import Pretty, display

        if self.is_reader:
            self._score = display(Pretty(self.summary()), display_id=True)

    def guesses(self) -> Mapping[str, Guess | None]:
        """All stored guesses, those of other chapters too; none if the file is missing or damaged."""
        try:
            stored = read_json(self.path)
        except InputError:
            return {}
        return stored if isinstance(stored, dict) else {}

    def reply(self, key: str) -> str:
        """The guess beside the answer, in one line."""
        guess = self.guesses().get(key)
        if key in self.answers:
            return self.answers[key].reply(guess)
        return "" if guess is None else f"You said {_shown(guess)}."

    def summary(self) -> str:
        """How many of the guesses were right, and each guess beside its answer."""
        stored = self.guesses()
        given = {key: guess for key in self.answers if (guess := stored.get(key)) is not None}
        if not given:
            return f"No guesses yet; questions in this chapter: {len(self.questions)}."
        n_right = sum(self.answers[key].is_right(guess) for key, guess in given.items())
        head = (
            f"{n_right} of {len(given)} guesses right; questions without a guess: {len(self.questions) - len(given)}."
        )
        return "\n".join([head, *(f"{key}: {self.answers[key].reply(guess)}" for key, guess in given.items())])

    def _take(self, key: str, guess: Guess | None) -> None:
        """Store a guess, or None for a question that was skipped, and show the answer."""
        from IPython.display import Pretty

        if guess is not None:
            self.questions[key].check("your guess", guess)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.path.with_name(".predictions.lock")):
            write_json(self.path, {**self.guesses(), key: guess})
        self._forms[key].close(self.reply(key))
        if self._score is not None:
            self._score.update(Pretty(self.summary()))


class _Form:
    """Buttons, or a field for a number; what the rest of the cell displays is hidden until `close`."""

    def __init__(self, question: Question, take: Callable[[Guess | None], None]) -> None:
        import ipywidgets
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        self._line = ipywidgets.HTML("Your guess?")
        self._hidden = ipywidgets.Output(layout=ipywidgets.Layout(display="none"))
        skip = ipywidgets.Button(description="Skip: show the answer", layout=ipywidgets.Layout(width="auto"))
        skip.on_click(lambda _: take(None))
        if question.choices:
            controls = []
            for choice in question.choices:
                button = ipywidgets.Button(description=choice, layout=ipywidgets.Layout(width="auto"))
                button.on_click(lambda _, choice=choice: take(choice))
                controls.append(button)
        else:
            number = ipywidgets.FloatText(continuous_update=True, layout=ipywidgets.Layout(width="8em"))
            guess = ipywidgets.Button(description="Guess")
            guess.on_click(lambda _: self._try(take, number.value))
            controls = [number, guess]
        self._controls = ipywidgets.HBox([*controls, skip], layout=ipywidgets.Layout(flex_flow="row wrap"))
        view = ipywidgets.VBox([self._line, self._controls, self._hidden])._repr_mimebundle_()
        asked = " / ".join(question.choices) or f"a number from {question.low:g} to {question.high:g}"
        display({**view, "text/plain": f"JupyterLab asks here for a guess: {asked}."}, raw=True)
        self._shell: Any = get_ipython()
        if self._shell is not None:
            self._hidden.__enter__()
            self._shell.events.register("post_run_cell", self._end)

    def close(self, line: str) -> None:
        """Show what was hidden, below `line`, in place of the controls."""
        self._report(line)
        self._controls.layout.display = "none"
        self._hidden.layout.display = ""

    def _end(self, result: Any) -> None:
        """The cell is done: what comes next is displayed as usual. An error is never hidden."""
        self._shell.events.unregister("post_run_cell", self._end)
        self._hidden.__exit__(None, None, None)
        if not result.success:
            self._hidden.layout.display = ""

    def _try(self, take: Callable[[Guess | None], None], value: float) -> None:
        try:
            take(value)
        except InputError as error:
            self._report(str(error))

    def _report(self, line: str) -> None:
        self._line.value = f'<span role="status">{escape(line)}</span>'


def _shown(value: Guess) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
