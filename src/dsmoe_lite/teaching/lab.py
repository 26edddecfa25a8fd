"""A lab: a percent script NAME.py with text and code, and NAME.yml beside it with minutes, points and limits.

A cell belongs to a question by its metadata, as in `# %% tags=["answer"] question="loads"`. Its tag is its role:

- answer: what a student edits; it defines the question's function, whose stub returns None.
- check: a visible check, which the student runs.
- solution: the reference, a function of the same name.
- hidden: `check(answer, reference, random)`, which asserts; it runs when the lab is graded, outside the sandbox.

Cells of a question without a role are its text. Without a question, `given` marks code that answers, references and
checks may use, and `parameters` the typed parameters of the lab (`labs.parameters`). To remove a question, delete its
entry in the YAML file.
"""

import ast
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, find_name, require, require_int, require_number
from dsmoe_lite.common.yaml_files import read_yaml
from dsmoe_lite.config.parse import from_dict
from dsmoe_lite.labs.parameters import Parameter, check_value, find_parameter, read_schema
from dsmoe_lite.teaching.walls import PACKAGE

LABS = paths.NOTEBOOKS / "labs"
NO_MODULE = "must be a list of modules of the package, such as [dsmoe_lite.layers.balance]"
ROLES = ("answer", "check", "solution", "hidden")
NEEDED = ("answer", "solution", "hidden")


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """One question in the YAML file.

    function: what a student defines. hint: one sentence for a student whose answer is not right. seconds and memory_mb:
    limits of all calls of one check. forbid: modules of the package that the answer cannot import.
    """

    function: str
    points: float
    hint: str
    seconds: float = 10.0
    memory_mb: int = 2000
    forbid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_number("points", self.points, 0.0, open_low=True)
        require_number("seconds", self.seconds, 0.0, 600.0, open_low=True)
        require_int("memory_mb", self.memory_mb, 500)
        for module in self.forbid:
            require(isinstance(module, str) and module_file(module) is not None, "forbid", module, NO_MODULE)
        require(self.function.isidentifier(), "function", self.function, "must be the name of a function")


@dataclass(frozen=True, kw_only=True)
class LabSettings:
    """The YAML file of a lab. parameters: those that differ between students, with a list of values or `low..high`."""

    title: str
    minutes: int
    parameters: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, Any] = field(default_factory=dict)  # name -> QuestionSettings, as plain data

    def __post_init__(self) -> None:
        require_int("minutes", self.minutes, 1)
        require(bool(self.questions), "questions", self.questions, "a lab needs at least one")


@dataclass(frozen=True)
class Cell:
    """A cell of the script; question and role are "" if it has none."""

    kind: str  # "code" or "markdown"
    source: str
    tags: tuple[str, ...]
    question: str
    role: str


@dataclass(frozen=True)
class Question:
    """A question's settings, and the source of its cell for each role."""

    name: str
    settings: QuestionSettings
    cells: dict[str, str]


@dataclass(frozen=True)
class Lab:
    """A lab, without the questions that were removed from its YAML file. varied: name -> allowed values."""

    path: Path
    title: str
    minutes: int
    schema: dict[str, Parameter]
    varied: dict[str, range | tuple[Any, ...]]
    questions: dict[str, Question]
    cells: list[Cell]
    digest: str

    @property
    def name(self) -> str:
        """The name of its files."""
        return self.path.stem

    @property
    def points(self) -> float:
        """Of all questions."""
        return sum(question.settings.points for question in self.questions.values())

    @property
    def given(self) -> list[str]:
        """The sources of the cells that answers, references and checks may use."""
        return [cell.source for cell in self.cells if "given" in cell.tags]


def labs() -> list[Path]:
    """The scripts of the labs that come with the course; none in a wheel."""
    return sorted(path for path in LABS.glob("*.py") if path.with_suffix(".yml").is_file())


def find_lab(name: str) -> Path:
    """The script at the path `name`, or of the lab with that name. Raises InputError with the nearest name."""
    path = Path(name).expanduser()
    if path.suffix == ".py":
        require(path.is_file(), "lab", name, "no such file")
        return path.resolve()
    known = {lab.stem: lab for lab in labs()}
    script = path.with_suffix(".py")
    remedy = (
        f"give the script, {script}"
        if script.is_file()
        else f"{find_name(name, known)}; or give the path of a .py file"
    )
    require(name in known, "lab", name, remedy)
    return known[name]


def read_lab(path: Path) -> Lab:
    """Read NAME.py and NAME.yml. Raises InputError naming the file and what is wrong in it."""
    import jupytext

    settings_path = path.with_suffix(".yml")
    require(settings_path.is_file(), "lab", str(path), f"needs {settings_path.name} beside it")
    values = read_yaml(settings_path)
    try:
        settings = from_dict(LabSettings, values)
        asked = {str(name): _settings(str(name), one) for name, one in settings.questions.items()}
    except InputError as error:
        raise InputError(f"{settings_path}: {error}") from None
    try:
        script = path.read_bytes()
        notebook = jupytext.reads(script.decode("utf-8"), fmt="py:percent")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: is no percent script ({str(error).splitlines()[0]})") from None
    try:
        return _lab(path, settings, asked, notebook.cells, script + settings_path.read_bytes())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _settings(name: str, values: Any) -> QuestionSettings:
    try:
        settings = from_dict(QuestionSettings, values)
    except InputError as error:
        raise InputError(f"question {name}: {error}") from None
    return replace(settings, points=float(settings.points))


def _lab(
    path: Path, settings: LabSettings, asked: Mapping[str, QuestionSettings], found: list[Any], contents: bytes
) -> Lab:
    cells: list[Cell] = []
    for one in found:
        tags, question = tuple(one.metadata.get("tags", ())), one.metadata.get("question", "")
        role = next((tag for tag in tags if tag in ROLES), "")
        require(not role or bool(question), f"cell tagged {role}", one.source[:40], 'needs question="NAME"')
        if not question or question in asked:
            cells.append(Cell(one.cell_type, one.source, tags, question, role))
    parameters = next((cell.source for cell in cells if "parameters" in cell.tags), "")
    schema = read_schema(parameters)
    for name in settings.parameters:
        in_script = ", ".join(schema) or "none: tag a cell `parameters`"
        require(name in schema, f"{path.stem}.yml, parameter", name, f"the script's parameters are {in_script}")
    varied = {name: _values(find_parameter(schema, name), values) for name, values in settings.parameters.items()}
    known = {cell.question for cell in cells if cell.question}
    for name in asked:
        require(name in known, "question", name, f"no cell of the script has it; {find_name(name, _named(found))}")
    questions = {name: _question(name, one, cells) for name, one in asked.items()}
    digest = hashlib.sha256(contents).hexdigest()[:16]
    return Lab(path, settings.title, settings.minutes, schema, varied, questions, cells, digest)


def _named(found: list[Any]) -> list[str]:
    return sorted({one.metadata["question"] for one in found if one.metadata.get("question")}) or ["none"]


def _values(parameter: Parameter, values: Any) -> range | tuple[Any, ...]:
    """The values that students get: a list, or "low..high" for whole numbers."""
    if isinstance(values, list):
        require(bool(values), parameter.name, values, "needs at least one value")
        return tuple(check_value(parameter, value) for value in values)
    low, dots, high = str(values).partition("..")
    fits = bool(dots) and low.isdecimal() and high.isdecimal() and parameter.type == "int"
    require(fits, parameter.name, values, "must be a list of values, or low..high for a whole number")
    check_value(parameter, int(low))
    check_value(parameter, int(high))
    return range(int(low), int(high) + 1)


def _question(name: str, settings: QuestionSettings, cells: list[Cell]) -> Question:
    by_role: dict[str, str] = {}
    for cell in cells:
        if cell.question == name and cell.role:
            require(cell.role not in by_role, f"question {name}", cell.role, "two cells have this role")
            by_role[cell.role] = cell.source
    missing = [role for role in NEEDED if role not in by_role]
    require(not missing, f"question {name}", missing, "no cell has this role")
    for role, function in (("answer", settings.function), ("solution", settings.function), ("hidden", "check")):
        _require_python(by_role[role], f"{role} of question {name}")
        defined = functions_in(by_role[role])
        require(function in defined, f"{role} of question {name}", defined, f"must define the function {function}")
    return Question(name, settings, by_role)


def _require_python(source: str, what: str) -> None:
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise InputError(f"{what}, line {error.lineno}: {error.msg}") from None


def module_file(module: str) -> Path | None:
    """The file or folder of a module of this package; None if there is none."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    found = path if path.is_dir() else path.with_suffix(".py")
    return found if module.startswith(f"{PACKAGE.name}.") and found.exists() else None


def functions_in(source: str) -> list[str]:
    """The names of the functions that a cell defines; none if it is no Python."""
    try:
        return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def run_trusted(lab: Lab, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The names that a cell of the lab itself defines, after the parameters and the given cells."""
    names: dict[str, Any] = {"__name__": "lab", **values}
    for number, cell in enumerate((*lab.given, source)):
        exec(compile(cell, f"<{lab.name}, cell {number}>", "exec"), names)
    return names


def reference(lab: Lab, question: Question, values: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of the solution, for one student's values."""
    function: Callable[..., Any] = run_trusted(lab, values, question.cells["solution"])[question.settings.function]
    return function


def hidden_check(lab: Lab, question: Question, values: Mapping[str, Any]) -> Callable[..., None]:
    """The hidden check(answer, reference, random), for one student's values."""
    check: Callable[..., None] = run_trusted(lab, values, question.cells["hidden"])["check"]
    return check
