"""What differs between students: values of a lab's parameters, drawn from the course's secret, the lab and the student.

Every draw is an HMAC: the same student gets the same values again, and without the secret nobody can compute them.
"""

import hmac
import json
import os
import random
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_lite.common.errors import InputError, RunError, require
from dsmoe_lite.teaching.lab import Lab

STUDENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
LEAST_SECRET = 16  # bytes


@dataclass(frozen=True)
class Variant:
    """One student's values of all parameters of a lab. mark: differs if secret or values do."""

    student: str
    values: dict[str, Any]
    mark: str


def read_secret(path: Path) -> bytes:
    """The course's secret. Raises InputError if the file is missing or short."""
    try:
        secret = path.expanduser().read_bytes().strip()
    except OSError as error:
        raise InputError(
            f"secret {path}: {error.strerror}; give the file that made the handouts with --secret"
        ) from None
    require(len(secret) >= LEAST_SECRET, "secret", f"{path}, {len(secret)} bytes", f"needs {LEAST_SECRET} or more")
    return secret


def make_secret(path: Path) -> bool:
    """Write a new secret that only its owner can read, if there is no file yet. Return whether it was written."""
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(f"secret {path}: not written ({error.strerror})") from None
    return True


def require_student(student: str) -> None:
    """Raise InputError unless `student` can be a part of a file's name."""
    require(STUDENT.fullmatch(student) is not None, "student", student, "must be 1..64 letters, digits or . _ @ + -")


def variant(lab: Lab, student: str, secret: bytes) -> Variant:
    """The values of one student: those of `lab.varied` drawn, all others as in the lab."""
    require_student(student)
    values = {name: parameter.default for name, parameter in lab.schema.items()}
    for name, allowed in lab.varied.items():
        values[name] = allowed[_number(secret, lab.name, student, name) % len(allowed)]
    mark = _number(secret, lab.name, student, "", json.dumps(values, sort_keys=True))
    return Variant(student, values, f"{mark % 2**64:016x}")


def grading_random(lab: Lab, student: str, question: str, secret: bytes) -> random.Random:
    """The random numbers of one hidden check, the same at each grading."""
    return random.Random(_number(secret, lab.name, student, question, "grading"))


def _number(secret: bytes, *parts: str) -> int:
    return int.from_bytes(hmac.digest(secret, "\0".join(parts).encode(), "sha256"))
