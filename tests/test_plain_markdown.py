"""Readers' copies: MyST roles are replaced by Markdown that JupyterLab renders."""

from dsmoe_lite.common import paths
from dsmoe_lite.labs.plain_markdown import equation_numbers, read_citations, rewrite_cell, rewrite_notebook

CELL = "See\n\n$$\na = b\n$$ (eq:one)\n\nand $$c$$, then\n\n$$\nd\n$$ (eq:two)\n\n{eq}`eq:one` by {cite:t}`GShard2020`."


def test_equations_are_numbered_and_referred_to_by_number() -> None:
    numbers = equation_numbers([CELL, "$$e$$ (eq:three)"], 2)
    assert numbers == {"eq:one": "2.1", "eq:two": "2.2", "eq:three": "2.3"}
    text = rewrite_cell(CELL, numbers, {"GShard2020": ("Lepikhin et al.", "2021")})
    assert "a = b\n\\tag{2.1}\n$$\n\nand $$c$$, then" in text
    assert "Eq. (2.1) by Lepikhin et al. (2021)." in text
    assert "eq:" not in text


def test_citations_are_joined_and_unknown_keys_stay() -> None:
    names = {"A": ("Zhang and Sennrich", "2019"), "B": ("Shazeer", "2020")}
    assert rewrite_cell("{cite:p}`A,B`", {}, names) == "(Zhang and Sennrich, 2019; Shazeer, 2020)"
    assert rewrite_cell("{cite:p}`C` {eq}`eq:none`", {}, names) == "{cite:p}`C` {eq}`eq:none`"


def test_every_entry_of_the_bibliography_has_authors_and_a_year() -> None:
    names = read_citations(paths.NOTEBOOKS / "references.bib")
    assert names["RMSNorm"] == ("Zhang and Sennrich", "2019")
    assert names["DeepSeekMoE2024"] == ("Dai et al.", "2024")
    assert names["DeepSeekV3"] == ("DeepSeek-AI", "2024")
    assert all(authors and year.isdigit() for authors, year in names.values())


def test_a_chapter_can_refer_to_an_equation_of_another() -> None:
    def notebook(text: str) -> dict:
        return {"cells": [{"cell_type": "markdown", "source": text.splitlines(keepends=True)}]}

    chapter = notebook("as in {eq}`eq:one`")
    rewrite_notebook(chapter, {1: notebook(CELL), 2: chapter}, paths.NOTEBOOKS / "references.bib")
    assert chapter["cells"][0]["source"] == "as in Eq. (1.1)"
