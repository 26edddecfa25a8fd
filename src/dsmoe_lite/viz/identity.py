"""One colour per model and per component through the whole course; names without one get a neutral series.

Variants of a model share its hue: the first is drawn in the full colour, the others in its tint.
"""

import re
from collections.abc import Sequence

from dsmoe_lite.viz import theme

MODELS = {  # pattern of a name: role of the colour; the first pattern that matches counts
    r"\bhash\b": "hash",
    r"\bswitch\b(?! \d)": "switch",  # "Switch 0.01" is a loss
    r"gshard|\btop-2\b|^x1\.5\b|\b0\+2-of-16\b": "gshard",
    r"\bhalf active\b": "deepseekmoe_tint",
    r"deepseekmoe\b(?!-)|\b1\+7-of-63\b": "deepseekmoe",
    r"\bdense\b": "dense",
    r"\bMHA\b": "mha",
    r"\bGQA\b": "gqa",
    r"\bMQA\b": "mqa",
    r"\bMLA\b": "mla",
}
COMPONENTS = {
    "embeddings": "part1",
    "output head": "part2",
    "attention": "part3",
    "attention scores": "part4",
    "FFN": "part5",
    "norms": "part6",
    "router": "part7",
    "routed experts": "part8",
    "shared experts": "part9",
}


def model(name: str) -> str | None:
    """Return the role of the model that a name means, without its tint, or None."""
    role = _role(name)
    return role and role.removesuffix("_tint")


def _role(name: str) -> str | None:
    return next((role for pattern, role in MODELS.items() if re.search(pattern, name, re.IGNORECASE)), None)


def roles(names: Sequence[str], *, alike: bool = False) -> list[str]:
    """Return a role of the theme per name. Names of no model get line1, line2 and so on, or all line1 if `alike`."""
    found: list[str] = []
    neutral = 0
    for name in names:
        role = _role(name)
        if role is None:
            found.append(f"line{1 if alike else 1 + neutral % theme.N_LINES}")
            neutral += 1
        else:
            found.append(f"{role}_tint" if role in found and not role.endswith("_tint") else role)
    return found


def colors(names: Sequence[str], *, alike: bool = False) -> list[str]:
    """Return the colours of lines, dots and bars."""
    return [theme.LIGHT[role] for role in roles(names, alike=alike)]


def label_colors(names: Sequence[str]) -> list[str]:
    """Return the colours of text beside lines of these names."""
    return [theme.LIGHT[f"{role.removesuffix('_tint')}_label"] for role in roles(names)]


def component_colors(names: Sequence[str]) -> list[str]:
    """Return the fills of the components of a model; a name that is no component gets a fill that is left over."""
    left = (role for name, role in COMPONENTS.items() if name not in names)
    return [theme.LIGHT[COMPONENTS.get(name) or next(left)] for name in names]
