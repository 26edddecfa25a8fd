"""`dsmoe train` under torchrun: the same run as in one process, even if a process or a host fails."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torchrun import torchrun

from dsmoe_lite.checkpoint import read_tensors
from dsmoe_lite.parallel.checkpoint_folders import newest_checkpoint

CONFIG = """
model:
  vocab_size: 512
  d_model: 32
  n_layers: 2
  attention: {n_heads: 2, head_dim: 16}
  ffn_width: 64
  max_seq_len: 32
  n_dense_layers: 1
  n_mtp: 1
  moe: {n_routed_experts: 8, top_k: 2, expert_width: 24, n_shared_experts: 1, n_group: 4, topk_group: 2,
        scoring_func: sigmoid, expert_bias: true}
train: {steps: 80, batch_size: 8, seq_len: 32, grad_accum: 2, checkpoint_every: 5, bias_speed: 0.001,
        balance: {sequence: 0.01, device: 0.01, communication: 0.01}}
corpus: {world: {n_entities: 40, n_control: 8, n_head: 8, n_tail: 8, n_documents: 400, n_heldout: 200}}
vocab_size: 512
n_heldout_batches: 1
"""
QUIET = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yml"
    path.write_text(CONFIG)
    return path


def changed(config: Path, before: str, after: str) -> Path:
    """A copy of the config with one change."""
    text = config.read_text()
    assert text.count(before) == 1
    path = config.with_name(f"{len(list(config.parent.iterdir()))}.yml")
    path.write_text(text.replace(before, after))
    return path


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=os.environ | QUIET, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(command: list[str]) -> tuple[int, str]:
    """The exit status, and stdout plus stderr."""
    with start(command) as run:
        out, err = run.communicate(timeout=120)
    return run.returncode, out + err


def training(config: Path, folder: Path, processes: int, *options: str) -> list[str]:
    return [*torchrun(processes, *options), "-m", "dsmoe_lite", "train", str(config), "--out", str(folder)]


def command_per_rank(*commands: str) -> list[str]:
    """Two processes of torchrun with a `dsmoe` command each."""
    return [*torchrun(2), str(Path(__file__).with_name("dsmoe_per_rank.py")), *commands]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def wait_for_step(folder: Path, step: int, run: subprocess.Popen[str]) -> None:
    while (path := newest_checkpoint(folder / "checkpoints")) is None or int(path.name.removeprefix("step-")) < step:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("dsmoe:")]


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, without torchrun."""
    folder = tmp_path_factory.mktemp("one") / "run"
    status, output = finish([sys.executable, "-m", "dsmoe_lite", "train", str(config), "--out", str(folder)])
    assert status == 0, output
    return folder


@pytest.fixture(scope="module")
def two(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    status, output = finish(training(config, folder, 2))
    assert status == 0, output
    assert output.count("Training run") == 1
    return folder


def assert_same_run(folder: Path, expected_folder: Path, tolerance: float) -> None:
    """`tolerance` in the first 20 steps: later, rounding flips a choice of experts, and then the runs diverge."""
    record, expected = record_of(folder), record_of(expected_folder)
    assert record["losses"][:20] == pytest.approx(expected["losses"][:20], abs=tolerance)
    assert record["losses"] == pytest.approx(expected["losses"], abs=0.05)
    assert record["heldout_loss"] == pytest.approx(expected["heldout_loss"], abs=0.05)
    assert record["routing"][0] == expected["routing"][0]


def test_two_processes_train_the_model_that_one_does(one: Path, two: Path) -> None:
    assert_same_run(two, one, 1.01e-5)  # records round at 1e-5
    assert (record_of(one)["processes"], record_of(two)["processes"]) == (1, 2)
    tensors, expected = (read_tensors(folder / "model.safetensors")[0] for folder in (two, one))
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].allclose(expected[name], atol=0.02) for name in tensors)


def test_a_stopped_run_resumes_in_another_number_of_processes(config: Path, one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(training(config, folder, 2)) as run:
        wait_for_step(folder, 5, run)
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "Stopped after step" in out
    assert out.count("Stopped") == 1
    assert not (folder / "record.json").exists()
    status, output = finish(training(config, folder, 1))
    assert status == 0, output
    assert_same_run(folder, one, 1e-4)  # a wrong batch, or a lost moment of AdamW, would be more than ten times that


def test_a_killed_process_is_restarted_and_the_record_is_the_same(config: Path, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start(training(config, folder, 2, "--max-restarts=1")) as run:
        wait_for_step(folder, 20, run)
        victim = next(p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1")
        victim.kill()
        _, err = run.communicate(timeout=90)
    assert run.returncode == 0, err
    assert "exitcode: -9" in err
    assert all("one of 2 processes is lost" in line for line in error_lines(err))
    for name in ("losses", "routing", "heldout_loss", "recall"):
        assert record_of(folder)[name] == record_of(two)[name]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("steps: 80", "steps: 90", "process 1: train.steps = 90: this run has 80"),
        ("vocab_size: 512\nn_held", "vocab_size: 300\nn_held", "process 1: vocab_size = 300: this run has 512"),
    ],
)
def test_unequal_configs_are_one_line(config: Path, tmp_path: Path, before: str, after: str, message: str) -> None:
    other = changed(config, before, after)
    folder = tmp_path / "run"
    status, output = finish(command_per_rank(*(f"train {path} --out {folder}" for path in (config, other))))
    assert status != 0
    assert error_lines(output) == [f"dsmoe: {message}"]
    assert not folder.exists()


def test_an_error_of_one_process_only_is_printed_by_it(config: Path, tmp_path: Path) -> None:
    folder, missing = tmp_path / "run", tmp_path / "none.yml"
    status, output = finish(command_per_rank(*(f"train {path} --out {folder}" for path in (config, missing))))
    assert status != 0
    assert error_lines(output) == [f"dsmoe: {missing}: No such file or directory"]


def test_sizes_and_models_that_do_not_fit_are_one_line(config: Path, two: Path, tmp_path: Path) -> None:
    mesh = changed(config, "n_heldout_batches: 1", "expert_parallel: 3")
    status, output = finish(training(mesh, tmp_path / "run", 2))
    assert status != 0
    assert error_lines(output) == ["dsmoe: expert_parallel = 3: must divide the number of processes, 2"]
    wide = changed(config, "d_model: 32", "d_model: 48")
    status, output = finish(training(wide, two, 2))
    assert status != 0
    assert error_lines(output) == [f"dsmoe: model.d_model = 48: {two} holds a run with 32; choose another folder"]


def test_one_process_without_torchrun_refuses_a_sharded_checkpoint(config: Path, two: Path) -> None:
    status, output = finish([sys.executable, "-m", "dsmoe_lite", "train", str(config), "--out", str(two)])
    assert status == 2
    assert "torchrun's processes wrote it" in output


def test_many_processes_refuse_the_checkpoint_of_one(config: Path, one: Path) -> None:
    status, output = finish(training(config, one, 2))
    assert status != 0
    (line,) = error_lines(output)
    assert "one process without torchrun wrote it" in line


# Tests that need root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"needs root to mount a small disk: {result.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_leaves_a_checkpoint(config: Path, small_disk: Path) -> None:
    folder = small_disk / "run"
    status, output = finish(training(config, folder, 2))
    assert status != 0
    (line,) = error_lines(output)
    assert "No space left on device" in line
    assert line.endswith("earlier checkpoints are intact")
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left
    assert all(name.startswith("step-") for name in left)


HOSTS = {"dsmoe-host-0": "10.77.0.1", "dsmoe-host-1": "10.77.0.2"}


@pytest.fixture
def two_hosts() -> Iterator[None]:
    """Two network namespaces and a cable. TCP gives up a silent connection after some ten seconds, not minutes."""
    first, second = HOSTS
    commands = [f"ip netns add {host}" for host in HOSTS]
    commands += [f"ip link add wire netns {first} type veth peer name wire netns {second}"]
    for host, address in HOSTS.items():
        commands += [f"ip -n {host} addr add {address}/24 dev wire", f"ip -n {host} link set lo up"]
        commands += [f"ip -n {host} link set wire up"]
        commands += [f"ip netns exec {host} sysctl -qw net.ipv4.tcp_retries2=5"]
    _remove_hosts()  # the remains of a killed test
    try:
        for command in commands:
            result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
            if result.returncode != 0:
                pytest.skip(f"needs root and iproute2 to set up two hosts: `{command}`: {result.stderr.strip()}")
        yield
    finally:
        _remove_hosts()


def _remove_hosts() -> None:
    for host in HOSTS:
        subprocess.run(["sh", "-c", f"ip netns del {host}"], capture_output=True)


def on_host(host: str, config: Path, folder: Path) -> list[str]:
    first = next(iter(HOSTS))
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=two", "--rdzv-backend=c10d"]
    meeting += [f"--rdzv-endpoint={HOSTS[first]}:29400", f"--rdzv-conf=is_host={host == first:d}"]
    run = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--local-addr={HOSTS[host]}"]
    train = ["-m", "dsmoe_lite", "train", str(config), "--out", str(folder), "--patience", "5"]
    return ["ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=wire", *run, *train]


@pytest.mark.usefixtures("two_hosts")
def test_losing_a_host_ends_both_with_an_error(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    runs = [start(on_host(host, config, folder)) for host in HOSTS]
    wait_for_step(folder, 5, runs[0])
    subprocess.run(["ip", "-n", "dsmoe-host-1", "link", "set", "wire", "down"], check=True)
    began = time.monotonic()
    for run in runs:
        _, err = run.communicate(timeout=90)
        assert run.returncode != 0
        (line,) = error_lines(err)
        assert line.startswith("dsmoe: one of 2 processes is lost, or silent for 5 s; run it again to continue from")
    assert time.monotonic() - began < 60


# Processes that cannot meet


@pytest.mark.parametrize("address", ["no-such-host-xyz", "127.0.0.1"])
def test_an_address_that_nothing_answers_is_one_line_after_the_patience(
    address: str, config: Path, tmp_path: Path
) -> None:
    """As torchrun starts the processes of a host: an unknown name, and a port that nobody listens to."""
    environment = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": address}
    environment |= {"MASTER_PORT": "9", "WORLD_SIZE": "2"} | QUIET
    command = [sys.executable, "-m", "dsmoe_lite", "train", str(config), "--out", str(tmp_path / "run")]
    runs = [
        subprocess.Popen(
            [*command, "--patience", "1"],
            env=os.environ | environment | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    first, second = (run.communicate(timeout=60)[1] for run in runs)
    assert [run.returncode for run in runs] == [1, 1]
    (line,) = error_lines(first)
    assert line.startswith(f"dsmoe: MASTER_ADDR = {address}:9: not reached within 1 s; on one machine, start torchrun")
    assert "--local-addr=127.0.0.1" in line
    assert error_lines(second) == []
