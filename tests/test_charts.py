"""Charts: drawn, described, readable, narrow, small, and identical in every run."""

import base64
import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import altair as alt
import chart_samples
import numpy as np
import pandas as pd
import pytest
import vl_convert
from PIL import Image

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.stats import mean_and_half_width
from dsmoe_lite.viz import (
    ablation_matrix,
    charts,
    curves,
    effects_by_kind,
    helpers,
    identity,
    renderer,
    theme,
    token_routing,
)

NAMES = list(chart_samples.every_chart())


@pytest.fixture(scope="module")
def specs():
    return {name: chart.to_dict() for name, chart in chart_samples.every_chart().items()}


@pytest.fixture(scope="module")
def bundles(specs):
    return {name: renderer.bundle(spec) for name, spec in specs.items()}


def svg(spec):
    return vl_convert.vegalite_to_svg(spec, vl_version=renderer.VEGALITE)


@pytest.mark.parametrize("name", NAMES)
def test_a_chart_is_drawn_narrow_and_small(bundles, name):
    data, metadata = bundles[name]
    assert set(data) == {renderer.MIME, "image/png", "text/plain"}
    assert data[renderer.MIME]["$schema"].endswith("/v5.json")
    picture = svg(data[renderer.MIME])
    width = float(re.search(r'width="([\d.]+)"', picture)[1])
    assert 200 < width <= theme.MAX_WIDTH
    assert metadata["image/png"]["width"] == pytest.approx(width, abs=1)
    png = base64.b64decode(data["image/png"])
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P"
    assert len(image.convert("RGB").getcolors(1 << 24)) > 8  # something is drawn
    assert len(png) < 75 * 1024
    assert len(json.dumps(data, indent=1)) < 150 * 1024  # one element a line, as nbformat writes it


@pytest.mark.parametrize("name", NAMES)
def test_a_chart_has_a_description_and_no_text_is_too_small(bundles, name):
    data, _ = bundles[name]
    assert len(data["text/plain"]) >= 30
    assert data["text/plain"] == data[renderer.MIME]["description"]
    assert data[renderer.MIME]["title"]["text"]
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)px"', svg(data[renderer.MIME]))]
    assert min(sizes) >= theme.MIN_FONT_SIZE


@pytest.mark.parametrize("name", NAMES)
def test_no_colour_outside_the_theme(bundles, name):
    colours = {colour.upper() for colour in re.findall(r"#[0-9a-fA-F]{6}", json.dumps(bundles[name][0][renderer.MIME]))}
    assert colours <= set(theme.LIGHT.values())


def test_specs_are_identical_in_every_process(specs):
    here, program = Path(__file__).parent, [sys.executable, "chart_samples.py"]
    other = subprocess.run(
        program, cwd=here, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, check=True, text=True
    ).stdout
    assert other.strip() == json.dumps({name: renderer.stable(spec) for name, spec in specs.items()})


def test_generated_names_do_not_depend_on_earlier_charts_or_on_the_last_digit():
    def spec(value):
        chart = alt.Chart(alt.Data(values=[{"a": value, "b": "param_1"}])).mark_point().encode(x="a:Q", text="b:N")
        pick = alt.selection_point()
        return renderer.stable((chart.add_params(pick).transform_filter(pick) | chart).to_dict())

    one, other = spec(0.123456789), spec(0.12345678)
    assert one == other
    assert one["params"][0]["name"] == "param_1"
    assert one["params"][0]["views"] == ["view_1"]
    assert one["hconcat"][0]["name"] == "view_1"


@pytest.mark.parametrize(
    ("number", "rounded"),
    [(0.123456, 0.1235), (123456.7, 123500), (1e-12 / 3, 3.333e-13), (float("nan"), None), (float("inf"), None),
     (7, 7), (True, True), (2.0, 2)],
)  # fmt: skip
def test_numbers_keep_four_digits(number, rounded):
    spec = renderer.stable({"data": {"values": [{"a": number}]}})
    assert spec["data"]["values"][0]["a"] == rounded
    assert type(spec["data"]["values"][0]["a"]) is type(rounded)


@pytest.mark.parametrize("character", ["\0", "\x1b", "\ud800", "\uffff"])
def test_characters_that_are_invalid_in_svg_are_replaced(character):
    text = [f"a{character}b", " c"]
    data, _ = renderer.bundle(charts.token_routing(text, chart_samples.routing(2, 1)).to_dict())
    assert character not in json.dumps(data, ensure_ascii=False)
    assert "a\ufffdb" in json.dumps(data, ensure_ascii=False)


@pytest.mark.parametrize("description", [None, "", "too short", 40 * " "])
def test_a_chart_without_description_is_refused(description):
    chart = alt.Chart(alt.Data(values=[{"a": 1}])).mark_point().encode(x="a:Q").to_dict()
    if description is not None:
        chart["description"] = description
    with pytest.raises(InputError, match="description"):
        renderer.bundle(chart)


def test_importing_charts_loads_no_torch():
    program = "import sys, dsmoe_lite.viz.charts, dsmoe_lite.viz.renderer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_enable_displays_through_the_renderer():
    before = alt.renderers.active
    try:
        renderer.enable()
        data, _ = charts.expert_load([1, 2, 3])._repr_mimebundle_()
        assert renderer.MIME in data
    finally:
        alt.renderers.enable(before)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_text_and_marks_have_enough_contrast(colours):
    for role in ("ink", "muted", *(role for role in colours if role.endswith("_label"))):
        assert contrast(colours[role], colours["card"]) >= 4.5, role
    hues = [role.removesuffix("_label") for role in colours if role.endswith("_label")]
    for role in (*hues, "starved", "overloaded"):
        assert contrast(colours[role], colours["card"]) >= 3, role
    fills = [role for role in colours if re.fullmatch(r"(fill|part|group)\d", role)]
    assert len(fills) == 8 + len(identity.COMPONENTS) + len(theme.GROUPS)
    for role in fills:
        assert contrast(colours["on_fill"], colours[role]) >= 4.5, role
    stops = [colours[f"ramp{i}"] for i in range(1, 6)]
    for hundredth in range(101):
        share = hundredth / 100
        text = colours["on_deep"] if share > theme.DEEP_FROM else colours["on_pale"]
        assert contrast(text, interpolated(stops, share)) >= 4.5, share


def interpolated(stops, position):
    left = min(int(position * 4), 3)
    share = position * 4 - left
    mixed = [
        round(int(stops[left][i : i + 2], 16) * (1 - share) + int(stops[left + 1][i : i + 2], 16) * share)
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02X}" for part in mixed)


def test_each_role_has_its_own_colour_so_that_the_book_can_swap_themes():
    assert theme.LIGHT.keys() == theme.DARK.keys()
    for colours in (theme.LIGHT, theme.DARK):
        assert len(set(colours.values())) == len(colours)
        assert all(re.fullmatch("#[0-9A-F]{6}", colour) for colour in colours.values())
    stops = [luminance(theme.LIGHT[f"ramp{i}"]) for i in range(1, 6)]
    assert all(a > b for a, b in itertools.pairwise(stops))
    stops = [luminance(theme.DARK[f"ramp{i}"]) for i in range(1, 6)]
    assert all(a < b for a, b in itertools.pairwise(stops))


def test_long_runs_are_thinned_and_averaged():
    rows = [{"model": "m", "seed": 0, "step": step, "loss": float(step % 2)} for step in range(3000)]
    spec = charts.training_curves(rows).to_dict()
    points = spec["layer"][0]["data"]["values"] if "data" in spec["layer"][0] else spec["data"]["values"]
    assert len(points) == curves.MAX_POINTS
    assert {point["mean"] for point in points} == {0.5}  # 30 steps per bin, half of them 1


def test_the_band_spans_the_seeds():
    rows = [{"model": "m", "seed": seed, "step": 0, "loss": loss} for seed, loss in enumerate((1.0, 2.0, 6.0))]
    point = curves.over_seeds(rows, "loss")["m"][0]
    assert (point["low"], point["mean"], point["high"]) == (1.0, 3.0, 6.0)


def test_the_interval_is_student_t():
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # s = 1, t(0.975, 2) = 4.302653
    assert mean_and_half_width([5.0]) == (5.0, None)


def test_labels_move_apart_and_stay_inside():
    moved = helpers.separate_labels([1.0, 1.0, 1.1, 9.0], 1.0, 0.0, 10.0)
    assert all(b - a >= 1.0 - 1e-9 for a, b in itertools.pairwise(sorted(moved)))
    assert moved[3] == 9.0
    crowded = helpers.separate_labels([9.9, 9.95, 10.0], 1.0, 0.0, 10.0)
    assert max(crowded) <= 10.0
    assert sorted(crowded) == crowded
    assert all(b - a >= 1.0 - 1e-9 for a, b in itertools.pairwise(crowded))


@pytest.mark.parametrize(
    ("value", "text"),
    [(7e6, "7M"), (7_020_000, "7.02M"), (0.3, "0.300"), (2, "2"), (128, "128"), (0, "0"), (1500, "1.50k")],
)
def test_short_numbers(value, text):
    assert helpers.short_number(value) == text


def test_loads_are_relative_to_the_mean():
    spec = charts.expert_load(np.array([10, 30, 20, 0])).to_dict()
    rows = next(v for v in all_values(spec) if "state" in v[0])
    assert [row["load"] for row in rows] == [10 / 15, 2.0, 20 / 15, 0.0]
    assert [row["state"] for row in rows] == ["fair", "overloaded", "fair", "starved"]
    assert "1 starved, 1 overloaded, highest 2.00" in spec["description"]


def test_a_loss_is_darkest_at_its_highest_value_and_pale_if_it_sees_no_imbalance():
    values = {("a", "even"): 1.0, ("a", "one"): 3.0, ("a", "half"): 2.0, ("b", "even"): 0.5, ("b", "one"): 0.5,
              ("b", "half"): 0.25}  # fmt: skip
    rows = [{"loss": loss, "routing": routing, "value": value} for (loss, routing), value in values.items()]
    spec = charts.loss_table(rows, balanced="even").to_dict()
    cells = next(v for v in all_values(spec) if "rise" in v[0])
    rise = {(cell["loss"], cell["routing"]): cell["rise"] for cell in cells}
    assert rise == {("a", "even"): 0, ("a", "one"): 1, ("a", "half"): 0.5} | {
        ("b", r): 0 for r in ("even", "one", "half")
    }
    assert "a: one and half; b: none" in spec["description"]


def all_values(node):
    if isinstance(node, dict):
        if (
            "values" in node
            and isinstance(node["values"], list)
            and node["values"]
            and isinstance(node["values"][0], dict)
        ):
            yield node["values"]
        for value in node.values():
            yield from all_values(value)
    elif isinstance(node, list):
        for value in node:
            yield from all_values(value)


def test_worth_shows_every_expert_on_common_axes_and_names_the_most_important_and_the_busiest():
    rows = [
        {"model": model, "expert": e, "counted": e / 2, "worth": worth * scale}
        for model, scale in (("a", 1.0), ("b", 0.1))
        for e, worth in enumerate((0.3, -0.1, 0.5, 0.2, 0.0))
    ]
    panels = charts.expert_worth(rows).to_dict()["hconcat"]
    for panel, scale in zip(panels, (1.0, 0.1), strict=True):
        line, dots, names, last = panel["layer"]
        (shown,), (named,) = all_values(dots), all_values(names)
        assert sorted((row["expert"], row["worth"]) for row in shown) == [
            (f"e{e}", worth * scale) for e, worth in enumerate((0.3, -0.1, 0.5, 0.2, 0.0))
        ]
        assert [row["expert"] for row in named] == ["e2", "e0", "e3"]
        assert [row["expert"] for (row,) in all_values(last)] == ["e4"]  # furthest right
        assert line["mark"]["type"] == "rule"
    domains = {str(panel["layer"][1]["encoding"]["y"]["scale"]["domain"]) for panel in panels}
    assert len(domains) == 1


def test_means_have_the_decimals_that_their_intervals_justify():
    seeds = {
        "wide": [0.18, 0.25, 0.31, 0.47], "narrow": [0.90, 0.92, 0.93, 0.94], "none": [1.0] * 4,
        "tiny": [0.500, 0.5001, 0.5002, 0.5001],
    }  # fmt: skip
    rows = [{"model": m, "metric": "recall", "value": v} for m, values in seeds.items() for v in values]

    def texts(rows):
        values = all_values(charts.model_comparison(rows).to_dict())
        return {row["model"]: row["text"] for row in next(panel for panel in values if "text" in panel[0])}

    of_two = [row for row in rows if row["model"] in ("wide", "narrow")]
    assert texts(of_two) == {"wide": "0.30 ± 0.20", "narrow": "0.92 ± 0.03"}
    assert texts(rows) == {"wide": "0.302 ± 0.197", "narrow": "0.922 ± 0.027", "none": "1.000", "tiny": "0.500"}
    near_zero = [{"model": "m", "metric": "difference", "value": v} for v in (-0.012, 0.009, 0.0029)]
    assert texts(near_zero) == {"m": "0.00 ± 0.03"}
    large = [{"model": "m", "metric": "tokens a second", "value": v} for v in (12_000, 12_500, 12_400)]
    assert texts(large) == {"m": "12,300 ± 657"}
    assert texts(large[:1]) == {"m": "12k"}


def test_a_matrix_averages_runs_and_frames_the_effect_of_a_group_on_itself():
    rows = [
        {"model": model, "without": a, "on": b, "value": scale * (i + 3 * (a == b))}
        for model, scale in (("m", 1.0), ("n", -1.0))
        for i in range(3)
        for a in ("x", "y")
        for b in ("x", "y")
    ]
    chart = charts.effect_matrix(rows)
    panels = chart.to_dict()["hconcat"]
    for panel, scale in zip(panels, (1.0, -1.0), strict=True):
        (cells,) = all_values(panel)
        assert {(cell["without"], cell["on"]): cell["value"] for cell in cells} == {
            ("x", "x"): 4 * scale, ("x", "y"): scale, ("y", "x"): scale, ("y", "y"): 4 * scale
        }  # fmt: skip
        assert panel["layer"][1]["transform"] == [{"filter": "datum.without === datum.on"}]
        assert panel["layer"][0]["encoding"]["color"]["scale"]["domain"] == [0.0, 4.0]
    assert "m: most on x without x, +4.000" in chart.description
    with pytest.raises(InputError, match="models = 3: at most 2"):
        charts.effect_matrix([{**rows[0], "model": str(i)} for i in range(3)])


def test_effects_by_kind_can_share_one_scale() -> None:
    rows = [{"kind": k, "effect": e, "value": v} for e, v in (("a", 1.0), ("b", 4.0)) for k in "xy"]

    def scales(**options: bool) -> list[list[float]]:
        spec = charts.effects_by_kind(rows, overall={"a": 0.5, "b": -2.0}, **options).to_dict()
        return [panel["layer"][0]["encoding"]["x"]["scale"]["domain"] for panel in spec["concat"]]

    own, shared = scales(), scales(one_scale=True)
    assert own[0] != own[1]
    assert shared[0] == shared[1]
    assert shared[0][0] == -2.0
    assert shared[0][1] == 4.0


def test_an_expert_mix_shows_shares_and_their_effective_number() -> None:
    rows = [{"expert": e, "kind": kind, "share": share} for e, shares in ((0, (2, 2, 0)), (1, (0, 5, 0)))
            for kind, share in zip("abc", shares, strict=True)]  # fmt: skip
    chart = charts.expert_mix(rows)
    bars, numbers = (layer["data"]["values"] for layer in chart.to_dict()["layer"])
    assert {(bar["expert"], bar["kind"]): bar["share"] for bar in bars if bar["share"]} == {
        ("e0", "a"): 0.5, ("e0", "b"): 0.5, ("e1", "b"): 1.0
    }  # fmt: skip
    assert [number["text"] for number in numbers] == ["2.0", "1.0"]
    assert "mean 1.5, from 1.0 for e1 to 2.0 for e0" in chart.to_dict()["description"]
    with pytest.raises(InputError, match="kinds = 9: at most 8"):
        charts.expert_mix([{**rows[0], "kind": kind} for kind in "abcdefghi"])


def test_influence_counts_the_outputs_that_change() -> None:
    rows = [
        {"part": part, "input": f"t{i}", "output": f"t{j}", "changes": j >= i if part == "attention" else j == i}
        for part in ("attention", "FFN")
        for i in range(4)
        for j in range(4)
    ]
    chart = charts.influence(rows)
    assert "attention: 10 of 16 pairs and FFN: 4 of 16 pairs" in chart.to_dict()["description"]
    with pytest.raises(InputError, match="parts = 3"):
        charts.influence([{**rows[0], "part": part} for part in "abc"])


def test_an_ablation_matrix_frames_the_largest_of_each_column_but_one_and_has_one_scale():
    means = {("first", "a"): 4.0, ("first", "b"): 1.0, ("shared", "a"): 0.25, ("shared", "b"): -0.0004,
             ("second", "a"): 0.01, ("second", "b"): 0.04}  # fmt: skip
    rows = [
        {"kind": kind, "effect": effect, "value": mean + shift, "part": part}
        for (effect, kind), mean in means.items()
        for part, shift in enumerate((-0.001, 0.0, 0.001))
    ]
    overall = {"first": 2.0, "shared": 0.1, "second": 0.02}
    chart = charts.ablation_matrix(rows, overall=overall, overall_is="all", apart="first")
    left, right = chart.to_dict()["hconcat"]
    (cells,) = all_values(right)
    assert {(cell["effect"], cell["kind"]): cell["value"] for cell in cells} == pytest.approx(means)
    assert {(c["effect"], c["kind"]) for c in cells if c["framed"]} == {("shared", "a"), ("second", "b")}
    assert next(c["text"] for c in cells if (c["effect"], c["kind"]) == ("shared", "b")) == "0.000"
    assert {cell["interval"] for cell in cells} == {" ± 0.002"}  # t(0.975, 2) * 0.001 / sqrt(3)
    (at_left,) = all_values(left)
    assert {cell["effect"]: cell["value"] for cell in at_left} == overall
    assert [cell["effect"] for cell in at_left if cell["framed"]] == ["shared"]
    for panel in (left, right):
        boxes, frames, numbers = panel["layer"]
        scale = boxes["encoding"]["color"]["scale"]
        assert (scale["type"], scale["domain"]) == ("sqrt", [0.0, 4.0])
        assert frames["transform"] == [{"filter": "datum.framed"}]
        deep_from = numbers["encoding"]["color"]["condition"]["test"]
        assert deep_from == f"datum.value > {theme.DEEP_FROM**2 * 4:.4g}"
        assert boxes["encoding"]["y"]["sort"] == ["first", "shared", "second"]
    assert "Largest apart from first: all shared 0.100, a shared 0.250 and b second 0.040." in chart.description
    close = [row | {"value": 0.02} if row["effect"] != "first" and row["part"] == 0 else row for row in rows]
    tied = charts.ablation_matrix(close, overall=overall, apart="first").to_dict()["hconcat"][1]
    (cells,) = all_values(tied)
    assert not any(cell["framed"] for cell in cells if cell["kind"] == "b")  # the lead is within the spread of parts
    widths = [panel["width"] for panel in (left, right)]
    assert widths[1] == 2 * widths[0]
    everything = charts.ablation_matrix(rows, overall=overall).to_dict()
    (cells,) = all_values(everything["hconcat"][1])
    assert {cell["effect"] for cell in cells if cell["framed"]} == {"first"}


def test_column_names_of_an_ablation_matrix_take_a_line_per_word_above_the_cells():
    def top_of_cells_and_lowest_name(kinds):
        rows = [{"kind": kind, "effect": "e", "value": 0.5} for kind in kinds]
        chart = charts.ablation_matrix(rows, overall={"e": 0.5}, overall_is="all")
        axes = [p["layer"][0]["encoding"]["x"]["axis"] for p in chart.to_dict()["hconcat"]]
        assert len({axis["labelPadding"] for axis in axes}) == 1  # names of both panels start at one height
        return axes[0]["labelPadding"]

    one_line, two_lines = (top_of_cells_and_lowest_name(kinds) for kinds in (["x", "y"], ["x", "y z"]))
    assert two_lines - one_line == ablation_matrix.LINE
    assert top_of_cells_and_lowest_name(["x", "incomprehensible"]) == two_lines  # a long word is broken


def test_effects_are_means_over_parts_and_the_largest_is_highlighted():
    rows = [
        {"kind": kind, "effect": "e", "value": value, "part": part}
        for kind, values in {"a": (1.0, 2.0, 3.0), "b": (4.0, 4.0, 7.0), "c": (-9.0, -9.0, -9.0)}.items()
        for part, value in enumerate(values)
    ]
    spec = charts.effects_by_kind(rows, overall={"e": 0.5}, number="+.1f").to_dict()
    marks = next(v for v in all_values(spec) if "largest" in v[0])
    assert [(mark["kind"], mark["text"], mark["largest"]) for mark in marks] == [
        ("a", "+2.0", False),
        ("b", "+5.0", True),
        ("c", "-9.0", False),
    ]
    assert marks[0]["high"] - 2.0 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2) = 4.302653, s = 1
    assert "all tokens +0.5, most for b +5.0" in spec["description"]


def test_zero_has_no_sign():
    assert [effects_by_kind._format(value, "+.2f") for value in (-0.001, 0.001, -0.01)] == ["0.00", "0.00", "-0.01"]


def test_ticks_are_round():
    for value, tick in ((0.5, 0.5), (0.49, 0.2), (1.0, 1.0), (9.99, 5.0), (0.0031, 0.002), (250.0, 200.0)):
        assert effects_by_kind._round_down(value) == pytest.approx(tick)


def test_tokens_wrap_inside_the_line_without_overlap():
    words = ["Norvania", " is", " a", " country", "\n", "and", " so", " on"] * 10
    cells = token_routing._layout(words, 300)
    for row in range(1 + max(cell["row"] for cell in cells)):
        line = [cell for cell in cells if cell["row"] == row]
        assert all(a["x2"] <= b["x"] for a, b in itertools.pairwise(line))
        assert all(cell["x2"] <= 300 for cell in line if cell["token"] != "↵")
    assert cells[5]["row"] == cells[4]["row"] + 1  # a line break in the text breaks the line


def test_a_dropped_token_is_struck_out_and_not_filled():
    layer = {"topk_ids": [[3, 1], [3, -1]], "gates": [[0.7, 0.3], [0.8, 0.0]], "kept": [[False, True], [True, False]]}
    spec = charts.token_routing(["drop", "keep"], [layer], focus=3).to_dict()
    picture = svg(renderer.stable(spec))
    assert "×e3 e1" in picture
    without_drops = svg(
        renderer.stable(charts.token_routing(["a", "b"], [{**layer, "kept": [[True] * 2] * 2}], focus=3).to_dict())
    )
    assert picture.count("stroke-dasharray") == 1
    assert without_drops.count("stroke-dasharray") == 0
    assert 'fill="rgb(244, 247, 250)"' in picture or theme.LIGHT["ramp1"].lower() in picture.lower()


SETTING = {"tokens": 1024, "bandwidth": 50.0, "schedule": "in turn"}
SCALED = {"model": "a", "devices": 8, "value": 0.5, **SETTING}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: charts.training_curves([]), "at least one row"),
        (lambda: charts.exchange_matrix([[1, 2], [3]]), "as many rows as columns"),
        (lambda: charts.exchange_matrix([[1, -2], [3, 4]]), "0 or above"),
        (lambda: charts.link_timeline([{"lane": "a", "group": "b", "what": "c", "start": 0}]), "no 'end'"),
        (lambda: charts.scaling_curve([{**SCALED, "value": 1.2}], **SETTING), "a share, 0 to 1"),
        (lambda: charts.training_curves([{"model": "a", "step": 1}]), "no 'loss'"),
        (lambda: charts.expert_load([]), "at least one expert"),
        (lambda: charts.finer_experts(top_k=17), "top_k = 17"),
        (lambda: charts.token_routing([], []), "tokens"),
        (lambda: charts.token_routing(["a"] * 81, []), "tokens"),
        (lambda: charts.token_routing(["a"], [{"topk_ids": [[0], [1]], "gates": [[1.0]]}]), "topk_ids"),
        (lambda: charts.effects_by_kind([{"kind": "k", "effect": "e", "value": 1.0}], overall={"f": 1.0}), "overall"),
        (
            lambda: charts.effects_by_kind([{"kind": "k", "effect": e, "value": 1.0} for e in range(5)], overall={}),
            "effects = 5",
        ),
        (lambda: charts.ablation_matrix([{"kind": "k", "effect": "e", "value": 1}], overall={"f": 1}), "'e'"),
        (
            lambda: charts.ablation_matrix([{"kind": "k", "effect": "e", "value": 1}], overall={"e": 1}, apart="f"),
            "apart = 'f': must be one of e",
        ),
        (
            lambda: charts.ablation_matrix(
                [{"kind": str(k), "effect": "e", "value": 1} for k in range(20)], overall={"e": 1}
            ),
            "kinds = 20",
        ),
        (lambda: charts.loss_table([{"loss": "z", "routing": "a", "value": 1.0}], balanced="b"), "balanced = 'b'"),
        (lambda: charts.expert_worth([{"model": "a", "expert": 0, "counted": 1.0}]), "no 'worth'"),
        (
            lambda: charts.expert_worth([{"model": m, "expert": 0, "counted": 1, "worth": 1} for m in "abcde"]),
            "models = 5: at most 4 panels",
        ),
        (
            lambda: charts.reach_curve([{"scores": i, "limit": 1, "reached": 1, "affinity": 1} for i in range(5)]),
            "scores = 5",
        ),
        (lambda: charts.parameter_split([{"model": "m", "component": i, "total": 1} for i in range(10)]), "components"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_layer_with_a_filter_is_drawn() -> None:
    """Vega derives tables called data_0, data_1 from one that is filtered in a layer: ours has another name."""
    base = alt.Chart(pd.DataFrame({"x": [1, 2, 3], "y": [2, 4, 8]})).encode(x="x", y="y")
    chart = base.mark_line() + base.transform_filter("datum.x == 3").mark_text(dx=9).encode(text="y")
    bundle, _ = renderer.bundle(chart.properties(description="A line that has its last value at its end.").to_dict())
    assert list(bundle[renderer.MIME]["datasets"]) == ["rows_1"]
    assert bundle["image/png"]
