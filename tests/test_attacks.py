"""Answers that attack the grader: they earn nothing, learn nothing and leave nothing behind."""

import os
import py_compile
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from needs import needs_bwrap
from toy_lab import RIGHT, SECRET, notebook, submission, toy

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.layers import balance
from dsmoe_lite.teaching import submissions as submissions_module
from dsmoe_lite.teaching.grade import Graded, grade_all, grade_one
from dsmoe_lite.teaching.lab import Lab
from dsmoe_lite.teaching.sandbox import Limits, Sandbox
from dsmoe_lite.teaching.submissions import read_submissions
from dsmoe_lite.teaching.variant import variant
from dsmoe_lite.teaching.walls import require_hidden

pytestmark = needs_bwrap


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return toy(tmp_path_factory.mktemp("lab"))


def graded(lab: Lab, answers: dict[str, str]) -> Graded:
    return grade_one(lab, submission(lab, answers), variant(lab, "ann", SECRET), SECRET)


# name -> verdict (or two, by what is noticed first) and the body of `scale`; the other question must stay right
ATTACKS = {
    "endless loop": ("time", "while True: pass"),
    "endless sleep": ("time", "import time; time.sleep(1e6)"),
    "memory": ("memory", "return len(bytearray(20 * 10**9))"),
    "memory, bit by bit": ("memory", "held = []\n    while True: held.append(bytearray(10**8))"),
    "fork bomb": ("error memory", "import os\n    while True: os.fork()"),
    "exit": ("error", "import os; os._exit(0)"),
    "polite exit": ("error", "raise SystemExit(0)"),
    "kill everybody": ("error", "import os, signal; os.kill(-1, signal.SIGKILL)"),
    "endless recursion": ("error", "return scale(x)"),
    "crash": ("error", "import ctypes; ctypes.string_at(0)"),
    "output of 1 GB": ("wrong", "for _ in range(1000): print('x' * 10**6)\n    return -1"),
    "a value of 1 GB": ("error memory", "return 'x' * 10**9"),
    "a deep value": ("error", "v = []\n    for _ in range(10**5): v = [v]\n    return v"),
    "a number of a million digits": ("error", "return 10**(10**6)"),
    "equal to all": (
        "error",
        "return type('All', (), {'__eq__': lambda s, o: True, '__ne__': lambda s, o: False})()",
    ),
    "a number equal to all": (
        "wrong",
        "return type('All', (int,), {'__eq__': lambda s, o: True, '__hash__': int.__hash__})(-1)",
    ),
    "pickle": ("error", "return type('P', (), {'__reduce__': lambda s: (print, ('unpickled',))})()"),
    "not a number": ("wrong", "return float('nan')"),
    "patched builtins": (
        "wrong",
        "import builtins, json\n    builtins.len = lambda v: 0\n    json.dumps = lambda *a, **k: '{\"value\": 1}'"
        "\n    return -1",
    ),
    "forged replies": (
        "error",
        "import os\n    for fd in range(3, 30):\n        try: os.write(fd, b'{\"value\": 1}\\n{\"value\": 2}\\n')\n"
        "        except OSError: pass\n    return -1",
    ),
    "noise in the channel": (
        "error",
        "import os\n    for fd in range(3, 30):\n        try: os.write(fd, b'\\xff\\x00noise\\n')"
        "\n        except OSError: pass\n    return -1",
    ),
    "right at first, then asleep": (
        "time",
        "import time\n    calls.append(1)\n    if len(calls) > 1: time.sleep(1e6)\n    return n * x",
    ),
    "a reply of half a tensor": (
        "error",
        "import os\n    for fd in range(3, 30):"
        "\n        try: os.write(fd, b'{\"memory\": {\"\\\\u0000\": \"tensor\", \"dtype\": \"int8\"}}\\n')"
        "\n        except OSError: pass\n    return -1",
    ),
    "a shape of a thousand huge numbers": (
        "error wrong",
        "import os\n    line = b'{\"value\": {\"\\\\u0000\": \"tensor\", \"dtype\": \"int8\", '"
        "\n    line += b'\"data\": \"AAAA\", \"shape\": ['"
        "\n    line += b','.join([b'9' * 4000] * 900) + b']}}\\n'\n    for fd in range(3, 30):"
        "\n        try: os.write(fd, line)\n        except OSError: pass\n    return -1",
    ),
    "many empty mappings": ("error time memory", "return [{}] * 10**7"),
    "threads": (
        "error",
        "from threading import Thread as T\n    import time\n    for _ in range(400):"
        "\n        T(target=time.sleep, args=(60,), daemon=True).start()\n    time.sleep(60)",
    ),
    "frames of the caller": (
        "wrong",
        "import sys\n    f, seen = sys._getframe(), []\n    while f: seen += list(f.f_locals); f = f.f_back\n"
        "    return seen.count('reference') + seen.count('secret')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_earns_nothing_and_harms_no_other_question(lab: Lab, name: str) -> None:
    verdict, body = ATTACKS[name]
    found = graded(lab, {"scale": f"calls = []\ndef scale(x):\n    {body}\n", "order": RIGHT["order"]})
    assert found.questions["scale"].verdict in verdict.split()
    assert (found.questions["scale"].points, found.questions["order"].verdict, found.points) == (0.0, "right", 3)


@pytest.mark.parametrize("body", ["while True: pass", "import os; os._exit(1)", "this is no python"])
def test_a_cell_that_attacks_before_any_call_earns_nothing(lab: Lab, body: str) -> None:
    found = graded(lab, {"scale": f"{body}\ndef scale(x):\n    return n * x"})
    assert found.points == 0
    assert found.questions["scale"].verdict in ("time", "error")


# What a student's code can see and touch


def ask(source: str, **options: Any) -> Any:
    with Sandbox([], source, Limits(seconds=20), **options) as sandbox:
        return sandbox.call("f")


def test_no_file_but_the_system_and_the_package_can_be_read(tmp_path: Path, lab: Lab) -> None:
    secret = tmp_path / "course.secret"
    secret.write_text("hush")
    hidden = [str(secret), str(lab.path), "/etc/passwd", "/etc/shadow", str(Path(__file__).parent)]
    source = f"""
import os
def f():
    home = os.listdir({str(Path.home())!r}) if os.path.isdir({str(Path.home())!r}) else []
    return [[path for path in {hidden!r} if os.path.exists(path)], home]
"""
    seen, home = ask(source).value
    assert seen == []
    python = Path(sys.base_prefix)  # Python itself may be installed there, and is all that is seen of it
    assert set(home) <= ({python.relative_to(Path.home()).parts[0]} if python.is_relative_to(Path.home()) else set())


def test_nothing_outside_can_be_written(tmp_path: Path) -> None:
    source = f"""
import os, sys, dsmoe_lite
def f():
    written = []
    for folder in ({str(tmp_path)!r}, '/', '/usr', '/dev', os.path.dirname(dsmoe_lite.__file__), sys.prefix):
        try:
            open(folder + '/evil', 'w').write('x')
            written.append(folder)
        except OSError:
            pass
    open('/tmp/mine', 'w').write('x')
    os.symlink({str(tmp_path)!r}, '/tmp/link')
    return written + [os.path.exists('/tmp/link/anything')]
"""
    assert ask(source).value == [False]
    assert not Path("/tmp/mine").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_answers_own(lab: Lab) -> None:
    one = ask("def f():\n    open('/tmp/big', 'wb').write(bytes(10**8))\n    return 1")
    assert (one.verdict, "File too large" in one.message) == ("error", True)
    many = ask("def f():\n    for i in range(9): open(f'/tmp/{i}', 'wb').write(bytes(10**7))\n    return 1")
    assert (many.verdict, "No space left" in many.message) == ("error", True)


def test_no_network(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        reply = ask(
            f"import socket\ndef f():\n    socket.create_connection(('127.0.0.1', {port}), 1).send(b'x')\n    return 1"
        )
        assert reply.verdict == "error"
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_environment_and_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_SECRET", "hush")
    source = """
import os
def f():
    seen = b''
    for pid in filter(str.isdecimal, os.listdir('/proc')):
        for name in ('environ', 'cmdline'):
            try:
                seen += open(f'/proc/{pid}/{name}', 'rb').read()
            except OSError:
                pass
    return [sorted(os.environ), 'hush' in str(os.environ), b'hush' in seen, b'pytest' in seen]
"""
    names, *leaks = ask(source).value
    assert leaks == [False, False, False]
    assert set(names) <= {"HOME", "PATH", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONHASHSEED", "PWD", "LC_CTYPE"}


def test_no_process_survives(lab: Lab) -> None:
    mark = f"survivor-{os.getpid()}"
    source = f"""
import os, subprocess, sys
def f():
    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)', {mark!r}], start_new_session=True)
    return 1
"""
    assert ask(source).value == 1
    time.sleep(0.2)
    assert not [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


FORBIDDEN = {
    "import": "from dsmoe_lite.layers.balance import expert_loss",
    "import by name": "import importlib; importlib.import_module('dsmoe_lite.layers.balance').expert_loss",
    "source": "import dsmoe_lite\n    assert open(dsmoe_lite.__path__[0] + '/layers/balance.py').read()",
    "compiled": "import dsmoe_lite, glob\n    assert glob.glob(dsmoe_lite.__path__[0] + '/layers/__pycache__/bal*')",
    "indirectly": "from dsmoe_lite.training.objective import balance; balance.expert_loss",
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_forbidden_module_is_absent(name: str) -> None:
    py_compile.compile(balance.__file__)
    source = f"def f():\n    {FORBIDDEN[name]}\n    return 1"
    assert ask(source).verdict == "ok"
    assert ask(source, forbidden=["dsmoe_lite.layers.balance"]).verdict == "error"


RIGHTS = {
    "show a hidden file again": "libc.umount2(path.encode(), 2)",
    "make the package writable": "libc.mount(None, folder.encode(), None, 32 | 4096, None)",
    "make a file system": "libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)",
    "make a namespace": "libc.unshare(0x10000000)",
}


@pytest.mark.parametrize("name", RIGHTS)
def test_root_has_no_rights_inside(name: str) -> None:
    source = f"""
import ctypes, dsmoe_lite
libc = ctypes.CDLL(None, use_errno=True)
folder = dsmoe_lite.__path__[0]
path = folder + '/layers/balance.py'
def f():
    return [{RIGHTS[name]}, ctypes.get_errno() != 0]
"""
    assert ask(source, forbidden=["dsmoe_lite.layers.balance"]).value == [-1, True]


def test_the_kernels_settings_cannot_be_written() -> None:
    reply = ask("def f():\n    open('/proc/sys/kernel/core_pattern', 'w')\n    return 1")
    assert reply.verdict == "error"
    assert reply.message.startswith(("PermissionError", "OSError"))


def test_nothing_can_be_kept_beside_a_hidden_module() -> None:
    source = (
        "import dsmoe_lite\ndef f():\n    open(dsmoe_lite.__path__[0] + '/layers/__pycache__/x', 'w')\n    return 1"
    )
    reply = ask(source, forbidden=["dsmoe_lite.layers.balance"])
    assert (reply.verdict, "Read-only file system" in reply.message) == ("error", True)


def test_memory_outside_the_process_is_counted_or_bounded() -> None:
    """Files in memory that are never mapped: each is bounded, and so is their number."""
    source = """
import os
def f():
    held = 0
    for _ in range(1000):
        try:
            held += os.write(os.memfd_create('x'), bytes(10**6))
        except OSError:
            break
    return held
"""
    assert ask(source).value < 200 * 10**6


def test_an_argument_that_nobody_reads_costs_the_seconds_of_the_question_only() -> None:
    source = """
import os, time
for fd in range(3, 9):
    try: os.write(fd, b'{"value": null}\\n')
    except OSError: pass
def f(x):
    return 1
time.sleep(1e6)
"""
    with Sandbox([], source, Limits(seconds=2)) as sandbox:
        start = time.monotonic()
        assert sandbox.call("f", "x" * 10**6).verdict == "time"
    assert time.monotonic() - start < 15


def test_what_answers_could_read_is_refused(tmp_path: Path) -> None:
    require_hidden([tmp_path / "course.secret"])
    with pytest.raises(InputError, match=r"course.secret: is below .*, which answers can read; move it elsewhere"):
        require_hidden([Path(sys.prefix) / "course.secret"])


# What is handed in


def test_edited_checks_and_other_cells_do_not_count(lab: Lab) -> None:
    of = variant(lab, "ann", SECRET)
    edited = notebook(lab, of, {"scale": "def scale(x):\n    return -1"})
    for cell in edited.cells:
        if "check" in cell.metadata.get("tags", []) or "parameters" in cell.metadata.get("tags", []):
            cell.source = "n = 0\nrule = 'up'\ndef check(*a): pass"
    edited.cells.append(nbformat.v4.new_code_cell("def check(answer, reference, random):\n    pass"))
    edited.metadata["points"] = 100
    one = submissions_module.read_submission("toy-ann.ipynb", nbformat.writes(edited).encode(), lab)
    assert grade_one(lab, one, of, SECRET).points == 0


def test_another_secret_or_lab_in_the_label_is_refused(lab: Lab, tmp_path: Path) -> None:
    made = notebook(lab, variant(lab, "ann", b"another secret altogether"), RIGHT)
    nbformat.write(made, tmp_path / "toy-ann.ipynb")
    with pytest.raises(InputError, match="values are of another secret or of an edited lab"):
        grade_all(lab, read_submissions(tmp_path, lab), SECRET, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made.metadata["dsmoe_lab"]["lab"] = "other"
    nbformat.write(made, tmp_path / "toy-ann.ipynb")
    with pytest.raises(InputError, match="is of the lab 'other', not 'toy'"):
        read_submissions(tmp_path, lab)


def test_a_name_cannot_lead_out_of_the_folder(lab: Lab, tmp_path: Path) -> None:
    made = notebook(lab, variant(lab, "ann", SECRET), RIGHT)
    made.metadata["dsmoe_lab"]["student"] = "../../evil"
    nbformat.write(made, tmp_path / "toy-ann.ipynb")
    with pytest.raises(InputError, match="names no student"):
        read_submissions(tmp_path, lab)


def test_links_and_bombs_in_what_is_handed_in(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.ipynb").write_text("hush")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "toy-bob.ipynb").symlink_to(tmp_path / "secret.ipynb")
    text = nbformat.writes(notebook(lab, variant(lab, "ann", SECRET), RIGHT))
    (folder / "toy-ann.ipynb").write_text(text)
    assert list(read_submissions(folder, lab)) == ["ann"]
    monkeypatch.setattr(submissions_module, "MOST_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../toy-ann.ipynb", text)
        archive.writestr("toy-bob.ipynb", text.replace("ann", "bob") + " " * 10**8)
    with pytest.raises(InputError, match=r"toy-bob.ipynb.*is larger than"):
        read_submissions(tmp_path / "bomb.zip", lab)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bomb.zip", "in", "secret.ipynb"]
