"""Models and training states on disk: safetensors only, written whole, refused in one line when damaged."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.config import ModelConfig, from_dict, to_dict
from dsmoe_lite.model import Transformer

CHECKPOINT = "checkpoint.safetensors"  # of one process, in the folder of its run


def save_model(path: Path, model: Transformer, **facts: Any) -> None:
    """Write weights, the config and any JSON-able `facts` (what it was trained on, by which commit) into one file."""
    write_tensors(path, dict(model.state_dict()), {"config": to_dict(model.config), **facts})


def load_model(path: Path) -> Transformer:
    """Read a model written by save_model, in evaluation mode. InputError when missing, damaged or of another kind."""
    tensors, facts = read_tensors(path)
    if "config" not in facts:
        raise InputError(f"{path}: holds no model config; it was not written by save_model")
    model = Transformer(from_dict(ModelConfig, facts["config"]))
    with _fitting(path):
        model.load_state_dict(tensors)
    return model.eval()


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts beside the weights: config, corpus, tokenizer, whatever save_model was given."""
    return read_tensors(path)[1]


def save_training(path: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write everything a later process needs to go on as if nothing had happened: weights, optimizer, random state."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, {"training": state})


def load_training(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what save_training wrote, random state included, and return its `state`. InputError where it is of
    another model.
    """
    tensors, facts = read_tensors(path)
    if "training" not in facts:
        raise InputError(f"{path}: is no training checkpoint")
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in _below("optimizer.", tensors).items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = value
    with _fitting(path):
        model.load_state_dict(_below("model.", tensors))
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return facts["training"]


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors with JSON facts in the header. RunError when the disk refuses; the old file stays."""
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as aside:
        try:
            save_file(ready, aside, metadata={name: json.dumps(value) for name, value in facts.items()})
        except SafetensorError as error:
            raise RunError(f"{path}: not written ({error}); an earlier file is intact") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and facts. InputError when the file is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); restore a copy, or remove it to start again") from None


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: holds another model, or another version wrote it ({reason})") from None


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
