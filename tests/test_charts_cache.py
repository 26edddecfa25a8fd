"""Charts of the KV cache and of long contexts: the marks have the values of the rows and the controls."""

import itertools
import json
import re

import chart_samples
import pytest
from test_charts_routing import marks, svg, values

from dsmoe_lite.accounting import cache_rows, kv_cache_bytes
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, MLAConfig
from dsmoe_lite.family import FAMILY
from dsmoe_lite.viz import charts, identity, kv_cache, renderer, theme

BYTES = "cache of all sequences"


def bars(picture):
    """Exact bytes of each bar, by name, from top to bottom."""
    labelled = [mark for mark in marks(picture, BYTES) if "bytes" in mark]
    return {mark["name"]: int(float(mark["bytes"].replace(",", ""))) for mark in labelled}  # some as 7.21554505728e+12


def words(picture):
    return re.findall(r"<text[^>]*>([^<]*)<", picture)


def test_the_calculator_agrees_with_accounting_at_every_setting_of_its_controls():
    chart = charts.cache_calculator(cache_rows(FAMILY))
    assert {param["name"] for param in renderer.stable(chart.to_dict())["params"]} == {"context", "bits", "sequences"}
    kinds = {row["model"]: f"{row['model']} · {row['kind']}" for row in cache_rows(FAMILY)}
    for context, bits, sequences in ((131_072, 16, 1), (1024, 6, 1), (4096, 4, 3), (32_768, 32, 64)):
        drawn = bars(svg(chart, context=context, bits=bits, sequences=sequences))
        counted = {kinds[name]: kv_cache_bytes(c, context, bits, sequences) for name, c in FAMILY.items()}
        assert drawn == pytest.approx(counted, rel=1e-11)
        assert list(drawn.values()) == sorted(drawn.values(), reverse=True)
        assert len(drawn) == len(FAMILY)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(1, "1 B"), (999, "999 B"), (1000, "1 KB"), (70_272, "70.3 KB"), (9.21e9, "9.21 GB"), (80e9, "80 GB"),
     (99.96e6, "100 MB"), (9.996e6, "10 MB"), (524e9, "524 GB"), (1e12, "1 TB"), (33.54e12, "33.5 TB"), (2e15, "2 PB")],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_unit(amount, text):
    assert kv_cache._size(amount) == text


def test_python_and_the_chart_write_sizes_in_the_same_form():
    rows = [{"model": f"m{i}", "kind": "MHA", "elements_per_token": 3**i} for i in range(20)]
    chart = charts.cache_calculator(rows, context=2048, bits=32, sequences=5)
    picture = svg(chart)
    written = {mark["name"]: mark["text"] for mark in marks(picture, BYTES) if "text" in mark}
    assert written == {name: kv_cache._size(amount) for name, amount in bars(picture).items()}
    assert all(f"{name} {text}" in chart.to_dict()["description"] for name, text in written.items())
    assert len({text.split()[1] for text in written.values()}) >= 3


def rules(picture):
    """The names at the memory lines."""
    return [mark["name"] for mark in marks(picture, BYTES) if set(mark) == {BYTES, "name"}]


def test_the_memory_line_appears_once_the_largest_cache_is_a_quarter_of_it():
    rows = [{"model": "m", "kind": "GQA", "elements_per_token": 100_000}]
    chart = charts.cache_calculator(rows, memory=80e9)
    seen = {n: rules(svg(chart, context=131_072, bits=8, sequences=n)) for n in (1, 2, 64)}
    assert seen == {1: [], 2: ["80 GB"], 64: ["80 GB"]}  # 13.1, 26.2 and 839 GB
    assert rules(svg(charts.cache_calculator(rows, memory=None), sequences=64)) == []
    assert "80 GB" in chart.to_dict()["title"]["subtitle"][1]


def colours(picture, first):
    """The fill of each named bar."""
    fills = re.findall(
        rf'<path aria-label="({first}: [^"]*)"[^>]*aria-roledescription="bar"[^>]*fill="([^"]*)"', picture
    )
    return {re.search(r"(?:name|kind): ([^;]*)", label)[1]: fill.upper() for label, fill in fills}


def test_each_kind_has_the_same_colour_in_both_charts():
    kinds = dict(zip(kv_cache.KINDS, identity.colors(kv_cache.KINDS), strict=True))
    one = [{"model": "m", "kind": "MLA", "elements_per_token": 7}]
    assert colours(svg(charts.cache_calculator(one)), BYTES) == {"m · MLA": kinds["MLA"]}
    assert colours(svg(charts.cache_by_design()), "numbers per token and layer") == kinds


@pytest.mark.parametrize(("heads", "groups"), [(128, 8), (8, 1), (24, 4), (64, 2)])
@pytest.mark.parametrize("d", [128, 12])
def test_designs_cache_as_much_as_the_configs(heads, groups, d):
    picture = svg(charts.cache_by_design(head_dim=d), heads=heads, groups=groups)
    drawn = {mark["kind"]: mark["text"] for mark in marks(picture, "numbers per token and layer") if "kind" in mark}
    attention = {
        "MHA": AttentionConfig(n_heads=heads, head_dim=d),
        "GQA": AttentionConfig(n_heads=heads, head_dim=d, n_kv_heads=groups),
        "MQA": AttentionConfig(n_heads=heads, head_dim=d, n_kv_heads=1),
        "MLA": MLAConfig(n_heads=heads, qk_nope_head_dim=d, qk_rope_head_dim=d // 2, v_head_dim=d, kv_lora_rank=4 * d),
    }
    for kind, config in attention.items():
        assert int(re.search(r"= ([\d,]+)", drawn[kind])[1].replace(",", "")) == config.cache_width
        share = re.search(r"([\d.]+)% of MHA$", drawn[kind])
        assert (share is None) == (kind == "MHA")
        if share is not None:
            mha_width = attention["MHA"].cache_width
            assert float(share[1]) == pytest.approx(100 * config.cache_width / mha_width, rel=6e-3)


def test_only_mha_depends_on_heads_and_the_axis_is_fixed():
    pictures = {heads: svg(charts.cache_by_design(), heads=heads) for heads in (8, 128)}
    lengths = {
        heads: {
            mark["kind"]: mark["numbers per token and layer"] for mark in marks(picture, "numbers per token and layer")
        }
        for heads, picture in pictures.items()
    }
    changed = {kind for kind in kv_cache.KINDS if lengths[8][kind] != lengths[128][kind]}
    assert changed == {"MHA"}
    axes = {re.search(r"linear scale with values from ([^\"]*)\"", picture)[1] for picture in pictures.values()}
    assert axes == {"0 to 32,768"}


def test_decode_cost_is_the_median_run():
    rows = [{"method": "m", "context": 1024, "milliseconds": ms} for ms in (4.0, 1.0, 2.0)]
    rows += [{"method": "m", "context": 4096, "milliseconds": 8.0}]
    chart = charts.decode_cost(rows)
    spec = chart.to_dict()
    points = values(spec, "ms")
    assert [(p["context"], p["ms"], p["low"], p["high"]) for p in points] == [
        (1024, 2.0, 1.0, 4.0),
        (4096, 8.0, 8.0, 8.0),
    ]
    assert "median of 3 runs" in spec["title"]["subtitle"][0]
    assert "m 8 ms at 4,096" in spec["description"]
    assert "median" not in json.dumps(charts.decode_cost(rows[2:]).to_dict()["title"])


def test_labels_of_equal_costs_do_not_overlap():
    rows = [{"method": f"method {i}", "context": c, "milliseconds": 1.0} for i in range(4) for c in (1024, 2048)]
    picture = svg(charts.decode_cost(rows))
    heights = [float(y) for y in re.findall(r'translate\([-\d.]+,([-\d.]+)\)"[^>]*>method \d 1 ms<', picture)]
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(sorted(heights))) >= kv_cache.LABEL_GAP - 0.5
    assert "1K" in words(picture)
    dashes = {" ".join(map(str, dash)) for dash in theme.DASHES}
    assert len(dashes) == 4
    assert picture.count('aria-roledescription="line mark"') == 4


def test_a_line_that_ends_early_is_labelled_at_its_end():
    rows = [{"method": m, "context": c, "milliseconds": c / 1024} for m, top in (("a", 3), ("b", 5))
            for c in (1024 * n for n in range(1, top))]  # fmt: skip
    labels = {row["text"]: row["context"] for row in values(charts.decode_cost(rows).to_dict(), "text")}
    assert labels == {"a 2 ms": 2048, "b 4 ms": 4096}


def test_each_cell_is_the_mean_over_seeds_at_its_depth_and_length():
    rows = [{"kind": "k", "length": n, "depth": d, "recall": recall, "seed": seed}
            for (n, d), recalls in {(64, 0.0): (1.0, 0.5), (64, 1.0): (0.0, 0.0), (256, 0.0): (0.25, 0.5)}.items()
            for seed, recall in enumerate(recalls)]  # fmt: skip
    chart = charts.needle(rows)
    drawn = {(c["length"], c["depth"]): c["recall"] for c in values(chart.to_dict(), "recall")}
    assert drawn == {("64", "0"): 0.75, ("64", "100"): 0.0, ("256", "0"): 0.375}
    picture = svg(chart)
    assert "mean of 2 seeds" in " ".join(words(picture))
    numbers = re.findall(r'fill="([^"]*)"[^>]*>(\d+)</text>', picture)
    of_cells = {text: fill.upper() for fill, text in numbers if fill.upper() in
                (theme.LIGHT["on_pale"], theme.LIGHT["on_deep"])}  # fmt: skip
    assert of_cells == {"75": theme.LIGHT["on_deep"], "0": theme.LIGHT["on_pale"], "38": theme.LIGHT["on_pale"]}
    assert "lowest 0% at 64 tokens, depth 100%" in chart.to_dict()["description"]


def test_every_kind_has_a_panel_with_the_same_cells():
    rows = chart_samples.needle_rows(("a", "b", "c", "d"), 3, 1)
    spec = charts.needle(rows).to_dict()
    assert len(spec["concat"]) == 4
    assert [values(panel["layer"][2], "kind") for panel in spec["concat"]] == [[{"kind": kind}] for kind in "abcd"]
    for panel in spec["concat"]:
        encoding = panel["layer"][0]["encoding"]
        assert encoding["x"]["scale"]["domain"] == ["0", "50", "100"]
        assert encoding["y"]["scale"]["domain"] == ["256", "512", "1,024", "2,048"]
    picture = svg(charts.needle(rows))
    heads = {name: float(y) for y, name in re.findall(r'translate\([-\d.]+,([-\d.]+)\)"[^>]*>([abcd])</text>', picture)}
    assert len(heads) == 4


@pytest.mark.parametrize(("kinds", "depths"), [(1, 1), (3, 5), (6, 1), (4, 10)])
def test_cells_are_wide_enough_for_their_number_and_the_chart_is_not_too_wide(kinds, depths):
    rows = [{"kind": f"k{k}", "length": 131_072, "depth": d / 10, "recall": 1.0, "seed": 0}
            for k in range(kinds) for d in range(depths)]  # fmt: skip
    spec = charts.needle(rows).to_dict()
    for panel in spec["concat"]:
        assert panel["width"] / depths >= 25
    assert float(re.search(r'width="([\d.]+)"', svg(charts.needle(rows)))[1]) <= theme.MAX_WIDTH


def test_long_names_and_many_models_stay_inside_the_page():
    rows = [{"model": f"a model with a name that is quite long {i}", "kind": "GQA", "elements_per_token": 3**i}
            for i in range(1, 21)]  # fmt: skip
    assert float(re.search(r'width="([\d.]+)"', svg(charts.cache_calculator(rows)))[1]) <= theme.MAX_WIDTH
    cost = [{"method": f"method with a long name {i}", "context": 1024, "milliseconds": 1234.5} for i in range(4)]
    assert float(re.search(r'width="([\d.]+)"', svg(charts.decode_cost(cost)))[1]) <= theme.MAX_WIDTH


MODEL = {"model": "m", "kind": "MLA", "elements_per_token": 5}
COST = {"method": "m", "context": 1024, "milliseconds": 1.0}
FOUND = {"kind": "k", "length": 64, "depth": 0.5, "recall": 1.0, "seed": 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: charts.cache_calculator([]), "at least one row"),
        (lambda: charts.cache_calculator([{"model": "m", "kind": "MLA"}]), "no 'elements_per_token'"),
        (lambda: charts.cache_calculator([{**MODEL, "kind": "XYZ"}]), "kind = 'XYZ': must be one of MHA, GQA"),
        (lambda: charts.cache_calculator([{**MODEL, "elements_per_token": 0.5}]), "elements_per_token = 0.5"),
        (lambda: charts.cache_calculator([MODEL] * 2), "models = 2: two of them"),
        (lambda: charts.cache_calculator([{**MODEL, "model": i} for i in range(21)]), "models = 21"),
        (lambda: charts.cache_calculator([MODEL], context=1000), "context = 1000: must be one of 1024, 2048"),
        (lambda: charts.cache_calculator([MODEL], bits=5), "bits = 5"),
        (lambda: charts.cache_calculator([MODEL], sequences=65), "sequences = 65"),
        (lambda: charts.cache_calculator([MODEL], memory=0), "memory = 0"),
        (lambda: charts.cache_by_design(heads=12), "heads = 12: must be a multiple of 8"),
        (lambda: charts.cache_by_design(heads=136), "heads = 136"),
        (lambda: charts.cache_by_design(groups=3), "groups = 3"),
        (lambda: charts.cache_by_design(head_dim=7), "head_dim = 7"),
        (lambda: charts.decode_cost([{"method": "m", "context": 8}]), "no 'milliseconds'"),
        (lambda: charts.decode_cost([{**COST, "method": str(i)} for i in range(5)]), "methods = 5"),
        (lambda: charts.decode_cost([{**COST, "milliseconds": 0.0}]), "milliseconds = 0.0"),
        (lambda: charts.decode_cost([{**COST, "context": 0}]), "context = 0"),
        (lambda: charts.rotary_frequencies(channels=7), "channels = 7: must be even"),
        (lambda: charts.rotary_frequencies(factor=0), "factor = 0"),
        (lambda: charts.rotary_frequencies(trained=1000), "trained = 1000: must be a multiple of 512"),
        (lambda: charts.rotary_frequencies(theta=1.0), "theta = 1.0"),
        (lambda: charts.needle([{"kind": "k", "length": 64, "depth": 0.5, "recall": 1.0}]), "no 'seed'"),
        (lambda: charts.needle([{**FOUND, "depth": 1.5}]), "depth = 1.5"),
        (lambda: charts.needle([{**FOUND, "recall": 50}]), "recall = 50"),
        (lambda: charts.needle([{**FOUND, "length": 0}]), "length = 0"),
        (lambda: charts.needle([{**FOUND, "depth": i / 10} for i in range(11)]), "depths = 11"),
        (lambda: charts.needle([{**FOUND, "length": i} for i in range(1, 14)]), "lengths = 13"),
        (lambda: charts.needle([{**FOUND, "kind": str(i)} for i in range(7)]), "kinds = 7"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
