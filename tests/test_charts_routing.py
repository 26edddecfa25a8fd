"""Charts of devices, co-activation, interventions, benchmarks and chance: the marks have the values of the rows."""

import copy
import itertools
import re

import chart_samples
import pytest
import vl_convert

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.viz import charts, renderer, roofline
from dsmoe_lite.viz.helpers import separate_labels, short_number


def svg(chart, **params):
    spec = copy.deepcopy(renderer.stable(chart.to_dict()))
    for param in spec.get("params", []):
        param["value"] = params.pop(param["name"], param.get("value"))
    assert not params
    return vl_convert.vegalite_to_svg(spec, vl_version=renderer.VEGALITE)


def marks(picture, first):
    """The aria label of each mark as {field: text}, for marks whose first field is `first`."""
    labels = re.findall(rf'aria-label="({first}: [^"]*)"', picture)
    return [dict(part.split(": ", 1) for part in label.split("; ")) for label in labels]


def values(node, field):
    """The rows of the first inline data that have `field`."""
    return list(next(rows for rows in _inline(node) if field in rows[0]))


def _inline(node):
    if isinstance(node, dict):
        if isinstance(node.get("values"), list) and node["values"] and isinstance(node["values"][0], dict):
            yield node["values"]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _inline(value)


def pairs(chart, field):
    """The number `field` of each box drawn, by row and column."""
    boxes = [mark for mark in marks(svg(chart), "expert") if "share" in mark]
    numbers = [float(mark[field].rstrip("%")) / (100 if mark[field].endswith("%") else 1) for mark in boxes]
    return {(mark["i"], mark["expert"]): number for mark, number in zip(boxes, numbers, strict=True)}


def test_marked_pairs_are_ringed_and_numbered():
    chart = charts.coactivation([[1.0, 0.1, 0.5], [0.2, 1.0, 0.3], [0.4, 0.7, 1.0]], marked=[(2, 1), (0, 2)])
    rings = values(chart.to_dict(), "number")
    assert [(row["i"], row["expert"], row["number"]) for row in rings] == [("e2", "e1", "1"), ("e0", "e2", "2")]


def test_pairs_are_drawn_in_the_given_order_with_a_blank_diagonal():
    shares = [[1.0, 0.125, 0.5], [0.25, 1.0, None], [0.0, 0.75, 1.0]]
    chart = charts.coactivation(shares, order=[2, 0, 1])
    known = {(0, 1): 0.125, (0, 2): 0.5, (1, 0): 0.25, (2, 0): 0.0, (2, 1): 0.75}
    assert pairs(chart, "share") == {(f"e{i}", f"e{j}"): share for (i, j), share in known.items()}
    assert re.findall(r">(e\d)</text>", svg(chart)) == ["e2", "e0", "e1"] * 2
    assert "75.0% of the tokens of e2 also use e1" in chart.to_dict()["description"]


@pytest.mark.parametrize("null", [0.25, [[0.25] * 3] * 3])
def test_lift_is_the_share_over_chance(null):
    shares = [[1.0, 0.125, 0.5], [0.25, 1.0, float("nan")], [0.0, 1.0, 1.0]]
    chart = charts.coactivation(shares, null=null)
    known = {(0, 1): 0.5, (0, 2): 2.0, (1, 0): 1.0, (2, 0): 0.0, (2, 1): 4.0}
    assert pairs(chart, "times") == {(f"e{i}", f"e{j}"): lift for (i, j), lift in known.items()}
    assert set(pairs(chart, "by chance").values()) == {0.25}
    assert "100.0% of the tokens of e2 also use e1, 4.00 times chance" in chart.to_dict()["description"]


def test_trends_are_written_out_with_their_margins_and_verdicts():
    chart = charts.trend_intervals(chart_samples.TRENDS)
    spec = chart.to_dict()
    rows = values(spec, "low")
    for row, given in zip(rows, chart_samples.TRENDS, strict=True):
        assert (row["low"], row["mean"], row["high"]) == (given["low"], given["mean"], given["high"])
        assert row["text"] == f"{given['verdict']}, {given['mean']:+.3f} ± {(given['high'] - given['low']) / 2:.3f}"
        assert row["text"].startswith(f"{row['shown']} ± ")
        assert row["filled"] == (given["verdict"] in ("holds", "reversed"))
        assert row["text"] in spec["description"]
    assert [row["margins"] for row in rows] == [[], [], [-0.012], []]
    assert [row["heading"] for row in rows] == ["Table 1", "", "Table 2", "Figure 4"]
    low, high = spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert -1.43 < low < -0.015 < 0.042 < high  # Figure 4 is an arrow at the edge
    assert [row["edge"] for row in rows] == [None, None, None, low]
    near = values(charts.trend_intervals(chart_samples.TRENDS[:3]).to_dict(), "low")
    assert [row["edge"] for row in near] == [None] * 3
    holds = chart_samples.TRENDS[0]
    for change, message in (
        ({"verdict": "true"}, "verdict = 'true': must be one of holds"),
        ({"low": 0.5}, "low = 0.5, mean = 0.0225"),
    ):
        with pytest.raises(InputError, match=message):
            charts.trend_intervals([{**holds, **change}])
    with pytest.raises(InputError, match="the same 'label' and 'place'"):
        charts.trend_intervals([holds, holds])


def test_the_roof_bends_where_bandwidth_meets_the_peak_and_unmeasured_points_lie_on_it():
    peak, bandwidth = 800e9, 100e9
    rows = [{"name": "a", "intensity": 2.0}, {"name": "b", "intensity": 64.0}, {"name": "c", "intensity": 4.0,
             "flops": 100e9}]  # fmt: skip
    spec = charts.roofline(rows, peak=peak, bandwidth=bandwidth).to_dict()
    first, knee, last = values(spec["layer"][0], "flops")
    assert knee == {"intensity": 8.0, "flops": peak}
    assert first["flops"] == pytest.approx(bandwidth * first["intensity"])
    assert first["intensity"] < 2.0
    assert last["intensity"] > 64.0
    assert last["flops"] == peak
    drawn = {row["name"]: (row["flops"], row["measured"]) for row in values(spec, "measured")}
    assert drawn == {"a": (200e9, False), "b": (peak, False), "c": (100e9, True)}
    assert "Peak 800 GFLOP/s, bandwidth 100 GB/s; they meet at 8 FLOP per byte" in spec["description"]
    assert "c 4 FLOP per byte, 100 GFLOP/s, 25% of the roof" in spec["description"]


@pytest.mark.parametrize(
    ("positions", "moved"),
    [([12.0, 12.0, 11.0], [9.0, 10.0, 8.0]), ([8.4, 10.0, 10.0], [8.0, 9.0, 10.0]), ([-3.0, -3.0], [0.0, 1.0])],
)
def test_labels_outside_the_range_are_moved_inside_without_overlap(positions, moved):
    assert separate_labels(positions, 1.0, 0.0, 10.0) == pytest.approx(moved)


def test_labels_of_the_roofline_do_not_overlap():
    rows = [{"name": f"layer {i}", "intensity": 300.0 + i} for i in range(8)]
    picture = svg(charts.roofline(rows, peak=989e12, bandwidth=3.35e12))
    heights = {float(y) for y in re.findall(r'translate\([-\d.]+,([\d.]+)\)"[^>]*>layer \d<', picture)}
    assert len(heights) == 8
    assert min(b - a for a, b in itertools.pairwise(sorted(heights))) >= roofline.LABEL_GAP - 0.5


@pytest.mark.parametrize(
    ("value", "text"), [(989e12, "989 TB/s"), (3.35e9, "3.35 GB/s"), (1.979e15, "1.98 PB/s"), (7, "7 B/s")]
)
def test_units_follow_a_space(value, text):
    assert roofline._unit(value, "B/s") == text


def specialization_row(value, expert=None, what="layer 1"):
    row = {"what": what, "value": value, "null_low": 0.2, "null": 0.3, "null_high": 0.4}
    return row if expert is None else {**row, "expert": expert}


def test_experts_beyond_chance_are_counted_and_marked():
    observed = {0: 0.3, 1: 0.9, 2: 0.1, 3: 0.4, 4: 0.5}
    chart = charts.specialization_against_null([specialization_row(value, e) for e, value in observed.items()])
    drawn = {mark["expert"]: (float(mark["specialisation"]), mark["state"])
             for mark in marks(svg(chart), "expert") if "state" in mark}  # fmt: skip
    states = {0: "within", 1: "above", 2: "below", 3: "within", 4: "above"}
    assert drawn == {f"e{e}": (observed[e], f"{states[e]} chance") for e in observed}
    assert "2 of 5 above chance, 1 below; highest e1 0.900, by chance 0.300" in chart.to_dict()["description"]
    axis = re.findall(r">(e\d)</text>", svg(chart))
    assert axis == ["e1", "e4", "e3", "e0", "e2"]


def test_without_experts_each_layer_is_a_row_with_its_own_null():
    rows = [specialization_row(0.5, what="layer 1"), {**specialization_row(0.5, what="layer 2"), "null_high": 0.6}]
    chart = charts.specialization_against_null(rows)
    drawn = values(chart.to_dict(), "state")
    assert [(row["what"], row["state"]) for row in drawn] == [("layer 1", "above chance"), ("layer 2", "within chance")]
    assert all(f"{row['what']}: {short_number(row['value'])}" in chart.to_dict()["description"] for row in rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: charts.coactivation([[1.0]]), "1 rows"),
        (lambda: charts.coactivation([[1.0] * 65] * 65), "65 rows"),
        (lambda: charts.coactivation([[1.0, 0.5], [1.0]]), "2 rows of 2"),
        (lambda: charts.coactivation([[1.0, 7.0], [1.0, 1.0]]), "7 is not a share"),
        (lambda: charts.coactivation([[1.0, None], [None, 1.0]]), "no pair"),
        (lambda: charts.coactivation([[1.0, 0.5]] * 2, order=[0, 0]), "each of the 2 experts once"),
        (lambda: charts.coactivation([[1.0, 0.5]] * 2, null=[[0.5]]), "null: must have 2"),
        (lambda: charts.roofline(chart_samples.POINTS, peak=0, bandwidth=1), "peak = 0"),
        (lambda: charts.roofline(chart_samples.POINTS, peak=1, bandwidth=float("nan")), "bandwidth = nan"),
        (lambda: charts.roofline([{"name": "a", "intensity": 0}], peak=1, bandwidth=1), "above 0"),
        (
            lambda: charts.specialization_against_null([specialization_row(0.5, 1), specialization_row(0.5)]),
            "give it in all rows or in none",
        ),
        (lambda: charts.specialization_against_null([specialization_row(0.5, 1)] * 2), "an expert twice"),
        (lambda: charts.specialization_against_null([specialization_row(0.5)] * 2), "one row"),
        (lambda: charts.specialization_against_null([{**specialization_row(0.5), "null_low": 0.6}]), "null_low = 0.6"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
