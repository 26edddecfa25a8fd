"""What runs inside the sandbox: define a student's functions, and answer calls line by line.

It protects nothing. Whatever a student's code does to this process, it can only change that student's answers.
"""

import ast
import os
import resource
import sys
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.teaching.plain import MOST_REPLY, decode, encode

OPEN_FILES = 128


def main() -> None:
    """Answer requests from stdin until it ends. What the code prints goes nowhere.

    Arguments: the memory of a process and the size of a file, in MB. The code cannot raise these limits again.
    """
    memory, file = (int(text) * 10**6 for text in sys.argv[1:3])
    limits = {"DATA": memory, "FSIZE": file, "NOFILE": OPEN_FILES, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    inside = _Inside()
    for line in requests:
        reply = inside.answer(decode(line))
        try:
            text = encode(reply, MOST_REPLY)
        except InputError as error:
            text = encode({"error": str(error)})
        replies.write(text)
        replies.flush()


class _Inside:
    """The names that were defined so far, and the first error of the answer's own cell."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "answer"}
        self.error = ""

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to {given}, {answer} or {name, arguments}: {value}, {error} (None: no such name) or {memory}."""
        try:
            if "given" in request:
                exec(compile(request["given"], "<given>", "exec"), self.names)
                return {"value": None}
            if "answer" in request:
                self._define(request["answer"])
                return {"value": None}
            if request["name"] not in self.names:
                return {"error": self.error or None}
            return {"value": self.names[request["name"]](*request["arguments"])}
        except MemoryError:
            return {"memory": True}
        except BaseException as error:
            return {"memory": True} if "allocate memory" in str(error) else {"error": _line(error)}

    def _define(self, source: str) -> None:
        """Run a cell statement by statement: a failing line below the function does not take the function away."""
        tree = ast.parse(source, "<answer>")
        future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        for node in tree.body:
            code = compile(ast.Module([*future, node], []), "<answer>", "exec")
            try:
                exec(code, self.names)
            except MemoryError:
                raise
            except BaseException as error:
                self.error = self.error or _line(error)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path]
    main()
