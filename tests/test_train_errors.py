"""Errors of training: one line each, for configs, run folders and checkpoints that cannot work."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_samples import CONFIG, WORLD, make, small_world

from dsmoe_lite.checkpoint import load_model, load_training, save_model
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import MoEConfig, to_dict
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.data.world import World
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import Job, run_job
from dsmoe_lite.training.optimizer import make_optimizer
from dsmoe_lite.training.train import train


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", float("nan")),
        ("lr", 0.0),
        ("lr", -1),
        ("steps", 0),
        ("steps", 1.5),
        ("balance", {"swich": 0.1}),
        ("seed", -1),
    ],
)
def test_a_train_config_that_cannot_work_is_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} = "):
        replace(CONFIG, **{field: value})


def test_nan_is_reported_with_the_remedy() -> None:
    model, batches = make()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"loss = nan at step 0: lower lr"):
        train(model, batches, CONFIG)


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    model, batches = make()
    train(model, batches, CONFIG, folder=tmp_path)
    model, batches = make()
    with pytest.raises(InputError, match=r"train.lr = 0.5: .* holds a run with 0.003"):
        train(model, batches, replace(CONFIG, lr=0.5), folder=tmp_path)
    other = Batches(World(replace(WORLD, seed=1)), small_world()[1], CONFIG.batch_size, CONFIG.seq_len)
    with pytest.raises(InputError, match=r"data.corpus = "):
        train(model, other, CONFIG, folder=tmp_path)
    small, batches = make()
    with pytest.raises(InputError, match=r"model.ffn_width = 96"):
        train(Transformer(replace(small.config, ffn_width=96)), batches, CONFIG, folder=tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_checkpoint_is_one_line(tmp_path: Path, keep: int) -> None:
    model, _ = make()
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged checkpoint") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_model_round_trip_and_wrong_kind(tmp_path: Path) -> None:
    model, _ = make()
    save_model(tmp_path / "m.safetensors", model, note="x")
    again = load_model(tmp_path / "m.safetensors")
    assert to_dict(again.config) == to_dict(model.config)
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(InputError, match="is not a training checkpoint"):
        load_training(tmp_path / "m.safetensors", model, make_optimizer(model, CONFIG))
    with pytest.raises(InputError, match="no such checkpoint"):
        load_model(tmp_path / "absent.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: a disk that is always full")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make()
    path = tmp_path / "m.safetensors"
    save_model(path, model)
    before = path.read_bytes()

    def full(tensors, aside, metadata):
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x" * 4096)

    monkeypatch.setattr("dsmoe_lite.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"m\.safetensors: not written \(No space left on device\)"):
        save_model(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"moe": MoEConfig(n_routed_experts=10**9, top_k=2, expert_width=8)},
        {"d_model": 10**6},
        {"ffn_width": 10**12},
        {"n_layers": 10_000, "d_model": 4096},
    ],
)
def test_a_model_beyond_the_machine_is_refused_before_it_is_made(change: dict[str, Any]) -> None:
    job = Job(model=replace(preset("course-dense"), **change), train=TrainConfig(steps=1), vocab_size=300)
    with pytest.raises(InputError, match=r"model = '[\d,]+ parameters': needs [\d,.]+ GB to train, and cpu has"):
        run_job(job)
