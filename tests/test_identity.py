"""Colour is identity: through the whole course a colour of a model is used for that model and for nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dsmoe_lite.common import paths
from dsmoe_lite.viz import identity, theme
from dsmoe_lite.viz.renderer import MIME

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))
OWNER = {
    theme.LIGHT[f"{role}{suffix}"]: role
    for role in {role.removesuffix("_tint") for role in identity.MODELS.values()}
    for suffix in ("", "_tint", "_label")
}  # colour: its model
PART_OF = {theme.LIGHT[role]: name for name, role in identity.COMPONENTS.items()}


def scales(node: Any) -> Iterator[tuple[str, str]]:
    """The pairs (name, colour) of every colour scale of a spec."""
    if isinstance(node, dict):
        domain, colours = node.get("domain"), node.get("range")
        if isinstance(domain, list) and isinstance(colours, list):
            yield from ((str(name), str(colour)) for name, colour in zip(domain, colours, strict=False))
        for key, value in node.items():
            if key not in ("values", "datasets"):
                yield from scales(value)
    elif isinstance(node, list):
        for value in node:
            yield from scales(value)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_colour_names_one_model_in_every_chart(notebook: Path) -> None:
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", []):
            spec = output.get("data", {}).get(MIME, {})
            pairs = list(scales(spec))
            for name, colour in pairs:
                assert OWNER.get(colour) == identity.model(name) or colour not in theme.LIGHT.values(), (name, colour)
                if colour in PART_OF and name in identity.COMPONENTS:
                    assert PART_OF[colour] == name
            drawn = {key: value for key, value in spec.items() if key not in ("config", "datasets")}
            literal = [colour for colour in re.findall("#[0-9A-F]{6}", json.dumps(drawn)) if colour in OWNER]
            panels = [str((panel.get("title") or {}).get("text")) for panel in spec.get("hconcat", [])]
            if not any(map(identity.model, panels)):  # a panel of one model may be drawn in its colour
                assert len(literal) == sum(colour in OWNER for _, colour in pairs), spec.get("title")


def test_variants_share_a_hue_and_neutral_names_share_none() -> None:
    names = ["dense", "GShard top-2", "GShard, undivided", "DeepSeekMoE", "each batch", "Switch 0.01", "Switch top-1"]
    assert identity.roles(names) == [
        "dense", "gshard", "gshard_tint", "deepseekmoe", "line1", "line2", "switch"
    ]  # fmt: skip
    assert identity.roles(["half active", "DeepSeekMoE"]) == ["deepseekmoe_tint", "deepseekmoe"]
    assert identity.roles(["m = 1", "m = 2"], alike=True) == ["line1", "line1"]
    assert identity.roles(["MHA", "GQA, 2 groups", "MQA", "MLA naive", "MLA absorbed"]) == [
        "mha", "gqa", "mqa", "mla", "mla_tint"
    ]  # fmt: skip
    assert identity.label_colors(["MLA naive", "MLA absorbed"]) == [theme.LIGHT["mla_label"]] * 2


def test_a_component_keeps_its_fill_whatever_stands_beside_it() -> None:
    alone, all_of_them = identity.component_colors(["FFN"]), identity.component_colors(list(identity.COMPONENTS))
    assert alone[0] == all_of_them[list(identity.COMPONENTS).index("FFN")]
    assert len(set(identity.component_colors(["FFN", "one more", "another"]))) == 3


@pytest.mark.parametrize("name", ["deepseekmoe-16b · MHA", "DeepSeek-V3", "condensed", "half"])
def test_other_names_are_no_model_of_the_course(name: str) -> None:
    assert identity.model(name) in (None, "mha")
