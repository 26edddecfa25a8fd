"""Fill in handouts as three kinds of students would, to try grading: `python -m dsmoe_lite.teaching.samples`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dsmoe_lite.common.errors import InputError, require
from dsmoe_lite.teaching.lab import Lab, Question, find_lab, read_lab


def right(question: Question, number: int) -> str:
    """The key."""
    return question.cells["solution"]


def half_done(question: Question, number: int) -> str:
    """The key for every second question, and no answer for the others."""
    return question.cells["solution" if number % 2 == 0 else "answer"]


def careless(question: Question, number: int) -> str:
    """An endless loop, then answers that are wrong."""
    body = "while True: pass" if number == 0 else "return 0"
    return f"def {question.settings.function}(*arguments):\n    {body}"


KINDS = (right, half_done, careless)


def fill(lab: Lab, handouts: Path, out: Path) -> list[Path]:
    """Fill in the notebooks of `lab` in `handouts`, by name, with KINDS in turn, and write them into `out`."""
    import nbformat

    found = sorted(handouts.glob(f"{lab.name}-*.ipynb"))
    require(
        bool(found), "handouts", str(handouts), f"holds no notebooks {lab.name}-STUDENT.ipynb; release the lab first"
    )
    out.mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in enumerate(lab.questions)}
    for position, path in enumerate(found):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            question = cell.metadata.get("question")
            if question in numbers and "answer" in cell.metadata.get("tags", []):
                cell.source = KINDS[position % len(KINDS)](lab.questions[question], numbers[question])
        nbformat.write(notebook, out / path.name)
    return [out / path.name for path in found]


def main(arguments: Sequence[str]) -> int:
    """LAB HANDOUTS OUT: fill in and print how many; return the exit status."""
    try:
        require(len(arguments) == 3, "arguments", list(arguments), "must be three: LAB HANDOUTS OUT")
        written = fill(read_lab(find_lab(arguments[0])), Path(arguments[1]), Path(arguments[2]))
    except InputError as error:
        print(f"dsmoe: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[2]}: {len(written)} notebooks filled in")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
