"""The picture of a report: one metric by groups, with every run."""

from collections.abc import Sequence
from pathlib import Path

from dsmoe_lite.common.errors import require, require_int
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.teaching.results import Results, summary

FORMATS = (".svg", ".png")
MOST_GROUPS = 30  # rows of the picture


def draw(results: Results, metric: str, by: Sequence[str], path: Path) -> None:
    """Draw mean and 95% interval of each group, and a ring per run, to an .svg or .png file, atomically."""
    require(path.suffix in FORMATS, "chart", str(path), f"must end in {' or '.join(FORMATS)}")
    import vl_convert

    from dsmoe_lite.viz import charts, renderer

    groups = [group.values for group in summary(results, metric, by)]
    require_int("groups of the chart", len(groups), 1, MOST_GROUPS)
    names = {values: ", ".join(map(str, values)) or "all runs" for values in groups}
    runs = [(tuple(row[name] for name in by), row[metric]) for row in results.rows if row[metric] is not None]
    chart = charts.model_comparison(
        [
            {"model": names[values], "seed": number, "metric": metric, "value": float(value)}
            for number, (values, value) in enumerate(sorted(runs, key=lambda run: groups.index(run[0])))
        ],
        title=f"By {', '.join(by)}" if by else "All runs",
        subtitle="Ring: one run. Dot and bar: mean and its 95% interval. A group of one run is a dot.",
    )
    spec = renderer.stable(chart.to_dict())
    with atomic_write(path) as temporary:
        if path.suffix == ".svg":
            svg = vl_convert.vegalite_to_svg(spec, vl_version=renderer.VEGALITE)
            temporary.write_text(svg, encoding="utf-8")
        else:
            temporary.write_bytes(vl_convert.vegalite_to_png(spec, vl_version=renderer.VEGALITE, scale=2))
