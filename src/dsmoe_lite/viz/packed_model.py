"""A trained model in the form that a page can run: `static/engine.js` reads it."""

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsmoe_lite.common.errors import require
from dsmoe_lite.config import to_dict
from dsmoe_lite.model import Transformer

ENGINE = Path(__file__).parent / "static" / "engine.js"


def pack(model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the model and its tokenizer as JSON: weights rounded to float16, compressed, the same bytes each time.

    The page computes in float32 with the rounded weights. Raises InputError if a weight is too large for float16.
    """
    limit = torch.finfo(torch.float16).max
    for name, value in _weights(model).items():
        largest = value.abs().max().item()
        require(largest <= limit, f"largest weight of {name}", largest, f"must be at most {limit:g}, for float16")
    stored = json.loads(tokenizer.to_str())["model"]
    return {
        "config": to_dict(model.config),
        "vocabulary": sorted(stored["vocab"], key=stored["vocab"].get),
        "merges": [" ".join(pair) for pair in stored["merges"]],
        "tensors": [[name, value.numel()] for name, value in _weights(model).items()],
        "weights": base64.b64encode(gzip.compress(_halves(model), mtime=0)).decode(),
    }


def fingerprint(model: Transformer) -> str:
    """Return 16 hexadecimal digits that name the weights, rounded to float16, whatever the config."""
    return hashlib.sha256(_halves(model)).hexdigest()[:16]


def _weights(model: Transformer) -> dict[str, Tensor]:
    """Tensors by name, without those of MTP modules, which the page does not run."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")}


def _halves(model: Transformer) -> bytes:
    values = (value.detach().cpu().half().numpy() for value in _weights(model).values())
    return b"".join(value.astype("<f2").tobytes() for value in values)
