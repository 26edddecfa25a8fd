"""Charts with a slider or menu and no kernel: at every setting they draw the numbers of the package."""

import math
import re
from statistics import mean

import chart_samples
import pytest
import torch
from test_charts_routing import marks, svg

from dsmoe_lite import preset
from dsmoe_lite.accounting import split_rows
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import YarnConfig
from dsmoe_lite.kernels.work import grouped_product
from dsmoe_lite.layers.rope import rope_frequencies, yarn_range
from dsmoe_lite.viz import charts, finer_experts, renderer, theme
from dsmoe_lite.viz.controls import Control


def control(chart, name):
    """The slider or menu of one parameter, as it is stored."""
    (param,) = [one for one in renderer.stable(chart.to_dict())["params"] if one["name"] == name]
    return {**param["bind"], "value": param["value"]}


def words(picture):
    return re.findall(r"<text[^>]*>([^<]*)<", picture)


@pytest.mark.parametrize(
    ("values", "kind"),
    [([512, 1024, 1536], "range"), ([-4.0, -3.5, -3.0], "range"), ([512, 1024, 4096], "select"), ([1, 2], "select"),
     (["in turn", "overlapped", "never"], "select")],
)  # fmt: skip
def test_evenly_spaced_values_get_a_slider_and_others_a_menu(values, kind):
    choice = Control("value", "Value,", values[0])
    bind = choice.param([{"value": value} for value in values]).param.bind.to_dict()
    assert bind["input"] == kind
    assert bind["name"] == "Value, "


@pytest.mark.parametrize(("low", "base", "value"), [(1, 2, 1024), (0.0003, 10, 0.003)])
def test_a_logarithmic_slider_starts_on_a_step(low, base, value):
    rows = [{"n": low * base**power} for power in range(12)]
    param = Control("n", "Number", value, base=base).param(rows).param.to_dict()
    steps = (param["value"] - param["bind"]["min"]) / param["bind"]["step"]
    assert param["bind"]["input"] == "range"
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert base ** param["value"] == pytest.approx(value, rel=2e-3)


def test_a_control_starts_at_one_of_its_values():
    with pytest.raises(InputError, match="length = 3: must be one of 1, 2, 4"):
        Control("length", "Length", 3).values([{"length": n} for n in (4, 2, 1)])


def test_a_bias_speed_draws_its_own_trace_and_end():
    rows = chart_samples.bias_rows()
    chart = charts.bias_speed(rows, speed=0.001, last=20)
    slider = control(chart, "log_speed")
    assert (slider["min"], slider["max"], slider["step"], slider["value"]) == (-4, -2, 0.5, -3)
    for exponent in (-4, -3.5, -3, -2.5, -2):
        vios = [row["max_vio"] for row in rows if abs(row["speed"] - 10**exponent) < 1e-9]
        picture = svg(chart, log_speed=exponent)
        (text,) = [word for word in words(picture) if word.startswith("γ = ")]
        assert text == f"γ = {10**exponent:.2g}: MaxVio {mean(vios[-20:]):.2f} at the end"
        (big,) = [mark for mark in marks(picture, "bias speed γ .log scale.") if "γ" in mark][-1:]
        assert float(big["MaxVio at the end"]) == pytest.approx(mean(vios[-20:]), rel=1e-3)


def test_an_outlier_draws_the_errors_beside_it():
    rows = chart_samples.outlier_rows()
    chart = charts.fp8_error(rows, outlier=1e4)
    slider = control(chart, "log_outlier")
    assert (slider["min"], slider["max"], slider["step"], slider["value"]) == (0, 8, 1, 4)
    for power in range(9):
        percents = [100 * row["error"] for row in rows if row["outlier"] == 10.0**power]
        shown = [word for word in words(svg(chart, log_outlier=power)) if word.endswith("%")][-3:]
        assert [float(word.removesuffix("%")) for word in shown] == pytest.approx(percents, rel=0.05)
        assert not any("e" in word for word in shown)
    with pytest.raises(InputError, match=r"error = 0\.0: must be above 0"):
        charts.fp8_error([{**rows[0], "error": 0.0}], outlier=1.0)


def test_a_token_fills_as_many_squares_as_it_uses_experts_inside_its_groups():
    models = {name: preset(name).moe for name in ("deepseek-v2", "deepseek-v3", "course-v4", "mixtral-8x7B")}
    chart = charts.router_choice(models, model="deepseek-v3", n_tokens=3)
    assert control(chart, "model")["value"] == "deepseek-v3"
    assert [control(chart, "token")[key] for key in ("min", "max", "value")] == [1, 3, 1]
    for name, moe in models.items():
        seen = set()
        for token in (1, 2, 3):
            picture = svg(chart, model=name, token=token)
            squares = [mark for mark in marks(picture, "x") if "expert" in mark]
            drawn = [int(mark["expert"].removeprefix("e")) for mark in squares]
            assert sorted(drawn[: moe.n_routed_experts]) == list(range(moe.n_routed_experts))
            assert len({(mark["x"], mark["y"]) for mark in squares}) == moe.n_routed_experts
            chosen = drawn[moe.n_routed_experts :]
            assert all(mark in squares[: moe.n_routed_experts] for mark in squares[moe.n_routed_experts :])
            assert len(set(chosen)) == len(chosen) == moe.top_k
            seen.add(tuple(chosen))
            groups = {expert * moe.n_group // moe.n_routed_experts for expert in chosen}
            assert len(groups) <= moe.topk_group
            assert f">{moe.top_k} of {moe.n_routed_experts}" in picture
        assert len(seen) == 3
    with pytest.raises(InputError, match="router of course-hash = 'hash'"):
        charts.router_choice({"course-hash": preset("course-hash").moe}, model="course-hash")
    with pytest.raises(InputError, match="model = 'V5'"):
        charts.router_choice(models, model="V5")


def test_a_step_of_the_bias_is_drawn_for_the_chosen_number_of_experts():
    rows = chart_samples.step_rows()
    chart = charts.bias_step(rows, experts=64)
    menu = control(chart, "experts")
    assert (menu["options"], menu["value"]) == ([16, 64, 256], 64)
    assert "sigmoid 10.24% and root of softplus 0.16%" in chart.to_dict()["description"]
    for experts in (16, 64, 256):
        picture = svg(chart, experts=experts)
        assert {"sigmoid", "root of softplus"} <= set(words(picture))
        assert len([word for word in words(picture) if word == "sigmoid"]) == 1
    with pytest.raises(InputError, match=r"growth = 0\.0: must be above 0"):
        charts.bias_step([{**rows[0], "growth": 0.0}], experts=16)


def test_an_expert_is_full_where_the_package_says_so():
    loads, rows = chart_samples.CAPACITY_LOADS, chart_samples.capacity_rows()
    chart = charts.expert_capacity(loads, rows, factor=1.25)
    slider = control(chart, "capacity_factor")
    assert (slider["min"], slider["max"], slider["step"], slider["value"]) == (0.5, 2, 0.25, 1.25)
    for row in rows:
        picture = svg(chart, capacity_factor=row["capacity_factor"])
        (text,) = [word for word in words(picture) if word.startswith("c = ")]
        c, slots, lost = row.values()
        assert text == f"c = {c:.3g}: {slots} slots each, {lost:.1%} dropped"
        bars = [mark for mark in marks(picture, "expert") if "dropped" in mark]
        drawn = {mark["expert"]: (int(mark["choices"]), int(mark["slots"]), int(mark["dropped"])) for mark in bars}
        assert drawn == {f"e{e}": (n, row["slots"], max(0, n - row["slots"])) for e, n in enumerate(loads)}


def test_flops_move_with_the_length_of_the_texts_as_they_are_counted():
    chart = charts.parameter_split(chart_samples.length_rows(), shares=True, seq_len=2048)
    assert [control(chart, "log_seq_len")[key] for key in ("min", "max", "step", "value")] == [9, 17, 1, 11]
    for power in (9, 11, 17):
        picture = svg(chart, log_seq_len=power)
        counted = {row["component"]: row["flops"] for row in split_rows({"": (preset("course-dense"), 2**power)})}
        counted = {name: flops / sum(counted.values()) for name, flops in counted.items() if flops}
        bars = [mark for mark in marks(picture, "x0") if mark.get("model") == "dense"]
        drawn = {mark["component"]: float(mark["share"].rstrip("%")) / 100 for mark in bars[-len(counted) :]}
        assert drawn == pytest.approx(counted, abs=6e-4)
        assert f"FLOPs per token, forward: S = {2**power:,} tokens" in words(picture)


def test_devices_by_chance_are_read_at_the_chosen_number_of_experts():
    chart = charts.reach_by_chance(chart_samples.chance_rows(), devices=8, top_k=6)
    assert [control(chart, "top_k")[key] for key in ("min", "max", "step", "value")] == [1, 16, 1, 6]
    for k in (1, 6, 16):
        drawn = torch.stack(
            [torch.randperm(64, generator=torch.Generator().manual_seed(i))[:k] // 8 for i in range(2000)]
        )
        counted = mean(len(set(devices)) for devices in drawn.tolist())
        (text,) = [word for word in words(svg(chart, top_k=k)) if word.endswith("of 8 devices")]
        assert float(text.split(": ")[1].split()[0]) == pytest.approx(counted, abs=0.11)


@pytest.mark.parametrize(("factor", "trained"), [(40, 4096), (1, 512), (128, 16_384), (7, 1536)])
def test_the_chart_of_yarn_computes_the_frequencies_of_the_package(factor, trained):
    picture = svg(charts.rotary_frequencies(), factor=factor, trained=trained)
    yarn = YarnConfig(factor=factor, original_max_len=trained)
    drawn = {(mark["kind"], int(mark["channel pair j"])): float(mark["wavelength"].replace(",", ""))
             for mark in marks(picture, "channel pair j") if "wavelength" in mark}  # fmt: skip
    for kind, of_kind in (("RoPE", None), ("YaRN", yarn)):
        wanted = (2 * math.pi / rope_frequencies(64, 10_000.0, of_kind)).tolist()
        assert [drawn[kind, j] for j in range(32)] == pytest.approx(wanted, rel=1e-3)
    low, high = yarn_range(64, 10_000.0, yarn)
    slower = f"pairs {high} to 31 turn {factor} times slower" if factor > 1 else "no pair is slowed down by all of s"
    said = {f"Pairs 0 to {low} keep their frequency", slower}
    levels = {f"trained on {trained:,} tokens", f"extended to {factor * trained:,} tokens"}
    assert said <= set(words(picture))
    assert {word for word in words(picture) if " tokens" in word and "per" not in word} == (
        levels if factor > 1 else {f"trained on {trained:,} tokens"}
    )


def test_points_of_a_batch_lie_where_its_products_do():
    chart = charts.roofline(chart_samples.token_points(), peak=989e12, bandwidth=3.35e12, tokens=1024)
    assert [control(chart, "log_tokens")[key] for key in ("min", "max", "step", "value")] == [0, 16, 1, 10]
    for power in (0, 10, 16):
        tokens, picture = 2**power, svg(chart, log_tokens=power)
        wanted = {"dense FFN": grouped_product(tokens, 1, 2048, 6 * 1408).intensity,
                  "6 of 64": grouped_product(6 * tokens, 64, 2048, 1408).intensity}  # fmt: skip
        points = re.findall(r"log scale.: ([\d.]+); FLOP/s [^:]*: [^;]+; name: ([^;]+);", picture)
        assert {name: float(x) for x, name in points} == pytest.approx(wanted, rel=1e-3)
        assert {"dense FFN", "6 of 64", f"tokens in a batch: {tokens:,}"} <= set(words(picture))


def test_every_piece_is_read_in_as_many_turns_as_it_shares_a_group():
    layouts = {"as it lies": [list(range(8))] * 8, "mixed": [[p ^ (r // 2) for p in range(8)] for r in range(8)]}
    chart = charts.bank_groups(layouts, 3)
    assert control(chart, "read")["value"] == 3
    for piece in (0, 3, 7):
        picture = svg(chart, read=piece)
        assert {"as it lies: 8 turns", "mixed: 2 turns"} <= set(words(picture))
        dark = [mark for mark in re.findall(r'<path aria-label="([^"]*)"[^>]*fill="([^"]*)"', picture)
                if mark[1].upper() == theme.RAMP[3]]  # fmt: skip
        assert len(dark) == 16
        assert all(f"piece: {piece}" in label for label, _ in dark)


def test_the_menus_of_the_scaling_curve_choose_its_rows():
    rows, start = chart_samples.scaling_rows(), {"tokens": 4096, "bandwidth": 50.0, "schedule": "in turn"}
    chart = charts.scaling_curve(rows, **start)
    assert {name: control(chart, name)["value"] for name in start} == start
    assert control(chart, "tokens")["options"] == [1024, 4096, 16_384]
    for setting in (start, {"tokens": 16_384, "bandwidth": 25.0, "schedule": "overlapped"}):
        points = [mark for mark in marks(svg(chart, **setting), "devices .log scale.") if "devices" in mark]
        drawn = {
            (mark["model"], int(mark["devices"].replace(",", ""))): mark["share of its best speed"] for mark in points
        }
        drawn = {key: float(share.removesuffix("%")) / 100 for key, share in drawn.items()}
        wanted = {(row["model"], row["devices"]): row["value"] for row in rows
                  if all(row[name] == value for name, value in setting.items())}  # fmt: skip
        assert drawn == pytest.approx(wanted, rel=1e-3)


def test_the_menu_of_the_timeline_chooses_its_bars():
    chart = chart_samples.every_chart()["link_timeline, bandwidth"]
    assert control(chart, "bandwidth")["options"] == [25, 50, 100]
    for bandwidth in (25, 50, 100):
        bars = [mark for mark in marks(svg(chart, bandwidth=bandwidth), "ms") if "end" in mark]
        drawn = {mark["lane"]: (float(mark["start"]), float(mark["end"])) for mark in bars}
        sent = 50 / bandwidth
        assert drawn == {"links": (0, sent), "units": (sent, 1 + sent)}


@pytest.mark.parametrize(("E", "K", "m"), [(16, 2, 4), (64, 16, 8), (37, 5, 3), (16, 16, 8)])
def test_finer_experts_are_counted_exactly_and_drawn_equally_long(E, K, m):
    picture = svg(charts.finer_experts(), n_experts=E, top_k=K, pieces=m)
    counts = {n: math.comb(n * E, n * K) for n in (1, 2, m)}
    exact = {f"C({n * E}, {n * K}) = {count:,}" for n, count in counts.items() if count < 1e12}
    large = {f"C({n * E}, {n * K}) = {count:.2e}".replace("+", "") for n, count in counts.items() if count >= 1e12}
    assert exact | large == {word for word in words(picture) if word.startswith("C(")}
    assert [f"m = {n}" for n in (1, 2, m)] == [word for word in words(picture) if word.startswith("m = ")]
    cells = [mark for mark in marks(picture, "start") if "state" in mark]
    for layer, pieces in enumerate((1, 2, m)):
        of_layer = [cell for cell in cells if cell["layer"] == str(layer)]
        assert len(of_layer) == pieces * E
        assert sum(cell["state"] == "used by one token" for cell in of_layer) == pieces * K
        assert max(float(cell["end"]) for cell in of_layer) == pytest.approx(finer_experts.LAYER_WIDTH, abs=2)


def test_products_of_fractions_count_combinations_to_the_last_digit():
    """What Vega computes in the chart, for every setting of its sliders."""
    sizes = {(E * m, K * m) for E in range(16, 65) for K in range(1, 17) for m in range(1, 9)}
    small = [(n, k) for n, k in sizes if math.comb(n, k) < finer_experts.ROUNDED_FROM]
    assert len(small) > 500
    for n, k in small:
        assert round(math.prod((n - k + i) / i for i in range(1, k + 1))) == math.comb(n, k)


def test_a_number_of_seeds_shows_its_own_effects_and_verdicts():
    chart = chart_samples.every_chart()["trend_intervals, seeds"]
    assert [control(chart, "seeds")[key] for key in ("min", "max", "step", "value")] == [8, 10, 1, 10]
    for n in (8, 9, 10):
        shown = {word for word in words(svg(chart, seeds=n)) if re.search(r", [+-]\d", word)}
        verdicts = ["holds", "leans"] if n > 8 else ["inconclusive"] * 2
        assert shown == {
            f"{verdict}, {mean * 8 / n:+.3f}" for verdict, mean in zip(verdicts, (0.0225, 0.01), strict=True)
        }
