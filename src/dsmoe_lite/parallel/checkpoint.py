"""Training states that many processes write and any number reads: torch's distributed checkpoints, as safetensors.

A checkpoint is a folder `step-00000100`, written aside and renamed when every process has written its part.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dsmoe_lite.config import to_dict
from dsmoe_lite.errors import InputError, RunError, require_same
from dsmoe_lite.files import write_json
from dsmoe_lite.model import Transformer

FACTS = "training.json"
KEPT = 2  # checkpoints; the older ones are removed
SLOTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def save_spread(
    folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
) -> None:
    """Write weights, optimizer and JSON-able `state` into `folder`; every process must call, with the same `state`.

    Random states are left out: another number of processes could not take them up. RunError, on every process, where
    the disk refuses; earlier checkpoints are intact.
    """
    path = folder / f"step-{step:08d}"
    aside = folder / f".{path.name}.part"
    with _refused(path):
        if _leads():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            write_json(aside / FACTS, {"config": to_dict(model.config), "state": state})
    try:
        writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
        dcp.save(_tensors(model, optimizer), storage_writer=writer)
    except CheckpointException as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"{path}: not written ({_reason(error)}); earlier checkpoints are intact") from None
    with _refused(path):
        if _leads():
            shutil.rmtree(path, ignore_errors=True)
            os.replace(aside, path)
            for old in _complete(folder)[:-KEPT]:
                shutil.rmtree(old)


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the latest step in `folder`."""
    return next(reversed(_complete(folder)), None)


def load_spread(path: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Read a checkpoint into `model`, spread over any number of processes or over none, and return its `state`.

    InputError where it is missing, damaged or of another model.
    """
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
        config, state = facts["config"], facts["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: no checkpoint, or a damaged one ({error}); remove it to go on from another"
        ) from None
    require_same(to_dict(model.config), config, "model.")
    for weight in model.parameters():
        optimizer.state[weight] = {"step": torch.zeros(()), **{slot: torch.zeros_like(weight) for slot in SLOTS}}
    alone = not dist.is_initialized()
    try:
        reader = dcp.HuggingFaceStorageReader(str(path))
        dcp.load(_tensors(model, optimizer), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        reason = _reason(error)
        raise InputError(f"{path}: a damaged checkpoint ({reason}); remove it to go on from another") from None
    return state


def _tensors(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, weight in model.named_parameters():
        tensors |= {f"optimizer.{name}.{slot}": value for slot, value in optimizer.state[weight].items()}
    return tensors


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def _leads() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What the first process does with files, waited for by all; where it fails, all of them raise RunError."""
    said: list[str | None] = [None]
    try:
        yield
    except (OSError, RunError) as error:
        said = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(said)
    if said[0] is not None:
        raise RunError(f"{path}: not written ({said[0]}); earlier checkpoints are intact")


def _reason(error: CheckpointException) -> str:
    """The first failure of any process, in one line."""
    failure = next(iter(error.failures.values()))[0]
    return " ".join(str(failure).split()) or type(failure).__name__
