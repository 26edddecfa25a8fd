"""Resuming a training run: exactly, after kills and interrupts, by one process per folder."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_samples import CONFIG, V3, make, save_then_die_at, small_world

from dsmoe_lite.checkpoint import read_tensors
from dsmoe_lite.common.errors import RunError
from dsmoe_lite.data.batches import Batch, Batches
from dsmoe_lite.training.interrupts import stop_requested
from dsmoe_lite.training.train import train

# One process imports torch; for each line "folder<TAB>steps" it forks a child that trains there. It prints the child's
# process id, and its exit status after its end.
SERVER = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from training_samples import CONFIG, make
from dsmoe_lite.training.train import train
train(*make(), replace(CONFIG, steps=1))  # loads what torch loads lazily
model, batches = make()
for line in sys.stdin:
    folder, steps = line.rstrip().split("\\t")
    child = os.fork()
    if child == 0:
        train(model, batches, replace(CONFIG, steps=int(steps)), folder=Path(folder))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkServer:
    """Starts training processes by fork, so that none of them waits for the import of torch."""

    def __init__(self) -> None:
        code = SERVER.format(tests=str(Path(__file__).parent))
        environment = {**os.environ, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, folder: Path, steps: int) -> int:
        """Train in `folder`; return the process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\t{steps}\n")
        self.process.stdin.flush()
        return int(self._line())

    def status(self) -> int:
        """Wait until the process ends; return its exit status, or minus the signal that ended it."""
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def wait_for_new_checkpoint(path: Path) -> None:
    before, deadline = modified(path), time.monotonic() + 60
    while modified(path) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert modified(path) != before


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ten_kills_at_random_steps_change_no_loss(tmp_path: Path, fork_server: ForkServer) -> None:
    steps = 40
    model, batches = make()
    uninterrupted = train(model, batches, replace(CONFIG, steps=steps)).losses
    rng, kills, runs = random.Random(7), 0, 0
    while kills < 10:  # a run that ends before the tenth kill is compared, and another one begins
        folder = tmp_path / f"run {runs}"
        checkpoint = folder / "checkpoint.safetensors"
        while True:
            child = fork_server.start(folder, steps)
            if kills < 10:
                before = modified(checkpoint)
                while is_running(child) and modified(checkpoint) == before:
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.04)
                if is_running(child):
                    os.kill(child, signal.SIGKILL)
            status = fork_server.status()
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            kills += 1
        _, metadata = read_tensors(checkpoint)
        assert metadata["training"]["losses"] == uninterrupted
        runs += 1


def test_resume_from_every_step_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    model, batches = make()
    uninterrupted = train(model, batches, CONFIG)
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    for stop in range(1, CONFIG.steps):
        folder = tmp_path / str(stop)
        model, batches = make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsmoe_lite.training.processes.save_training", save_then_die_at(stop))
            with pytest.raises(KeyboardInterrupt):
                train(model, batches, CONFIG, folder=folder)
        _, before = read_tensors(folder / "checkpoint.safetensors")
        model, batches = make(seed=99)  # weights and random state come from the checkpoint
        resumed = train(model, batches, CONFIG, folder=folder)
        assert resumed.losses == uninterrupted.losses
        assert resumed.routing == uninterrupted.routing
        assert resumed.tokens == uninterrupted.tokens
        assert resumed.seconds > before["training"]["seconds"] > 0  # time adds up over the parts
        assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())


def test_a_run_with_bias_and_noise_resumes_exactly(tmp_path: Path) -> None:
    moe = replace(V3, noisy_gating=True)
    config = replace(CONFIG, bias_speed=0.01, balance={"sequence": 0.01, "communication": 0.01})
    model, batches = make(moe=moe)
    uninterrupted = train(model, batches, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsmoe_lite.training.processes.save_training", save_then_die_at(5))
        with pytest.raises(KeyboardInterrupt):
            train(*make(moe=moe), config, folder=tmp_path)
    again, batches = make(moe=moe)
    resumed = train(again, batches, config, folder=tmp_path)
    assert resumed.losses == uninterrupted.losses
    assert again.state_dict().keys() >= {f"blocks.{i}.ffn.router.expert_bias" for i in range(2)}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model, batches = make()
    first = train(model, batches, CONFIG, folder=tmp_path)
    stamp = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    model, batches = make()
    assert train(model, batches, CONFIG, folder=tmp_path).losses == first.losses
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "settings.json").read_text())["train"]["steps"] == CONFIG.steps


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    model, batches = make()
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process is using this folder"):
        train(model, batches, CONFIG, folder=tmp_path)


def test_a_second_real_process_in_the_same_folder_is_refused(tmp_path: Path, fork_server: ForkServer) -> None:
    child = fork_server.start(tmp_path, 1_000_000)
    wait_for_new_checkpoint(tmp_path / "checkpoint.safetensors")
    model, batches = make()
    try:
        with pytest.raises(RunError, match="another process"):
            train(model, batches, replace(CONFIG, steps=1_000_000), folder=tmp_path)
        wait_for_new_checkpoint(tmp_path / "checkpoint.safetensors")  # the first process continues
    finally:
        os.kill(child, signal.SIGKILL)
        assert fork_server.status() == -signal.SIGKILL


def test_an_interrupt_ends_after_the_step_and_keeps_the_model(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    class InterruptedBatches(Batches):
        n_left = 5

        def __next__(self) -> Batch:
            self.n_left -= 1
            if self.n_left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    model, _ = make()
    start = model.head.weight.clone()
    batches = InterruptedBatches(*small_world(), CONFIG.batch_size, CONFIG.seq_len)
    run = train(model, batches, replace(CONFIG, steps=100_000, checkpoint_every=0), folder=tmp_path)
    assert run.steps_done == 5
    assert not torch.equal(model.head.weight, start)
    assert capsys.readouterr().out == f"Stopped after step 5 of 100000: run it again to continue from {tmp_path}.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, metadata = read_tensors(tmp_path / "checkpoint.safetensors")
    assert metadata["training"]["losses"] == run.losses


def test_a_second_interrupt_does_not_wait() -> None:
    with stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
