"""`dsmoe bench`: times and memory against a baseline, measured in one process."""

import json
import os
from collections.abc import Callable
from typing import Any

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import InputError


@click.command(
    help="Measure in one process: `layer` (an MoE layer against a dense FFN), `train` (training steps of several "
    "models), `mla` (MLA against MHA and GQA, decode and prefill) or `kernels` (all kernels on a GPU, checked before "
    "they are timed)."
)
@click.argument("benchmark", type=click.Choice(["layer", "train", "mla", "kernels"]))
@click.option(
    "--rounds", type=click.IntRange(3, 10_000), help="Rounds to take medians over.  [default: 30; mla: 12; kernels: 10]"
)
@click.option("--profile", is_flag=True, help="layer: print the time of each torch operation.")
@click.option("--contexts", metavar="N,N,...", help="mla: context lengths in tokens.  [default: 1024,2048,4096,8192]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="train, mla, kernels: where to measure.  [default: cpu; kernels: auto]",
)
@click.option("--record", is_flag=True, help="mla, kernels: also write data/runs/bench-*-DEVICE.json.")
@json_option
def command(benchmark: str, rounds: int | None, as_json: bool, **options: Any) -> None:
    """Print one row per contender."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints a line whenever it starts or stops
    benchmarks_of = {  # option -> benchmarks that take it
        "profile": ["layer"],
        "contexts": ["mla"],
        "device": ["train", "mla", "kernels"],
        "record": ["mla", "kernels"],
    }
    for option, benchmarks in benchmarks_of.items():
        if options[option] and benchmark not in benchmarks:
            *first, last = (f"`{name}`" for name in benchmarks)
            listing = f"{', '.join(first)} and {last}" if first else last
            raise InputError(f"--{option}: is for {listing}, not for `{benchmark}`")
    measure: dict[str, Callable[..., None]] = {"layer": _layer, "train": _train, "mla": _mla, "kernels": _kernels}
    taken = {option: options[option] for option, benchmarks in benchmarks_of.items() if benchmark in benchmarks}
    measure[benchmark](rounds, as_json, **taken)


def _train(rounds: int | None, as_json: bool, device: str | None) -> None:
    from dsmoe_lite.bench.train import SETUPS, bench_train
    from dsmoe_lite.common.machine import resolve_device

    rounds, setup = rounds or 30, SETUPS[resolve_device(device or "cpu")]
    title = (
        f"dsmoe bench train: medians of {rounds} rounds, speed ratio to the first row, FLOP/s as a share of a "
        f"matmul of the dense FFN's shape; {setup.device}, {_threads()}"
    )
    print_rows(bench_train(rounds, setup), as_json=as_json, title=title)


def _layer(rounds: int | None, as_json: bool, profile: bool) -> None:
    from dsmoe_lite.bench.layer import bench_layer, profile_layer

    rounds = rounds or 30
    if profile:
        title = f"dsmoe bench layer --profile: milliseconds per step, {rounds} steps, {_threads()}"
        print_rows(profile_layer(rounds), as_json=as_json, title=title)
        return
    title = (
        f"dsmoe bench layer: medians of {rounds} interleaved pairs, 95% intervals by order statistics, {_threads()}; "
        "a ratio above 1 is slower or larger; a gap above 0 misses the goal"
    )
    print_rows(bench_layer(rounds), as_json=as_json, title=title)


def _mla(rounds: int | None, as_json: bool, contexts: str | None, device: str | None, record: bool) -> None:
    from dsmoe_lite.bench import mla
    from dsmoe_lite.common.files import write_json
    from dsmoe_lite.common.paths import data_to_write

    measured = mla.bench_mla(_contexts(contexts) or mla.CONTEXTS, rounds or mla.ROUNDS, device or "cpu")
    place, machine = measured["place"], measured["peaks"]
    if as_json:
        click.echo(json.dumps(measured, indent=1))
    else:
        conditions = f"{place['device']}, {place['dtype']}, batch {place['batch_size']}, {_threads()}"
        print_rows(
            [{name: value for name, value in row.items() if name != "FLOPs"} for row in measured["decode"]],
            as_json=False,
            title=f"dsmoe bench mla: one decode step, medians of {place['rounds']} rounds, 95% CI, {conditions}",
        )
        print_rows(measured["prefill"], as_json=False, title="Prefill of a prompt, batch 1: medians of pairs")
        print_rows(
            measured["slopes"],
            as_json=False,
            title=f"Cost per cached token. Peaks of this machine: copy {machine['copy GB/s']:.3g} GB/s (bytes read and "
            f"written), matmul {machine['matmul GFLOP/s']:.4g} GFLOP/s",
        )
        print_rows(measured["goals"], as_json=False, title="Goals")
    if record:
        write_json(data_to_write(mla.record_name(place["device"])), measured)


def _kernels(rounds: int | None, as_json: bool, device: str | None, record: bool) -> None:
    from dsmoe_lite.bench import kernels
    from dsmoe_lite.common.files import write_json

    if record and device == "cpu":
        raise InputError("--record: times of kernels on a CPU say nothing about a GPU; measure on a GPU")
    measured = kernels.bench_kernels(rounds or kernels.ROUNDS, device or "auto")
    if record:
        write_json(kernels.record_path(measured), measured)
    if as_json:
        click.echo(json.dumps(measured, indent=1))
    else:
        medians = f"medians of {measured['place']['rounds']} rounds"
        conditions = f"{measured['provenance']['device']}, {measured['place']['dtype']}"
        titles = {
            "checks": "Correctness: error against float64, relative to the norm",
            "ladder": f"dsmoe bench kernels: one grouped product by every rung, {medians}, {conditions}",
            "products": f"Grouped products, {medians}; of dense: 1 is as fast as one dense product",
            "moves": "Permute and combine; bytes read plus bytes written",
            "backends": "Routed experts; times grouped: above 1 is faster than grouped",
            "goals": "Goals",
        }
        for table, title in titles.items():
            if measured[table]:  # empty if none of its measurements ran
                print_rows(measured[table], as_json=False, title=title)
        for note in measured["notes"]:
            click.echo(f"left out: {note}")


def _contexts(text: str | None) -> list[int]:
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise InputError(
            f"--contexts {text}: must be whole numbers with commas between them, as in 1024,2048"
        ) from None


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} threads"
