"""All kernels on one GPU: correctness first, then the times of products, row moves and backends, and our goals."""

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
from dsmoe_lite.bench.grouped_products import FASTEST_RUNGS, Case, check_products, time_products
from dsmoe_lite.bench.ratios import goal_row
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError, require_int
from dsmoe_lite.common.files import read_json
from dsmoe_lite.common.machine import resolve_device
from dsmoe_lite.common.progress import progress
from dsmoe_lite.common.schema import require_entries, require_schema
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.kernels.cuda import RUNGS
from dsmoe_lite.training.provenance import provenance

SCHEMA_VERSION = 1
ROUNDS = 10


@dataclass(frozen=True)
class Setup:
    """The device, the data type and the sizes of a benchmark. `ladder`: the case that every rung runs."""

    device: str
    dtype: torch.dtype
    rungs: tuple[str, ...]
    checked: Case
    cases: tuple[Case, ...]
    ladder: Case
    checked_layer: Layer
    layer: Layer
    repeat: int = 1  # steps in one timing


# The routed experts of DeepSeek-V2-Lite, whose d_model is 2048.
V2_LITE = MoEConfig(n_routed_experts=64, top_k=6, expert_width=1408)
SETUPS = {
    "cuda": Setup(
        "cuda", torch.bfloat16, FASTEST_RUNGS,
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
    # to try the command: times of kernels on a CPU say nothing about a GPU
    "cpu": Setup(
        "cpu", torch.float32, ("tiled",),
        checked=Case(3, 24, 40, 10, "skewed"),
        cases=(Case(3, 24, 40, 5), Case(3, 24, 40, 20, "skewed")),
        ladder=Case(3, 24, 40, 20),
        checked_layer=Layer(MoEConfig(n_routed_experts=4, top_k=2, expert_width=24), 16, 20),
        layer=Layer(MoEConfig(n_routed_experts=4, top_k=2, expert_width=24), 16, 20),
    ),
}  # fmt: skip


def bench_kernels(rounds: int = ROUNDS, device: str = "auto") -> dict[str, Any]:
    """Measure everything; return a JSON-able record of rows by name, with notes on failures, goals and versions.

    Results are checked before anything is timed: raises RunError naming an implementation with wrong results. Raises
    InputError if `device` is a GPU that is missing, or "auto" without a GPU.
    """
    require_int("rounds", rounds, 3)
    if device == "auto" and not torch.cuda.is_available():
        raise InputError("device = 'auto': torch finds no GPU here; try the command on tiny sizes with --device cpu")
    setup, notes = SETUPS[resolve_device(device)], Notes()
    device_and_dtype = (setup.device, setup.dtype)
    all_rungs = tuple(rung for rung in RUNGS if setup.device == "cuda" or rung in ("naive", "tiled"))
    checks = check_products(setup.checked, all_rungs, *device_and_dtype, notes)
    checks += check_backends(setup.checked_layer, *device_and_dtype, notes)
    timing = (*device_and_dtype, rounds, setup.repeat, notes)

    def time_case(case: Case, rungs: tuple[str, ...]) -> list[dict[str, Any]]:
        return attempt(f"{case}", partial(time_products, case, rungs, *timing), notes) or []

    ladder, products = time_case(setup.ladder, all_rungs), []
    for case in progress(setup.cases, desc="products"):
        products += time_case(case, setup.rungs)
    layer = setup.layer
    time_layer_moves = partial(time_moves, layer.n_tokens, layer.moe.top_k, layer.d_model, *timing)
    moves = attempt("permute and combine", time_layer_moves, notes) or []
    backends = attempt("experts", partial(time_backends, layer, *timing), notes) or []
    return {
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "place": {"device": setup.device, "dtype": str(setup.dtype), "rounds": rounds, "repeat": setup.repeat},
        "layer": {"moe": asdict(layer.moe), "d_model": layer.d_model, "n_tokens": layer.n_tokens},
        "notes": list(dict.fromkeys(notes)),
        "checks": checks,
        "ladder": ladder,
        "products": products,
        "moves": moves,
        "backends": backends,
        "goals": goals(products, moves, backends),
        "provenance": provenance(),
    }


def goals(
    products: Sequence[dict[str, Any]], moves: Sequence[dict[str, Any]], backends: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Compare measurements with our goals: a row per goal, with value None if it was not measured.

    The value of a product is its worst over the cases of 64 experts, 2048 -> 1408, uniform, 1024 rows or more.
    """
    uniform = [
        row for row in products if (row["experts"], row["k"], row["n"], row["routing"]) == (64, 2048, 1408, "uniform")
    ]
    of_dense: dict[str, float] = {}
    for row in uniform:
        if row["rows"] >= 1024:
            of_dense[row["by"]] = min(of_dense.get(row["by"], row["of dense"]), row["of dense"])
    best = max((of_dense[rung] for rung in RUNGS if rung in of_dense), default=None)
    grouped_mm = of_dense.get("F.grouped_mm")
    of_copy = {row["what"]: row["of copy"] for row in moves if row["by"] == "cuda"}
    experts = {row["by"]: row for row in backends if row["what"] == "forward and backward"}.get("cuda", {})
    return [
        goal_row("best rung / dense", best, ">=", 0.75),
        goal_row("best rung / F.grouped_mm", best / grouped_mm if best and grouped_mm else None, ">=", 1.0),
        goal_row("mma rung / dense", of_dense.get("mma"), ">=", 0.35),
        goal_row("Triton / dense", of_dense.get("triton"), ">=", 0.6),
        goal_row("permute / copy", of_copy.get("permute"), ">=", 0.8),
        goal_row("combine / copy", of_copy.get("combine"), ">=", 0.8),
        goal_row("experts, forward and backward: speed / grouped", experts.get("times grouped"), ">=", 1.3),
        goal_row("experts: peak bytes / grouped", experts.get("of grouped"), "<=", 0.7),
    ]


def record_path(record: dict[str, Any]) -> Path:
    """The path of a record, named for its device."""
    name = "-".join(record["provenance"]["device"].lower().split())
    return paths.data_to_write(f"runs/bench-kernels-{name}.json")


def newest_record() -> dict[str, Any] | None:
    """Read the record with the newest date, or return None if there is none. Raises InputError for an unknown file."""
    records = []
    remedy = "remove it and run `dsmoe bench kernels --record` again"
    for path in (path for folder in paths.DATA_FOLDERS for path in sorted(folder.glob("runs/bench-kernels-*.json"))):
        record = read_json(path)
        require_schema(record.get("schema_version"), {SCHEMA_VERSION}, remedy, path)
        require_entries(record, {"date": str, "provenance": dict}, remedy, f"{path}: ")
        records.append(record)
    return max(records, key=lambda record: record["date"], default=None)
