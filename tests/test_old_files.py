"""Files of earlier versions still load, and a file of an unknown version is refused in one line.

Commit 90277513 wrote tests/old_files: it trained job.yml in run/, and traced TEXT through the trained model.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dsmoe_lite.checkpoint import load_model, load_training, read_metadata, read_tensors, write_tensors
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import to_dict
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel import checkpoint as sharded
from dsmoe_lite.routing.trace import RoutingTrace
from dsmoe_lite.study import equations, grids, ledger, published
from dsmoe_lite.study.grids import Grid
from dsmoe_lite.study.needle import NeedleJob
from dsmoe_lite.training.job import Job, read_job
from dsmoe_lite.training.optimizer import make_optimizer
from dsmoe_lite.training.record import Run
from dsmoe_lite.training.run_folder import check_settings

OLD = Path(__file__).with_name("old_files")
RUN = OLD / "run"
TEXT = "Ann Cole was born in Rome. 3 + 4 = 7."


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def job() -> Job:
    return read_job(OLD / "job.yml")


def test_a_record_loads(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    monkeypatch.setattr(grids, "GRIDS", {"old": Grid({"moe": job}, (0,), 1)})
    record = read_json(RUN / "record.json")
    path = grids.record_path("old", "moe", 0)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    assert record["schema_version"] == 2
    assert grids.records("old") == [{"model_name": "moe", "seed": 0, **record}]


def test_a_record_of_version_1_loads() -> None:
    record = read_json(paths.DATA / "runs" / "neighbours" / "course-dense-x2-seed3.json")
    assert record["schema_version"] == 1
    grids.grid("neighbours").job("course-dense-x2", 3).check_record(record)
    with pytest.raises(InputError, match=r"train\.seed = 3: this run has 2"):
        grids.grid("neighbours").job("course-dense-x2", 2).check_record({**record, "first_document": 16000})


def test_a_model_and_a_trace_load() -> None:
    """The model computes today what it computed then: its trace of the same text is the stored one."""
    model, metadata = load_model(RUN / "model.safetensors"), read_metadata(RUN / "model.safetensors")
    assert metadata["corpus"]["name"] == "world"
    stored = RoutingTrace.load(OLD / "trace.npz")
    trace = RoutingTrace.of(model, Tokenizer.from_str(metadata["tokenizer"]), TEXT)
    assert "".join(stored.tokens) == TEXT
    assert (stored.n_layers, stored.n_experts, stored.top_k, stored.n_shared) == (1, 4, 2, 1)
    assert np.array_equal(stored.token_ids, trace.token_ids)
    assert stored.topk_ids.shape == trace.topk_ids.shape
    np.testing.assert_allclose(stored.scores, trace.scores, atol=1e-3)
    np.testing.assert_allclose(stored.gates, trace.gates, atol=1e-3)
    np.testing.assert_allclose(stored.loss, trace.loss, rtol=1e-4)


def test_a_checkpoint_and_its_settings_load(job: Job) -> None:
    _, metadata = read_tensors(RUN / "checkpoint.safetensors")
    model = Transformer(replace(job.model, vocab_size=read_json(RUN / "record.json")["vocab_size"]))
    optimizer = make_optimizer(model, job.train)
    state = load_training(RUN / "checkpoint.safetensors", model, optimizer)
    assert state == metadata["training"]
    assert state.pop("batches")
    assert [round(loss, 5) for loss in Run(**state).losses] == read_json(RUN / "record.json")["losses"]
    assert {float(slot["step"]) for slot in optimizer.state.values()} == {3.0}
    final, _ = read_tensors(RUN / "model.safetensors")
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())
    check_settings(RUN, {"model": to_dict(model.config), "train": to_dict(job.train)})


# Unknown versions


def write_record(path: Path) -> None:
    path.write_text(json.dumps(read_json(RUN / "record.json") | {"schema_version": 9}), encoding="utf-8")


def write_model(path: Path) -> None:
    write_tensors(path, {"a": torch.ones(1)}, {"config": {}, "schema_version": 9})


def write_trace(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **dict(np.load(OLD / "trace.npz")) | {"schema_version": np.int64(9)})


def write_sharded(path: Path) -> None:
    path.mkdir()
    metadata = {"config": {}, "state": {}, "schema_version": 9}
    (path / sharded.METADATA).write_text(json.dumps(metadata), encoding="utf-8")


def write_ledger(path: Path) -> None:
    path.write_text('{"schema_version": 9, "claims": [], "equations": []}', encoding="utf-8")  # JSON is YAML too


@pytest.mark.parametrize(
    ("write", "load"),
    [
        (write_model, load_model),
        (write_model, read_metadata),
        (write_model, lambda path: load_training(path, *model_and_optimizer())),
        (write_sharded, sharded._read_metadata),
        (write_trace, RoutingTrace.load),
        (write_ledger, ledger.load),
        (write_ledger, equations.load),
        (write_ledger, published.load),
    ],
)
def test_an_unknown_version_is_one_line(write: Callable[[Path], None], load: Callable, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    write(path)
    with pytest.raises(InputError) as caught:
        load(path)
    assert re.fullmatch(rf"{re.escape(str(path))}: schema_version = 9: this package reads 1; \w.*", str(caught.value))


def model_and_optimizer() -> tuple[Transformer, torch.optim.AdamW]:
    job = read_job(OLD / "job.yml")
    model = Transformer(job.model)
    return model, make_optimizer(model, job.train)


def test_a_record_of_an_unknown_version_is_one_line(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    monkeypatch.setattr(grids, "GRIDS", {"old": Grid({"moe": job}, (0,), 1)})
    path = grids.record_path("old", "moe", 0)
    path.parent.mkdir(parents=True)
    write_record(path)
    with pytest.raises(InputError) as caught:
        grids.records("old")
    expected = f"{path}: schema_version = 9: this package reads 1 and 2; move the record away"
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="schema_version = 9: this package reads 1; move the record away"):
        NeedleJob().check_record({"schema_version": 9})
