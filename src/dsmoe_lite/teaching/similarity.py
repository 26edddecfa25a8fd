"""Which submissions look alike, with what everybody was given left out. A number to look at, not a verdict."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import install_command
from dsmoe_lite.teaching.lab import Lab
from dsmoe_lite.teaching.submissions import Submission

K_GRAM, WINDOW = 15, 8  # characters of tokens, of copydetect's winnowing: shorter than its defaults, as answers are


@dataclass(frozen=True)
class Pair:
    """Two students, a question, and the share of the shorter answer's code that both have."""

    first: str
    second: str
    question: str
    share: float


def require_copydetect() -> None:
    """Raise InputError if copydetect is not installed."""
    if find_spec("copydetect") is None:
        raise InputError(f"copydetect is not installed: {install_command('similarity')}")


def similar_pairs(lab: Lab, submissions: Mapping[str, Submission], least: float = 0.8) -> list[Pair]:
    """Pairs whose share is at least `least`, most alike first. Stub and visible check are left out of the comparison.

    Names of variables and comments do not count.
    """
    require_copydetect()
    from copydetect import CodeFingerprint, compare_files

    def fingerprint(source: str, known: object = None) -> CodeFingerprint:
        return CodeFingerprint("answer.py", K_GRAM, WINDOW, boilerplate=known, fp=io.StringIO(source))

    pairs = []
    for name, question in lab.questions.items():
        given = "\n".join((*lab.given, question.cells["answer"], question.cells.get("check", "")))
        known = list(fingerprint(given).hashes)
        stub = question.cells["answer"].split()
        answers = {s: one.answers[name] for s, one in submissions.items() if name in one.answers}
        prints = {s: fingerprint(answer, known) for s, answer in answers.items() if answer.split() != stub}
        for first, second in combinations(sorted(prints), 2):
            _, shares, _ = compare_files(prints[first], prints[second])
            if max(shares) >= least:
                pairs.append(Pair(first, second, name, round(float(max(shares)), 2)))
    return sorted(pairs, key=lambda pair: -pair.share)
