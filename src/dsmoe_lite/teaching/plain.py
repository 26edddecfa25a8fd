"""Plain data between two processes that do not trust each other: JSON, with tensors as shape, type and bytes.

Never pickle: what is decoded can be wrong, but it runs nothing.
"""

import base64
import json
import math
from collections.abc import KeysView, ValuesView
from typing import Any

from dsmoe_lite.common.errors import InputError

MARK = "\0"  # a mapping with this key is a tensor, a tuple or a number that JSON lacks
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
MOST_BYTES = 64 * 2**20  # of a request
MOST_REPLY = 4 * 2**20  # of what comes from the sandbox
MOST_DIMENSIONS = 16


def encode(value: Any, most: int = MOST_BYTES) -> bytes:
    """One line of JSON. Raises InputError for a value that is no plain data, or too large."""
    try:
        line = json.dumps(_to_json(value)).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{type(value).__name__}: is no plain data ({error})") from None
    if len(line) > most:
        raise InputError(f"{len(line):,} bytes: must be at most {most:,}")
    return line + b"\n"


def decode(line: bytes) -> Any:
    """The value of one line. Raises InputError if it is damaged or made up."""
    try:
        return _from_json(json.loads(line))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, RuntimeError) as error:
        raise InputError(f"no plain data: {type(error).__name__}") from None


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value if type(value) in (type(None), bool, str) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {MARK: "float", "text": str(float(value))}
    if isinstance(value, list | range | KeysView | ValuesView):
        return [_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {MARK: "tuple", "items": [_to_json(item) for item in value]}
    if isinstance(value, dict):
        if not all(isinstance(key, str) and key != MARK for key in value):
            raise TypeError("keys must be text")
        return {str(key): _to_json(item) for key, item in value.items()}
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _to_json(value.item())
    return _tensor(value)


def _tensor(value: Any) -> dict[str, Any]:
    import torch

    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        value = torch.from_numpy(value.copy())
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value).__name__} is no number, text, list, mapping or tensor")
    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"a tensor of {name}")
    flat = value.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return {MARK: "tensor", "dtype": name, "shape": list(value.shape), "data": base64.b64encode(data).decode()}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(MARK)
    if kind is None:
        return {key: _from_json(item) for key, item in value.items()}
    if kind == "float":
        return float(value["text"])
    if kind == "tuple":
        return tuple(_from_json(item) for item in value["items"])
    if kind == "tensor":
        return _to_tensor(value)
    raise ValueError(f"kind {kind!r}")


def _to_tensor(value: dict[str, Any]) -> Any:
    import torch

    if value["dtype"] not in DTYPES:
        raise ValueError("dtype")
    dtype, shape = getattr(torch, value["dtype"]), value["shape"]
    if len(shape) > MOST_DIMENSIONS or not all(type(size) is int and 0 <= size <= MOST_BYTES for size in shape):
        raise ValueError("shape")
    data = bytearray(base64.b64decode(value["data"], validate=True))
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("shape")
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.clone().reshape(shape)
