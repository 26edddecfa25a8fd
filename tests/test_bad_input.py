"""Bad input at the command line: one line on stderr, the right exit status, and no file damaged."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.config import to_dict
from dsmoe_lite.presets import preset

INPUT, FAILURE, STOPPED = 2, 1, 130
MODEL = "model: course-gshard\n"
TRAIN = "train: {steps: 3, batch_size: 2, seq_len: 16, warmup_steps: 1}\n"
SMALL = (
    "vocab_size: 300\nn_heldout_batches: 1\n"
    "corpus: {world: {n_entities: 40, n_control: 8, n_head: 8, n_tail: 8, n_documents: 400, n_heldout: 100}}\n"
)
JOB = MODEL + TRAIN + SMALL


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))  # one for all tests here
    torch.set_num_threads(1)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: outside the repository, with a space in its name."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` but locks, with its bytes."""
    paths_below = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths_below}


def dsmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


def refused(capsys: pytest.CaptureFixture, *arguments: str, status: int = INPUT) -> str:
    """Run a command that must fail; return its one line on stderr."""
    assert dsmoe(*arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("dsmoe: ")
    return printed.err


# Names and values on the command line


@pytest.mark.parametrize(
    ("command", "message_part"),
    [
        ("tarin", "tarin"),
        ("run", "CHAPTER"),
        ("run 99", "no chapter 99: the chapters are 00_start_here"),
        ("run 01 -p lerning_rate=1", "unknown parameter lerning_rate"),
        ("run 01 -p profile=fast", "smoke, cpu, gpu"),
        ("run 01 -p seed=-1", "0..2147483647"),
        ("run 01 -p seed=1.5", "a whole number"),
        ("run 01 -p seed=one", "a whole number"),
        ("run 01 -p seed=1 -p seed=2", "given twice"),
        ("run 01 -p seed", "name=value"),
        ("count course-gshrd", "course-gshard"),
        ("count course-dense --seq-len 0", "--seq-len"),
        ("experiment neighbors", "neighbours"),
        ("experiment neighbours --processes 0 --plan", "--processes"),
        ("experiment neighbours --processes many", "--processes"),
        ("bench experts", "'layer', 'train'"),
        ("bench layer --rounds 1", "--rounds"),
        ("course --profile fast", "--profile"),
        ("refresh 99", "no chapter 99"),
        ("train", "CONFIG"),
        ("train a.yaml --steps 3", "--steps"),
    ],
)
def test_a_wrong_name_or_value_is_one_line(
    command: str, message_part: str, cwd: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message_part in refused(capsys, *command.split())
    assert files(cwd) == {}


# Config files of `dsmoe train`


@pytest.mark.parametrize(
    ("content", "message_part"),
    [
        (b"", "mapping"),
        (b"- 1\n", "mapping"),
        (b"train: [1\n", "is not YAML"),
        (b"day: 2001-99-99\n", "day = '2001-99-99': no such field"),
        (b"model: {[1]: 2}\n", "is not YAML"),
        (b"\0\1\2", "is not YAML"),
        ("model: café".encode("latin-1"), "is not UTF-8"),
        (TRAIN, "model: is missing"),
        (MODEL, "train: is missing"),
        ("model: course-gshrd\n" + TRAIN, "course-gshard"),
        ("model: 5\n" + TRAIN, "model"),
        ("model: {d_model: 64}\n" + TRAIN, "model."),
        (JOB + "devise: cpu\n", "devise"),
        (JOB.replace("steps", "step"), "step"),
        (JOB.replace("steps: 3", "steps: three"), "train.steps"),
        (JOB.replace("steps: 3", "steps: 0"), "steps = 0"),
        (JOB.replace("steps: 3", "steps: 3, lr: .nan"), "lr = nan"),
        (JOB.replace("seq_len: 16", "seq_len: 1000"), "max_seq_len = 256"),
        (JOB.replace("vocab_size: 300", "vocab_size: 100"), "vocab_size = 100"),
        (JOB.replace("batches: 1", "batches: 99999"), "use fewer or smaller batches"),
        (JOB.replace("n_entities: 40", "n_entities: 0"), "n_entities = 0"),
        (JOB + "first_document: 4000\n", "first_document = 4000"),
        (MODEL + TRAIN + "corpus: {kind: word}\n", "world, inflected, stdlib, debian, folder, hub"),
        (MODEL + TRAIN + "corpus: {kind: folder}\n", "path"),
        (MODEL + TRAIN + "corpus: {kind: hub}\n", "name"),
    ],
)
def test_a_bad_config_is_one_line(
    content: bytes | str, message_part: str, cwd: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsmoe_lite.training.job.train", None)  # errors are found before training
    data = content if isinstance(content, bytes) else content.encode()
    (cwd / "my job.yaml").write_bytes(data)
    assert message_part in refused(capsys, "train", "my job.yaml", "--out", "a run")
    assert files(cwd) == {"my job.yaml": data}


def test_a_missing_config_is_one_line(cwd: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no job.yaml: No such file" in refused(capsys, "train", "no job.yaml")
    (cwd / "folder.yaml").mkdir()
    assert "folder.yaml: Is a directory" in refused(capsys, "train", "folder.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_one_line(cwd: Path, capsys: pytest.CaptureFixture) -> None:
    (cwd / "job.yaml").write_text(JOB + "device: cuda\n")
    assert "device = 'cuda': torch finds no GPU here" in refused(capsys, "train", "job.yaml", "--out", "run")
    assert set(files(cwd)) == {"job.yaml"}


def test_an_exponent_without_a_point_is_a_number(cwd: Path) -> None:
    (cwd / "job.yaml").write_text(JOB.replace("steps: 3", "steps: 1, lr: 3e-3, weight_decay: 1E-2"))
    assert dsmoe("train", "job.yaml", "--out", "run") == 0
    record = json.loads((cwd / "run" / "record.json").read_text())
    assert (record["train"]["lr"], record["train"]["weight_decay"]) == (0.003, 0.01)


@pytest.mark.parametrize("name", ["...yaml", "....yaml", ".yaml", "..", ".hidden.yml"])
def test_a_config_whose_name_is_no_folder_is_one_line(name: str, cwd: Path, capsys: pytest.CaptureFixture) -> None:
    """...yaml without its suffix is .., the folder above runs/."""
    if name != "..":
        (cwd / name).write_text(JOB)
    before = set(files(cwd)), sorted(paths.FOLDER.iterdir())
    assert f"config = '{name}': its name without .yaml is no name for a run folder" in refused(capsys, "train", name)
    assert (set(files(cwd)), sorted(paths.FOLDER.iterdir())) == before


# Models of `dsmoe count`


@pytest.mark.parametrize(
    ("content", "message_part"),
    [
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "architectures = ['LlamaForCausalLM']"),
        ('{"model_type": "deepseek_v3", "hidden_size": 7168}', "model_type = 'deepseek_v3'"),
        ('\t{"architectures": null}', "architectures = None"),
        ('{"d_model": 64, "d_modle": 3}', "d_modle"),
        ("[]", "must be a mapping"),
        ("{", "is not JSON"),
    ],
)
def test_a_json_file_that_is_no_model_of_ours_is_one_line(
    content: str, message_part: str, cwd: Path, capsys: pytest.CaptureFixture
) -> None:
    (cwd / "config.json").write_text(content)
    line = refused(capsys, "count", "config.json")
    assert message_part in line
    assert "config.json" in line
    if "mod" in message_part or "arch" in message_part:
        assert ("d_model, n_layers" in line) == ("d_modle" not in message_part)


def test_json_with_the_fields_of_a_model_is_counted(cwd: Path, capsys: pytest.CaptureFixture) -> None:
    (cwd / "config.json").write_text(json.dumps(to_dict(preset("course-gshard")), indent="\t"))
    assert dsmoe("count", "config.json", "course-gshard", "--json") == 0
    one, other = json.loads(capsys.readouterr().out)
    assert {**one, "name": ""} == {**other, "name": ""}


# Folders of text


def no_folder(folder: Path) -> None:
    pass


def empty(folder: Path) -> None:
    folder.mkdir()


def binary(folder: Path) -> None:
    empty(folder)
    (folder / "a.bin").write_bytes(b"text\0text" * 5000)


def latin(folder: Path) -> None:
    empty(folder)
    (folder / "a.txt").write_bytes("café\n".encode("latin-1") * 5000)


def bad_at_its_end(folder: Path) -> None:
    empty(folder)
    (folder / "a.txt").write_bytes(b"some words\n" * 20_000 + b"\xff")


def little(folder: Path) -> None:
    empty(folder)
    (folder / "a.txt").write_text("a few words\n")


def a_file(folder: Path) -> None:
    folder.write_text("words\n" * 5000)


@pytest.mark.parametrize(
    ("make", "message_part"),
    [
        (no_folder, "no such folder"),
        (empty, "holds no text"),
        (binary, "is binary"),
        (latin, "is not UTF-8"),
        (bad_at_its_end, "is not UTF-8"),
        (little, "too little text"),
        (a_file, "is not a folder"),
    ],
)
def test_an_unusable_text_folder_is_one_line(make, message_part: str, cwd: Path, capsys: pytest.CaptureFixture) -> None:
    make(cwd / "my texts")
    (cwd / "job.yaml").write_text(MODEL + TRAIN + "vocab_size: 300\ncorpus: {kind: folder, path: my texts}\n")
    before = files(cwd)
    line = refused(capsys, "train", "job.yaml", "--out", "run")
    assert message_part in line
    assert "my texts" in line
    assert files(cwd) == before


def test_an_unreadable_file_is_one_line(
    cwd: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patch open(), because tests may run as root, who may read every file."""
    empty(cwd / "texts")
    (cwd / "texts" / "secret.txt").write_text("words\n" * 5000)
    (cwd / "job.yaml").write_text(MODEL + TRAIN + "vocab_size: 300\ncorpus: {kind: folder, path: texts}\n")
    opened = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self.name == "secret.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    line = refused(capsys, "train", "job.yaml", "--out", "run")
    assert line.endswith("secret.txt: cannot be read: Permission denied\n")


# Run folders


@pytest.fixture
def finished(cwd: Path, capsys: pytest.CaptureFixture) -> Path:
    """A finished run in `cwd`/run."""
    (cwd / "job.yaml").write_text(JOB)
    assert dsmoe("train", "job.yaml", "--out", "run") == 0
    capsys.readouterr()
    return cwd / "run"


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_checkpoint_is_one_line(finished: Path, keep: int, capsys: pytest.CaptureFixture) -> None:
    checkpoint = finished / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    before = files(finished)
    assert "damaged checkpoint" in refused(capsys, "train", "job.yaml", "--out", "run")
    assert files(finished) == before
    checkpoint.unlink()  # the remedy named in the message
    assert dsmoe("train", "job.yaml", "--out", "run") == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 1, "train": 1, "data": 1}'])
def test_damaged_settings_are_one_line(finished: Path, content: str, capsys: pytest.CaptureFixture) -> None:
    (finished / "settings.json").write_text(content)
    before = files(finished)
    assert "damaged settings" in refused(capsys, "train", "job.yaml", "--out", "run")
    assert files(finished) == before


def test_a_checkpoint_of_another_model_is_one_line(finished: Path, capsys: pytest.CaptureFixture) -> None:
    (finished / "checkpoint.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    assert "is not a training checkpoint" in refused(capsys, "train", "job.yaml", "--out", "run")
    Path("other.yaml").write_text(JOB.replace("course-gshard", "course-dense"))
    assert dsmoe("train", "other.yaml", "--out", "other") == 0
    capsys.readouterr()
    (finished / "checkpoint.safetensors").write_bytes(Path("other/checkpoint.safetensors").read_bytes())
    assert "holds another model" in refused(capsys, "train", "job.yaml", "--out", "run")


def test_other_settings_are_refused_and_leave_the_run_unchanged(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(finished)
    Path("job.yaml").write_text(JOB.replace("steps: 3", "steps: 4"))
    assert "train.steps = 4" in refused(capsys, "train", "job.yaml", "--out", "run")
    assert files(finished) == before


def test_a_run_folder_in_use_is_a_failure(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(finished)
    with FileLock(finished / ".lock"):
        line = refused(capsys, "train", "job.yaml", "--out", "run", status=FAILURE)
    assert "another process is using this folder" in line
    assert files(finished) == before


@pytest.mark.parametrize("out", ["job.yaml", "job.yaml/below"])
def test_a_run_folder_that_is_a_file_is_bad_input(out: str, cwd: Path, capsys: pytest.CaptureFixture) -> None:
    (cwd / "job.yaml").write_text(JOB)
    assert "is not a folder" in refused(capsys, "train", "job.yaml", "--out", out)
    assert set(files(cwd)) == {"job.yaml"}


def test_a_damaged_tokenizer_in_the_cache_is_one_line(finished: Path, capsys: pytest.CaptureFixture) -> None:
    cached = sorted((paths.cache() / "tokenizers").glob("world-300-*.json"))
    assert cached
    for path in cached:
        path.write_text("{")
    try:
        assert "remove it" in refused(capsys, "train", "job.yaml", "--out", "run")
    finally:
        for path in cached:
            path.unlink()


# A full disk


def full_disk(*args, **kwargs) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("file_name", ["tokenizer", "settings.json", "checkpoint.safetensors", "record.json"])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(
    file_name: str, cwd: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cwd / "job.yaml").write_text(JOB)
    monkeypatch.setenv("DSMOE_CACHE", str(cwd / "cache"))
    replace = os.replace

    def write(source, target) -> None:
        full_disk() if file_name in str(target) else replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", write)
        line = refused(capsys, "train", "job.yaml", "--out", "run", status=FAILURE)
    assert "No space left on device" in line
    assert file_name in line
    assert not [name for name in files(cwd) if file_name in name or name.endswith(".part")]
    assert dsmoe("train", "job.yaml", "--out", "run") == 0
    assert json.loads((cwd / "run" / "record.json").read_text())["finished"]


def test_a_disk_that_fills_up_leaves_the_earlier_run_unchanged(
    finished: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(finished)
    with monkeypatch.context() as patch:
        patch.setattr("dsmoe_lite.checkpoint.save_file", full_disk)
        line = refused(capsys, "train", "job.yaml", "--out", "run", status=FAILURE)
    assert "model.safetensors: not written (No space left on device)" in line
    assert files(finished) == before


# Ctrl-C


def test_ctrl_c_saves_and_the_same_command_resumes(
    cwd: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cwd / "job.yaml").write_text(JOB.replace("steps: 3", "steps: 1500"))
    command = [sys.executable, "-m", "dsmoe_lite", "train", "job.yaml", "--out", "a run", "--json"]
    # the progress bar writes to the pipe after every step, so its first line shows that training has begun
    noisy = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    running = subprocess.Popen(command, cwd=cwd, env=noisy, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stderr is not None
    seen = b""
    while b"loss " not in seen and running.poll() is None:
        seen += os.read(running.stderr.fileno(), 4096)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == STOPPED, err
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"dsmoe: stopped"
    line = out.decode()
    assert line.startswith("Stopped after step ")
    assert line.endswith("of 1500: run it again to continue from a run.\n")
    assert set(files(cwd / "a run")) == {"settings.json", "checkpoint.safetensors"}  # no table, no record
    done = int(line.split()[3])
    assert 0 < done < 1500

    def interrupt(*args) -> None:  # within the first step
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dsmoe_lite.training.train.set_learning_rate", interrupt)
    assert dsmoe("train", "job.yaml", "--out", "a run") == STOPPED
    assert capsys.readouterr().out.startswith(f"Stopped after step {done + 1} of 1500")
