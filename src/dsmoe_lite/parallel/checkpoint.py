"""Sharded checkpoints: torch's distributed checkpoints as safetensors, which any number of processes can load.

A checkpoint is a folder `step-00000100`. It is written under another name and renamed once all processes have written
their shards.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dsmoe_lite.common.errors import InputError, RunError, require_same
from dsmoe_lite.common.files import read_json, write_json
from dsmoe_lite.common.schema import CHECKPOINT_REMEDY, require_entries, require_schema
from dsmoe_lite.config import ModelConfig, from_dict, to_dict
from dsmoe_lite.model import Transformer
from dsmoe_lite.parallel.checkpoint_folders import complete_checkpoints
from dsmoe_lite.parallel.collectives import on_rank0

METADATA = "training.json"
SCHEMA_VERSION = 1  # also of files without schema_version
REMEDY = "remove the checkpoint to continue from an earlier one"
MAX_CHECKPOINTS = 2  # older ones are removed
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def save_sharded(
    folder: Path, step: int, model: Transformer, optimizer: torch.optim.AdamW, state: dict[str, Any]
) -> None:
    """Write weights, optimizer and JSON-able `state`, equal on all processes, into `folder`. Collective.

    Random states are left out, because another number of processes could not restore them. Raises RunError on every
    process if a file cannot be written; earlier checkpoints stay intact.
    """
    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}.part"
    try:
        on_rank0(lambda: _prepare(temporary))
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(_tensors(model, optimizer), storage_writer=writer)
        on_rank0(lambda: _commit(temporary, path, {"config": to_dict(model.config), "state": state}))
    except (RunError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{path}: not written ({_reason(error)}); earlier checkpoints are intact") from None


def load_sharded(path: Path, model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Read a checkpoint into `model`, sharded over any number of processes, and return its `state`. Collective.

    Raises InputError if the checkpoint is missing, damaged, of another model or of an unknown schema version.
    """
    config, state = on_rank0(lambda: _read_metadata(path))
    require_same(to_dict(model.config), to_dict(from_dict(ModelConfig, config)), "model.")
    for weight in model.parameters():
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device),
            **{moment: torch.zeros_like(weight) for moment in MOMENTS},
        }
    try:
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except CheckpointException as error:
        raise InputError(f"{path}: damaged checkpoint ({_reason(error)}); {REMEDY}") from None
    return state


def _tensors(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Weights and optimizer state; a weight with several names, such as tied embeddings, once."""
    state = model.state_dict()  # first: FSDP then gives the modules their sharded parameters back
    weights = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - weights.keys()
    tensors = {f"model.{name}": value for name, value in state.items() if name not in aliases}
    for name, weight in weights.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[weight].items()}
    return tensors


def _read_metadata(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's config and the training state, once all shards are found whole."""
    try:
        metadata = {"shards": _shards(path)} | read_json(path / METADATA)  # earlier versions do not list the shards
    except InputError as error:
        raise InputError(f"{path}: missing or damaged checkpoint ({error}); {REMEDY}") from None
    require_schema(metadata.get("schema_version", 1), {SCHEMA_VERSION}, CHECKPOINT_REMEDY, path)
    entries: dict[str, type] = {"config": dict, "state": dict, "shards": list}
    require_entries(metadata, entries, f"damaged checkpoint; {REMEDY}", f"{path}: ")
    for name in metadata["shards"]:
        try:
            with safe_open(path / str(name), framework="pt"):
                pass  # its header gives its size
        except (OSError, SafetensorError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
            raise InputError(f"{path}: damaged checkpoint: {name} {reason}; restore it, or {REMEDY}") from None
    return metadata["config"], metadata["state"]


def _prepare(temporary: Path) -> None:
    """Make the folder to write into, and remove the remains of a killed run."""
    for remains in temporary.parent.glob(".step-*"):
        shutil.rmtree(remains)
    temporary.mkdir(parents=True)


def _commit(temporary: Path, path: Path, metadata: dict[str, Any]) -> None:
    """Describe and rename a complete checkpoint, and remove old ones.

    Old ones get a hidden name first, so that none is seen half.
    """
    write_json(temporary / METADATA, metadata | {"shards": _shards(temporary)})
    if path.exists():
        os.replace(path, _hidden(path))
    os.replace(temporary, path)
    for old in complete_checkpoints(path.parent)[:-MAX_CHECKPOINTS]:
        os.replace(old, _hidden(old))
    for remains in path.parent.glob(".step-*"):
        shutil.rmtree(remains, ignore_errors=True)


def _shards(folder: Path) -> list[str]:
    return sorted(shard.name for shard in folder.glob("*.safetensors"))


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _reason(error: RunError | CheckpointException) -> str:
    """The first error of any process, in one line."""
    failure = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return " ".join(str(failure).split()) or type(failure).__name__
