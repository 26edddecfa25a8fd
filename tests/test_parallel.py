"""Experts spread over processes: the same numbers as one process, and no row sent twice."""

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_gxx
from parallel_checks import CHECKPOINTED, loss_of
from torchrun import torchrun

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import ModelConfig, MoEConfig
from dsmoe_lite.layers import balance
from dsmoe_lite.layers.dispatch import Dispatched
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.checkpoint import METADATA, load_sharded, save_sharded
from dsmoe_lite.parallel.checkpoint_folders import newest_checkpoint
from dsmoe_lite.parallel.dispatch import plan_send
from dsmoe_lite.parallel.mesh import check_placement, groups_per_rank, make_mesh, rows_of_rank
from dsmoe_lite.parallel.shard import parallelize

CHECKS = Path(__file__).with_name("parallel_checks.py")


def launch(mode: str, folder: Path, processes: int) -> dict[str, Any]:
    command = [*torchrun(processes), str(CHECKS), mode, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """What four processes found, in one launch."""
    return launch("check", folder, 4)


@pytest.mark.parametrize("name", ["1", "2", "4", "ragged", "limited", "capacity", "dropping", "expert choice", "mtp"])
def test_twenty_steps_are_those_of_one_process(found: dict[str, Any], name: str) -> None:
    for value in found[f"float64 {name}"].values():
        assert value < 1e-9


def test_twenty_steps_in_float32(found: dict[str, Any]) -> None:
    assert found["float32 4"]["losses"] < 1e-5
    assert found["float32 4"]["parameters"] < 1e-3  # Adam divides by what is nearly zero


@pytest.mark.parametrize(
    "name", ["importance", "gshard", "switch", "z", "expert", "sequence", "device", "communication"]
)
def test_a_loss_is_that_of_the_whole_batch(found: dict[str, Any], name: str) -> None:
    assert found[f"loss {name}"] < 1e-12


@pytest.mark.parametrize("name", ["dense", "1", "2", "4"])
def test_the_norm_of_gradients_counts_every_part_once(found: dict[str, Any], name: str) -> None:
    assert found[f"norm {name}"] < 1e-12


@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_a_process_whose_experts_get_no_token_still_takes_part(found: dict[str, Any], backend: str) -> None:
    assert found[f"empty {backend}"] < 1e-12


BACKENDS = ["loop", "padded", "grouped", "auto", pytest.param("cuda", marks=needs_gxx)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_computes_exchanged_rows(found: dict[str, Any], backend: str) -> None:
    assert found[f"backend {backend} torch.float32"] < 1e-5
    assert found[f"backend {backend} torch.bfloat16"] < 0.05
    assert "backend='loop', without expert parallelism" in found[f"second derivative {backend}"]


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_trains_under_a_single_process_of_torchrun(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    moe = MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, backend=backend)
    model = Transformer(replace(CHECKPOINTED, moe=moe, tie_embeddings=False)).to(dtype)
    spread = copy.deepcopy(model)
    parallelize(spread, make_mesh("cpu", moe))
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(5))
    for one in (model, spread):
        one(tokens).logits.float().square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), spread.parameters(), strict=True):
        error = (theirs.grad.full_tensor() - ours.grad).float().norm() / ours.grad.float().norm()
        assert error < 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("processes", [2, 4])
def test_each_token_goes_once_to_a_process(found: dict[str, Any], processes: int) -> None:
    sent = found[f"payload {processes}"]
    assert sent["fewest"] > 0
    assert sent["forward"] == 2 * sent["fewest"]  # there and back
    assert sent["backward"] == 2 * sent["fewest"]
    assert sent["held"] == 1 / processes
    assert sent["error"] < 1e-12


@given(T=st.integers(0, 12), K=st.integers(1, 4), local=st.integers(1, 3), P=st.integers(1, 4), seed=st.integers(0, 99))
def test_what_leaves_is_each_token_once_a_process(T: int, K: int, local: int, P: int, seed: int) -> None:
    E, draw = P * local, torch.Generator().manual_seed(seed)
    K = min(K, E)
    ids = torch.rand(T, E, generator=draw).argsort(dim=1)[:, :K]
    kept = torch.rand(T, K, generator=draw) < 0.8
    choices = [(e, t * K + k) for e in range(E) for t in range(T) for k in range(K) if ids[t, k] == e and kept[t, k]]
    counts = torch.tensor([sum(e == of for of, _ in choices) for e in range(E)])
    choice = torch.tensor([c for _, c in choices], dtype=torch.int64)
    sent = Dispatched(torch.zeros(T, 1), K, choice, torch.zeros(len(choice)), counts.cumsum(0).to(torch.int32))
    out = plan_send(sent, P)
    wanted = [sorted({c // K for e, c in choices if e // local == p}) for p in range(P)]
    assert [part.tolist() for part in out.token.split(out.rows.tolist())] == wanted
    assert out.counts.flatten().tolist() == counts.tolist()
    tokens = [wanted[e // local][row] for (e, _), row in zip(choices, out.row.tolist(), strict=True)]
    assert tokens == [c // K for _, c in choices]


@pytest.mark.parametrize(
    ("moe", "expert", "said"),
    [
        (
            MoEConfig(n_routed_experts=8, top_k=2, expert_width=4),
            3,
            "expert_parallel = 3: must divide n_routed_experts = 8",
        ),
        (
            MoEConfig(n_routed_experts=12, top_k=2, expert_width=4, n_group=4),
            6,
            "expert_parallel = 6: must divide n_group = 4 or be a multiple of it",
        ),
        (None, 2, "expert_parallel = 2: must be 1: the model has no experts"),
    ],
)
def test_sizes_that_do_not_fit_are_named(moe: MoEConfig | None, expert: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_placement(moe, expert)


@pytest.mark.parametrize(("groups", "expert"), [(1, 4), (4, 4), (8, 4), (2, 4)])
def test_groups_are_processes_or_parts_or_several_of_them(groups: int, expert: int) -> None:
    check_placement(MoEConfig(n_routed_experts=8, top_k=1, expert_width=4, n_group=groups), expert)


@pytest.mark.parametrize("groups", [None, 4, 8])
@pytest.mark.parametrize("n_sequences", [8, 9, 16, 19])
def test_processes_share_out_a_batch(groups: int | None, n_sequences: int) -> None:
    moe = (
        None
        if groups is None
        else MoEConfig(n_routed_experts=8, top_k=2, expert_width=4, capacity_factor=1.0, routing_groups=groups)
    )
    rows = [rows_of_rank(rank, 4, n_sequences, moe) for rank in range(4)]
    assert [row for part in rows for row in range(n_sequences)[part]] == list(range(n_sequences))
    assert all(part.stop > part.start for part in rows)


def test_what_cannot_be_shared_out_is_named() -> None:
    with pytest.raises(InputError, match="batch_size = 3: must be at least 4"):
        rows_of_rank(0, 4, 3, None)
    with pytest.raises(InputError, match="routing_groups = 2: must be a multiple of the 4 processes"):
        groups_per_rank(
            MoEConfig(n_routed_experts=8, top_k=2, expert_width=4, capacity_factor=1.0, routing_groups=2), 4
        )


# Checkpoints


def test_two_processes_go_on_where_four_stopped(found: dict[str, Any], folder: Path) -> None:
    again = launch("resume", folder, 2)
    assert again["state"] == {"step": 3}
    assert again["next"] == pytest.approx(found["next"], abs=1e-12)


def alone(config: ModelConfig = CHECKPOINTED) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(config).double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


@pytest.fixture
def by_itself() -> Iterator[None]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("by_itself")
def test_one_process_goes_on_where_four_stopped(found: dict[str, Any], folder: Path) -> None:
    model, optimizer = alone()
    path = newest_checkpoint(folder)
    assert path is not None
    assert load_sharded(path, model, optimizer) == {"step": 3}
    assert model.moe_layers[0].router.expert_bias.tolist() == [3 / 8] * 8
    tokens = torch.randint(0, 40, (8, 13), generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(3):
        loss = loss_of(model, tokens, 8, balance.single_process)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(found["next"], abs=1e-12)


def test_a_full_disk_ends_every_process_and_keeps_what_was(found: dict[str, Any], folder: Path) -> None:
    for said in found["refused"]:
        assert "step-00000004: not written (" in said
        assert "File too large" in said
        assert said.endswith("earlier checkpoints are intact")
    assert sorted(path.name for path in folder.iterdir()) == ["found.json", "step-00000002", "step-00000003"]


@pytest.mark.usefixtures("by_itself")
def test_what_is_no_checkpoint_of_this_model_is_named(found: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    path = newest_checkpoint(folder)
    assert path is not None
    with pytest.raises(InputError, match=r"model\.d_model = 32: this run has 16"):
        load_sharded(path, *alone(replace(CHECKPOINTED, d_model=32)))
    with pytest.raises(InputError, match="step-00000009: missing or damaged checkpoint"):
        load_sharded(tmp_path / "step-00000009", *alone())
    broken = tmp_path / path.name
    shutil.copytree(path, broken)
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="step-00000003: damaged checkpoint"):
        load_sharded(broken, *alone())


def test_a_checkpoint_lists_its_shards(folder: Path, found: dict[str, Any]) -> None:
    path = newest_checkpoint(folder)
    assert path is not None
    shards = json.loads((path / METADATA).read_text())["shards"]
    assert shards == sorted(shard.name for shard in path.glob("*.safetensors"))
    assert len(shards) == 4


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize("keep", [None, 0, 500, -1])
def test_a_shard_that_is_missing_or_cut_is_named(folder: Path, found: dict, keep: int | None, tmp_path: Path) -> None:
    path = newest_checkpoint(folder)
    assert path is not None
    shutil.copytree(path, tmp_path / path.name)
    shard = sorted((tmp_path / path.name).glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    if keep is None:
        shard.unlink()
    with pytest.raises(InputError) as caught:
        load_sharded(tmp_path / path.name, *alone())
    what = "is missing" if keep is None else "is damaged"
    assert f"step-00000003: damaged checkpoint: {shard.name} {what}" in str(caught.value)
    assert str(caught.value).endswith("restore it, or remove the checkpoint to continue from an earlier one")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("by_itself")
def test_a_checkpoint_that_does_not_list_its_shards_loads(folder: Path, found: dict, tmp_path: Path) -> None:
    """Earlier versions wrote no list."""
    path = newest_checkpoint(folder)
    assert path is not None
    shutil.copytree(path, tmp_path / path.name)
    file = tmp_path / path.name / METADATA
    metadata = json.loads(file.read_text())
    del metadata["shards"]
    file.write_text(json.dumps(metadata))
    assert load_sharded(tmp_path / path.name, *alone()) == {"step": 3}


@pytest.mark.usefixtures("by_itself")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "state = None: must be a mapping"),
        ({"state": [1]}, "state = [1]: must be a mapping"),
        ({"config": 3}, "config = 3: must be a mapping"),
        ({"shards": {}}, "shards = {}: must be a list"),
        ({"shards": [3]}, "damaged checkpoint: 3 is missing"),
        ({"state": {"loss": float("nan")}}, "it has the value NaN"),
    ],
)
def test_damaged_facts_of_a_checkpoint_are_one_line(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    path.mkdir()
    (path / METADATA).write_text(json.dumps({"config": {}, "state": {}, "shards": []} | change))
    with pytest.raises(InputError) as caught:
        load_sharded(path, *alone())
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("by_itself")
def test_a_step_saved_again_replaces_itself_and_what_was_left(tmp_path: Path) -> None:
    model, optimizer = alone()
    loss_of(model, torch.zeros(2, 13, dtype=torch.int64), 2, balance.single_process).backward()
    optimizer.step()
    (tmp_path / ".step-00000001.old").mkdir()
    for said in ("first", "second"):
        save_sharded(tmp_path, 2, model, optimizer, {"said": said})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert load_sharded(tmp_path / "step-00000002", model, optimizer) == {"said": "second"}


def test_a_part_of_a_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / ".step-00000007.part").mkdir()
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "step-00000005").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000005"
