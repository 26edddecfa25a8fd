"""Training states that many processes write and any number reads: torch's distributed checkpoints, as safetensors.

A checkpoint is a folder `step-00000100`, written aside and renamed when every process has written its part.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dsmoe_lite.common.errors import InputError, RunError, require_same
from dsmoe_lite.common.files import write_json
from dsmoe_lite.config import to_dict
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.checkpoint_folders import complete
from dsmoe_lite.parallel.collectives import on_rank0

FACTS = "training.json"
KEPT = 2  # checkpoints; the older ones are removed
SLOTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def save_sharded(
    folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
) -> None:
    """Write weights, optimizer and JSON-able `state` into `folder`; every process must call, with the same `state`.

    Random states are left out: another number of processes could not take them up. RunError, on every process, where
    the disk refuses; earlier checkpoints are intact.
    """
    path = folder / f"step-{step:08d}"
    aside = folder / f".{path.name}.part"
    try:
        on_rank0(lambda: _prepare(aside, {"config": to_dict(model.config), "state": state}))
        writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
        dcp.save(_tensors(model, optimizer), storage_writer=writer)
        on_rank0(lambda: _commit(aside, path))
    except (RunError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{path}: not written ({_reason(error)}); earlier checkpoints are intact") from None


def load_sharded(path: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Read a checkpoint into `model`, spread over any number of processes, and return its `state`.

    InputError where it is missing, damaged or of another model.
    """
    config, state = on_rank0(lambda: _facts(path))
    require_same(to_dict(model.config), config, "model.")
    for weight in model.parameters():
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device),
            **{slot: torch.zeros_like(weight) for slot in SLOTS},
        }
    try:
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        reason = _reason(error)
        raise InputError(f"{path}: a damaged checkpoint ({reason}); remove it to go on from another") from None
    return state


def _tensors(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, weight in model.named_parameters():
        tensors |= {f"optimizer.{name}.{slot}": value for slot, value in optimizer.state[weight].items()}
    return tensors


def _facts(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        return facts["config"], facts["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no checkpoint, or a damaged one ({error}); remove it to go on from another"
        ) from None


def _prepare(aside: Path, facts: dict[str, Any]) -> None:
    """Make the folder that is written into, and remove what a killed run may have left."""
    for left in aside.parent.glob(".step-*"):
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    write_json(aside / FACTS, facts)


def _commit(aside: Path, path: Path) -> None:
    """Give a checkpoint its name, and remove what is too old; what is half removed has no such name either."""
    if path.exists():
        os.replace(path, _hidden(path))
    os.replace(aside, path)
    for old in complete(path.parent)[:-KEPT]:
        os.replace(old, _hidden(old))
    for left in path.parent.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _reason(error: RunError | CheckpointException) -> str:
    """The first failure of any process, in one line."""
    failure = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return " ".join(str(failure).split()) or type(failure).__name__
