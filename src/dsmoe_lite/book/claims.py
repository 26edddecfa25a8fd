"""The book's page of claims and equations, written from their ledgers."""

import re
from collections import Counter
from collections.abc import Sequence

from dsmoe_lite.common.paths import IS_CLONE, NOTEBOOKS, WORK
from dsmoe_lite.study.equations import Equation
from dsmoe_lite.study.ledger import VERDICTS, Claim

PAGE = (NOTEBOOKS if IS_CLONE else WORK) / "claims.md"  # its links lead to the chapters beside it
PAPERS = {
    "2401.06066": "DeepSeekMoE",
    "2405.04434": "DeepSeek-V2",
    "2412.19437": "DeepSeek-V3",
    "2505.09343": "Insights into DeepSeek-V3",
    "2606.19348": "DeepSeek-V4",
    "2602.17004": "Trinity",
}
MEANING = {
    "exact": "our count is the printed figure, to its last digit",
    "differs": "our count is another figure",
    "holds": "the trend appears: significant at 5% after correction for the other claims of its figure (Holm)",
    "leans": "the trend appears, but is significant only before the correction",
    "inconclusive": "the seeds cannot resolve the trend",
    "reversed": "the opposite appears, significant after the correction",
    "not tested": "no run or count here tests the claim, or fewer than five seeds do",
}
INTRODUCTION = """# What papers claim, and what we find

Written by `dsmoe claims --write` from `data/claims.yml`. Verdicts are recomputed by `dsmoe claims` and by the tests:
counts from the configs, trends from the recorded runs in `data/runs/`. Trends are differences between runs of one seed:
their mean, its 95% interval, the number of seeds, the mean over the standard deviation ($d_z$), and p: as it is, and
corrected by Holm's method within the claim's figure, which decides the verdict. Claims of a protocol also have p
corrected over all claims of that protocol; "not over all" marks those that hold within their figure only. They come
from models of this course's size: they show what happens *here*, not what is true of models a thousand times as large.
"""


def page(claims: Sequence[Claim], equations: Sequence[Equation]) -> str:
    """The page as Markdown: the verdicts and their counts, one table per paper with trends first, the equations."""
    tally = Counter(claim.verdict for claim in claims)
    meaning = [f"| **{verdict}** | {MEANING[verdict]} | {tally[verdict]} |" for verdict in VERDICTS]
    parts = [INTRODUCTION, "\n".join(["| verdict | what it means | claims |", "|---|---|---:|", *meaning])]
    for number, paper in PAPERS.items():
        of_paper = [claim for claim in claims if number in claim.source]
        if of_paper:
            rows = [_row(claim, number) for claim in sorted(of_paper, key=lambda claim: claim.exact is not None)]
            head = ["| claim | printed | ours | verdict | chapter |", "|---|---|---|---|---|"]
            parts.append("\n".join([f"\n## {paper} (arXiv:{number})\n", *head, *rows]))
    rows = [f"| {{eq}}`eq:{e.label}` | {e.source} | `{e.function}` <br>`{e.test}` |" for e in equations]
    head = ["| equation | printed in | function in `dsmoe_lite`, test in `tests` |", "|---|---|---|"]
    parts.append("\n".join(["\n## Equations\n", *head, *rows]))
    return "\n".join(parts) + "\n"


def _row(claim: Claim, number: str) -> str:
    location = claim.source.removeprefix(f"arXiv:{number}, ")
    after = "Chosen after the runs." if claim.trend and claim.trend.after_runs else ""
    easy = claim.easy and f"Could hardly have failed here: {claim.easy}"
    says = " ".join(part for part in (f"{claim.says} <br>*{location}.*", after, easy, claim.why) if part)
    verdict = f"**{claim.verdict}**" + (", not over all" if claim.survives is False else "")
    return f"| {says} | {claim.published} | {claim.ours or '-'} | {verdict} | {_link(claim)} |"


def _link(claim: Claim) -> str:
    if not claim.where:
        return "-"
    chapter, heading = claim.where.split(", ", 1)
    (notebook,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    return f"[{chapter}]({notebook.name}#{_anchor(heading)})"


def _anchor(heading: str) -> str:
    """The id that MyST, like GitHub, gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
