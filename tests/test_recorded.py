"""Recorded runs: the grids are complete, and rows for charts agree with the records."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_lite import accounting
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.files import read_json, write_json
from dsmoe_lite.config import from_dict
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.study import ledger
from dsmoe_lite.study.grids import GRIDS, grid, records
from dsmoe_lite.study.needle import KINDS, NeedleJob
from dsmoe_lite.study.rows import (
    balance_rows,
    curve_gaps,
    gaps,
    metric_rows,
    overtaken_at,
    seed_line,
    trend_rows,
)

MADE_UP = [
    {"model_name": name, "seed": seed, "heldout_loss": loss, "recall": {"head": 0.5, "tail": tail}, "losses": curve}
    for name, seed, loss, tail, curve in (
        ("a", 0, 1.0, 0.1, [4.0, 2.0, 3.0, 1.0, 9.0]),
        ("a", 1, 1.5, 0.2, [1.0] * 5),
        ("b", 1, 2.5, 0.6, [2.0] * 5),
        ("b", 0, 1.25, 0.3, [3.0] * 5),
    )
]


INCOMPLETE = (
    "paper-gpu",
    "text-long-gpu",
)  # both need a GPU


@pytest.mark.parametrize("name", GRIDS)
def test_every_run_of_a_grid_is_recorded_finished_and_from_committed_code(name: str) -> None:
    results, plan = records(name), grid(name)
    recorded = {(r["model_name"], r["seed"]) for r in results}
    assert recorded == set(plan.runs()) or name in INCOMPLETE
    assert all(record["finished"] for record in results)
    assert all(len(record["provenance"]["commit"]) == 40 for record in results), "+changes marks uncommitted code"


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "needle"])
def test_runs_of_a_grid_share_one_corpus_and_their_curves_are_complete(name: str) -> None:
    results, plan = records(name), grid(name)
    worlds = {plan.jobs[record["model_name"]].corpus for record in results}
    assert len({record["corpus"]["sha256"] for record in results}) == len(worlds)
    for record in results:
        assert len(record["losses"]) == plan.jobs[record["model_name"]].train.steps


def test_attention_is_compared_at_equal_size() -> None:
    jobs = grid("attention").jobs
    sizes = {name: sum(weight.numel() for weight in Transformer(job.model).parameters()) for name, job in jobs.items()}
    assert all(abs(size / sizes["mha"] - 1) < 0.001 for size in sizes.values()), sizes
    assert sizes == {name: accounting.parameters(job.model).total for name, job in jobs.items()}
    cached = {name: accounting.kv_cache_elements(job.model) for name, job in jobs.items()}
    assert cached == {"mha": 256, "gqa": 128, "mqa": 64, "mla": 80}
    same = [replace(job, model=jobs["mha"].model) for job in jobs.values()]
    assert same == [jobs["mha"]] * 4, "only the models differ"
    assert jobs["mha"].model == preset("course-dense")


def test_needles_are_recorded_by_kind_length_and_depth() -> None:
    for record in records("needle"):
        job = from_dict(NeedleJob, record["job"])
        assert job == grid("needle").job(record["model_name"], record["seed"])
        assert set(record["recall"]) == {*KINDS, "plain-extended", "interpolated-extended", "yarn-extended"}
        for by_length in record["recall"].values():
            assert {length: len(bins) for length, bins in by_length.items()} == {"64": 8, "128": 8, "256": 8}
        assert {(row["rows"], row["seq_len"]) for row in record["curve"]} == {
            (stage.rows, stage.seq_len) for stage in job.stages
        }


def test_the_runs_with_masked_experts_repeat_those_of_the_protocol() -> None:
    planned = {r["seed"]: r["losses"] for r in records("paper") if r["model_name"] == "0+2-of-16"}
    again = {r["seed"]: r["losses"] for r in records("paper-gates")}
    assert again == planned


def test_gaps_pair_runs_by_seed() -> None:
    assert gaps(MADE_UP, "b", "a", "held-out loss") == {0: 0.25, 1: 1.0}
    assert gaps(MADE_UP, "b", "a", "recall, rare people") == pytest.approx({0: 0.2, 1: 0.4})


def test_a_seed_that_one_of_the_two_lacks_is_left_out() -> None:
    incomplete = [record for record in MADE_UP if (record["model_name"], record["seed"]) != ("a", 0)]
    assert gaps(incomplete, "b", "a", "held-out loss") == {1: 1.0}
    assert {row["seed"] for row in curve_gaps(incomplete, {"b": "B"}, baseline="a", window=1)} == {1}


def test_rows_of_trends_agree_with_the_ledger() -> None:
    claims = [claim for claim in ledger.load() if claim.trend and claim.trend.grid == "balance"]
    rows = trend_rows(claims, records("balance"))
    assert len(rows) == len(claims) > 3
    places = [claim.source.partition(", ")[2] for claim in claims]
    for claim, row in zip(sorted(claims, key=lambda c: places.index(c.source.partition(", ")[2])), rows, strict=True):
        low, high = (row["low"], row["high"]) if claim.trend.expected == "above" else (-row["high"], -row["low"])
        assert claim.ours.startswith(f"{(low + high) / 2:+.4f}, 95% from {low:+.4f} to {high:+.4f},")
        assert (row["mean"] > 0) == (((low + high) / 2 > 0) == (claim.trend.expected == "above"))
        assert row["verdict"] == claim.verdict
    assert trend_rows([replace(claims[0], verdict="not tested")], records("balance")) == []


@pytest.mark.parametrize(
    ("id", "label", "place", "margins"),
    [
        ("moe-beats-gshard", "deepseekmoe - gshard", "Table 1", []),
        ("moe-two-shared", "2+6-of-62 - deepseekmoe", "Section 4.4", [-0.012, 0.012]),
        ("moe-equals-gshard-x1.5", "deepseekmoe - gshard-x1.5", "Table 2", [-0.012]),
        ("moe-shared-irreplaceable", "deepseekmoe: shared expert swapped", "Section 4.5", []),
        ("moe-masked-hurts-more", "deepseekmoe (rise) - gshard-x1.5", "Figure 4", []),
        ("moe-four-active", "deepseekmoe (4 routed experts) - gshard", "Figure 5", [-0.012]),
    ],
)
def test_a_trend_has_a_name_and_the_ends_of_its_margin(id: str, label: str, place: str, margins: list[float]) -> None:
    claim = replace(ledger.by_id(ledger.load(), id), verdict="holds")
    (row,) = trend_rows([claim], records("paper"))
    assert (row["label"], row["place"], row["margins"]) == (claim.short, place, margins)
    (row,) = trend_rows([replace(claim, short="")], records("paper"))
    assert row["label"] == label


def test_a_line_of_seeds() -> None:
    # two values: half their distance times Student's t for one degree of freedom, 0.2 * 12.706
    assert seed_line({1: 0.3, 0: -0.1}) == "+0.100 ± 2.541   -0.100 +0.300"
    assert seed_line({2: 0.1, 0: 0.3, 1: 0.2}) == "+0.200 ± 0.248   +0.300 +0.200 +0.100"  # 4.303 * 0.1 / sqrt 3
    assert seed_line({3: 0.25}) == "+0.250"
    assert seed_line({}) == "no run yet"


def test_rows_of_metrics_and_curves() -> None:
    rows = metric_rows(MADE_UP, {"a": "model A"})
    assert {(row["model"], row["metric"]) for row in rows} == {
        ("model A", metric) for metric in ("held-out loss", "recall, frequent people", "recall, rare people")
    }
    assert [row["value"] for row in rows if row["metric"] == "recall, rare people"] == [0.1, 0.2]
    both = metric_rows(MADE_UP, {"b": "B", "a": "A"})[:4]
    assert [(row["model"], row["seed"]) for row in both] == [("B", 1), ("B", 0), ("A", 0), ("A", 1)]


def test_curve_gaps_pair_steps_and_seeds() -> None:
    rows = curve_gaps(MADE_UP, {"b": "B"}, baseline="a", window=2)
    assert [(r["seed"], r["step"], r["loss"]) for r in rows] == [(1, 2, 1.0), (1, 4, 1.0), (0, 2, 0.0), (0, 4, 1.0)]
    assert overtaken_at(rows, "B") == 4
    below = [{"model": "B", "step": step, "loss": loss} for step, loss in ((2, 0.5), (4, -0.1), (6, 0.2), (8, -0.3))]
    assert overtaken_at(below, "B") == 6
    assert overtaken_at(below[:0], "B") == 0


def test_split_rows_agree_with_the_counts_of_parameters() -> None:
    config = preset("course-gshard")
    rows = accounting.split_rows({"x": (config, 64)})
    assert sum(row["total"] for row in rows) == accounting.parameters(config).total
    assert sum(row["active"] for row in rows) == accounting.parameters(config).active_all
    flops = {row["component"]: row["flops"] for row in rows}
    assert flops["routed experts"] == 2 * 2 * 3 * 64 * 128 * config.n_layers  # 2 experts, 2 FLOPs per weight
    assert "FFN" not in flops


def test_balance_rows_pair_the_loss_and_average_over_layers() -> None:
    layers = [{"max_vio": 1.0, "overflow": 0.5}, {"max_vio": 2.0, "overflow": 0.0}]
    records = [{**record, "heldout_experts": layers} for record in MADE_UP]
    names = {"b": ("B", "bias"), "a": ("A", "none"), "missing": ("C", "none")}
    rows = balance_rows(records, names, "a")
    assert [(row["method"], row["family"], row["seed"], row["gap"]) for row in rows] == [
        ("B", "bias", 1, 1.0), ("B", "bias", 0, 0.25), ("A", "none", 0, 0.0), ("A", "none", 1, 0.0),
    ]  # fmt: skip
    assert {(row["max_vio"], row["overflow"]) for row in rows} == {(1.5, 0.25)}
    without = [record for record in records if (record["model_name"], record["seed"]) != ("a", 0)]
    assert {row["seed"] for row in balance_rows(without, names, "a")} == {1}


# Records that are damaged


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Copies the record of one run into an otherwise empty data folder."""
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))

    def copy(name: str, file: str) -> Path:
        target = tmp_path / "runs" / name / file
        target.parent.mkdir(parents=True)
        shutil.copyfile(paths.DATA / "runs" / name / file, target)
        return target

    return copy


RUNS = [("neighbours", "course-switch-seed2.json"), ("paper", "deepseekmoe-seed3.json"), ("needle", "mla-seed1.json")]


@pytest.mark.parametrize(("name", "file"), RUNS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is not JSON"),
        (lambda content: b"", "is not JSON"),
        (lambda content: b"[" + content + b"]", "must be a mapping"),
        (lambda content: content.decode().encode("utf-16"), "is not JSON"),
        (lambda content: content.replace(b'"recall": {', b'"recall": {"x": NaN, '), "it has the value NaN"),
        (lambda content: content.replace(b'"recall": {', b'"recall": {"x": 1e999, '), "it has the value 1e999"),
        (lambda content: content.replace(b'"schema_version": ', b'"schema_version": 7'), "schema_version = 7"),
        (lambda content: content.replace(b'"recall": {', b'"recall": 3, "was": {'), "recall = 3: must be a mapping"),
        (lambda content: content.replace(b'"provenance"', b'"was"'), "provenance = None: must be a mapping"),
        (lambda content: b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_record_is_one_line(
    damage: Callable[[bytes], bytes], message: str, name: str, file: str, copied: Callable[[str, str], Path]
) -> None:
    path = copied(name, file)
    assert len(records(name)) == 1
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        records(name)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_does_not_choose_its_own_name(copied: Callable[[str, str], Path]) -> None:
    path = copied("neighbours", "course-switch-seed2.json")
    path.write_text(path.read_text().replace("{", '{"model_name": "x", "seed": 77,', 1))
    (record,) = records("neighbours")
    assert (record["model_name"], record["seed"]) == ("course-switch", 2)


def test_a_flat_record_is_the_same_record_in_fewer_bytes(tmp_path: Path) -> None:
    values = {
        "losses": [1.5, -2e-7, 3], "routing": [{"loads": [[0.5, 1.5], [1.0]]}], "empty": [], "words": ["[\n 1\n]", "2"],
        "mixed": [1, "a", None], "deep": {"one": [7]},
    }  # fmt: skip
    tall, flat = tmp_path / "tall.json", tmp_path / "flat.json"
    write_json(tall, values)
    write_json(flat, values, flat=True)
    assert read_json(flat) == read_json(tall) == values
    assert ' "losses": [1.5, -2e-07, 3],\n' in flat.read_text(encoding="utf-8")
    (path,) = (paths.DATA / "runs" / "successors-pilot").glob("v3-seed100.json")
    write_json(tall, read_json(path))
    write_json(flat, read_json(path), flat=True)
    assert read_json(flat) == read_json(path)
    assert flat.stat().st_size < 0.8 * tall.stat().st_size
