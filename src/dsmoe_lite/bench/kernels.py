"""All kernels on one GPU: right first, then every product, move and backend, and what was to be reached."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsmoe_lite.bench.attempt import Notes, attempt
from dsmoe_lite.bench.backends import Layer, check_backends, time_backends
from dsmoe_lite.bench.bandwidth import time_moves
from dsmoe_lite.bench.grouped_products import TOP, Case, check_products, time_products
from dsmoe_lite.common.errors import InputError, require_whole
from dsmoe_lite.common.machine import resolve_device
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.common.progress import progress
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.kernels.cuda import RUNGS
from dsmoe_lite.training.provenance import provenance

SCHEMA_VERSION = 1
ROUNDS = 10


@dataclass(frozen=True)
class Place:
    """Where, in which numbers and on which sizes. `ladder`: the case that every rung runs."""

    device: str
    dtype: torch.dtype
    rungs: tuple[str, ...]
    checked: Case
    cases: tuple[Case, ...]
    ladder: Case
    checked_layer: Layer
    layer: Layer
    repeat: int = 1  # steps timed together


V2_LITE = MoEConfig(
    n_routed_experts=64, top_k=6, expert_width=1408
)  # the routed experts of DeepSeek-V2-Lite; d_model 2048
PLACES = {
    "cuda": Place(
        "cuda", torch.bfloat16, TOP,
        checked=Case(16, 512, 1408, 100, "skewed"),
        cases=tuple(
            Case(experts, k, n, rows, routing)
            for experts in (16, 64, 160)
            for k, n in ((2048, 1408), (1408, 2048))
            for rows in (64, 256, 1024, 4096)
            for routing in ("uniform", "skewed")
        ),
        ladder=Case(64, 2048, 1408, 1024),
        checked_layer=Layer(MoEConfig(n_routed_experts=16, top_k=4, expert_width=128), 256, 500),
        layer=Layer(V2_LITE, 2048, 64 * 1024 // 6),
        repeat=3,
    ),
    # to try the command: what the shim takes says nothing about a GPU
    "cpu": Place(
        "cpu", torch.float32, ("tiled",),
        checked=Case(3, 24, 40, 10, "skewed"),
        cases=(Case(3, 24, 40, 5), Case(3, 24, 40, 20, "skewed")),
        ladder=Case(3, 24, 40, 20),
        checked_layer=Layer(MoEConfig(n_routed_experts=4, top_k=2, expert_width=24), 16, 20),
        layer=Layer(MoEConfig(n_routed_experts=4, top_k=2, expert_width=24), 16, 20),
    ),
}  # fmt: skip


def bench_kernels(rounds: int = ROUNDS, device: str = "auto") -> dict[str, Any]:
    """Measure everything: a JSON-able record of rows by name, with notes on what was left out, goals and versions.

    RunError names a way whose results are wrong, before anything is timed. InputError where there is no GPU and none
    but it was asked for.
    """
    require_whole("rounds", rounds, 3)
    if device == "auto" and not torch.cuda.is_available():
        raise InputError("device = 'auto': torch finds no GPU here; --device cpu tries the command on tiny sizes")
    place, notes = PLACES[resolve_device(device)], Notes()
    where = (place.device, place.dtype)
    every = tuple(rung for rung in RUNGS if place.device == "cuda" or rung in ("naive", "tiled"))
    checks = check_products(place.checked, every, *where, notes)
    checks += check_backends(place.checked_layer, *where, notes)
    timing = (*where, rounds, place.repeat, notes)

    def product(case: Case, rungs: tuple[str, ...]) -> list[dict[str, Any]]:
        return attempt(f"{case}", partial(time_products, case, rungs, *timing), notes) or []

    ladder, found = product(place.ladder, every), []
    for case in progress(place.cases, desc="products"):
        found += product(case, place.rungs)
    layer = place.layer
    moving = partial(time_moves, layer.n_tokens, layer.moe.top_k, layer.d_model, *timing)
    moves = attempt("permute and combine", moving, notes) or []
    backends = attempt("experts", partial(time_backends, layer, *timing), notes) or []
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "place": {"device": place.device, "dtype": str(place.dtype), "rounds": rounds, "repeat": place.repeat},
        "layer": {"moe": asdict(layer.moe), "d_model": layer.d_model, "n_tokens": layer.n_tokens},
        "notes": list(dict.fromkeys(notes)),
        "checks": checks,
        "ladder": ladder,
        "products": found,
        "moves": moves,
        "backends": backends,
        "goals": goals(found, moves, backends),
        "provenance": provenance(),
    }


def goals(
    products: Sequence[dict[str, Any]], moves: Sequence[dict[str, Any]], backends: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Hold what was measured against what it should be: a row a goal; value None where it was not measured.

    Products: 64 experts, 2048 -> 1408, 1024 rows or more, uniform, the worst of them.
    """
    wide = [
        row for row in products if (row["experts"], row["k"], row["n"], row["routing"]) == (64, 2048, 1408, "uniform")
    ]
    of_dense: dict[str, float] = {}
    for row in wide:
        if row["rows"] >= 1024:
            of_dense[row["by"]] = min(of_dense.get(row["by"], row["of dense"]), row["of dense"])
    best = max((of_dense[rung] for rung in RUNGS if rung in of_dense), default=None)
    torchs = of_dense.get("F.grouped_mm")
    moved = {row["what"]: row["of copy"] for row in moves if row["by"] == "cuda"}
    whole = {row["by"]: row for row in backends if row["what"] == "forward and backward"}.get("cuda", {})
    rows = [
        ("best rung / dense", best, ">=", 0.75),
        ("best rung / F.grouped_mm", best / torchs if best and torchs else None, ">=", 1.0),
        ("mma rung / dense", of_dense.get("mma"), ">=", 0.35),
        ("Triton / dense", of_dense.get("triton"), ">=", 0.6),
        ("permute / copy", moved.get("permute"), ">=", 0.8),
        ("combine / copy", moved.get("combine"), ">=", 0.8),
        ("experts, forward and backward: speed / grouped", whole.get("times grouped"), ">=", 1.3),
        ("experts: peak bytes / grouped", whole.get("of grouped"), "<=", 0.7),
    ]
    return [
        {
            "what": what,
            "value": value,
            "goal": f"{sense} {goal:.3g}",
            "reached": value is not None and (value >= goal if sense == ">=" else value <= goal),
        }
        for what, value, sense, goal in rows
    ]


def record_path(record: dict[str, Any]) -> Path:
    """Where a record lies, by its device."""
    name = "-".join(record["provenance"]["device"].lower().split())
    return DATA / "runs" / f"bench-kernels-{name}.json"


def newest_record() -> dict[str, Any] | None:
    """The newest record of a GPU by its own date, None where there is none. InputError for a file that is none."""
    found = []
    for path in sorted((DATA / "runs").glob("bench-kernels-*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path}: is not JSON") from None
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION or "date" not in record:
            raise InputError(f"{path}: is no record of schema_version {SCHEMA_VERSION}")
        found.append(record)
    return max(found, key=lambda record: record["date"], default=None)
