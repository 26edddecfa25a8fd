"""Configs from plain data, with one clear line for whatever does not fit."""

from dataclasses import is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import dacite

from dsmoe_lite.common.errors import InputError, find_name, require, shorten
from dsmoe_lite.config.attention import AnyAttention, AttentionConfig, MLAConfig

C = TypeVar("C")


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """Make a config of class `cls` from plain data. Raises InputError for unknown fields and wrong types."""
    _require_fields(cls, values, "")
    config = dacite.Config(strict=True, cast=[tuple], type_hooks={AnyAttention: _attention})  # type: ignore[dict-item]
    try:
        return dacite.from_dict(cls, values, config=config)
    except dacite.WrongTypeError as error:
        path, found = error.field_path, type(error.value).__name__
        wanted = getattr(error.field_type, "__name__", None) or str(error.field_type)
        raise InputError(f"{path} = {shorten(error.value)}: must be {wanted}, not {found}") from None
    except dacite.MissingValueError as error:
        raise InputError(f"{error.field_path}: is missing; {cls.__name__} needs it") from None
    except dacite.DaciteError as error:
        raise InputError(f"{cls.__name__}: {error}") from None


def _attention(values: Any) -> Any:
    """Make the attention config that has the fields of `values`."""
    return from_dict(_attention_class(values), values) if isinstance(values, dict) else values


def _attention_class(values: dict[str, Any]) -> type[AnyAttention]:
    return MLAConfig if "kv_lora_rank" in values else AttentionConfig


def _require_fields(cls: Any, values: Any, path: str) -> None:
    """Require a mapping whose names are fields of `cls`, with lists and mappings where the fields have them.

    Nested configs are checked too; `path` leads to `values`.
    """
    require(isinstance(values, dict), path.removesuffix(".") or cls.__name__, values, "must be a mapping of names")
    types = get_type_hints(cls)
    for name, value in values.items():
        if name not in types:
            raise InputError(f"{path}{name} = {shorten(value)}: no such field; {find_name(name, types)}")
        if get_origin(types[name]) is tuple:
            require(isinstance(value, list | tuple), f"{path}{name}", value, "must be a list")
        if get_origin(types[name]) is dict:
            require(isinstance(value, dict), f"{path}{name}", value, "must be a mapping of names")
        nested = _config_class(types[name], value)
        if nested is not None and value is not None:
            _require_fields(nested, value, f"{path}{name}.")


def _config_class(annotation: Any, value: Any) -> Any:
    """The config class that `value` is made of under a field's annotation; None if that is no config."""
    union = get_origin(annotation) in (Union, UnionType)
    classes = [one for one in (get_args(annotation) if union else [annotation]) if is_dataclass(one)]
    if len(classes) > 1 and isinstance(value, dict):
        return _attention_class(value)
    return classes[0] if classes else None
