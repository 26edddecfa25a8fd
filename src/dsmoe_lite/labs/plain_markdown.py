"""Replace the book's MyST roles by Markdown that JupyterLab renders: equation numbers, authors and years."""

import re
from pathlib import Path
from typing import Any

LABELLED = re.compile(r"\$\$((?:(?!\$\$).)*)\$\$ \((eq:[\w-]+)\)", re.DOTALL)
REFERENCE = re.compile(r"\{eq\}`(eq:[\w-]+)`")
CITATION = re.compile(r"\{cite:([pt])\}`([\w,-]+)`")


def equation_numbers(sources: list[str], chapter: int) -> dict[str, str]:
    """Number the labelled equations in a chapter's Markdown cells: {"eq:gate": "2.1"}."""
    labels = [label for source in sources for _, label in LABELLED.findall(source)]
    return {label: f"{chapter}.{number}" for number, label in enumerate(labels, start=1)}


def rewrite_cell(source: str, numbers: dict[str, str], citations: dict[str, tuple[str, str]]) -> str:
    """Rewrite one Markdown cell; `citations` maps a key to (authors, year). Unknown labels and keys stay unchanged."""

    def equation(match: re.Match[str]) -> str:
        return f"$${match[1].rstrip()}\n\\tag{{{numbers[match[2]]}}}\n$$"

    def reference(match: re.Match[str]) -> str:
        return f"Eq. ({numbers[match[1]]})" if match[1] in numbers else match[0]

    def citation(match: re.Match[str]) -> str:
        known = [citations[key] for key in match[2].split(",") if key in citations]
        if match[1] == "p":
            return "(" + "; ".join(f"{authors}, {year}" for authors, year in known) + ")" if known else match[0]
        return ", ".join(f"{authors} ({year})" for authors, year in known) or match[0]

    return CITATION.sub(citation, REFERENCE.sub(reference, LABELLED.sub(equation, source)))


def rewrite_notebook(notebook: dict[str, Any], chapters: dict[int, dict[str, Any]], bibliography: Path) -> None:
    """Rewrite the Markdown cells of a notebook (as JSON) in place; `chapters`: all chapters by number."""
    numbers: dict[str, str] = {}
    for number, chapter in chapters.items():
        numbers |= equation_numbers(_markdown(chapter), number)
    citations = read_citations(bibliography) if bibliography.exists() else {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = rewrite_cell("".join(cell["source"]), numbers, citations)


def read_citations(bibliography: Path) -> dict[str, tuple[str, str]]:
    """Authors and year by citation key: ("Lepikhin et al.", "2021"), ("Zhang and Sennrich", "2019")."""
    from pybtex.database import parse_file

    citations = {}
    for key, entry in parse_file(str(bibliography)).entries.items():
        surnames = [" ".join(person.last_names).strip("{}") for person in entry.persons["author"]]
        authors = " and ".join(surnames) if len(surnames) <= 2 else f"{surnames[0]} et al."
        citations[key] = (authors, entry.fields["year"])
    return citations


def _markdown(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
