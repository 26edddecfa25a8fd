"""Errors of training: one line each, for configs, run folders and checkpoints that cannot work."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_samples import CONFIG, SMALL, WORLD, make, small_world

from dsmoe_lite.checkpoint import load_model, load_training, read_tensors, save_model, save_training, write_tensors
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


# A checkpoint whose parts do not fit is refused, and changes nothing


def taken_steps(path: Path, moe: MoEConfig | None = SMALL.moe) -> tuple[Transformer, torch.optim.Optimizer]:
    """A model and its optimizer after a step, which are saved in `path`."""
    model, batches = make(moe=moe)
    optimizer = make_optimizer(model, CONFIG)
    model(next(batches).tokens).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    save_training(path, model, optimizer, {"losses": [1.0]})
    return model, optimizer


def without(*endings: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(endings)}


def having(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            having("optimizer.0.exp_avg", torch.zeros(3, 5)),
            "optimizer.0.exp_avg = (3, 5): must have the shape (512, 32)",
        ),
        (
            having("optimizer.2.exp_avg_sq", torch.zeros(1)),
            "optimizer.2.exp_avg_sq = (1,): must have the shape (64, 32)",
        ),
        (having("optimizer.1.step", torch.zeros(2)), "optimizer.1.step = (2,): must have the shape ()"),
        (
            having("optimizer.99.step", torch.zeros(())),
            "optimizer.99.step = (): a model of this config has no such tensor",
        ),
        (having("optimizer.x", torch.zeros(())), "optimizer.x = (): a model of this config has no such tensor"),
        (
            having("optimizer.0.more", torch.zeros(())),
            "optimizer.0.more = (): a model of this config has no such tensor",
        ),
        (without("0.exp_avg"), "optimizer.0.exp_avg = 'missing': must have the shape (512, 32)"),
        (without("3.step", "3.exp_avg", "3.exp_avg_sq"), "optimizer.3.step = 'missing': must have the shape ()"),
        (without("step", "exp_avg", "exp_avg_sq"), "optimizer.0.step = 'missing'"),
        (without("head.weight"), "model.head.weight = 'missing': must have the shape (512, 32)"),
        (having("model.head.weight", torch.zeros(2)), "model.head.weight = (2,): must have the shape (512, 32)"),
        (having("model.more", torch.zeros(2)), "model.more = (2,): a model of this config has no such tensor"),
        (without("random.cpu"), "random.cpu = 'missing'"),
        (having("random.cpu", torch.zeros(7, dtype=torch.uint8)), "holds another model"),
        (having("random.cpu", torch.zeros(7)), "holds another model"),
        (having("random.cpu", torch.zeros_like(torch.get_rng_state())), "holds another model"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_changes_nothing(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    taken_steps(path)
    tensors, metadata = read_tensors(path)
    write_tensors(path, change(tensors), metadata)
    assert_refused_unchanged(path, message)


@pytest.mark.parametrize("state", [None, [], 3, "text"])
def test_a_training_state_that_is_no_mapping_is_one_line(state: object, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    taken_steps(path)
    tensors, _ = read_tensors(path)
    write_tensors(path, tensors, {"training": state})
    assert_refused_unchanged(path, "training = ")


def assert_refused_unchanged(path: Path, message: str) -> None:
    model, optimizer = taken_steps(path.with_name("other.safetensors"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slots = [value.clone() for slot in optimizer.state.values() for value in slot.values()]
    random_state = torch.get_rng_state()
    with pytest.raises(InputError) as caught:
        load_training(path, model, optimizer)
    assert str(caught.value).startswith(f"{path}: holds another model, or another version wrote it (")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    now = [value for slot in optimizer.state.values() for value in slot.values()]
    assert all(torch.equal(value, old) for value, old in zip(now, slots, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_checkpoint_before_the_first_step_has_no_slots(tmp_path: Path) -> None:
    model, _ = make()
    optimizer = make_optimizer(model, CONFIG)
    save_training(tmp_path / "c.safetensors", model, optimizer, {"losses": []})
    assert load_training(tmp_path / "c.safetensors", model, optimizer) == {"losses": []}
    assert not optimizer.state


def test_weights_that_are_frozen_have_no_slots(tmp_path: Path) -> None:
    model, batches = make()
    optimizer = make_optimizer(model, CONFIG)
    model.embed.weight.requires_grad_(False)
    model(next(batches).tokens).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    save_training(tmp_path / "c.safetensors", model, optimizer, {"losses": [1.0]})
    assert load_training(tmp_path / "c.safetensors", model, optimizer) == {"losses": [1.0]}
    assert len(optimizer.state) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": "12"}, "losses = '12': must be a list"),
        ({"tokens": None}, "tokens = None: must be a whole number"),
        ({"seconds": [1]}, "seconds = [1]: must be a number"),
        ({"batches": None}, "batches = None: must be a mapping"),
        ({"batches": {"epoch": 0, "document": 0}}, "offset = None"),
        ({"batches": {"epoch": 0, "document": 0, "offset": 0, "more": 1}}, "belongs to another corpus or tokenizer"),
        ({"more": 1}, "another version of dsmoe-lite wrote it"),
    ],
)
def test_a_damaged_state_of_a_run_is_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    train(*make(), replace(CONFIG, steps=1, warmup_steps=1), folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {"training": metadata["training"] | change})
    with pytest.raises(InputError) as caught:
        train(*make(), replace(CONFIG, steps=1, warmup_steps=1), folder=tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
