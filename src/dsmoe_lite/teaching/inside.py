"""What runs inside the sandbox: define a student's functions, and answer calls line by line.

It protects nothing. Whatever a student's code does to this process, it can only change that student's answers.
"""

import os
import resource
import sys
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.teaching.plain import decode, encode


def main() -> None:
    """Answer requests from stdin until it ends. What the code prints goes nowhere.

    The first argument limits the memory of the process, in MB; the code cannot raise it again.
    """
    most = int(sys.argv[1]) * 10**6
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    names: dict[str, Any] = {"__name__": "answer"}
    for line in requests:
        reply = _answer(decode(line), names)
        try:
            text = encode(reply)
        except InputError as error:
            text = encode({"error": str(error)})
        replies.write(text)
        replies.flush()


def _answer(request: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    try:
        if "source" in request:
            exec(compile(request["source"], "<answer>", "exec"), names)
            return {"value": None}
        if request["name"] not in names:
            return {"error": "missing"}
        return {"value": names[request["name"]](*request["arguments"])}
    except MemoryError:
        return {"memory": True}
    except BaseException as error:
        if "allocate memory" in str(error):
            return {"memory": True}
        return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path]
    main()
