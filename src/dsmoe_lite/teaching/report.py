"""The picture of a report: one metric by groups, with every run."""

from collections.abc import Sequence
from pathlib import Path

from dsmoe_lite.common.errors import require
from dsmoe_lite.common.files import atomic_write
from dsmoe_lite.teaching.results import Results, summary

FORMATS = (".svg", ".png")


def draw(results: Results, metric: str, by: Sequence[str], path: Path) -> None:
    """Draw a ring per run, and mean and 95% interval per group, to an .svg or .png file."""
    require(path.suffix in FORMATS, "chart", str(path), f"must end in {' or '.join(FORMATS)}")
    import vl_convert

    from dsmoe_lite.viz import charts, renderer

    order = [tuple(row[name] for name in by) for row in summary(results, metric, by)]
    values = sorted(
        ((tuple(row[name] for name in by), float(row[metric])) for row in results.rows if row[metric] is not None),
        key=lambda pair: order.index(pair[0]),
    )
    chart = charts.model_comparison(
        [
            {"model": ", ".join(f"{n} = {v}" for n, v in zip(by, group, strict=True)) or "all runs", "seed": number,
             "metric": metric, "value": value}
            for number, (group, value) in enumerate(values)
        ],
        title=metric,
        subtitle="Ring: one run. Dot and bar: mean and its 95% interval.",
    )  # fmt: skip
    spec = renderer.stable(chart.to_dict())
    with atomic_write(path) as temporary:
        if path.suffix == ".svg":
            svg = vl_convert.vegalite_to_svg(spec, vl_version=renderer.VEGALITE)
            temporary.write_text(svg, encoding="utf-8")
        else:
            temporary.write_bytes(vl_convert.vegalite_to_png(spec, vl_version=renderer.VEGALITE, scale=2))
