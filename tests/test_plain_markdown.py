"""Readers' copies in words that JupyterLab shows."""

from dsmoe_lite.common import paths
from dsmoe_lite.labs.plain_markdown import citation_names, equation_numbers, make_plain, plain

CELL = "See\n\n$$\na = b\n$$ (eq:one)\n\nand $$c$$, then\n\n$$\nd\n$$ (eq:two)\n\n{eq}`eq:one` by {cite:t}`GShard2020`."


def test_equations_are_numbered_in_order_and_named_by_number() -> None:
    numbers = equation_numbers([CELL, "$$e$$ (eq:three)"], 2)
    assert numbers == {"eq:one": "2.1", "eq:two": "2.2", "eq:three": "2.3"}
    text = plain(CELL, numbers, {"GShard2020": ("Lepikhin et al.", "2021")})
    assert "a = b\n\\tag{2.1}\n$$\n\nand $$c$$, then" in text
    assert "Eq. (2.1) by Lepikhin et al. (2021)." in text
    assert "eq:" not in text


def test_citations_join_and_what_is_unknown_stays() -> None:
    names = {"A": ("Zhang and Sennrich", "2019"), "B": ("Shazeer", "2020")}
    assert plain("{cite:p}`A,B`", {}, names) == "(Zhang and Sennrich, 2019; Shazeer, 2020)"
    assert plain("{cite:p}`C` {eq}`eq:none`", {}, names) == "{cite:p}`C` {eq}`eq:none`"


def test_the_course_bibliography_gives_a_name_and_year_for_every_entry() -> None:
    names = citation_names(paths.NOTEBOOKS / "references.bib")
    assert names["RMSNorm"] == ("Zhang and Sennrich", "2019")
    assert names["DeepSeekMoE2024"] == ("Dai et al.", "2024")
    assert names["DeepSeekV3"] == ("DeepSeek-AI", "2024")
    assert all(authors and year.isdigit() for authors, year in names.values())


def test_a_chapter_may_name_an_equation_of_another() -> None:
    def notebook(text: str) -> dict:
        return {"cells": [{"cell_type": "markdown", "source": text.splitlines(keepends=True)}]}

    mine = notebook("as in {eq}`eq:one`")
    make_plain(mine, {1: notebook(CELL), 2: mine}, paths.NOTEBOOKS / "references.bib")
    assert mine["cells"][0]["source"] == "as in Eq. (1.1)"
