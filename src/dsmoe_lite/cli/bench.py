"""dsmoe bench: ratios measured in one process."""

import json
import os
from collections.abc import Callable
from typing import Any

import click

from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import InputError


@click.command(
    help="Measure ratios in one process: `layer` (experts beside a dense FFN), `train` (training steps), `mla` "
    "(attention that generates and reads) or `kernels` (all of them on a GPU, checked before they are timed)."
)
@click.argument("what", type=click.Choice(["layer", "train", "mla", "kernels"]))
@click.option(
    "--rounds", type=click.IntRange(3, 10_000), help="Turns to take medians over.  [default: 30; mla: 12; kernels: 10]"
)
@click.option("--profile", is_flag=True, help="layer: print where the time goes, by torch operation.")
@click.option("--contexts", metavar="N,N,...", help="mla: tokens to look back at.  [default: 1024,2048,4096,8192]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where to measure, not for layer.  [default: cpu; kernels: auto]",
)
@click.option("--record", is_flag=True, help="mla, kernels: also write data/runs/bench-WHAT-DEVICE.json.")
@json_option
def command(what: str, rounds: int | None, as_json: bool, **options: Any) -> None:
    """Print a row for each contender."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler prints a line whenever it starts or stops
    meant_for = {"profile": ["layer"], "contexts": ["mla"], "device": ["train", "mla", "kernels"]}
    meant_for["record"] = ["mla", "kernels"]
    for name, only in meant_for.items():
        if options[name] and what not in only:
            *most, last = (f"`{one}`" for one in only)
            those = f"{', '.join(most)} and {last}" if most else last
            raise InputError(f"--{name}: is for {those}, not for `{what}`")
    measure: dict[str, Callable[..., None]] = {"layer": _layer, "train": _train, "mla": _mla, "kernels": _kernels}
    measure[what](rounds, as_json, **{name: options[name] for name, only in meant_for.items() if what in only})


def _train(rounds: int | None, as_json: bool, device: str | None) -> None:
    from dsmoe_lite.bench.train import PLACES, bench_train
    from dsmoe_lite.common.machine import resolve_device

    rounds, place = rounds or 30, PLACES[resolve_device(device or "cpu")]
    title = (
        f"dsmoe bench train: medians of {rounds} turns, speed ratio to the first row, FLOPs a second as a share of a "
        f"matmul of the dense FFN's shape; {place.device}, {_threads()}"
    )
    print_rows(bench_train(rounds, place), as_json=as_json, title=title)


def _layer(rounds: int | None, as_json: bool, profile: bool) -> None:
    from dsmoe_lite.bench.layer import bench_layer, profile_layer

    rounds = rounds or 30
    if profile:
        title = f"dsmoe bench layer --profile: milliseconds a step, {rounds} steps, {_threads()}"
        print_rows(profile_layer(rounds), as_json=as_json, title=title)
        return
    title = (
        f"dsmoe bench layer: medians of {rounds} alternated pairs, 95% intervals by order statistics, {_threads()}; "
        "above 1 is slower or larger, a gap above 0 misses the goal"
    )
    print_rows(bench_layer(rounds), as_json=as_json, title=title)


def _mla(rounds: int | None, as_json: bool, contexts: str | None, device: str | None, record: bool) -> None:
    from dsmoe_lite.bench import mla
    from dsmoe_lite.common.files import write_json

    found = mla.bench_mla(_contexts(contexts) or mla.CONTEXTS, rounds or mla.ROUNDS, device or "cpu")
    place, machine = found["place"], found["peaks"]
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        where = f"{place['device']}, {place['dtype']}, batch {place['batch_size']}, {_threads()}"
        print_rows(
            [{name: value for name, value in row.items() if name != "FLOPs"} for row in found["decode"]],
            as_json=False,
            title=f"dsmoe bench mla: one token, medians of {place['rounds']} turns, 95% intervals, {where}",
        )
        print_rows(found["prefill"], as_json=False, title="A prompt, batch 1: medians of pairs")
        print_rows(
            found["slopes"],
            as_json=False,
            title=f"What each token in the cache costs. This machine copies {machine['copy GB/s']:.3g} GB/s, read and "
            f"written, and multiplies {machine['matmul GFLOP/s']:.4g} GFLOP/s",
        )
        print_rows(found["goals"], as_json=False, title="Goals")
    if record:
        write_json(mla.record_path(place["device"]), found)


def _kernels(rounds: int | None, as_json: bool, device: str | None, record: bool) -> None:
    from dsmoe_lite.bench import kernels
    from dsmoe_lite.common.files import write_json

    if record and device == "cpu":
        raise InputError("--record: what kernels take on a CPU says nothing about a GPU; measure on one")
    found = kernels.bench_kernels(rounds or kernels.ROUNDS, device or "auto")
    if record:
        write_json(kernels.record_path(found), found)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        turns = f"medians of {found['place']['rounds']} turns"
        where = f"{found['provenance']['device']}, {found['place']['dtype']}"
        titles = {
            "checks": "Right? Differences from float64, of the norm",
            "ladder": f"dsmoe bench kernels: one product by every rung, {turns}, {where}",
            "products": f"Products, {turns}; of dense: 1 is as fast as one dense product",
            "moves": "Permute and combine; bytes: what they read and what they write",
            "backends": "The routed experts; times grouped: above 1 is faster",
            "goals": "Goals",
        }
        for table, title in titles.items():
            if found[table]:  # everything in it may have been left out
                print_rows(found[table], as_json=False, title=title)
        for note in found["notes"]:
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
