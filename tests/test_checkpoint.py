"""Model files: tied and shared weights, what a file cannot hold, damaged weights, permissions, remains of a kill."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_models import CONFIG, TOKENS, made
from torch import nn

from dsmoe_lite.checkpoint import load_model, load_training, read_tensors, save_model, save_training, write_tensors
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.generate import generate
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.routing.interventions import (
    freeze_gate_norm,
    mask_top,
    silence,
    swap_shared,
    switch_off,
    with_active,
)

TIED = replace(CONFIG, tie_embeddings=True)


@pytest.mark.parametrize(
    "config", [TIED, replace(TIED, moe=None), preset("course-dense")], ids=["experts", "dense", "preset"]
)
def test_tied_embeddings_are_written_once_and_tied_again(tmp_path: Path, config: ModelConfig) -> None:
    config = replace(config, tie_embeddings=True)
    model, path = made(config), tmp_path / "model.safetensors"
    save_model(path, model)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert "embed.weight" in names
    assert "head.weight" not in names
    loaded = load_model(path)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_training_of_tied_embeddings_resumes(tmp_path: Path) -> None:
    def step(model: Transformer, optimizer: torch.optim.AdamW) -> float:
        loss = model(TOKENS).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    model = made(TIED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    save_training(tmp_path / "checkpoint.safetensors", model, optimizer, {"step": 1})
    wanted = [step(model, optimizer) for _ in range(3)]
    other = Transformer(TIED)
    resumed = torch.optim.AdamW(other.parameters(), lr=1e-2)
    assert load_training(tmp_path / "checkpoint.safetensors", other, resumed) == {"step": 1}
    assert [step(other.eval(), resumed) for _ in range(3)] == wanted


def test_weights_that_a_user_shares_are_kept(tmp_path: Path) -> None:
    model = made()
    model.blocks[1].attention = model.blocks[0].attention  # a whole module
    model.blocks[1].ffn.experts.up = model.blocks[0].ffn.experts.up  # a weight
    model.blocks[1].ffn.shared.gate.weight = nn.Parameter(model.blocks[0].ffn.shared.gate.weight[:])  # a view
    save_model(tmp_path / "model.safetensors", model)
    assert torch.equal(load_model(tmp_path / "model.safetensors")(TOKENS).logits, model(TOKENS).logits)


def test_views_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tensors = {"a": base[:4], "b": base[2:], "c": base[:4], "d": base.view(2, 3), "e": base[:0], "f": base[:0]}
    write_tensors(tmp_path / "t.safetensors", tensors, {})
    read, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {}
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


INTERVENTIONS: list[Callable[[Transformer], Transformer]] = [
    lambda model: switch_off(model, {0: [1]}),
    lambda model: mask_top(model, 0.2),
    lambda model: silence(model, ranks=[0]),
    lambda model: silence(model, experts={0: [1]}),
    freeze_gate_norm,
    lambda model: with_active(switch_off(model, {1: [0]}), 3),
    lambda model: silence(silence(model, shared=True), ranks=[1]),
]


@pytest.mark.parametrize("change", INTERVENTIONS)
def test_a_model_with_interventions_is_refused(tmp_path: Path, change: Callable[[Transformer], Transformer]) -> None:
    with pytest.raises(InputError, match="model = 'with interventions': a file cannot hold them"):
        save_model(tmp_path / "model.safetensors", change(made()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change", [lambda m: with_active(m, 3), lambda m: swap_shared(m, 1), lambda m: silence(m, shared=True)]
)
def test_an_intervention_that_the_config_holds_is_saved(
    tmp_path: Path, change: Callable[[Transformer], Transformer]
) -> None:
    changed = change(made())
    save_model(tmp_path / "model.safetensors", changed)
    assert torch.equal(load_model(tmp_path / "model.safetensors")(TOKENS).logits, changed(TOKENS).logits)


def test_a_model_that_its_config_does_not_make_is_refused(tmp_path: Path) -> None:
    wider, extra = made(), made()
    wider.head = nn.Linear(16, 50, bias=False)
    extra.blocks[0].attention.query.bias = nn.Parameter(torch.zeros(16))
    with pytest.raises(InputError, match=r"head\.weight = \(50, 16\): must have the shape \(41, 16\)"):
        save_model(tmp_path / "m", wider)
    with pytest.raises(
        InputError, match=r"blocks\.0\.attention\.query\.bias = \(16,\): a model of this config has no such tensor"
    ):
        save_model(tmp_path / "m", extra)
    with pytest.raises(InputError, match=r"model = 'Sequential': must be a Transformer; pass the one inside"):
        save_model(tmp_path / "m", nn.Sequential(made()))
    with torch.device("meta"):
        empty = Transformer(CONFIG)
    with pytest.raises(InputError, match=r"embed\.weight = 'meta': has no values"):
        save_model(tmp_path / "m", empty)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["head.weight", "embed.weight", "blocks.1.ffn.experts.down", "norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    model = made()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    save_model(tmp_path / "model.safetensors", model)
    with pytest.raises(InputError, match=f"{name} is NaN or infinite"):
        load_model(tmp_path / "model.safetensors")


def test_generation_with_damaged_weights_stops() -> None:
    model = made()
    with torch.no_grad():
        model.head.weight[5] = float("nan")
    with pytest.raises(RunError, match="logits: NaN or infinite"):
        generate(model, [[1, 2, 3]], 4)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_permissions_of_all_files(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_model(tmp_path / "model.safetensors", made())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~umask


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from dsmoe_lite.common.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for name in ("a [1].txt", "b.txt"):
        subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    alive = tmp_path / f".a [1].txt.{os.getppid()}.part"
    alive.touch()
    with atomic_write(tmp_path / "a [1].txt") as part:
        part.write_text("whole")
    assert sorted(path.name[:3] for path in tmp_path.iterdir()) == sorted([".a ", ".b.", "a ["])
    assert alive.exists()
