"""The book's roles in words that JupyterLab shows: numbered equations, authors and years instead of keys."""

import re
from pathlib import Path
from typing import Any

LABELLED = re.compile(r"\$\$((?:(?!\$\$).)*)\$\$ \((eq:[\w-]+)\)", re.DOTALL)
REFERENCE = re.compile(r"\{eq\}`(eq:[\w-]+)`")
CITATION = re.compile(r"\{cite:([pt])\}`([\w,-]+)`")


def equation_numbers(sources: list[str], chapter: int) -> dict[str, str]:
    """Number the labelled equations of a chapter's markdown cells in order: {"eq:gate": "2.1"}."""
    labels = [label for source in sources for _, label in LABELLED.findall(source)]
    return {label: f"{chapter}.{place}" for place, label in enumerate(labels, start=1)}


def plain(source: str, numbers: dict[str, str], names: dict[str, tuple[str, str]]) -> str:
    """Rewrite one markdown cell; `names` maps a citation key to (authors, year). What is not known stays as it is."""

    def equation(match: re.Match[str]) -> str:
        return f"$${match[1].rstrip()}\n\\tag{{{numbers[match[2]]}}}\n$$"

    def reference(match: re.Match[str]) -> str:
        return f"Eq. ({numbers[match[1]]})" if match[1] in numbers else match[0]

    def citation(match: re.Match[str]) -> str:
        found = [names[key] for key in match[2].split(",") if key in names]
        if match[1] == "p":
            return "(" + "; ".join(f"{authors}, {year}" for authors, year in found) + ")" if found else match[0]
        return ", ".join(f"{authors} ({year})" for authors, year in found) or match[0]

    return CITATION.sub(citation, REFERENCE.sub(reference, LABELLED.sub(equation, source)))


def make_plain(notebook: dict[str, Any], siblings: dict[int, dict[str, Any]], bibliography: Path) -> None:
    """Rewrite the markdown cells of a notebook (as JSON, in place); `siblings`: all chapters by number."""
    numbers: dict[str, str] = {}
    for chapter, sibling in siblings.items():
        numbers |= equation_numbers(_markdown(sibling), chapter)
    names = citation_names(bibliography) if bibliography.exists() else {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = plain("".join(cell["source"]), numbers, names)


def citation_names(bibliography: Path) -> dict[str, tuple[str, str]]:
    """Authors and year of every entry: ("Lepikhin et al.", "2021"), ("Zhang and Sennrich", "2019")."""
    from pybtex.database import parse_file

    found = {}
    for key, entry in parse_file(str(bibliography)).entries.items():
        last = [" ".join(person.last_names).strip("{}") for person in entry.persons["author"]]
        authors = " and ".join(last) if len(last) <= 2 else f"{last[0]} et al."
        found[key] = (authors, entry.fields["year"])
    return found


def _markdown(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
