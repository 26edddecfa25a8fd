"""The launch files for clusters: checked by a shell, by Slurm and by the models of Kubeflow's API."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

import dsmoe_lite.parallel

CLUSTERS = Path(dsmoe_lite.parallel.__file__).parent / "clusters"
SLURM = CLUSTERS / "slurm.sbatch"
SLURM_CONF = """
ClusterName=paper
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
GresTypes=gpu
SuspendTime=600
SuspendProgram=/bin/true
ResumeProgram=/bin/true
NodeName=n[1-4] NodeAddr=127.0.0.1 CPUs=64 RealMemory=100000 Gres=gpu:8 State=CLOUD
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "--severity=style", SLURM], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_batch_script_starts_the_same_command_on_every_node(tmp_path: Path) -> None:
    """With stand-ins for the commands of a cluster."""
    for name, body in {"scontrol": "echo n7; echo n8", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    env |= {"SLURM_JOB_ID": "5", "SLURM_GPUS_ON_NODE": "8"}
    result = subprocess.run(["bash", SLURM, "a config.yml", "/shared/run"], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    assert words[-6:] == ["-m", "dsmoe_lite", "train", "a config.yml", "--out", "/shared/run"]
    for word in ("--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=n7:29400", "--max-restarts=3"):
        assert word in words
    result = subprocess.run(["bash", SLURM], capture_output=True, text=True, env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert "give a config file and a run folder" in result.stderr


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm controller with four simulated nodes of eight GPUs."""
    key = Path("/etc/munge/munge.key")
    if not all(map(shutil.which, ("sbatch", "slurmctld", "munged"))) or not os.access(key, os.R_OK):
        pytest.skip("slurm not found, or not root: apt install slurm-wlm")
    folder = tmp_path_factory.mktemp("slurm")
    shutil.copy(key, folder / "key")
    (folder / "key").chmod(0o600)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(host=socket.gethostname().split(".")[0], folder=folder, port=port))
    files = {"key-file": "key", "socket": "munge.sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    env = {"PATH": "/usr/sbin:/usr/bin:/bin", "SLURM_CONF": str(conf)}
    with (folder / "output").open("w") as output:
        daemons = [
            subprocess.Popen(command, env=env, stdout=output, stderr=output) for command in (munge, ["slurmctld", "-D"])
        ]
        try:
            yield env
        finally:
            for daemon in daemons:
                daemon.terminate()
                daemon.wait(timeout=20)


def submit(slurm: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = ["sbatch", "--test-only", *options, str(SLURM), "config.yml", "/shared/run"]
    return subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=60)


def test_slurm_would_start_it(slurm: dict[str, str]) -> None:
    for _ in range(60):  # the controller needs some time to start
        result = submit(slurm)
        if result.returncode == 0:
            break
        time.sleep(0.5)
    assert result.returncode == 0, result.stderr
    assert "to start at" in result.stderr
    assert "on nodes n[1-2]" in result.stderr
    assert "on nodes n[1-4]" in submit(slurm, "--nodes=4").stderr
    assert submit(slurm, "--nodes=5").returncode != 0  # Slurm does compare the options with the nodes
    assert submit(slurm, "--gpus-per-node=9").returncode != 0


def test_the_train_job_fits_the_model_of_kubeflow() -> None:
    content = yaml.safe_load((CLUSTERS / "trainjob.yml").read_text(encoding="utf-8"))
    job = TrainerV1alpha1TrainJob.from_dict(content)
    assert job is not None
    assert job.to_dict() == content  # a field that the model lacks would be missing
    assert job.spec.trainer.args[:3] == ["-m", "dsmoe_lite", "train"]
    patched = job.spec.runtime_patches[0].training_runtime_spec.template.spec.replicated_jobs[0]
    pod = patched.template.spec.template.spec
    mounted = {volume.name for volume in pod.volumes}
    assert {mount.name for mount in pod.containers[0].volume_mounts} == mounted
