"""Replays of recorded runs: the same weights, snapshots, and errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.files import write_json
from dsmoe_lite.data.world import WorldConfig
from dsmoe_lite.presets import preset
from dsmoe_lite.study import grids
from dsmoe_lite.study import replay as replay_module
from dsmoe_lite.study.grids import Grid, record_path
from dsmoe_lite.study.replay import replay
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job, run_job

JOB = Job(
    model=preset("course-gshard"),
    train=TrainConfig(steps=3, batch_size=2, seq_len=16, warmup_steps=1),
    corpus=CorpusConfig(
        world=WorldConfig(n_entities=40, n_control=8, n_head=8, n_tail=8, n_documents=400, n_heldout=100),
    ),
    vocab_size=300,
    n_heldout_batches=2,
    device="cpu",
)
GRID = Grid({"gshard": JOB}, (0, 1), 2)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The grid "small" with one of its two runs recorded."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(grids, "GRIDS", {"small": GRID})
    torch.set_num_threads(1)
    record = GRID.job("gshard", 1).run()
    write_json(record_path("small", "gshard", 1), record)
    return record


def test_a_replay_is_the_same_run(recorded: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            ["replay", "small", "gshard", "--seed=1", f"--out={tmp_path}/out", "--snapshot=1", "--snapshot=3", "--json"]
        )
    assert stopped.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["now"] for row in rows} == {row["held-out loss recorded"] for row in rows} == {recorded["heldout_loss"]}
    names = ["small-gshard-seed1", "small-gshard-seed1-step1", "small-gshard-seed1-step3"]
    assert [Path(row["file"]).name for row in rows] == [f"{name}.safetensors" for name in names]
    final, first, last = (load_model(Path(row["file"])).state_dict() for row in rows)
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert not torch.equal(first["embed.weight"], final["embed.weight"])
    metadata = read_metadata(tmp_path / "out" / f"{names[1]}.safetensors")
    assert metadata["corpus"]["sha256"] == recorded["corpus"]["sha256"]
    assert metadata["tokenizer"]


def test_a_replay_trains_on_one_thread_as_records_do(
    recorded: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def recording(*args: object, **kwargs: object) -> dict:
        threads.append(torch.get_num_threads())
        return run_job(*args, **kwargs)

    monkeypatch.setattr(replay_module, "run_job", recording)
    torch.set_num_threads(2)
    try:
        replay("small", "gshard", 1, tmp_path / "out")
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("small", "gshard", 0), "gshard-seed0\\.json: no finished run; run `dsmoe experiment small` first"),
        (("small", "dense", 1), "model = 'dense': must be one of gshard"),
        (("smal", "gshard", 1), "experiment = 'smal': there is no such grid; try small"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(recorded: dict, tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replay(*arguments, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_must_be_a_step_of_the_run(recorded: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="snapshot = 4: must be a whole number of at least 1 and at most 3"):
        replay("small", "gshard", 1, tmp_path / "out", [4])
    replay("small", "gshard", 1, tmp_path / "out")
    with pytest.raises(InputError, match=r"snapshot = 'step1': the run in .* is past that step; remove the folder"):
        replay("small", "gshard", 1, tmp_path / "out", [1])
    with pytest.raises(InputError, match=r"snapshots = .*: need a run folder"):
        run_job(replace(JOB, n_heldout_batches=1), snapshots=[1])
