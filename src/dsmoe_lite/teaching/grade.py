"""Grade submissions: call each answer in a sandbox, check what it returns outside, write one record per student."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite import __version__
from dsmoe_lite.common.errors import InputError, RunError, require, require_int
from dsmoe_lite.common.files import read_json, write_json
from dsmoe_lite.common.schema import require_schema
from dsmoe_lite.teaching.explain import explain
from dsmoe_lite.teaching.lab import Lab, Question, hidden_check, reference
from dsmoe_lite.teaching.sandbox import Limits, Sandbox
from dsmoe_lite.teaching.submissions import Submission
from dsmoe_lite.teaching.variant import Variant, grading_random, variant
from dsmoe_lite.teaching.walls import require_hidden, require_isolation

VERDICTS = ("right", "wrong", "time", "memory", "error", "missing")
RECORDS = "records"  # folder of the records, below that of the results
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Grade:
    """One question: its verdict, one of VERDICTS, and points. seconds and peak_mb are of the student's process.

    reason: of an error, as far as the answer's source tells it.
    """

    verdict: str
    points: float
    of: float
    seconds: float
    peak_mb: int
    reason: str = ""


@dataclass(frozen=True)
class Graded:
    """One student's record. isolated: whether answers ran in a sandbox. note: what the instructor should look at."""

    lab: str
    student: str
    file: str
    variant: str
    questions: dict[str, Grade]
    isolated: bool
    note: str

    @property
    def points(self) -> float:
        """Of all questions."""
        return sum(grade.points for grade in self.questions.values())

    @property
    def of(self) -> float:
        """The points that can be had."""
        return sum(grade.of for grade in self.questions.values())


class _LabError(BaseException):
    """The key of a lab failed; passes the `except Exception` of a check."""


class _StopError(BaseException):
    """The answer gave no value: ends the check, whatever it catches."""

    def __init__(self, verdict: str) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def grade_all(
    lab: Lab,
    submissions: Mapping[str, Submission],
    secret: bytes,
    out: Path,
    *,
    processes: int = 2,
    isolated: bool = True,
    after: Callable[[Graded], None] | None = None,
) -> list[Graded]:
    """Grade what has no record of this lab, this answer and this kind of isolation yet; return all, by student.

    after: called with each record. Raises InputError, before anything runs, if this machine cannot isolate, and
    for a submission whose variant is of another secret.
    """
    require_int("processes", processes, 1)
    if isolated:
        require_isolation()
        require_hidden((lab.path, out))
    variants = {student: variant(lab, student, secret) for student in submissions}
    for of_student in list(variants.values())[:1]:
        require_sound(lab, of_student, secret)
    for student, one in submissions.items():
        same = one.mark in ("", variants[student].mark)
        remedy = "its values are of another secret or of an edited lab; use the secret and the files of the release"
        require(same, f"{one.file}, label", one.mark, remedy)

    def work(student: str) -> Graded:
        path = record_path(out, student)
        digests = {"lab_digest": lab.digest, "answers_digest": submissions[student].digest}
        earlier = _earlier_record(path, digests, isolated, variants[student].mark)
        graded = earlier or grade_one(lab, submissions[student], variants[student], secret, isolated=isolated)
        if earlier is None:
            write_record(lab, graded, out, submissions[student].digest)
        if after is not None:
            after(graded)
        return graded

    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(work, student) for student in sorted(submissions)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def require_sound(lab: Lab, of_student: Variant, secret: bytes) -> None:
    """Raise InputError if a key of the lab does not pass its own hidden check."""
    for name, question in lab.questions.items():
        what = f"{lab.path}: question {name}"
        try:
            exact, check = reference(lab, question, of_student.values), hidden_check(lab, question, of_student.values)
            check(exact, exact, grading_random(lab, of_student.student, name, secret))
        except AssertionError:
            raise InputError(f"{what}: the key does not pass the hidden check; mend one of them") from None
        except Exception as error:
            raise InputError(f"{what}: key or hidden check fails ({type(error).__name__}: {error})") from None
        try:
            check(lambda *_: object(), exact, grading_random(lab, of_student.student, name, secret))
        except Exception:
            continue
        raise InputError(f"{what}: the hidden check passes any answer; it must call it and compare")


def grade_one(lab: Lab, submission: Submission, of_student: Variant, secret: bytes, *, isolated: bool = True) -> Graded:
    """Grade one submission; writes nothing. Raises RunError if the lab itself fails, never for what an answer does."""
    grades = {}
    for name, question in lab.questions.items():
        source = submission.answers.get(name)
        random = grading_random(lab, of_student.student, name, secret)
        if source is None:
            grades[name] = Grade("missing", 0.0, question.settings.points, 0.0, 0)
        else:
            grades[name] = _grade(lab, question, source, of_student, random, isolated)
    lost = "" if submission.mark or submission.problem else "the notebook has lost its label"
    note = "; ".join(part for part in (submission.problem, lost, submission.remark) if part)
    return Graded(lab.name, of_student.student, submission.file, of_student.mark, grades, isolated, note)


def _grade(lab: Lab, question: Question, source: str, of_student: Variant, random: Any, isolated: bool) -> Grade:
    settings, values = question.settings, of_student.values
    exact, check = _guarded(lab, question, values), hidden_check(lab, question, values)
    limits = Limits(seconds=settings.seconds, memory_mb=settings.memory_mb)
    setup = ["\n".join(f"{name} = {value!r}" for name, value in values.items()), *lab.given]
    calls: list[Any] = []
    with Sandbox(setup, source, limits, settings.forbid, isolated) as sandbox:

        def answer(*arguments: Any) -> Any:
            reply = sandbox.call(settings.function, *arguments)
            calls.append(reply)
            if reply.verdict != "ok":
                raise _StopError(reply.verdict)
            if reply.value is None:
                raise _StopError("missing")
            return reply.value

        try:
            verdict = _verdict(lambda: check(answer, exact, random))
        except _LabError as error:
            raise RunError(str(error)) from None
    require_called(bool(calls), lab, question)
    points = settings.points if verdict == "right" else 0.0
    peak = max((reply.peak_mb for reply in calls), default=0.0)
    reason = explain(source, lab.given, values, settings.forbid) if verdict == "error" else ""
    seconds = round(sum(reply.seconds for reply in calls), 2)
    return Grade(verdict, points, settings.points, seconds, round(peak), reason)


def _guarded(lab: Lab, question: Question, values: Mapping[str, Any]) -> Callable[..., Any]:
    """The reference; what it raises is the lab's fault, not the student's."""
    exact = reference(lab, question, values)

    def called(*arguments: Any) -> Any:
        try:
            return exact(*arguments)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise _LabError(f"{lab.path}: the key of question {question.name} fails ({reason})") from None

    return called


def require_called(called: bool, lab: Lab, question: Question) -> None:
    """Raise RunError if a hidden check never called the answer: it would pass anything."""
    if not called:
        raise RunError(f"{lab.path}: the hidden check of question {question.name} never called the answer")


def _verdict(check: Callable[[], None]) -> str:
    try:
        check()
    except _StopError as stopped:
        return stopped.verdict if stopped.verdict in VERDICTS else "error"
    except (RunError, OSError):  # of the lab or of this machine, such as no memory for another process
        raise
    except Exception:  # an assertion, or a value of another type than the check expects
        return "wrong"
    return "right"


def write_record(lab: Lab, graded: Graded, out: Path, answers_digest: str = "") -> None:
    """Write a student's record, atomically."""
    versions = {"schema_version": SCHEMA_VERSION, "dsmoe_lite": __version__}
    digests = {"lab_digest": lab.digest, "answers_digest": answers_digest}
    write_json(record_path(out, graded.student), versions | digests | asdict(graded))


def record_path(out: Path, student: str) -> Path:
    """Where a student's record is."""
    return out / RECORDS / f"{student}.json"


def read_graded(path: Path) -> Graded:
    """Read a record. Raises InputError naming the file if it is damaged."""
    values = read_json(path)
    require_schema(values.get("schema_version"), {SCHEMA_VERSION}, "grade again", path)
    try:
        questions = {name: Grade(**grade) for name, grade in values["questions"].items()}
        names = ("lab", "student", "file", "variant", "isolated", "note")
        return Graded(questions=questions, **{name: values[name] for name in names})
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is damaged; move it away and grade again") from None


def read_all_graded(out: Path) -> list[Graded]:
    """The records below `out`, by student. Raises InputError if there is none, or they are of different labs."""
    found = [read_graded(path) for path in sorted((out / RECORDS).glob("*.json"))]
    require(bool(found), "folder", str(out), "holds no records of `dsmoe labs grade`")
    names = sorted({one.lab for one in found})
    require(len(names) == 1, "labs", names, f"{out} mixes them: grade each lab into its own folder")
    return found


def _earlier_record(path: Path, digests: Mapping[str, str], isolated: bool, mark: str) -> Graded | None:
    """An earlier record, if nothing that decides it has changed, and no verdict was that of a busy machine."""
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        graded = read_graded(path)
    except InputError:
        return None
    same = (
        all(values.get(name) == digest for name, digest in digests.items()) and values.get("dsmoe_lite") == __version__
    )
    busy = any(grade.verdict in ("time", "memory") for grade in graded.questions.values())
    return graded if same and (graded.isolated, graded.variant, busy) == (isolated, mark, False) else None


def not_submitted(lab: Lab, students: Iterable[str], secret: bytes) -> list[Graded]:
    """Records of students who handed in nothing."""
    missing = {name: Grade("missing", 0.0, q.settings.points, 0.0, 0) for name, q in lab.questions.items()}
    return [
        Graded(lab.name, student, "", variant(lab, student, secret).mark, missing, True, "nothing was handed in")
        for student in students
    ]
