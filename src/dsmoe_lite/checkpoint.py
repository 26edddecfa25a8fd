"""Models and training states on disk: safetensors only, atomic writes, and one line of error for a damaged file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsmoe_lite.common.errors import InputError, RunError, require
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.common.schema import CHECKPOINT_REMEDY, require_schema
from dsmoe_lite.config import ModelConfig, from_dict, to_dict
from dsmoe_lite.model import Transformer

SCHEMA_VERSION = 1  # also of files without schema_version
CHECKPOINT = "checkpoint.safetensors"  # of a single process, in its run folder


def save_model(path: Path, model: Transformer, **metadata: Any) -> None:
    """Write the weights, the config and any JSON-able `metadata` (training data, tokenizer, commit) to one file.

    A compiled model is saved as the model that was compiled. Raises InputError if load_model could not rebuild `model`
    from its config: a wrapped or changed model, or one that an intervention changed in more than its config.
    """
    model = getattr(model, "_orig_mod", model)
    is_ours = isinstance(model, Transformer)
    require(is_ours, "model", type(model).__name__, "must be a Transformer; pass the one inside, such as model.module")
    tensors = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    for layer in model.moe_layers:
        router = layer.router
        intact = not (router.forbidden or router.silenced or router.silenced_experts or router.frozen_norm)
        require(intact, "model", "with interventions", "a file cannot hold them; save the original and intervene again")
    _require_tensors_of(model.config, tensors)
    write_tensors(path, tensors, {"config": to_dict(model.config), **metadata})


def _require_tensors_of(config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Require the tensors of a model of this config, by name and shape; allocates none."""
    with torch.device("meta"):
        expected = _shapes(Transformer(config).state_dict())
    _require_shapes(tensors, expected)


def load_model(path: Path) -> Transformer:
    """Read a model that save_model wrote, in evaluation mode.

    Raises InputError if the file is missing, damaged, of another kind, or has a weight that is NaN or infinite.
    """
    tensors, metadata = read_tensors(path)
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{path}: {name} is NaN or infinite; training diverged, or the file is damaged")
    if "config" not in metadata:
        raise InputError(f"{path}: has no model config; it was not written by save_model")
    with _refusing_other_models(path):
        config = from_dict(ModelConfig, metadata["config"])
        _require_tensors_of(config, tensors)
        model = Transformer(config)
        model.load_state_dict(tensors)
    return model.eval()


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata that save_model stored with the weights: config, corpus, tokenizer and more."""
    return read_tensors(path)[1]


def save_training(path: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write all that a later process needs to continue exactly: weights, optimizer state, random state, `state`."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, parameter_state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in parameter_state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, tensors, {"training": state})


def load_training(path: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what save_training wrote, including the random state, and return its `state`.

    Raises InputError if the checkpoint is missing, damaged or of another model; `model` and `optimizer` are unchanged
    then.
    """
    tensors, metadata = read_tensors(path)
    if "training" not in metadata:
        raise InputError(f"{path}: is not a training checkpoint")
    state = metadata["training"]
    weights, slots = _with_prefix("model.", tensors), _with_prefix("optimizer.", tensors)
    with _refusing_other_models(path):
        require(isinstance(state, dict), "training", state, "must be a mapping")
        _require_shapes(weights, _shapes(model.state_dict()), "model.")
        steps_taken = bool(slots) or bool(state.get("losses"))
        _require_shapes(slots, _slot_shapes(optimizer) if steps_taken else {}, "optimizer.")
        _require_random_state(tensors)
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, value in slots.items():
        index, key = name.split(".", 1)
        optimizer_state.setdefault(int(index), {})[key] = value
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return state


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _slot_shapes(optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, ...]]:
    """The shapes of AdamW's state after a step, by the names in a checkpoint: three slots per weight."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    shapes: dict[str, tuple[int, ...]] = {}
    for index, weight in enumerate(weights):
        if weight.requires_grad:
            shape = tuple(weight.shape)
            shapes |= {f"{index}.step": (), f"{index}.exp_avg": shape, f"{index}.exp_avg_sq": shape}
    return shapes


def _require_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], prefix: str = "") -> None:
    """Require the tensors of `expected` and no others. The message names the first that differs, and both shapes."""
    shapes = _shapes(tensors)
    for name in dict.fromkeys((*expected, *shapes)):
        shape, wanted = shapes.get(name), expected.get(name)
        remedy = f"must have the shape {wanted}" if wanted is not None else "a model of this config has no such tensor"
        require(shape == wanted, f"{prefix}{name}", "missing" if shape is None else shape, remedy)


def _require_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Require the random state of the CPU, and that generators accept all random states."""
    require("random.cpu" in tensors, "random.cpu", "missing", "must be the random state of the CPU")
    torch.Generator().set_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.Generator("cuda").set_state(tensors["random.cuda"])


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors, atomically, with JSON metadata in the header.

    A tensor with several names, such as tied embeddings, is written once; the metadata's `aliases` gives the others.
    Raises InputError for a tensor without values, on the meta device, and RunError if the system refuses.
    """
    first_name: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    on_cpu: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        require(not value.is_meta, name, "meta", "has no values; load weights before you save")
        memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        first = first_name.setdefault(memory, name) if value.numel() else name
        if first != name:
            aliases[name] = first
            continue
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        on_cpu[name] = value.clone() if storage in storages else value  # safetensors refuses views of one storage
        storages.add(storage)
    facts = metadata | ({"aliases": aliases} if aliases else {})
    with atomic_write(path) as temporary:
        try:
            save_file(on_cpu, temporary, metadata={name: json.dumps(value) for name, value in facts.items()})
        except SafetensorError as error:
            raise RunError(f"{path}: not written ({error}); an earlier file is intact") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata. Raises InputError if the file is missing, damaged or of an unknown schema version."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            require_schema(metadata.pop("schema_version", 1), {SCHEMA_VERSION}, CHECKPOINT_REMEDY, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            aliases = metadata.pop("aliases", {})
            return tensors | {name: tensors[first] for name, first in aliases.items()}, metadata
    except (SafetensorError, json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); restore a copy, or remove it to start again") from None


@contextmanager
def _refusing_other_models(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: holds another model, or another version wrote it ({reason})") from None


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
