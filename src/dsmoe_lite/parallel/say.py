"""How a process among many tells whoever started it what it does: one line of JSON each time."""

import json
import os
import sys
from typing import Any


def say(**event: Any) -> None:
    """Print a JSON-able event with this process's rank, its id, and how often torchrun has started it again.

    One write a line: lines of processes that share a pipe do not mix, up to 4096 bytes.
    """
    who = {
        "rank": int(os.environ["RANK"]),
        "pid": os.getpid(),
        "restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
    }
    sys.stdout.write(json.dumps(who | event) + "\n")
    sys.stdout.flush()
